"""From a configuration to the library's objects: the place where names become functions."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments import packing, runtime
from jaxdiff import (
    columns,
    data,
    denoisers,
    losses,
    predictions,
    schedules,
    timesteps,
)
from jaxdiff.base import Array, Batch, LossFn, Network, PyTree, Schedule
from jaxdiff.models import UNet, sequence_positions
from jaxdiff.training import TrainState, ema, init_state, make_train_step, sharding

DISCRETE = {
    name: getattr(schedules, name)
    for name in ("linear", "scaled_linear", "cosine", "sigmoid", "quadratic", "exponential")
}
SCHEDULES = DISCRETE | {
    name: getattr(schedules, name)
    for name in (
        *("vp_linear", "sub_vp", "vp_cosine", "vp_sigmoid", "laplace", "ve", "edm"),
        "rectified_flow",
    )
}
PARAMETERIZATIONS = {
    name: getattr(predictions, name) for name in ("x0", "eps", "v", "score", "flow", "edm")
}
WEIGHTINGS = {
    "unit": lambda: losses.unit,
    "snr": lambda: losses.snr,
    "min_snr": losses.min_snr,
    "truncated_snr": lambda: losses.truncated_snr,
    "snr_plus_one": lambda: losses.snr_plus_one,
    "p2": losses.p2,
    "sigmoid": losses.sigmoid,
    "edm": losses.edm,
    "flow_matching": lambda: losses.flow_matching,
    "elbo": losses.elbo,
}
TABLES = ("table", "pbc")
"""Names of `data.name` that are tables of visits; all others are images."""
TIMESTEPS = {
    "uniform": lambda: timesteps.uniform,
    "stratified": timesteps.stratified,
    "low_discrepancy": timesteps.low_discrepancy,
    "logit_normal": timesteps.logit_normal,
    "log_normal_sigma": timesteps.log_normal_sigma,
    "loss_aware": timesteps.loss_aware,
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


def is_table(config: ConfigDict) -> bool:
    """Returns whether the data are a table of visits, and not images."""
    return config.data.name in TABLES


def make_source(config: ConfigDict) -> data.Source:
    """Returns the images that `config.data` names, decoded into memory if so asked."""
    options = config.data
    if options.name == "folder":
        if not options.path:
            raise ValueError('data.name="folder" needs data.path, the folder of images')
        source = data.from_folder(options.path, options.size)
    else:
        source = data.from_tfds(options.name, options.split, options.data_dir)
    return data.in_memory(source) if options.in_memory else source


def make_batches(config: ConfigDict, source: data.Source, *, stage: int = 0) -> Any:
    """Returns the Grain iterator over this process's part of the batches of a stage."""
    workers = 0 if config.data.in_memory else config.data.worker_count
    return data.make_pipeline(source, worker_count=workers, **_pipeline_options(config, stage))


def in_order(config: ConfigDict, source: data.Source, batch_size: int) -> Any:
    """Returns an endless iterator over all images in order, plain, as the network sees them."""
    return data.make_pipeline(
        source,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        pad_to=config.data.pad_to,
        shrink=config.data.shrink,
    )


def make_resident(config: ConfigDict, source: data.Source, *, stage: int = 0) -> Any:
    """Returns `data.resident`'s arrays, iterator over addresses, and function from both."""
    return data.resident(source, **_pipeline_options(config, stage))


def _pipeline_options(config: ConfigDict, stage: int) -> dict[str, Any]:
    options = config.data
    # Each stage goes through the data in an order of its own, from the start.
    seed = (
        config.seed
        if stage == 0
        else int(np.random.SeedSequence((config.seed, stage)).generate_state(1)[0])
    )
    return {
        "batch_size": config.train.batch_size,
        "seed": seed,
        "flip": options.flip,
        "dequantize": options.dequantize,
        "pad_to": options.pad_to,
        "shrink": options.shrink,
        "crop": options.crop,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def example_shape(config: ConfigDict, source: data.Source) -> tuple[int, ...]:
    """Returns the shape of one example as the network sees it, `(*spatial, C)`."""
    if is_table(config):
        return np.shape(source[0]["x0"])
    *spatial, channels = np.shape(source[0]["image"])
    shrink = config.data.shrink
    return (*((config.data.pad_to or size) // shrink for size in spatial), channels)


def call(
    what: str,
    name: str,
    among: Mapping[str, Callable[..., Any]],
    options: Mapping[str, Any],
    *args: Any,
) -> Any:
    """Returns `among[name](*args, **options)`, without the options that are None.

    Raises:
      ValueError: there is no such name, or it takes no such option.
    """
    make = choose(what, name, among)
    given = {key: value for key, value in options.items() if value is not None}
    takes = list(inspect.signature(make).parameters)[len(args) :]
    if unknown := sorted(given.keys() - set(takes)):
        others = f"its options are {', '.join(takes)}" if takes else "it has no options"
        raise ValueError(f"{what}={name} takes no {', '.join(unknown)}: {others}")
    return make(*args, **given)


def make_schedule(config: ConfigDict) -> Schedule:
    """Returns the noise schedule."""
    options = config.schedule.to_dict()
    name, shift = options.pop("name"), options.pop("shift")
    zero_terminal_snr = options.pop("zero_terminal_snr")
    make = choose("schedule.name", name, SCHEDULES)
    if "num_steps" not in inspect.signature(make).parameters:
        del options["num_steps"]  # a continuous schedule has none
    schedule = call("schedule.name", name, SCHEDULES, options)
    if zero_terminal_snr:
        if schedule.num_steps is None:
            raise ValueError("schedule.zero_terminal_snr is for discrete schedules")
        schedule = schedules.zero_terminal_snr(schedule)
    if shift != 1:
        if schedule.num_steps is not None:
            raise ValueError("schedule.shift is for continuous schedules")
        schedule = schedules.shifted(schedule, shift)
    return schedule


def make_parameterization(config: ConfigDict) -> predictions.Parameterization:
    """Returns what the network predicts."""
    chosen = choose("parameterization", config.parameterization, PARAMETERIZATIONS)
    return chosen(config.sigma_data) if config.parameterization == "edm" else chosen


def make_model(config: ConfigDict, channels: int) -> UNet:
    """Returns the network, for data of so many channels."""
    classes = config.labels.num_classes
    return UNet(
        out_channels=channels * (1 if config.vlb_weight is None else 2),
        num_classes=classes + config.labels.null if classes else None,
        image_channels=_context_channels(config, channels) if is_table(config) else None,
        noise_level_scale=1.0 if make_schedule(config).num_steps else 1000.0,
        **{**config.model, "dtype": jnp.dtype(config.model.dtype)},
    )


def make_network(
    config: ConfigDict, shape: tuple[int, ...], own: columns.Columns | None = None
) -> Network:
    """Returns the network as a function, scaled as its parameterization wants it.

    Args:
      config: the configuration.
      shape: of one example.
      own: of a table, what each column says of itself.

    Raises:
      ValueError: it is of a table, and `own` is not given.
    """
    apply_fn = make_model(config, shape[-1]).apply
    schedule = make_schedule(config)
    if is_table(config):
        if own is None:
            raise ValueError("a network of a table needs what each column says of itself")
        apply_fn = _with_context(apply_fn, shape[0])
        return columns.corrected(apply_fn, own, schedule, make_parameterization(config))
    if config.parameterization == "edm":
        return denoisers.preconditioned(apply_fn, schedule, config.sigma_data)
    return apply_fn


def in_parts(network: Network) -> Network:
    """Returns the same network, which draws from a large batch part by part if that is faster.

    How many parts is what `runtime.parts` says of the shape of x. Each is of as many examples of
    every device, so that none has to be sent to another.
    """
    devices = jax.device_count()

    def apply(params: PyTree, x: Array, level: Array, cond: PyTree, **kwargs: Any) -> Array:
        count = runtime.parts(x.shape)
        if count == 1 or kwargs:
            return network(params, x, level, cond, **kwargs)
        examples = x, jnp.broadcast_to(level, x.shape[:1]), cond

        def split(a: Array) -> Array:
            return a.reshape(devices, count, -1, *a.shape[1:]).swapaxes(0, 1)

        def one(part: PyTree) -> Array:
            return network(params, *jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), part))

        y = jax.lax.map(one, jax.tree.map(split, examples))
        y = y.reshape(count, devices, -1, *y.shape[2:]).swapaxes(0, 1)
        return y.reshape(-1, *y.shape[3:])

    return apply


def _context_channels(config: ConfigDict, channels: int) -> int:
    """Returns how many channels `_with_context` adds: 4 of positions, 2 of crops, those of x."""
    return 6 + channels * (2 if config.self_condition else 1)


def _with_context(apply_fn: Network, length: int) -> Network:
    """Returns a network of sequences that is told where in a record each visit stands.

    Also, in training on parts, how many visits are left out before and behind; and the mean of x
    over the visits, in which what is a patient's own stands out from the noise.
    """

    def with_context(params: PyTree, x: Array, level: Array, cond: PyTree, **kwargs: Any) -> Array:
        cond = dict(cond)
        crop = cond.pop("crop", jnp.zeros((x.shape[0], 2)))
        real = cond["mask"][..., None]
        mean = jnp.sum(jnp.where(real, x, 0), 1) / jnp.maximum(jnp.sum(real, 1), 1)
        same = jnp.concatenate([crop / length, mean], axis=-1)[:, None]
        image = jnp.concatenate(
            [
                sequence_positions(cond["mask"], length),
                jnp.where(real, jnp.broadcast_to(same, (*x.shape[:2], same.shape[-1])), 0),
            ],
            axis=-1,
        )
        return apply_fn(params, x, level, {**cond, "image": image}, **kwargs)

    return with_context


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the chain of clipping and Adam(W) with its learning rate."""
    options = config.optimizer
    rate = choose(
        "optimizer.decay",
        options.decay,
        {
            "constant": lambda: optax.constant_schedule(options.learning_rate),
            "cosine": lambda: optax.cosine_decay_schedule(
                options.learning_rate, max(1, config.train.num_steps - options.warmup_steps)
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
    return optimizer


def make_loss(
    config: ConfigDict, shape: tuple[int, ...], own: columns.Columns | None = None
) -> LossFn:
    """Returns the loss function, for examples of the given shape; `own` as of `make_network`."""
    null = null_condition(config)
    return losses.denoising_loss(
        make_network(config, shape, own),
        make_schedule(config),
        make_parameterization(config),
        make_weighting(config),
        make_timesteps(config),
        scales=config.loss_scales,
        dropout=config.model.dropout > 0,
        cond_dropout=0.0 if null is None else config.labels.dropout,
        null_cond=null,
        offset_noise=config.offset_noise,
        self_condition=config.self_condition,
        vlb_weight=config.vlb_weight,
    )


def make_weighting(config: ConfigDict) -> losses.Weighting:
    """Returns the weighting of the loss."""
    elbo = (make_schedule(config),) if config.weighting == "elbo" else ()
    options = config.weighting_options.to_dict()
    if config.weighting == "edm":
        options["sigma_data"] = config.sigma_data
    return call("weighting", config.weighting, WEIGHTINGS, options, *elbo)


def null_condition(config: ConfigDict) -> PyTree:
    """Returns the condition of one example that says nothing, or None without conditions."""
    if config.labels.num_classes:
        return np.int32(config.labels.num_classes) if config.labels.null else None
    if config.model.vector_dim:
        return {"vector": np.zeros(config.model.vector_dim, np.float32)}
    return None


def make_timesteps(config: ConfigDict) -> Any:
    """Returns the sampler of training's t."""
    # Those that spread t over the batch want to know its size.
    size = (
        (config.train.batch_size,) if config.timesteps in ("stratified", "low_discrepancy") else ()
    )
    return call("timesteps", config.timesteps, TIMESTEPS, config.timesteps_options.to_dict(), *size)


def make_averages(config: ConfigDict) -> dict[str, Any]:
    """Returns the decays of the averages beside the main one, by name."""
    options = config.averages
    return {f"half_life_{updates:g}": ema.half_life(updates) for updates in options.half_lives} | {
        f"power_{sigma_rel:g}": ema.power(sigma_rel) for sigma_rel in options.sigma_rels
    }


def make_training(
    config: ConfigDict,
    shape: tuple[int, ...],
    own: columns.Columns | None = None,
    mesh: Mesh | None = None,
    *,
    mapped: bool = False,
    parts: int = 1,
) -> tuple[Callable[[], TrainState], Callable[..., Any]]:
    """Returns `init() -> state` and the pure train step, which takes packed states, too.

    Args:
      config: the configuration.
      shape: of one example.
      own: as of `make_network`.
      mesh: where the step runs, if parameters are divided there (`sharding.fully_sharded`).
      mapped: whether each device of the mesh computes its share of a batch by itself; parameters
        must not be divided then.
      parts: in how many parts, at least, to compute a batch (`runtime.parts`); more where
        `config.train.microbatches` says so.
    """
    model, optimizer, sampler = (
        make_model(config, shape[-1]),
        make_optimizer(config),
        make_timesteps(config),
    )
    loss_aware, skips = isinstance(sampler, timesteps.LossAware), config.train.max_skipped > 0
    schedule, averages = make_schedule(config), make_averages(config)
    # Two addresses of the run's seed: one for the parameters, one for all that training draws.
    key = jax.random.key(config.seed)
    init_key, train_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def init() -> TrainState:
        # Lazily: the shapes suffice, no forward pass is run.
        *spatial, channels = shape
        channels *= 2 if config.self_condition else 1
        example = jax.ShapeDtypeStruct((1, *spatial, channels), jnp.float32)
        level = jax.ShapeDtypeStruct((1,), jnp.int32)
        params = model.lazy_init(init_key, example, level, *_example_condition(config, shape))
        history = sampler.init(schedule) if loss_aware else None
        return init_state(
            params, optimizer, history=history, skip_nonfinite=skips, averages=tuple(averages)
        )

    def watch(per_example: Array, aux: Mapping[str, Any]) -> Mapping[str, Array]:
        return by_quarter(schedule, aux["t"], aux["loss"])

    loss_of_tree = gathering(make_loss(config, shape, own), mesh)

    def loss_fn(params: PyTree, key: Array, batch: Batch) -> Any:
        if isinstance(params, jax.Array):
            like = jax.eval_shape(init).params
            params = packing.unpack(params, like, like)
        return loss_of_tree(params, key, batch)

    step = make_train_step(
        loss_fn,
        optimizer,
        ema.warmup(config.ema_decay),
        mesh.axis_names if mapped else None,
        update_history=sampler.update if loss_aware else None,
        skip_nonfinite=skips,
        microbatches=max(parts, config.train.microbatches),
        averages=averages or None,
        watch=watch,
        key=train_key,
    )
    if mapped:
        whole, rows = sharding.everywhere(mesh).spec, sharding.rows(mesh).spec
        step = jax.shard_map(step, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    return init, step


def gathering(loss_fn: LossFn, mesh: Mesh | None) -> LossFn:
    """Returns a loss function of parameters that are divided over a mesh."""
    if mesh is None:
        return loss_fn
    return lambda params, key, batch: loss_fn(sharding.gathered(mesh, params), key, batch)


def by_quarter(schedule: Schedule, t: Array, loss: Array) -> dict[str, Array]:
    """Returns sums and counts of losses `(B,)` in each quarter of the times, `(4,)` each."""
    share = t / (schedule.num_steps or 1)  # in [0, 1)
    quarter = jnp.clip((4 * share).astype(jnp.int32), 0, 3)
    which = quarter[:, None] == jnp.arange(4)[None]
    return {
        "loss_by_t": jnp.sum(jnp.where(which, loss[:, None], 0), axis=0),
        "count_by_t": jnp.sum(which, axis=0),
    }


def _example_condition(config: ConfigDict, shape: tuple[int, ...]) -> tuple[PyTree, ...]:
    """Returns the shapes of what the network is told of one example, if anything."""
    if is_table(config):
        cond = {
            "mask": jax.ShapeDtypeStruct((1, shape[0]), bool),
            "image": jax.ShapeDtypeStruct(
                (1, shape[0], _context_channels(config, shape[1])), jnp.float32
            ),
        }
        if config.model.vector_dim:
            cond["vector"] = jax.ShapeDtypeStruct((1, config.model.vector_dim), jnp.float32)
        return (cond,)
    return (jax.ShapeDtypeStruct((1,), jnp.int32),) if config.labels.num_classes else ()


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of all devices, or those given."""
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)


def stages(config: ConfigDict) -> list[tuple[ConfigDict, int]]:
    """Returns each stage's configuration, and the step that it ends with.

    Raises:
      ValueError: the stages do not fit each other, or the whole.
    """
    options = config.stages.to_dict()
    steps = options.pop("num_steps")
    for name, values in options.items():
        if values and len(values) != len(steps):
            raise ValueError(
                f"stages.{name} must have one value a stage, {len(steps)} by stages.num_steps, got "
                f"{values}"
            )
    if not steps:
        return [(config, config.train.num_steps)]
    if min(steps) < 1 or sum(steps) != config.train.num_steps:
        raise ValueError(
            f"stages.num_steps must be positive and add up to train.num_steps="
            f"{config.train.num_steps}, got {steps}"
        )
    places = {
        "shrink": ("data", "shrink"),
        "shift": ("schedule", "shift"),
        "batch_size": ("train", "batch_size"),
        "learning_rate": ("optimizer", "learning_rate"),
    }
    found, end = [], 0
    for i, count in enumerate(steps):
        stage, end = config.copy_and_resolve_references(), end + count
        for name, (section, key) in places.items():
            if options[name]:
                stage[section][key] = options[name][i]
        found.append((stage, end))
    return found
