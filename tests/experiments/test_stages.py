"""Progressive training: small images first, with the same parameters, and however it is stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, runs, train, trained
from experiments.configs import digits
from jaxdiff.training import sharding
from tests import quick_to_compile, small_runs


@pytest.fixture
def pointwise(monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)


TWO = {
    "num_steps": (4, 4), "shrink": (2, 1), "batch_size": (16, 8), "learning_rate": (1e-2, 1e-3),
}  # fmt: skip


def staged(stages=None, **changes):
    own = {
        "model": {"channels": 8, "channel_multipliers": (1,)},
        "optimizer": {"warmup_steps": 0, "decay": "constant"},
        "train": {"batch_size": 32, "num_steps": 8, "log_every": 2, "checkpoint_every": 3},
        "stages": TWO if stages is None else stages,
    }
    return small_runs.tiny(own, changes)


CONTINUOUS = {
    "stages": {"num_steps": (4, 4), "shrink": (2, 1), "shift": (0.5, 1.0)},
    "schedule": {"name": "vp_cosine"},
    "train": {"batch_size": 8},
    "optimizer": {"learning_rate": 1e-3},
}


def sha256(workdir):
    return json.loads((workdir / "run.json").read_text())["sha256"]


def test_a_stage_changes_what_it_names():
    one, two = build.stages(staged())
    assert (one[1], two[1]) == (4, 8)
    got = [
        (c.data.shrink, c.train.batch_size, c.optimizer.learning_rate, c.train.num_steps)
        for c, _ in (one, two)
    ]
    assert got == [(2, 16, 1e-2, 8), (1, 8, 1e-3, 8)]
    plain = staged({})
    assert build.stages(plain) == [(plain, 8)]


def test_the_network_sees_images_of_a_stages_size(pointwise, tmp_path, monkeypatch):
    """And its optimiser is told the stage's learning rate, and goes on with its moments."""
    seen, real = [], build.make_network

    def make_network(config, shape, own=None):
        seen.append((shape, config.schedule.shift))
        return real(config, shape, own)

    monkeypatch.setattr(build, "make_network", make_network)
    state = train.train(staged(**CONTINUOUS), tmp_path)
    assert seen[:2] == [((4, 4, 1), 0.5), ((8, 8, 1), 1.0)]
    assert int(state.step) == 8
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert counts
    assert all(int(count) == 8 for count in counts)
    config = runs.load_config(tmp_path)
    assert (config.data.shrink, config.schedule.shift) == (1, 1.0)


class KilledError(Exception):
    """Stands for the death of a process between two steps."""


class Dying:
    def __init__(self, batches, left):
        self.batches, self.left = batches, left

    def __next__(self):
        if not self.left:
            raise KilledError
        self.left -= 1
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


@pytest.mark.parametrize("continuous", [False, True])
def test_stages_that_are_killed_end_with_the_same_parameters(
    pointwise, tmp_path, monkeypatch, continuous
):
    config = staged(**CONTINUOUS) if continuous else staged()
    real = build.make_batches
    taken = []

    def counting(config, source, *, stage=0):
        batches = real(config, source, stage=stage)

        class Counting:
            def __next__(self):
                batch = next(batches)
                taken.append((stage, *batch["x0"].shape))
                return batch

            def __getattr__(self, name):
                return getattr(batches, name)

        return Counting()

    monkeypatch.setattr(build, "make_batches", counting)
    train.train(config, tmp_path / "whole")
    sizes = (8, 8) if continuous else (16, 8)
    assert taken == [(0, sizes[0], 4, 4, 1)] * 4 + [(1, sizes[1], 8, 8, 1)] * 4
    losses = runs.read_losses(tmp_path / "whole")

    # In the first stage, at its end, and in the second.
    for stage, after in ((1, 0),) if continuous else ((0, 3), (1, 0), (1, 3)):
        monkeypatch.setattr(
            build,
            "make_batches",
            lambda c, s, *, stage=0, at=(stage, after): Dying(
                real(c, s, stage=stage), at[1] if stage == at[0] else -1
            ),
        )
        killed = tmp_path / f"{stage}_{after}"
        with pytest.raises(KilledError):
            train.train(config, killed)
        monkeypatch.setattr(build, "make_batches", real)
        train.train(config, killed)
        assert sha256(killed) == sha256(tmp_path / "whole"), (stage, after)
        np.testing.assert_array_equal(runs.read_losses(killed), losses)

    # Stopped at the end of a stage, and finished after both.
    train.train(config, tmp_path / "until", until=4)
    train.train(config, tmp_path / "until", until=8)
    assert sha256(tmp_path / "until") == sha256(tmp_path / "whole")


def test_the_network_has_the_same_parameters_in_all_stages():
    likes = [
        jax.eval_shape(build.make_training(config, shape)[0])
        for (config, _), shape in zip(build.stages(staged()), [(4, 4, 1), (8, 8, 1)], strict=True)
    ]
    assert likes[0] == likes[1]
    assert len(jax.tree.leaves(likes[0].params)) > 10


def test_the_last_stage_is_what_is_sampled_from(pointwise, tmp_path):
    train.train(staged(), tmp_path)
    config, params, shape, step = trained.load(tmp_path, None, ema=True)
    assert (step, shape) == (8, (8, 8, 1))
    assert (config.data.shrink, config.train.batch_size) == (1, 8)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == json.loads((tmp_path / "run.json").read_text())["parameters"]
    # It is the same run when it is read back.
    train.train(config, tmp_path)
    with pytest.raises(runs.RunError, match=r"stages\.learning_rate"):
        train.train(staged({**TWO, "learning_rate": (1e-2, 2e-3)}), tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stages": {"num_steps": (4, 3)}}, r"add up to train\.num_steps=8, got \(4, 3\)"),
        ({"stages": {"num_steps": (8, 0)}}, "must be positive"),
        ({"stages": {"num_steps": (), "shrink": (2, 1)}}, r"one value a stage, 0 by"),
        ({"stages": {**TWO, "shrink": (2,)}}, r"stages\.shrink must have one value a stage, 2 by"),
        ({"stages": {**TWO, "batch_size": (16, 12)}}, r"multiple of their number, 8, got 12"),
        ({"stages": {**TWO, "batch_size": (0, 8)}}, r"train\.batch_size must be at least 1, got 0"),
        ({"stages": {**TWO, "batch_size": (-8, 8)}}, r"train\.batch_size must be at least 1"),
        ({"stages": {**TWO, "shift": (2.0, 1.0)}}, "shift is for continuous schedules"),
        ({"stages": {**TWO, "shrink": (3, 1)}}, "shrink must divide"),
        ({"stages": {**TWO, "shrink": (0, 1)}}, r"data\.shrink must be at least 1, got 0"),
        ({"stages": {}, "data": {"shrink": 0}}, r"data\.shrink must be at least 1, got 0"),
        (
            {
                "stages": {**TWO, "shrink": (4, 1)},
                "model": {"channel_multipliers": (1, 2, 2)},
            },
            "divisible by 4",
        ),
    ],
)
def test_wrong_stages_are_refused_before_anything_is_written(tmp_path, changes, match):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=match):
        train.train(staged(**changes), workdir)
    assert not workdir.exists()


@pytest.mark.slow
def test_the_state_is_divided_by_the_compilers_own_account():
    """Of the digits network on 8 devices: what one of them holds between two steps."""
    config = digits.get_config()
    config.mesh.fsdp = 8
    mesh = build.make_mesh(config)
    init, step = build.make_training(config, (8, 8, 1), mesh=mesh)
    like = jax.eval_shape(init)
    places = sharding.fully_sharded(mesh, like)
    batch = jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.float32, sharding=sharding.rows(mesh))
    outputs = places, sharding.everywhere(mesh)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=outputs).lower(
        sharding.placed(like, places), {"x0": batch}
    )
    # However little XLA optimises it, its arguments are the same.
    analysis = lowered.compile(compiler_options=quick_to_compile.LITTLE).memory_analysis()
    held = analysis.argument_size_in_bytes - 32 * 8 * 8 * 4 // 8
    assert analysis.alias_size_in_bytes >= 0.99 * held  # updated in place
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    print(f"bytes of state a device: {whole:,} whole, {held:,} divided by 8")
    assert held <= whole / 7
