"""What a run leaves to look at: pictures, samples, and the page that explains the run."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import runs, scores
from jaxdiff import viz

SHOWN = 100  # samples in a picture


def save_samples(
    stem: Path,
    samples: np.ndarray,
    options: Mapping[str, Any],
    numbers: np.ndarray | None = None,
    labels: Any = None,
    *,
    shared: bool = False,
) -> Path:
    """Writes STEM.png, a picture of the first samples, and STEM.npz, all of them.

    The archive holds `samples`, float32 as drawn; `images`, uint8; `index`, their numbers;
    `options`, JSON; and `labels`, the classes asked for, if any. Where several processes have a
    share of the samples each, they write it to archives of their own, and the first the picture.

    Returns:
      The archive's path.
    """
    images, path = viz.to_uint8(samples), stem.with_suffix(".npz")
    save_picture(stem, samples)
    if shared and jax.process_count() > 1:
        part = f"{stem.name}-{jax.process_index():05d}-of-{jax.process_count():05d}.npz"
        path = stem.with_name(part)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(
        temporary,
        samples=samples,
        images=images,
        index=np.arange(len(samples)) if numbers is None else numbers,
        options=json.dumps(dict(options), sort_keys=True),
        **({} if labels is None else {"labels": np.asarray(labels)}),
    )
    os.replace(temporary, path)
    return path


def save_picture(stem: Path, samples: np.ndarray) -> None:
    """Writes STEM.png, a picture of the first samples; one process does, of several."""
    if jax.process_index() == 0:
        images = viz.to_uint8(samples[:SHOWN])
        scale = max(1, 64 // images.shape[1])  # small images are enlarged enough to be recognised
        viz.save_png(stem.with_suffix(".png"), viz.image_grid(images, scale=scale))


def load_samples(path: Path) -> dict[str, np.ndarray]:
    """Returns what an archive of samples holds, by name, in the order of their numbers.

    Args:
      path: STEM.npz, whether it was written whole or in shares.

    Raises:
      RunError: there is no such file, a share is missing, or one is damaged.
    """
    parts = [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*.npz"))
    if not parts:
        raise runs.RunError(f"{path} does not exist: draw samples, or name others by --samples")
    if parts != [path] and len(parts) != int(parts[0].stem.rpartition("-")[2]):
        raise runs.RunError(f"{path} is in shares, and some are missing: there are {parts}")
    found = []
    for part in parts:
        try:
            with part.open("rb") as file, np.load(file) as archive:
                found.append({name: archive[name] for name in archive})
            found[-1].setdefault("index", np.arange(len(found[-1]["images"])))
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise runs.RunError(f"{part} is damaged, or not a file of samples: {error}") from error
    order = np.argsort(np.concatenate([part["index"] for part in found]), kind="stable")
    return {
        name: found[0][name]
        if name == "options"
        else np.concatenate([part[name] for part in found])[order]
        for name in found[0]
    }


def write(
    workdir: Path,
    config: ConfigDict,
    about: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    more: Sequence[viz.Section] = (),
) -> None:
    """Writes report.html, with what was evaluated and `more` sections after the first."""
    if jax.process_index():
        return
    sections = [viz.Section("The run", [dict(about)]), *scores.section(workdir), *more]
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
            for name, log in (
                *(("loss", True), ("grad_norm", True), ("param_norm", True)),
                ("steps_per_second", False),
            )
            if all(name in line for line in lines)  # not of runs of earlier versions
        ]
        if all(None not in line.get("loss_by_t", [None]) for line in lines):
            quarters = {
                f"quarter {i + 1} of the times": (steps, [line["loss_by_t"][i] for line in lines])
                for i in range(4)
            }
            curves.insert(1, viz.Lines(quarters, "step", "loss", log_y=True))
        sections.append(viz.Section("Training", curves))
    sections.append(viz.Section("Configuration", [runs.as_json(config)]))
    viz.report_html(workdir / "report.html", title=f"jaxdiff: {config.name}", sections=sections)


def renew(workdir: Path) -> None:
    """Writes the report of a run of images again, from what the run directory holds."""
    write(workdir, runs.load_config(workdir), runs.about(workdir), runs.read_metrics(workdir))
