"""Editing: from data to latents and back, from image to image, and around what is known.

A deterministic sampler is a map from noise to data, and has an inverse. A DDIM step takes x_t to

    x_s = alpha_s x0(x_t) + sigma_s eps(x_t),    x_t = alpha_t x0(x_t) + sigma_t eps(x_t)  (1)

(Song et al. 2021, eq. 12). Inverting it is solving eq. (1) for x_t. The usual inversion (section
4.3 there; Dhariwal & Nichol 2021, appendix F) takes eps at x_s, as if it did not change over the
step, which leaves an error in each step. Iterating removes it (Pan et al. 2023; Garibi et al.
2024):

    x_t <- x_t + k w (x_s - x_s(x_t)),    w = (alpha_t² c² + sigma_t²) /
                                              (alpha_s alpha_t c² + sigma_s sigma_t)       (2)

with w the inverse slope of eq. (1) for Gaussian data of standard deviation c, and a factor k per
example that adapts to the slope met (Barzilai & Borwein 1988, their second step size). Where x_s is
clean, this is the hard part: there eq. (1) says x0(x_t) = x_s, and what a denoiser takes for noise
can only be told by small differences. In a direction in which the denoiser's x0(x_t) has the slope
j, eq. (1) has the slope

    (alpha_s - r alpha_t) j + r,    r = sigma_s / sigma_t                                  (3)

and eq. (2) leads to its solution where that is positive. True denoisers have j >= 0. Trained ones
have slopes down to -0.5 where the noise is small, though not where it is least. So a grid that is
to be inverted must have its nodes close together near the data, the last noisy one at the
schedule's least noise: `grids.quadratic` has, `grids.trailing` has not.

Example:
  >>> from jaxdiff import denoisers, grids, sampling, schedules, solvers
  >>> exact = denoisers.gaussian(jnp.zeros((4, 4, 1)), 0.5)
  >>> grid, x0 = grids.trailing(schedules.linear(), 10), jnp.full((2, 4, 4, 1), 0.3)
  >>> keys = rng.per_example(jax.random.key(0), jnp.arange(2))
  >>> latent = invert(exact.denoiser, grid, x0)
  >>> again, _ = sampling.walk(keys, exact.denoiser, solvers.ddim(), grid, latent)
  >>> print(f"{jnp.abs(again - x0).max():.3f}")
  0.000
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import rng, sampling
from jaxdiff._checks import check_float, check_same_shape, is_concrete
from jaxdiff.base import Array, Denoiser, Info, Node, Solver, SolverState
from jaxdiff.predictions import eps_from_x0
from jaxdiff.process import diffuse

_DATA_STD = 0.5  # c of eq. (2), for data in [-1, 1]


def invert(
    denoiser: Denoiser,
    grid: Node,
    x0: Array,
    *,
    iterations: int = 5,
    clean_iterations: int = 30,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, sampling.Record]:
    """Finds the noise from which `solvers.ddim()` on the same grid makes x0.

    Args:
      denoiser: the denoiser. Data that it would not draw are met as closely as the iterations
        reach.
      grid: the nodes of the way down, fields `(N+1,)`; it is walked backwards.
      x0: the state at the grid's last node, `(B, *spatial, C)`: data, where that is clean.
      iterations: evaluations in each step, see `ddim_inversion`.
      clean_iterations: evaluations in the step that starts from clean data.
      trajectory_every: keep each so-many-th state, as in `sampling.sample`.

    Returns:
      The states at the grid's first node, shape of `x0`; with `trajectory_every`,
      `(states, Record)`.

    Raises:
      TypeError: `x0` is not floating.
      ValueError: a number of iterations is less than 1, or the grid goes up somewhere or has fewer
        than two nodes.
    """
    x0 = check_float("x0", x0)
    _check_grid(grid)
    if all(is_concrete(field) for field in jax.tree.leaves(grid)):
        alpha, sigma = np.asarray(grid.alpha, np.float64), np.asarray(grid.sigma, np.float64)
        if np.any(sigma[1:] * alpha[:-1] > sigma[:-1] * alpha[1:]):
            raise ValueError("only a grid that goes down all the way can be inverted")
    x, record = sampling.walk(
        rng.per_example(jax.random.key(0), jnp.arange(x0.shape[0])),  # nothing is drawn
        denoiser,
        ddim_inversion(iterations, clean_iterations),
        grid[::-1],
        x0,
        trajectory_every=trajectory_every,
    )
    return x if trajectory_every is None else (x, record)


def ddim_inversion(iterations: int = 5, clean_iterations: int = 30) -> Solver:
    """The solver that walks a grid backwards, from data to noise, undoing `solvers.ddim()`.

    Args:
      iterations: evaluations in each step. 1 is the usual inversion, eps at the cleaner node; each
        more is one iteration of eq. (2). Few suffice.
      clean_iterations: the same for the step that starts from clean data, which needs more. With 1,
        eps is that at alpha_t x0, a clean node having none.

    Returns:
      The solver, for grids from data to noise.

    Raises:
      ValueError: a number of iterations is less than 1.
    """
    if iterations < 1 or clean_iterations < 1:
        raise ValueError(
            "iterations and clean_iterations must be at least 1, got "
            f"{iterations} and {clean_iterations}"
        )

    def step(
        keys: Array, denoiser: Denoiser, state: SolverState, now: Node, next: Node
    ) -> tuple[SolverState, Info]:
        x, clean = state.x, now.sigma == 0
        s, t = now.over(x), next.over(x)
        ratio = t.alpha / s.alpha
        at = jax.tree.map(lambda a, b: jnp.where(clean, a, b), next, now)
        start = jnp.where(s.sigma == 0, ratio, 1) * x
        prediction = denoiser(start, at)
        eps = eps_from_x0(prediction.x0, start, at)
        guess = ratio * x + (t.sigma - ratio * s.sigma) * eps

        signal = s.alpha * t.alpha * _DATA_STD**2
        slope = (signal + s.sigma * t.sigma) / ((t.alpha * _DATA_STD) ** 2 + t.sigma**2)
        # A step straight from clean data to no signal has slope 0, and no inverse.
        scale = 1 / jnp.maximum(slope, 1e-3)

        def improve(_: Array, carry: tuple) -> tuple:
            y, base, missing, size, least, evaluations, _ = carry
            prediction = denoiser(y, next)
            x0, eps = prediction.x0, eps_from_x0(prediction.x0, y, next)
            left = scale * (x - s.alpha * x0 - s.sigma * eps)
            norm = _dot(left, left)
            # If it went too far: back to where the step came from, and on by a quarter of it.
            good = norm <= 2 * least
            size = jnp.where(good, _step_size(y - base, missing - left), size / 4)
            base, missing = jnp.where(good, y, base), jnp.where(good, left, missing)
            evaluations = evaluations + prediction.evaluations
            least = jnp.minimum(least, norm)
            return base + size * missing, base, missing, size, least, evaluations, x0

        one = jnp.ones_like(_dot(x, x))
        evaluations = jnp.asarray(prediction.evaluations, jnp.int32)
        carry = (guess, guess, jnp.zeros_like(x), one, jnp.inf * one, evaluations, prediction.x0)
        count = iterations
        if clean_iterations != iterations:
            count = jnp.where(jnp.any(clean), clean_iterations, iterations)
        y, *_, evaluations, x0 = jax.lax.fori_loop(1, count, improve, carry)
        return SolverState(y), Info(x0, evaluations)

    return Solver(lambda x, node: SolverState(x), step, climbs=True)


def image_to_image(
    key: Array,
    denoiser: Denoiser,
    solver: Solver,
    grid: Node,
    x0: Array,
    strength: float,
    *,
    first_index: Array | int = 0,
    trajectory_every: int | None = None,
) -> Array | tuple[Array, sampling.Record]:
    """Noises data to a node of the grid and walks on from there (SDEdit, Meng et al. 2022).

    Args:
      key: one typed key, the seed's; example i draws what sample i of `sampling.sample` draws.
      denoiser: the denoiser.
      solver: the solver.
      grid: the nodes of the whole way, fields `(N+1,)`.
      x0: the data to start from, `(B, *spatial, C)`.
      strength: the share of the grid's steps to walk, rounded to whole steps, in [0, 1]. 0 returns
        x0 itself on a grid that ends at clean data, without an evaluation.
      first_index: the number of the first example, `()`.
      trajectory_every: keep each so-many-th state, as in `sampling.sample`.

    Returns:
      The samples, shape of `x0`; with `trajectory_every`, `(samples, Record)`.

    Raises:
      TypeError: `key` is not one typed key, or `x0` not floating.
      ValueError: `strength` lies outside [0, 1] or is not known, or the grid has fewer than two
        nodes.
    """
    x0 = check_float("x0", x0)
    if not is_concrete(strength) or not 0 <= strength <= 1:
        raise ValueError(
            f"strength must be a number in [0, 1], known outside of jit, got {strength}: it "
            "decides how many steps are taken"
        )
    num_steps = _check_grid(grid)
    rest = grid[num_steps - round(float(strength) * num_steps) :]
    keys = rng.per_example(key, first_index + jnp.arange(x0.shape[0]))
    noise = rng.normal(rng.stream(keys, rng.Stream.START), x0.shape[1:], x0.dtype)
    x = diffuse(x0, noise, rest[0])
    if rest.sigma.shape[0] == 1:
        nothing = jnp.zeros((0, *x.shape), x.dtype)
        record = sampling.Record(jnp.int32(0), nothing, nothing)
    else:
        x, record = sampling.walk(
            keys, denoiser, solver, rest, x, trajectory_every=trajectory_every
        )
    return x if trajectory_every is None else (x, record)


def inpaint(solver: Solver, known: Array, mask: Array) -> Solver:
    """Makes a solver keep to what is known (RePaint, Lugmayr et al. 2022, eq. 8).

    Before and after each step, what is known is put in place, noised to the node with noise of its
    own; at a clean node it is `known` itself. What is drawn sees it through the denoiser only and
    may not fit it well; on a grid from `grids.resample` the two adapt to each other.

    Args:
      solver: any solver for the way down; its state's x is replaced.
      known: clean data, `(B, *spatial, C)` or `(1, *spatial, C)`; unread where the mask is 0.
      mask: 1 (or True) where the data is known and 0 elsewhere, broadcastable against `known` and
        of as many axes.

    Returns:
      The solver, with as many evaluations.

    Raises:
      TypeError: `known` is not floating.
      ValueError: the mask does not fit or has other values, or the solver climbs.
    """
    known, mask = check_float("known", known), jnp.asarray(mask)
    if solver.climbs:
        raise ValueError("inpaint needs a solver that walks down, got one that climbs")
    fits = mask.ndim == known.ndim and all(
        m in (1, k) or (k == 1 and axis == 0)
        for axis, (m, k) in enumerate(zip(mask.shape, known.shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"mask must have as many axes as known and broadcast, got {mask.shape}, {known.shape}: "
            "for a mask (H, W) pass mask[None, :, :, None]"
        )
    if mask.dtype != bool and is_concrete(mask) and not np.all((mask == 0) | (mask == 1)):
        raise ValueError("mask must be boolean, or 0 and 1 only")
    mask = mask != 0

    def put(keys: Array, x: Array, node: Node) -> Array:
        # By the node too: the keys of a `one_path` solver are the same in every step.
        own = rng.at_node(rng.stream(keys, rng.Stream.KNOWN), node)
        noise = rng.normal(own, x.shape[1:], x.dtype)
        clean = jnp.broadcast_to(known.astype(x.dtype), x.shape)
        noisy = jnp.where(node.over(x).sigma > 0, diffuse(clean, noise, node), clean)
        return jnp.where(mask, noisy, x)

    def step(
        keys: Array, denoiser: Denoiser, state: Any, now: Node, next: Node
    ) -> tuple[Any, Info]:
        state = state._replace(x=put(keys, state.x, now))
        state, info = solver.step(keys, denoiser, state, now, next)
        return state._replace(x=put(keys, state.x, next)), info

    return Solver(solver.init, step, one_path=solver.one_path)


def spherical_interpolation(a: Array, b: Array, weight: Array | float) -> Array:
    """Goes from a to b along the great circle, so that noise stays as long as noise is.

    (sin((1-w) theta) a + sin(w theta) b) / sin(theta), theta the angle between an example's a and b
    (Shoemake 1985; Song et al. 2021, appendix D.5). Where they are parallel or opposite, so that
    no circle is given, the line is taken.

    Args:
      a: latents `(B, ...)`.
      b: latents, shape of `a`.
      weight: 0 for a, 1 for b; `()`, or `(B,)` for each example its own.

    Returns:
      The latents between, shape of `a`.

    Raises:
      TypeError: `a` or `b` is not floating.
      ValueError: shapes do not fit.
    """
    a, b = check_float("a", a), check_float("b", b)
    check_same_shape(a=a, b=b)
    weight = jnp.asarray(weight, a.dtype)
    if weight.shape not in ((), a.shape[:1]):
        raise ValueError(f"weight must have shape () or {a.shape[:1]}, got {weight.shape}")
    if weight.ndim:
        weight = weight.reshape(weight.shape + (1,) * (a.ndim - 1))
    unit_a, unit_b = (v / _root(_dot(v, v), 1) for v in (a, b))
    apart, along = unit_a - unit_b, unit_a + unit_b
    # From both lengths: near 0 and pi the cosine alone would lose the angle.
    sine = _root(_dot(apart, apart) * _dot(along, along), 0) / 2
    theta = jnp.arctan2(sine, jnp.where(sine > 0, _dot(unit_a, unit_b), 1))
    on_circle = jnp.sin(theta) > 1e-4
    safe = jnp.where(on_circle, jnp.sin(theta), 1)
    share_a = jnp.where(on_circle, jnp.sin((1 - weight) * theta) / safe, 1 - weight)
    share_b = jnp.where(on_circle, jnp.sin(weight * theta) / safe, weight)
    return share_a * a + share_b * b


def _check_grid(grid: Node) -> int:
    shape = jnp.shape(grid.sigma)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"a grid needs fields (N+1,) with N >= 1, got {shape}: see jaxdiff.grids")
    return shape[0] - 1


def _step_size(change: Array, drop: Array) -> Array:
    """Barzilai & Borwein's: of the last change of x_t and what was missing less after it."""
    along, square = _dot(change, drop), _dot(drop, drop)
    usual = (along > 0) & (square > 0)
    return jnp.clip(jnp.where(usual, along / jnp.where(usual, square, 1), 1), 0.02, 50)


def _root(square: Array, otherwise: float) -> Array:
    """Returns the square root, or `otherwise` at zero, where it has no gradient."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), otherwise)


def _dot(a: Array, b: Array) -> Array:
    """Returns the scalar product of each example, `(B, 1, ..., 1)`."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)
