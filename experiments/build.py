"""From a configuration to the library's objects: the place where names become functions."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxdiff import (
    data,
    denoisers,
    grids,
    guidance,
    losses,
    predictions,
    sampling,
    schedules,
    solvers,
    timesteps,
)
from jaxdiff.base import Array, PyTree
from jaxdiff.models import UNet
from jaxdiff.training import TrainState, ema, init_state, make_train_step

SCHEDULES = {
    name: getattr(schedules, name)
    for name in ("linear", "scaled_linear", "cosine", "sigmoid", "quadratic", "exponential")
}
PARAMETERIZATIONS = {
    name: getattr(predictions, name) for name in ("x0", "eps", "v", "score", "flow")
}
GRIDS = {name: getattr(grids, name) for name in ("trailing", "leading", "linspace")}
SOLVERS = {
    "ddpm": lambda options: solvers.ddpm(options.variance),
    "ddim": lambda options: solvers.ddim(options.eta),
}


def choose(what: str, name: str, among: Mapping[str, Any]) -> Any:
    """Returns `among[name]`.

    Raises:
      ValueError: there is no such name; the message has those there are, and the nearest.
    """
    if name not in among:
        near = difflib.get_close_matches(name, among, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(among)}, got {name!r}{hint}")
    return among[name]


def make_source(config: ConfigDict) -> data.Source:
    """Returns the data set that `config.data` names, decoded into memory if so asked."""
    options = config.data
    if options.name == "folder":
        if not options.path:
            raise ValueError('data.name="folder" needs data.path, the folder of images')
        source = data.from_folder(options.path, options.size)
    else:
        source = data.from_tfds(options.name, options.split, options.data_dir)
    return data.in_memory(source) if options.in_memory else source


def make_batches(config: ConfigDict, source: data.Source) -> Any:
    """Returns the Grain iterator over this process's part of the batches."""
    options = config.data
    return data.make_pipeline(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        flip=options.flip,
        dequantize=options.dequantize,
        pad_to=options.pad_to,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        worker_count=0 if options.in_memory else options.worker_count,
    )


def example_shape(config: ConfigDict, source: data.Source) -> tuple[int, ...]:
    """Returns the shape of one example as the network sees it, `(*spatial, C)`."""
    *spatial, channels = np.shape(source[0]["image"])
    return (*((config.data.pad_to or size) for size in spatial), channels)


def make_schedule(config: ConfigDict) -> schedules.NoiseSchedule:
    """Returns the noise schedule."""
    options = config.schedule.to_dict()
    make = choose("schedule.name", options.pop("name"), SCHEDULES)
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := given.keys() - inspect.signature(make).parameters:
        raise ValueError(f"the {config.schedule.name} schedule takes no {', '.join(unknown)}")
    return make(**given)


def make_parameterization(config: ConfigDict) -> predictions.Parameterization:
    """Returns what the network predicts."""
    return choose("parameterization", config.parameterization, PARAMETERIZATIONS)


def make_model(config: ConfigDict, channels: int) -> UNet:
    """Returns the network, for data of so many channels."""
    return UNet(out_channels=channels, **{**config.model, "dtype": jnp.dtype(config.model.dtype)})


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation | optax.MultiSteps:
    """Returns the chain of clipping, Adam(W) with its learning rate, and accumulation."""
    options = config.optimizer
    updates = -(-config.train.num_steps // options.accumulate)
    rate = choose(
        "optimizer.decay",
        options.decay,
        {
            "constant": lambda: optax.constant_schedule(options.learning_rate),
            "cosine": lambda: optax.cosine_decay_schedule(
                options.learning_rate, max(1, updates - options.warmup_steps)
            ),
        },
    )()
    if options.warmup_steps:
        warmup = optax.linear_schedule(0.0, options.learning_rate, options.warmup_steps)
        rate = optax.join_schedules([warmup, rate], [options.warmup_steps])
    moments = {"b1": options.b1, "b2": options.b2}
    optimizer = choose(
        "optimizer.name",
        options.name,
        {
            "adam": lambda: optax.adam(rate, **moments),
            "adamw": lambda: optax.adamw(rate, weight_decay=options.weight_decay, **moments),
        },
    )()
    if options.name == "adam" and options.weight_decay:
        raise ValueError("optimizer.weight_decay belongs to adamw: set optimizer.name=adamw")
    if options.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
    if options.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, options.accumulate)
    return optimizer


def make_training(
    config: ConfigDict, shape: tuple[int, ...]
) -> tuple[Callable[[], TrainState], Callable[..., Any]]:
    """Returns `init() -> state` and the pure train step, for examples of the given shape."""
    model, optimizer = make_model(config, shape[-1]), make_optimizer(config)
    schedule, parameterization = make_schedule(config), make_parameterization(config)
    loss_fn = losses.denoising_loss(
        model.apply,
        schedule,
        parameterization,
        choose(
            "weighting",
            config.weighting,
            {
                "unit": losses.unit,
                "snr": losses.snr,
                "min_snr": losses.min_snr(config.min_snr_gamma),
            },
        ),
        choose(
            "timesteps",
            config.timesteps,
            {
                "uniform": timesteps.uniform,
                "stratified": timesteps.stratified(config.train.batch_size),
            },
        ),
        dropout=config.model.dropout > 0,
    )
    # Two addresses of the run's seed: one for the parameters, one for all that training draws.
    key = jax.random.key(config.seed)
    init_key, train_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def init() -> TrainState:
        # Lazily: the shapes suffice, no forward pass is run.
        example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        level = jax.ShapeDtypeStruct((1,), jnp.int32)
        return init_state(model.lazy_init(init_key, example, level), optimizer)

    step = make_train_step(loss_fn, optimizer, ema.warmup(config.ema_decay), key=train_key)
    return init, step


def make_draw(
    config: ConfigDict, shape: tuple[int, ...], *, trajectory_every: int | None = None
) -> Callable[[PyTree, Array | int], Any]:
    """Returns `draw(params, first_index) -> samples`, compiled, by `config.sample`.

    The batch is divided over all devices where their number divides it.
    """
    options = config.sample
    apply_fn = make_model(config, shape[-1]).apply
    schedule, parameterization = make_schedule(config), make_parameterization(config)
    grid = choose("sample.grid", options.grid, GRIDS)(schedule, options.steps)
    solver = choose("sample.solver", options.solver, SOLVERS)(options)
    if options.batch_size < 1:
        raise ValueError(f"sample.batch_size must be at least 1, got {options.batch_size}")
    whole = mesh() if options.batch_size % jax.device_count() == 0 else None

    def draw(params: PyTree, first_index: Array) -> Any:
        denoiser = denoisers.from_network(apply_fn, params, schedule, parameterization)
        if options.clip:
            denoiser = guidance.clip_x0(denoiser)
        return sampling.sample(
            jax.random.key(options.seed),
            denoiser,
            solver,
            grid,
            (options.batch_size, *shape),
            first_index=first_index,
            trajectory_every=trajectory_every,
        )

    if whole is None or trajectory_every is not None:
        return jax.jit(draw)
    return jax.jit(draw, out_shardings=NamedSharding(whole, PartitionSpec("data")))


def mesh() -> Mesh:
    """Returns the mesh of all devices, one axis, `data`."""
    return Mesh(np.array(jax.devices()), ("data",))


def placed(like: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns the shapes and types of a pytree, to be restored onto a sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), like)
