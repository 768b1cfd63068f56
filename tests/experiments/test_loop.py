"""The training loop: steps in one dispatch are those of several; what is logged; what ends it."""

import json
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, loop, runs, runtime, train
from jaxdiff.training import init_state, make_train_step, sharding
from tests import small_runs

OWN = {
    "model": {"channels": 8, "channel_multipliers": (1,), "dropout": 0.1},
    "data": {"flip": True, "dequantize": True},
    "optimizer": {"warmup_steps": 2},
    "train": {"batch_size": 16, "num_steps": 8, "log_every": 4, "checkpoint_every": 4},
}


def tiny(**changes):
    return small_runs.tiny(OWN, changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with a trace of steps 3 and 4, and a TensorBoard log."""
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_model", small_runs.make_model)
        train.train(tiny(train={"tensorboard": True}), workdir, profile=(2, 4))
    return workdir


@pytest.fixture
def pointwise(monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)


def sha256(workdir):
    return json.loads((workdir / "run.json").read_text())["sha256"]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def dense():
    """A step of a dense network, whose loss draws noise, and its first state."""

    def loss_fn(params, key, batch):
        x = batch["x0"].reshape(len(batch["x0"]), -1)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["index"])
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
        hidden = jnp.tanh((x + noise) @ params["in"])
        return jnp.mean((hidden @ params["out"] - x) ** 2, axis=1), {}

    optimizer = optax.adam(1e-2)
    step = make_train_step(loss_fn, optimizer, 0.9, key=jax.random.key(1))
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(16, 64)) / 4, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(64, 16)) / 8, jnp.float32),
    }
    return lambda state, held, batch: step(state, batch), init_state(params, optimizer)


@pytest.mark.parametrize(("count", "fsdp"), [(1, 1), (8, 1), (8, 8)])
@pytest.mark.parametrize("resident", [False, True])
def test_steps_in_one_dispatch_are_those_of_several(dense, monkeypatch, resident, count, fsdp):
    monkeypatch.setattr(runtime, "scans_steps", lambda: True)
    step, start = dense
    mesh = sharding.make_mesh(-1, fsdp, jax.devices()[:count])
    data = np.random.default_rng(1).normal(size=(40, 4, 4, 1)).astype(np.float32)
    rows = np.random.default_rng(2).integers(0, 40, (8, 16))

    def run(at_once):
        if resident:
            options = {
                "take": lambda arrays, address: {"x0": jnp.take(arrays, address, axis=0)},
                "arrays": jax.device_put(data, sharding.everywhere(mesh)),
            }
            fed = iter(rows)
        else:
            options, fed = {}, ({"x0": data[i]} for i in rows)
        advance = loop.compile_step(step, start, mesh, at_once=at_once, **options)
        state = jax.device_put(start, sharding.fully_sharded(mesh, start))
        state = jax.tree.map(jnp.copy, state)  # the step takes its place
        found = []
        for _ in range(8 // at_once):
            state, values = advance(state, fed, at_once)
            assert len(values) == 1  # one dispatch
            found += values
        assert next(fed, None) is None
        return jax.device_get(state), loop.fetch(found)

    (one, one_metrics), (four, four_metrics) = run(1), run(4)
    assert one_metrics["loss"].shape == (8,)
    assert one_metrics["loss"][-1] < one_metrics["loss"][0]
    jax.tree.map(np.testing.assert_array_equal, one, four)
    jax.tree.map(np.testing.assert_array_equal, one_metrics, four_metrics)


def test_other_counts_than_those_at_once_are_taken_one_by_one(dense, monkeypatch):
    monkeypatch.setattr(runtime, "scans_steps", lambda: True)
    step, start = dense
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    advance = loop.compile_step(step, start, mesh, at_once=4)
    batches = iter([{"x0": np.ones((8, 4, 4, 1), np.float32)}] * 3)
    state, values = advance(jax.tree.map(jnp.copy, start), batches, 3)
    assert (int(state.step), len(values)) == (3, 3)


def test_a_run_that_stops_on_the_way_is_the_same_however_its_steps_are_handed_out(
    plain, pointwise, tmp_path
):
    first = tiny(train={"steps_per_dispatch": 2, "log_every": 2}, data={"resident": True})
    state = train.train(first, tmp_path, until=6)
    assert int(state.step) == 6
    assert not (tmp_path / "report.html").exists()
    train.train(tiny(train={"log_every": 8}), tmp_path)
    assert sha256(tmp_path) == sha256(plain)
    np.testing.assert_array_equal(runs.read_losses(tmp_path), runs.read_losses(plain))
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]


def test_a_run_of_several_steps_in_one_dispatch_is_the_same(pointwise, tmp_path, monkeypatch):
    alone = train.train(tiny(), tmp_path / "one")
    monkeypatch.setattr(runtime, "scans_steps", lambda: True)
    for name, resident in (("fed", False), ("resident", True)):
        config = tiny(train={"steps_per_dispatch": 4}, data={"resident": resident})
        train.train(config, tmp_path / name, until=3)  # amid a dispatch
        state = train.train(config, tmp_path / name)
        # But for last bits: XLA may compile a step otherwise in a loop, and in jaxlib 0.12 does.
        chex.assert_trees_all_close(state.params, alone.params, rtol=1e-5, atol=1e-6)
        found, expected = (runs.read_losses(tmp_path / n) for n in (name, "one"))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_line_says_how_training_goes(plain):
    found, losses = lines(plain), runs.read_losses(plain)
    assert [line["step"] for line in found] == [4, 8]
    assert losses.shape == (8,)
    for i, line in enumerate(found):
        np.testing.assert_allclose(line["loss"], np.mean(losses[4 * i : 4 * i + 4]), rtol=1e-6)
        # Stratified times: as many examples in each quarter. The weights are one.
        assert len(line["loss_by_t"]) == 4
        np.testing.assert_allclose(np.mean(line["loss_by_t"]), line["loss"], rtol=1e-5)
        assert line["param_norm"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert 2**20 < line["host_memory"] < 2**40
        assert line["steps_per_second"] > 0
    assert found[1]["param_norm"] != found[0]["param_norm"]


def test_tensorboard_gets_the_same_lines(plain):
    (file,) = (plain / "tensorboard").iterdir()
    content = file.read_bytes()
    for name in (b"loss", b"param_norm", *(f"loss_by_t/{i}".encode() for i in range(4))):
        assert name in content


def test_a_trace_is_recorded(plain):
    traces = list((plain / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000


@pytest.mark.parametrize("given", ["2", "4,2", "-1,2", "a,b", "1,2,3", "8,9"])
def test_a_trace_of_no_steps_is_refused(tmp_path, monkeypatch, given):
    options = {"config": tiny(), "workdir": str(tmp_path / "run"), "profile": given.split(",")}
    monkeypatch.setattr(train, "FLAGS", types.SimpleNamespace(**options))
    with pytest.raises(ValueError, match=rf"START,STOP .*num_steps=8, got {given}$"):
        train.main()
    assert not (tmp_path / "run").exists()


def test_losses_by_quarter_are_sums_over_the_examples_in_it():
    rng = np.random.default_rng(0)
    t, loss = rng.integers(0, 1000, 50), rng.uniform(size=50).astype(np.float32)
    schedule = build.make_schedule(tiny())
    found = build.by_quarter(schedule, jnp.asarray(t), jnp.asarray(loss))
    for i in range(4):
        inside = (t >= 250 * i) & (t < 250 * (i + 1))
        assert found["count_by_t"][i] == inside.sum() > 0
        expected = loss[inside].astype(np.float64).sum()
        np.testing.assert_allclose(found["loss_by_t"][i], expected, rtol=1e-6)
    continuous = build.make_schedule(tiny(schedule={"name": "vp_cosine"}))
    found = build.by_quarter(continuous, jnp.float32([0, 0.3, 0.99, 1]), jnp.float32([1, 2, 3, 4]))
    np.testing.assert_array_equal(found["count_by_t"], [1, 1, 0, 2])
    np.testing.assert_array_equal(found["loss_by_t"], [1, 2, 0, 7])


def test_a_line_is_of_the_steps_that_were_not_skipped():
    one = {
        "loss": np.float32(1), "skipped": np.int32(0), "skipped_in_a_row": np.int32(0),
        "loss_by_t": np.float32([2, 6, 0, 0]), "count_by_t": np.int32([1, 2, 0, 1]),
    }  # fmt: skip
    two = {  # at once; the first of them was skipped
        "loss": np.float32([np.nan, 3]), "skipped": np.int32([1, 1]),
        "skipped_in_a_row": np.int32([1, 0]),
        "loss_by_t": np.float32([[np.nan] * 4, [4, 0, 0, 4]]),
        "count_by_t": np.int32([[1, 1, 1, 1], [2, 0, 0, 2]]),
    }  # fmt: skip
    series = loop.fetch([one, two])
    np.testing.assert_array_equal(series["loss"], np.float32([1, np.nan, 3]))
    assert series["loss_by_t"].shape == (3, 4)
    line = loop.average(series)
    assert line == {
        "loss": 2.0, "loss_by_t": [2.0, 3.0, None, 4 / 3], "skipped": 1, "skipped_in_a_row": 1,
    }  # fmt: skip


def test_losses_are_kept_once_though_they_are_given_again(tmp_path):
    with runs.Metrics(tmp_path, 0) as metrics:
        metrics.keep(2, np.float32([1, 2]))
        metrics.keep(2, np.float32([1, 2]))
        metrics.keep(3, np.float32([1, 2, 3]))
        metrics.write(step=4, losses=np.float32([1, 2, 3, 4]), loss=2.5)
    np.testing.assert_array_equal(runs.read_losses(tmp_path), [1, 2, 3, 4])
    with (tmp_path / "losses.f32").open("ab") as file:
        file.write(b"xy")  # of a run killed while writing
    with runs.Metrics(tmp_path, 3) as metrics:
        np.testing.assert_array_equal(runs.read_losses(tmp_path), [1, 2, 3])
        metrics.keep(5, np.float32([5, 6]))
    np.testing.assert_array_equal(runs.read_losses(tmp_path), [1, 2, 3, 5, 6])


class Patched:
    """The batches, before one of which something happens."""

    def __init__(self, batches, number, happens):
        self.batches, self.left, self.happens = batches, number, happens

    def __next__(self):
        self.left -= 1
        if not self.left:
            self.happens()
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


@pytest.fixture
def before(monkeypatch):
    """Makes something happen before the batch of a step."""
    real = build.make_batches

    def patch(number, happens):
        monkeypatch.setattr(
            build, "make_batches", lambda *a, **k: Patched(real(*a, **k), number, happens)
        )

    return patch


@pytest.mark.parametrize(("what", "at"), [("folder", 2), ("folder", 8), ("config.json", 5)])
def test_a_run_directory_that_goes_ends_the_run_and_is_not_made_again(
    pointwise, tmp_path, before, what, at
):
    workdir = tmp_path / "run"
    gone = []

    def go():
        if what == "folder":
            shutil.rmtree(workdir)
        else:
            (workdir / what).unlink()
        gone.append(set(workdir.rglob("*")))

    before(at, go)
    # A picture is due first: its writer makes folders.
    config = tiny(train={"sample_every": 3, "checkpoint_every": 8, "log_every": 8})
    config.sample.steps = 2
    with pytest.raises(runs.RunError, match=r"run has gone, or its config\.json: nothing is saved"):
        train.train(config, workdir)
    assert workdir.exists() == (what != "folder")
    assert set(workdir.rglob("*")) == gone[0]


def test_microbatches_change_no_loss(pointwise, tmp_path):
    for count in (1, 2):
        train.train(tiny(train={"microbatches": count}), tmp_path / str(count), until=4)
    one, two = (runs.read_losses(tmp_path / name) for name in "12")
    assert one.shape == (4,)
    np.testing.assert_allclose(two, one, rtol=1e-5)
    (first,), (second,) = (lines(tmp_path / name) for name in "12")
    np.testing.assert_allclose(second["loss_by_t"], first["loss_by_t"], rtol=1e-5)


class KilledError(Exception):
    """Stands for the death of a process between two steps."""


def test_averages_are_gone_on_with_and_kept_at_their_steps(pointwise, tmp_path, monkeypatch):
    averages = {"half_lives": (4.0,), "sigma_rels": (0.05, 0.1), "snapshot_every": 2}
    config = tiny(averages=averages)
    whole = train.train(config, tmp_path / "whole")
    assert sorted(whole.averages) == ["half_life_4", "power_0.05", "power_0.1"]

    def die():
        raise KilledError

    with monkeypatch.context() as patch:
        real = build.make_batches
        patch.setattr(build, "make_batches", lambda *a, **k: Patched(real(*a, **k), 7, die))
        with pytest.raises(KilledError):
            train.train(config, tmp_path / "killed")
    snapshots = tmp_path / "killed/snapshots"
    assert sorted(path.name for path in snapshots.iterdir()) == ["2", "4", "6"]
    shutil.rmtree(snapshots / "4")  # as if the checkpoint of step 4 had been the faster
    killed = train.train(config, tmp_path / "killed")
    assert runs.fingerprint(killed.averages) == runs.fingerprint(whole.averages)
    assert sha256(tmp_path / "killed") == sha256(tmp_path / "whole")
    powers = {name: tree for name, tree in whole.averages.items() if name != "half_life_4"}
    prints = []
    for name in ("whole", "killed"):
        folder = tmp_path / name / "snapshots"
        with train.checkpoints.open_folder(folder, read_only=True) as kept:
            assert kept.steps == [2, 4, 6, 8]
            found = [train.checkpoints.restore_tree(kept, powers, step)[0] for step in kept.steps]
        prints.append([runs.fingerprint(tree) for tree in found])
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == 4
    assert prints[0][-1] == runs.fingerprint(powers)
