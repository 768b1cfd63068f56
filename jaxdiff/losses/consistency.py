"""Consistency models: one evaluation from anywhere on a trajectory to its end.

A consistency function maps each state on a trajectory of the probability-flow ODE to the clean end
of it (Song et al. 2023, section 3), which at the end itself leaves nothing to do:

    f(x, t) = x_end / alpha_end,    f(x, end) = x / alpha                                  (1)

Any parameterization whose output counts for nothing at the end makes such a function of a network,
if sigma is measured from the end, whose noise-to-signal ratio is sigma_min:

    f(x, t) = parameterization.x0(output, x, alpha, sigma - sigma_min alpha)               (2)

So a network trained to denoise is a start, as it is. For `predictions.edm` eq. (2) has the c_skip
of Song et al. 2023 (appendix C); its c_out has sigma - sigma_min in the root too, where theirs has
sigma. With sigma_min = 0, where the end is clean data, both are EDM's.

A network learns it from pairs of states at adjacent nodes of a grid, on one trajectory:

    loss_i = w(now, next) d(f(params, x, now), f(stop_gradient(params), x', next))         (3)

In distillation x' is where a solver's step with a teacher takes x (eq. 7 there). In training no
teacher is needed: x and x' are the same data with the same noise (eq. 10 there). The target has the
parameters of the step, not an average of earlier ones, which biases training (Song & Dhariwal 2023,
section 3.2). Grids are refined during training by making the loss anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxdiff import rng
from jaxdiff._checks import is_concrete
from jaxdiff.base import (
    Array,
    Batch,
    Denoiser,
    LossFn,
    Network,
    Node,
    Prediction,
    PyTree,
    Schedule,
    Solver,
)
from jaxdiff.losses._masks import masked_mean
from jaxdiff.losses.distillation import (
    Teacher,
    check_descent,
    draw,
    starts_at_zero_snr,
    with_dropout,
)
from jaxdiff.predictions import Parameterization, check_signal
from jaxdiff.process import diffuse, uniform_index

Distance = Callable[[Array, Array, Array | None], Array]
"""`(x0, target, mask) -> d (B,)`, with x0 and target `(B, *spatial, C)`."""

StepWeighting = Callable[[Node, Node], Array]
"""`(now, next) -> w (B,)`, the weight of eq. (3), for the noisier and the cleaner node."""


def consistency_denoiser(
    apply_fn: Network,
    params: PyTree,
    schedule: Schedule,
    parameterization: Parameterization,
    cond: PyTree = None,
    *,
    sigma_min: float = 0.0,
) -> Denoiser:
    """Makes a consistency function of a network, eq. (2), to be sampled by `solvers.consistency`.

    Args:
      apply_fn: `(params, x, noise_level, cond) -> output`, see `jaxdiff.base.Network`.
      params: the network's parameters.
      schedule: the schedule that the network was trained on.
      parameterization: what the network's output means: any but x0.
      cond: the condition, a pytree of arrays `(B, ...)`, or None.
      sigma_min: the noise-to-signal ratio at which the trajectories end, not negative.

    Returns:
      The denoiser; its x0 is f. At nodes cleaner than `sigma_min` that is x / alpha.

    Raises:
      ValueError: the parameterization does not satisfy eq. (1) or, at the schedule's noisy end,
        says nothing about clean data; or `sigma_min` is negative.
    """
    _check_boundary(parameterization, sigma_min)
    check_signal(parameterization, schedule.ends_at_zero_snr)
    return _function(apply_fn, params, parameterization, cond, sigma_min)


def squared(x0: Array, target: Array, mask: Array | None = None) -> Array:
    """The mean square of the difference, over the coordinates that count, `(B,)`."""
    return masked_mean(jnp.square(x0 - target).astype(jnp.float32), mask)


def pseudo_huber(c: float = 0.00054) -> Distance:
    """sqrt(m + c²) - c with the mean square m: forgiving of outliers, smooth at 0.

    The distance of Song & Dhariwal 2023 (section 3.3) over the root of the number of coordinates,
    so that c and the loss's scale do not depend on that number.

    Args:
      c: where the square turns into the absolute value, positive.

    Raises:
      ValueError: `c` is not positive.
    """
    if not c > 0:
        raise ValueError(f"c must be positive, got {c}")

    def distance(x0: Array, target: Array, mask: Array | None = None) -> Array:
        mean = squared(x0, target, mask)
        return mean / (jnp.sqrt(mean + c**2) + c)  # the same, and exact for small m

    return distance


def inverse_gap(now: Node, next: Node) -> Array:
    """Weight 1 / (sigma/alpha - sigma'/alpha') (Song & Dhariwal 2023, section 3.1)."""
    return 1 / (now.sigma / now.alpha - next.sigma / next.alpha)


def lognormal_steps(grid: Node, mean: float = -1.1, std: float = 2.0) -> np.ndarray:
    """How likely each step of a grid is if log(sigma/alpha) is normal (ibid., section 3.5).

    Args:
      grid: the grid, `(N+1,)`.
      mean: the mean of log(sigma/alpha), whose default is for data of standard deviation 0.5.
      std: the standard deviation of it, positive.

    Returns:
      The `probabilities` of a consistency loss, float64 `(N,)`.

    Raises:
      ValueError: the grid does not descend, `std` is not positive, or the whole grid is so far from
        `mean` that nothing is left.
    """
    check_descent(grid)
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    with np.errstate(divide="ignore"):
        log_ratio = np.log(np.float64(grid.sigma)) - np.log(np.float64(grid.alpha))
    below = np.array([math.erf(z) for z in (log_ratio - mean) / (math.sqrt(2) * std)])
    mass = below[:-1] - below[1:]
    if not mass.sum() > 0:
        raise ValueError(f"no step of the grid is likely with mean {mean} and std {std}")
    return mass / mass.sum()


def consistency_training(
    apply_fn: Network,
    grid: Node,
    parameterization: Parameterization,
    *,
    distance: Distance | None = None,
    weighting: StepWeighting | None = inverse_gap,
    probabilities: ArrayLike | None = None,
    sigma_min: float = 0.0,
    dropout: bool = False,
) -> LossFn:
    """Makes the loss of a consistency model trained on data alone, eq. (3).

    With `probabilities=lognormal_steps(grid)` this is Song & Dhariwal 2023's.

    Args:
      apply_fn: `(params, x, noise_level, cond) -> output`, see `jaxdiff.base.Network`.
      grid: from noise to the end, `(N+1,)`; its last node has sigma/alpha = `sigma_min`.
      parameterization: what the network's output means, eq. (2): any but x0.
      distance: `squared`, `pseudo_huber(c)` (by default) or your own.
      weighting: `inverse_gap` or your own; None for 1.
      probabilities: how likely each step of the grid is, `(N,)`, summing to one; None for equally.
      sigma_min: the noise-to-signal ratio at the grid's end: 0 for clean data.
      dropout: whether to pass the network one key per example as `dropout_keys=`, the same for
        both nodes.

    Returns:
      `loss_fn(params, key, batch) -> (per_example, aux)`, batch and result as in `denoising_loss`;
      `t` in aux is that of the noisier node.

    Raises:
      ValueError: the grid goes up, ends elsewhere than at `sigma_min`, or starts at zero signal
        where the parameterization says nothing about clean data; the parameterization does not
        satisfy eq. (1); a weight of a step is not positive and finite; `probabilities` are none.
    """

    def cleaner(
        keys: Array, cond: PyTree, x0: Array, eps: Array, x: Array, now: Node, next: Node
    ) -> Array:
        del keys, cond, x, now
        return diffuse(x0, eps, next)

    return _loss(
        apply_fn, grid, parameterization, cleaner, distance, weighting, probabilities, sigma_min,
        dropout,
    )  # fmt: skip


def consistency_distillation(
    apply_fn: Network,
    teacher: Teacher,
    solver: Solver,
    grid: Node,
    parameterization: Parameterization,
    *,
    distance: Distance | None = None,
    weighting: StepWeighting | None = None,
    probabilities: ArrayLike | None = None,
    sigma_min: float = 0.0,
    dropout: bool = False,
) -> LossFn:
    """Makes the loss of a consistency model that learns a teacher's trajectories, eq. (3).

    Args:
      apply_fn: the student, `(params, x, noise_level, cond) -> output`.
      teacher: `cond -> denoiser`; of one without condition, `lambda cond: denoiser`.
      solver: a deterministic solver that takes `(B,)` nodes, such as `solvers.ddim()`, started anew
        in each step.
      grid: from noise to the end, `(N+1,)`; its last node has sigma/alpha = `sigma_min`.
      parameterization: what the student's output means, eq. (2): any but x0.
      distance: `squared`, `pseudo_huber(c)` (by default) or your own.
      weighting: `inverse_gap` or your own; None for 1, as in Song et al. 2023.
      probabilities: how likely each step of the grid is, `(N,)`, summing to one; None for equally.
      sigma_min: the noise-to-signal ratio at the grid's end: 0 for clean data.
      dropout: whether to pass the student one key per example as `dropout_keys=`, the same for
        both nodes.

    Returns:
      `loss_fn(params, key, batch) -> (per_example, aux)`, as `consistency_training` does.

    Raises:
      ValueError: as `consistency_training`.
    """

    def cleaner(
        keys: Array, cond: PyTree, x0: Array, eps: Array, x: Array, now: Node, next: Node
    ) -> Array:
        del x0, eps
        keys = rng.stream(keys, rng.Stream.STEP)  # of which a deterministic solver draws nothing
        state, _ = solver.step(keys, teacher(cond), solver.init(x, now), now, next)
        return state.x

    return _loss(
        apply_fn, grid, parameterization, cleaner, distance, weighting, probabilities, sigma_min,
        dropout,
    )  # fmt: skip


def _loss(
    apply_fn: Network,
    grid: Node,
    parameterization: Parameterization,
    cleaner: Callable[..., Array],
    distance: Distance | None,
    weighting: StepWeighting | None,
    probabilities: ArrayLike | None,
    sigma_min: float,
    dropout: bool,
) -> LossFn:
    num_steps = check_descent(grid) - 1
    _check_boundary(parameterization, sigma_min)
    _check_end(grid, sigma_min)
    check_signal(parameterization, starts_at_zero_snr(grid))
    _check_weights(weighting, grid)
    distance = pseudo_huber() if distance is None else distance
    levels = None if probabilities is None else _cumulated(probabilities, num_steps)

    def loss_fn(params: PyTree, key: Array, batch: Batch) -> tuple[Array, Mapping[str, Any]]:
        x0, eps, keys = draw(key, batch)
        cond = batch.get("cond")
        u = rng.uniform(rng.stream(keys, rng.Stream.TIME))
        if levels is None:
            step = uniform_index(u, num_steps)
        else:
            step = jnp.searchsorted(jnp.asarray(levels, u.dtype), u, side="right")
        now, next = grid[step], grid[step + 1]

        def function(params: PyTree, x: Array, node: Node) -> Array:
            # Both nodes have the same dropout; its keys are folded anew for each.
            network = with_dropout(apply_fn, keys, dropout)
            return _function(network, params, parameterization, cond, sigma_min)(x, node).x0

        x = diffuse(x0, eps, now)
        x_next = jax.lax.stop_gradient(cleaner(keys, cond, x0, eps, x, now, next))
        target = function(jax.lax.stop_gradient(params), x_next, next)
        loss = distance(function(params, x, now), target, batch.get("mask"))
        if weighting is not None:
            loss = weighting(now, next) * loss
        return loss, {"t": now.t, "loss": loss}

    return loss_fn


def _function(
    apply_fn: Network,
    params: PyTree,
    parameterization: Parameterization,
    cond: PyTree,
    sigma_min: float,
) -> Denoiser:
    def denoiser(x: Array, node: Node) -> Prediction:
        output = apply_fn(params, x, jnp.broadcast_to(node.t, x.shape[:1]), cond)
        sigma = jnp.maximum(node.sigma - sigma_min * node.alpha, 0)
        x0 = parameterization.x0(output.astype(x.dtype), x, Node(node.t, node.alpha, sigma))
        # At the end eq. (2) is x / alpha whatever the output; now also where that is not finite.
        end = Node(node.t, node.alpha, sigma).over(x)
        inside = end.sigma > 0
        return Prediction(jnp.where(inside, x0, x / jnp.where(inside, 1, end.alpha)))

    return denoiser


def _check_boundary(parameterization: Parameterization, sigma_min: float) -> None:
    if not 0 <= sigma_min < math.inf:
        raise ValueError(f"sigma_min must be finite and not negative, got {sigma_min}")
    with jax.ensure_compile_time_eval():
        clean = Node(jnp.int32(-1), jnp.float32(1), jnp.float32(0))
        _, b = parameterization.row(clean)
        vanishes = float(b) == 0
    if vanishes:
        raise ValueError(
            f"{parameterization.name} prediction does not leave clean data as it is, which a "
            "consistency function must: use predictions.edm(), v, eps or flow"
        )


def _check_end(grid: Node, sigma_min: float) -> None:
    if not is_concrete(grid.sigma):
        return
    end = float(np.asarray(grid.sigma)[-1]) / float(np.asarray(grid.alpha)[-1])
    if not math.isclose(end, sigma_min, rel_tol=1e-3, abs_tol=1e-7):
        raise ValueError(
            f"the grid ends at sigma/alpha = {end:.6g}, but sigma_min is {sigma_min:.6g}, where "
            "the trajectories end: pass the grid's, or end the grid there"
        )


def _check_weights(weighting: StepWeighting | None, grid: Node) -> None:
    if weighting is None or not is_concrete(grid.sigma):
        return
    with jax.ensure_compile_time_eval():
        weights = np.atleast_1d(weighting(grid[:-1], grid[1:]))
    bad = np.flatnonzero(~((weights > 0) & np.isfinite(weights))).tolist()
    if bad:
        raise ValueError(
            f"the weighting must be positive and finite, got {weights[bad[0]]} at step {bad[0]} of "
            "the grid: inverse_gap needs a grid that starts at alpha > 0; weighting=None does not"
        )


def _cumulated(probabilities: ArrayLike, num_steps: int) -> np.ndarray:
    given = np.asarray(probabilities, np.float64)
    if given.shape != (num_steps,) or not np.all(given >= 0) or not np.isclose(given.sum(), 1):
        raise ValueError(
            f"probabilities must be ({num_steps},), one for each step of the grid, not negative, "
            f"and sum to one, got {given}"
        )
    levels = np.cumsum(given)
    return levels / levels[-1]
