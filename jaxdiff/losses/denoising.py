"""The denoising loss, one value per example.

With x = alpha x0 + sigma eps at a random t, the network's output is compared with the target of its
parameterization (`jaxdiff.predictions`, eq. 1):

    loss_i = w(t_i) * mean over coordinates of |output - target|²                          (1)

What may be added to it:

- Dropping the condition, so that one network learns both for classifier-free guidance (Ho &
  Salimans 2022).
- Offset noise (Guttenberg 2023): eps + strength * z with one z per example and channel, which
  moves the mean of an image as much as its details.
- Self-conditioning (Chen et al. 2023, "Analog bits"): for half of the examples the network also
  sees its own prediction of x0, through which no gradient flows, for the others zeros.
- A learned variance (Nichol & Dhariwal 2021, section 3.1), trained by the terms L_t of the
  variational bound alone, with the predicted x0 held fixed in them:

    loss_i += lambda * T * L_t / log 2                                                     (2)

- Errors at lower resolutions (Hoogeboom et al. 2023), so that a large image's fine details do not
  outweigh the rest: `jaxdiff.losses.multiscale`.

What is drawn for an example depends on the key and its index alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff import rng
from jaxdiff import timesteps as timesteps_lib
from jaxdiff._checks import check_float
from jaxdiff.base import Array, Batch, LossFn, Network, Prediction, PyTree, Schedule
from jaxdiff.losses._masks import fill_masked
from jaxdiff.losses.multiscale import check_scales, multiscale_mean_square
from jaxdiff.losses.variational import bound_term, first_variance, node_before
from jaxdiff.losses.weightings import Weighting, unit
from jaxdiff.predictions import Parameterization, check_signal, split_variance
from jaxdiff.process import diffuse


def denoising_loss(
    apply_fn: Network,
    schedule: Schedule,
    parameterization: Parameterization,
    weighting: Weighting = unit,
    timesteps: timesteps_lib.Timesteps | timesteps_lib.LossAware = timesteps_lib.uniform,
    *,
    dropout: bool = False,
    cond_dropout: float = 0.0,
    null_cond: PyTree = None,
    offset_noise: float = 0.0,
    self_condition: bool = False,
    vlb_weight: float | None = None,
    scales: Sequence[int] = (),
) -> LossFn:
    """Makes the loss of a denoising network, eq. (1).

    Args:
      apply_fn: `(params, x, noise_level, cond) -> output`, see `jaxdiff.base.Network`.
      schedule: the schedule, discrete or continuous.
      parameterization: what the network predicts.
      weighting: one of `jaxdiff.losses.weightings` or your own.
      timesteps: one of `jaxdiff.timesteps` or your own. With `timesteps.loss_aware()` the batch
        must hold the sampler's `history`, and each loss is multiplied by the weight of its t.
      dropout: whether to pass the network one key per example as `dropout_keys=`.
      cond_dropout: the probability that an example's condition is replaced by `null_cond`.
      null_cond: the condition that says nothing: a pytree like one example's, whose leaves
        broadcast against it. A dict may name some keys of a condition only; the others, such as
        the mask of a sequence, are kept.
      offset_noise: the strength of offset noise, 0.1 in the source.
      self_condition: whether the network sees its own prediction: its input is then
        `concat([x, x0_prev], -1)`. Costs a second evaluation.
      vlb_weight: lambda of eq. (2), 0.001 in the paper, or None for no learned variance. The output
        then has 2C channels (`predictions.split_variance`).
      scales: the sides of the blocks whose mean errors count besides, such as `(1, 2, 4)`, which
        must divide the data's spatial sizes: the mean of eq. (1) then becomes eq. (2) of
        `jaxdiff.losses.multiscale`. Leaves the learned variance alone. () and (1,) are the plain
        loss.

    Returns:
      `loss_fn(params, key, batch) -> (per_example, aux)`. `batch` holds `x0` `(B, *spatial, C)` and
      may hold `cond`, a `mask` that broadcasts to x0 (1 where a coordinate counts) and `index`
      `(B,)`, the examples' numbers in the global batch, 0 .. B-1 if missing. `per_example` is
      float32 `(B,)`, the mean over the coordinates that count; `aux` holds `t` `(B,)` and `loss`
      `(B,)`, which is `per_example` before it was multiplied by the weight of a loss-aware t.

    Raises:
      ValueError: the schedule ends at zero signal-to-noise ratio and the parameterization says
        nothing about clean data there; an option is out of range; there is no `null_cond` to drop
        to; a learned variance is asked for on a continuous schedule. In the loss: `batch` lacks
        what an option needs, or conditions, output channels or scales do not fit.
    """
    check_signal(parameterization, schedule.ends_at_zero_snr)
    _check_options(schedule, cond_dropout, null_cond, offset_noise, vlb_weight)
    check_scales(scales)

    def loss_fn(params: PyTree, key: Array, batch: Batch) -> tuple[Array, Mapping[str, Any]]:
        mask = batch.get("mask")
        x0 = fill_masked(check_float("x0", batch["x0"]), mask)
        index = batch.get("index")
        index = jnp.arange(x0.shape[0]) if index is None else index
        keys = rng.per_example(key, index)
        t, importance = _draw_times(timesteps, key, index, schedule, batch)
        node, eps = schedule.at(t), _draw_noise(keys, x0, offset_noise)
        x = diffuse(x0, eps, node)
        cond = batch.get("cond")
        if cond_dropout > 0:
            cond = _drop_condition(keys, cond, null_cond, cond_dropout)

        def network(inputs: Array, dropout_keys: Array) -> tuple[Array, Array | None]:
            kwargs = {"dropout_keys": dropout_keys} if dropout else {}
            output = apply_fn(params, inputs, node.t, cond, **kwargs).astype(jnp.float32)
            return (output, None) if vlb_weight is None else split_variance(output, x0.shape[-1])

        inputs = x
        if self_condition:
            first = jnp.concatenate([x, jnp.zeros_like(x)], axis=-1)
            own = rng.stream(keys, rng.Stream.SELF_CONDITION, 1)
            x0_prev = parameterization.x0(network(first, own)[0].astype(x.dtype), x, node)
            seen = rng.uniform(rng.stream(keys, rng.Stream.SELF_CONDITION, 0)) < 0.5
            x0_prev = jnp.where(_over(seen, x), jax.lax.stop_gradient(x0_prev), jnp.zeros_like(x))
            inputs = jnp.concatenate([x, x0_prev], axis=-1)
        output, fraction = network(inputs, rng.stream(keys, rng.Stream.DROPOUT))
        error = output - parameterization.target(x0, eps, node)
        loss = weighting(parameterization, node) * multiscale_mean_square(error, scales, mask)
        if vlb_weight is not None:
            mean = jax.lax.stop_gradient(parameterization.x0(output.astype(x.dtype), x, node))
            loss += (vlb_weight * schedule.num_steps / math.log(2)) * bound_term(
                x0, x, Prediction(mean, fraction), node, node_before(schedule, t), "learned",
                least=first_variance(schedule), mask=mask,
            )  # fmt: skip
        return loss * importance, {"t": t, "loss": loss}

    return loss_fn


def _check_options(
    schedule: Schedule,
    cond_dropout: float,
    null_cond: PyTree,
    offset_noise: float,
    vlb_weight: float | None,
) -> None:
    if not 0 <= cond_dropout <= 1:
        raise ValueError(f"cond_dropout must lie in [0, 1], got {cond_dropout}")
    if cond_dropout > 0 and null_cond is None:
        raise ValueError(
            "cond_dropout needs null_cond, the condition that stands for none, got None: for class "
            "labels 0 .. K-1 pass null_cond=K and give the network K + 1 classes"
        )
    if not offset_noise >= 0:
        raise ValueError(f"offset_noise must not be negative, got {offset_noise}")
    if vlb_weight is None:
        return
    if not vlb_weight > 0:
        raise ValueError(
            f"vlb_weight must be positive, got {vlb_weight}: None is for no learned variance"
        )
    if schedule.num_steps is None:
        raise ValueError(
            "vlb_weight needs a discrete schedule, got a continuous one: a learned variance is "
            "that of a step, and in continuous time there is none to learn"
        )


def _draw_times(
    timesteps: timesteps_lib.Timesteps | timesteps_lib.LossAware,
    key: Array,
    index: Array,
    schedule: Schedule,
    batch: Batch,
) -> tuple[Array, Array | float]:
    """Returns the times `(B,)` and what to multiply their losses by."""
    if not isinstance(timesteps, timesteps_lib.LossAware):
        return timesteps(key, index, schedule), 1.0
    if batch.get("history") is None:
        raise ValueError(
            "a loss-aware sampler needs batch['history'], got none: start with "
            "timesteps.init(schedule) and keep it up to date with timesteps.update"
        )
    return timesteps.sample(key, index, schedule, batch["history"])


def _draw_noise(keys: Array, x0: Array, offset_noise: float) -> Array:
    eps = rng.normal(rng.stream(keys, rng.Stream.NOISE), x0.shape[1:], x0.dtype)
    if offset_noise > 0:
        shape = (1,) * (x0.ndim - 2) + x0.shape[-1:]
        eps += offset_noise * rng.normal(rng.stream(keys, rng.Stream.OFFSET), shape, x0.dtype)
    return eps


def _drop_condition(keys: Array, cond: PyTree, null_cond: PyTree, probability: float) -> PyTree:
    """Replaces the condition of each example with this probability."""
    if cond is None:
        raise ValueError("cond_dropout needs batch['cond'], got none: there is nothing to drop")
    both = isinstance(cond, dict) and isinstance(null_cond, dict)
    if both and null_cond and null_cond.keys() < cond.keys():
        named = {key: cond[key] for key in null_cond}
        return {**cond, **_drop_condition(keys, named, null_cond, probability)}
    if jax.tree.structure(cond) != jax.tree.structure(null_cond):
        raise ValueError(
            "null_cond must have the structure of one example's condition, or be a dict of some "
            f"of its keys, {jax.tree.structure(cond)}, got {jax.tree.structure(null_cond)}"
        )
    dropped = rng.uniform(rng.stream(keys, rng.Stream.LABEL_DROP)) < probability

    def replace(leaf: Array, null: Array) -> Array:
        leaf = jnp.asarray(leaf)
        try:
            null = jnp.broadcast_to(jnp.asarray(null, leaf.dtype), leaf.shape[1:])
        except ValueError as error:
            raise ValueError(
                f"null_cond must broadcast against one example's condition {leaf.shape[1:]}, "
                f"got {jnp.shape(null)}"
            ) from error
        return jnp.where(_over(dropped, leaf), null[None], leaf)

    return jax.tree.map(replace, cond, null_cond)


def _over(flags: Array, x: Array) -> Array:
    """Returns flags `(B,)` as `(B, 1, ..., 1)`, to broadcast against x."""
    return flags.reshape(flags.shape + (1,) * (x.ndim - 1))
