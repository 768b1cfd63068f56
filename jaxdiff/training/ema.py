"""Averages of parameters over training.

Beside the exponential average with its warm-up there is the power-function average of Karras et
al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models", section 3): after t
updates the parameters at tau <= t weigh

    p(tau) = (gamma + 1) tau^gamma / t^(gamma+1)                                           (1)

so that the average's width is always the same share of the training so far, the standard deviation
of eq. (1) divided by t:

    sigma_rel = (gamma+1)^(1/2) (gamma+2)^(-1) (gamma+3)^(-1/2)                            (2)

Snapshots of two such averages, stored now and then, give that of any other width and any earlier
time afterwards (section 3.2): their profiles p_i are combined to be near the profile wanted, p_r,

    minimise  |p_r - sum_i x_i p_i|²   by   sum_j <p_i, p_j> x_j = <p_i, p_r>              (3)
    <p_a, p_b> = (gamma_a+1) (gamma_b+1) / (gamma_a+gamma_b+1) (t_a/t_b)^gamma_b / t_b     (4)

for t_a <= t_b, and the averages themselves with the same weights x_i (appendix C.3 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.base import Array, PyTree

Decay = float | Callable[[Array], Array]
"""The decay: a constant in [0, 1), or a function of the number of updates before this one."""


def warmup(decay: float = 0.9999) -> Callable[[Array], Array]:
    """A decay that starts low: min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...

    So the average is of some use long before 1 / (1 - decay) updates, and forgets the initial
    parameters (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
      decay: the final decay, in [0, 1).

    Raises:
      ValueError: `decay` lies outside [0, 1).

    Example:
      >>> [round(float(warmup(0.999)(n)), 3) for n in (0, 10, 10_000)]
      [0.1, 0.55, 0.999]
    """
    check_decay(decay)
    return lambda count: jnp.minimum(decay, (1 + count) / (10 + count)).astype(jnp.float32)


def half_life(updates: float, ramp_up: float = 0.05) -> Callable[[Array], Array]:
    """A decay by which what an update contributes halves every so many updates.

    Early on the half-life is shorter, a share of the updates so far: at update n = 0, 1, ... it is
    min(updates, ramp_up n), so that the initial parameters are forgotten (EDM, Karras et al. 2022,
    appendix F.2, and their code).

    Args:
      updates: the half-life, in updates, positive.
      ramp_up: the largest half-life, as a share of the updates so far, positive.

    Raises:
      ValueError: an argument is not positive and finite.

    Example:
      >>> [round(float(half_life(1000)(n)), 5) for n in (0, 100, 1_000_000)]
      [0.0, 0.87055, 0.99931]
    """
    for name, value in (("updates", updates), ("ramp_up", ramp_up)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")

    def decay(count: Array) -> Array:
        # At least so much that nothing is divided by 0: 2^-1000 is 0 in float32.
        updates_now = jnp.clip(ramp_up * jnp.asarray(count, jnp.float32), 1e-3, updates)
        return jnp.exp2(-1 / updates_now)

    return decay


def power(sigma_rel: float) -> Callable[[Array], Array]:
    """A decay whose average follows the power-function profile, eq. (1).

    It is (1 - 1/n)^(gamma+1) at the n-th update, n = 1, 2, ... (Karras et al. 2024, section 3.1).
    The average is then that of eq. (1) exactly, for parameters that stay what they are from one
    update to the next.

    Args:
      sigma_rel: the width, eq. (2), as a share of the training so far; above 0 and below
        1 / sqrt(12) = 0.2887, where all updates weigh the same. 0.05 and 0.1 are the paper's.

    Raises:
      ValueError: `sigma_rel` lies outside this range.

    Example:
      >>> [round(float(power(0.1)(n)), 4) for n in (0, 1, 1000)]
      [0.0, 0.0041, 0.9921]
    """
    exponent = _gamma(sigma_rel) + 1

    def decay(count: Array) -> Array:
        # Not (n / (n + 1))^exponent, whose base is rounded before the power magnifies it.
        return jnp.exp(exponent * jnp.log1p(-1 / (1 + jnp.asarray(count, jnp.float32))))

    return decay


def update(average: PyTree, params: PyTree, decay: Array | float) -> PyTree:
    """Returns decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


def posthoc_weights(
    snapshots: Sequence[tuple[float, float]], sigma_rel: float, count: float
) -> np.ndarray:
    """Returns the weights of snapshots that make the average of another width, eq. (3).

    Args:
      snapshots: `(sigma_rel, count)` of each of the N stored averages of `power(sigma_rel)`: its
        width and the number of updates done when it was stored.
      sigma_rel: the width wanted.
      count: after how many updates.

    Returns:
      float64 `(N,)`, some of them negative, for `combine`; their sum is nearly 1. How near the
      profile comes to the one wanted says `posthoc_residual`.

    Raises:
      ValueError: there is no snapshot; a width lies outside the range of `power`, or a count is
        not positive.

    Example:
      >>> posthoc_weights([(0.05, 500), (0.05, 1000), (0.1, 1000)], 0.1, 1000).round(6) + 0.0
      array([0., 0., 1.])
    """
    if not len(snapshots):
        raise ValueError("an average is made of at least one snapshot, got none")
    stored = _profiles(snapshots)
    wanted = _profiles([(sigma_rel, count)])
    among = _inner(stored, stored)
    scale = 1 / np.sqrt(np.diag(among))
    among, onto = scale[:, None] * among * scale, scale * _inner(stored, wanted)[:, 0]
    # By least squares, so that a snapshot given twice does no harm.
    return scale * np.linalg.lstsq(among, onto, rcond=1e-13)[0]


def posthoc_residual(
    snapshots: Sequence[tuple[float, float]], weights: np.ndarray, sigma_rel: float, count: float
) -> float:
    """Returns how far combined profiles are from the one wanted, as a share of its norm.

    That is |p_r - sum_i x_i p_i| / |p_r|, in the terms of eq. (3); less than about 1e-7 is lost in
    rounding.

    Args:
      snapshots: as of `posthoc_weights`.
      weights: of the snapshots, `(N,)`.
      sigma_rel: the width wanted.
      count: after how many updates.

    Raises:
      ValueError: as of `posthoc_weights`, or there are not as many weights as snapshots.

    Example:
      >>> snapshots = [(0.05, 1000), (0.1, 1000)]
      >>> weights = posthoc_weights(snapshots, 0.07, 1000)
      >>> round(posthoc_residual(snapshots, weights, 0.07, 1000), 2)
      0.04
    """
    profiles = [*snapshots, (sigma_rel, count)]
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(snapshots),):
        raise ValueError(
            f"{len(snapshots)} snapshots need weights of shape ({len(snapshots)},), got "
            f"{weights.shape}"
        )
    among, signed = _inner(*[_profiles(profiles)] * 2), np.append(-weights, 1)
    return math.sqrt(max(0.0, float(signed @ among @ signed / among[-1, -1])))


def combine(trees: Iterable[PyTree], weights: Sequence[float] | np.ndarray) -> PyTree:
    """Returns the weighted sum of pytrees, on the host.

    Args:
      trees: pytrees of one structure; of an iterator only one is held at a time.
      weights: one for each tree.

    Returns:
      Such a pytree of NumPy arrays, summed in float64, of the first tree's types.

    Raises:
      ValueError: there is no tree, or not one for each weight; their structures differ.
    """
    total = like = None
    number = 0
    for number, tree in enumerate(trees, 1):
        if number > len(weights):
            break
        weight = float(weights[number - 1])
        if like is None:
            like = jax.tree.map(lambda leaf: np.dtype(leaf.dtype), tree)
            total = jax.tree.map(lambda leaf: np.zeros(np.shape(leaf)), tree)
        total = jax.tree.map(lambda t, x, w=weight: t + w * np.asarray(x, np.float64), total, tree)
    if number != len(weights) or not number:
        trees_found = f"{number}{' or more' if number > len(weights) else ''}"
        raise ValueError(
            f"combine needs one tree or more and a weight for each, got {len(weights)} weights and "
            f"{trees_found} trees"
        )
    return jax.tree.map(lambda t, dtype: t.astype(dtype), total, like)


def check_decay(decay: Decay) -> None:
    """Checks a constant decay.

    Raises:
      ValueError: it lies outside [0, 1).
    """
    if not callable(decay) and not 0 <= decay < 1:
        raise ValueError(f"an EMA's decay must lie in [0, 1), got {decay}")


def _gamma(sigma_rel: float) -> float:
    """Returns gamma of eq. (2), which is a cubic with one root above 0."""
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must lie in (0, 0.2887), got {sigma_rel}")
    square = sigma_rel**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def _profiles(snapshots: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns gamma and t of each, float64 `(N,)`."""
    for _, count in snapshots:
        if not 0 < count < math.inf:
            raise ValueError(f"the count of updates must be positive, got {count}")
    gammas = np.array([_gamma(sigma_rel) for sigma_rel, _ in snapshots])
    return gammas, np.array([count for _, count in snapshots], np.float64)


def _inner(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> np.ndarray:
    """Returns the inner products of profiles, eq. (4), `(N_a, N_b)`."""
    (gamma_a, t_a), (gamma_b, t_b) = (field[:, None] for field in a), (field[None] for field in b)
    shorter, longer = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma = np.where(t_a < t_b, gamma_b, gamma_a)  # of the longer
    factor = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return factor * (shorter / longer) ** gamma / longer
