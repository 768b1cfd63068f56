"""Edits real images with a trained model.

    python -m experiments.edit --workdir=runs/digits --task=inversion
    python -m experiments.edit --workdir=runs/digits --task=inpainting --mask=top --resamples=10
    python -m experiments.edit --workdir=runs/digits --task=image_to_image --strength=0.7
    python -m experiments.edit --workdir=runs/digits --task=interpolation --points=30

  inversion       finds the noise that DDIM turns into each image, and walks back from it;
  inpainting      keeps a part of each image and draws the rest;
  image_to_image  noises each image a part of the way, and walks back;
  interpolation   inverts the images and goes from one to the next, between their latents.

Each writes a picture, a GIF of the way and edit.npz, its arrays. A model that was trained with
labels is told those of the images; between two images, that of the nearer one.

Inversion and interpolation go without two things that the run may sample with: thresholds, since
what was clipped cannot be told apart any more, and guidance. They visit the nodes of
--grid=quadratic unless told otherwise, which lie close together near the data: `jaxdiff.editing`
says why that matters.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import build, drawing, runtime, trained
from experiments.config import default
from jaxdiff import data, editing, grids, rng, sampling, viz
from jaxdiff.base import Array, Denoiser, Node, PyTree
from jaxdiff.process import diffuse

FLAGS = flags.FLAGS
SHOWN = 16  # images in a row of a picture
GIF_FRAMES = 50
MASKS = ("left", "top", "center", "random")
INVERTING, DRAWING = ("inversion", "interpolation"), ("inpainting", "image_to_image")
# Flags that not all tasks have.
ONLY_OF = {
    "iterations": INVERTING,
    "solver": DRAWING,
    "mask": ("inpainting",),
    "resamples": ("inpainting",),
    "jump_length": ("inpainting",),
    "strength": ("image_to_image",),
    "points": ("interpolation",),
}

Rows = Sequence[np.ndarray]


class Edited(NamedTuple):
    """What a task made.

    Attributes:
      arrays: for edit.npz.
      rows: the picture's rows, each `(columns, H, W, C)`.
      frames: the GIF's frames, as rows.
      lines: what to print.
    """

    arrays: dict[str, np.ndarray]
    rows: Rows
    frames: Sequence[Rows]
    lines: Sequence[str]


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    string, integer, number, choice, switch = (
        functools.partial(define, flag_values=values)
        for define in (
            *(flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float),
            *(flags.DEFINE_enum, flags.DEFINE_bool),
        )
    )
    string("workdir", "runs/digits", "The run directory of the trained model.")
    choice("task", "inversion", list(TASKS), "What to do.")
    string("out", None, "Folder to write to; WORKDIR/edited/TASK if not given.")
    integer("step", None, "The checkpoint to use; the newest if not given.")
    switch("ema", True, "Use the average of the parameters.")
    integer("num", 16, "How many images, all at a time.", 1)
    integer("first_index", 0, "The first image's place in the data.", 0)
    integer("seed", 0, "The seed of what is drawn.", 0)
    integer("steps", 200, "How many steps: intervals of the grid.")
    choice(
        "grid",
        None,
        list(drawing.GRIDS),
        "The spacing of the steps; if not given, quadratic for inversion and interpolation, and "
        "the run's for the others.",
    )
    integer("iterations", 5, "Evaluations in each step of inversion; 1 does not iterate.", 1)
    solvers = [name for name in drawing.SOLVERS if name != "pndm"]  # which needs a grid of its own
    choice("solver", "ddpm", solvers, "The solver of inpainting and image_to_image.")
    choice(
        "mask",
        "left",
        MASKS,
        "What inpainting keeps: the left half, the top half, what is around the center, or half "
        "of the pixels at random.",
    )
    integer("resamples", 5, "How often inpainting walks each stretch (RePaint); 1 for once.", 1)
    integer("jump_length", 10, "The length of such a stretch, in steps.", 1)
    number("strength", 0.5, "The share of the steps that image_to_image walks.", 0, 1)
    integer("points", 15, "Images from one to the next, both ends included.", 2)
    switch("gif", True, "Also write the way as a GIF.")


def settle(config: ConfigDict) -> None:
    """Writes what the flags ask for into `config.sample`.

    Raises:
      ValueError: a flag is given that the task does not have, or the task is not for this network.
    """
    for name, tasks in ONLY_OF.items():
        if FLAGS[name].present and FLAGS.task not in tasks:
            raise ValueError(f"--{name} is for --task={' or '.join(tasks)}, not for {FLAGS.task}")
    options = config.sample
    chosen = {"grid": FLAGS.grid or options.grid, "solver": FLAGS.solver}
    if FLAGS.task in INVERTING:
        if config.self_condition:
            raise ValueError(
                "a self-conditioned network cannot be inverted: what it predicts depends on the "
                "step before, which the way back does not know"
            )
        chosen = {"grid": FLAGS.grid or "quadratic", "solver": "ddim", "guidance": "none"}
        options.threshold = "none"
        options.solver_options = default().sample.solver_options  # no eta
    for name, value in chosen.items():
        if value != options[name]:
            # The run's options are of another one.
            options[f"{name}_options"] = default().sample[f"{name}_options"]
        options[name] = value
    options.update({"steps": FLAGS.steps, "seed": FLAGS.seed, "churn": 0.0})


def real_images(config: ConfigDict, num: int, first_index: int) -> tuple[Array, Array | None]:
    """Returns images of the run's data set, `(num, H, W, C)` in [-1, 1], and their labels.

    The labels are those that the network is told, int32 `(num,)`, or None.

    Raises:
      ValueError: the data set holds too few.
    """
    source = build.make_source(config)
    if first_index + num > len(source):
        raise ValueError(
            f"the data set holds {len(source)} images, got --first_index={first_index} and "
            f"--num={num}"
        )
    batch = next(
        data.make_pipeline(
            [source[i] for i in range(first_index, first_index + num)],
            batch_size=num,
            seed=0,
            shuffle=False,
            pad_to=config.data.pad_to,
        )
    )
    labels = jnp.asarray(batch["cond"]) if config.labels.num_classes else None
    return jnp.asarray(batch["x0"]), labels


def make_mask(name: str, keys: Array, shape: tuple[int, ...]) -> Array:
    """Returns where images are known, bool `(B, H, W, 1)`.

    Args:
      name: one of `MASKS`.
      keys: typed keys `(B,)`, which "random" draws from.
      shape: of an image, `(H, W, C)`.
    """
    height, width, _ = shape
    if name == "random":
        return rng.normal(rng.stream(keys, rng.Stream.DATA), (height, width, 1)) > 0
    rows, columns = np.mgrid[:height, :width]
    if name == "center":
        # A hole of half the height and half the width.
        across, down = abs(2 * columns + 1 - width), abs(2 * rows + 1 - height)
        mask = (2 * down >= height) | (2 * across >= width)
    else:
        mask = 2 * columns < width if name == "left" else 2 * rows < height
    return jnp.broadcast_to(mask[None, :, :, None], (keys.size, height, width, 1))


def inversion(
    config: ConfigDict, make: Callable[..., Denoiser], params: PyTree, x0: Array, labels: Any
) -> Edited:
    """Finds the latents of images, and draws the images from them again."""
    grid = drawing.make_grid(config)
    num_steps = grid.sigma.size - 1
    latents, up = _invert(make, params, grid, x0, labels, _every(2 * num_steps))
    again, down = _walk_back(config, make, params, grid, latents, labels, _every(2 * num_steps))
    start, latents, again = map(np.asarray, (x0, latents, again))
    way = [(start, start), *_kept(up), *_kept(down)]
    return Edited(
        {"start": start, "latents": latents, "result": again},
        _rows(start, latents, again),
        [_rows(start, x, clean) for x, clean in way],
        [
            f"up in {num_steps} steps ({int(up.evaluations)} evaluations) and down again: "
            + _difference(again, start),
            f"latents: mean {latents.mean():.3f}, standard deviation {latents.std():.3f}",
        ],
    )


def inpainting(
    config: ConfigDict, make: Callable[..., Denoiser], params: PyTree, x0: Array, labels: Any
) -> Edited:
    """Keeps what the mask says, and draws the rest."""
    grid, keys = drawing.make_grid(config), _keys(config, x0)
    if FLAGS.resamples > 1:
        grid = grids.resample(grid, FLAGS.jump_length, FLAGS.resamples)
    mask = make_mask(FLAGS.mask, keys, x0.shape[1:])

    @jax.jit
    def fill(params: PyTree, known: Array, mask: Array, labels: Any) -> Any:
        return sampling.sample(
            jax.random.key(config.sample.seed),
            make(params, labels),
            editing.inpaint(drawing.make_solver(config), known, mask),
            grid,
            known.shape,
            first_index=FLAGS.first_index,
            trajectory_every=_every(grid.sigma.size - 1),
        )

    result, record = fill(params, x0, mask, labels)
    start, result, mask = np.asarray(x0), np.asarray(result), np.asarray(mask)
    known = np.where(mask, start, 0)
    at = np.broadcast_to(mask, start.shape)
    return Edited(
        {"start": start, "mask": mask, "result": result},
        _rows(start, known, result),
        [_rows(known, x, clean) for x, clean in _kept(record)],
        [
            f"known, {at.mean():.0%} of the pixels: " + _difference(result[at], start[at]),
            f"drawn in {int(record.evaluations)} evaluations, the others: "
            + _difference(result[~at], start[~at]),
        ],
    )


def image_to_image(
    config: ConfigDict, make: Callable[..., Denoiser], params: PyTree, x0: Array, labels: Any
) -> Edited:
    """Noises images a part of the way, and walks back."""
    grid, keys = drawing.make_grid(config), _keys(config, x0)
    total = grid.sigma.size - 1
    walked = round(FLAGS.strength * total)

    @jax.jit
    def redraw(params: PyTree, x0: Array, labels: Any) -> Any:
        return editing.image_to_image(
            jax.random.key(config.sample.seed),
            make(params, labels),
            drawing.make_solver(config),
            grid,
            x0,
            FLAGS.strength,
            first_index=FLAGS.first_index,
            trajectory_every=_every(walked),
        )

    result, record = redraw(params, x0, labels)
    # What it starts from, of the same noise.
    first = grid[total - walked]
    noise = rng.normal(rng.stream(keys, rng.Stream.START), x0.shape[1:])
    start, noisy, result = map(np.asarray, (x0, diffuse(x0, noise, first), result))
    return Edited(
        {"start": start, "noisy": noisy, "result": result},
        _rows(start, noisy, result),
        [_rows(start, x, clean) for x, clean in [(noisy, noisy), *_kept(record)]],
        [
            f"noised to alpha = {first.alpha:.4f}, sigma = {first.sigma:.4f}, and back in {walked} "
            f"steps and {int(record.evaluations)} evaluations: " + _difference(result, start)
        ],
    )


def interpolation(
    config: ConfigDict, make: Callable[..., Denoiser], params: PyTree, x0: Array, labels: Any
) -> Edited:
    """Goes from each image with an even number to the next, on the great circle of their latents.

    Raises:
      ValueError: the number of images is odd.
    """
    if len(x0) % 2:
        raise ValueError(f"interpolation takes images in pairs, got --num={len(x0)}")
    grid, pairs, points = drawing.make_grid(config), len(x0) // 2, FLAGS.points
    latents, up = _invert(make, params, grid, x0, labels, grid.sigma.size - 1)
    weights = np.linspace(0, 1, points, dtype=np.float32)
    left, right = (np.repeat(np.asarray(latents)[side::2], points, axis=0) for side in (0, 1))
    between = editing.spherical_interpolation(left, right, np.tile(weights, pairs))
    if labels is not None:
        nearer = 2 * np.arange(pairs)[:, None] + (weights > 0.5)
        labels = labels[nearer.reshape(-1)]

    result, down = _walk_back(config, make, params, grid, between, labels, None)
    start, latents = np.asarray(x0), np.asarray(latents)
    way = np.asarray(result).reshape(pairs, points, *start.shape[1:])
    rows = np.concatenate([start[::2, None], way, start[1::2, None]], axis=1)
    there = [_rows(start[::2], way[:, k], start[1::2]) for k in range(points)]
    return Edited(
        {"start": start, "latents": latents, "result": way, "weights": weights},
        rows[:SHOWN],
        [*there, *there[::-1]],
        [
            f"{pairs} pairs, {points} images for each; up in {int(up.evaluations)} evaluations, "
            f"down in {int(down.evaluations)}",
            "both ends: " + _difference(way[:, [0, -1]].reshape(start.shape), start),
        ],
    )


TASKS = {task.__name__: task for task in (inversion, inpainting, image_to_image, interpolation)}


def _invert(
    make: Callable[..., Denoiser],
    params: PyTree,
    grid: Node,
    x0: Array,
    labels: Any,
    every: int,
) -> tuple[Array, sampling.Record]:
    @jax.jit
    def invert(params: PyTree, x0: Array, labels: Any) -> Any:
        return editing.invert(
            make(params, labels), grid, x0, iterations=FLAGS.iterations, trajectory_every=every
        )

    return invert(params, x0, labels)


def _walk_back(
    config: ConfigDict,
    make: Callable[..., Denoiser],
    params: PyTree,
    grid: Node,
    latents: Array,
    labels: Any,
    every: int | None,
) -> tuple[Array, sampling.Record]:
    keys, solver = _keys(config, latents), drawing.make_solver(config)  # which draws nothing

    @jax.jit
    def walk(params: PyTree, latents: Array, labels: Any) -> Any:
        return sampling.walk(
            keys, make(params, labels), solver, grid, latents, trajectory_every=every
        )

    return walk(params, latents, labels)


def _keys(config: ConfigDict, x0: Array) -> Array:
    index = FLAGS.first_index + jnp.arange(len(x0))
    return rng.per_example(jax.random.key(config.sample.seed), index)


def _every(num_steps: int) -> int:
    return max(1, -(-num_steps // GIF_FRAMES))


def _kept(record: sampling.Record) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(np.asarray(record.x), np.asarray(record.x0), strict=True))


def _difference(a: np.ndarray, b: np.ndarray) -> str:
    """Returns the largest difference and the root of the mean square, in words."""
    error = np.asarray(a, np.float64) - b
    return f"difference {np.abs(error).max():.3g} at most, {np.sqrt(np.mean(error**2)):.3g} RMS"


def _rows(*images: np.ndarray) -> Rows:
    return [row[:SHOWN] for row in images]


def _picture(rows: Rows) -> np.ndarray:
    return viz.image_grid(viz.to_uint8(np.concatenate(rows)), columns=len(rows[0]))


def save(out: Path, edited: Edited, options: Mapping[str, Any], *, gif: bool) -> list[Path]:
    """Writes edit.png, edit.npz and edit.gif, each whole or not at all; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [viz.save_png(out / "edit.png", _picture(edited.rows)), out / "edit.npz"]
    temporary = out / "edit.tmp.npz"
    np.savez_compressed(
        temporary, **edited.arrays, options=json.dumps(dict(options), sort_keys=True)
    )
    os.replace(temporary, paths[1])
    if gif:
        paths.append(viz.save_gif(out / "edit.gif", [_picture(rows) for rows in edited.frames]))
    return paths


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir)
    config, params, shape, step = trained.load(workdir, FLAGS.step, ema=FLAGS.ema)
    settle(config)
    x0, labels = real_images(config, FLAGS.num, FLAGS.first_index)
    weak = trained.load_weak(config, workdir, ema=FLAGS.ema)
    make = functools.partial(drawing.make_denoiser(config, shape), weak=weak)
    edited = TASKS[FLAGS.task](config, make, params, x0, labels)
    own = {name: FLAGS[name].value for name, tasks in ONLY_OF.items() if FLAGS.task in tasks}
    options = {
        **config.sample.to_dict(), **own, "task": FLAGS.task, "num": FLAGS.num,
        "first_index": FLAGS.first_index, "step": step, "ema": FLAGS.ema,
    }  # fmt: skip
    if labels is not None:
        edited.arrays["labels"] = np.asarray(labels)
    out = Path(FLAGS.out or workdir / "edited" / FLAGS.task)
    paths = save(out, edited, options, gif=FLAGS.gif)
    print(f"{FLAGS.task} of {FLAGS.num} images with the parameters of step {step}")
    print(*edited.lines, sep="\n")
    for path in paths:
        print(f"wrote {path}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
