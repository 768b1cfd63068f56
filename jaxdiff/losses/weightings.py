"""Weightings: how much the error at each noise level counts.

The weightings of the literature are stated on the error in x0, in the noise, or in whatever the
paper's network predicts. Here each is brought to the error in x0, and from there by

    w_out = w_x0 |d x0 / d out|² = w_x0 sigma² / (b alpha - sigma a)²                      (1)

(`jaxdiff.predictions`, eq. 3) to that of the output. So a weighting means the same loss whatever
the network predicts. With SNR = alpha² / sigma² and lambda = log SNR, the weights on the error in
x0 are

| weighting | w_x0 | source |
| --- | --- | --- |
| snr | SNR: the unweighted error of the noise | Ho et al. 2020, eq. 14 |
| truncated_snr | max(SNR, 1) | Salimans & Ho 2022, section 4 |
| snr_plus_one | SNR + 1: the unweighted error of v | Salimans & Ho 2022, section 4 |
| min_snr | min(SNR, gamma) | Hang et al. 2023, eq. 9 |
| p2 | SNR / (k + SNR)^gamma | Choi et al. 2022 |
| sigmoid | SNR sigmoid(bias - lambda) | Kingma & Gao 2023; Hoogeboom et al. 2024 |
| edm | 1 / sigma_data² + SNR | Karras et al. 2022, table 1 |
| flow_matching | ((alpha + sigma) / sigma)² | Lipman et al. 2023; Liu et al. 2023 |
| elbo | SNR (-d lambda / dt) / 2 | Kingma et al. 2021 (VDM), section 5 |

`unit` alone is a weight on the output itself. The limits at the two ends of a schedule, sigma = 0
and alpha = 0, are taken a hair inside, at a ratio of 1e-8: a weight is finite there where its limit
is, and very large where that is infinite.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.base import Array, Node, Schedule
from jaxdiff.predictions import Parameterization

Weighting = Callable[[Parameterization, Node], Array]
"""`(parameterization, node) -> w`, the weight of the squared error of the output, `(B,)`."""


def unit(parameterization: Parameterization, node: Node) -> Array:
    """Weight 1 on the output's error: L_simple for eps prediction (Ho et al. 2020, eq. 14)."""
    del parameterization
    return jnp.ones_like(node.alpha)


def snr(parameterization: Parameterization, node: Node) -> Array:
    """Weight SNR = alpha²/sigma² on the error in x0.

    Whatever the network predicts, this is the unweighted loss of the noise (Salimans & Ho 2022,
    section 4).
    """
    node = _inside(node)
    return _from_x0_weight(node.alpha**2, parameterization, node)


def truncated_snr(parameterization: Parameterization, node: Node) -> Array:
    """Weight max(SNR, 1) on the error in x0 (Salimans & Ho 2022, section 4)."""
    node = _inside(node)
    return _from_x0_weight(jnp.maximum(node.alpha, node.sigma) ** 2, parameterization, node)


def snr_plus_one(parameterization: Parameterization, node: Node) -> Array:
    """Weight SNR + 1 on the error in x0 (Salimans & Ho 2022, section 4).

    Where alpha² + sigma² = 1 this is the unweighted loss of v.
    """
    node = _inside(node)
    return _from_x0_weight(node.alpha**2 + node.sigma**2, parameterization, node)


def flow_matching(parameterization: Parameterization, node: Node) -> Array:
    """The unweighted loss of the flow eps - x0 (Lipman et al. 2023; Liu et al. 2023).

    Weight ((alpha + sigma) / sigma)² on the error in x0: 1 / sigma² for a rectified flow, where
    alpha + sigma = 1. It does not change with the scale of the process.
    """
    node = _inside(node)
    return _from_x0_weight((node.alpha + node.sigma) ** 2, parameterization, node)


def min_snr(gamma: float = 5.0) -> Weighting:
    """Weight min(SNR, gamma) on the error in x0 (Hang et al. 2023, eq. 9).

    Args:
      gamma: where the weight is cut, positive.

    Raises:
      ValueError: `gamma` is not positive.
    """
    _check_positive("gamma", gamma)

    def weighting(parameterization: Parameterization, node: Node) -> Array:
        node = _inside(node)
        weight = jnp.minimum(node.alpha**2, gamma * node.sigma**2)
        return _from_x0_weight(weight, parameterization, node)

    return weighting


def p2(k: float = 1.0, gamma: float = 1.0) -> Weighting:
    """Weight 1 / (k + SNR)^gamma on the error in the noise (P2, Choi et al. 2022).

    Args:
      k: bounds the weight at low signal, positive.
      gamma: how much the clean end is held down, not negative; 0 for `snr`.

    Raises:
      ValueError: `k` is not positive or `gamma` is negative.
    """
    _check_positive("k", k)
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")

    def weighting(parameterization: Parameterization, node: Node) -> Array:
        node = _inside(node)
        weight = (node.sigma**2 / (k * node.sigma**2 + node.alpha**2)) ** gamma
        return _from_x0_weight(node.alpha**2 * weight, parameterization, node)

    return weighting


def sigmoid(bias: float = 0.0) -> Weighting:
    """A falling sigmoid of the log-SNR on the error in the noise (Kingma & Gao 2023).

    The weight is sigmoid(bias - lambda). The papers multiply it by -d lambda / dt, which makes the
    loss independent of the schedule; so do here times whose log-SNR is drawn uniformly.

    Args:
      bias: the log-SNR above which the weight falls off; lower for larger images (Hoogeboom et al.
        2024, "Simpler diffusion").
    """

    def weighting(parameterization: Parameterization, node: Node) -> Array:
        node = _inside(node)
        weight = jax.nn.sigmoid(bias - node.log_snr)
        return _from_x0_weight(node.alpha**2 * weight, parameterization, node)

    return weighting


def edm(sigma_data: float = 0.5) -> Weighting:
    """The weight of EDM (Karras et al. 2022, table 1).

    (s² + sigma_data²) / (s sigma_data)² on the error in x0, s = sigma / alpha: the unweighted loss
    of the preconditioned output F of `predictions.edm(sigma_data)`.

    Args:
      sigma_data: the standard deviation of the data, positive.

    Raises:
      ValueError: `sigma_data` is not positive.
    """
    _check_positive("sigma_data", sigma_data)

    def weighting(parameterization: Parameterization, node: Node) -> Array:
        node = _inside(node)
        weight = (node.sigma / sigma_data) ** 2 + node.alpha**2
        return _from_x0_weight(weight, parameterization, node)

    return weighting


def elbo(schedule: Schedule) -> Weighting:
    """The weight of the variational bound in continuous time (Kingma et al. 2021, section 5).

    (-d lambda / dt) / 2 on the error in the noise: with uniform times the loss is that part of the
    bound on -log p(x0) which comes from diffusion, in nats per coordinate. (With times of density
    p(t) it must be divided by p.) A gradient reaches the schedule's parameters, where it has any.

    Args:
      schedule: the continuous schedule of the loss.

    Raises:
      ValueError: the schedule is discrete.
    """
    if schedule.num_steps is not None:
        raise ValueError(
            f"elbo needs a continuous schedule, got one of {schedule.num_steps} steps: for the "
            "bound in steps see losses.bound_term and likelihood.variational_bound"
        )

    def weighting(parameterization: Parameterization, node: Node) -> Array:
        # At the very ends the slope may be infinite where its product with the rest is not.
        t = jnp.clip(node.t, 2**-24, 1 - 2**-24)
        _, slope = jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))
        node = _inside(node)
        return _from_x0_weight(-0.5 * slope * node.alpha**2, parameterization, node)

    return weighting


def _from_x0_weight(
    weight_times_variance: Array, parameterization: Parameterization, node: Node
) -> Array:
    # Eq. (1). The weight comes times sigma², so that nothing is divided by sigma.
    node = _inside(node)
    a, b = parameterization.row(node)
    return weight_times_variance / (b * node.alpha - node.sigma * a) ** 2


def _inside(node: Node) -> Node:
    """Returns the node moved off the ends, where weights of the form 0/0 have a limit."""
    return Node(
        node.t,
        jnp.maximum(node.alpha, 1e-8 * node.sigma),
        jnp.maximum(node.sigma, 1e-8 * node.alpha),
    )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
