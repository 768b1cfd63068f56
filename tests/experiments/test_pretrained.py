"""Models from elsewhere: drawn from, trained further; and our own, exported."""

import ast
import json
import shlex
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, drawing, export, pretrained, runs, sample, scores, train, trained
from jaxdiff import denoisers, guidance, interop, sampling, solvers
from tests import small_runs
from tests.interop import test_diffusers

OWN = {
    "model": {"channels": 8, "channel_multipliers": (1,)},
    "train": {"batch_size": 8, "num_steps": 2, "log_every": 1, "checkpoint_every": 1},
    "averages": {"half_lives": (10,)},
}


BOOLS = ("True", "False", "None")


def tiny(**changes):
    return small_runs.tiny(OWN, changes)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A directory as diffusers writes it, of random parameters."""
    folder = tmp_path_factory.mktemp("theirs") / "tiny-ddpm"
    test_diffusers.write(folder)
    return folder


def test_a_directory_of_diffusers_becomes_a_configuration(theirs):
    found, direct = pretrained.load(theirs), interop.load_diffusers(theirs)
    assert (found.config.name, found.step) == ("tiny-ddpm", None)
    assert found.shape == direct.image_shape
    assert build.make_model(found.config, found.shape[-1]) == direct.model
    np.testing.assert_array_equal(
        build.make_schedule(found.config).alphas_bar, direct.schedule.alphas_bar
    )
    assert build.make_parameterization(found.config) is direct.parameterization
    jax.tree.map(np.testing.assert_array_equal, found.params, direct.params)


def test_samples_are_those_of_its_network(theirs, tmp_path, monkeypatch):
    """By the command, against the library's own functions."""
    values = {name: None for name in sample.OVERRIDES} | {"num": 3, "steps": 2, "solver": "ddim"}
    values |= {
        "pretrained": str(theirs), "workdir": "runs/digits", "out": str(tmp_path), "step": None,
        "ema": True, "fsdp": 1, "first_index": 0, "gif": False, "where": [], "visits": None,
    }  # fmt: skip

    class Flags(types.SimpleNamespace):
        def __getitem__(self, name):
            return types.SimpleNamespace(present=name in self.given)

    monkeypatch.setattr(sample, "FLAGS", Flags(given=(), **values))
    sample.main()
    with np.load(tmp_path / "samples.npz") as archive:
        drawn = archive["samples"]
    direct = interop.load_diffusers(theirs)
    denoiser = denoisers.from_network(
        direct.model.apply, direct.params, direct.schedule, direct.parameterization
    )
    expected = jax.jit(
        lambda: sampling.sample(
            jax.random.key(0), guidance.clip_x0(denoiser), solvers.ddim(),
            drawing.GRIDS[direct.drawing.spacing](direct.schedule, 2), (3, *direct.image_shape),
        )
    )()  # fmt: skip
    np.testing.assert_allclose(drawn, expected, atol=2e-4)

    monkeypatch.setattr(sample, "FLAGS", Flags(given=("workdir",), **values))
    with pytest.raises(ValueError, match="leave them or --pretrained"):
        sample.main()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trained_betas": [0.1] * 100}, "trained_betas have none"),
        ({"clip_sample_range": 2.0}, "clip_sample_range must be 1"),
    ],
)
def test_what_configurations_have_no_words_for_is_refused(theirs, tmp_path, fields, message):
    folder = shutil.copytree(theirs, tmp_path / "other")
    path = next(folder.rglob("scheduler_config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        pretrained.load(folder)


@pytest.fixture
def pointwise(monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A short run with scores, of a network that compiles at once."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_model", small_runs.make_model)
        train.train(tiny(), workdir)
    record = {"part": "bound", "scores": {"bits": scores.score(3.21, 0.12)}}
    scores.append(workdir / scores.FILE, record)
    return workdir


def test_an_export_is_the_run_s_model(pointwise, ours, tmp_path):
    out = tmp_path / "exported"
    export.export(ours, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "model.json", "model.safetensors",
    ]  # fmt: skip
    found = pretrained.load(out)
    config, params, shape, step = trained.load(ours, None, ema=True)
    assert (found.shape, found.step) == (shape, step)
    assert runs.as_json(found.config) == {**runs.as_json(config), "mesh": {"data": -1, "fsdp": 1}}
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    card = (out / "README.md").read_text()
    num = sum(leaf.size for leaf in jax.tree.leaves(params))
    for text in (f"{num:,} parameters", "8 x 8", "3.21 +- 0.12", runs.fingerprint(params)):
        assert text in card
    export.export(ours, out, 1, ema=False)
    again = pretrained.load(out)
    assert again.step == 1
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.load(ours, 1, ema=False)[1])
    with pytest.raises(runs.RunError, match="something else than an export"):
        export.export(ours, ours)
    (out / "model.json").write_text(json.dumps({"config": {"modle": {}}}))
    with pytest.raises(ValueError, match=r"model\.json is damaged"):
        pretrained.load(out)


def test_training_starts_from_a_run_and_an_export(pointwise, ours, tmp_path, capsys):
    """With no learning, what it ends with is what it began with: parameters and averages."""
    export.export(ours, tmp_path / "exported")
    params = trained.load(ours, None, ema=True)[1]
    still = {"learning_rate": 1e-30, "warmup_steps": 0}
    for number, path in enumerate((ours, tmp_path / "exported")):
        workdir = tmp_path / f"tuned_{number}"
        config = tiny(init_from=str(path), optimizer=still, parameterization="eps", seed=5)
        state = train.train(config, workdir)
        assert "note: parameterization is eps here and was v in" in capsys.readouterr().out
        for tree in (state.params, state.ema, state.averages["half_life_10"]):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), tree, params)
        origin = json.loads((workdir / "run.json").read_text())["init_from"]
        assert origin == {"path": str(path), "sha256": runs.fingerprint(params)}


def test_a_run_that_goes_on_needs_its_origin_no_more(pointwise, ours, tmp_path):
    export.export(ours, tmp_path / "exported")
    config = tiny(init_from=str(tmp_path / "exported"))
    train.train(config, tmp_path / "whole")
    train.train(config, tmp_path / "run", until=1)
    shutil.rmtree(tmp_path / "exported")
    train.train(config, tmp_path / "run")
    whole, resumed = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "run")
    )
    assert whole["sha256"] == resumed["sha256"]
    assert whole["init_from"] == resumed["init_from"]


def test_training_starts_from_diffusers_or_says_what_to_set(theirs, tmp_path):
    found = pretrained.load(theirs)
    config = tiny(init_from=str(theirs))
    with pytest.raises(ValueError, match="holds another network") as error:
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    told = shlex.split(str(error.value).partition("To have the same one: ")[2])
    assert "--config.model.channel_multipliers=(1,2)" in told
    # As the command takes them, they make the network.
    for word in told:
        name, _, value = word.removeprefix("--config.").partition("=")
        section, key = name.split(".")
        of_type = config[section].get_type(key)
        value = ast.literal_eval(value) if of_type is tuple or value in BOOLS else of_type(value)
        config[section][key] = value
    assert build.make_model(config, found.shape[-1]) == build.make_model(found.config, 1)
    like = jax.eval_shape(
        lambda: build.make_model(found.config, found.shape[-1]).init(
            jax.random.key(0), jnp.zeros((1, *found.shape)), jnp.zeros(1)
        )
    )
    found.config.init_from = str(theirs)
    params, origin = pretrained.start_from(found.config, like)
    jax.tree.map(np.testing.assert_array_equal, params, found.params)
    assert origin["sha256"] == runs.fingerprint(found.params)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(runs.RunError, match="is no directory"):
        pretrained.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.load(tmp_path)
