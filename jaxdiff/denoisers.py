"""Denoisers: a network made into one, and exact ones that test everything.

A denoiser is a function `(x, node) -> Prediction`. The exact ones are the expectation of clean data
given noisy data, E[x0 | x], when the data's distribution is known in closed form. For a mixture
x0 ~ sum_k w_k N(m_k, s_k²), noisy data at a node are again a mixture,

    x ~ sum_k w_k N(alpha m_k, c_k),    c_k = alpha² s_k² + sigma²                         (1)

and with r_k(x) the probability of component k given x,

    E[x0 | x] = sum_k r_k (m_k + alpha s_k² / c_k (x - alpha m_k))                         (2)
    score(x)  = sum_k r_k (alpha m_k - x) / c_k                                            (3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxdiff import rng
from jaxdiff.base import Array, Denoiser, Network, Node, Prediction, PyTree, Schedule
from jaxdiff.predictions import Parameterization, check_signal, split_variance


def from_network(
    apply_fn: Network,
    params: PyTree,
    schedule: Schedule,
    parameterization: Parameterization,
    cond: PyTree = None,
    *,
    learned_variance: bool = False,
    self_condition: bool = False,
) -> Denoiser:
    """Makes a denoiser of a network.

    Args:
      apply_fn: `(params, x, noise_level, cond) -> output`, see `jaxdiff.base.Network`; it is told
        the node's t as noise level, `(B,)`.
      params: the network's parameters.
      schedule: the schedule that the network was trained on.
      parameterization: what the network's output means.
      cond: the condition, a pytree of arrays `(B, ...)`, or None.
      learned_variance: whether the output has 2C channels, the latter C for the variance
        (`predictions.split_variance`); the prediction then holds a `variance`.
      self_condition: whether the network also sees its last prediction: its input is
        `concat([x, x0_prev], -1)`, and the denoiser `(x, node, x0_prev=None) -> Prediction`, zeros
        for None. `solvers.self_conditioned` hands the prediction on (Chen et al. 2023, "Analog
        bits").

    Returns:
      The denoiser.

    Raises:
      ValueError: the schedule ends at zero signal-to-noise ratio, where the parameterization says
        nothing about clean data (Lin et al. 2023); in the denoiser, the output has not 2C channels
        for a learned variance.
    """
    check_signal(parameterization, schedule.ends_at_zero_snr)

    def predict(inputs: Array, x: Array, node: Node) -> Prediction:
        noise_level = jnp.broadcast_to(node.t, x.shape[:1])
        output = apply_fn(params, inputs, noise_level, cond).astype(x.dtype)
        fraction = None
        if learned_variance:
            output, fraction = split_variance(output, x.shape[-1])
        return Prediction(parameterization.x0(output, x, node), fraction)

    def plain(x: Array, node: Node) -> Prediction:
        return predict(x, x, node)

    def self_conditioned(x: Array, node: Node, x0_prev: Array | None = None) -> Prediction:
        x0_prev = jnp.zeros_like(x) if x0_prev is None else x0_prev
        return predict(jnp.concatenate([x, x0_prev], axis=-1), x, node)

    return self_conditioned if self_condition else plain


def preconditioned(apply_fn: Network, schedule: Schedule, sigma_data: float = 0.5) -> Network:
    """Scales what a network sees, as EDM does; train it with `predictions.edm(sigma_data)`.

    Its input is c_in x, of unit variance at every node, and its noise level c_noise:

        c_in = 1 / sqrt(alpha² sigma_data² + sigma²),    c_noise = log(sigma / alpha) / 4      (4)

    (Karras et al. 2022, table 1, there for alpha = 1). Between the indices of a discrete schedule
    the log-SNR is interpolated, as `schedule.time` does it.

    Args:
      apply_fn: the network to wrap; not a self-conditioned one, whose input holds clean data, too.
      schedule: the schedule that turns the t that the network is told into alpha and sigma. Nodes
        on another scale need `at_any_scale` around the denoiser.
      sigma_data: the standard deviation of the data, positive.

    Returns:
      The network, told t as any other.

    Raises:
      ValueError: `sigma_data` is not positive.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")

    def network(params: PyTree, x: Array, noise_level: Array, cond: PyTree, **kwargs: Any) -> Array:
        node, log_snr = node_between(schedule, noise_level)
        node = node.over(x)
        c_in = jax.lax.rsqrt((sigma_data * node.alpha) ** 2 + node.sigma**2)
        return apply_fn(params, (c_in * x).astype(x.dtype), -log_snr / 8, cond, **kwargs)

    return network


def node_between(schedule: Schedule, t: Array) -> tuple[Node, Array]:
    """Returns the node at any t `(B,)`, also between indices, and its log-SNR, kept within 100.

    Between the indices of a discrete schedule the log-SNR is interpolated, as `schedule.time` does
    it.
    """
    if schedule.num_steps is None:
        return schedule.at(t), jnp.clip(schedule.log_snr(t), -100, 100)
    indices = jnp.arange(schedule.num_steps)
    table = jnp.clip(schedule.log_snr(indices), -100, 100)
    t = t.astype(jnp.float32)
    log_snr = jnp.interp(t, indices.astype(jnp.float32), table)
    # A discrete schedule preserves the variance.
    alpha, sigma = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    return Node(t, jnp.sqrt(alpha), jnp.sqrt(sigma)), log_snr


def at_any_scale(denoiser: Denoiser) -> Denoiser:
    """Takes a denoiser for nodes with alpha² + sigma² = 1 to nodes of any scale.

    At a node (alpha, sigma) it is asked about x / s at (alpha, sigma) / s, s² = alpha² + sigma²,
    which is the same noise on the same clean data. So a network of a variance-preserving process
    walks the variance-exploding grids of Karras et al. 2022 (alpha = 1).

    Args:
      denoiser: a denoiser; it is told the node's own t.

    Returns:
      The denoiser for any scale. Further arguments are handed on.
    """

    def scaled(x: Array, node: Node, *args: Any) -> Prediction:
        def scale(node: Node) -> Array:
            return jnp.sqrt(node.alpha**2 + node.sigma**2)

        unit = Node(node.t, node.alpha / scale(node), node.sigma / scale(node))
        return denoiser(x / scale(node.over(x)), unit, *args)

    return scaled


def masked(denoiser: Denoiser, mask: ArrayLike) -> Denoiser:
    """Keeps what is no data, such as padding, out of sampling.

    The denoiser is shown zeros off the mask, and what it predicts there is put to zero, so that
    whatever solvers do to x, noise or NaN, stays where it is. (A network must also be told the mask
    where zeros are not nothing to it: `cond={"mask": ...}` of `models.UNet`.)

    Args:
      denoiser: the denoiser.
      mask: 1 where there is data, broadcasts to x: `(B, L, 1)` for sequences `(B, L, C)`.

    Returns:
      The denoiser. Further arguments are handed on.

    Raises:
      ValueError: in the denoiser, the mask does not broadcast to x.

    Example:
      >>> denoiser = point_mass(jnp.ones((3, 1))).denoiser
      >>> node = Node(jnp.int32(0), jnp.float32(0.6), jnp.float32(0.8))
      >>> x, mask = jnp.array([[[0.5], [0.1], [jnp.nan]]]), jnp.array([[[1], [1], [0]]])
      >>> [f(x, node).x0.ravel().tolist() for f in (denoiser, masked(denoiser, mask))]
      [[nan, nan, nan], [1.0, 1.0, 0.0]]
    """

    def hidden(x: Array, node: Node, *args: Any) -> Prediction:
        try:
            counts = jnp.broadcast_to(mask, x.shape) > 0
        except ValueError as error:
            raise ValueError(
                f"mask must broadcast to x {x.shape}, got {jnp.shape(mask)}: "
                "for a mask (B, L) of sequences (B, L, C) pass mask[..., None]"
            ) from error

        def keep(values: Array) -> Array:
            return jnp.where(counts, values, jnp.zeros_like(values))

        prediction = denoiser(keep(x), node, *args)
        variance = None if prediction.variance is None else keep(prediction.variance)
        return prediction._replace(x0=keep(prediction.x0), variance=variance)

    return hidden


class Exact(NamedTuple):
    """A distribution of clean data with all that is known of it in closed form.

    Attributes:
      denoiser: `(x, node) -> Prediction`, eq. (2).
      score: `(x, node) -> (B, *event)`, the gradient of the log-density of noisy data, eq. (3).
      log_density: `(x, node) -> (B,)`, the log-density of noisy data, in nats, eq. (1).
      sample: `(key, num) -> (num, *event)`, clean data; sample i depends on key and i alone.
    """

    denoiser: Denoiser
    score: Callable[[Array, Node], Array]
    log_density: Callable[[Array, Node], Array]
    sample: Callable[[Array, int], Array]


def point_mass(x0: ArrayLike) -> Exact:
    """All data are one point `(*event)`: every correct deterministic sampler is exact here."""
    return gaussian(x0, 0.0)


def gaussian(mean: ArrayLike, std: ArrayLike) -> Exact:
    """Independent Gaussian coordinates.

    Args:
      mean: `(*event)`.
      std: standard deviation, `()` or `(*event)`, not negative.

    Raises:
      ValueError: shapes do not fit or a standard deviation is negative.
    """
    return gaussian_mixture([1.0], np.asarray(mean)[None], np.asarray(std)[None])


def gaussian_mixture(weights: ArrayLike, means: ArrayLike, stds: ArrayLike) -> Exact:
    """A mixture of K Gaussians, each with independent coordinates.

    Args:
      weights: `(K,)`, positive, summing to one.
      means: `(K, *event)`.
      stds: standard deviations, `(K,)` or `(K, *event)`, not negative.

    Raises:
      ValueError: shapes do not fit, weights do not sum to one, or a standard deviation is negative.

    Example:
      >>> from jaxdiff import schedules
      >>> mixture = gaussian_mixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
      >>> node = schedules.linear().at(100)
      >>> mixture.denoiser(jnp.array([[0.8]]), node).x0
      Array([[0.98...]], dtype=float32)
    """
    weights, means, stds = (np.asarray(a, np.float64) for a in (weights, means, stds))
    _check_mixture(weights, means, stds)
    stds = np.broadcast_to(stds.reshape(stds.shape + (1,) * (means.ndim - stds.ndim)), means.shape)
    event_axes = tuple(range(2, means.ndim + 1))
    # With an axis for the batch in front; float32, or float64 where that is enabled.
    w, m, s = (jnp.asarray(a[None], float) for a in (weights, means, stds))

    def components(x: Array, node: Node) -> tuple[Array, Array, Array, Node]:
        if x.shape[1:] != means.shape[1:]:
            raise ValueError(f"x must have shape (B, *{means.shape[1:]}), got {x.shape}")
        x = x[:, None]
        node = node.over(x)
        # A point mass at a clean node has no density; it is given a width below all others.
        variance = jnp.maximum((node.alpha * s) ** 2 + node.sigma**2, 1e-12)
        offset = x - node.alpha * m
        log_p = -0.5 * jnp.sum(
            offset**2 / variance + jnp.log(2 * jnp.pi * variance), axis=event_axes
        )
        return jnp.log(w) + log_p, offset, variance, node

    def mean_over_components(log_p: Array, values: Array) -> Array:
        share = jax.nn.softmax(log_p, axis=1)
        return jnp.sum(share.reshape(share.shape + (1,) * (values.ndim - 2)) * values, axis=1)

    def denoiser(x: Array, node: Node) -> Prediction:
        log_p, offset, variance, node = components(x, node)
        return Prediction(
            mean_over_components(log_p, m + node.alpha * s**2 / variance * offset).astype(x.dtype)
        )

    def score(x: Array, node: Node) -> Array:
        log_p, offset, variance, _ = components(x, node)
        return mean_over_components(log_p, -offset / variance)

    def log_density(x: Array, node: Node) -> Array:
        return jax.nn.logsumexp(components(x, node)[0], axis=1)

    def sample(key: Array, num: int) -> Array:
        keys = rng.per_example(key, jnp.arange(num))
        u = rng.uniform(rng.stream(keys, rng.Stream.DATA, 0))
        k = jnp.minimum(jnp.searchsorted(jnp.cumsum(w[0]), u, side="right"), weights.size - 1)
        z = rng.normal(rng.stream(keys, rng.Stream.DATA, 1), means.shape[1:])
        return m[0, k] + s[0, k] * z

    return Exact(denoiser, score, log_density, sample)


def _check_mixture(weights: np.ndarray, means: np.ndarray, stds: np.ndarray) -> None:
    if weights.ndim != 1 or means.shape[:1] != weights.shape:
        raise ValueError(
            f"weights must be (K,) and means (K, *event), got {weights.shape} and {means.shape}"
        )
    if stds.shape not in (weights.shape, means.shape):
        raise ValueError(f"stds must have shape {weights.shape} or {means.shape}, got {stds.shape}")
    if np.any(weights <= 0) or not np.isclose(weights.sum(), 1):
        raise ValueError(f"weights must be positive and sum to one, got {weights}")
    if np.any(stds < 0):
        raise ValueError(f"stds must not be negative, got {stds}")
