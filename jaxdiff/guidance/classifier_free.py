"""Guidance by two denoisers: one that knows the condition, and one that knows less.

What is made of their two beliefs is a rule (`jaxdiff.guidance.rules`); `combine` and
`combine_stacked` ask each denoiser once and hand both beliefs to it. The rest are short recipes:

| name | is |
| --- | --- |
| `classifier_free(c, u, w)` | `combine(c, u, rules.linear(w))` |
| `autoguidance(d, weak, w)` | `classifier_free(d, weak, w)` |
| `adaptive_projected(c, u, w)` | `combine(c, u, rules.projected(w))` |
| `cfg_plus_plus(c, u, lambda, grid)` | `classifier_free(c, u, w)` with the w of eq. (2) |
| rescaled classifier-free guidance | `combine(c, u, rules.rescaled(rules.linear(w), phi))` |

CFG++ (Chung et al. 2024) takes DDIM's step with the clean data of a small scale, but with the noise
of the unconditional denoiser. With c and u the two beliefs and d = c - u, the step from t to s,

    x_s = alpha_s (u + lambda d) + sigma_s (x_t - alpha_t u) / sigma_t,                    (1)

is DDIM's step x_s = alpha_s x0 + sigma_s (x_t - alpha_t x0) / sigma_t with x0 = u + w d, where

    w = lambda / (1 - r_s / r_t),    r = sigma / alpha,                                    (2)

since both sides then hold (alpha_s - sigma_s alpha_t / sigma_t) w d = alpha_s lambda d.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxdiff._checks import is_concrete
from jaxdiff.base import Array, Denoiser, Node, Prediction, PyTree
from jaxdiff.guidance import rules
from jaxdiff.guidance._scale import Scale, check_scale, known_scale
from jaxdiff.guidance.rules import Rule

# Levels closer than this are one node, whose float32 fields were computed in two ways.
_SAME_LEVEL = 1e-5


def combine(conditional: Denoiser, unconditional: Denoiser, rule: Rule) -> Denoiser:
    """Makes one denoiser of two by a rule; each is called once.

    Args:
      conditional: the denoiser that knows the condition.
      unconditional: the denoiser that does not, or that is to be moved away from, such as one with
        a negative prompt.
      rule: `(conditional x0, unconditional x0, node) -> x0`, see `jaxdiff.guidance.rules`.

    Returns:
      The denoiser; `variance` is that of the conditional one.

    Example:
      >>> from jaxdiff import denoisers, schedules
      >>> c, u = denoisers.gaussian([0.5, 0.1], 0.2), denoisers.gaussian([0.0, 0.0], 1.0)
      >>> rescaled = rules.rescaled(rules.linear(7.5), phi=0.7)
      >>> denoiser = combine(c.denoiser, u.denoiser, rescaled)
      >>> denoiser(jnp.zeros((1, 2)), schedules.linear().at(999)).evaluations
      2
    """

    def combined(x: Array, node: Node) -> Prediction:
        known, less = conditional(x, node), unconditional(x, node)
        return known._replace(
            x0=rule(known.x0, less.x0, node), evaluations=known.evaluations + less.evaluations
        )

    return combined


def combine_stacked(denoiser: Denoiser, rule: Rule) -> Denoiser:
    """Makes one denoiser of two by a rule, in one call of a batch of twice the size.

    Args:
      denoiser: a denoiser made for a batch of 2B, with the B conditions first and B times "no
        condition" after them; see `stack_cond`.
      rule: as in `combine`.

    Returns:
      The denoiser for a batch of B; it counts two evaluations per example.

    Raises:
      ValueError: when called, if the prediction is not for 2B examples.
    """

    def combined(x: Array, node: Node) -> Prediction:
        twice = jax.tree.map(lambda f: jnp.concatenate([f, f]) if jnp.ndim(f) else f, node)
        both = denoiser(jnp.concatenate([x, x]), twice)
        num = x.shape[0]
        if both.x0.shape[0] != 2 * num:
            raise ValueError(
                f"the denoiser was given a stacked batch of {2 * num} and must predict as many, "
                f"got {both.x0.shape[0]}"
            )
        return both._replace(
            x0=rule(both.x0[:num], both.x0[num:], node),
            variance=None if both.variance is None else both.variance[:num],
            evaluations=2 * both.evaluations,
        )

    return combined


def stack_cond(cond: PyTree, null_cond: PyTree) -> PyTree:
    """Concatenates conditions and "no condition" along the batch, for `combine_stacked`.

    Args:
      cond: the conditions, a pytree of arrays `(B, ...)`.
      null_cond: what the network was told in training where the condition was dropped: same
        structure and shapes.

    Returns:
      The pytree of arrays `(2B, ...)`.

    Raises:
      ValueError: structures or shapes differ.

    Example:
      >>> stack_cond({"label": jnp.array([3, 7])}, {"label": jnp.array([10, 10])})
      {'label': Array([ 3,  7, 10, 10], dtype=int32)}
    """
    structures = jax.tree.structure(cond), jax.tree.structure(null_cond)
    if structures[0] != structures[1]:
        raise ValueError(
            "cond and null_cond must have the same structure, "
            f"got {structures[0]} and {structures[1]}"
        )

    def stack(given: Array, null: Array) -> Array:
        if jnp.shape(given) != jnp.shape(null) or not jnp.ndim(given):
            raise ValueError(
                "cond and null_cond must have the same shapes (B, ...), got "
                f"{jnp.shape(given)} and {jnp.shape(null)}: see jnp.full_like, jnp.broadcast_to"
            )
        return jnp.concatenate([given, null])

    return jax.tree.map(stack, cond, null_cond)


def classifier_free(conditional: Denoiser, unconditional: Denoiser, scale: Scale) -> Denoiser:
    """Classifier-free guidance: u + scale (c - u), `rules` eq. (1).

    Args:
      conditional: the denoiser that knows the condition, c.
      unconditional: the denoiser that does not, u.
      scale: 1 for the conditional denoiser alone, 0 for the unconditional one: then, if it is one
        number known while tracing, only that one is called. (The w of Ho & Salimans is scale - 1.)
        Otherwise both are called: more than 1 to exaggerate the condition, an array `(B,)`, or a
        function of the node.

    Returns:
      The denoiser; `variance` is that of the conditional one, if it is called.

    Raises:
      TypeError: `scale` is not a number, an array or a function.
      ValueError: `scale` is not finite, or has more than one axis.
    """
    check_scale(scale)
    if known_scale(scale) == 1:
        return conditional
    if known_scale(scale) == 0:
        return unconditional
    return combine(conditional, unconditional, rules.linear(scale))


def classifier_free_stacked(denoiser: Denoiser, scale: Scale) -> Denoiser:
    """Classifier-free guidance in one call of a batch of twice the size.

    Both halves are computed whatever the scale is; where it is 0 or 1, use the denoiser of one
    half.

    Args:
      denoiser: a denoiser for `[conditions; no conditions]`, see `combine_stacked`, `stack_cond`.
      scale: as in `classifier_free`.

    Returns:
      The denoiser for a batch of half the size; it counts two evaluations per example.

    Raises:
      TypeError: `scale` is not a number, an array or a function.
      ValueError: `scale` is not finite, or has more than one axis.
    """
    return combine_stacked(denoiser, rules.linear(scale))


def autoguidance(denoiser: Denoiser, weak: Denoiser, scale: Scale) -> Denoiser:
    """Moves away from a worse version of the denoiser (Karras et al. 2024, section 4).

    Args:
      denoiser: the denoiser, with its condition if there is one.
      weak: a smaller or less trained one of the same data and condition.
      scale: as in `classifier_free`; 1 for `denoiser` alone.

    Returns:
      The denoiser.

    Raises:
      TypeError: `scale` is not a number, an array or a function.
      ValueError: `scale` is not finite, or has more than one axis.
    """
    return classifier_free(denoiser, weak, scale)


def adaptive_projected(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: Scale,
    eta: float = 0.0,
    norm_threshold: float | None = None,
) -> Denoiser:
    """Adaptive projected guidance, without its momentum; see `rules.projected`.

    Args:
      conditional: the denoiser that knows the condition.
      unconditional: the denoiser that does not.
      scale: as in `classifier_free`; where it is known to be 1 only the conditional one is called.
      eta: how much of the change parallel to the conditional belief stays.
      norm_threshold: the greatest length of an example's change, or None.

    Returns:
      The denoiser; `variance` is that of the conditional one.

    Raises:
      TypeError: `scale` is not a number, an array or a function.
      ValueError: `scale` is not finite or has more than one axis, or `norm_threshold` is not
        positive.
    """
    rule = rules.projected(scale, eta, norm_threshold)
    if known_scale(scale) == 1:
        return conditional
    return combine(conditional, unconditional, rule)


def cfg_plus_plus(
    conditional: Denoiser, unconditional: Denoiser, scale: Scale, grid: Node
) -> Denoiser:
    """CFG++: the clean data are guided, the noise is the unconditional one's, eqs. (1, 2).

    It is classifier-free guidance with a scale that depends on where the step goes, so it needs the
    grid, and is CFG++ under `solvers.ddim()` on that grid (eta = 0) and under no other solver. That
    scale grows with the number of steps, and so the `x0` of this denoiser is not one to look at nor
    to clip: if anything, clip the two denoisers inside.

    Args:
      conditional: the denoiser that knows the condition.
      unconditional: the denoiser that does not.
      scale: lambda, mostly in [0, 1]; a number, an array `(B,)`, or a function of the node. Where
        it is known to be 0, only the unconditional denoiser is called.
      grid: the grid that is sampled on, fields `(N+1,)`; it may go up. Of the moves towards data
        that hold the node at hand, the step is taken to be the one that starts closest to it; where
        there is none, as at the last node, it is taken to end at clean data.

    Returns:
      The denoiser; `variance` is that of the conditional one, if it is called.

    Raises:
      TypeError: `scale` is not a number, an array or a function.
      ValueError: `scale` is not finite or has more than one axis, or the grid has fewer than two
        nodes.
    """
    check_scale(scale)
    if jnp.ndim(grid.sigma) != 1 or grid.sigma.shape[0] < 2:
        raise ValueError(
            f"a grid needs fields (N+1,) with N >= 1, got {jnp.shape(grid.sigma)}: "
            "see jaxdiff.grids"
        )
    if known_scale(scale) == 0:
        return unconditional
    levels = _noise_to_signal(grid)
    starts, ends = levels[:-1], levels[1:]

    @jnp.vectorize
    def growth(level: Array) -> Array:
        """Returns w / lambda, eq. (2), at a level of noise `()`."""
        least = level * (1 - _SAME_LEVEL)
        holds = (ends < least) & (least <= starts)
        found = jnp.any(holds)
        # The bound keeps a start without signal apart from no start.
        move = jnp.argmin(jnp.where(holds, jnp.minimum(starts, 1e30), jnp.inf))
        return 1 / (1 - jnp.where(found, ends[move] / jnp.where(found, level, 1), 0))

    def guide(node: Node) -> Array:
        return (scale(node) if callable(scale) else scale) * growth(_noise_to_signal(node))

    return combine(conditional, unconditional, rules.linear(guide))


def interval(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Guides between two levels of noise only (Kynkäänniemi et al. 2024).

    At a node with scalar fields, as in sampling, only the denoiser in force is called. Where each
    example has a node of its own, both are called, and both are counted for all.

    Args:
      guided: the denoiser in force where low < sigma / alpha <= high.
      plain: the denoiser in force elsewhere; in the paper the conditional one.
      low: the lower bound of the noise-to-signal ratio sigma / alpha, which is EDM's and the
        paper's sigma, and exp(-log_snr / 2); not negative.
      high: the upper bound; infinity for no bound.

    Returns:
      The denoiser.

    Raises:
      ValueError: known bounds are not 0 <= low < high; when called, if only one of the denoisers
        predicts a variance.
    """
    if is_concrete(low) and is_concrete(high) and not 0 <= low < high:
        raise ValueError(
            f"the interval of sigma / alpha must have 0 <= low < high, got {low} and {high}"
        )

    def limited(x: Array, node: Node) -> Prediction:
        has_variance = []

        def ask(denoiser: Denoiser) -> Prediction:
            prediction = denoiser(x, node)
            has_variance.append(prediction.variance is not None)
            if len(set(has_variance)) > 1:
                raise ValueError(
                    "guided and plain must both predict a variance, or neither: wrap the one that "
                    "does so that it returns prediction._replace(variance=None)"
                )
            return prediction._replace(evaluations=jnp.asarray(prediction.evaluations, jnp.int32))

        level = _noise_to_signal(node)
        inside = (low < level) & (level <= high)
        if not inside.ndim:
            return jax.lax.cond(inside, lambda: ask(guided), lambda: ask(plain))
        one, other = ask(guided), ask(plain)
        inside = inside.reshape(inside.shape + (1,) * (x.ndim - 1))
        chosen = jax.tree.map(
            lambda a, b: jnp.where(inside, a, b), (one.x0, one.variance), (other.x0, other.variance)
        )
        return Prediction(*chosen, one.evaluations + other.evaluations)

    return limited


def _noise_to_signal(node: Node) -> Array:
    """Returns sigma / alpha, infinity where there is no signal."""
    signal = node.alpha > 0
    return jnp.where(signal, node.sigma / jnp.where(signal, node.alpha, 1), jnp.inf)
