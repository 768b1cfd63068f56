"""Trains a model, draws samples from it and says how good they are.

    python -m experiments.train
    python -m experiments.train --config=experiments/configs/mnist.py --config.seed=1

--config.init_from=DIR starts from the parameters of another model (experiments.pretrained).

A run that was interrupted, at any instant, goes on when the same command is given again, and ends
with the same parameters as if it had not been. On SIGTERM it saves, and exits with status 75.

On many devices (--config.mesh.fsdp=8 divides the parameters, too), and in several processes:

    python -m experiments.train --coordinator=HOST:PORT --num_processes=2 --process_id=0
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from experiments import (
    build,
    cohorts,
    drawing,
    lock,
    loop,
    packing,
    pretrained,
    realism,
    report,
    runs,
    runtime,
)
from jaxdiff import evaluation, sampling, viz
from jaxdiff.base import PyTree
from jaxdiff.data import tables
from jaxdiff.training import TrainState, checkpoints, sharding

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs/digits.py"))
    flags.DEFINE_string("workdir", None, "The run directory; runs/NAME if not given.")
    flags.DEFINE_bool(
        "allow_config_change", False, "Go on with a run although its configuration differs."
    )
    flags.DEFINE_list("profile", None, "START,STOP: record a trace of the steps between.")


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    allow_config_change: bool = False,
    profile: Sequence[int] | None = None,
    until: int | None = None,
) -> TrainState:
    """Trains to the last step, from the newest checkpoint if there is one, and finishes the run.

    Args:
      config: the configuration.
      workdir: the run directory.
      allow_config_change: whether to go on with a run of another configuration.
      profile: the steps between which to record a trace.
      until: a step to stop after, before the last, with the run as unfinished as if it were killed.

    Returns:
      The final state.

    Raises:
      RunError: the run directory cannot be written to, holds another run or is in use.
      CheckpointError: no checkpoint of those there are can be read.
      PreemptedError: notice to stop was given, and the state is saved.
      ValueError: the configuration makes no sense.
    """
    check(config)
    # Whatever may be wrong with the configuration is found before anything is written.
    cohort = None
    if build.is_table(config):
        cohort = cohorts.load(config)
        cohorts.resolve(config, cohort)
    source = cohorts.make_source(cohort) if cohort else one_by_one(build.make_source, config)
    mesh = build.make_mesh(config)
    parts: list[Stage] = []
    for i, (stage, last) in enumerate(build.stages(config)):
        arrays = parts[0].arrays if parts else None
        parts.append(make_stage(stage, last, i, source, mesh, cohort, arrays))
    config, shape = parts[-1].config, parts[-1].shape  # what the model is for
    runs.open_workdir(workdir, config, allow_change=allow_config_change)

    alone = contextlib.nullcontext() if jax.process_index() else lock.hold(workdir)
    with alone, runtime.Notice() as notice:
        with contextlib.ExitStack() as stack:
            saved = stack.enter_context(
                checkpoints.open_folder(workdir / "checkpoints", keep=config.train.keep)
            )
            notice.step = saved.latest or 0
            state, position = resume(saved, parts, mesh)
            origin = None
            if config.init_from and saved.latest is None:
                params, origin = pretrained.start_from(config, state.params)
                state = with_parameters(state, params)
            elif config.init_from:
                origin = runs.about(workdir).get("init_from")
            notice.step = position
            runs.write_json(workdir / "config.json", runs.as_json(config))
            if cohort:
                cohorts.save(workdir, cohort)
            num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            about = runs.describe(config, num_params, shape)
            if origin:
                about["init_from"] = origin
            runs.write_json(workdir / "run.json", about)
            print(f"{config.name}: {num_params:,} parameters, from step {position}", flush=True)

            snapshot = None
            if config.averages.snapshot_every:
                kept = stack.enter_context(open_snapshots(workdir, position))
                snapshot = functools.partial(save_snapshot, kept)
                due = position and position % config.averages.snapshot_every == 0
                if due and position not in kept.steps:  # the checkpoint was the faster one
                    snapshot(state)
            metrics = stack.enter_context(
                runs.Metrics(workdir, position, tensorboard=config.train.tensorboard)
            )
            with notice.looked_at():
                for part in parts:
                    preview = None
                    if config.train.sample_every:
                        preview = functools.partial(save_preview, workdir, part.draw)
                    state = loop.run(
                        part.config, part.pack(state), part.advance, part.batches, saved, metrics,
                        last=min(part.last, until or part.last), whole=part.unpack, preview=preview,
                        snapshot=snapshot, profile=profile, notice=notice,
                    )  # fmt: skip
                saved.wait()  # before notice may end the program anywhere
                notice.step = int(state.step)
        if until is not None and until < parts[-1].last:
            return state
        about["sha256"] = runs.fingerprint({"params": state.params, "ema": state.ema})
        if cohort:
            finish_table(config, workdir, state, parts[-1].draw, cohort, about, metrics.lines)
        else:
            finish(config, workdir, state, parts[-1].draw, source, about, metrics.lines)
    return state


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training, ready to run; most runs have one.

    Attributes:
      config: its configuration.
      last: the step that it ends with.
      shape: that of one example.
      init: makes the state before the first step, `init()`.
      like: the state's shapes and types.
      pack: makes the state that `advance` takes of it.
      unpack: the other way round.
      arrays: the data, if they reside on the devices.
      advance: the compiled step.
      batches: the iterator over what it takes.
      draw: draws samples.
    """

    config: ConfigDict
    last: int
    shape: tuple[int, ...]
    init: Callable[[], TrainState]
    like: TrainState
    pack: Callable[[TrainState], TrainState]
    unpack: Callable[[TrainState], TrainState]
    arrays: Any
    advance: loop.Advance
    batches: Any
    draw: Callable[..., Any]


def make_stage(
    config: ConfigDict,
    last: int,
    index: int,
    source: Any,
    mesh: Mesh,
    cohort: cohorts.Cohort | None,
    arrays: Any = None,
) -> Stage:
    """Makes all that a stage needs; nothing is compiled yet, and nothing written.

    `arrays` are those of another stage, if the data reside on the devices: one copy serves all.
    """
    shape, own = build.example_shape(config, source), cohort.own if cohort else None
    init, step = build.make_training(
        config,
        shape,
        own,
        mesh,
        mapped=runtime.maps_devices(mesh),
        parts=runtime.parts((config.train.batch_size, *shape), training=True),
    )
    take = None
    if config.data.resident:
        found, batches, take = build.make_resident(config, source, stage=index)
        if arrays is None:
            arrays = jax.device_put(found, sharding.everywhere(mesh))
    else:
        batches = build.make_batches(config, source, stage=index)
    told = config.labels.num_classes or cohort

    def step_of_batch(state: TrainState, held: Any, batch: Any) -> Any:
        return step(state, batch if told else {"x0": batch["x0"]})

    like = jax.eval_shape(init)
    pack, unpack = packing.for_training(like, mesh)
    advance = loop.compile_step(
        step_of_batch,
        jax.eval_shape(pack, like),
        mesh,
        take=take,
        arrays=arrays,
        at_once=config.train.steps_per_dispatch,
    )
    draw = cohorts.make_draw(config, shape, own) if cohort else drawing.make_draw(config, shape)
    return Stage(config, last, shape, init, like, pack, unpack, arrays, advance, batches, draw)


def one_by_one(make: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that may write to a shared folder in the first process before the others."""
    if jax.process_index() == 0:
        made = make(*args)
    sharding.barrier("first")
    return made if jax.process_index() == 0 else make(*args)


def check(config: ConfigDict) -> None:
    """Checks what no other function would check at once.

    Raises:
      ValueError: a count is out of range or does not fit another.
    """
    for section, key, least in (
        ("train", "microbatches", 1),
        ("train", "num_steps", 1),
        ("train", "steps_per_dispatch", 1),
        ("train", "log_every", 1),
        ("train", "checkpoint_every", 1),
        ("train", "keep", 1),
        ("train", "max_skipped", 0),
        ("train", "sample_every", 0),
        ("averages", "snapshot_every", 0),
        ("optimizer", "warmup_steps", 0),
        ("sample", "num", 0),
        ("evaluate", "neighbours", 0),
    ):
        if config[section][key] < least:
            raise ValueError(
                f"{section}.{key} must be at least {least}, got {config[section][key]}"
            )
    # Known now, and not only when the samples of a finished run are to be scored.
    neighbours = config.evaluate.neighbours
    if neighbours and 0 < config.sample.num <= neighbours:
        raise ValueError(
            f"evaluate.neighbours={neighbours} needs more samples than that, got "
            f"sample.num={config.sample.num}: draw more, or set evaluate.neighbours=0"
        )
    if neighbours and config.data.pad_to:
        raise ValueError(
            "evaluate.neighbours compares pixels with those of the data set, which data.pad_to "
            "changes: leave one of the two unset"
        )
    if build.is_table(config) and (neighbours or config.train.sample_every):
        raise ValueError("evaluate.neighbours and train.sample_every are for images: leave them 0")
    every = config.train.steps_per_dispatch
    for section, key in (
        ("train", "log_every"),
        ("train", "checkpoint_every"),
        ("train", "sample_every"),
        ("averages", "snapshot_every"),
    ):
        if config[section][key] % every:
            raise ValueError(
                f"{section}.{key} must be a multiple of train.steps_per_dispatch={every}, got "
                f"{config[section][key]}"
            )
    if config.averages.snapshot_every and not config.averages.sigma_rels:
        raise ValueError("averages.snapshot_every keeps those of averages.sigma_rels: name some")
    for stage, _ in build.stages(config):
        for section, key in (("train", "batch_size"), ("data", "shrink")):
            if stage[section][key] < 1:
                raise ValueError(f"{section}.{key} must be at least 1, got {stage[section][key]}")
        if stage.train.batch_size % (jax.device_count() * config.train.microbatches):
            raise ValueError(
                f"train.batch_size is that of all devices together and must be a multiple of their "
                f"number, {jax.device_count()}, got {stage.train.batch_size}"
                f" for {config.train.microbatches} microbatches"
            )
    build.make_mesh(config)


def resume(
    saved: checkpoints.Checkpointer, parts: Sequence[Stage], mesh: Mesh
) -> tuple[TrainState, int]:
    """Returns the state to go on from and its step, and sets the data to where it stood."""
    like, total = parts[0].like, parts[-1].last
    places = sharding.fully_sharded(mesh, like)
    if saved.latest is None:
        return jax.jit(parts[0].init, out_shardings=places)(), 0
    restored = checkpoints.restore_newest(saved, sharding.placed(like, places))
    step = int(restored.state.step)
    print(f"resumed from the checkpoint of step {step}", flush=True)
    if step > total:
        raise runs.RunError(f"the run is at step {step} already, beyond train.num_steps={total}")
    # At the end of a stage the data stand at its end, and those of the next at the start.
    saved_in = next(part for part in parts if step <= part.last)
    saved_in.batches.set_state(restored.data)
    return restored.state, step


def with_parameters(state: TrainState, params: PyTree) -> TrainState:
    """Returns a state before the first step with other parameters, and averages of these."""

    def placed() -> PyTree:  # arrays of their own each time, as all of the state is donated
        return jax.tree.map(
            lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding),
            params,
            state.params,
        )

    averages = state.averages and {name: placed() for name in state.averages}
    return dataclasses.replace(state, params=placed(), ema=placed(), averages=averages)


def open_snapshots(workdir: Path, step: int) -> checkpoints.Checkpointer:
    """Opens the folder of kept averages, without those after `step`: they are made again."""
    folder = workdir / "snapshots"
    if jax.process_index() == 0:
        for path in folder.glob("*"):
            if path.name.isdigit() and int(path.name) > step:
                shutil.rmtree(path)
    sharding.barrier("snapshots")
    return checkpoints.open_folder(folder, keep=None)


def save_snapshot(kept: checkpoints.Checkpointer, state: TrainState) -> None:
    """Keeps the averages by power functions, to make others of: `experiments.ema`."""
    powers = {name: tree for name, tree in state.averages.items() if name.startswith("power")}
    checkpoints.save_tree(kept, int(state.step), powers, {})


def save_preview(workdir: Path, draw: Any, params: Any, step: int) -> None:
    """Writes a picture of the first samples of an unfinished model."""
    x = sharding.to_host(draw(params, 0))[:64]
    if jax.process_index() == 0:
        viz.save_png(workdir / f"samples/step_{step:08d}.png", viz.image_grid(viz.to_uint8(x)))


def finish(
    config: ConfigDict,
    workdir: Path,
    state: TrainState,
    draw: Any,
    source: Any,
    about: dict[str, Any],
    lines: list[dict[str, Any]],
) -> None:
    """Draws the samples, scores them, writes the report and prints what it says."""
    samples = np.concatenate(list(progress(config, draw, state.ema)) or [np.zeros((0, 1, 1, 1))])
    if jax.process_index():
        return
    runs.check_there(workdir)
    scores = {}
    if len(samples):
        images = viz.to_uint8(samples)
        labels = drawing.make_labels(config, 0, len(samples))
        report.save_samples(workdir / "samples", samples, config.sample.to_dict(), labels=labels)
        if config.evaluate.neighbours:
            real = np.stack([source[i]["image"] for i in range(len(source))])
            k = config.evaluate.neighbours
            # Features in [0, 1]; samples are quantised like the data.
            scores = evaluation.manifold_scores(real / 255, images / 255, k=k)._asdict()
            about["scores"] = {"num": len(images), "real": len(real), "neighbours": k, **scores}
    runs.write_json(workdir / "run.json", about)
    report.write(workdir, config, about, lines)

    print(f"parameters: {about['parameters']:,}")
    for name, value in scores.items():
        print(f"{name}: {value:.3f}")
    print(f"sha256 of the parameters: {about['sha256']}")
    print(f"look at {workdir / 'samples.png'} and {workdir / 'report.html'}")


def finish_table(
    config: ConfigDict,
    workdir: Path,
    state: TrainState,
    draw: Any,
    cohort: cohorts.Cohort,
    about: dict[str, Any],
    lines: list[dict[str, Any]],
) -> None:
    """Draws synthetic patients, writes them and the report, and prints how real they look."""
    scores, sections = {}, []
    if config.sample.num:
        templates, schema = cohorts.load_templates(workdir), cohort.codec.schema
        shape = cohort.sequences.x0.shape[1:]
        synthetic = cohorts.draw_table(config, state.ema, shape, templates, compiled=draw)
        runs.check_there(workdir)
        tables.write_table(synthetic, workdir / "synthetic.csv", schema)
        real = cohort.table if cohort.held_out is None else cohort.held_out
        scores = realism.realism(real, synthetic, schema, classify=False)
        about["scores"] = {"real": "trained on" if real is cohort.table else "held out", **scores}
        sections = realism.sections(real, synthetic, schema)
    runs.write_json(workdir / "run.json", about)
    report.write(workdir, config, about, lines, sections)

    print(f"parameters: {about['parameters']:,}")
    for name, value in scores.items():
        print(f"{name}: {value:.3f}")
    print(f"sha256 of the parameters: {about['sha256']}")
    print(f"look at {workdir / 'synthetic.csv'} and {workdir / 'report.html'}")


def progress(config: ConfigDict, draw: Any, params: Any) -> Iterator[np.ndarray]:
    """Yields batches of samples, under a progress bar."""

    def whole(first_index: int) -> np.ndarray:
        return sharding.to_host(draw(params, first_index))

    with tqdm.tqdm(total=config.sample.num, unit="sample", desc="samples", disable=None) as bar:
        for batch in sampling.in_batches(whole, config.sample.num):
            bar.update(len(batch))
            yield batch


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir or Path("runs") / FLAGS.config.name)
    profile = FLAGS.profile and [int(step) if step.isdigit() else -1 for step in FLAGS.profile]
    last = FLAGS.config.train.num_steps
    if profile and not (len(profile) == 2 and 0 <= profile[0] < min(profile[1], last)):
        raise ValueError(
            f"--profile must be START,STOP with START < STOP and below train.num_steps={last}, got "
            f"{','.join(FLAGS.profile)}"
        )
    train(FLAGS.config, workdir, allow_config_change=FLAGS.allow_config_change, profile=profile)


if __name__ == "__main__":
    runtime.command(define_flags, main)
