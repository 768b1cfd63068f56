"""Kills a training run at random moments, starts it again each time, and compares the end.

    python tests/experiments/chaos.py --kills=10 --config.seed=1

runs the main job twice, once undisturbed and once killed (SIGKILL) ten times, and prints the
SHA-256 of the parameters of both. All but its own options are passed on to experiments.train.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(workdir, arguments):
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(workdir, arguments):
    """Runs to the end; returns the hash of the parameters."""
    process = start(workdir, arguments)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run failed with {process.returncode}:\n{output}")
    return json.loads((Path(workdir) / "run.json").read_text())["sha256"]


def disturbed(workdir, arguments, kills, longest, seed):
    """Runs with `kills` SIGKILLs, each after up to `longest` seconds; returns the hash."""
    moments = random.Random(seed)
    for kill in range(kills):
        process = start(workdir, arguments)
        after = moments.uniform(0.5, longest)
        try:
            process.communicate(timeout=after)
            print(f"kill {kill + 1}: too late, the run had ended", flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            saved = sorted(
                int(p.name) for p in Path(workdir, "checkpoints").glob("[0-9]*") if p.name.isdigit()
            )
            print(f"kill {kill + 1} after {after:.1f} s, checkpoints {saved}", flush=True)
    return finish(workdir, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=45.0, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options, arguments = parser.parse_known_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        reference = finish(Path(folder) / "reference", arguments)
        print(f"undisturbed: {reference} ({time.monotonic() - began:.0f} s)", flush=True)
        found = disturbed(
            Path(folder) / "disturbed", arguments, options.kills, options.longest, options.seed
        )
        print(f"killed {options.kills} times: {found}")
    print("the same" if found == reference else "DIFFERENT")
    return found != reference


if __name__ == "__main__":
    sys.exit(main())
