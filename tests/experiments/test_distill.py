"""Distillation in small: a run like any other, whose few steps go where its teacher's many go."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, distill, drawing, runs, sample, train, trained
from experiments.config import default
from experiments.configs import digits
from jaxdiff.training import checkpoints
from tests import small_runs

ROOT = Path(__file__).parents[2]
UPDATES = 60
OPTIONS = {
    "step": None, "teacher_steps": 4, "student_steps": 1, "updates": UPDATES, "batch_size": 16,
    "learning_rate": 3e-3, "ema_decay": 0.9, "weighting": "truncated_snr",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _a_network_that_compiles_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_model", small_runs.make_model)
        yield


def tiny():
    """A run with labels, whose samples are guided; with all that a student has not."""
    config = digits.get_config()
    config.name = "tiny"
    config.update(
        {
            "model": {"channels": 8, "channel_multipliers": (1,), "dropout": 0.1},
            "labels": {"num_classes": 10, "dropout": 0.2},
            "timesteps": "loss_aware",
            "offset_noise": 0.1,
            "optimizer": {"warmup_steps": 2},
            "train": {
                "batch_size": 8, "num_steps": 8, "log_every": 30, "checkpoint_every": 8,
                "sample_every": 4,
            },
            "sample": {
                "num": 32, "batch_size": 32, "steps": 3, "solver": "ddpm",
                "solver_options": {"variance": "large"}, "guidance": "classifier_free",
                "guidance_options": {"scale": 2.0},
            },
        }
    )  # fmt: skip
    return config


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run as training leaves it, of random parameters: quicker, and less nearly linear."""
    workdir, config = tmp_path_factory.mktemp("runs") / "tiny", tiny()
    init, _ = build.make_training(config, (8, 8, 1))
    state = init()
    generator = np.random.default_rng(0)

    def shaken(p):
        return p + 0.1 * generator.normal(size=p.shape).astype(np.float32)

    state = dataclasses.replace(
        state, step=jnp.int32(8), params=None, ema=jax.tree.map(shaken, state.params)
    )
    state = dataclasses.replace(state, params=jax.tree.map(jnp.zeros_like, state.ema))
    with checkpoints.open_folder(workdir / "checkpoints") as saved:
        checkpoints.save(saved, state, data={}, config={})
    runs.write_json(workdir / "run.json", runs.describe(config, 1, (8, 8, 1)))
    runs.write_json(workdir / "config.json", runs.as_json(config))
    return workdir


@pytest.fixture(scope="module")
def distilled(taught):
    out = taught.with_name("tiny_distilled")
    distill.distill(taught, out, **OPTIONS)
    return out


def about(workdir):
    return json.loads((workdir / "run.json").read_text())


@pytest.mark.parametrize(
    ("teacher_steps", "student_steps", "expected"),
    [(64, 4, [64, 32, 16, 8]), (2, 1, [2]), (24, 3, [24, 12, 6])],
)
def test_each_student_is_the_teacher_of_the_next(teacher_steps, student_steps, expected):
    assert distill.halvings(teacher_steps, student_steps) == expected


@pytest.mark.parametrize("pair", [(64, 64), (4, 8), (12, 4), (10, 4), (7, 3), (0, 1)])
def test_steps_that_halving_does_not_join_are_refused(pair):
    given = f"got teacher_steps={pair[0]}, student_steps={pair[1]}$"
    with pytest.raises(ValueError, match=given):
        distill.halvings(*pair)


@pytest.mark.parametrize(
    ("name", "num_steps"), [("cosine", 1000), ("linear", 999), ("cosine", 77), ("vp_linear", None)]
)
def test_a_student_is_sampled_on_the_nodes_it_was_trained_on(name, num_steps):
    # 64 divides none of these, so the teacher's strides differ by one; the shared nodes do not.
    config = default()
    config.update({"schedule": {"name": name, "num_steps": num_steps or 1000}})
    for steps in (64, 8):
        teacher = drawing.make_grid(distill.by_ddim(config, steps))
        student = drawing.make_grid(distill.by_ddim(config, steps // 2))
        for ours, theirs in zip(*map(jax.tree.leaves, (student, teacher[::2])), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_distilled_run_is_a_run(taught, distilled):
    names = {path.name for path in distilled.iterdir()}
    assert names == {
        "config.json", "run.json", "metrics.jsonl", "checkpoints", "samples.png", "samples.npz",
        "report.html", "losses.f32", ".lock",
    }  # fmt: skip
    config, params, shape, step = trained.load(distilled, None, ema=True)
    assert (config.name, shape, step) == ("tiny_distilled", (8, 8, 1), 2 * UPDATES)
    options = config.sample
    assert (options.solver, options.grid, options.steps) == ("ddim", "trailing", 1)
    assert options.solver_options.variance is None
    assert options.guidance == "none"
    assert options.guidance_options.scale is None
    with np.load(distilled / "samples.npz") as archive:
        whole, _ = sample.draw_all(config, params, shape)
        np.testing.assert_allclose(archive["samples"], whole, atol=1e-5)
        np.testing.assert_array_equal(archive["labels"], np.arange(32) % 10)
    lines = [json.loads(line) for line in (distilled / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [30, 60, 90, 120]
    assert about(distilled)["teacher"]["steps"] == 4
    assert set(about(distilled)["teacher"]) >= {"sha256", "precision", "recall", "coverage"}
    assert set(about(distilled)["scores"]) >= {"precision", "recall", "coverage"}
    # The student of the first round is there, too.
    assert trained.load(distilled, UPDATES, ema=True)[3] == UPDATES


def test_a_student_goes_where_its_guided_teacher_goes(taught, distilled):
    def draw(workdir, like, step=None):
        # By the configuration of `like`: guided where it is the teacher's.
        _, params, shape, _ = trained.load(workdir, step, ema=True)
        return sample.draw_all(like, params, shape)[0]

    def distance(a, b):
        return np.sqrt(np.mean((a - b) ** 2))

    guided = trained.load(taught, None, ema=True)[0]
    plain = trained.load(distilled, None, ema=True)[0]
    first = draw(distilled, distill.by_ddim(plain, 2), UPDATES)
    teacher = draw(taught, distill.by_ddim(guided, 4))
    untaught = draw(taught, distill.by_ddim(plain, 2))
    unguided = draw(taught, distill.by_ddim(plain, 4))
    # The same noise and labels; against what as few steps do without distillation.
    assert distance(first, teacher) < 0.75 * distance(untaught, teacher)
    assert distance(first, teacher) < 0.9 * distance(first, unguided)
    last, halved = draw(distilled, plain), draw(distilled, plain, UPDATES)
    assert distance(last, first) < 0.6 * distance(halved, first)


class KilledError(Exception):
    """Stands for the death of a process between two steps."""


def test_an_interrupted_distillation_ends_with_the_same_parameters(
    taught, distilled, tmp_path, monkeypatch
):
    real = build.make_batches

    class Dying:
        def __init__(self, batches):
            self.batches, self.left = batches, UPDATES + 5

        def __next__(self):
            if not self.left:
                raise KilledError
            self.left -= 1
            return next(self.batches)

        def __getattr__(self, name):
            return getattr(self.batches, name)

    out = tmp_path / "out"
    monkeypatch.setattr(build, "make_batches", lambda *args: Dying(real(*args)))
    with pytest.raises(KilledError):
        distill.distill(taught, out, **OPTIONS)
    saved = sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    assert saved == [UPDATES]  # the second round is lost
    monkeypatch.setattr(build, "make_batches", real)
    distill.distill(taught, out, **OPTIONS)
    assert about(out)["sha256"] == about(distilled)["sha256"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [30, 60, 90, 120]


def test_a_finished_distillation_is_only_drawn_again(taught, distilled, monkeypatch, capsys):
    before = about(distilled)
    monkeypatch.setattr(train, "loop", None)
    distill.distill(taught, distilled, **OPTIONS)
    assert about(distilled)["sha256"] == before["sha256"]
    assert about(distilled)["scores"] == before["scores"]
    out = capsys.readouterr().out
    for line in ("teacher, steps 4: ", "teacher, steps 1: ", "student, steps 1: "):
        assert line + "precision 0." in out


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"updates": UPDATES + 1}, "train.num_steps: 60 there, 61 here"),
        ({"teacher_steps": 2}, "teacher.steps: 4 there, 2 here"),
        ({"weighting": "snr"}, "weighting: 'truncated_snr' there, 'snr' here"),
    ],
)
def test_another_distillation_is_not_gone_on_with(taught, distilled, changes, match):
    with pytest.raises(runs.RunError, match=match):
        distill.distill(taught, distilled, **{**OPTIONS, **changes})


def test_another_teacher_is_noticed(taught, distilled, tmp_path):
    shutil.copytree(distilled, tmp_path / "out")
    changed = about(distilled)
    changed["teacher"]["sha256"] = "0" * 64
    runs.write_json(tmp_path / "out/run.json", changed)
    with pytest.raises(runs.RunError, match=r"teacher.sha256: '0000"):
        distill.distill(taught, tmp_path / "out", **OPTIONS)
    (tmp_path / "out/run.json").unlink()
    with pytest.raises(runs.RunError, match="holds a damaged run"):
        distill.distill(taught, tmp_path / "out", **OPTIONS)


def test_a_teacher_is_not_overwritten(taught):
    before = {p: p.read_bytes() for p in taught.rglob("*") if p.is_file()}
    with pytest.raises(runs.RunError, match="name: 'tiny' there, 'tiny_distilled' here"):
        distill.distill(taught, taught, **OPTIONS)
    assert {p: p.read_bytes() for p in taught.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teacher_steps": 3}, "teacher_steps must be student_steps times"),
        ({"teacher_steps": 2048}, "num_steps must be an integer from 1 to"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"batch_size": 12}, "multiple of their number, 8, got 12"),
        ({"ema_decay": 1.0}, "decay must lie in"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(taught, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        distill.distill(taught, tmp_path / "out", **{**OPTIONS, **changes})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["self_condition", "vlb_weight"])
def test_networks_of_more_than_noisy_data_are_refused(key):
    config = tiny()
    config.update({"self_condition": True} if key == "self_condition" else {"vlb_weight": 1e-3})
    options = {name: value for name, value in OPTIONS.items() if name != "step"}
    with pytest.raises(ValueError, match="cannot be distilled"):
        distill.student_config(config, **options)


def test_the_command_line_names_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "experiments.distill", f"--workdir={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds no run (no config.json)" in done.stderr
    assert "Traceback" not in done.stderr
