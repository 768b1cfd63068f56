"""Bits per dimension of data on levels from a density: dequantization.

A density says nothing of data on levels k = 0 .. n-1: noise u in [0, 1) spreads each over its bin.
With any noise q(u|k), and v = k + u with density p_v (Theis et al. 2016; Ho et al. 2019, Flow++,
eq. 12),

    log P(k) = log int p_v(k + u) du >= E_q[log p_v(k + u) - log q(u|k)]                   (1)

with equality for q = p_v(u|k). Uniform noise has log q = 0. The model's data are a line of v,

    "levels": x = (v - 1/2) 2/(n-1) - 1,   log p_v = log p_x + log(2/(n-1)),               (2)
    "interval": x = v 2/n - 1,             log p_v = log p_x + log(2/n)                    (3)

for each coordinate: with (2) the middle of a bin is where plain data x / 127.5 - 1 have the level,
and where the variational bound's decoder has its bin; (3) fills [-1, 1], as the pipelines of
`jaxdiff.data` do it with `dequantize=True`. Averaged over K draws under the logarithm the bound
tightens (Burda et al. 2016, eq. 8),

    log P(k) >= E log (1/K) sum_j w_j,    w_j = p_v(k + u_j) / q(u_j|k)                    (4)

and the result, for D coordinates, is -log P(k) / (D log 2) bits per dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr, ndtri

from jaxdiff import rng
from jaxdiff._checks import check_float, is_concrete
from jaxdiff.base import Array
from jaxdiff.losses._masks import fill_masked
from jaxdiff.losses.variational import check_num_levels

Noise = Callable[[Array, Array], tuple[Array, Array]]
"""`(keys (B,), x0) -> (u, log_q)`: u in [0, 1), shape of x0, for data on their levels; log_q in
nats, for each coordinate, shape of x0, or of the whole example, `(B,)`. An example's u depends on
its key and its x0 alone."""

Parameter = Array | float | Callable[[Array], Array]
"""What a noise is made of: a number, an array that broadcasts to x0, or a function of x0."""

Placement = Literal["levels", "interval"]
"""Where the bins lie in the model's data, eq. (2) or (3)."""


def uniform(keys: Array, x0: Array) -> tuple[Array, Array]:
    """Draws u uniformly: log_q is 0 (Theis et al. 2016)."""
    u = jax.vmap(lambda key: jax.random.uniform(key, x0.shape[1:], x0.dtype))(keys)
    return u, jnp.zeros_like(x0)


def logit_normal(mean: Parameter = 0.0, std: Parameter = 1.0) -> Noise:
    """Draws u = sigmoid(mean + std z) with normal z: the last layer of Flow++ (Ho et al. 2019).

    With functions of x0 as parameters, such as a network's output, it is learned by ascending eq.
    (1), to which u is differentiable.

    Args:
      mean: of the logit of u.
      std: its standard deviation, positive; 1.75 is the closest to uniform.

    Raises:
      ValueError: a number `std` is not positive.
    """
    _check_std(std)

    def noise(keys: Array, x0: Array) -> tuple[Array, Array]:
        m, s = _values(mean, x0), _values(std, x0)
        z = rng.normal(keys, x0.shape[1:], x0.dtype)
        logit = m + s * z
        # du/dz = s u (1 - u).
        slope = jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit)
        log_q = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - jnp.log(s) - slope
        return _below_one(jax.nn.sigmoid(logit)), log_q

    return noise


def truncated_normal(std: Parameter, mean: Parameter = 0.5) -> Noise:
    """Draws u from a normal distribution cut off at 0 and 1 (Zheng et al. 2023, section 4.1).

    For a model trained on levels, whose density at the flow's start has a peak at each of them of
    the width of the noise there, std is that width in bins: sigma/alpha (n-1)/2 of `start`, and the
    mean the middle of the bin. Learned as `logit_normal` is.

    Args:
      std: the standard deviation before the cut, in bins, positive; large ones are uniform.
      mean: the mean before the cut, in bins from the lower edge, in [0, 1] or within 3 std of it.

    Raises:
      ValueError: a number `std` is not positive.
    """
    _check_std(std)

    def noise(keys: Array, x0: Array) -> tuple[Array, Array]:
        m, s = _values(mean, x0), _values(std, x0)
        low, high = -m / s, (1 - m) / s
        share = jax.vmap(lambda key: jax.random.uniform(key, x0.shape[1:], x0.dtype))(keys)
        z = jnp.clip(ndtri(ndtr(low) + share * (ndtr(high) - ndtr(low))), low, high)
        # log(ndtr(high) - ndtr(low)), by the tails that are cut off.
        inside = jnp.log1p(-jnp.exp(log_ndtr(low)) - jnp.exp(log_ndtr(-high)))
        log_q = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - jnp.log(s) - inside
        return _below_one(jnp.clip(m + s * z, 0)), log_q

    return noise


def dequantized_bits(
    key: Array,
    log_density: Callable[[Array], Array],
    x0: Array,
    noise: Noise = uniform,
    *,
    num_levels: int = 256,
    num_draws: int = 1,
    placement: Placement = "levels",
    index: Array | None = None,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """Returns a draw of the bound on the bits per dimension of data on levels, eqs. (1)-(4).

    Args:
      key: one typed key.
      log_density: `x (B, *spatial, C) -> (B,)`, log p_x in nats, of the coordinates that count:
        `lambda x: probability_flow(key, denoiser, schedule, x).log_density`. An estimate from
        Hutchinson's directions serves where `num_draws` is 1; under the logarithm of eq. (4) its
        spread would count as probability.
      x0: clean data `(B, *spatial, C)`, on their levels from -1 to 1, as for `variational_bound`.
      noise: `uniform`, `logit_normal(...)`, `truncated_normal(...)` or your own.
      num_levels: n, the number of the data's levels.
      num_draws: K of eq. (4), one after the other: `log_density` is called once, in a loop of K.
      placement: "levels" for models of data on levels or around them, "interval" for models of data
        with noise that fill [-1, 1].
      index: int32 `(B,)`, the examples' numbers in the data set, 0 .. B-1 if not given. What is
        drawn for an example depends on `key` and its number alone.
      mask: 1 where a coordinate counts, broadcasts to `x0`; None for all. It must also be that of
        `log_density`, and of a noise whose log_q is `(B,)`.

    Returns:
      The bits per dimension `(B,)`, over the coordinates that count, and log w, nats `(K, B)`, of
      the whole examples.

    Raises:
      TypeError: `x0` is not floating, or `key` not a typed key.
      ValueError: `x0`, where known, does not lie on the levels; there are fewer than two;
        `num_draws` is less than 1; `placement` is neither; the mask or what `noise` returns does
        not fit.
    """
    check_num_levels(num_levels)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    if placement not in get_args(Placement):
        raise ValueError(f'placement must be "levels" or "interval", got {placement!r}')
    x0 = fill_masked(check_float("x0", x0), mask)
    counts = jnp.ones_like(x0) if mask is None else jnp.broadcast_to(mask, x0.shape) > 0
    level = _levels(x0, counts, num_levels)
    events = tuple(range(1, x0.ndim))
    size = jnp.maximum(jnp.sum(counts, axis=events, dtype=x0.dtype), 1)
    width = 2 / (num_levels - 1) if placement == "levels" else 2 / num_levels
    shift = 0.5 if placement == "levels" else 0.0
    keys = rng.per_example(key, jnp.arange(x0.shape[0]) if index is None else index)

    def draw(number: Array) -> Array:
        u, log_q = noise(rng.stream(keys, rng.Stream.DEQUANTIZE, number), x0)
        if u.shape != x0.shape or log_q.shape not in (x0.shape, x0.shape[:1]):
            raise ValueError(
                f"noise must return u {x0.shape} and log_q {x0.shape} or {x0.shape[:1]}, got "
                f"{u.shape} and {log_q.shape}"
            )
        if log_q.shape == x0.shape:
            log_q = jnp.sum(jnp.where(counts, log_q, 0), axis=events)
        x = jnp.where(counts, (level + (u - shift)) * width - 1, x0)
        return log_density(x) + size * math.log(width) - log_q

    log_weights = jax.lax.map(draw, jnp.arange(num_draws))
    return -importance_weighted(log_weights) / (size * math.log(2)), log_weights


def importance_weighted(log_weights: Array) -> Array:
    """Returns log (1/K) sum_j w_j over the first axis, eq. (4), without overflow.

    Args:
      log_weights: `(K, ...)`, nats.

    Returns:
      `(...)`, nats; -inf where all weights are 0.
    """
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])


def _levels(x0: Array, counts: Array, num_levels: int) -> Array:
    """Returns the levels 0 .. n-1 of data, as floats."""
    level = (x0 + 1) * ((num_levels - 1) / 2)
    if is_concrete(level) and is_concrete(counts):
        off = np.abs(np.asarray(level) - np.clip(np.rint(level), 0, num_levels - 1))
        off = np.max(np.where(counts, off, 0), initial=0)
        if not off < 0.01:
            raise ValueError(
                f"x0 must lie on {num_levels} levels from -1 to 1, got values {off:.3g} levels "
                "off: for images of uint8 pass x / 127.5 - 1, for other data their num_levels"
            )
    return jnp.round(level)


def _values(parameter: Parameter, x0: Array) -> Array:
    value = parameter(x0) if callable(parameter) else parameter
    return jnp.broadcast_to(jnp.asarray(value, x0.dtype), x0.shape)


def _below_one(u: Array) -> Array:
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


def _check_std(std: Parameter) -> None:
    if isinstance(std, (int, float)) and not std > 0:
        raise ValueError(f"std must be positive, got {std}")
