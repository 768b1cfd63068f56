"""Two runs never share a run directory, and no dead one keeps it."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ml_collections")

from experiments import lock, runs

ROOT = Path(__file__).parents[2]
# Holds the directory, forks a child as a loader of data would, says so and goes on.
HOLDER = """
import os, sys, time
from experiments import lock
with lock.hold(sys.argv[1]):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    yield process
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, holder):
    with pytest.raises(runs.RunError, match=f"process {holder.pid} on {socket.gethostname()}, sin"):
        with lock.hold(tmp_path):
            pass
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # its child lives on
    with lock.hold(tmp_path):
        about = json.loads((tmp_path / ".lock").read_text())
    assert about["process"] == os.getpid()


def refused(workdir):
    try:
        with lock.hold(workdir):
            return ""
    except runs.RunError as error:
        return str(error)


def test_so_is_a_second_holder_in_the_process_and_its_children(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with lock.hold(tmp_path):
            assert "this very process" in refused(tmp_path)
            assert "this very process" in refused(tmp_path / ".." / tmp_path.name)
            assert f"process {os.getpid()} " in pool.apply(refused, [tmp_path])
        assert pool.apply(refused, [tmp_path]) == ""
    assert refused(tmp_path) == ""
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_it_is_let_go_when_the_run_fails(tmp_path):
    with pytest.raises(KeyError):
        with lock.hold(tmp_path):
            raise KeyError
    assert refused(tmp_path) == ""


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    assert "cannot write to the run directory" in refused(tmp_path / "nowhere")


def test_where_nothing_can_be_locked_it_warns(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available"):
        with lock.hold(tmp_path):
            pass
