"""The training loop: the host's part, which hands out work, and watches, saves and stops.

The device is never waited for in a step: metrics are fetched where a line of them is written, and
batches are made and sent while it computes. A CPU computes where it is called (`runtime.start`);
its batches are made by other threads.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import runs, runtime
from jaxdiff.base import PyTree
from jaxdiff.training import TrainState, checkpoints, sharding

Metrics = Mapping[str, jax.Array]
BY_T = ("loss_by_t", "count_by_t")


class Advance(Protocol):
    """A compiled train step, with the data it takes."""

    def __call__(
        self, state: TrainState, batches: Iterator[PyTree], count: int
    ) -> tuple[TrainState, list[Metrics]]:
        """Takes `count` batches and steps; metrics are scalars, or `(k,)` of k steps at once."""
        ...


def compile_step(
    step: Callable[[TrainState, PyTree, PyTree], tuple[TrainState, Metrics]],
    like: TrainState,
    mesh: Mesh,
    *,
    held: PyTree = None,
    take: Callable[[PyTree, PyTree], PyTree] | None = None,
    arrays: PyTree = None,
    at_once: int = 1,
) -> Advance:
    """Compiles a train step.

    Args:
      step: the pure step, `(state, held, batch) -> (state, metrics)`.
      like: the state's shapes and types.
      mesh: where to run.
      held: what the step reads and does not change, on the devices.
      take: of data that reside on the devices, `(arrays, address) -> batch`; addresses are what the
        iterator then gives.
      arrays: these data.
      at_once: how many steps to run in one dispatch, where asked for so many.
    """
    places = sharding.fully_sharded(mesh, like), sharding.everywhere(mesh)
    compiled = functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=places,
        compiler_options=runtime.compiler_options(),
    )
    one = compiled(step)
    # By itself, so that the step is the same program whatever makes its batches.
    gather = jax.jit(take, out_shardings=sharding.rows(mesh)) if take else None

    def many(state: TrainState, held: PyTree, arrays: PyTree, fed: PyTree) -> Any:
        def body(state: TrainState, fed: PyTree) -> tuple[TrainState, Metrics]:
            batch = take(arrays, fed) if take else fed
            return step(state, held, jax.lax.optimization_barrier(batch))

        return jax.lax.scan(body, state, fed)

    many = compiled(many)

    def advance(
        state: TrainState, batches: Iterator[PyTree], count: int
    ) -> tuple[TrainState, list[Metrics]]:
        if count == at_once > 1 and runtime.scans_steps():
            stacked = jax.tree.map(lambda *a: np.stack(a), *(next(batches) for _ in range(count)))
            fed = sharding.from_rows(stacked, sharding.rows(mesh, axis=1))
            state, metrics = many(state, held, arrays, fed)
            return state, [metrics]
        found = []
        for _ in range(count):
            batch = sharding.from_rows(next(batches), sharding.rows(mesh))
            state, metrics = one(state, held, gather(arrays, batch) if gather else batch)
            found.append(metrics)
        return state, found

    return advance


class Timed:
    """An iterator that knows how long it was waited for, in seconds."""

    def __init__(self, inner: Iterator[PyTree]) -> None:
        self.inner, self.waited = inner, 0.0

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> PyTree:
        asked = time.monotonic()
        item = next(self.inner)
        self.waited += time.monotonic() - asked
        return item


def run(
    config: ConfigDict,
    state: TrainState,
    advance: Advance,
    batches: Any,
    saved: checkpoints.Checkpointer,
    metrics: runs.Metrics,
    *,
    last: int,
    whole: Callable[[TrainState], TrainState] = lambda state: state,
    preview: Callable[[PyTree, int], None] | None = None,
    snapshot: Callable[[TrainState], None] | None = None,
    profile: Sequence[int] | None = None,
    notice: runtime.Notice | None = None,
) -> TrainState:
    """Runs the steps that are left of a stage, saving and logging on the way.

    Args:
      config: the configuration.
      state: where to go on from.
      advance: the compiled step.
      batches: the iterator over what it takes.
      saved: the folder of checkpoints.
      metrics: where lines go.
      last: the stage's last step.
      whole: makes the state that is saved and shown of the one that `advance` takes.
      preview: writes a picture with the averaged parameters, at a step.
      snapshot: keeps the other averages.
      profile: the steps between which a trace is recorded.
      notice: the notice to stop.

    Returns:
      The state after the last step, whole.

    Raises:
      PreemptedError: notice was given; the state is saved.
      RunError: training gets nowhere, or the run directory has gone.
      CheckpointError: a checkpoint could not be written.
    """
    options, resolved, workdir = config.train, runs.as_json(config), metrics.path.parent
    step, each = int(state.step), options.steps_per_dispatch
    bar = tqdm.tqdm(
        total=options.num_steps,
        initial=step,
        unit="step",
        desc=config.name,
        disable=True if jax.process_index() else None,
        smoothing=0.05,
    )
    tracer = Tracer(workdir / "profile", profile)
    pending: list[Metrics] = []  # metrics that are on the device still
    timed, since, begun, first = Timed(batches), time.monotonic(), step, step

    def save() -> None:
        runs.check_there(workdir)
        if pending:  # or they would be lost to a run that goes on from here
            metrics.keep(step, fetch(pending)["loss"])
        checkpoints.save(saved, whole(state), data=batches.get_state(), config=resolved)
        runtime.release_memory()  # of the save before, which is done

    while step < last:
        if notice is not None and notice.given(step):
            saved.wait()  # it may be of this very step
            if step and (saved.latest is None or saved.latest < step):
                save()
                saved.wait()
            tracer.stop(state)
            bar.close()
            raise runtime.PreemptedError(step)
        tracer.at(step, state)
        count = each if step % each == 0 and step + each <= last else 1
        state, values = advance(state, timed, count)
        pending += values
        if step == first:
            runtime.release_memory()  # of the compiler
        step += count
        bar.update(count)
        if step % options.log_every == 0 or step == last:
            series = fetch(pending)
            line = average(series)
            seconds, done = time.monotonic() - since, step - begun
            line["steps_per_second"] = done / seconds
            line["data_wait"] = timed.waited / seconds  # as a share of the time
            line |= runtime.memory()
            runs.check_there(workdir)
            metrics.write(step=step, losses=series["loss"], **line)
            tell(bar, step, line)
            check_finite(options.max_skipped, line, step)
            pending, timed.waited, since, begun = [], 0.0, time.monotonic(), step
        if step % options.checkpoint_every == 0 or step == last:
            save()
        if snapshot and step % config.averages.snapshot_every == 0:
            runs.check_there(workdir)
            snapshot(whole(state))
        if preview and step % options.sample_every == 0 and step < options.num_steps:
            runs.check_there(workdir)
            preview(whole(state).ema, step)
    tracer.stop(state)
    bar.close()
    return whole(state)


def fetch(pending: Sequence[Metrics]) -> dict[str, np.ndarray]:
    """Returns the metrics of dispatches, of one step or of several each, step by step."""
    host = jax.device_get(list(pending))
    return {
        name: np.concatenate(
            [v[name] if np.ndim(v["loss"]) else np.asarray(v[name])[None] for v in host]
        )
        for name in host[0]
    }


def average(series: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the means of the metrics of some steps, over those not skipped if any.

    Counts are the last ones; losses by quarters of t are means over all examples of a quarter, None
    where there were none.
    """
    series = dict(series)
    counts = {name: int(series.pop(name)[-1]) for name in ("skipped",) if name in series}
    in_a_row = series.pop("skipped_in_a_row", np.zeros(len(series["loss"]), int))
    if counts:
        counts["skipped_in_a_row"] = int(np.max(in_a_row))
    done = in_a_row == 0
    done |= not done.any()
    by_t, count = (series.pop(name, np.zeros((len(done), 0)))[done].sum(0) for name in BY_T)
    line: dict[str, Any] = {name: float(np.mean(value[done])) for name, value in series.items()}
    if count.size:
        line["loss_by_t"] = [float(a / n) if n else None for a, n in zip(by_t, count, strict=True)]
    return line | counts


def check_finite(most: int, line: Mapping[str, Any], step: int) -> None:
    """Ends a run that gets nowhere.

    Raises:
      RunError: the loss is not finite, or of some `most` batches in a row that were skipped.
    """
    advice = "lower optimizer.learning_rate, and start again in another --workdir"
    if most:
        in_a_row = line["skipped_in_a_row"]
        if in_a_row >= most:
            raise runs.RunError(
                f"{in_a_row} batches in a row up to step {step} had a loss or gradient that is not "
                f"finite (loss {line['loss']}; {line['skipped']} in all were skipped): the "
                f"parameters are those before. Look at the data, or {advice}"
            )
    elif not np.isfinite(line["loss"]):
        raise runs.RunError(f"the loss is {line['loss']} at step {step}: {advice}")


def tell(bar: tqdm.tqdm, step: int, line: Mapping[str, Any]) -> None:
    """Shows how training goes: in the bar, or where there is no terminal as a line."""
    bar.set_postfix(loss=f"{line['loss']:.4f}")
    if bar.disable:
        left = (bar.total - step) / line["steps_per_second"]
        print(
            f"step {step} of {bar.total}, loss {line['loss']:.4f}, "
            f"{line['steps_per_second']:.1f} steps/s, {left:.0f} s left",
            flush=True,
        )


class Tracer:
    """Records a trace of the steps after `between[0]`, up to `between[1]`."""

    def __init__(self, folder: Path, between: Sequence[int] | None) -> None:
        self.folder, self.between, self.on = folder, between, False

    def at(self, step: int, state: TrainState) -> None:
        """Starts or stops, as the step says."""
        if self.between is None:
            return
        if self.on and step >= self.between[1]:
            self.stop(state)
        elif not self.on and self.between[0] <= step < self.between[1]:
            jax.profiler.start_trace(str(self.folder))
            self.on = True

    def stop(self, state: TrainState) -> None:
        """Ends the trace, when all that was asked for is done."""
        if self.on:
            jax.block_until_ready(state.step)
            jax.profiler.stop_trace()
            self.on, self.between = False, None
            print(f"wrote a trace to {self.folder}", flush=True)
