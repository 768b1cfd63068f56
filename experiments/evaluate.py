"""Scores trained models: how well they predict data held out, and how good their samples are.

    python -m experiments.evaluate --workdir=runs/digits
    python -m experiments.evaluate --workdir=runs/digits,runs/digits_distilled --num=5000
    python -m experiments.evaluate --workdir=runs/digits_learned_variance --metrics=bound,likelihood
    python -m experiments.evaluate --workdir=runs/cifar10 --metrics=inception --inception=FILE.pth

Of data that the run was not trained on (`--split`, `--path`; if there are none, `validation` takes
those that it was trained on, and says so):

validation  the loss on a fixed grid of noise levels and noise: the same numbers for every run,
            whatever the batch size and the devices
bound       bits per dimension, by the variational bound of the chain of `solvers.ddpm`, with each
            of its variances. All share the network's predictions and the noise, so that their
            differences are known better than the bounds themselves
continuous  bits per dimension, by the variational bound in continuous time
likelihood  bits per dimension, by the probability-flow ODE (extra `ode`), beside those of a
            Gaussian fitted to the data trained on, and of no model at all

Of samples, those that training drew or `--num` new ones, against the data trained on:

manifold    precision, recall, density and coverage, of pixels
sliced      the sliced Wasserstein distance, of pixels
classifier  Frechet distance, KID and Inception Score by the features of a small classifier that is
            trained on the data's labels. It is no FID, and compares models of the same data only
inception   FID, KID and Inception Score by the network that published figures use, whose weights
            `--inception` names (pt_inception-2015-12-05, as of pytorch-fid, or safetensors of it)
classes     whether samples of a conditional model are of the class asked for, in the eyes of a
            classifier by the 3 nearest real images

Of a model of a table: realism, privacy and utility of its synthetic patients, against patients held
out (`experiments.evaluate_table`); of several runs also the mean.

A table of all of it is printed, with standard errors, the runs side by side. It is added to the
list in WORKDIR/evaluation.json and to WORKDIR/report.html.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import (
    build,
    drawing,
    evaluate_likelihood,
    evaluate_samples,
    evaluate_table,
    report,
    runs,
    runtime,
    sample,
    scores,
    trained,
)
from jaxdiff import viz

FLAGS = flags.FLAGS

OF_DATA = ("validation", "bound", "continuous", "likelihood")
OF_SAMPLES = ("manifold", "sliced", "classifier", "inception", "classes")


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory, or several: A,B.")
    flags.DEFINE_list(
        "metrics", None, f"What to score, of {', '.join((*OF_DATA, *OF_SAMPLES))}; see above."
    )
    flags.DEFINE_integer("step", None, "The checkpoint to use; the newest if not given.")
    flags.DEFINE_bool("ema", True, "Use the average of the parameters.")
    flags.DEFINE_bool("bound", False, "The same as --metrics=bound.")
    flags.DEFINE_string(
        "split", None, "The data held out; what NAME[:N] leaves if the run was trained on that."
    )
    flags.DEFINE_string("path", None, "The data held out of a run on a folder: another folder.")
    flags.DEFINE_bool("allow_overlap", False, "Let data be scored that were trained on.")
    flags.DEFINE_integer(
        "bound_steps", None, "Steps of the chain; all of the run's if not given.", lower_bound=2
    )
    flags.DEFINE_integer("batch_size", 100, "Examples at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The seed of all that is drawn.", lower_bound=0)
    flags.DEFINE_bool("classes", False, "The same as --metrics=classes.")
    flags.DEFINE_string("samples", None, "The samples; WORKDIR/samples.npz or synthetic.csv.")
    flags.DEFINE_integer("num", None, "Draw so many samples anew, as the run's own.", 2)
    flags.DEFINE_string("inception", None, "The file of the Inception network's weights.")
    flags.DEFINE_enum(
        "resize",
        "pytorch",
        ["pytorch", "tensorflow"],
        "How inception sees small images: as pytorch-fid does, or as torch-fidelity and the first "
        "FIDs.",
    )
    flags.DEFINE_enum(
        "trace", "hutchinson", ["hutchinson", "exact"], "How likelihood finds the trace."
    )
    flags.DEFINE_float("tolerance", 1e-3, "The error of each example's flow in likelihood.", 0)
    flags.DEFINE_integer(
        "draws", 1, "Draws of likelihood's noise under the logarithm; of the exact trace.", 1
    )
    flags.DEFINE_integer("points", 32, "Noise levels of validation.", lower_bound=1)


def chosen(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of what is to be scored.

    Raises:
      ValueError: there is no such name, or it needs another flag.
    """
    names = [*(FLAGS.metrics or ())]
    names += [name for name in ("bound", "classes") if getattr(FLAGS, name)]
    if not names:
        names = ["validation", "manifold", "sliced", "classifier"]
        names += ["inception"] if FLAGS.inception else []
        names += ["classes"] if config.labels.num_classes else []
    for name in names:
        build.choose("--metrics", name, dict.fromkeys((*OF_DATA, *OF_SAMPLES)))
    if "inception" in names and not FLAGS.inception:
        raise ValueError("--metrics=inception needs its weights: name the file by --inception=FILE")
    return tuple(dict.fromkeys(names))


def of_data(workdir: Path, names: Sequence[str], *, asked: bool) -> list[scores.Record]:
    """Returns a record of each of `OF_DATA` that is named.

    Args:
      workdir: the run directory.
      names: what to score.
      asked: whether they were asked for, or else data that were trained on do as well.
    """
    if not names:
        return []
    config = runs.load_config(workdir)
    try:
        name, source = evaluate_likelihood.held_out(
            config, FLAGS.split, FLAGS.path, allow_overlap=FLAGS.allow_overlap
        )
    except ValueError:
        if asked or FLAGS.split or FLAGS.path:
            raise
        name, source = "the data trained on", build.make_source(config)
    config, params, shape, step = trained.load(workdir, FLAGS.step, ema=FLAGS.ema)
    options = {"seed": FLAGS.seed, "batch_size": FLAGS.batch_size}
    parts = {
        "validation": functools.partial(evaluate_likelihood.validate, points=FLAGS.points),
        "bound": functools.partial(evaluate_likelihood.bound, steps=FLAGS.bound_steps),
        "continuous": evaluate_likelihood.continuous,
        "likelihood": functools.partial(
            evaluate_likelihood.likelihood,
            trace=FLAGS.trace,
            tolerance=FLAGS.tolerance,
            draws=FLAGS.draws,
        ),
    }
    about = {"data": name, "step": step, "ema": FLAGS.ema}
    return [
        {"part": part, **about, **parts[part](config, params, shape, source, **options)}
        for part in names
    ]


def of_samples(workdir: Path, names: Sequence[str], *, asked: bool) -> list[scores.Record]:
    """Returns a record of each of `OF_SAMPLES` that is named.

    Args:
      workdir: the run directory.
      names: what to score.
      asked: whether they were asked for, or else what the data do not allow is left out.
    """
    if not names:
        return []
    config = runs.load_config(workdir)
    path = Path(FLAGS.samples or workdir / "samples.npz")
    if FLAGS.num is None:
        about = {"samples": str(path)}
        images, labels = evaluate_samples.load_samples(path)
    else:
        images, labels, about = draw(workdir, FLAGS.num)
    real, known = evaluate_samples.gather(config, build.make_source(config))
    evaluate_samples.check(images, real)
    if known is None and not asked:
        print(f"{workdir}, classifier: left out, since the data have no labels")
        names = [name for name in names if name != "classifier"]
    seed, batch_size = {"seed": FLAGS.seed}, {"batch_size": FLAGS.batch_size}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "manifold": lambda: evaluate_samples.manifold(
            images, real, neighbours=config.evaluate.neighbours or 5, **seed
        ),
        "sliced": lambda: evaluate_samples.sliced(images, real, **seed),
        "classifier": lambda: evaluate_samples.classifier(
            images, real, known, **seed, **batch_size
        ),
        "inception": lambda: evaluate_samples.inception(
            images, real, Path(FLAGS.inception), resize=FLAGS.resize, **seed, **batch_size
        ),
        "classes": lambda: evaluate_samples.classes(images, labels, real, known),
    }
    return [{"part": part, **about, **parts[part]()} for part in names]


def draw(workdir: Path, num: int) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Draws samples as the run's configuration says; returns images, labels and whose they are."""
    config, params, shape, step = trained.load(workdir, FLAGS.step, ema=FLAGS.ema)
    config.sample.num, config.sample.batch_size = num, min(num, FLAGS.batch_size)
    weak = trained.load_weak(config, workdir, ema=FLAGS.ema)
    drawn, _ = sample.draw_all(config, params, shape, weak=weak)
    labels = drawing.make_labels(config, 0, num)
    labels = None if labels is None else np.asarray(labels)
    return viz.to_uint8(drawn), labels, {"samples": "drawn anew", "step": step, "ema": FLAGS.ema}


def evaluate(workdir: Path) -> list[scores.Record]:
    """Scores a run of images, and returns a record of each part."""
    names = chosen(runs.load_config(workdir))
    asked = bool(FLAGS.metrics or FLAGS.bound or FLAGS.classes)
    found = of_data(workdir, [name for name in names if name in OF_DATA], asked=asked)
    found += of_samples(workdir, [name for name in names if name in OF_SAMPLES], asked=asked)
    return [{**record, "about": about(record)} for record in found]


def about(record: scores.Record) -> str:
    """Returns in a line what a record is of."""
    parameters = f", parameters of step {record['step']}" if "step" in record else ""
    if "data" in record:
        return f"{record['num']} examples of {record['data']}{parameters}"
    return (
        f"{record['num']} samples, {record['samples']}, against {record['real']} real images"
        + parameters
    )


def main() -> None:
    """Runs the command."""
    workdirs = [Path(name) for name in FLAGS.workdir.split(",")]
    if len(set(workdirs)) < len(workdirs):
        raise ValueError(f"--workdir names a run twice: {FLAGS.workdir}")
    of_tables = [build.is_table(runs.load_config(workdir)) for workdir in workdirs]
    if any(of_tables):
        if not all(of_tables):
            raise ValueError("models of tables and of images cannot stand in one table")
        if FLAGS.metrics or FLAGS.bound or FLAGS.classes:
            raise ValueError("--metrics, --bound and --classes are for models of images")
        records = evaluate_table.evaluate(workdirs, FLAGS.samples and Path(FLAGS.samples))
        for workdir, record in zip(workdirs, records, strict=True):
            scores.append(workdir / scores.FILE, record)
        return
    if FLAGS.samples and len(workdirs) > 1:
        raise ValueError("--samples are of one run, and --workdir names several")
    found = {}
    for workdir in workdirs:
        found[str(workdir)] = evaluate(workdir)
        for record in found[str(workdir)]:
            scores.append(workdir / scores.FILE, record)
            print(f"{workdir}, {record['part']}: {record['about']}")
        report.renew(workdir)
    print("", *scores.lines(found), "", sep="\n")
    print(f"+- is a standard error. Added to {scores.FILE} and report.html in {FLAGS.workdir}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
