"""Columns of sequences: what each says of itself in closed form, and a network for the rest.

Records of visits hold channels of two sorts: numbers, and signs (-1 or 1), of which binary
variables, one-hot categories and indicators of missing values are made. Of one channel alone the
first thing to know is its mean m and its autocovariance k(lag) over a record's visits. What has
these and is stationary is, of numbers, a Gaussian process; of signs, for the first lag, a two-state
Markov chain:

    x0[:, c] ~ N(m, K),  K[i, j] = k(|i - j|)                                              (1)
    P(x0[i + 1, c] = b | x0[i, c] = a) = r 1[a = b] + (1 - r) p(b),                        (2)
        p(1) = (1 + m) / 2,  p(-1) = (1 - m) / 2,  r = k(1) / k(0)

Both have their denoiser in closed form. With x = alpha x0 + sigma eps, and the visits that are
there, for numbers (Rasmussen & Williams 2006, eqs. 2.22 to 2.24)

    E[x0 | x] = m + alpha K A (x - alpha m),   A = (alpha² K + sigma² 1)^-1                (3)
    s² = sigma² diag(K A)                                                                  (4)

and for signs the log-odds of 1,

    l[i] = 2 alpha x[i] / sigma² + f[i] + b[i],   E[x0 | x] = tanh(l / 2)                  (5)

with the messages f from the visits before and b from those after (the forward-backward algorithm,
Rabiner 1989, section III.A, in log-odds). `corrected` leaves to a network what the columns tell of
each other: with its output F,

    numbers: x0 = E[x0 | x] + s F,    signs: x0 = tanh(l / 2 + F)                          (6)

(for L = 1 the first is the skip connection of EDM, Karras et al. 2022, table 1). F = 0 are
independent columns, each with its own distribution and persistence; what is known of small data is
not to be learned from noise, and the denoiser of a sign, at low noise a sharp step, comes for free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxdiff.base import Array, Network, Node, PyTree, Schedule
from jaxdiff.denoisers import node_between
from jaxdiff.predictions import Parameterization

_FLOOR = 1e-4  # the least variance, of data in [-1, 1], and the least eigenvalue of K
_CLEAN = 1e-6  # the least sigma: what is clean says all of itself
_CHANGES = 1e-6  # how probable it is that what never changes does


class Columns(NamedTuple):
    """The distributions of the C channels of sequences, each alone; NumPy arrays.

    Attributes:
      signs: `(C,)` bool, which are -1 or 1; the others are numbers.
      mean: `(C,)`, m; of signs within -1 and 1, not at them.
      autocovariance: `(C, L)`, k(0) .. k(L - 1), k(0) positive.
    """

    signs: np.ndarray
    mean: np.ndarray
    autocovariance: np.ndarray


class Alone(NamedTuple):
    """What noisy channels say of their own clean values, `(B, L, C)` each.

    Attributes:
      x0: the expectation of clean data, eqs. (3) and (5); 0 where no visit is.
      spread: s of eq. (4); of signs 0.
      log_odds: l of eq. (5); of numbers 0.
    """

    x0: Array
    spread: Array
    log_odds: Array


def fit(x0: ArrayLike, observed: ArrayLike, signs: ArrayLike, static: ArrayLike) -> Columns:
    """Estimates the distributions of columns from what was observed of records.

    Means are over all that was observed, autocovariances over all pairs of visits so far apart, as
    if there were ten pairs more that have that of the lag before. Of what never changes a record
    counts once, and all lags have the variance. Half a count is added to those of each sign.

    Args:
      x0: `(N, L, C)`, clean data; anything where it was not observed.
      observed: `(N, L, C)` bool, what was observed: not padding, nor what stands in the place of
        missing values.
      signs: `(C,)` bool, which channels are -1 or 1.
      static: `(C,)` bool, which channels are the same at all visits of a record.

    Returns:
      The columns.

    Raises:
      ValueError: the shapes do not fit, of a channel nothing was observed, or one of signs holds
        something else.

    Example:
      >>> x0 = np.array([-1.0, -1.0, 1.0, 1.0, 1.0, 0.0]).reshape(2, 3, 1)
      >>> fit(x0, x0 != 0, np.array([True]), np.array([False])).mean.round(3)
      array([0.167])
    """
    x0, observed, signs, static = np.asarray(x0, float), *map(np.asarray, (observed, signs, static))
    if x0.ndim != 3 or observed.shape != x0.shape or observed.dtype != bool:
        raise ValueError(
            f"x0 and observed (bool) must both be (N, L, C), got {x0.shape} and "
            f"{observed.dtype} {observed.shape}"
        )
    for name, flags in (("signs", signs), ("static", static)):
        if flags.shape != x0.shape[2:] or flags.dtype != bool:
            raise ValueError(
                f"{name} must be ({x0.shape[2]},) bool, got {flags.dtype} {flags.shape}"
            )
    if not (seen := observed.any(axis=(0, 1))).all():
        raise ValueError(f"nothing was observed of channels {np.flatnonzero(~seen)}")
    x0 = np.where(observed, x0, 0)
    odd = signs & np.any((np.abs(x0) != 1) & observed, axis=(0, 1))
    if odd.any():
        raise ValueError(
            f"channels of signs must hold -1 and 1, and channels {np.flatnonzero(odd)} do not"
        )
    length, size = x0.shape[1:]
    mean, autocovariance = np.zeros(size), np.zeros((size, length))
    for c in range(size):
        values, there = x0[..., c], observed[..., c]
        if static[c]:
            each = there.any(axis=1)
            values, there = np.sum(values, axis=1)[each] / np.sum(there, axis=1)[each], each[each]
        mean[c] = np.sum(values) / (np.sum(there) + signs[c])
        centred = np.where(there, values - mean[c], 0)
        variance = 1 - mean[c] ** 2 if signs[c] else np.sum(centred**2) / np.sum(there)
        variance = max(variance, _FLOOR)
        autocovariance[c] = variance if static[c] else _lags(centred, there, variance)
    return Columns(signs, mean, autocovariance)


def _lags(values: np.ndarray, there: np.ndarray, variance: float) -> np.ndarray:
    """Returns k(0) .. k(L - 1) of values around 0, `(N, L)`, 0 where they are not there."""
    length, found = values.shape[1], [variance]
    for lag in range(1, length):
        pairs = np.sum(there[:, lag:] & there[:, : length - lag])
        total = np.sum(values[:, lag:] * values[:, : length - lag])
        found.append((total + 10 * found[-1]) / (pairs + 10))
    return np.array(found)


def covariance(columns: Columns) -> np.ndarray:
    """Returns K of eq. (1), `(C, L, L)`, made positive definite.

    Autocovariances estimated one by one need not be those of a process: eigenvalues of K below 1e-4
    are raised to that.
    """
    length = columns.autocovariance.shape[1]
    lags = np.abs(np.arange(length)[:, None] - np.arange(length)[None])
    values, vectors = np.linalg.eigh(columns.autocovariance[:, lags])
    raised = np.maximum(values, _FLOOR)
    return (vectors * raised[:, None, :]) @ np.swapaxes(vectors, 1, 2)


def alone(columns: Columns, x: Array, node: Node, mask: Array) -> Alone:
    """Returns what noisy channels say of their own clean values, eqs. (3) to (5).

    Args:
      columns: the distributions, of L visits or more.
      x: noisy data `(B, L, C)`; off the mask it may be anything.
      node: the point of the process, scalar or `(B,)` fields.
      mask: `(B, L)`, bool or int, 1 where visits are, from the front on.

    Raises:
      ValueError: shapes do not fit.
    """
    size, longest = columns.autocovariance.shape
    if x.ndim != 3 or x.shape[2] != size or x.shape[1] > longest or mask.shape != x.shape[:2]:
        raise ValueError(
            f"x must be (B, L, {size}), L at most {longest}, and mask (B, L), got {x.shape} and "
            f"{mask.shape}"
        )
    numbers, signs = np.flatnonzero(~columns.signs), np.flatnonzero(columns.signs)
    there = mask.astype(bool)
    x = jnp.where(there[..., None], x, 0)
    node = node.over(x)
    sigma = jnp.maximum(node.sigma, _CLEAN)
    mean, spread = _gaussian(columns, numbers, x[..., numbers], node.alpha, sigma, there)
    log_odds = _markov(columns, signs, x[..., signs], node.alpha, sigma, there)

    def put(where: np.ndarray, values: Array) -> Array:
        values = jnp.where(there[..., None], values, 0).astype(x.dtype)
        return jnp.zeros_like(x).at[..., where].set(values)

    x0 = put(numbers, mean) + put(signs, jnp.tanh(log_odds / 2))
    return Alone(x0, put(numbers, spread), put(signs, log_odds))


def _gaussian(
    columns: Columns, which: np.ndarray, x: Array, alpha: Array, sigma: Array, there: Array
) -> tuple[Array, Array]:
    """Returns eqs. (3) and (4), `(B, L, numbers)`."""
    length = x.shape[1]
    own = jnp.asarray(covariance(columns)[which, :length, :length], x.dtype)
    mean = jnp.asarray(columns.mean[which], x.dtype)[None, None]
    pairs = there[:, None, :, None] & there[:, None, None, :]
    own = jnp.where(pairs, own[None], 0)  # (B, numbers, L, L)
    alpha, sigma = (jnp.broadcast_to(f, (x.shape[0], 1, 1))[:, None] for f in (alpha, sigma))
    noisy = alpha**2 * own + sigma**2 * jnp.eye(length, dtype=x.dtype)[None, None]
    factor = jax.scipy.linalg.cho_factor(noisy)
    gain = jax.scipy.linalg.cho_solve(factor, own)  # A K, the transpose of K A
    offset = jnp.where(there[..., None], x - alpha[:, 0] * mean, 0)
    shift = jnp.einsum("bcij,bic->bjc", gain, offset, precision="highest")
    variance = sigma[..., 0] ** 2 * jnp.diagonal(gain, axis1=-2, axis2=-1)
    spread = jnp.sqrt(jnp.maximum(variance, _CLEAN**2))
    return mean + alpha[:, 0] * shift, jnp.swapaxes(spread, 1, 2)


def _markov(
    columns: Columns, which: np.ndarray, x: Array, alpha: Array, sigma: Array, there: Array
) -> Array:
    """Returns l of eq. (5), `(B, L, signs)`."""
    start, log = (jnp.asarray(a, x.dtype) for a in _log_probabilities(columns, which))
    evidence = jnp.where(there[..., None], 2 * alpha * x / sigma**2, 0)
    by_visit = jnp.swapaxes(evidence, 0, 1)

    def passed(odds: Array, log: Array) -> Array:
        """Takes the log-odds of a visit's state over to the next."""
        up = jnp.logaddexp(log[1, 1] + odds, log[0, 1])
        return up - jnp.logaddexp(log[1, 0] + odds, log[0, 0])

    def forward(message: Array, evidence: Array) -> tuple[Array, Array]:
        return passed(message + evidence, log), message

    def backward(message: Array, evidence: Array) -> tuple[Array, Array]:
        # The likelihood of what follows, given the state before.
        return passed(message + evidence, jnp.swapaxes(log, 0, 1)), message

    nothing = jnp.zeros_like(by_visit[0])
    _, before = jax.lax.scan(forward, nothing + start, by_visit)
    # Behind a record's end there is no evidence: what comes from there is 0.
    _, after = jax.lax.scan(backward, nothing, by_visit, reverse=True)
    return jnp.swapaxes(by_visit + before + after, 0, 1)


def _log_probabilities(columns: Columns, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns of signs the log-odds of 1, `(1, C)`, and the log of eq. (2), `(2, 2, 1, C)`."""
    share = np.stack([(1 - columns.mean[which]) / 2, (1 + columns.mean[which]) / 2])
    lags = columns.autocovariance[which]
    stays = lags[:, 1] / lags[:, 0] if lags.shape[1] > 1 else np.zeros(len(which))
    # Signs that alternate more than their shares allow are taken to alternate as much as can be.
    stays = np.clip(stays, -np.min(share / (1 - share), axis=0) + _CHANGES, 1 - _CHANGES)
    same = np.eye(2)[:, :, None]
    log = np.log(stays * same + (1 - stays) * share[None])
    return np.log(share[1] / share[0])[None], log[:, :, None]


def corrected(
    apply_fn: Network, columns: Columns, schedule: Schedule, parameterization: Parameterization
) -> Network:
    """Makes a network of one that says what the columns tell of each other, eq. (6).

    In the place of x the network is shown what the columns say of themselves, (E[x0 | x] - m) /
    sqrt(k(0)).

    Args:
      apply_fn: the network to wrap, of C outputs F. Those of more outputs keep the rest as they
        are, such as a learned variance; more inputs, such as those of self-conditioning, come
        behind the C.
      columns: the distributions, as `fit` gives them.
      schedule: the schedule that turns the t that the network is told into alpha and sigma.
      parameterization: what the output means: that of eq. (6) is converted to it, so losses and
        `denoisers.from_network` take the network as any other.

    Returns:
      The network; it wants `cond["mask"]` `(B, L)`.

    Raises:
      ValueError: in the network, the condition has no mask, or shapes do not fit.
    """
    size = columns.signs.size
    scale = np.sqrt(columns.autocovariance[:, 0])
    signs, mean, scale = (a[None, None] for a in (columns.signs, columns.mean, scale))

    def network(params: PyTree, x: Array, noise_level: Array, cond: PyTree, **kwargs: Any) -> Array:
        if not isinstance(cond, dict) or "mask" not in cond:
            raise ValueError('columns want cond["mask"], (B, L): ones where all are visits')
        node, _ = node_between(schedule, noise_level)
        own, others = x[..., :size], x[..., size:]
        said = alone(columns, own, node, cond["mask"])
        there = cond["mask"].astype(bool)[..., None]
        shown = (said.x0 - mean.astype(x.dtype)) / scale.astype(x.dtype)
        shown = jnp.concatenate([jnp.where(there, shown, 0), others], axis=-1)
        output = apply_fn(params, shown, noise_level, cond, **kwargs)
        if output.shape[-1] < size:
            raise ValueError(f"the network must have {size} outputs, got {output.shape[-1]}")
        told = output[..., :size]
        x0 = jnp.where(signs, jnp.tanh(said.log_odds / 2 + told), said.x0 + said.spread * told)
        at = node.over(x)
        eps = (own - at.alpha * x0) / jnp.maximum(at.sigma, _CLEAN)
        converted = jnp.where(there, parameterization.target(x0, eps, node), 0)
        return jnp.concatenate([converted.astype(output.dtype), output[..., size:]], axis=-1)

    return network
