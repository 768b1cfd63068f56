"""A run done again: the same, or what differs is named."""

import json
import shutil
import types

import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from experiments import build, reproduce, runs, train
from tests import small_runs


@pytest.fixture(scope="module", autouse=True)
def pointwise():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_model", small_runs.make_model)
        yield


OWN = {"train": {"batch_size": 8, "num_steps": 8, "log_every": 4, "checkpoint_every": 2}}


def tiny(**changes):
    return small_runs.tiny(OWN, changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train.train(tiny(), workdir)
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be altered."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command; returns its exit status and what it says at the end."""

    def command(workdir, out=None, until=None):
        options = types.SimpleNamespace(workdir=str(workdir), out=out and str(out), until=until)
        monkeypatch.setattr(reproduce, "FLAGS", options)
        status = 0
        try:
            reproduce.main()
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr().out.splitlines()
        first = next(i for i, line in enumerate(said) if line.startswith("losses of"))
        return status, said[first:]

    return command


def test_a_run_is_reproduced(run, command):
    assert command(run) == (
        0,
        ["losses of 8 steps: the same bit for bit", "parameters of step 8: the same bit for bit"],
    )
    again = run.with_name("run_again")
    assert runs.about(again)["sha256"] == runs.about(run)["sha256"]
    with pytest.raises(runs.RunError, match="run_again exists: choose another --out"):
        command(run)


def test_so_is_its_beginning(run, command):
    same = "losses of 4 steps: the same bit for bit"
    out = run.with_name("four")
    assert command(run, out, until=4) == (
        0,
        [same, "parameters of step 4: the same bit for bit"],
    )
    assert "sha256" not in runs.about(out)
    assert command(run, run.with_name("three"), until=3) == (
        0,
        [same.replace("4", "3"), "parameters: no step of which both runs have a checkpoint"],
    )
    status, said = command(run, run.with_name("many"), until=100)
    assert (status, said[0]) == (0, same.replace("4", "8"))


def test_a_run_of_stages_on_another_mesh_is_reproduced_as_it_was(tmp_path, command):
    config = tiny(
        stages={"num_steps": (4, 4), "shrink": (2, 1), "batch_size": (16, 8)},
        mesh={"data": 2, "fsdp": 4},
    )
    train.train(config, tmp_path / "run")
    status, said = command(tmp_path / "run", tmp_path / "out")
    assert (status, len(said)) == (0, 2)
    assert runs.about(tmp_path / "out")["mesh"] == {"data": 2, "fsdp": 4}


def test_the_first_step_that_differs_is_named(run, command):
    losses = np.fromfile(run / "losses.f32", "<f4")
    losses[[4, 6]] = np.nextafter(losses[[4, 6]], np.float32(np.inf))
    losses[1] = np.nan  # was not recorded
    losses.tofile(run / "losses.f32")
    assert command(run) == (
        3,
        [
            "losses of 7 steps: step 5 is the first that differs",
            "parameters of step 8: the same bit for bit",
            "environment: nothing that is recorded differs",
        ],
    )


def test_so_are_the_arrays_and_the_environment(run, command, tmp_path):
    train.train(tiny(seed=1), tmp_path / "other")
    path = tmp_path / "other/config.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 0'))
    shutil.copy(run / "losses.f32", tmp_path / "other")
    about = json.loads((tmp_path / "other/run.json").read_text())
    about["versions"]["jax"] = "0.0.1"
    about["mesh"] = {"data": 16, "fsdp": 1}  # of more devices than are here
    (tmp_path / "other/run.json").write_text(json.dumps(about))
    status, said = command(tmp_path / "other")
    assert status == 3
    assert said[0] == "losses of 8 steps: the same bit for bit"
    assert said[1].startswith("parameters of step 8: 8 arrays differ: ['ema']['params']")
    assert "['ema']['params']['Dense_0']['kernel']" in said[1]
    assert said[2] == "environment: mesh.data was 16, is 8"
    assert said[3].startswith("environment: versions.jax was '0.0.1', is ")
    assert len(said) == 4


def test_another_environment_with_the_same_result_is_told_and_no_failure(run, command):
    about = json.loads((run / "run.json").read_text())
    about["python"] = "2.7"
    (run / "run.json").write_text(json.dumps(about))
    status, said = command(run, until=4)
    assert status == 0
    assert said[2].startswith("environment: python was '2.7', is '3.")


def test_what_cannot_be_reproduced_is_refused(run, tmp_path):
    with pytest.raises(runs.RunError, match="holds no run"):
        reproduce.reproduce(tmp_path / "nowhere", tmp_path / "out")
    (run / "losses.f32").unlink()
    with pytest.raises(runs.RunError, match=r"has no losses\.f32: there is nothing to compare"):
        reproduce.reproduce(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
