"""Comparison with another Python: what it is asked, and what becomes of its answers."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest

pytest.importorskip("ml_collections")

from absl import flags

from experiments import benchmark, fresh, peers, programs, runs, runtime, sizes, timing, worker

# Answers fixed numbers, and writes down what it was asked.
FAKE = """
import json, sys
asked = open(ASKED, "a")
for line in sys.stdin:
    request = json.loads(line)
    print(line.strip(), file=asked, flush=True)
    what, side = request["what"], request.get("of", {}).get("side")
    if what == "about":
        answer = {"parameters": PARAMETERS, "torch": "2", "diffusers": "0", "threads": 1}
    elif side == "compiled":
        answer = {"error": "BackendCompilerFailed: no compiler\\nmore of it"}
    elif what == "memory":
        answer = {"bytes": 3 * 2**20}
    else:
        answer = {"seconds": {"eager": 0.5, "channels_last": 0.25}[side], "ready_s": 1.0}
    print(json.dumps(answer), flush=True)
"""
DIGITS = 1_001_729


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Writes the other side's program; returns what it has been asked so far."""
    asked = tmp_path / "asked"

    def write(parameters=DIGITS, text=FAKE):
        text = text.replace("ASKED", repr(str(asked))).replace("PARAMETERS", str(parameters))
        script = tmp_path / "fake.py"
        script.write_text(text)
        real = worker.Worker
        monkeypatch.setattr(peers, "Worker", lambda python: real(python, script))
        return lambda: [json.loads(line) for line in asked.read_text().splitlines()]

    return write


def instant(seconds):
    """A program that takes so long."""
    return programs.Program(lambda: None, 64, 1e9, {"temporaries": 0}, 0, {}, None, ())


def compared(size, **options):
    with peers.Worker(sys.executable) as other:
        return peers.compare(
            other,
            size,
            instant(0.1),
            "train",
            options.pop("sides", peers.SIDES),
            pause=0,
            repeats=2,
            warmup=1,
            **options,
        )


def test_sides_are_compared(fake, monkeypatch):
    asked = fake()
    monkeypatch.setattr(timing, "seconds", lambda call, times: 0.125)
    found = compared(sizes.make("digits"), at_least=0.6)
    assert found["sides"]["jaxdiff"]["all"] == [0.125, 0.125]
    assert found["sides"]["eager"]["median"] == 0.5
    assert found["sides"]["compiled"] == {"error": "BackendCompilerFailed: no compiler"}
    assert (found["best"], found["ratio"]["median"]) == ("channels_last", 2.0)
    # Two of a warm-up to compile and to see how many calls take long enough; then as many.
    requests = [(r["of"]["side"], r["times"]) for r in asked()]
    assert requests[:3] == [("eager", 1), ("eager", 1), ("eager", 2)]
    assert requests[-2:] == [("eager", 2), ("channels_last", 3)]
    assert sum(side == "compiled" for side, _ in requests) == 1
    request = asked()[0]["of"]
    assert request["batch_size"] == 64
    assert request["fields"] == sizes.make("digits").peer
    assert (request["program"], request["steps"], request["dtype"]) == ("train", 50, "float32")


def test_a_side_that_ends_the_process_leaves_the_others(fake, monkeypatch):
    fake(text=FAKE.replace('answer = {"error"', 'sys.exit("killed"); answer = {"error"'))
    monkeypatch.setattr(timing, "seconds", lambda call, times: 0.125)
    sides = compared(sizes.make("digits"), sides=["compiled", "eager"])["sides"]
    assert sides["compiled"]["error"].endswith("ended with status 1: killed")
    assert sides["eager"]["all"] == [0.5, 0.5]


def test_an_error_of_jax_is_a_side_that_failed(fake):
    def call():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nat length")

    fake()
    with peers.Worker(sys.executable) as other:
        found = peers.compare(
            other,
            sizes.make("digits"),
            instant(0.1)._replace(call=call),
            "train",
            ["eager"],
            pause=0,
            repeats=1,
            warmup=0,
        )
    assert found["sides"]["jaxdiff"] == {"error": "RESOURCE_EXHAUSTED: out of memory"}
    assert found["sides"]["eager"]["all"] == [0.5]
    assert "ratio" not in found


def test_nothing_to_compare_with(fake, monkeypatch):
    fake()
    monkeypatch.setattr(timing, "seconds", lambda call, times: 0.1)
    found = compared(sizes.make("digits"), sides=["compiled"])
    assert "ratio" not in found


def test_other_networks_are_not_compared(fake):
    fake(parameters=1_000_000)
    with peers.Worker(sys.executable) as other:
        with pytest.raises(runs.RunError, match="1,001,729 here and 1,000,000 in diffusers"):
            peers.check(other, sizes.make("digits"))
        own = sizes.make("digits")._replace(peer=None)
        with pytest.raises(ValueError, match="not --config"):
            peers.check(other, own)


def test_interpreters_that_do_not_serve(fake, tmp_path):
    for python, message in (
        (None, "pip install torch diffusers.*none was given"),
        (str(tmp_path / "none"), "got '.*none'"),
    ):
        with pytest.raises(ValueError, match=message):
            worker.Worker(python)
    fake(text="import no_such_package_as_torch")
    with peers.Worker(sys.executable) as other:
        with pytest.raises(runs.RunError, match=r"lacks a package .*pip install torch diffusers"):
            other.ask(what="about")
    fake(text="import sys; sys.exit('killed for memory')")
    with peers.Worker(sys.executable) as other:
        with pytest.raises(runs.RunError, match="ended with status 1: killed for memory"):
            other.ask(what="about")


def test_the_other_side_has_packages_of_its_own(fake, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "experiments")
    fake(
        text="""
import json, sys
for line in sys.stdin:
    print(json.dumps({"path": sys.path}), flush=True)
"""
    )
    with peers.Worker(sys.executable) as other:
        path = other.ask(what="about")["path"]
    assert not [folder for folder in path if re.search("experiments|fake", folder)]


def test_the_whole_command(fake, monkeypatch, capsys, tmp_path):
    asked = fake()
    values, kept = flags.FlagValues(), tmp_path / "found.json"
    benchmark.define_flags(values)
    values(
        [
            "benchmark",
            f"--python={sys.executable}",
            f"--json={kept}",
            *("--size=digits", "--programs=forward,train", "--repeats=2", "--memory"),
        ]
    )
    monkeypatch.setattr(benchmark, "FLAGS", values)
    monkeypatch.setattr(runtime, "cpu_devices", lambda: 1)  # so all is in this process
    monkeypatch.setattr(peers, "PAUSE", 0)
    monkeypatch.setattr(timing, "seconds", lambda call, times=1: 0.125)
    monkeypatch.setattr(programs, "make", lambda name, size: instant(0.125))
    monkeypatch.setattr(
        fresh,
        "ask",
        lambda what, size, program, **_: {"bytes": 2**20 * (1 if size.config.model.remat else 2)},
    )
    benchmark.MAIN["peers"]()
    said, found = capsys.readouterr().out, json.loads(kept.read_text())["peers"]["digits"]
    assert "train digits, compiled: BackendCompilerFailed: no compiler" in said
    rows = [line.split() for line in said.splitlines()]
    row = next(row for row in rows if row[:2] == ["train", "digits"])
    assert row[2:4] == [str(jax.device_count()), "125"]
    assert "failed" in row
    assert row[-2:] == ["(2.000..2.000)", "channels_last"]
    row = next(row for row in rows if row[:1] == ["digits"])
    three = ["3.0", "MiB", "3.0", "MiB", "failed"]
    assert row == ["digits", "2.0", "MiB", *three, "1.0", "MiB", *three]
    assert found["programs"]["forward"]["ratio"]["median"] == 2
    assert found["memory"]["jaxdiff, remat"]["bytes"] == 2**20
    assert found["peer"]["parameters"] == DIGITS
    told = [request["of"]["remat"] for request in asked() if request["what"] == "memory"]
    assert told == [False] * 3 + [True] * 3


def test_each_program_has_a_process_and_its_devices(fake, tmp_path):
    fake()
    script, other, kept = tmp_path / "fake.py", tmp_path / "python", tmp_path / "found.json"
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    other.chmod(0o755)
    what = ["--size=digits", "--sides=eager", "--batch_size=2", "--programs=forward"]
    command = [sys.executable, "-m", "experiments.benchmark", "peers", f"--json={kept}", *what]
    few = ["--repeats=1", "--warmup=0"]
    done = subprocess.run([*command, *few, f"--python={other}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][:2] == ["program", "size"]
    assert [row[:3] for row in rows[1:]] == [["forward", "digits", "2"]]
    assert [sizes.cpu_devices("mnist", what) for what in ("forward", "train")] == [2, 1]
    found = json.loads(kept.read_text())["peers"]
    assert found["digits"]["run"]["parameters"] == DIGITS
    assert json.loads((tmp_path / "asked").read_text().splitlines()[-1])["times"] >= 1

    done = subprocess.run([*command, "--python=no/such"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --python must be the interpreter")
    assert "got 'no/such'" in done.stderr


@pytest.mark.parametrize("flag", ["--sides=eager,compield", "--programs=trian"])
def test_names_that_there_are_not(flag, monkeypatch):
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values(["benchmark", f"--python={sys.executable}", flag])
    monkeypatch.setattr(benchmark, "FLAGS", values)
    with pytest.raises(ValueError, match="did you mean"):
        benchmark.MAIN["peers"]()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "diffusers"))),
    reason="PyTorch and diffusers are not installed",
)
def test_pytorch_itself():
    size = sizes.make("digits", batch_size=2)
    size.config.sample.steps = 2
    with worker.Worker(sys.executable) as other:
        assert peers.check(other, size)["device"] in ("cpu", "cuda")
        for program in programs.MAKE:
            request = peers.request_of(size, program, "channels_last")
            assert other.ask(what="time", of=request, times=1)["seconds"] > 0
        train = peers.request_of(size, "train", "eager")
        for remat in (False, True):
            told = other.ask(what="memory", of={**train, "remat": remat})
            assert told["bytes"] > 0
        with pytest.raises(timing.SideError, match="KeyError"):
            other.ask(what="time", of={**request, "program": "none"}, times=1)
