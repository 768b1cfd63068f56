"""The main job in small: a run directory that explains itself, and the same run again."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, drawing, report, runs, sample, train, trained
from experiments.config import default
from experiments.configs import (
    cifar10,
    digits,
    digits_conditional,
    digits_learned_variance,
    fashion_mnist,
    mnist,
)
from jaxdiff.training import checkpoints
from tests import small_runs

ROOT = Path(__file__).parents[2]


def tiny(**changes):
    config = digits.get_config()
    config.update(
        {
            "model": {"channels": 8, "channel_multipliers": (1,), "dropout": 0.1},
            "data": {"flip": True, "dequantize": True},
            "optimizer": {"warmup_steps": 2},
            "train": {
                "batch_size": 8, "num_steps": 6, "log_every": 2, "checkpoint_every": 2,
                "sample_every": 4, "tensorboard": True,
            },
            "sample": {"num": 20, "batch_size": 8, "steps": 3},
        }
    )  # fmt: skip
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    train.train(tiny(), workdir)
    return workdir


@pytest.fixture
def small(monkeypatch):
    """A network that compiles at once, where it is not what is tested."""
    monkeypatch.setattr(build, "make_model", small_runs.make_model)


@pytest.fixture(scope="module")
def small_finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_model", small_runs.make_model)
        train.train(tiny(), workdir)
    return workdir


def sha256(workdir):
    return json.loads((workdir / "run.json").read_text())["sha256"]


def test_a_run_directory_explains_itself(finished, capsys):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json", "run.json", "metrics.jsonl", "checkpoints", "samples", "samples.png",
        "samples.npz", "report.html", "tensorboard", "losses.f32", ".lock",
    }  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert config == runs.as_json(tiny())
    about = json.loads((finished / "run.json").read_text())
    assert about["seed"] == 0
    assert about["versions"]["jax"] == jax.__version__
    assert about["parameters"] > 1000
    assert len(about["sha256"]) == 64
    assert set(about["scores"]) >= {"precision", "coverage"}
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert [p.name for p in (finished / "samples").iterdir()] == ["step_00000004.png"]
    with np.load(finished / "samples.npz") as archive:
        assert archive["samples"].shape == archive["images"].shape == (20, 8, 8, 1)
        assert archive["samples"].dtype == np.float32
        assert json.loads(str(archive["options"]))["solver"] == "ddpm"


def test_the_report_needs_nothing_from_outside(finished):
    class Sources(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.found += [v for k, v in attrs if k in ("src", "href") and v]

    parser = Sources()
    text = (finished / "report.html").read_text()
    parser.feed(text)
    assert parser.found
    assert all(source.startswith("data:") for source in parser.found)
    assert sha256(finished) in text
    assert "learning_rate" in text


class KilledError(Exception):
    """Stands for the death of a process between two steps."""


@pytest.mark.parametrize(
    ("run", "die_at"), [("small_finished", 1), ("small_finished", 2), ("finished", 5)]
)
def test_an_interrupted_run_ends_with_the_same_parameters(
    request, tmp_path, monkeypatch, run, die_at
):
    uninterrupted = request.getfixturevalue(run)
    if run == "small_finished":
        request.getfixturevalue("small")
    real = build.make_batches

    class Dying:
        def __init__(self, batches):
            self.batches, self.left = batches, die_at

        def __next__(self):
            if not self.left:
                raise KilledError
            self.left -= 1
            return next(self.batches)

        def __getattr__(self, name):
            return getattr(self.batches, name)

    monkeypatch.setattr(build, "make_batches", lambda *args, **kwargs: Dying(real(*args, **kwargs)))
    with pytest.raises(KilledError):
        train.train(tiny(), tmp_path)
    monkeypatch.setattr(build, "make_batches", real)
    train.train(tiny(), tmp_path)
    assert sha256(tmp_path) == sha256(uninterrupted)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]  # nothing twice


def test_a_finished_run_is_finished_again(small_finished, small, tmp_path, capsys):
    shutil.copytree(small_finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "samples.png").unlink()
    train.train(tiny(), tmp_path)
    assert (tmp_path / "samples.png").read_bytes() == (small_finished / "samples.png").read_bytes()
    assert sha256(tmp_path) == sha256(small_finished)
    assert f"sha256 of the parameters: {sha256(tmp_path)}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of what Orbax leaves behind when it fails
def test_another_configuration_is_refused_unless_told(small_finished, small, tmp_path):
    shutil.copytree(small_finished, tmp_path, dirs_exist_ok=True)
    other = tiny(train={"num_steps": 8})

    def files():
        return {p: p.read_bytes() for p in tmp_path.rglob("[!.]*") if p.is_file()}  # not the lock

    before = files()
    with pytest.raises(runs.RunError, match=r"(?s)train\.num_steps: 6 there, 8 here.*--workdir"):
        train.train(other, tmp_path)
    assert files() == before
    wider = tiny(vlb_weight=1e-3)  # twice the output: does not fit the checkpoint, told or not
    with pytest.raises(checkpoints.CheckpointError, match="of another model"):
        train.train(wider, tmp_path, allow_config_change=True)
    assert files() == before
    state = train.train(other, tmp_path, allow_config_change=True)
    assert int(state.step) == 8
    with pytest.raises(runs.RunError, match=r"at step 8 already, beyond train\.num_steps=6"):
        train.train(tiny(), tmp_path, allow_config_change=True)


@pytest.mark.filterwarnings("ignore")  # of what Orbax leaves behind when it fails
def test_a_truncated_checkpoint_is_moved_aside_and_the_one_before_taken(
    small_finished, small, tmp_path
):
    shutil.copytree(small_finished, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "checkpoints/6/state/d").iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.warns(checkpoints.CheckpointWarning, match=r"going back to step 4"):
        train.train(tiny(), tmp_path)
    assert sha256(tmp_path) == sha256(small_finished)
    assert (tmp_path / "checkpoints/6.damaged").is_dir()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"sample": {"steps": 1001}}, ValueError, "num_steps must be an integer from 1 to"),
        ({"sample": {"solver": "ddpn"}}, ValueError, "did you mean 'ddpm'"),
        (
            {"sample": {"solver": "ddim", "solver_options": {"eta": 2.0}}},
            ValueError,
            "eta must lie in",
        ),
        ({"schedule": {"name": "cosin"}}, ValueError, "did you mean 'cosine'"),
        ({"schedule": {"name": "linear", "beta_end": 1.0}}, ValueError, "beta must lie in"),
        ({"schedule": {"beta_end": 0.1}}, ValueError, "takes no beta_end"),
        ({"parameterization": "epsilon"}, ValueError, "did you mean 'eps'"),
        ({"weighting": "snrr"}, ValueError, "did you mean 'snr'"),
        ({"timesteps": "uniformly"}, ValueError, "did you mean 'uniform'"),
        ({"optimizer": {"name": "sgd"}}, ValueError, "optimizer.name must be one of adam, adamw"),
        ({"optimizer": {"weight_decay": 0.1}}, ValueError, "belongs to adamw"),
        ({"train": {"batch_size": 0}}, ValueError, "batch_size must be at least 1"),
        ({"train": {"batch_size": 12}}, ValueError, "multiple of their number, 8, got 12"),
        ({"sample": {"num": 5}}, ValueError, "needs more samples than that, got sample.num=5"),
        ({"data": {"pad_to": 16}}, ValueError, "which data.pad_to changes"),
        ({"train": {"num_steps": 0}}, ValueError, "num_steps must be at least 1"),
        ({"model": {"channel_multipliers": (1, 2, 4, 8, 16)}}, ValueError, "divisible by 16"),
        ({"ema_decay": 1.0}, ValueError, "decay must lie in"),
        ({"data": {"name": "digts"}}, ValueError, "digits"),
        ({"data": {"name": "cifar10"}}, FileNotFoundError, "not prepared.*download_and_prepare"),
        ({"data": {"split": "tain"}}, ValueError, "train"),
        ({"data": {"name": "folder"}}, ValueError, "needs data.path"),
        ({"data": {"name": "folder", "path": "/nowhere"}}, FileNotFoundError, "/nowhere"),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_written(tmp_path, changes, error, match):
    workdir = tmp_path / "run"
    with pytest.raises(error, match=match):
        train.train(tiny(**changes), workdir)
    assert not workdir.exists()


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(runs.RunError, match=r"cannot write to .*file/run.*--workdir=DIR"):
        train.train(tiny(), tmp_path / "file/run")


def test_keys_and_types_of_a_configuration_are_checked():
    config = default()
    with pytest.raises((KeyError, AttributeError), match="seed"):
        config.sed = 1
    with pytest.raises(TypeError):
        config.seed = "one"
    with pytest.raises(TypeError):
        config.update({"train": {"batch_size": 1.5}})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--config.sed=1"], 'Did you mean "seed" instead of "sed"'),
        (["--config.train.batch_siz=1"], 'Did you mean "batch_size"'),
        (["--config.train.batch_size=many"], "batch_size=many"),
        (["surplus"], "surplus"),
    ],
)
def test_the_command_line_names_what_is_wrong(tmp_path, arguments, match):
    command = [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command + arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "module",
    [digits, digits_conditional, digits_learned_variance, mnist, fashion_mnist, cifar10],
)
def test_every_config_makes_a_model_and_a_sampler(module):
    config = module.get_config()
    shape = {"cifar10": (32, 32, 3)}.get(config.name, (32, 32, 1))
    if config.name.startswith("digits"):
        shape = (8, 8, 1)
    init, _ = build.make_training(config, shape)
    state = jax.eval_shape(init)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert config.name != "cifar10" or count == 35_746_307
    drawn = jax.eval_shape(drawing.make_draw(config, shape), state.ema, 0)
    assert drawn.shape == (config.sample.batch_size, *shape)


def test_samples_are_the_same_in_any_batches_and_from_any_index(finished):
    config, params, shape, step = trained.load(finished, None, ema=True)
    assert step == 6
    whole, numbers = sample.draw_all(config, params, shape, 0)
    np.testing.assert_array_equal(numbers, np.arange(20))
    with np.load(finished / "samples.npz") as archive:
        np.testing.assert_allclose(archive["samples"], whole, atol=1e-5)
    config.update({"sample": {"num": 7, "batch_size": 5}})
    some, numbers = sample.draw_all(config, params, shape, 9)
    np.testing.assert_array_equal(numbers, np.arange(9, 16))
    np.testing.assert_allclose(some, whole[9:16], atol=1e-5)


def test_the_picture_is_there_before_the_last_samples_are(
    small_finished, small, tmp_path, monkeypatch
):
    config, params, shape, _ = trained.load(small_finished, None, ema=True)
    written, real = [], report.save_picture
    monkeypatch.setattr(report, "save_picture", lambda *args: [written.append(args), real(*args)])
    for shown, full in ((10, [16]), (21, [])):
        monkeypatch.setattr(report, "SHOWN", shown)
        samples, _ = sample.draw_all(config, params, shape, stem=tmp_path / "early")
        assert [len(some) for _, some in written] == full
        if full:
            real(tmp_path / "late", samples)
            early, late = ((tmp_path / name).read_bytes() for name in ("early.png", "late.png"))
            assert early == late
        written.clear()


def test_the_reverse_process_is_animated(finished, tmp_path):
    config, params, shape, _ = trained.load(finished, None, ema=False)
    sample.save_gif(tmp_path / "a.gif", config, params, shape, 0)
    from PIL import Image

    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 3


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(runs.RunError, match="holds no run"):
        trained.load(tmp_path, None, ema=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(runs.RunError, match="is damaged"):
        trained.load(tmp_path, None, ema=True)
    runs.write_json(tmp_path / "config.json", runs.as_json(tiny()))
    with pytest.raises(runs.RunError, match="no checkpoint yet"):
        trained.load(tmp_path, None, ema=True)


class Broken:
    """Batches, of which some hold what is not a number."""

    def __init__(self, batches, numbers):
        self.batches, self.numbers, self.number = batches, numbers, 0

    def __next__(self):
        batch, self.number = next(self.batches), self.number + 1
        return {**batch, "x0": batch["x0"] * (np.nan if self.number in self.numbers else 1)}

    def __getattr__(self, name):
        return getattr(self.batches, name)


def test_batches_that_are_not_finite_are_skipped(small, tmp_path, monkeypatch):
    make = build.make_batches
    monkeypatch.setattr(
        build, "make_batches", lambda *args, **kwargs: Broken(make(*args, **kwargs), {2, 3, 5})
    )
    state = train.train(tiny(), tmp_path / "run")
    assert int(state.step) == 6
    assert int(state.skipped.total) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema)))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_many_in_a_row_end_the_run_and_lose_nothing(small, tmp_path, monkeypatch):
    make = build.make_batches
    monkeypatch.setattr(
        build, "make_batches", lambda *args, **kwargs: Broken(make(*args, **kwargs), {2, 3, 4, 5})
    )
    config = tiny()
    config.train.max_skipped = 3
    with pytest.raises(runs.RunError, match=r"3 batches in a row up to step 4 .*3 in all"):
        train.train(config, tmp_path / "run")
    monkeypatch.setattr(build, "make_batches", make)
    state = train.train(config, tmp_path / "run")  # from step 2
    assert (int(state.step), int(state.skipped.total)) == (6, 1)


def test_a_run_from_before_batches_were_skipped_is_read(small, tmp_path):
    config = tiny()
    config.train.max_skipped = 0
    train.train(config, tmp_path / "run")
    path = tmp_path / "run/config.json"
    saved = json.loads(path.read_text())
    del saved["train"]["max_skipped"]
    path.write_text(json.dumps(saved))
    config, _, _, step = trained.load(tmp_path / "run", None, ema=True)
    assert (config.train.max_skipped, step) == (0, 6)


def test_a_half_written_line_of_metrics_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with runs.Metrics(tmp_path, 2) as metrics:
        metrics.write(step=3, losses=np.float32([0.5]), loss=0.5)
    np.testing.assert_array_equal(runs.read_losses(tmp_path), [np.nan, np.nan, 0.5])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}] == metrics.lines
