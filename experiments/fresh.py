"""Measurements that take a process of their own: compilation, start-up, peak memory.

`experiments.benchmark` calls what is here, which starts `python -m experiments.fresh REQUEST`;
request and answer are JSON. What is compiled is what `experiments.programs` makes.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments import programs, runs, runtime, timing
from experiments.config import default
from experiments.sizes import Size

ROOT = Path(__file__).parents[1]


def compile_times(
    size: Size,
    program: str,
    *,
    cpu_devices: int | None,
    repeats: int,
    tell: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Returns how long a program takes to make, without a cache and with one that has it.

    Args:
      size: the network.
      program: one of `programs.MAKE`.
      cpu_devices: how many the CPU is to be; None for what it is by itself.
      repeats: how often it is made, each time with a new cache.
      tell: is called after each.

    Returns:
      "cold" and "warm", `timing.summary` of seconds to trace, lower and compile or load; "lower_s",
      of it without the compiler; "lines" and "memory" of the program.
    """
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for each in times.values():
                answer = ask("compile", size, program, cpu_devices=cpu_devices, cache=cache)
                each.append(answer["lower_s"] + answer["compile_s"])
                tell()
    return {**answer, **{kind: timing.summary(each) for kind, each in times.items()}}


def import_times(repeats: int, tell: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Returns how long fresh Pythons take to import "jax" and "jax, jaxdiff", and the "difference".

    Each is a `timing.summary` in seconds.
    """
    names = ("jax", "jax, jaxdiff")
    sides = {name: functools.partial(seconds_to_import, name) for name in names}
    jax_alone, both = timing.interleaved(sides, repeats=repeats, tell=tell).values()
    more = [b - a for a, b in zip(jax_alone, both, strict=True)]
    found = zip((*names, "difference"), (jax_alone, both, more), strict=True)
    return {name: timing.summary(each) for name, each in found}


def seconds_to_import(names: str) -> float:
    """Returns how long a fresh Python takes to import modules, named as `import` names them."""
    code = (
        f"import time; start = time.perf_counter(); import {names}; "
        "print(time.perf_counter() - start)"
    )
    return float(_output([sys.executable, "-c", code]))


def peak_memory(size: Size, *, cpu_devices: int | None) -> dict[str, Any]:
    """Returns the most memory that train steps take, above what a process has after imports.

    Of a GPU or TPU that is its allocator's count. Of a CPU it is resident memory, of steps after
    the first two, of a program from the cache: the compiler leaves some of its own behind.
    """
    ask("compile", size, "train", cpu_devices=cpu_devices)
    return ask("memory", size, "train", cpu_devices=cpu_devices)


def ask(
    what: str,
    size: Size,
    program: str,
    *,
    cpu_devices: int | None = None,
    cache: str | None = None,
) -> dict[str, Any]:
    """Returns the answer of a fresh process.

    Args:
      what: `compile` or `memory`.
      size: the network.
      program: one of `programs.MAKE`.
      cpu_devices: how many the CPU is to be.
      cache: the folder of compiled programs; that of the environment if not given.

    Raises:
      RunError: it failed.
    """
    request = {
        "what": what,
        "program": program,
        "config": runs.as_json(size.config),
        "shape": size.shape,
        "cpu_devices": cpu_devices,
    }
    environment = {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    return json.loads(
        _output([sys.executable, "-m", "experiments.fresh", json.dumps(request)], environment)
    )


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Returns the last line that a process prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | (environment or {})
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise runs.RunError(f"a measurement in a process of its own failed: {last}")
    return done.stdout.splitlines()[-1]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measures in this process, which has done nothing yet but to import."""
    before = resident("VmRSS")
    if request["cpu_devices"]:
        jax.config.update("jax_num_cpu_devices", request["cpu_devices"])
    runtime.start()
    # However fast something compiles, it is to be found in the cache.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = default()
    config.update(request["config"])
    made = programs.make(request["program"], Size(config, tuple(request["shape"])))
    if request["what"] == "compile":
        return {**made.times, "lines": made.lines, "memory": made.memory}
    for _ in range(2):
        jax.block_until_ready(made.call())
    if stats := jax.local_devices()[0].memory_stats():
        return {"bytes": stats["peak_bytes_in_use"]}
    with_compilation = resident("VmHWM") - before
    reset_peak()
    for _ in range(2):
        jax.block_until_ready(made.call())
    return {"bytes": resident("VmHWM") - before, "with_compilation": with_compilation}


def reset_peak() -> None:
    """Forgets the highest resident memory of this process, and gives back what is not in use."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Returns a field of Linux's account of this process, VmRSS or VmHWM, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps(answer(json.loads(sys.argv[1]))))
