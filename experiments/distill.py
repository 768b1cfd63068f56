"""Distils a trained model into one of few steps, progressively (Salimans & Ho 2022).

    python -m experiments.distill --workdir=runs/digits --out=runs/digits_distilled
    python -m experiments.sample --workdir=runs/digits_distilled

The teacher takes 64 steps of DDIM. A student learns to take two of them in one, and is the teacher
of the next, until the last student takes 4: four rounds. Each begins with its teacher's averaged
parameters and with the learning rate at its highest, and ends with a checkpoint: those before the
last are students of more steps (`experiments.sample --step=... --steps=...`). What guides the
teacher, by the run's configuration, goes into its students, which need no guidance.

A distillation that was interrupted goes on from its last finished round when the same command is
given again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import build, drawing, lock, loop, runs, runtime, train, trained
from experiments.config import default
from jaxdiff import evaluation, losses, viz
from jaxdiff.base import Array, Batch, PyTree
from jaxdiff.training import TrainState, checkpoints, ema, init_state, make_train_step, sharding

FLAGS = flags.FLAGS
WEIGHTINGS = ("truncated_snr", "snr_plus_one", "snr", "unit")


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory of the teacher.")
    flags.DEFINE_string("out", None, "The student's run directory; WORKDIR_distilled if not given.")
    flags.DEFINE_integer("step", None, "The teacher's checkpoint; the newest if not given.")
    flags.DEFINE_integer("teacher_steps", 64, "Steps of the first teacher.")
    flags.DEFINE_integer("student_steps", 4, "Steps of the last student.", 1)
    flags.DEFINE_integer("updates", 800, "Updates in a round.", 1)
    flags.DEFINE_integer("batch_size", None, "Over all devices; the teacher's if not given.", 1)
    flags.DEFINE_float("learning_rate", 5e-4, "The learning rate at the start of a round.")
    flags.DEFINE_float("ema_decay", 0.99, "The decay of the average of a student's parameters.")
    flags.DEFINE_enum("weighting", "truncated_snr", WEIGHTINGS, "The weighting of the loss.")


def halvings(teacher_steps: int, student_steps: int) -> list[int]:
    """Returns the steps of each round's teacher: 64, 32, 16, 8 for a last student of 4.

    Raises:
      ValueError: halving does not lead from the one to the other.
    """
    rounds = []
    while teacher_steps > student_steps and teacher_steps % 2 == 0:
        rounds.append(teacher_steps)
        teacher_steps //= 2
    if not rounds or teacher_steps != student_steps:
        raise ValueError(
            "teacher_steps must be student_steps times 2, 4, 8 or so on, got "
            f"teacher_steps={rounds[0] if rounds else teacher_steps}, "
            f"student_steps={student_steps}"
        )
    return rounds


def by_ddim(config: ConfigDict, steps: int) -> ConfigDict:
    """Returns the configuration with samples drawn by so many steps of DDIM, trailing.

    Every other node of such a grid is, exactly, the grid of half as many steps.
    """
    config, plain = config.copy_and_resolve_references(), default().sample
    config.sample.update(
        {
            "solver": "ddim",
            "solver_options": plain.solver_options,
            "grid": "trailing",
            "grid_options": plain.grid_options,
            "steps": steps,
            "churn": 0.0,
        }
    )
    return config


def student_config(
    config: ConfigDict,
    *,
    teacher_steps: int,
    student_steps: int,
    updates: int,
    batch_size: int | None,
    learning_rate: float,
    ema_decay: float,
    weighting: str,
) -> ConfigDict:
    """Returns the configuration of the student of a run.

    Its `train.num_steps` is that of one round. Keys that training had and distillation has not are
    at their defaults.

    Raises:
      ValueError: the network cannot be distilled, or a value is out of range.
    """
    if config.self_condition or config.vlb_weight is not None:
        raise ValueError(
            "a student learns clean data from noisy data alone, so networks with self_condition or "
            "vlb_weight cannot be distilled"
        )
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    ema.check_decay(ema_decay)
    student, plain = by_ddim(config, student_steps), default()
    student.name = f"{config.name}_distilled"
    student.sample.guidance = "none"
    student.sample.guidance_options = plain.sample.guidance_options
    student.weighting, student.weighting_options = weighting, plain.weighting_options
    student.timesteps, student.timesteps_options = "uniform", plain.timesteps_options
    student.offset_noise = student.labels.dropout = student.model.dropout = 0.0
    student.ema_decay = ema_decay
    student.optimizer.update(
        {
            "learning_rate": learning_rate,
            "warmup_steps": 0,
            "decay": "cosine",
        }
    )
    student.train.update(
        {
            "batch_size": batch_size or config.train.batch_size,
            "num_steps": updates,
            "checkpoint_every": updates,
            "keep": len(halvings(teacher_steps, student_steps)),
            "microbatches": 1,
            "steps_per_dispatch": 1,
            "sample_every": 0,
        }
    )
    student.averages, student.stages = plain.averages, plain.stages
    student.loss_scales = plain.loss_scales
    student.data.resident = False
    train.check(student)
    return student


def distill(
    workdir: Path, out: Path, *, step: int | None, teacher_steps: int, **options: Any
) -> TrainState:
    """Distils a run, from the last finished round on if there is one, and finishes the new run.

    Args:
      workdir: the run directory of the teacher.
      out: the run directory of the student.
      step: the teacher's checkpoint; the newest if None.
      teacher_steps: steps of the first teacher.
      **options: those of `student_config`.

    Returns:
      The final state of the last student.

    Raises:
      RunError: there is no run to distil, or `out` cannot be written to or holds another one.
      CheckpointError: a checkpoint cannot be read.
      ValueError: an option makes no sense.
    """
    given, params, shape, _ = trained.load(workdir, step, ema=True)
    first = by_ddim(given, teacher_steps)
    config = student_config(given, teacher_steps=teacher_steps, **options)
    teacher = (params, trained.load_weak(first, workdir, ema=True))
    source = build.make_source(config)
    batches = build.make_batches(config, source)
    few = by_ddim(first, config.sample.steps)  # what so few steps do without distillation
    draw, *of_teacher = (drawing.make_draw(how, shape) for how in (config, first, few))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    about = runs.describe(config, num_params, shape)
    about["teacher"] = {"steps": teacher_steps, "sha256": runs.fingerprint(teacher)}
    check_same(out, config, about)
    runs.open_workdir(out, config)

    with (
        lock.hold(out),
        checkpoints.open_folder(out / "checkpoints", keep=config.train.keep) as saved,
    ):
        state, lines = run_rounds(out, first, config, shape, teacher, about, batches, saved)
    about["sha256"] = runs.fingerprint({"params": state.params, "ema": state.ema})
    long, short = (
        score(how, source, functools.partial(draw_teacher, weak=teacher[1]), params)
        for how, draw_teacher in zip((first, few), of_teacher, strict=True)
    )
    about["teacher"] |= long
    about["undistilled"] = short
    train.finish(config, out, state, draw, source, about, lines)
    if long:
        print_scores("teacher", first, long)
        print_scores("teacher", few, short)
        print_scores("student", config, about["scores"])
    return state


def check_same(out: Path, config: ConfigDict, about: dict[str, Any]) -> None:
    """Checks that there is no run in `out` yet, or the same one.

    Raises:
      RunError: there is another one.
    """
    if not (out / "config.json").exists():
        return
    try:
        there = json.loads((out / "config.json").read_text())
        teacher = json.loads((out / "run.json").read_text()).get("teacher", {})
    except (OSError, ValueError) as error:
        raise runs.RunError(f"{out} holds a damaged run: choose another --out") from error
    old = {**there, "teacher": {key: teacher.get(key) for key in about["teacher"]}}
    changed = runs.differences(old, {**runs.as_json(config), "teacher": about["teacher"]})
    if changed:
        lines = "\n".join(f"  {key}: {a!r} there, {b!r} here" for key, a, b in changed)
        raise runs.RunError(f"{out} holds another run:\n{lines}\nChoose another --out")


def run_rounds(
    out: Path,
    first: ConfigDict,
    config: ConfigDict,
    shape: tuple[int, ...],
    teacher: tuple[PyTree, PyTree],
    about: dict[str, Any],
    batches: Any,
    saved: checkpoints.Checkpointer,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Runs the rounds that are left; returns the last student's state and the lines of metrics."""
    mesh = build.make_mesh(config)
    like = jax.eval_shape(functools.partial(begin_round, config), teacher[0], 0)
    places = sharding.fully_sharded(mesh, like)
    begin = jax.jit(functools.partial(begin_round, config), out_shardings=places)
    updates, done = config.train.num_steps, 0
    rounds = halvings(first.sample.steps, config.sample.steps)
    if saved.latest is not None:
        restored = checkpoints.restore_newest(saved, sharding.placed(like, places))
        batches.set_state(restored.data)
        state, done = restored.state, int(restored.state.step) // updates
        teacher = (state.ema, None)
    # In this order: a run that can be found by its configuration is complete.
    runs.write_json(out / "run.json", about)
    runs.write_json(out / "config.json", runs.as_json(config))
    with runs.Metrics(out, done * updates, tensorboard=config.train.tensorboard) as metrics:
        for i, steps in list(enumerate(rounds))[done:]:
            print(f"round {i + 1} of {len(rounds)}: {steps} steps to {steps // 2}", flush=True)
            this = config.copy_and_resolve_references()
            this.train.num_steps = (i + 1) * updates
            teaching = by_ddim(config if i else first, steps)
            step = make_step(teaching, config, shape, i * updates)
            advance = loop.compile_step(step, like, mesh, held=teacher)
            state = begin(teacher[0], i * updates)
            state = loop.run(this, state, advance, batches, saved, metrics, last=(i + 1) * updates)
            teacher = (state.ema, None)
    return state, metrics.lines


def begin_round(config: ConfigDict, params: PyTree, step: Array) -> TrainState:
    """Returns the state of a student at the start of its round: its teacher's parameters."""
    # Copied, because the student's are given away at every step.
    state = init_state(
        jax.tree.map(jnp.copy, params),
        build.make_optimizer(config),
        skip_nonfinite=config.train.max_skipped > 0,
    )
    return dataclasses.replace(state, step=jnp.int32(step))


def make_step(teaching: ConfigDict, config: ConfigDict, shape: tuple[int, ...], start: int) -> Any:
    """Returns the pure train step of a round, `(state, teacher, batch) -> (state, metrics)`.

    Args:
      teaching: the teacher's configuration.
      config: the student's.
      shape: that of one example.
      start: how many updates there were before the round.
    """
    make_teacher, grid = drawing.make_denoiser(teaching, shape), drawing.make_grid(teaching)
    network = build.make_network(config, shape)
    parameterization = build.make_parameterization(config)
    weighting = build.WEIGHTINGS[config.weighting]()
    optimizer, decay = build.make_optimizer(config), ema.warmup(config.ema_decay)
    # Two addresses of the seed are those of the teacher's training.
    key = jax.random.fold_in(jax.random.key(config.seed), 2)

    def step(state: TrainState, teacher: tuple[PyTree, PyTree], batch: Batch) -> Any:
        params, weak = teacher
        batch = batch if config.labels.num_classes else {"x0": batch["x0"]}
        loss_fn = losses.progressive_distillation(
            network,
            lambda cond: make_teacher(params, cond, weak),
            grid,
            parameterization,
            weighting,
        )
        update = make_train_step(
            loss_fn,
            optimizer,
            lambda n: decay(n - start),
            key=key,
            skip_nonfinite=config.train.max_skipped > 0,
        )
        return update(state, batch)

    return step


def score(config: ConfigDict, source: Any, draw: Any, params: PyTree) -> dict[str, float]:
    """Returns precision and so on of samples, as those of a finished run; none if it has none."""
    if not (config.sample.num and config.evaluate.neighbours):
        return {}
    samples = np.concatenate(list(train.progress(config, draw, params)))
    real = np.stack([source[i]["image"] for i in range(len(source))])
    k = config.evaluate.neighbours
    images = viz.to_uint8(samples)
    return evaluation.manifold_scores(real / 255, images / 255, k=k)._asdict()


def print_scores(who: str, config: ConfigDict, scores: dict[str, float]) -> None:
    """Prints what the command is for; recall, as that is what few steps lose first."""
    shown = ", ".join(f"{name} {scores[name]:.3f}" for name in ("precision", "recall", "coverage"))
    print(f"{who}, steps {config.sample.steps}: {shown}")


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir)
    options = (
        *("step", "teacher_steps", "student_steps", "updates", "batch_size", "learning_rate"),
        *("ema_decay", "weighting"),
    )
    distill(
        workdir,
        Path(FLAGS.out or workdir.with_name(workdir.name + "_distilled")),
        **{name: getattr(FLAGS, name) for name in options},
    )


if __name__ == "__main__":
    runtime.command(define_flags, main)
