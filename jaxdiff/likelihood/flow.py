"""The likelihood of the probability flow: exact, by a change of variables.

The flow carries clean data to noise, one to one, and their density with them (Song et al. 2021,
section 4.3 and appendix D.2). Whatever the schedule, it is solved here in the frame that preserves
the variance: with s² = alpha² + sigma², z = x / s, a = alpha / s, b = sigma / s, over
l = log(alpha/sigma),

    dz/dl = a (x0(z) - a z)                                                                (1)

which is Song's dx/dt = f - g²/2 score in other words. Nothing is divided by alpha or sigma, so that
both ends keep their digits. They are finite: l is held within [-12, 12], beyond which float32 sees
no difference. Data of D coordinates enter at the flow's start, at z = a_0 x, and leave at its end,
at z = b_T times standard normal latents, as samplers start from sigma_T times noise:

    log p(x) = log N(z_T; 0, b_T² I) + D log a_0 + int a (tr dx0/dz - a D) dl              (2)

with l from the start to the end. What noisy data at the end still differ from noise is the model's
error, and counts. The trace costs a derivative along each of the D coordinates, or is estimated
from a few random directions e of independent signs (Hutchinson 1990), the same all the way, as
E[e' (dx0/dz) e]: without bias, and the spread over directions tells the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff._checks import check_float, is_concrete
from jaxdiff.base import Array, Denoiser, Node, Schedule
from jaxdiff.denoisers import masked
from jaxdiff.losses._masks import fill_masked
from jaxdiff.solvers._ode import check_accuracy, load_diffrax, solve_each
from jaxdiff.solvers.adaptive import LEAST

Trace = Literal["exact", "hutchinson"]
"""How the trace of eq. (2) is found."""


class Flow(NamedTuple):
    """What the probability flow says of data.

    Attributes:
      log_density: log p(x), eq. (2), in nats, the sum over the coordinates that count, `(B,)`; NaN
        where the flow took more than `max_steps`.
      latents: the noise that the data become, standard normal if the model is right, shape of the
        data; zero where masked. A deterministic sampler leads them back.
      error: the standard error of `log_density` from Hutchinson's directions, `(B,)`: 0 for the
        exact trace, NaN for a single direction, which does not tell.
      evaluations: of the network, int32 `(B,)`; each comes with as many derivatives along a
        direction as there are directions, about as dear as the evaluation itself.
    """

    log_density: Array
    latents: Array
    error: Array
    evaluations: Array


def probability_flow(
    key: Array,
    denoiser: Denoiser,
    schedule: Schedule,
    x: Array,
    *,
    trace: Trace = "exact",
    num_probes: int = 1,
    start: float | int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
    index: Array | None = None,
    mask: Array | None = None,
) -> Flow:
    """Returns the log-likelihood of data under the model's probability flow, eq. (2).

    It is that of the model whose samples are the flow stopped at `start` and divided by alpha
    there: of data blurred by noise of tau = sigma/alpha. What a small tau costs on average is, for
    Gaussian data of standard deviation s, (tau/s)^4 / 4 nats a coordinate. Where a network was not
    trained its flow means nothing: a discrete schedule's starts at index 0.

    Each example has steps and an error of its own, and does not depend on its neighbours. The
    discrete schedules' flow is that of their continuous interpolation, as for
    `solvers.probability_flow`.

    Args:
      key: one typed key; of use to Hutchinson's trace only.
      denoiser: the denoiser, smooth in x and differentiable in reverse mode; clipped ones have no
        density of their own.
      schedule: the schedule, discrete or continuous.
      x: clean data `(B, *spatial, C)`; images on levels have a density only after dequantization
        (`dequantized_bits`).
      trace: "exact", D derivatives per evaluation, or "hutchinson", `num_probes` of them.
      num_probes: the number of Hutchinson's directions.
      start: the index or time at which the flow ends on the side of the data; None for the
        schedule's first.
      rtol: the relative tolerance of each example, of z and of log p(x) / D. For a network 1e-3 is
        often enough: a sixth of the evaluations.
      atol: the absolute tolerance, of the same.
      max_steps: at most so many steps, accepted or not.
      index: int32 `(B,)`, the examples' numbers in the data set, 0 .. B-1 if not given. The
        directions of an example depend on `key` and its number alone.
      mask: 1 where a coordinate counts, broadcasts to `x`; None for all. The others are no data:
        the denoiser is shown zeros there (`denoisers.masked`).

    Returns:
      The log-density and what belongs to it.

    Raises:
      ImportError: diffrax is not installed.
      TypeError: `x` is not floating, `key` not a typed key, or `start` no index of a discrete
        schedule.
      ValueError: `trace` is neither; a number, tolerance or the start is out of range; the mask
        does not fit.

    Example:
      >>> from jaxdiff import denoisers, schedules
      >>> exact = denoisers.gaussian([0.0, 0.0], 0.5)
      >>> flow = jax.jit(lambda x: probability_flow(
      ...     jax.random.key(0), exact.denoiser, schedules.vp_cosine(), x))
      >>> print(f"{flow(jnp.array([[0.5, -1.0]])).log_density[0]:.2f}")  # log N(x; 0, 0.25)
      -2.95
    """
    diffrax = load_diffrax("likelihood.probability_flow")
    check_accuracy(rtol, atol, max_steps)
    rng.check_key(key)
    _check_trace(trace, num_probes)
    x = fill_masked(check_float("x", x), mask)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is not None:
        denoiser = masked(denoiser, mask)
        x = jnp.where(jnp.broadcast_to(mask, x.shape) > 0, x, 0)
    events = tuple(range(1, x.ndim))
    counts = jnp.ones_like(x) if mask is None else jnp.broadcast_to(mask, x.shape) > 0
    size = jnp.maximum(jnp.sum(counts, axis=events, dtype=x.dtype), 1)
    directions = None
    if trace == "hutchinson":
        directions = _directions(key, x, num_probes, index)
    begin, end = (
        jnp.broadcast_to(place.astype(x.dtype), x.shape[:1]) for place in _ends(schedule, start)
    )

    def believed(z: Array, place: Array) -> tuple[Array, Array | int]:
        alpha, sigma = schedule.levels(2 * place)
        node = Node(schedule.time(2 * place), alpha, sigma)
        prediction = denoiser(_scale(node, z) * z, node)
        return prediction.x0, prediction.evaluations

    def velocity(place: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        z, _ = state
        x0, pull = jax.vjp(lambda z: believed(z, place)[0], z)
        cosine = jnp.exp(jax.nn.log_sigmoid(2 * place) / 2)
        over = cosine.reshape(cosine.shape + (1,) * len(events))
        share = _traces(pull, z, directions) / size[:, None]
        return over * (x0 - over * z), cosine[:, None] * (share - cosine[:, None])

    log_cosine = jax.nn.log_sigmoid(2 * begin) / 2
    z = jnp.exp(log_cosine).reshape(-1, *(1,) * len(events)) * x
    _, cost = believed(z, begin)
    # Of the logarithm of the determinant what falls on a coordinate, so that tolerances fit both.
    change = jnp.zeros((x.shape[0], 1 if directions is None else num_probes), x.dtype)
    (z, change), asked = solve_each(
        diffrax, velocity, begin, end, (z, change),
        rtol=rtol, atol=atol, max_steps=max_steps, reverse_mode=False,
    )  # fmt: skip
    log_sine = jax.nn.log_sigmoid(-2 * end) / 2
    latents = z * jnp.exp(-log_sine).reshape(-1, *(1,) * len(events))
    prior = -0.5 * jnp.sum(latents**2, axis=events) - size * (0.5 * math.log(2 * math.pi))
    draws = prior[:, None] + size[:, None] * (change + (log_cosine - log_sine)[:, None])
    evaluations = jnp.asarray((asked + 1) * cost, jnp.int32)
    return Flow(jnp.mean(draws, axis=1), latents, _error(draws, directions), evaluations)


def _scale(node: Node, x: Array) -> Array:
    """Returns s = sqrt(alpha² + sigma²) of a node, so that it broadcasts against x."""
    node = node.over(x)
    return jnp.sqrt(node.alpha**2 + node.sigma**2)


def _check_trace(trace: str, num_probes: int) -> None:
    if trace not in get_args(Trace):
        raise ValueError(f'trace must be "exact" or "hutchinson", got {trace!r}')
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}")
    if trace == "exact" and num_probes != 1:
        raise ValueError(
            f'num_probes is for trace="hutchinson", got {num_probes} with "exact", which needs none'
        )


def _ends(schedule: Schedule, start: float | int | None) -> tuple[Array, Array]:
    """Returns l = log(alpha/sigma) at the flow's start and end, `()` each, within [-12, 12]."""
    continuous = schedule.num_steps is None
    last = 1.0 if continuous else schedule.num_steps - 1
    first = (0.0 if continuous else 0) if start is None else start
    begin, end = (
        jnp.clip(schedule.log_snr(t) / 2, LEAST, -LEAST).reshape(()) for t in (first, last)
    )
    if is_concrete(begin) and is_concrete(end) and not begin > end:
        raise ValueError(f"start must lie before the schedule's end {last}, got {start}")
    return begin, end


def _directions(key: Array, x: Array, num_probes: int, index: Array | None) -> Array:
    """Returns random signs `(num_probes, B, *event)`, by address."""
    keys = rng.per_example(key, jnp.arange(x.shape[0]) if index is None else index)

    def draw(probe: Array) -> Array:
        own = rng.stream(keys, rng.Stream.PROBE, probe)
        return jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))(own)

    return jax.vmap(draw)(jnp.arange(num_probes))


def _traces(pull: Callable[[Array], tuple[Array]], z: Array, directions: Array | None) -> Array:
    """Returns the trace, or what each direction says of it, `(B, 1 or num_probes)`."""
    events = tuple(range(1, z.ndim))

    def along(direction: Array) -> Array:
        return jnp.sum(direction * pull(direction)[0], axis=events)

    if directions is not None:
        return jax.lax.map(along, directions).T

    def add(total: Array, coordinate: Array) -> tuple[Array, None]:
        unit = (jnp.arange(z[0].size) == coordinate).astype(z.dtype).reshape(1, *z.shape[1:])
        return total + along(jnp.broadcast_to(unit, z.shape)), None

    total, _ = jax.lax.scan(add, jnp.zeros(z.shape[:1], z.dtype), jnp.arange(z[0].size))
    return total[:, None]


def _error(draws: Array, directions: Array | None) -> Array:
    if directions is None:
        return jnp.zeros_like(draws[:, 0])
    num = draws.shape[1]
    if num == 1:
        return jnp.full_like(draws[:, 0], jnp.nan)
    return jnp.std(draws, axis=1, ddof=1) / math.sqrt(num)
