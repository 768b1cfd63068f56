"""Draws samples from a trained model.

    python -m experiments.sample --workdir=runs/digits --num=100
    python -m experiments.sample --workdir=runs/digits --num=20 --first_index=40 --solver=ddpm \
        --steps=1000 --gif
    python -m experiments.sample --workdir=runs/digits_conditional --solver=dpm_solver_pp \
        --order=3 --grid=karras --rho=5 --steps=20 --guidance=classifier_free --scale=2 --label=7
    python -m experiments.sample --workdir=runs/clinical --num=200 --where=sex=f --where=trt=1

Samples of a model of a table are patients, written to OUT/synthetic.csv.

Sample i of a seed is the same picture whatever the batch size and the number of devices: the second
command draws those numbered 40 to 59. Of several processes (--coordinator, --num_processes,
--process_id) each writes its share, OUT/samples-00000-of-00002.npz and so on.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict

from experiments import build, cohorts, drawing, report, runs, runtime
from experiments.config import default
from jaxdiff import viz
from jaxdiff.base import PyTree
from jaxdiff.data import tables
from jaxdiff.training import checkpoints, sharding

FLAGS = flags.FLAGS
GIF_FRAMES = 50

# Flags that override the run's own `config.sample`, with their place there and their help.
OVERRIDES = {
    "num": ("num", "How many samples."),
    "batch_size": ("batch_size", "How many at a time, over all devices."),
    "seed": ("seed", "The seed."),
    "label": ("label", "The class of all samples; in turn if not given."),
    "steps": ("steps", "How many steps: intervals of the grid."),
    "solver": ("solver", "The solver."),
    "order": ("solver_options.order", "Of dpm_solver(_pp), sde_dpm_solver_pp, unipc, deis, lms."),
    "kind": ("solver_options.kind", "Of dpm_solver(_pp): multistep or singlestep."),
    "average": ("solver_options.average", "Of (sde_)dpm_solver(_pp): midpoint or exact."),
    "variant": ("solver_options.variant", "Of unipc: bh1 or bh2."),
    "variance": ("solver_options.variance", "Of ddpm: small, large or learned."),
    "eta": ("solver_options.eta", "The noise of ddim and euler_ancestral, in [0, 1]."),
    "corrector_steps": ("solver_options.corrector_steps", "Of predictor_corrector."),
    "snr": ("solver_options.snr", "Of predictor_corrector."),
    "rtol": ("solver_options.rtol", "The relative tolerance of probability_flow."),
    "atol": ("solver_options.atol", "The absolute tolerance of probability_flow."),
    "grid": ("grid", "The spacing of the steps."),
    "rho": ("grid_options.rho", "Of karras."),
    "beta_a": ("grid_options.a", "Of beta."),
    "beta_b": ("grid_options.b", "Of beta."),
    "sigma_max": ("grid_options.sigma_max", "The first sigma/alpha, of spacings in it."),
    "sigma_min": ("grid_options.sigma_min", "The last sigma/alpha, of spacings in it."),
    "grid_end": ("grid_options.end", "The last time of linspace, quadratic and beta."),
    "churn": ("churn", "EDM's S_churn."),
    "churn_low": ("churn_options.s_min", "EDM's S_min: no churn below this sigma/alpha."),
    "churn_high": ("churn_options.s_max", "EDM's S_max: no churn above this sigma/alpha."),
    "churn_noise": ("churn_noise", "EDM's S_noise."),
    "guidance": ("guidance", "The guidance."),
    "scale": ("guidance_options.scale", "The scale of the guidance; 1 for none."),
    "rescale": ("guidance_options.rescale", "The share of Lin et al.'s rescaling."),
    "guidance_eta": ("guidance_options.eta", "The parallel share of adaptive_projected."),
    "norm_threshold": ("guidance_options.norm_threshold", "Of adaptive_projected."),
    "guidance_low": ("guidance_options.low", "No guidance below this sigma/alpha."),
    "guidance_high": ("guidance_options.high", "No guidance above this sigma/alpha."),
    "weak_step": ("guidance_options.weak_step", "The worse checkpoint, for autoguidance."),
    "threshold": ("threshold", "Of the predicted clean data."),
}
CHOICES = {
    "solver": drawing.SOLVERS,
    "grid": drawing.GRIDS,
    "guidance": drawing.GUIDANCE,
    "threshold": drawing.THRESHOLDS,
}
AT_LEAST = {"num": 1, "batch_size": 1, "seed": 0}


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory of the trained model.")
    flags.DEFINE_string("out", None, "Folder to write to; WORKDIR/drawn if not given.")
    flags.DEFINE_integer("step", None, "The checkpoint to use; the newest if not given.")
    flags.DEFINE_bool("ema", True, "Use the average of the parameters.")
    flags.DEFINE_integer("fsdp", 1, "How many devices share a copy of the parameters.", 1)
    flags.DEFINE_integer("first_index", 0, "The number of the first sample.", lower_bound=0)
    flags.DEFINE_bool("gif", False, "Also write the reverse process of the first samples.")
    flags.DEFINE_multi_string("where", [], "COLUMN=VALUE of a static column, of all patients.")
    flags.DEFINE_integer("visits", None, "How many visits all patients have; else as the data's.")
    for name, (key, text) in OVERRIDES.items():
        section, last = place(default(), key)
        of_type = section.get_type(last)
        if name in CHOICES:
            flags.DEFINE_enum(name, None, list(CHOICES[name]), text)
        elif of_type is int:
            flags.DEFINE_integer(name, None, text, lower_bound=AT_LEAST.get(name))
        elif of_type is float:
            flags.DEFINE_float(name, None, text)
        else:
            flags.DEFINE_string(name, None, text)


def place(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the section of `config.sample` that a dotted key is in, and its last part."""
    *section, last = key.split(".")
    return (config.sample[section[0]] if section else config.sample), last


def override(config: ConfigDict) -> None:
    """Writes the flags that are given into `config.sample`."""
    given = {name: getattr(FLAGS, name) for name in OVERRIDES if getattr(FLAGS, name) is not None}
    for name in ("solver", "grid", "guidance"):
        if given.get(name, config.sample[name]) != config.sample[name]:
            # The run's options are of another one.
            config.sample[f"{name}_options"] = default().sample[f"{name}_options"]
    for name, value in given.items():
        section, last = place(config, OVERRIDES[name][0])
        section[last] = value


def load(
    workdir: Path, step: int | None, *, ema: bool, tables_too: bool = False, fsdp: int = 1
) -> tuple[ConfigDict, PyTree, tuple, int]:
    """Returns the run's configuration, its parameters, an example's shape and the step.

    Args:
      workdir: the run directory.
      step: which checkpoint; None for the newest.
      ema: whether to return the average of the parameters.
      tables_too: whether the caller knows what to do with models of tables.
      fsdp: over how many devices the parameters are divided.

    Raises:
      RunError: the directory holds no run, or none with a checkpoint, or that of a table.
      CheckpointError: the checkpoint cannot be read.
      FileNotFoundError: there is no checkpoint of that step.
    """
    config = runs.load_config(workdir)
    config.mesh.fsdp = fsdp
    if build.is_table(config) and not tables_too:
        raise runs.RunError(
            f"{workdir} holds a model of a table, and this command is for images: there are "
            "experiments.sample, evaluate and complete"
        )
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise runs.RunError(f"{workdir} has no checkpoint yet: train it first")
    shape = runs.example_shape(workdir)
    own = cohorts.load_templates(workdir).own if build.is_table(config) else None
    init, _ = build.make_training(config, shape, own)
    like = jax.eval_shape(init)
    places = sharding.fully_sharded(build.make_mesh(config), like)
    like = sharding.placed(like, places)
    with checkpoints.open_folder(folder, read_only=True) as saved:
        state = checkpoints.restore(saved, like, step).state
    return config, state.ema if ema else state.params, shape, int(state.step)


def load_weak(config: ConfigDict, workdir: Path, *, ema: bool) -> PyTree:
    """Returns the parameters of the worse network of autoguidance, or None for others.

    Raises:
      ValueError: autoguidance is not told which.
    """
    if config.sample.guidance != "autoguidance":
        return None
    step = config.sample.guidance_options.weak_step
    if step is None:
        raise ValueError("autoguidance needs a worse network: name a checkpoint by --weak_step")
    return load(workdir, step, ema=ema, fsdp=config.mesh.fsdp)[1]


def draw_all(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    first_index: int = 0,
    weak: PyTree = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `config.sample.num` samples, numbered from `first_index` on.

    Returns:
      The samples that this process has a share in, all if it is alone, and their numbers.
    """
    draw, options, drawn = drawing.make_draw(config, shape), config.sample, []
    with tqdm.tqdm(total=options.num, unit="sample", desc="samples", disable=None) as bar:
        for done in range(0, options.num, options.batch_size):
            rows, numbers = sharding.own_rows(draw(params, first_index + done, weak=weak))
            wanted = numbers + done < options.num
            drawn.append((rows[wanted], first_index + done + numbers[wanted]))
            bar.update(min(options.batch_size, options.num - done))
    samples, numbers = zip(*drawn, strict=True)
    return np.concatenate(samples), np.concatenate(numbers)


def save_gif(
    path: Path,
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    first_index: int,
    weak: PyTree = None,
) -> None:
    """Writes the reverse process of the first samples: above x_t, below the predicted x0."""
    config = config.copy_and_resolve_references()
    config.sample.batch_size = min(config.sample.num, 16)
    every = -(-(drawing.make_grid(config).sigma.size - 1) // GIF_FRAMES)
    draw = drawing.make_draw(config, shape, trajectory_every=every)
    _, record = draw(params, first_index, weak)
    frames = [
        viz.image_grid(viz.to_uint8(np.concatenate([x, x0])), columns=config.sample.batch_size)
        for x, x0 in zip(np.asarray(record.x), np.asarray(record.x0), strict=True)
    ]
    if jax.process_index() == 0:
        viz.save_gif(path, frames)


def write_patients(
    out: Path,
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    templates: cohorts.Templates,
) -> None:
    """Writes the patients that the flags ask for.

    Raises:
      ValueError: a flag is for images.
    """
    if FLAGS.gif or config.sample.label is not None or config.sample.guidance == "autoguidance":
        raise ValueError("--gif, --label and autoguidance are for models of images")
    schema = templates.codec.schema
    drawn = cohorts.draw_table(
        config,
        params,
        shape,
        templates,
        first_index=FLAGS.first_index,
        visits=FLAGS.visits,
        where=cohorts.parse_where(FLAGS.where, schema),
    )
    if jax.process_index() == 0:
        tables.write_table(drawn, out / "synthetic.csv", schema)


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir)
    config, params, shape, step = load(
        workdir, FLAGS.step, ema=FLAGS.ema, tables_too=True, fsdp=FLAGS.fsdp
    )
    override(config)
    out = Path(FLAGS.out or workdir / "drawn")
    out.mkdir(parents=True, exist_ok=True)
    if build.is_table(config):
        write_patients(out, config, params, shape, cohorts.load_templates(workdir))
        print(f"drew {config.sample.num} patients with the parameters of step {step}")
        print(f"look at {out / 'synthetic.csv'}")
        return
    if FLAGS.where or FLAGS.visits is not None:
        raise ValueError("--where and --visits are for models of tables")
    weak = load_weak(config, workdir, ema=FLAGS.ema)
    samples, numbers = draw_all(config, params, shape, FLAGS.first_index, weak)
    options = {**config.sample.to_dict(), "step": step, "ema": FLAGS.ema}
    labels = drawing.make_labels(config, FLAGS.first_index, config.sample.num)
    labels = labels if labels is None else np.asarray(labels)[numbers - FLAGS.first_index]
    path = report.save_samples(out / "samples", samples, options, numbers, labels, shared=True)
    if FLAGS.gif:
        save_gif(out / "samples.gif", config, params, shape, FLAGS.first_index, weak)
    print(f"drew {config.sample.num} samples with the parameters of step {step}")
    print(f"look at {out / 'samples.png'}; the samples themselves are in {path}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
