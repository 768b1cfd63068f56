"""Draws samples from a trained model.

    python -m experiments.sample --workdir=runs/digits --num=100
    python -m experiments.sample --workdir=runs/digits --num=20 --first_index=40 --solver=ddpm \
        --steps=1000 --gif
    python -m experiments.sample --workdir=runs/digits_conditional --solver=dpm_solver_pp \
        --order=3 --grid=karras --rho=5 --steps=20 --guidance=classifier_free --scale=2 --label=7
    python -m experiments.sample --workdir=runs/clinical --num=200 --where=sex=f --where=trt=1
    python -m experiments.sample --pretrained=ddpm-cifar10-32 --num=16

`--pretrained` is the directory of a model from elsewhere (`experiments.pretrained`), such as one of
diffusers. Samples of a model of a table are patients, written to OUT/synthetic.csv.

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

from experiments import build, cohorts, drawing, pretrained, report, runtime, trained
from experiments.config import default
from jaxdiff import viz
from jaxdiff.base import PyTree
from jaxdiff.data import tables
from jaxdiff.training import sharding

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
    flags.DEFINE_string(
        "pretrained",
        None,
        "Instead, the directory of an export, or of a diffusers UNet2DModel or its pipeline.",
    )
    flags.DEFINE_string(
        "out",
        None,
        "Folder to write to; if not given WORKDIR/drawn, or drawn/NAME of a pretrained.",
    )
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


def load_pretrained(directory: Path) -> pretrained.Model:
    """Returns the model in a directory, its parameters on the devices.

    Raises:
      ValueError: a flag is for runs; and as `pretrained.load`, which may raise others.
    """
    if FLAGS["workdir"].present or FLAGS.step is not None or not FLAGS.ema:
        raise ValueError("--workdir, --step and --noema are for runs: leave them or --pretrained")
    found = pretrained.load(directory)
    found.config.mesh.fsdp = FLAGS.fsdp
    places = sharding.fully_sharded(build.make_mesh(found.config), found.params)
    return found._replace(params=jax.device_put(found.params, places))


def draw_all(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    first_index: int = 0,
    weak: PyTree = None,
    stem: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `config.sample.num` samples, numbered from `first_index` on.

    The picture STEM.png, if asked for, is written as soon as there are enough samples for it.

    Returns:
      The samples that this process has a share in, all if it is alone, and their numbers.
    """
    draw, options, drawn = drawing.make_draw(config, shape), config.sample, []
    with tqdm.tqdm(total=options.num, unit="sample", desc="samples", disable=None) as bar:
        for done in range(0, options.num, options.batch_size):
            rows, numbers = sharding.own_rows(draw(params, first_index + done, weak=weak))
            wanted = numbers + done < options.num
            drawn.append((rows[wanted], first_index + done + numbers[wanted]))
            if stem and sum(len(rows) for rows, _ in drawn) >= report.SHOWN:
                report.save_picture(stem, np.concatenate([rows for rows, _ in drawn]))
                stem = None  # it does not change any more
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
    out = Path(FLAGS.out or workdir / "drawn")
    if FLAGS.pretrained:
        config, params, shape, step = load_pretrained(Path(FLAGS.pretrained))
        out = Path(FLAGS.out or Path("drawn") / config.name)
    else:
        config, params, shape, step = trained.load(
            workdir, FLAGS.step, ema=FLAGS.ema, tables_too=True, fsdp=FLAGS.fsdp
        )
    override(config)
    out.mkdir(parents=True, exist_ok=True)
    if build.is_table(config):
        write_patients(out, config, params, shape, cohorts.load_templates(workdir))
        print(f"drew {config.sample.num} patients with the parameters of step {step}")
        print(f"look at {out / 'synthetic.csv'}")
        return
    if FLAGS.where or FLAGS.visits is not None:
        raise ValueError("--where and --visits are for models of tables")
    weak = trained.load_weak(config, workdir, ema=FLAGS.ema)
    samples, numbers = draw_all(config, params, shape, FLAGS.first_index, weak, out / "samples")
    options = {**config.sample.to_dict(), "step": step, "ema": FLAGS.ema}
    labels = drawing.make_labels(config, FLAGS.first_index, config.sample.num)
    labels = labels if labels is None else np.asarray(labels)[numbers - FLAGS.first_index]
    path = report.save_samples(out / "samples", samples, options, numbers, labels, shared=True)
    if FLAGS.gif:
        save_gif(out / "samples.gif", config, params, shape, FLAGS.first_index, weak)
    of = FLAGS.pretrained if step is None else f"the parameters of step {step}"
    print(f"drew {config.sample.num} samples with {of}")
    print(f"look at {out / 'samples.png'}; the samples themselves are in {path}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
