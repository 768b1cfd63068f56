"""Trains a model, draws samples from it and says how good they are.

    python -m experiments.train
    python -m experiments.train --config=experiments/configs/mnist.py --config.seed=1

A run that was interrupted, at any instant, goes on when the same command is given again, and ends
with the same parameters as if it had not been.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from experiments import build, cohorts, drawing, realism, report, runs, runtime
from jaxdiff import evaluation, sampling, viz
from jaxdiff.data import tables
from jaxdiff.training import TrainState, checkpoints

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    config_flags.DEFINE_config_file("config", str(Path(__file__).parent / "configs/digits.py"))
    flags.DEFINE_string("workdir", None, "The run directory; runs/NAME if not given.")
    flags.DEFINE_bool(
        "allow_config_change", False, "Go on with a run although its configuration differs."
    )


def train(config: ConfigDict, workdir: Path, *, allow_config_change: bool = False) -> TrainState:
    """Trains to the last step, from the newest checkpoint if there is one, and finishes the run.

    Args:
      config: the configuration.
      workdir: the run directory.
      allow_config_change: whether to go on with a run of another configuration.

    Returns:
      The final state.

    Raises:
      RunError: the run directory cannot be written to or holds another run.
      CheckpointError: the newest checkpoint cannot be read.
      ValueError: the configuration makes no sense.
    """
    check(config)
    # Whatever may be wrong with the configuration is found before anything is written.
    cohort = None
    if build.is_table(config):
        cohort = cohorts.load(config)
        cohorts.resolve(config, cohort)
    source = cohorts.make_source(cohort) if cohort else build.make_source(config)
    shape = build.example_shape(config, source)
    batches = build.make_batches(config, source)
    own = cohort.own if cohort else None
    init, step_fn = build.make_training(config, shape, own)
    draw = cohorts.make_draw(config, shape, own) if cohort else drawing.make_draw(config, shape)
    like = jax.eval_shape(init)
    runs.open_workdir(workdir, config, allow_change=allow_config_change)

    mesh = build.mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step_fn = jax.jit(step_fn, donate_argnums=0, compiler_options=runtime.compiler_options())

    with checkpoints.open_folder(workdir / "checkpoints", keep=config.train.keep) as saved:
        state, position = resume(saved, init, like, everywhere, batches, config)
        runs.write_json(workdir / "config.json", runs.as_json(config))
        if cohort:
            cohorts.save(workdir, cohort)
        num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        about = runs.describe(config, num_params, shape)
        runs.write_json(workdir / "run.json", about)
        print(f"{config.name}: {num_params:,} parameters, from step {position}", flush=True)

        preview = functools.partial(save_preview, workdir, draw)
        with contextlib.closing(runs.Metrics(workdir / "metrics.jsonl", position)) as metrics:
            state = loop(config, state, step_fn, batches, rows, saved, metrics, preview)
    about["sha256"] = runs.fingerprint({"params": state.params, "ema": state.ema})
    if cohort:
        finish_table(config, workdir, state, draw, cohort, about, metrics.lines)
    else:
        finish(config, workdir, state, draw, source, about, metrics.lines)
    return state


def check(config: ConfigDict) -> None:
    """Checks what no other function would check at once.

    Raises:
      ValueError: a count is out of range or does not fit another.
    """
    for section, key, least in (
        ("train", "batch_size", 1),
        ("train", "num_steps", 1),
        ("train", "log_every", 1),
        ("train", "checkpoint_every", 1),
        ("train", "keep", 1),
        ("train", "max_skipped", 0),
        ("train", "sample_every", 0),
        ("optimizer", "accumulate", 1),
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
    if config.train.batch_size % jax.device_count():
        raise ValueError(
            f"train.batch_size is that of all devices together and must be a multiple of their "
            f"number, {jax.device_count()}, got {config.train.batch_size}"
        )


def resume(
    saved: checkpoints.Checkpointer,
    init: Any,
    like: TrainState,
    sharding: NamedSharding,
    batches: Any,
    config: ConfigDict,
) -> tuple[TrainState, int]:
    """Returns the state to go on from and its step, and sets the data to where it stood."""
    if saved.latest is None:
        return jax.jit(init, out_shardings=sharding)(), 0
    restored = checkpoints.restore_newest(saved, build.placed(like, sharding))
    batches.set_state(restored.data)
    step = int(restored.state.step)
    print(f"resumed from the checkpoint of step {step}", flush=True)
    if step > config.train.num_steps:
        raise runs.RunError(
            f"the run is at step {step} already, beyond train.num_steps={config.train.num_steps}"
        )
    return restored.state, step


def loop(
    config: ConfigDict,
    state: TrainState,
    step_fn: Any,
    batches: Any,
    rows: NamedSharding,
    saved: checkpoints.Checkpointer,
    metrics: runs.Metrics,
    preview: Any,
) -> TrainState:
    """Runs the steps that are left, saving and logging on the way."""
    options, resolved = config.train, runs.as_json(config)
    first, last = int(state.step), options.num_steps
    writer = tensorboard(metrics) if options.tensorboard else None
    bar = tqdm.tqdm(
        total=last, initial=first, unit="step", desc=config.name, disable=None, smoothing=0.05
    )
    pending: list[Mapping[str, jax.Array]] = []  # metrics that are on the device still
    since = time.monotonic()
    for step in range(first + 1, last + 1):
        arrays = next(batches)
        if not (config.labels.num_classes or build.is_table(config)):
            arrays = {"x0": arrays["x0"]}
        batch = jax.tree.map(
            functools.partial(jax.make_array_from_process_local_data, rows), arrays
        )
        state, values = step_fn(state, batch)
        pending.append(values)
        bar.update()
        if step % options.log_every == 0 or step == last:
            line = average(pending)
            line["steps_per_second"] = len(pending) / (time.monotonic() - since)
            metrics.write(step=step, **line)
            tell(bar, step, line)
            for name, value in line.items() if writer else ():
                writer.add_scalar(name, value, step)
            check_finite(options.max_skipped, line, step)
            pending, since = [], time.monotonic()
        if step % options.checkpoint_every == 0 or step == last:
            checkpoints.save(saved, state, data=batches.get_state(), config=resolved)
        if options.sample_every and step % options.sample_every == 0 and step < last:
            preview(state.ema, step)
    bar.close()
    if writer:
        writer.close()
    return state


def average(pending: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Fetches the metrics of some steps and returns their means, over those not skipped if any."""
    host = jax.device_get(pending)
    series = {name: np.array([values[name] for values in host]) for name in host[0]}
    counts = {name: series.pop(name) for name in ("skipped", "skipped_in_a_row") if name in series}
    done = counts.get("skipped_in_a_row", np.zeros(len(host))) == 0
    done |= not done.any()
    line = {name: float(np.mean(values[done])) for name, values in series.items()}
    return line | {name: int(np.max(values)) for name, values in counts.items()}


def check_finite(most: int, line: Mapping[str, float], step: int) -> None:
    """Ends a run that gets nowhere.

    Raises:
      RunError: the loss is not finite, or of some `most` batches in a row that were skipped.
    """
    advice = "lower optimizer.learning_rate, and start again in another --workdir"
    if most:
        in_a_row = line["skipped_in_a_row"]
        if in_a_row >= most:
            raise runs.RunError(
                f"{in_a_row} batches in a row up to step {step} had a loss or gradient that is not "
                f"finite (loss {line['loss']}; {line['skipped']} in all were skipped): the "
                f"parameters are those before. Look at the data, or {advice}"
            )
    elif not np.isfinite(line["loss"]):
        raise runs.RunError(f"the loss is {line['loss']} at step {step}: {advice}")


def tell(bar: tqdm.tqdm, step: int, line: Mapping[str, float]) -> None:
    """Shows how training goes: in the bar, or where there is no terminal as a line."""
    bar.set_postfix(loss=f"{line['loss']:.4f}")
    if bar.disable:
        left = (bar.total - step) / line["steps_per_second"]
        print(
            f"step {step} of {bar.total}, loss {line['loss']:.4f}, "
            f"{line['steps_per_second']:.1f} steps/s, {left:.0f} s left",
            flush=True,
        )


def tensorboard(metrics: runs.Metrics) -> Any:
    """Returns a TensorBoard writer beside the metrics."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'train.tensorboard needs tensorboardX: pip install "jaxdiff[tensorboard]"'
        ) from error
    return SummaryWriter(str(metrics.path.parent / "tensorboard"))


def save_preview(workdir: Path, draw: Any, params: Any, step: int) -> None:
    """Writes a picture of the first samples of an unfinished model."""
    x = np.asarray(draw(params, 0))[:64]
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
    with tqdm.tqdm(total=config.sample.num, unit="sample", desc="samples", disable=None) as bar:
        for batch in sampling.in_batches(functools.partial(draw, params), config.sample.num):
            bar.update(len(batch))
            yield batch


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir or Path("runs") / FLAGS.config.name)
    train(FLAGS.config, workdir, allow_config_change=FLAGS.allow_config_change)


if __name__ == "__main__":
    runtime.command(define_flags, main)
