"""Averages after training: near those tracked in it, and run directories like any other."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, cohorts, ema, runs, train
from experiments import trained as models
from experiments.configs import clinical, digits
from jaxdiff.training import checkpoints

STEPS = (4, 8, 12, 16, 20, 24)
WANTED = 0.08


class Pixels(nn.Module):
    """A network of one pixel at a time, which is compiled at once."""

    channels: int

    @nn.compact
    def __call__(self, x, level, cond=None, **_):
        return nn.Dense(self.channels)(nn.tanh(nn.Dense(4)(x)))


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Data sets of this module alone, and a network that is no UNet."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
    patch.setattr(build, "make_model", lambda config, channels: Pixels(channels))
    yield
    patch.undo()


def config_of(**averages):
    config = digits.get_config()
    config.name = "tiny"
    config.update(
        {
            "optimizer": {"learning_rate": 3e-2, "warmup_steps": 0},
            "averages": averages,
            "train": {
                "batch_size": 8, "num_steps": 24, "log_every": 24, "checkpoint_every": 12,
                "sample_every": 0,
            },
            "sample": {"num": 0},
            "evaluate": {"neighbours": 0},
        }
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that kept two widths, and by step and name the averages of one that tracked WANTED."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    train.train(
        config_of(sigma_rels=(0.05, 0.1), half_lives=(4.0,), snapshot_every=4), folder / "tiny"
    )
    widths, halves = (0.05, 0.1, WANTED), (4.0,)
    config = config_of(sigma_rels=widths, half_lives=halves)
    config.train.update({"checkpoint_every": 4, "keep": 6})
    state = train.train(config, folder / "tracked")
    like = ema.spread(jax.eval_shape(lambda: state))
    with checkpoints.open_folder(folder / "tracked/checkpoints", read_only=True) as saved:
        for step in STEPS:
            averages = checkpoints.restore(saved, like, step).state.averages
            found[step] = {name: flat(tree) for name, tree in averages.items()}
    return folder / "tiny", found


def describe(workdir, config, shape=(8, 8, 1)):
    runs.write_json(workdir / "run.json", runs.describe(config, 1, shape))
    runs.write_json(workdir / "config.json", runs.as_json(config))


@pytest.fixture(scope="module")
def made(trained):
    return ema.make(trained[0], sigma_rel=WANTED)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


def load(workdir, *, average=True):
    _, params, _, step = models.load(workdir, None, ema=average)
    return flat(params), step


def about(workdir):
    return json.loads((workdir / "run.json").read_text())


def test_a_width_is_made_of_snapshots_of_others(trained, made, tmp_path):
    workdir, tracked = trained
    earlier = ema.make(workdir, tmp_path / "earlier", sigma_rel=WANTED, step=16)
    for (out, of), last, times in ((made, 24, 10), (earlier, 16, 4)):
        found, step = load(out)
        assert step == of["step"] == last
        assert of["snapshots"] == [s for s in STEPS if s <= last]
        wanted = tracked[last][f"power_{WANTED}"]
        stored = [tracked[last][name] for name in ("power_0.05", "power_0.1")]
        nearest = min(np.linalg.norm(average - wanted) for average in stored)
        assert np.linalg.norm(found - wanted) < nearest / times
        assert 0 < of["residual"] < 0.05
        assert np.sum(of["weights"]) == pytest.approx(1, abs=1e-12)
        assert of["norm"] == pytest.approx(np.linalg.norm(of["weights"]))


def test_a_width_that_was_kept_comes_back(trained, tmp_path):
    workdir, tracked = trained
    out, of = ema.make(workdir, tmp_path / "out", sigma_rel=0.1, step=12)
    np.testing.assert_allclose(load(out)[0], tracked[12]["power_0.1"], rtol=1e-5, atol=1e-5)
    assert of["norm"] == pytest.approx(1)


def test_the_result_is_a_run_that_says_where_it_is_from(trained, made):
    workdir, (out, of) = trained[0], made
    assert out == workdir.with_name("tiny_ema_0.08")
    assert about(out)["average"] == of
    assert (of["workdir"], of["sha256"]) == (str(workdir), about(workdir)["sha256"])
    config = runs.load_config(out)
    assert config.name == "tiny_ema_0.08"
    assert not config.averages.sigma_rels
    assert about(out)["parameters"] == load(out)[0].size
    # Without the average it is the same model, not another one by accident.
    np.testing.assert_array_equal(load(out, average=False)[0], load(out)[0])
    with pytest.raises(runs.RunError, match="another configuration"):  # so training refuses
        runs.open_workdir(out, runs.load_config(workdir))


def test_a_tracked_average_is_taken_out_as_it_is(trained, tmp_path):
    workdir, tracked = trained
    for step, last in ((None, 24), (12, 12)):
        out, of = ema.make(workdir, tmp_path / f"{step}", average="half_life_4", step=step)
        found, at = load(out)
        np.testing.assert_array_equal(found, tracked[last]["half_life_4"])
        assert at == last
        assert (of["name"], of["step"]) == ("half_life_4", last)


def test_the_same_command_gives_the_same_again(trained, made, tmp_path):
    out = shutil.copytree(made[0], tmp_path / "out")
    expected, params = about(out), load(out)[0]
    (out / "drawn").mkdir()  # what other commands wrote there
    # As one that was interrupted leaves it; until it is done again, it holds no run.
    (out / "config.json").unlink()
    shutil.rmtree(out / "checkpoints/24")
    with pytest.raises(runs.RunError, match="holds no run"):
        load(out)
    for _ in range(2):
        ema.make(trained[0], out, sigma_rel=WANTED)
        assert about(out) == expected
        assert load(out)[0].tobytes() == params.tobytes()
    assert (out / "drawn").is_dir()
    # What replaces it leaves nothing of it.
    ema.make(trained[0], out, average="power_0.05", step=12)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["12"]


def test_nothing_else_is_overwritten(trained, tmp_path):
    for name, out in (("file", tmp_path / "file"), ("folder", tmp_path / "mine/notes.txt")):
        out.parent.mkdir(exist_ok=True)
        out.write_text("mine")
        with pytest.raises(runs.RunError, match="exists, and this command did not make it"):
            ema.make(trained[0], out if name == "file" else out.parent, sigma_rel=WANTED)
        assert out.read_text() == "mine"
    with pytest.raises(runs.RunError, match="tiny exists, and"):
        ema.make(trained[0], trained[0], sigma_rel=WANTED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --sigma_rel=0.08, of that width, or --average=NAME"),
        ({"sigma_rel": 0.08, "average": "half_life_4"}, "either --sigma_rel"),
        ({"sigma_rel": 0.3}, r"sigma_rel must lie in \(0, 0.2887\), got 0.3"),
        ({"sigma_rel": 0.0}, r"sigma_rel must lie in \(0, 0.2887\), got 0.0"),
        ({"sigma_rel": 0.08, "step": 10}, r"one of \[4, 8, 12, 16, 20, 24\], got 10"),
        ({"average": "half_life_4", "step": 4}, r"a checkpoint, one of \[12, 24\], got 4"),
        ({"average": "half_life_5"}, "one of half_life_4, power_0.05, power_0.1, got"),
    ],
)
def test_bad_options_are_refused(trained, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ema.make(trained[0], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_that_kept_too_little_says_how_to_keep_more(trained, tmp_path):
    def run_of(**averages):
        describe(tmp_path, config_of(**averages))
        return tmp_path

    with pytest.raises(runs.RunError, match=r"tracked no average.*config.averages.half_lives"):
        ema.make(run_of(), sigma_rel=None, average="half_life_4")
    with pytest.raises(runs.RunError, match=r"no snapshots.*sigma_rels=0.05,0.1.*snapshot_every"):
        ema.make(run_of(sigma_rels=(0.05, 0.1)), sigma_rel=WANTED)
    (tmp_path / "snapshots").mkdir()
    with pytest.raises(runs.RunError, match="no snapshot yet"):
        ema.make(run_of(sigma_rels=(0.05, 0.1)), sigma_rel=WANTED)
    with pytest.raises(runs.RunError, match=r"two widths or more.*sigma_rels=\(0.05,\)"):
        ema.make(run_of(sigma_rels=(0.05,)), sigma_rel=WANTED)
    with pytest.raises(runs.RunError, match="no checkpoint yet"):
        ema.make(run_of(half_lives=(4.0,)), average="half_life_4")


def test_several_processes_are_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(runs.RunError, match="one process"):
        ema.make(trained[0], tmp_path / "out", sigma_rel=WANTED)


def test_a_model_of_a_table_keeps_what_drawing_needs(tmp_path):
    workdir, config = tmp_path / "clinical", clinical.get_config()
    config.averages.half_lives = (4.0,)
    cohort = cohorts.load(config)
    cohorts.resolve(config, cohort)
    shape = cohort.sequences.x0.shape[1:]
    with checkpoints.open_folder(workdir / "checkpoints") as saved:
        init, _ = build.make_training(config, shape, cohort.own)
        checkpoints.save(saved, jax.jit(init)(), data={}, config={})
    cohorts.save(workdir, cohort)
    describe(workdir, config, shape)
    out, _ = ema.make(workdir, average="half_life_4")
    models.load(out, None, ema=True, tables_too=True)
    for name in ("cohort.json", "schema.json"):
        assert (out / name).read_bytes() == (workdir / name).read_bytes()


def test_the_command_says_what_it_did(trained, tmp_path, monkeypatch, capsys):
    given = {"workdir": str(trained[0]), "out": str(tmp_path / "out"), "step": 8}
    for options in ({"sigma_rel": 0.07, "average": None}, {"average": "power_0.1"}):
        given = {**given, **options}
        if given["average"]:
            given |= {"sigma_rel": None, "step": None}
        monkeypatch.setattr(ema, "FLAGS", SimpleNamespace(**given))
        ema.main()
    text = capsys.readouterr().out
    for part in (
        "width 0.07 at step 8, made of 2 snapshots", "steps: 4, 8", "widths: 0.05, 0.1",
        "norm of the weights: ", "residual of the fit: ", "power_0.1 of the checkpoint of step 24",
    ):  # fmt: skip
        assert part in text
