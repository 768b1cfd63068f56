"""How well a model predicts images that it was not trained on, for `experiments.evaluate`.

The bits are those of pixels of 256 levels, as the data sets hold them, between -1 and 1 as training
has them. Digits use 17 of these levels only: a model need not know that, and pays for it, so their
bits compare models of digits and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from ml_collections import ConfigDict

from experiments import build, drawing, scores
from experiments.config import default
from jaxdiff import data, schedules, validation
from jaxdiff import likelihood as likelihoods
from jaxdiff.base import Array, Denoiser, Node, Prediction, PyTree, Schedule
from jaxdiff.training import sharding

# A variance is large^f small^(1 - f), f = own * (what the network says) + fixed.
LEVELS = 256
FIRST_TIME = 1e-3  # where the flow of a continuous schedule starts: at 0 some have no noise at all
FRACTIONS = {"small": (0.0, 0.0), "large": (0.0, 1.0), "learned": (1.0, 0.0)}


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
) -> Callable[..., tuple[Array, likelihoods.Terms]]:
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
    ) -> tuple[Array, likelihoods.Terms]:
        denoiser = make_denoiser(params, labels)

        def bound(own: Array, fixed: Array) -> tuple[Array, likelihoods.Terms]:
            def varied(x: Array, node: Node) -> Prediction:
                t = jnp.asarray(told)[node.t]
                prediction = denoiser(x, Node(t, node.alpha, node.sigma))
                said = 0.0 if prediction.variance is None else prediction.variance
                return prediction._replace(variance=own * said + fixed * jnp.ones_like(x))

            return likelihoods.variational_bound(
                key, varied, chain, x0, variance="learned", index=index
            )

        # The network's own work does not depend on what is mapped, so it is not repeated.
        own, fixed = jnp.asarray([FRACTIONS[name] for name in variances]).T
        return jax.vmap(bound)(own, fixed)

    return jax.jit(bounds)


def check(config: ConfigDict, source: data.Source) -> None:
    """Checks that models and data have what they are asked for.

    Raises:
      ValueError: the model is self-conditioned, or there are not two examples, without which there
        is no standard error.
    """
    if config.self_condition:
        raise ValueError(
            "validation, bound and likelihood are not for self-conditioned models: what they "
            "predict depends on the whole way down, not on x_t alone"
        )
    if len(source) < 2:
        raise ValueError(f"a standard error needs at least two examples, got {len(source)}")


def plain(config: ConfigDict, *, threshold: bool) -> ConfigDict:
    """Returns the configuration with samples that are not guided, and perhaps not clipped."""
    config = config.copy_and_resolve_references()
    config.sample.guidance = "none"
    config.sample.guidance_options = default().sample.guidance_options
    if not threshold:
        config.sample.threshold = "none"
    return config


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
      ValueError: as `check`; steps or schedule do not fit (`make_chain`).
    """
    check(config, source)
    config = plain(config, threshold=True)
    chain, told = make_chain(build.make_schedule(config), steps)
    variances = [v for v in FRACTIONS if v != "learned" or config.vlb_weight is not None]
    make = drawing.make_denoiser(config, shape)
    bounds = make_bounds(make, chain, told, jax.random.key(seed), variances)

    parts: dict[str, list[np.ndarray]] = {"bits": [], "decoder": [], "steps": [], "prior": []}
    for x0, index, labels in _batches(config, source, batch_size, "bound"):
        bits, terms = bounds(params, x0, index, labels)
        sums = {"bits": bits, **terms._asdict(), "steps": jnp.sum(terms.steps, axis=1)}
        for name in parts:
            parts[name].append(np.float64(sharding.to_host(sums[name])))
    whole = {
        name: _scale(shape, source) * np.concatenate(value, axis=1)[:, : len(source)]
        for name, value in parts.items()
    }
    rows = dict(zip(variances, whole["bits"], strict=True))
    found = {
        f"{part}, {name}": of_examples(value[i])
        for i, name in enumerate(variances)
        for part, value in whole.items()
    }
    found |= {
        f"bits, {a} - {b}": of_examples(rows[a] - rows[b])
        for i, b in enumerate(variances)
        for a in variances[i + 1 :]
    }
    return {"num": len(source), "steps": chain.num_steps, "seed": seed, "scores": found}


def continuous(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    source: data.Source,
    *,
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Returns the bound in bits per dimension in continuous time, and the parts it is made of.

    It is that of the log-SNRs that the run's schedule has.

    Args:
      config: as of `bound`, and so are `params`, `shape`, `source`, `seed` and `batch_size`.
      params: see there.
      shape: see there.
      source: see there.
      seed: see there.
      batch_size: see there.

    Raises:
      ValueError: as `check`.
    """
    check(config, source)
    config = plain(config, threshold=True)
    schedule, key = build.make_schedule(config), jax.random.key(seed)
    make = drawing.make_denoiser(config, shape)

    @jax.jit
    def parts(params: PyTree, x0: Array, index: Array, labels: Array | None) -> tuple[Array, ...]:
        bits, terms = likelihoods.continuous_bound(
            key, make(params, labels), schedule, x0, index=index
        )
        return bits, terms.reconstruction, terms.diffusion, terms.prior

    found = _of_all(parts, params, config, source, batch_size, "continuous")
    whole = _scale(shape, source) * found
    names = ("bits", "reconstruction", "diffusion", "prior")
    return {
        "num": len(source),
        "seed": seed,
        "scores": {name: of_examples(row) for name, row in zip(names, whole, strict=True)},
    }


def likelihood(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    source: data.Source,
    *,
    seed: int = 0,
    batch_size: int = 100,
    trace: str = "hutchinson",
    tolerance: float = 1e-3,
    draws: int = 1,
) -> dict[str, Any]:
    """Returns bits per dimension by the probability flow, and those of a Gaussian and of nothing.

    The flow's density is of numbers, the data are levels: noise spreads each level over its bin
    (`jaxdiff.likelihood.dequantized_bits`), uniform noise for a model that was trained so, or else
    noise as wide as what the model takes for clean data. The result is a bound on the true bits,
    of the model whose samples are those of the flow.

    The Gaussian has mean and covariance of the data trained on, levels with uniform noise; its bits
    are in closed form. No model at all costs 8 bits for 256 levels.

    Args:
      config: as of `bound`, and so are `params`, `shape`, `source`, `seed` and `batch_size`.
      params: see there.
      shape: see there.
      source: see there.
      seed: see there.
      batch_size: see there.
      trace: "hutchinson" or "exact", which takes as many derivatives as there are coordinates.
      tolerance: relative and absolute, of each example's flow.
      draws: how many draws of the noise are averaged under the logarithm; of the exact trace only.

    Raises:
      ImportError: diffrax is not installed.
      ValueError: as `check`; the trace does not go with so many draws.
    """
    check(config, source)
    if draws > 1 and trace != "exact":
        raise ValueError(
            f"--draws={draws} needs --trace=exact: the spread of an estimated trace "
            "would count as probability"
        )
    config = plain(config, threshold=False)
    schedule, key = build.make_schedule(config), jax.random.key(seed)
    make = drawing.make_denoiser(config, shape)
    begin = 0 if schedule.num_steps else FIRST_TIME
    placement, noise, spread = "interval", likelihoods.uniform, "uniform noise"
    if not config.data.dequantize:
        node = schedule.at(begin)
        width = float(node.sigma / node.alpha) * (LEVELS - 1) / 2
        placement, noise = "levels", likelihoods.truncated_normal(width)
        spread = f"truncated normal noise of {width:.3g} levels"

    @jax.jit
    def bits(params: PyTree, x0: Array, index: Array, labels: Array | None) -> Any:
        denoiser = make(params, labels)

        def log_density(x: Array) -> Array:
            return likelihoods.probability_flow(
                key, denoiser, schedule, x, trace=trace, start=begin, index=index,
                rtol=tolerance, atol=tolerance,
            ).log_density  # fmt: skip

        return likelihoods.dequantized_bits(
            key, log_density, x0, noise, num_draws=draws, placement=placement, index=index
        )[0]

    found = _of_all(bits, params, config, source, batch_size, "likelihood")
    whole = _scale(shape, source) * found
    known = build.make_source(config)
    return {
        "num": len(source),
        "seed": seed,
        "trace": trace,
        "tolerance": tolerance,
        "draws": draws,
        "dequantization": spread,
        "scores": {
            "bits, probability flow": of_examples(whole),
            "bits, Gaussian": of_examples(gaussian_bits(known, source)),
            "bits, no model": scores.score(math.log2(LEVELS), 0.0),
        },
    }


def gaussian_bits(known: data.Source, source: data.Source) -> np.ndarray:
    """Returns the bits per dimension of each image by a Gaussian fitted to others, `(N,)`.

    With levels v, mean m and covariance S of the known levels with uniform noise, whose variance
    1/12 is added, the mean of -log N(v + u) over u in [0, 1) is in closed form:

        1/2 ((v - m)' S^-1 (v - m) + tr(S^-1) / 12 + log det(2 pi S)).
    """
    levels, held = (
        data.sources.gather(of, np.arange(len(of)))["image"].reshape(len(of), -1).astype(np.float64)
        for of in (known, source)
    )
    size = levels.shape[1]
    covariance = np.atleast_2d(np.cov(levels.T, bias=True)) + np.eye(size) / 12
    values, vectors = np.linalg.eigh(covariance)
    off = (held - levels.mean(0)) @ vectors
    nats = (off**2 / values).sum(1) + (1 / values).sum() / 12 + np.log(2 * np.pi * values).sum()
    return nats / (2 * size * math.log(2))


def validate(
    config: ConfigDict,
    params: PyTree,
    shape: tuple[int, ...],
    source: data.Source,
    *,
    seed: int = 0,
    batch_size: int = 100,
    points: int = 32,
) -> dict[str, Any]:
    """Returns the losses on a fixed grid of noise levels and noise (`jaxdiff.validation`).

    Args:
      config: as of `bound`, and so are `params`, `shape`, `source`, `seed` and `batch_size`.
      params: see there.
      shape: see there.
      source: see there.
      seed: see there.
      batch_size: see there.
      points: how many noise levels; of a discrete schedule with fewer steps, all of them.

    Raises:
      ValueError: as `check`.
    """
    check(config, source)
    config = plain(config, threshold=False)
    schedule, key = build.make_schedule(config), jax.random.key(seed)
    points = min(points, schedule.num_steps or points)
    grid, make = validation.grid(schedule, points), drawing.make_denoiser(config, shape)

    @jax.jit
    def errors(params: PyTree, x0: Array, index: Array, labels: Array | None) -> Array:
        return validation.errors(key, make(params, labels), x0, grid, index=index)

    found = validation.summarize(
        _of_all(errors, params, config, source, batch_size, "validation"),
        grid,
        build.make_parameterization(config),
        build.make_weighting(config),
    )
    curves = {name: getattr(found, name) for name in ("eps", "x0", "v")}
    return {
        "num": len(source),
        "points": points,
        "seed": seed,
        "scores": {
            "loss, weighted as in training": scores.score(*found.weighted),
            **{
                f"loss of {name}": scores.score(curve.mean.mean())
                for name, curve in curves.items()
                if np.isfinite(curve.mean).all()
            },
        },
        "plots": {
            "Mean squared error of data held out, against the log-SNR": {
                "x": "log-SNR",
                "y": "mean squared error",
                "series": {
                    name: [found.log_snr.tolist(), curve.mean.tolist()]
                    for name, curve in curves.items()
                    if np.isfinite(curve.mean).all()
                },
            }
        },
    }


def of_examples(values: np.ndarray) -> dict[str, float | None]:
    """Returns the mean over the examples and its standard error."""
    return scores.score(values.mean(), values.std(ddof=1) / np.sqrt(len(values)))


def _of_all(
    function: Callable[..., Any],
    params: PyTree,
    config: ConfigDict,
    source: data.Source,
    batch_size: int,
    name: str,
) -> np.ndarray:
    """Returns what a function says of all examples, float64, the last axis."""
    parts = [
        np.float64(sharding.to_host(function(params, *batch)))
        for batch in _batches(config, source, batch_size, name)
    ]
    return np.concatenate(parts, axis=-1)[..., : len(source)]


def _scale(shape: tuple[int, ...], source: data.Source) -> float:
    # Padding costs bits, but what is coded are the images.
    return np.prod(shape) / np.size(source[0]["image"])


def _batches(
    config: ConfigDict, source: data.Source, batch_size: int, name: str
) -> Iterator[tuple[Array, Array, Array | None]]:
    """Yields data, numbers and, if the model is told them, labels, in order.

    The last batch is filled up with the first data.
    """
    pixels = build.in_order(config, source, batch_size)
    mesh = build.make_mesh(config)
    firsts = range(0, len(source), batch_size)
    for first in tqdm.tqdm(firsts, unit="batch", desc=name, disable=None):
        batch = next(pixels)
        labels = batch.get("cond") if config.labels.num_classes else None
        arrays = batch["x0"], np.int32(first + np.arange(batch_size)), labels
        # Divided over all devices where their number divides the batch.
        yield arrays if batch_size % mesh.size else jax.device_put(arrays, sharding.rows(mesh))
