"""The denoising loss, one value per example, and its weightings.

With x = alpha x0 + sigma eps at a random t, the network's output is compared with the target of its
parameterization (`jaxdiff.predictions`, eq. 1):

    loss_i = w(t_i) * mean over coordinates of |output - target|²                          (1)

A weighting that is meant for the error in x0, as those of the literature mostly are, becomes one
for the error in the output through eq. (3) of `jaxdiff.predictions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff import timesteps as timesteps_lib
from jaxdiff._checks import check_float
from jaxdiff.base import Array, Batch, LossFn, Network, Node, PyTree
from jaxdiff.predictions import Parameterization, check_signal
from jaxdiff.process import diffuse
from jaxdiff.schedules import NoiseSchedule

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
    return _from_x0_weight(node.alpha**2, parameterization, node)


def min_snr(gamma: float = 5.0) -> Weighting:
    """Weight min(SNR, gamma) on the error in x0 (Hang et al. 2023, eq. 9).

    Args:
      gamma: where the weight is cut, positive.

    Raises:
      ValueError: `gamma` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")

    def weighting(parameterization: Parameterization, node: Node) -> Array:
        weight = jnp.minimum(node.alpha**2, gamma * node.sigma**2)
        return _from_x0_weight(weight, parameterization, node)

    return weighting


def _from_x0_weight(
    weight_times_variance: Array, parameterization: Parameterization, node: Node
) -> Array:
    # The weight comes times sigma², so that nothing is divided by sigma, which may be 0.
    a, b = parameterization.row(node)
    return weight_times_variance / (b * node.alpha - node.sigma * a) ** 2


def denoising_loss(
    apply_fn: Network,
    schedule: NoiseSchedule,
    parameterization: Parameterization,
    weighting: Weighting = unit,
    timesteps: timesteps_lib.Timesteps = timesteps_lib.uniform,
    *,
    dropout: bool = False,
) -> LossFn:
    """Makes the loss of a denoising network, eq. (1).

    Args:
      apply_fn: `(params, x, noise_level, cond) -> output`, see `jaxdiff.base.Network`.
      schedule: the schedule.
      parameterization: what the network predicts.
      weighting: `unit`, `snr`, `min_snr(gamma)` or your own.
      timesteps: `timesteps.uniform`, `timesteps.stratified(n)` or your own.
      dropout: whether to pass the network one key per example as `dropout_keys=`.

    Returns:
      `loss_fn(params, key, batch) -> (per_example, aux)`. `batch` holds `x0` `(B, *spatial, C)` and
      may hold `cond`, a `mask` that broadcasts to x0 (1 where a coordinate counts) and `index`
      `(B,)`, the examples' numbers in the global batch, 0 .. B-1 if missing. `per_example` is
      float32 `(B,)`, the mean over the coordinates that count; `aux` holds `t` `(B,)`. What is
      drawn for an example depends on `key` and its index alone.

    Raises:
      ValueError: the schedule ends at zero signal-to-noise ratio and the parameterization says
        nothing about clean data there.
    """
    check_signal(parameterization, schedule.ends_at_zero_snr)

    def loss_fn(params: PyTree, key: Array, batch: Batch) -> tuple[Array, Mapping[str, Any]]:
        x0 = check_float("x0", batch["x0"])
        index = batch.get("index")
        index = jnp.arange(x0.shape[0]) if index is None else index
        keys = rng.per_example(key, index)
        t = timesteps(key, index, schedule.num_steps)
        eps = rng.normal(rng.stream(keys, rng.Stream.NOISE), x0.shape[1:], x0.dtype)
        node = schedule.at(t)
        kwargs = {"dropout_keys": rng.stream(keys, rng.Stream.DROPOUT)} if dropout else {}
        output = apply_fn(params, diffuse(x0, eps, node), t, batch.get("cond"), **kwargs)
        error = output.astype(jnp.float32) - parameterization.target(x0, eps, node)
        weight = weighting(parameterization, node)
        return weight * masked_mean(jnp.square(error), batch.get("mask")), {"t": t}

    return loss_fn


def masked_mean(values: Array, mask: Array | None = None) -> Array:
    """Averages over all axes but the first, where the mask is set.

    Args:
      values: `(B, ...)`.
      mask: 0 or 1, broadcasts to `values`; None for all ones.

    Returns:
      `(B,)`; 0 for an example whose mask is empty.

    Raises:
      ValueError: the mask does not broadcast to `values`.
    """
    axes = tuple(range(1, values.ndim))
    if mask is None:
        return jnp.mean(values, axis=axes)
    try:
        mask = jnp.broadcast_to(mask, values.shape).astype(values.dtype)
    except ValueError as error:
        raise ValueError(
            f"mask must broadcast to {values.shape}, got {jnp.shape(mask)}: "
            "for a mask (B, L) of sequences (B, L, C) pass mask[..., None]"
        ) from error
    # A masked value may be anything, also infinite or NaN.
    total = jnp.sum(jnp.where(mask > 0, values * mask, 0), axis=axes)
    return total / jnp.maximum(jnp.sum(mask, axis=axes), 1)
