"""Times of several sides, taken in turn in one run, and what is made of them.

A machine's speed drifts, so figures of two runs are no ratio. Here each repeat asks every side
once, one after the other, and a ratio is the median of those within a repeat.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.runs import RunError


class SideError(RunError):
    """A side can't do what it was asked for; the others can go on."""


def seconds(call: Callable[[], Any], times: int = 1) -> float:
    """Returns how long a call takes, its result awaited; the mean of several, one after another.

    On CPU each is awaited: JAX might run them at the same time. Elsewhere they queue, as in use.
    """
    each = jax.default_backend() == "cpu"
    start = time.perf_counter()
    for _ in range(times):
        result = call()
        if each:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / times


def calibrated(run: Callable[[int], float], at_least: float) -> Callable[[], float]:
    """Returns a side, `() -> seconds` of one call, from the mean of as many as take long enough.

    Args:
      run: `times -> seconds`, the mean of so many calls.
      at_least: how long a measurement is to take, in seconds.
    """
    times = 0

    def side() -> float:
        nonlocal times
        if not times:
            run(1)  # compiles
            taken = run(1)
            times = max(1, math.ceil(at_least / taken))
            if times == 1:
                return taken
        return run(times)

    return side


def interleaved(
    sides: Mapping[str, Callable[[], float]],
    *,
    repeats: int,
    warmup: int = 1,
    pause: float = 0.0,
    tell: Callable[[], Any] = lambda: None,
) -> dict[str, list[float] | SideError]:
    """Returns the times of all sides, asked in turn, or why one has none.

    Args:
      sides: what to ask, by name: each returns the seconds that it took.
      repeats: how often each is asked.
      warmup: how often before that, not to be counted.
      pause: seconds to wait before a side is asked: threads of the one before may still spin.
      tell: is called whenever a side has been asked.
    """
    found: dict[str, list[float] | SideError] = {name: [] for name in sides}
    for repeat in range(warmup + repeats):
        for name, side in sides.items():
            times = found[name]
            if isinstance(times, list):
                time.sleep(pause)
                try:
                    taken = side()
                except SideError as error:
                    found[name] = error
                else:
                    if repeat >= warmup:
                        times.append(taken)
            tell()
    return found


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Returns "median", "min", "max" and "all" of the times."""
    return {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "all": list(times),
    }


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Returns the same of the ratios of two sides' times, repeat by repeat."""
    return summary([a / b for a, b in zip(over, under, strict=True)])
