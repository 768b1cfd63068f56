"""Kills training runs at random moments, damages their checkpoints, and compares the ends.

    python tests/experiments/chaos.py --runs=50 --jobs=2

trains a small network once undisturbed, and then that many times with one to three kills (SIGKILL)
each, a third of them aimed at a save; in a share of the restarts a random file of the newest
checkpoint is truncated or one bit of it flipped, where there is an older one to go back to. It
prints how many end with the reference's parameters, by SHA-256, and fails if not all do, or if one
started afresh although there were checkpoints. With `--sigterm=N` it also stops N runs by SIGTERM,
once each: they must save what they did and exit as documented. All but its own options are passed
on to experiments.train.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PREEMPTED = 75  # experiments.runtime.PREEMPTED
BEGAN = "parameters, from step"  # is said when the state is there and training begins
SMALL = [
    "--config.model.channels=8", "--config.model.channel_multipliers=(1,)",
    "--config.train.batch_size=8", "--config.train.num_steps=3000",
    "--config.train.checkpoint_every=150", "--config.train.sample_every=500",
    "--config.train.log_every=50", "--config.sample.num=20",
]  # fmt: skip


class Failure(Exception):
    """A run did what none may do."""


def steps(workdir):
    """Returns the steps of the complete checkpoints, ascending."""
    names = [path.name for path in Path(workdir, "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(workdir):
    """Returns the temporary folders of saves, as name and inode."""
    # Orbax renames and removes them meanwhile.
    with contextlib.suppress(FileNotFoundError):
        paths = Path(workdir, "checkpoints").glob("*.orbax-checkpoint-tmp")
        return {(path.name, path.stat().st_ino) for path in paths}
    return set()


class Run:
    """A process that trains; what it says goes to a file beside its run directory."""

    def __init__(self, workdir, arguments):
        self.workdir, self.before, self.left = workdir, steps(workdir), unfinished(workdir)
        self.log = Path(f"{workdir}.log")
        command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def ends_within(self, seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def is_saving(self):
        return bool(unfinished(self.workdir) - self.left)

    def reaches_a_save(self, seconds):
        """Waits for a save to be under way, `seconds` at most or to the end of the process."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            if self.is_saving():
                return
            time.sleep(0.002)

    def check(self, tally, status=0):
        """Checks what it said and, if it ended by itself, how; returns what it said."""
        output = self.log.read_text()
        began, resumed = BEGAN in output, "resumed from the checkpoint of step" in output
        if self.before and began and not resumed:
            raise Failure(f"it started afresh in spite of checkpoints {self.before}:\n{output}")
        tally["fell back"] += "is damaged: going back to step" in output
        if self.process.returncode not in (-signal.SIGKILL, status):
            raise Failure(f"it ended with {self.process.returncode}, not {status}:\n{output}")
        return output


def finish(workdir, arguments, tally=None):
    """Runs to the end; returns the hash of the parameters."""
    run = Run(workdir, arguments)
    run.process.wait()
    run.check(collections.Counter() if tally is None else tally)
    return json.loads((Path(workdir) / "run.json").read_text())["sha256"]


def damage(workdir, rng):
    """Truncates a random file of the newest checkpoint, or flips a random bit of it."""
    folder = Path(workdir, "checkpoints", str(steps(workdir)[-1]))
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.5:
        content = content[:at]
    else:
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def disturbed(workdir, arguments, kills, longest, rng, tally, share=0.5):
    """Runs with `kills` SIGKILLs, the sooner the more; returns the hash.

    `longest` is how many seconds a single one may take to come, about the length of a run. Before
    a `share` of the restarts the newest checkpoint is damaged, if there is another.
    """
    damaged = False
    for _ in range(kills):
        run = Run(workdir, arguments)
        ended = run.ends_within(rng.uniform(0.5, 2 * longest / (kills + 1)))
        if not ended and rng.random() < 1 / 3:
            run.reaches_a_save(longest)
            ended = run.ends_within(rng.uniform(0, 0.05))
        if not ended:
            run.process.kill()
            run.process.wait()
        tally["kills"] += not ended
        tally["kills too late, the run had ended"] += ended
        tally["kills during a save"] += not ended and run.is_saving()
        # Only where there is one to go back to, which is not if the newest is damaged still.
        output = run.check(tally)
        damaged = damaged and BEGAN not in output
        if not damaged and len(steps(workdir)) > 1 and rng.random() < share:
            damaged = True
            damage(workdir, rng)
            tally["damaged"] += 1
    return finish(workdir, arguments, tally)


def terminated(workdir, arguments, longest, rng, tally):
    """Runs with one SIGTERM after up to `longest` seconds; returns the hash."""
    run = Run(workdir, arguments)
    if not run.ends_within(rng.uniform(0.5, longest)):
        run.process.send_signal(signal.SIGTERM)
        run.process.wait()
    if BEGAN not in run.log.read_text():  # it had not begun to train
        tally["SIGTERMs before the first step"] += 1
        run.check(tally, run.process.returncode)
    elif run.process.returncode == 0:
        tally["SIGTERMs too late, the run had ended"] += 1
        run.check(tally)
    else:
        tally["SIGTERMs"] += 1
        output = run.check(tally, PREEMPTED)
        at = int(re.search(r"stopped by SIGTERM at step (\d+)", output).group(1))
        saved = max(steps(workdir), default=0)
        if saved < at - 1:
            raise Failure(f"it was at step {at} and left a checkpoint of step {saved}:\n{output}")
    return finish(workdir, arguments, tally)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="that are killed")
    parser.add_argument("--sigterm", type=int, default=0, help="runs that are sent SIGTERM")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--longest", type=float, help="seconds until a kill, instead of a run's length"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and damage")
    options, arguments = parser.parse_known_args()
    arguments = [*SMALL, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        began = time.monotonic()
        reference = finish(folder / "reference", arguments)
        print(f"reference: {reference} ({time.monotonic() - began:.0f} s)", flush=True)
        longest = options.longest or time.monotonic() - began

        def one(index):
            rng, tally = random.Random(f"{options.seed} {index}"), collections.Counter()
            workdir = folder / str(index)
            try:
                if index < options.runs:
                    kills = rng.randint(1, 3)
                    found = disturbed(workdir, arguments, kills, longest, rng, tally)
                else:
                    found = terminated(workdir, arguments, longest, rng, tally)
                outcome = "the same" if found == reference else f"DIFFERENT: {found}"
            except Failure as failure:
                outcome = f"FAILED: {failure}"
            print(f"run {index}: {outcome}, {dict(+tally)}", flush=True)
            return outcome == "the same", tally

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(one, range(options.runs + options.sigterm)))
    same = sum(result for result, _ in results)
    for name, count in sorted(sum((tally for _, tally in results), collections.Counter()).items()):
        print(f"{name}: {count}")
    print(f"{same} of {len(results)} end with the reference hash")
    return same != len(results)


if __name__ == "__main__":
    sys.exit(main())
