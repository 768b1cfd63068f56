"""However many devices and processes there are, the run is the same, and goes on on any others."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import report, runs
from tests import quick_to_compile

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config.model.channels=16", "--config.model.channel_multipliers=(1,)",
    "--config.model.dropout=0.1", "--config.data.flip=True", "--config.train.batch_size=16",
    "--config.train.log_every=1", "--config.train.checkpoint_every=10",
    "--config.train.sample_every=0", "--config.optimizer.warmup_steps=2",
    "--config.optimizer.decay=constant", "--config.evaluate.neighbours=0",
    "--config.sample.num=12", "--config.sample.batch_size=8", "--config.sample.steps=4",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
    yield
    patch.undo()


def start(module, devices, *arguments):
    """Starts a command on so many virtual devices."""
    flags = [f"--xla_force_host_platform_device_count={devices}", *quick_to_compile.FLAGS]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    # One that fails ends the others: the output of all tells which it was.
    assert not any(process.returncode for process in processes), "\n\n".join(outputs)
    return outputs


def in_two(module, devices, *arguments):
    """Runs a command in two processes on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        start(
            module, devices, *arguments, f"--coordinator={coordinator}", "--num_processes=2",
            f"--process_id={i}",
        )
        for i in range(2)
    ]  # fmt: skip
    return finish(*both)


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train(workdir, devices, *arguments, steps=20):
    return start(
        "train", devices, f"--workdir={workdir}", f"--config.train.num_steps={steps}",
        *SMALL, *arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same run on one device, on eight, and in two processes of two devices, fsdp 2."""
    folder = tmp_path_factory.mktemp("runs")
    layouts = {name: folder / name for name in ("1", "8")}
    finish(*(train(workdir, int(name)) for name, workdir in layouts.items()))
    layouts["processes"] = folder / "processes"
    in_two(
        "train", 2, f"--workdir={layouts['processes']}", "--config.train.num_steps=20", *SMALL,
        "--config.mesh.fsdp=2",
    )  # fmt: skip
    return layouts


@pytest.mark.slow
def test_every_layout_gives_the_same_losses_and_samples(trained):
    reference = trained["1"]
    samples = report.load_samples(reference / "samples.npz")["samples"]
    assert len(losses(reference)) == 20
    assert losses(reference)[-1] < losses(reference)[0]
    for name, workdir in trained.items():
        np.testing.assert_allclose(losses(workdir), losses(reference), rtol=1e-5, err_msg=name)
        others = report.load_samples(workdir / "samples.npz")["samples"]
        np.testing.assert_allclose(others, samples, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_on_others(trained, tmp_path):
    first = tmp_path / "first"
    finish(train(first, 8, "--config.mesh.fsdp=8", steps=10))
    reference = losses(trained["1"])

    def copy(name):
        return shutil.copytree(first, tmp_path / name)

    longer = "--allow_config_change"
    finish(train(copy("1"), 1, longer), train(copy("4"), 4, "--config.mesh.fsdp=2", longer))
    both = [f"--workdir={copy('processes')}", *SMALL, "--config.mesh.fsdp=4"]
    outputs = in_two("train", 2, *both, "--config.train.num_steps=20", longer)
    assert "resumed from the checkpoint of step 10" in outputs[0]
    for name in ("1", "4", "processes"):
        np.testing.assert_allclose(losses(tmp_path / name), reference, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_write_a_share_of_the_samples_each(trained, tmp_path):
    options = [f"--workdir={trained['1']}", "--num=11", "--first_index=3"]
    finish(start("sample", 1, *options, f"--out={tmp_path / 'one'}"))
    in_two("sample", 2, *options, f"--out={tmp_path / 'two'}", "--fsdp=2")
    whole = report.load_samples(tmp_path / "one/samples.npz")
    shares = sorted((tmp_path / "two").glob("*.npz"))
    assert [path.name for path in shares] == [f"samples-0000{i}-of-00002.npz" for i in range(2)]
    shared = report.load_samples(tmp_path / "two/samples.npz")
    np.testing.assert_array_equal(shared["index"], np.arange(3, 14))
    np.testing.assert_array_equal(whole["index"], np.arange(3, 14))
    np.testing.assert_allclose(shared["samples"], whole["samples"], atol=1e-4)
    shares[0].unlink()
    with pytest.raises(runs.RunError, match="some are missing"):
        report.load_samples(tmp_path / "two/samples.npz")
