"""From a configuration to samples: spacings, solvers and guidance by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import runtime
from experiments.build import (
    call,
    choose,
    in_parts,
    make_mesh,
    make_network,
    make_parameterization,
    make_schedule,
    null_condition,
)
from jaxdiff import denoisers, grids, guidance, sampling, solvers
from jaxdiff.base import Array, Denoiser, Node, PyTree, Solver
from jaxdiff.columns import Columns
from jaxdiff.training import sharding

GRIDS = {
    name: getattr(grids, name)
    for name in (
        *("trailing", "leading", "linspace", "quadratic", "uniform_log_snr", "karras"),
        *("exponential", "beta"),
    )
}


def _corrected(corrector_steps: int = 1, snr: float = 0.16) -> Solver:
    return solvers.predictor_corrector(solvers.ddpm(), corrector_steps, snr)


SOLVERS = {
    **{
        name: getattr(solvers, name)
        for name in (
            *("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm_solver", "dpm_solver_pp"),
            *("sde_dpm_solver_pp", "unipc", "deis", "lms", "plms", "pndm", "probability_flow"),
        )
    },
    "predictor_corrector": _corrected,
}
THRESHOLDS = {
    "static": guidance.clip_x0,
    "dynamic": guidance.dynamic_threshold,
    "none": lambda denoiser: denoiser,
}


def _classifier_free(
    plain: Denoiser, null: Denoiser, grid: Node, scale: float = 2.0, rescale: float = 0.0
) -> Denoiser:
    if rescale:
        return guidance.combine(
            plain, null, guidance.rules.rescaled(guidance.rules.linear(scale), rescale)
        )
    return guidance.classifier_free(plain, null, scale)


def _cfg_plus_plus(plain: Denoiser, null: Denoiser, grid: Node, scale: float = 0.6) -> Denoiser:
    return guidance.cfg_plus_plus(plain, null, scale, grid)


def _adaptive_projected(
    plain: Denoiser,
    null: Denoiser,
    grid: Node,
    scale: float = 2.0,
    eta: float = 0.0,
    norm_threshold: float | None = None,
) -> Denoiser:
    return guidance.adaptive_projected(plain, null, scale, eta, norm_threshold)


def _autoguidance(plain: Denoiser, weak: Denoiser, grid: Node, scale: float = 2.0) -> Denoiser:
    return guidance.autoguidance(plain, weak, scale)


# From the denoiser and a worse one: that without the label, or that of an earlier checkpoint.
GUIDANCE = {
    "none": lambda plain, worse, grid: plain,
    "classifier_free": _classifier_free,
    "cfg_plus_plus": _cfg_plus_plus,
    "adaptive_projected": _adaptive_projected,
    "autoguidance": _autoguidance,
}


def make_grid(config: ConfigDict) -> Node:
    """Returns the nodes that `config.sample` visits."""
    options, schedule = config.sample, make_schedule(config)
    grid = call(
        "sample.grid",
        options.grid,
        GRIDS,
        options.grid_options.to_dict(),
        schedule,
        options.steps,
    )
    if options.solver == "pndm":
        grid = grids.with_halves(schedule, grid)
    if options.churn:
        limits = {key: v for key, v in options.churn_options.items() if v is not None}
        grid = grids.churn(schedule, grid, options.churn, **limits)
    return grid


def make_solver(config: ConfigDict) -> Solver:
    """Returns the solver that `config.sample` names."""
    options = config.sample
    schedule = (make_schedule(config),) if options.solver == "probability_flow" else ()
    solver = call(
        "sample.solver", options.solver, SOLVERS, options.solver_options.to_dict(), *schedule
    )
    return solvers.self_conditioned(solver) if config.self_condition else solver


def make_denoiser(
    config: ConfigDict, shape: tuple[int, ...], own: Columns | None = None
) -> Callable[..., Denoiser]:
    """Returns `(params, cond=None, weak=None) -> denoiser`, guided as `config.sample` says.

    `cond` is what the network is told, labels `(B,)` or a dict, and `weak` the parameters of a
    worse network, for autoguidance. Of a table, `own` is what each column says of itself.
    """
    options, grid = config.sample, make_grid(config)
    network, schedule = in_parts(make_network(config, shape, own)), make_schedule(config)
    parameterization = make_parameterization(config)
    chosen = {key: v for key, v in options.guidance_options.to_dict().items() if v is not None}
    low, high, _ = chosen.pop("low", 0.0), chosen.pop("high", np.inf), chosen.pop("weak_step", None)
    needs_null = options.guidance not in ("none", "autoguidance")
    null = null_condition(config)
    if needs_null and null is None:
        raise ValueError(
            f"sample.guidance={options.guidance} needs a network that was trained with conditions "
            "and without: train one with labels.num_classes, or of a table with data.static=vector"
        )
    if config.self_condition and options.guidance != "none":
        raise ValueError("sample.guidance is not for self-conditioned networks")
    threshold = choose("sample.threshold", options.threshold, THRESHOLDS)

    def make(params: PyTree, cond: PyTree = None, weak: PyTree = None) -> Denoiser:
        def of(params: PyTree, cond: PyTree) -> Denoiser:
            return denoisers.from_network(
                network,
                params,
                schedule,
                parameterization,
                cond,
                learned_variance=config.vlb_weight is not None,
                self_condition=config.self_condition,
            )

        denoiser = of(params, cond)
        if config.self_condition:
            return lambda x, node, x0_prev: threshold(lambda x, node: denoiser(x, node, x0_prev))(
                x, node
            )
        worse = denoiser
        if options.guidance == "autoguidance":
            if weak is None:
                raise ValueError("autoguidance needs the parameters of a worse network")
            worse = of(weak, cond)
        elif needs_null:
            worse = of(params, _without(cond, null))
        guided = call("sample.guidance", options.guidance, GUIDANCE, chosen, denoiser, worse, grid)
        if options.guidance != "none" and (low > 0 or high < np.inf):
            guided = guidance.interval(guided, denoiser, low, high)
        return threshold(guided)

    return make


def _without(cond: PyTree, null: PyTree) -> PyTree:
    """Returns the condition of a batch with what may be left out of it left out."""
    if isinstance(null, dict):
        return {**cond, **{key: jnp.zeros_like(cond[key]) + null[key][None] for key in null}}
    return jnp.full_like(cond, null)


def make_labels(config: ConfigDict, first_index: Array | int, size: int) -> Array | None:
    """Returns the labels of the samples from `first_index` on: the one asked for, or in turn."""
    classes, label = config.labels.num_classes, config.sample.label
    if not classes:
        if label is not None:
            raise ValueError("sample.label is for networks that were trained with labels")
        return None
    if label is None:
        return ((first_index + jnp.arange(size)) % classes).astype(jnp.int32)
    if not 0 <= label < classes:
        raise ValueError(f"sample.label must lie in 0 .. {classes - 1}, got {label}")
    return jnp.full(size, label, jnp.int32)


def make_draw(
    config: ConfigDict, shape: tuple[int, ...], *, trajectory_every: int | None = None
) -> Callable[..., Any]:
    """Returns `draw(params, first_index, weak=None) -> samples`, compiled, by `config.sample`.

    The batch is divided over all devices where their number divides it.
    """
    options = config.sample
    if options.batch_size < 1:
        raise ValueError(f"sample.batch_size must be at least 1, got {options.batch_size}")
    grid, solver, make = make_grid(config), make_solver(config), make_denoiser(config, shape)
    make_labels(config, 0, 1)
    mesh = make_mesh(config)
    divides = options.batch_size % mesh.size == 0 and trajectory_every is None

    def draw(params: PyTree, first_index: Array, weak: PyTree = None) -> Any:
        params, weak = (sharding.gathered(mesh, tree) for tree in (params, weak))
        return sampling.sample(
            jax.random.key(options.seed),
            make(params, make_labels(config, first_index, options.batch_size), weak),
            solver,
            grid,
            (options.batch_size, *shape),
            first_index=first_index,
            up_noise=options.churn_noise,
            trajectory_every=trajectory_every,
        )

    return jax.jit(
        draw,
        out_shardings=sharding.rows(mesh) if divides else sharding.everywhere(mesh),
        compiler_options=runtime.compiler_options(),
    )
