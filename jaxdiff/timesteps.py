"""Training-time samplers of t: functions `(key, index, schedule) -> t`.

`key` is the step's key and `index` `(B,)` the numbers of the examples in the global batch, so that
the times, like all that is random, do not depend on how the batch is divided over devices.

Most samplers draw u in [0, 1) and take

    t = u  for a continuous schedule,    t = floor(u T)  for a discrete one                (1)

A loss-aware sampler (Nichol & Dhariwal 2021, section 3.3) draws the times more often at which the
loss is large, and weights what it draws such that the expectation stays that of uniform times:

    p_t = (1 - c) sqrt(E[L_t²]) / sum_s sqrt(E[L_s²]) + c / T                              (2)
    E_{t ~ p}[w_t L_t] = (1 / T) sum_t L_t,    w_t = 1 / (T p_t)                           (3)

E[L_t²] is the mean over the last losses seen at t. They are a history that training carries along:
`training.make_train_step(..., update_history=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff._checks import check_same_shape
from jaxdiff.base import Array, Schedule
from jaxdiff.process import uniform_index

Timesteps = Callable[[Array, Array, Schedule], Array]
"""`(key, index (B,), schedule) -> t`, `(B,)`: int32 in `0 .. T-1`, or float32 in [0, 1)."""


def uniform(key: Array, index: Array, schedule: Schedule) -> Array:
    """Draws t uniformly and independently for each example (Ho et al. 2020, algorithm 1).

    Args:
      key: one typed key, the step's.
      index: int32 `(B,)`, the numbers of the examples in the global batch.
      schedule: a discrete or a continuous schedule.

    Returns:
      `(B,)`: int32 in `0 .. T-1` for a discrete schedule; float32 in [0, 1), and never 0 itself,
      for a continuous one. So do all samplers below.
    """
    return _time(_draw(key, index), schedule)


def stratified(num_strata: int) -> Timesteps:
    """Draws t uniformly, but evenly spread over the batch: example i from stratum i mod n.

    u_i = ((i mod n) + U_i) / n, t_i as in eq. (1). The average over a batch varies less than with
    independent times. Each t on its own is uniform only over a random position in the batch, which
    shuffled data provide.

    Args:
      num_strata: n, the size of the global batch or a divisor of it.

    Raises:
      ValueError: `num_strata` is less than 1.
    """
    _check_positive_int("num_strata", num_strata)

    def sample(key: Array, index: Array, schedule: Schedule) -> Array:
        return _time((index % num_strata + _draw(key, index)) / num_strata, schedule)

    return sample


def low_discrepancy(num_points: int) -> Timesteps:
    """Draws one point for the whole batch, the others at equal distances from it.

    u_i = (u_0 + i/n) mod 1 (VDM, Kingma et al. 2021, appendix I), t_i as in eq. (1). Each t on its
    own is uniform, whatever its position in the batch.

    Args:
      num_points: n, the size of the global batch or a divisor of it.

    Raises:
      ValueError: `num_points` is less than 1.
    """
    _check_positive_int("num_points", num_points)

    def sample(key: Array, index: Array, schedule: Schedule) -> Array:
        # One draw a step. No example uses this key: their streams all lie below it.
        shared = jax.random.uniform(jax.random.fold_in(rng.check_key(key), int(rng.Stream.TIME)))
        return _time((shared + (jnp.asarray(index) % num_points) / num_points) % 1, schedule)

    return sample


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Timesteps:
    """Draws u = sigmoid(mean + std N(0, 1)) (SD3, Esser et al. 2024, section 3.1), t as in eq. (1).

    Made for rectified flows, where it prefers the middle of the way; a positive mean leans towards
    noise.

    Args:
      mean: of the logit of u.
      std: its standard deviation, positive.

    Raises:
      ValueError: `std` is not positive.
    """
    _check_positive("std", std)

    def sample(key: Array, index: Array, schedule: Schedule) -> Array:
        return _time(jax.nn.sigmoid(mean + std * _draw_normal(key, index)), schedule)

    return sample


def log_normal_sigma(mean: float = -1.2, std: float = 1.2) -> Timesteps:
    """Draws the noise level: log(sigma/alpha) ~ N(mean, std²) (EDM, Karras et al. 2022, table 1).

    t is where the schedule has this level, for a discrete one the nearest index. Levels beyond an
    end of the schedule become that end.

    Args:
      mean: of log(sigma/alpha).
      std: its standard deviation, positive.

    Raises:
      ValueError: `std` is not positive.
    """
    _check_positive("std", std)

    def sample(key: Array, index: Array, schedule: Schedule) -> Array:
        t = schedule.time(-2 * (mean + std * _draw_normal(key, index)))
        if schedule.num_steps is None:
            return _time(t, schedule)
        return jnp.round(t).astype(jnp.int32)

    return sample


class LossHistory(NamedTuple):
    """The last losses seen at each time.

    Attributes:
      losses: float32 `(T, num_terms)`: in row t the first `counts[t]`, oldest first, then zeros.
      counts: int32 `(T,)`, how many losses each row holds, at most num_terms.
    """

    losses: Array
    counts: Array


class LossAware(NamedTuple):
    """A sampler of t that follows the losses, as pure functions of their history.

    Attributes:
      init: `(schedule or T) -> history`, an empty one.
      sample: `(key, index (B,), schedule, history) -> (t, weight)`: int32 `(B,)` as other samplers
        draw it, and float32 `(B,)`, eq. (3), by which to multiply the loss.
      update: `(history, t (N,), loss (N,)) -> history` with these pairs, in order. The losses are
        those before the multiplication by `weight`.
    """

    init: Callable[[Schedule | int], LossHistory]
    sample: Callable[[Array, Array, Schedule, LossHistory], tuple[Array, Array]]
    update: Callable[[LossHistory, Array, Array], LossHistory]


def loss_aware(num_terms: int = 10, uniform_probability: float = 0.001) -> LossAware:
    """Draws t in proportion to the root of the mean squared loss there, eq. (2).

    Until every t has been seen `num_terms` times, t is exactly that of `uniform` and its weight 1.
    A loss that is not finite, or whose t is no index of the schedule, is left out of the history.

    Args:
      num_terms: how many losses to remember at each t.
      uniform_probability: c, in [0, 1]: how often to draw uniformly instead, which bounds the
        weights by 1 / c.

    Returns:
      The functions `init`, `sample` and `update`, see `LossAware`.

    Raises:
      ValueError: `num_terms` is less than 1, or `uniform_probability` lies outside [0, 1]; in
        `init` and `sample`, the schedule is continuous or not that of the history; in `update`,
        `t` and `loss` differ in shape.

    Example:
      >>> sampler = loss_aware(num_terms=1)
      >>> history = sampler.update(sampler.init(2), jnp.arange(2), jnp.array([1.0, 3.0]))
      >>> print(history.losses[:, 0], history.counts)
      [1. 3.] [1 1]
    """
    _check_positive_int("num_terms", num_terms)
    if not 0 <= uniform_probability <= 1:
        raise ValueError(f"uniform_probability must lie in [0, 1], got {uniform_probability}")

    def init(schedule: Schedule | int) -> LossHistory:
        num_steps = schedule if isinstance(schedule, int) else _discrete_steps(schedule)
        _check_positive_int("num_steps", num_steps)
        return LossHistory(
            jnp.zeros((num_steps, num_terms), jnp.float32), jnp.zeros(num_steps, jnp.int32)
        )

    def sample(
        key: Array, index: Array, schedule: Schedule, history: LossHistory
    ) -> tuple[Array, Array]:
        num_steps = _discrete_steps(schedule)
        if history.losses.shape != (num_steps, num_terms):
            raise ValueError(
                f"the history must have losses of shape {(num_steps, num_terms)}, got "
                f"{history.losses.shape}: make it with this sampler's init(schedule)"
            )
        u = _draw(key, index)
        cells = _cells(_probabilities(history.losses, uniform_probability))
        place = (u * _CELLS).astype(jnp.int32)
        drawn = jnp.searchsorted(jnp.cumsum(cells), place, side="right").astype(jnp.int32)
        weight = (_CELLS / num_steps) / cells[drawn].astype(jnp.float32)
        full = jnp.all(history.counts == num_terms)
        return (
            jnp.where(full, drawn, uniform_index(u, num_steps)),
            jnp.where(full, weight, jnp.ones_like(weight)),
        )

    return LossAware(init, sample, _append)


# As many as a float32 draw of [0, 1) has values.
_CELLS = 2**23


def _probabilities(losses: Array, uniform_probability: float) -> Array:
    """Returns p_t of eq. (2), `(T,)`, for full rows of losses `(T, num_terms)`."""
    largest = jnp.max(jnp.abs(losses))
    # Divided by the largest, so that no square leaves the range of float32.
    root = jnp.sqrt(jnp.mean(jnp.square(losses / jnp.where(largest > 0, largest, 1)), axis=1))
    root = jnp.where(largest > 0, root, jnp.ones_like(root))
    return (1 - uniform_probability) * root / jnp.sum(root) + uniform_probability / root.size


def _cells(p: Array) -> Array:
    """Returns how many of the cells of [0, 1) each t owns, int32 `(T,)`, at least one.

    Weights made of these numbers fit what is really drawn: in float32 sums of p the smallest p
    would be lost.
    """
    cells = (p * (_CELLS - 2 * p.size)).astype(jnp.int32)
    rest = _CELLS - jnp.sum(cells)  # a few for each
    return cells + rest // p.size + (jnp.arange(p.size) < rest % p.size)


def _append(history: LossHistory, t: Array, loss: Array) -> LossHistory:
    """Appends to each row t its losses, in order, and keeps the last (`LossAware.update`)."""
    t, loss = jnp.asarray(t), jnp.asarray(loss, jnp.float32)
    check_same_shape(t=t, loss=loss)
    num_steps, num_terms = history.losses.shape
    used = jnp.isfinite(loss) & (t >= 0) & (t < num_steps)
    t = jnp.where(used, t, num_steps)
    loss = loss[jnp.argsort(t, stable=True)]  # the new losses of t lie together from starts[t] on
    added = jnp.zeros(num_steps, jnp.int32).at[t].add(1, mode="drop")
    starts = jnp.cumsum(added) - added
    total = history.counts + added
    counts = jnp.minimum(total, num_terms)
    # The place of every kept loss in the sequence of old and new ones, (T, num_terms).
    place = (total - counts)[:, None] + jnp.arange(num_terms)[None]
    old = jnp.take_along_axis(history.losses, jnp.minimum(place, num_terms - 1), axis=1)
    new = loss[jnp.clip((starts - history.counts)[:, None] + place, 0, loss.size - 1)]
    kept = jnp.where(place < history.counts[:, None], old, new)
    kept = jnp.where(place < total[:, None], kept, jnp.zeros_like(kept))
    return LossHistory(kept, counts)


def _draw(key: Array, index: Array) -> Array:
    return rng.uniform(_time_keys(key, index))


def _draw_normal(key: Array, index: Array) -> Array:
    return rng.normal(_time_keys(key, index), ())


def _time_keys(key: Array, index: Array) -> Array:
    return rng.stream(rng.per_example(key, jnp.asarray(index)), rng.Stream.TIME)


def _time(u: Array, schedule: Schedule) -> Array:
    """Maps u in [0, 1] to a time of the schedule, eq. (1)."""
    if schedule.num_steps is not None:
        return uniform_index(u, schedule.num_steps)
    # Not t = 0: float32 draws it once in 2^23 times, and the loss may not be finite there.
    return jnp.clip(u.astype(jnp.float32), 2**-24, 1 - 2**-24)


def _discrete_steps(schedule: Schedule) -> int:
    if schedule.num_steps is None:
        raise ValueError(
            "loss_aware needs a discrete schedule, got a continuous one: it remembers losses "
            "by index"
        )
    return schedule.num_steps


def _check_positive_int(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
