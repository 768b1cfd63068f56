"""Scores a trained model: bits per dimension of held-out data, and classes of drawn samples.

    python -m experiments.evaluate --workdir=runs/digits_learned_variance --bound
    python -m experiments.evaluate --workdir=runs/digits_conditional --classes
    python -m experiments.evaluate --workdir=runs/clinical_0,runs/clinical_1

`--bound`: the variational bound (`jaxdiff.likelihood`) on data that the run was not trained on, for
the chain of `solvers.ddpm` with each of its variances. All share the network's predictions and the
noise, so that their differences are known better than the bounds themselves; standard errors are
over the examples.

The bits are those of pixels of 256 levels, as the data sets hold them, between -1 and 1 as training
has them. Digits use 17 of these levels only: a model need not know that, and pays for it, so their
bits compare models of digits and nothing else.

`--classes`: whether samples of a conditional model are of the class asked for, in the eyes of a
classifier by the 3 nearest real images; and how close they are to real images
(`jaxdiff.evaluation`).

Of a model of a table: realism, privacy and utility of its synthetic patients, against patients held
out (`experiments.evaluate_table`); of several runs also the mean.

Everything is printed, and added to the list in WORKDIR/evaluation.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict

from experiments import build, drawing, evaluate_table, report, runs, runtime, sample
from experiments.config import default
from jaxdiff import data, evaluation, likelihood, schedules
from jaxdiff.base import Array, Denoiser, Node, Prediction, PyTree, Schedule
from jaxdiff.training import sharding

FLAGS = flags.FLAGS

# A variance is large^f small^(1 - f), f = own * (what the network says) + fixed.
FRACTIONS = {"small": (0.0, 0.0), "large": (0.0, 1.0), "learned": (1.0, 0.0)}
CLASSIFIER_NEIGHBOURS = 3
FOLDS = 5


def define_flags() -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    flags.DEFINE_string("workdir", "runs/digits", "The run directory; of tables several: A,B.")
    flags.DEFINE_integer("step", None, "The checkpoint to use; the newest if not given.")
    flags.DEFINE_bool("ema", True, "Use the average of the parameters.")
    flags.DEFINE_bool("bound", False, "Bits per dimension of data, by the variational bound.")
    flags.DEFINE_string(
        "split", None, "The data of --bound; what NAME[:N] leaves if the run was trained on that."
    )
    flags.DEFINE_string("path", None, "The data of --bound for a run on a folder: another folder.")
    flags.DEFINE_bool("allow_overlap", False, "Let --bound score data that were trained on.")
    flags.DEFINE_integer(
        "bound_steps", None, "Steps of the chain; all of the run's if not given.", lower_bound=2
    )
    flags.DEFINE_integer("batch_size", 100, "Examples at a time, over all devices.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "The seed of the noise.", lower_bound=0)
    flags.DEFINE_bool("classes", False, "The classes of samples that were asked for by class.")
    flags.DEFINE_string("samples", None, "The samples; WORKDIR/samples.npz or synthetic.csv.")


def held_out(
    config: ConfigDict,
    split: str | None = None,
    path: str | None = None,
    *,
    allow_overlap: bool = False,
) -> tuple[str, data.Source]:
    """Returns the data to score: their name, and the data.

    Args:
      config: the run's configuration, whose data are those trained on.
      split: of the same data set; if not given, what is left of a `data.split` like "train[:1400]".
      path: of a folder, if the run was trained on one.
      allow_overlap: whether images may be among those trained on.

    Raises:
      ValueError: there is nothing left, or an image was trained on.
    """
    other = config.copy_and_resolve_references()
    if config.data.name == "folder":
        if path is None or split is not None:
            raise ValueError("the run was trained on a folder: name another by --path=DIR")
        other.data.path = name = path
    else:
        if path is not None:
            raise ValueError("--path is for runs on a folder: name a split by --split")
        other.data.split = name = split or _rest(config.data.split)
    trained, source = build.make_source(config), build.make_source(other)
    if not allow_overlap:
        known = {np.asarray(trained[i]["image"]).tobytes() for i in range(len(trained))}
        found = sum(np.asarray(source[i]["image"]).tobytes() in known for i in range(len(source)))
        if found:
            raise ValueError(
                f"{found} of the {len(source)} images of {name} are among those trained on: score "
                "others, or say --allow_overlap"
            )
    return name, source


def _rest(split: str) -> str:
    match = re.fullmatch(r"(\w+)\[:(\d+%?)\]", split)
    if match is None:
        raise ValueError(
            f"the run was trained on {split}, of which it is not plain what it leaves: name other "
            "data by --split"
        )
    return f"{match[1]}[{match[2]}:]"


def make_chain(schedule: Schedule, steps: int | None) -> tuple[schedules.NoiseSchedule, np.ndarray]:
    """Returns the schedule of the chain, and what the network is told at its indices, `(T,)`.

    Of a discrete schedule with more steps, every index but some is left out: the first and the last
    stay, the others are spread evenly (Nichol & Dhariwal 2021, section 4).

    Raises:
      ValueError: `steps` are more than there are, or missing for a continuous schedule, or that
        preserves no variance.
    """
    if schedule.num_steps is None:
        if steps is None:
            raise ValueError("the run's schedule is continuous: say --bound_steps=N")
        return schedules.discretized(schedule, steps), np.float32(np.arange(1, steps + 1) / steps)
    total = schedule.num_steps
    steps = total if steps is None else steps
    if steps > total:
        raise ValueError(f"bound_steps must be at most {total}, the run's own, got {steps}")
    kept = np.rint(np.linspace(0, total - 1, steps)).astype(np.int32)
    if steps == total:
        return schedule, kept
    node = schedule.at(kept)
    signal, noise = (np.asarray(a, np.float64) ** 2 for a in (node.alpha, node.sigma))
    return schedules.from_alphas_bar(signal / (signal + noise)), kept


def make_bounds(
    make_denoiser: Callable[..., Denoiser],
    chain: schedules.NoiseSchedule,
    told: np.ndarray,
    key: Array,
    variances: list[str],
) -> Callable[..., tuple[Array, likelihood.Terms]]:
    """Returns `(params, x0, index, labels) -> (bits, terms)`, compiled.

    All have an axis for the variances in front. The network is evaluated once for all of them.

    Args:
      make_denoiser: `(params, labels) -> denoiser`.
      chain: the schedule of the chain.
      told: what the network is told at its indices, `(T,)`.
      key: one typed key.
      variances: names of `FRACTIONS`.
    """

    def bounds(
        params: PyTree, x0: Array, index: Array, labels: Array | None
    ) -> tuple[Array, likelihood.Terms]:
        denoiser = make_denoiser(params, labels)

        def bound(own: Array, fixed: Array) -> tuple[Array, likelihood.Terms]:
            def varied(x: Array, node: Node) -> Prediction:
                t = jnp.asarray(told)[node.t]
                prediction = denoiser(x, Node(t, node.alpha, node.sigma))
                said = 0.0 if prediction.variance is None else prediction.variance
                return prediction._replace(variance=own * said + fixed * jnp.ones_like(x))

            return likelihood.variational_bound(
                key, varied, chain, x0, variance="learned", index=index
            )

        # The network's own work does not depend on what is mapped, so it is not repeated.
        own, fixed = jnp.asarray([FRACTIONS[name] for name in variances]).T
        return jax.vmap(bound)(own, fixed)

    return jax.jit(bounds)


def bound(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    source: data.Source,
    *,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Returns the bounds in bits per dimension, the parts they are made of, and differences.

    A conditional model is told the labels, and not guided.

    Args:
      config: the run's configuration.
      params: the network's parameters.
      shape: an example's shape, as the network sees it.
      source: the data.
      steps: the number of steps, all of the run's if not given.
      seed: of the noise.
      batch_size: how many examples at a time; what is drawn for one does not depend on it.

    Raises:
      ValueError: the model is self-conditioned; there are not two examples, without which there is
        no standard error; steps or schedule do not fit (`make_chain`).
    """
    if config.self_condition:
        raise ValueError(
            "--bound is not for self-conditioned models: what they predict depends on the whole "
            "way down, not on x_t alone"
        )
    if len(source) < 2:
        raise ValueError(f"--bound needs at least two examples, got {len(source)}")
    chain, told = make_chain(build.make_schedule(config), steps)
    config = config.copy_and_resolve_references()
    config.sample.guidance = "none"
    config.sample.guidance_options = default().sample.guidance_options
    variances = [v for v in FRACTIONS if v != "learned" or config.vlb_weight is not None]
    make = drawing.make_denoiser(config, shape)
    bounds = make_bounds(make, chain, told, jax.random.key(seed), variances)

    parts: dict[str, list[np.ndarray]] = {"bits": [], "prior": [], "steps": [], "decoder": []}
    for x0, index, labels in _batches(config, source, batch_size):
        bits, terms = bounds(params, x0, index, labels if config.labels.num_classes else None)
        sums = {"bits": bits, **terms._asdict(), "steps": jnp.sum(terms.steps, axis=1)}
        for name, value in sums.items():
            parts[name].append(np.float64(sharding.to_host(value)))
    # Padding costs bits, but what is coded are the images.
    scale = np.prod(shape) / np.size(source[0]["image"])
    whole = {
        name: scale * np.concatenate(value, axis=1)[:, : len(source)]
        for name, value in parts.items()
    }
    rows = dict(zip(variances, whole["bits"], strict=True))
    return {
        "num": len(source),
        "steps": chain.num_steps,
        "seed": seed,
        "variances": {
            name: {part: mean_and_error(value[i]) for part, value in whole.items()}
            for i, name in enumerate(variances)
        },
        "differences": {
            f"{a} - {b}": mean_and_error(rows[a] - rows[b])
            for i, b in enumerate(variances)
            for a in variances[i + 1 :]
        },
    }


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """Returns the mean over the examples and its standard error."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": float(values.mean()), "error": float(error)}


def _batches(
    config: ConfigDict, source: data.Source, batch_size: int
) -> Iterator[tuple[Array, Array, Array | None]]:
    """Yields data, numbers and labels in order; the last batch is filled up with the first data."""
    pixels = data.make_pipeline(
        source, batch_size=batch_size, seed=0, shuffle=False, pad_to=config.data.pad_to
    )
    mesh = build.make_mesh(config)
    firsts = range(0, len(source), batch_size)
    for first in tqdm.tqdm(firsts, unit="batch", desc="bound", disable=None):
        batch = next(pixels)
        arrays = batch["x0"], np.int32(first + np.arange(batch_size)), batch.get("cond")
        # Divided over all devices where their number divides the batch.
        yield arrays if batch_size % mesh.size else jax.device_put(arrays, sharding.rows(mesh))


def load_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, uint8, and the labels of a file of samples, or of its shares.

    Raises:
      RunError: there is no such file, it is damaged, or the samples were not asked for by class.
    """
    found = report.load_samples(path)
    if "labels" not in found:
        raise runs.RunError(f"{path} holds no labels: its samples were not asked for by class")
    return found["images"], found["labels"]


def classes(
    images: np.ndarray, labels: np.ndarray, source: data.Source, neighbours: int = 5
) -> dict[str, Any]:
    """Returns how many samples are of the class asked for, and how close they are to real images.

    Args:
      images: samples, uint8 `(N, *spatial, C)`.
      labels: the classes asked for, `(N,)`.
      source: the real images, all with labels.
      neighbours: k of `evaluation.manifold_scores`.

    Raises:
      ValueError: samples and real images differ in shape, or are too few, or there are no labels.
    """
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    real = data.sources.gather(source, np.arange(len(source)))
    if "label" not in real:
        raise ValueError("the data that the run was trained on have no labels")
    if real["image"].shape[1:] != images.shape[1:]:
        raise ValueError(
            f"samples have the shape {images.shape[1:]}, real images {real['image'].shape[1:]}: "
            "the classes of runs with data.pad_to cannot be scored"
        )
    pixels, known = (a.reshape(len(a), -1) / 255 for a in (images, real["image"]))
    classifier = KNeighborsClassifier(CLASSIFIER_NEIGHBOURS)
    agree = classifier.fit(known, real["label"]).predict(pixels) == labels
    return {
        "num": len(images),
        "real": len(known),
        "agreement": float(agree.mean()),
        "agreement_by_class": {
            str(label): float(agree[labels == label].mean()) for label in np.unique(labels)
        },
        "classifier_accuracy": float(
            cross_val_score(classifier, known, real["label"], cv=FOLDS).mean()
        ),
        "neighbours": neighbours,
        **evaluation.manifold_scores(known, pixels, k=neighbours)._asdict(),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a record to the list that a JSON file holds, or makes the file.

    Raises:
      RunError: the file holds no list.
    """
    try:
        records = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        records = None
    if not isinstance(records, list):
        raise runs.RunError(f"{path} holds no list of records: move it away")
    runs.write_json(path, [*records, record])


def tell_bound(record: dict[str, Any]) -> None:
    """Prints a record of --bound."""

    def row(name: str, *parts: dict[str, float]) -> None:
        values = (f"{part['mean']:8.4f} +- {part['error']:.4f}" for part in parts)
        print(f"{name:18}" + "  ".join(values))

    print(
        f"bound on the bits per dimension of {record['num']} examples of {record['data']}, "
        f"{record['steps']} steps, parameters of step {record['step']}:"
    )
    header = ("bits", "decoder", "steps", "prior")
    print(f"{'variance':18}" + "".join(f"{name:>8}{'':12}" for name in header).rstrip())
    for name, parts in record["variances"].items():
        row(name, *(parts[part] for part in header))
    for name, difference in record["differences"].items():
        row(name, difference)


def tell_classes(record: dict[str, Any]) -> None:
    """Prints a record of --classes."""
    print(
        f"{record['num']} samples of {record['samples']} against {record['real']} real images:\n"
        f"of the class asked for: {record['agreement']:.3f} (the classifier is right about "
        f"{record['classifier_accuracy']:.3f} of held-out real images)"
    )
    print("by class: " + ", ".join(f"{k} {v:.3f}" for k, v in record["agreement_by_class"].items()))
    for name in evaluation.Manifold._fields:
        print(f"{name}: {record[name]:.3f}")


def main() -> None:
    """Runs the command."""
    workdirs = [Path(name) for name in FLAGS.workdir.split(",")]
    workdir = workdirs[0]
    if build.is_table(runs.load_config(workdir)):
        if FLAGS.bound or FLAGS.classes:
            raise ValueError("--bound and --classes are for models of images")
        records = evaluate_table.evaluate(workdirs, FLAGS.samples and Path(FLAGS.samples))
        for workdir, record in zip(workdirs, records, strict=True):
            append(workdir / "evaluation.json", record)
        return
    if len(workdirs) > 1:
        raise ValueError("several --workdir are for models of tables")
    if not (FLAGS.bound or FLAGS.classes):
        raise ValueError("say what to score: --bound, --classes or both")
    config = runs.load_config(workdir)
    if FLAGS.bound:
        name, source = held_out(config, FLAGS.split, FLAGS.path, allow_overlap=FLAGS.allow_overlap)
        config, params, shape, step = sample.load(workdir, FLAGS.step, ema=FLAGS.ema)
        scores = bound(
            config, params, shape, source,
            steps=FLAGS.bound_steps, seed=FLAGS.seed, batch_size=FLAGS.batch_size,
        )  # fmt: skip
        about = {"part": "bound", "data": name, "step": step, "ema": FLAGS.ema}
        tell_bound(about | scores)
        append(workdir / "evaluation.json", about | scores)
    if FLAGS.classes:
        path = Path(FLAGS.samples or workdir / "samples.npz")
        scores = classes(
            *load_samples(path), build.make_source(config), config.evaluate.neighbours or 5
        )
        about = {"part": "classes", "samples": str(path)}
        tell_classes(about | scores)
        append(workdir / "evaluation.json", about | scores)
    print(f"added to {workdir / 'evaluation.json'}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
