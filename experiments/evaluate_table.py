"""Scores of synthetic patients: realism, privacy and utility, for `experiments.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import cohorts, realism, runs
from jaxdiff.data import tables

if TYPE_CHECKING:
    from pandas import DataFrame

SYNTHETIC, FLOOR, STRAWMAN = "synthetic", "real", "independent columns"


def score(workdir: Path, samples: Path | None = None) -> dict[str, dict[str, float]]:
    """Returns the scores of a run's synthetic patients, of the floor and of the strawman.

    Args:
      workdir: the run directory.
      samples: the table of synthetic patients; the run's own if not given.

    Raises:
      RunError: there is no run of a table, or no synthetic patients.
      ValueError: the run held out no patients.
      TableError: the synthetic patients have another schema than the run.
    """
    config = runs.load_config(workdir)
    if not config.data.held_out:
        raise ValueError(
            f"{workdir} was trained on all patients, and leaves none to compare with: train it "
            "with --config.data.held_out=0.5"
        )
    cohort = cohorts.load(config)
    schema, train, held_out = cohort.codec.schema, cohort.table, cohort.held_out
    synthetic = _read(samples or workdir / "synthetic.csv", schema)
    strawman = realism.bootstrap(train, schema, config.seed)
    found = {}
    for name, table in ((SYNTHETIC, synthetic), (FLOOR, train), (STRAWMAN, strawman)):
        found[name] = realism.realism(held_out, table, schema, seed=config.seed)
        if name != FLOOR:  # of those trained on, both would say the obvious
            found[name] |= realism.privacy(train, held_out, table, schema)
            if target := config.evaluate.target:
                found[name] |= realism.utility(
                    train, held_out, table, schema, target, config.evaluate.positive
                )
    return found


def _read(path: Path, schema: tables.Schema) -> DataFrame:
    if not path.exists():
        raise runs.RunError(f"{path} does not exist: draw patients, or name others by --samples")
    return tables.check_table(tables.read_table(path), schema)


def mean(scores: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns the mean of the scores of several runs."""
    return {
        name: {key: float(np.mean([run[name][key] for run in scores])) for key in first}
        for name, first in scores[0].items()
    }


def tell(scores: dict[str, dict[str, float]]) -> None:
    """Prints scores, a line each."""
    wide = max(len(key) for key in scores[SYNTHETIC])
    print(" " * wide + "".join(f"{name:>21}" for name in scores))
    for key in scores[SYNTHETIC]:
        cells = (f"{of[key]:.3f}" if key in of else "" for of in scores.values())
        print(f"{key:{wide}}" + "".join(f"{cell:>21}" for cell in cells))


def evaluate(workdirs: list[Path], samples: Path | None) -> list[dict[str, Any]]:
    """Scores runs, prints them and their mean, and returns a record of each."""
    scores = [score(workdir, samples) for workdir in workdirs]
    for workdir, found in zip(workdirs, scores, strict=True):
        print(f"{workdir}: synthetic patients, and others, against patients held out")
        tell(found)
    if len(scores) > 1:
        print(f"mean of {len(scores)} runs")
        tell(mean(scores))
    path = "synthetic.csv" if samples is None else str(samples)
    return [{"part": "table", "samples": path, "scores": found} for found in scores]
