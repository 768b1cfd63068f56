"""The train step: a pure function of state and batch, which the caller compiles.

The state holds no key. What a step draws is found by its address: the run's key, the number of the
update, the number of the example in the global batch (`jaxdiff.rng`). So neither sharding nor
accumulation changes what is drawn.

There are two ways to accumulate. With `microbatches` one batch is computed in parts within the step
(`jaxdiff.training.microbatches`); with `optax.MultiSteps` each call of the step is given a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff import rng
from jaxdiff.base import Array, Batch, LossFn, PyTree
from jaxdiff.training import ema as ema_lib
from jaxdiff.training import microbatches as parts_lib

Optimizer = optax.GradientTransformation | optax.MultiSteps
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Mapping[str, Array]]]
UpdateHistory = Callable[[PyTree, Array, Array], PyTree]
"""`(history, t (N,), loss (N,)) -> history`, as `timesteps.loss_aware` makes it."""
Watch = Callable[[Array, Mapping[str, Any]], Mapping[str, Array]]
"""`(per_example (N,), aux) -> sums by name`, of what `loss_fn` returned for N examples."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training carries from step to step.

    Attributes:
      step: how many batches have been seen, int32 `()`.
      params: the network's parameters.
      opt_state: the optimiser's state.
      ema: the average of the parameters, their structure, or None.
      history: what the loss function is to remember of past losses, or None; with
        `optax.MultiSteps` a `PendingHistory`.
      skipped: how many batches were skipped, or None if none are to be.
      averages: further averages of the parameters, by name, or None.
    """

    step: Array
    params: PyTree
    opt_state: Any
    ema: PyTree | None
    history: PyTree | None = None
    skipped: Skipped | None = None
    averages: Mapping[str, PyTree] | None = None


class Skipped(NamedTuple):
    """How many batches changed nothing, because their loss or gradient was not finite.

    Attributes:
      total: all of them, int32 `()`.
      in_a_row: those since the last batch that was not skipped, int32 `()`.
    """

    total: Array
    in_a_row: Array


class PendingHistory(NamedTuple):
    """The history while microbatches are accumulated: all of an update see the same.

    Attributes:
      now: what the microbatches of this update see.
      next: what those of the next will see: `now` and the microbatches done so far.
    """

    now: PyTree
    next: PyTree


def init_state(
    params: PyTree,
    optimizer: Optimizer,
    *,
    ema: bool = True,
    history: PyTree | None = None,
    skip_nonfinite: bool = False,
    averages: Iterable[str] = (),
) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: the network's initial parameters.
      optimizer: the optimiser that the train step is made with.
      ema: whether to keep an average of the parameters.
      history: the empty history, if the train step is made with `update_history`.
      skip_nonfinite: whether the train step is made so.
      averages: the names of the further averages that the train step is made with.
    """
    average = jax.tree.map(jnp.copy, params) if ema else None
    opt_state = optimizer.init(params)
    if history is not None and isinstance(opt_state, optax.MultiStepsState):
        history = PendingHistory(history, jax.tree.map(jnp.copy, history))
    skipped = Skipped(jnp.int32(0), jnp.int32(0)) if skip_nonfinite else None
    further = {name: jax.tree.map(jnp.copy, params) for name in averages} or None
    return TrainState(jnp.int32(0), params, opt_state, average, history, skipped, further)


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    ema: ema_lib.Decay | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    *,
    key: Array | None = None,
    update_history: UpdateHistory | None = None,
    skip_nonfinite: bool = False,
    microbatches: int = 1,
    averages: Mapping[str, ema_lib.Decay] | None = None,
    watch: Watch | None = None,
) -> TrainStep:
    """Makes the train step.

    Args:
      loss_fn: `(params, key, batch) -> (per_example, aux)`, as `losses.denoising_loss` returns.
      optimizer: any optax optimiser. With `optax.MultiSteps` each call accumulates one
        microbatch; accumulating k of them draws, and computes, what one batch of k times the size
        would.
      ema: the decay of the parameters' average, as a constant or a function of the number of
        updates (`ema.warmup(0.9999)`); None keeps none.
      axis_name: the mapped axis or axes when called inside `jax.pmap` or `jax.shard_map`, with
        the batch divided along them in order; None under plain `jax.jit`, on any sharding.
      key: the run's key, one typed key; `jax.random.key(0)` if not given.
      update_history: for a loss that depends on past losses: the step passes the state's history
        to `loss_fn` as `batch["history"]`, and then gives this function the `t` and `loss`
        `(B,)` of `aux`, of the whole batch in the order of the index.
      skip_nonfinite: whether a batch whose loss or gradient is not finite changes nothing but
        `state.step` and the counts in `state.skipped`; of an accumulating optimiser the next batch
        takes its place. Nothing waits for the host, which may read the counts when it likes.
      microbatches: in how many parts, one after the other, to compute the batch (under `axis_name`
        each device's share of it): the numbers of the whole batch, in the memory of a part.
      averages: further averages of the parameters, all at once: the decay of each, by name; None
        or no name for none.
      watch: what else to know of a batch: a function of the losses and the `aux` of some of its
        examples that returns sums over them, arrays by name; what it returns for the whole global
        batch joins the metrics.

    Returns:
      `step(state, batch) -> (state, metrics)`: pure, not compiled; donate the state. `metrics`
      holds `loss`, the mean over the global batch; `grad_norm`, before clipping; `param_norm`, of
      the parameters returned; `skipped` and `skipped_in_a_row`, if batches may be; and what `watch`
      returns.

    Raises:
      TypeError: `key` is not one typed key.
      ValueError: a constant decay lies outside [0, 1); `microbatches` is less than 1; in the step,
        the state holds no average although `ema` is given, or the other way round, and so for
        `averages`, the history and the counts of what is skipped; `aux` lacks what `update_history`
        needs; the batch does not divide into so many parts; `watch` returns the name of another
        metric.
    """
    run_key = rng.check_key(jax.random.key(0) if key is None else key)
    averages = dict(averages or {})
    for decay in (*averages.values(), *([] if ema is None else [ema])):
        ema_lib.check_decay(decay)
    parts_lib.check_parts(microbatches)

    def mean_loss(
        params: PyTree, key: Array, batch: Batch
    ) -> tuple[Array, tuple[tuple[Array, Array] | None, Mapping[str, Array]]]:
        per_example, aux = loss_fn(params, key, batch)
        seen = None if update_history is None else _seen(aux, per_example)
        return jnp.mean(per_example), (seen, {} if watch is None else watch(per_example, aux))

    value_and_grad = parts_lib.value_and_grad(mean_loss, microbatches, axis_name)

    def check_fits(state: TrainState) -> None:
        if (ema is None) != (state.ema is None):
            raise ValueError(
                f"ema={ema} in make_train_step does not fit a state "
                f"{'without' if state.ema is None else 'with'} an average: see init_state(ema=...)"
            )
        if (update_history is None) != (state.history is None):
            raise ValueError(
                f"make_train_step {'without' if update_history is None else 'with'} update_history "
                f"does not fit a state {'without' if state.history is None else 'with'} a history: "
                "see init_state(history=...)"
            )
        if set(averages) != set(state.averages or {}):
            raise ValueError(
                f"averages={sorted(averages)} in make_train_step do not fit a state with "
                f"{sorted(state.averages or {})}: see init_state(averages=...)"
            )
        if skip_nonfinite != (state.skipped is not None):
            raise ValueError(
                f"skip_nonfinite={skip_nonfinite} in make_train_step does not fit a state "
                f"{'without' if state.skipped is None else 'with'} counts: see "
                "init_state(skip_nonfinite=...)"
            )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Array]]:
        check_fits(state)
        count, microbatch = _position(state)
        if "index" not in batch:
            batch = {**batch, "index": _global_index(batch["x0"].shape[0], microbatch, axis_name)}
        if update_history is not None:
            history = state.history
            now = history.now if isinstance(history, PendingHistory) else history
            batch = {**batch, "history": now}
        params, key = state.params, jax.random.fold_in(run_key, count)
        if axis_name is not None:
            # Inside shard_map the gradient of replicated parameters would come out summed over
            # the devices already; as varying parameters they get each device's own gradient.
            params, key = jax.lax.pcast((params, key), axis_name, to="varying")
        (loss, (seen, watched)), grads = value_and_grad(params, key, batch)
        if axis_name is not None:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
            watched = jax.lax.psum(watched, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        updated = not isinstance(opt_state, optax.MultiStepsState) or opt_state.mini_step == 0
        average = history = None
        if ema is not None:
            average = ema_lib.update(state.ema, params, _at(ema, count))
            average = _where(updated, average, state.ema)
        further = {
            name: ema_lib.update(state.averages[name], params, _at(decay, count))
            for name, decay in averages.items()
        }
        further = _where(updated, further, state.averages) if further else None
        if update_history is not None:
            if axis_name is not None:
                seen = jax.lax.all_gather(seen, axis_name, tiled=True, to="invarying")
            history = _extend(state.history, lambda past: update_history(past, *seen), updated)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        following = TrainState(
            state.step + 1, params, opt_state, average, history, averages=further
        )
        if skip_nonfinite:
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            stays = dataclasses.replace(state, step=state.step + 1, skipped=None)
            total, in_a_row = state.skipped
            skipped = Skipped(total + ~finite, jnp.where(finite, 0, in_a_row + 1))
            following = dataclasses.replace(_where(finite, following, stays), skipped=skipped)
            metrics |= {"skipped": skipped.total, "skipped_in_a_row": skipped.in_a_row}
        metrics["param_norm"] = optax.tree.norm(following.params)
        if metrics.keys() & watched.keys():
            raise ValueError(
                f"watch must use other names than {sorted(metrics)}, got {sorted(watched)}"
            )
        metrics |= watched
        return following, metrics

    return step


def _at(decay: ema_lib.Decay, count: Array) -> Array | float:
    return decay(count) if callable(decay) else decay


def _position(state: TrainState) -> tuple[Array, Array | int]:
    """Returns the number of the update and that of the microbatch within it."""
    if isinstance(state.opt_state, optax.MultiStepsState):
        return state.opt_state.gradient_step, state.opt_state.mini_step
    return state.step, 0


def _global_index(
    size: int, microbatch: Array | int, axis_name: str | tuple[str, ...] | None
) -> Array:
    """Returns the numbers of this device's examples in the update's whole batch, `(size,)`."""
    if axis_name is not None:
        microbatch = microbatch * jax.lax.axis_size(axis_name) + jax.lax.axis_index(axis_name)
    return microbatch * size + jnp.arange(size)


def _seen(aux: Mapping[str, Any], per_example: Array) -> tuple[Array, Array]:
    """Returns the t and loss that `update_history` gets."""
    shapes = {name: jnp.shape(aux[name]) for name in ("t", "loss") if name in aux}
    if shapes != {"t": per_example.shape, "loss": per_example.shape}:
        raise ValueError(
            f"update_history needs 't' and 'loss' of shape {per_example.shape} in the aux that "
            f"loss_fn returns, got {shapes or 'neither'}"
        )
    return aux["t"], aux["loss"]


def _extend(history: PyTree, update: Callable[[PyTree], PyTree], updated: Array | bool) -> PyTree:
    if not isinstance(history, PendingHistory):
        return update(history)
    following = update(history.next)
    return PendingHistory(_where(updated, following, history.now), following)


def _where(condition: Array | bool, a: PyTree, b: PyTree) -> PyTree:
    if condition is True:
        return a
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
