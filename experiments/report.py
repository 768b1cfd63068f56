"""What a run leaves to look at: pictures, samples, and the page that explains the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import runs
from jaxdiff import viz

SHOWN = 100  # samples in a picture


def save_samples(
    stem: Path,
    samples: np.ndarray,
    options: Mapping[str, Any],
    first_index: int = 0,
    labels: Any = None,
) -> None:
    """Writes STEM.png, a picture of the first samples, and STEM.npz, all of them.

    The archive holds `samples`, float32 as drawn; `images`, uint8; `index`, their numbers;
    `options`, JSON; and `labels`, the classes asked for, if any.
    """
    images = viz.to_uint8(samples)
    scale = max(1, 64 // images.shape[1])  # small images are enlarged enough to be recognised
    viz.save_png(stem.with_suffix(".png"), viz.image_grid(images[:SHOWN], scale=scale))
    temporary = stem.with_name(stem.name + ".tmp.npz")
    np.savez_compressed(
        temporary,
        samples=samples,
        images=images,
        index=first_index + np.arange(len(samples)),
        options=json.dumps(dict(options), sort_keys=True),
        **({} if labels is None else {"labels": np.asarray(labels)}),
    )
    os.replace(temporary, stem.with_suffix(".npz"))


def write(
    workdir: Path,
    config: ConfigDict,
    about: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    more: Sequence[viz.Section] = (),
) -> None:
    """Writes report.html, with `more` sections after the first."""
    sections = [viz.Section("The run", [dict(about)]), *more]
    picture = workdir / "samples.png"
    if picture.exists():
        blocks: list[Any] = [viz.Image(picture, f"The first {SHOWN} samples")]
        previews = sorted((workdir / "samples").glob("step_*.png"))
        blocks += [viz.Image(path, f"Step {int(path.stem[5:])}") for path in previews[-3:]]
        sections.append(viz.Section("Samples", blocks))
    if lines:
        steps = [line["step"] for line in lines]
        curves = [
            viz.Lines({name: (steps, [line[name] for line in lines])}, "step", name, log_y=log)
            for name, log in (("loss", True), ("grad_norm", True), ("steps_per_second", False))
        ]
        sections.append(viz.Section("Training", curves))
    sections.append(viz.Section("Configuration", [runs.as_json(config)]))
    viz.report_html(workdir / "report.html", title=f"jaxdiff: {config.name}", sections=sections)
