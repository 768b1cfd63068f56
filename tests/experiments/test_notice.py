"""SIGTERM: the run saves, says so, and goes on as if nothing had been; and processes join.

As a command this file is experiments.train with a small network, which waits before its fifth batch
for a file named go beside its run directory.
"""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, runs, runtime, train
from experiments.configs import digits
from jaxdiff.training import checkpoints
from tests import small_runs

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module", autouse=True)
def pointwise():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_model", small_runs.make_model)
        yield


SMALL = {
    "train.batch_size": 8, "train.num_steps": 8, "train.log_every": 3, "train.checkpoint_every": 4,
    "train.sample_every": 0, "sample.num": 0, "evaluate.neighbours": 0,
}  # fmt: skip


def tiny(**changes):
    config = digits.get_config()
    config.update_from_flattened_dict(SMALL)
    config.update(changes)
    return config


STAGES = {"num_steps": (4, 4), "shrink": (2, 1)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train.train(tiny(), folder / "plain")
    train.train(tiny(stages=STAGES), folder / "stages")
    return folder


def assert_same_run(workdir, other):
    one, two = (json.loads((path / "run.json").read_text())["sha256"] for path in (workdir, other))
    assert one == two
    np.testing.assert_array_equal(runs.read_losses(workdir), runs.read_losses(other))


def steps(workdir):
    with checkpoints.open_folder(workdir / "checkpoints", read_only=True) as saved:
        return saved.steps


def send():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("at", "name"), [(1, "plain"), (4, "plain"), (5, "plain"), (8, "plain"), (4, "stages")]
)
def test_a_run_that_is_told_to_stop_has_lost_nothing(undisturbed, tmp_path, monkeypatch, at, name):
    """In the middle, at a checkpoint that is just being saved, in the last step, between stages."""
    config = tiny(stages=STAGES) if name == "stages" else tiny()
    real, handler = build.make_batches, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(build, "make_batches", lambda *a, **k: Patched(real(*a, **k), at, send))
        with pytest.raises(runtime.PreemptedError, match=f"stopped by SIGTERM at step {at}: give"):
            train.train(config, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert steps(tmp_path)[-1] == at
    assert "sha256" not in runs.about(tmp_path)
    train.train(config, tmp_path)
    assert_same_run(tmp_path, undisturbed / name)


def test_notice_is_heard_before_and_after_the_loop(undisturbed, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)

    def stopped(name, step):
        real = getattr(train, name)

        def sending(*args, **kwargs):
            send()
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(train, name, sending)
            with pytest.raises(runtime.PreemptedError, match=f"at step {step}: give"):
                train.train(tiny(), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is handler

    stopped("resume", 0)
    assert steps(tmp_path) == []
    train.train(tiny(), tmp_path, until=4)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "describe", lambda *_: send())
        with pytest.raises(runtime.PreemptedError, match="at step 4: give"):
            train.train(tiny(), tmp_path)
    stopped("finish", 8)
    train.train(tiny(), tmp_path)
    assert_same_run(tmp_path, undisturbed / "plain")


def test_a_checkpoint_that_is_being_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    train.train(tiny(), tmp_path, until=4)
    real = checkpoints.checksums.of_tree

    def sending(tree):
        send()
        return real(tree)

    monkeypatch.setattr(checkpoints.checksums, "of_tree", sending)
    with pytest.raises(runtime.PreemptedError, match="stopped by SIGTERM at step 4"):
        train.train(tiny(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_the_command_says_at_which_step_and_exits_with_75(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())
    options = [f"--config.{key}={value}" for key, value in SMALL.items()]
    process = subprocess.Popen(
        [sys.executable, __file__, f"--workdir={workdir}", *options],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("waiting"):
            break
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == runtime.PREEMPTED == 75, errors
    assert errors.splitlines()[-1] == (
        "stopped by SIGTERM at step 5: give the same command again to go on"
    )
    assert steps(workdir) == [4, 5]
    train.train(tiny(), workdir)
    assert_same_run(workdir, undisturbed / "plain")


def test_several_processes_are_told_by_jax(monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        runtime.multihost_utils, "reached_preemption_sync_point", lambda step: step == 3
    )
    with runtime.Notice() as notice, notice.looked_at():
        assert signal.getsignal(signal.SIGTERM) is handler
        assert [notice.given(step) for step in range(5)] == [False, False, False, True, False]


FEWER = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")
FEWER += ("MEGASCALE_COORDINATOR_ADDRESS",)


@pytest.fixture
def join(monkeypatch):
    """`runtime.join` with flags and variables; returns how JAX is asked, if it is."""

    def join(flags, variables=None):
        asked = []
        for name in FEWER:
            monkeypatch.delenv(name, raising=False)
        for name, value in (variables or {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(runtime.flags, "FLAGS", types.SimpleNamespace(**flags))
        monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: asked.append((a, k)))
        runtime.join()
        return asked

    return join


GIVEN = {"coordinator": "host:1", "num_processes": 2, "process_id": 0}


def test_processes_join_as_their_flags_say(join):
    nothing = dict.fromkeys(GIVEN)
    assert join(nothing) == join({}) == []
    of_two = {"num_processes": 2, "process_id": 0}
    assert join(GIVEN) == [(("host:1",), of_two)]
    with pytest.raises(ValueError, match="--num_processes and --process_id need --coordinator"):
        join({**nothing, "num_processes": 2})
    with pytest.raises(ValueError, match="--coordinator needs --process_id"):
        join({**GIVEN, "process_id": None})


def test_processes_of_a_cluster_join_by_themselves(join):
    nothing = dict.fromkeys(GIVEN)
    for variables in (
        {"SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "a"},
    ):
        assert join(nothing, variables) == [((), {})]
    alone = {"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    assert join(nothing, alone) == []


if __name__ == "__main__":

    def wait():
        workdir = next(arg for arg in sys.argv if arg.startswith("--workdir=")).partition("=")[2]
        print("waiting", flush=True)
        while not Path(workdir).with_name("go").exists():
            time.sleep(0.01)

    build.make_model, real = small_runs.make_model, build.make_batches
    build.make_batches = lambda *a, **k: Patched(real(*a, **k), 5, wait)
    runtime.command(train.define_flags, train.main)
