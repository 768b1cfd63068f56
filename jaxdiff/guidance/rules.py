"""Rules: how two beliefs in clean data become one.

A rule is a function `(conditional, unconditional, node) -> x0` of two arrays `(B, *spatial, C)`.
Write c and u for the two, d = c - u for what the condition changes, w for the scale. Then

    linear       x0 = u + w d = c + (w - 1) d                                              (1)
    projected    x0 = c + (w - 1) (d - p + eta p),    p = (<d, c> / <c, c>) c              (2)
    rescaled     x0 = (phi std(c) / std(g) + 1 - phi) g,    g from another rule            (3)

(Ho & Salimans 2022, eq. 6; Sadat et al. 2024; Lin et al. 2023, section 3.4), with inner
product and standard deviation over all axes of one example. Equation (1) has w = 1 for the
conditional belief alone and w = 0 for the unconditional one; the w of Ho & Salimans is w - 1 here.
As its weights sum to one, it says the same of noises, scores and velocities at the same x; the
other two are not linear and mean clean data.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from jaxdiff.base import Array, Node
from jaxdiff.guidance._scale import Scale, check_scale, read_scale

# Squared lengths and variances below this are as good as zero; gradients stay finite there too.
_FLOOR = 1e-12

Rule = Callable[[Array, Array, Node], Array]
"""`(conditional, unconditional, node) -> x0`, all `(B, *spatial, C)`; examples stay apart."""


def linear(scale: Scale) -> Rule:
    """Goes on along what the condition changes, eq. (1): classifier-free guidance.

    Args:
      scale: w; 1 for the conditional belief, 0 for the unconditional one. A number, an array
        `(B,)`, or a function of the node.

    Returns:
      The rule.

    Raises:
      TypeError: `scale` is not such.
      ValueError: `scale` is not finite, or has more than one axis.
    """
    check_scale(scale)

    def rule(conditional: Array, unconditional: Array, node: Node) -> Array:
        w = read_scale(scale, node, conditional)
        return unconditional + w * (conditional - unconditional)

    return rule


def projected(scale: Scale, eta: float = 0.0, norm_threshold: float | None = None) -> Rule:
    """Leaves out what only makes the conditional belief larger, eq. (2).

    High scales oversaturate through the part of d that is parallel to c (adaptive projected
    guidance, Sadat et al. 2024). The reverse momentum of that paper remembers d from
    step to step, which a denoiser cannot, so there is none here.

    Args:
      scale: w, as in `linear`.
      eta: how much of the parallel part stays; 1 for `linear`.
      norm_threshold: an example's d is first shortened to this Euclidean length if it is longer;
        None for no bound.

    Returns:
      The rule.

    Raises:
      TypeError: `scale` is not as in `linear`.
      ValueError: so too, or `norm_threshold` is not positive.
    """
    check_scale(scale)
    if norm_threshold is not None and not norm_threshold > 0:
        raise ValueError(f"norm_threshold must be positive, or None, got {norm_threshold}")

    def rule(conditional: Array, unconditional: Array, node: Node) -> Array:
        axes = tuple(range(1, conditional.ndim))

        def inner(a: Array, b: Array) -> Array:
            return jnp.sum(a * b, axis=axes, keepdims=True)

        w = read_scale(scale, node, conditional)
        change = conditional - unconditional
        if norm_threshold is not None:
            norm = jnp.sqrt(jnp.maximum(inner(change, change), _FLOOR))
            change = change * jnp.minimum(1, norm_threshold / norm)
        along = inner(change, conditional) / jnp.maximum(inner(conditional, conditional), _FLOOR)
        return conditional + (w - 1) * (change + (eta - 1) * along * conditional)

    return rule


def rescaled(rule: Rule, phi: float = 0.7) -> Rule:
    """Gives the result of a rule the contrast of the conditional belief, eq. (3).

    Lin et al. rescale the network's output; here it is the clean data, for any parameterization.

    Args:
      rule: the rule, such as `linear(7.5)`.
      phi: how much of it, from 0 for `rule` itself to 1.

    Returns:
      The rule.

    Raises:
      ValueError: `phi` lies outside [0, 1].
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must lie in [0, 1], got {phi}")

    def contrast(conditional: Array, unconditional: Array, node: Node) -> Array:
        guided = rule(conditional, unconditional, node)
        axes = tuple(range(1, guided.ndim))
        # Data of one value have no contrast to rescale: then the ratio is one.
        wanted = jnp.var(conditional, axis=axes, keepdims=True) + _FLOOR
        ratio = jnp.sqrt(wanted / (jnp.var(guided, axis=axes, keepdims=True) + _FLOOR))
        return (phi * ratio + 1 - phi) * guided

    return contrast
