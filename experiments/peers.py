"""The same programs here and in PyTorch, in turn: `experiments.benchmark peers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import fresh, programs, timing
from experiments.runs import RunError
from experiments.sizes import Size
from experiments.worker import Worker, first_line

SIDES = ("eager", "channels_last", "compiled")
PAUSE = 0.2  # seconds; threads of OpenMP spin for some milliseconds after their work
AT_LEAST = 0.3  # seconds that one measurement takes; of fast programs it is of several calls


def check(worker: Worker, size: Size) -> dict[str, Any]:
    """Returns what the other side says of itself.

    Raises:
      RunError: its network is another one.
      ValueError: it has none of this size.
    """
    if size.peer is None:
        raise ValueError("peers compares the sizes of --size, not --config")
    ours = programs.count_parameters(size)
    about = worker.ask(what="about", fields=size.peer)
    if not ours == about["parameters"] == size.parameters:
        raise RunError(
            f"{size.config.name} must have {size.parameters:,} parameters on both sides, but has "
            f"{ours:,} here and {about['parameters']:,} in diffusers {about['diffusers']}: these "
            "are not the same network, so times would not compare"
        )
    return about


def request_of(size: Size, program: str, side: str) -> dict[str, Any]:
    """Returns what the worker is told of a program."""
    options = size.config.train if program == "train" else size.config.sample
    return {
        "program": program,
        "side": side,
        "fields": size.peer,
        "batch_size": options.batch_size,
        "steps": size.config.sample.steps,
        "dtype": size.config.model.dtype,
        "remat": size.config.model.remat,
    }


def compare(
    worker: Worker,
    size: Size,
    program: programs.Program,
    name: str,
    sides: Sequence[str],
    *,
    repeats: int,
    warmup: int,
    pause: float = PAUSE,
    at_least: float = AT_LEAST,
    tell: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Returns the times of a program here and there, in turn.

    Args:
      worker: the other side.
      size: what it is of.
      program: this side's, compiled.
      name: the program's.
      sides: those of the other to ask, of `SIDES`.
      repeats: how often each is measured.
      warmup: how often before that.
      pause: as of `timing.interleaved`.
      at_least: how many seconds a measurement takes.
      tell: as of `timing.interleaved`.

    Returns:
      "sides", for each of them and jaxdiff `timing.summary` or "error"; and "ratio", of the best of
      the others over jaxdiff, repeat by repeat, with "best", its name.
    """
    # What is drawn is fetched, as the other side's is.
    call = (lambda: np.asarray(program.call())) if name == "sample" else program.call

    def here(times: int) -> float:
        try:
            return timing.seconds(call, times)
        except jax.errors.JaxRuntimeError as error:
            raise timing.SideError(first_line(str(error))) from error

    def there(side: str) -> Any:
        request = request_of(size, name, side)
        return lambda times: worker.ask(what="time", of=request, times=times)["seconds"]

    runs = {"jaxdiff": here} | {side: there(side) for side in sides}
    found = timing.interleaved(
        {side: timing.calibrated(run, at_least) for side, run in runs.items()},
        repeats=repeats,
        warmup=warmup,
        pause=pause,
        tell=tell,
    )
    return {"sides": {side: _told(times) for side, times in found.items()}} | best(found)


def _told(times: list[float] | timing.SideError) -> dict[str, Any]:
    return {"error": str(times)} if isinstance(times, timing.SideError) else timing.summary(times)


def best(found: Mapping[str, list[float] | timing.SideError]) -> dict[str, Any]:
    """Returns how many times as fast jaxdiff is as the best of the others, and which that is.

    Nothing where one of the two has no times.
    """
    ran = {side: times for side, times in found.items() if isinstance(times, list)}
    ours = ran.pop("jaxdiff", None)
    if not ran or ours is None:
        return {}
    name = min(ran, key=lambda side: timing.summary(ran[side])["median"])
    return {"best": name, "ratio": timing.ratio(ran[name], ours)}


def memory(
    python: str,
    size: Size,
    sides: Sequence[str],
    *,
    cpu_devices: int | None,
    tell: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Returns the most memory that train steps take, here and there, each in a fresh process.

    Returns:
      For "jaxdiff" and each of the sides, and these with ", remat", "bytes" or "error". With it
      activations are computed anew on the way back.
    """
    found: dict[str, Any] = {}
    for remat in (False, True):
        changed = programs.with_changes(size, {"model": {"remat": remat}})
        words = ", remat" if remat else ""
        try:
            found["jaxdiff" + words] = fresh.peak_memory(changed, cpu_devices=cpu_devices)
        except RunError as error:
            found["jaxdiff" + words] = {"error": str(error)}
        tell()
        for side in sides:
            with Worker(python) as worker:
                try:
                    found[side + words] = worker.ask(
                        what="memory", of=request_of(changed, "train", side)
                    )
                except timing.SideError as error:
                    found[side + words] = {"error": str(error)}
            tell()
    return found
