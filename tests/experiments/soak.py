"""Trains for long, and watches that nothing grows.

    python tests/experiments/soak.py --steps=20000

trains digits with a checkpoint each 400 steps, and prints after the warm-up (a tenth of the steps)
and at the end: resident memory, open files, threads, and how many programs were compiled between.
Fails if memory has grown by more than 3 %, or any of the others at all. All but its own options are
passed on to experiments.train.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from absl import flags

from experiments import runs, runtime, train

COMPILED = "/jax/core/compile/backend_compile_duration"


class Watch:
    """What is in use at each line of the metrics, by step."""

    def __init__(self) -> None:
        self.compiled, self.rows = 0, []
        jax.monitoring.register_event_duration_secs_listener(self.heard)

    def heard(self, event: str, *_: object, **__: object) -> None:
        self.compiled += event == COMPILED

    def look(self, step: int) -> None:
        gc.collect()
        memory = runtime.memory()["host_memory"]
        files = len(os.listdir("/proc/self/fd"))
        self.rows.append((step, memory, files, threading.active_count(), self.compiled))
        print(
            f"step {step}: {memory / 2**20:.1f} MiB, {files} files, "
            f"{self.rows[-1][3]} threads, {self.compiled} compiled",
            flush=True,
        )


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    options, arguments = parser.parse_known_args()
    runtime.start()
    train.define_flags()
    flags.FLAGS(["soak", *arguments])
    config = flags.FLAGS.config
    config.train.num_steps, config.train.sample_every = options.steps, 0
    config.sample.num = 0
    watch, write = Watch(), runs.Metrics.write

    def watched(self: runs.Metrics, *, step: int, **values: object) -> None:
        write(self, step=step, **values)
        if step % max(1, options.steps // 20) == 0:
            watch.look(step)

    runs.Metrics.write = watched
    with tempfile.TemporaryDirectory() as folder:
        train.train(config, Path(folder) / "run")
    # After the warm-up. Memory goes up and down a little with what is being saved: means of four.
    rows = [row for row in watch.rows if row[0] > options.steps // 10]
    grown = mean([row[1] for row in rows[-4:]]) / mean([row[1] for row in rows[:4]]) - 1
    print(f"memory has grown by {100 * grown:.2f} % since step {rows[0][0]}")
    same = True
    for name, column in (("files", 2), ("threads", 3), ("compiled programs", 4)):
        first, last = rows[0][column], rows[-1][column]
        print(f"{name}: {first}, then {last}")
        same &= last <= first
    return 0 if grown <= 0.03 and same else 1


if __name__ == "__main__":
    sys.exit(main())
