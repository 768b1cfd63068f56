"""Writes a trained model as safetensors and JSON, with a model card.

    python -m experiments.export --workdir=runs/digits --out=digits
    python -m experiments.sample --pretrained=digits --num=100

OUT holds model.safetensors, the parameters; model.json, the configuration that makes the network
and all else that must be known to draw from it; and README.md, the model card, to be completed by
who publishes the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import pretrained, runs, runtime, scores, trained
from jaxdiff import interop
from jaxdiff.training import sharding

FLAGS = flags.FLAGS
CARD = """---
library_name: jaxdiff
tags: [diffusion, {kind}-image-generation]
---

# {name}

A diffusion model of {what}, {parameters:,} parameters, trained by jaxdiff {version} for
{step:,} updates on `{data}`. {ema}

| | |
| --- | --- |
| examples | {shape}, scaled to [-1, 1] |
| predicts | {parameterization}{learned} |
| schedule | {schedule} |
| drawn by | {solver}, {steps} steps |
| SHA-256 of the parameters | `{sha256}` |

## Use

```sh
python -m experiments.sample --pretrained=DIRECTORY --num=100
python -m experiments.train --config.init_from=DIRECTORY ...
```

`jaxdiff.interop.load_params` reads `model.safetensors`; `model.json` holds the configuration.

## Scores

{scores}

## Data, intended use, limits, licence

To be written by who publishes it: where the data come from and under what licence, whom they show,
and what the model must not be used for. A model may remember examples that it was trained on.
"""


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory of the trained model.")
    flags.DEFINE_string("out", None, "The directory to write; WORKDIR_export if not given.")
    flags.DEFINE_integer("step", None, "The checkpoint to use; the newest if not given.")
    flags.DEFINE_bool("ema", True, "Export the average of the parameters.")


def export(workdir: Path, out: Path, step: int | None = None, *, ema: bool = True) -> None:
    """Writes the directory.

    Args:
      workdir: the run directory.
      out: the directory; what it holds of an earlier export is replaced.
      step: which checkpoint; the newest if None.
      ema: whether to export the average of the parameters.

    Raises:
      RunError: there is no run of images, or `out` holds something else.
      CheckpointError: the checkpoint cannot be read.
      FileNotFoundError: there is no checkpoint of that step.
      ImportError: safetensors is not installed.
    """
    if out.exists() and any(out.iterdir()) and not (out / pretrained.EXPORT).exists():
        raise runs.RunError(f"{out} holds something else than an export: choose another --out")
    config, params, shape, step = trained.load(workdir, step, ema=ema)
    params = sharding.to_host(params)
    config.init_from = None  # what it was is in run.json, and of no use elsewhere
    about = {
        "config": runs.as_json(config),
        "example_shape": list(shape),
        "step": step,
        "ema": ema,
        "sha256": runs.fingerprint(params),
        "run": runs.about(workdir),
        "scores": {record["part"]: record["scores"] for record in scores.newest(workdir)},
    }
    out.mkdir(parents=True, exist_ok=True)
    interop.save_params(out / pretrained.EXPORT, params, about)
    num = sum(leaf.size for leaf in jax.tree.leaves(params))
    runs.write_text(out / "README.md", card(config, about, num, workdir))


def card(config: ConfigDict, about: dict[str, Any], parameters: int, workdir: Path) -> str:
    """Returns the model card."""
    rows = [
        f"| {name} | {cells['here']} |"
        for name, cells in scores.rows_of({"here": scores.newest(workdir)})
    ]
    table = "\n".join(["| score | +- standard error |", "| --- | --- |", *rows])
    *spatial, channels = about["example_shape"]
    size = " x ".join(map(str, spatial))
    classes, given = config.labels.num_classes, config.schedule.to_dict()
    schedule = {key: value for key, value in given.items() if value is not None}
    return CARD.format(
        name=config.name,
        kind="class-conditional" if classes else "unconditional",
        what=f"images of {size} pixels" + (f" of {classes} classes" if classes else ""),
        parameters=parameters,
        version=about["run"]["versions"]["jaxdiff"],
        step=about["step"],
        data=config.data.name,
        ema="These are the average of the parameters over training." if about["ema"] else "",
        shape=f"{size}, {channels} channels",
        parameterization=config.parameterization,
        learned="" if config.vlb_weight is None else ", and the variance of its steps",
        schedule=", ".join(f"{key} {value}" for key, value in schedule.items()),
        solver=config.sample.solver,
        steps=config.sample.steps,
        sha256=about["sha256"],
        scores=table if rows else "None yet: `python -m experiments.evaluate`.",
    )


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir)
    out = Path(FLAGS.out or workdir.with_name(workdir.name + "_export"))
    export(workdir, out, FLAGS.step, ema=FLAGS.ema)
    print(f"wrote {out}: complete its README.md before you publish it")


if __name__ == "__main__":
    runtime.command(define_flags, main)
