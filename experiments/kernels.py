"""How much of a program's time is its convolutions and matrix products themselves.

Each of them is compiled alone and timed. What is left of the program's time is everything around
them; a little less than nothing is left where the compiler fuses other work into them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from experiments import programs, runtime, timing
from jaxdiff.training import sharding

KINDS = ("convolution", "kernel gradient", "matrix product")
"""A convolution is one of the network, or of the gradient towards its input."""


class Kernel(NamedTuple):
    """A convolution or matrix product of a program.

    Attributes:
      kind: one of `KINDS`.
      count: how often it is computed, with the same shapes and options.
      flops: of one; two for a product and its sum, also at borders, where one factor is padding.
      equation: that of the jaxpr.
    """

    kind: str
    count: int
    flops: int
    equation: Any


def find(jaxpr: Any) -> list[Kernel]:
    """Returns the distinct kernels of a jaxpr and of all that it calls.

    What stands in a scan counts as often as that goes around; in another loop once; and all
    branches of a condition count, but of those for several platforms only this one's.
    """
    found: dict[Any, Kernel] = {}
    for equation, times in _walk(getattr(jaxpr, "jaxpr", jaxpr), 1):
        shapes = tuple(str(v.aval) for v in equation.invars)
        key = equation.primitive.name, shapes, str(equation.params)
        kind, flops = _measure(equation)
        before = found[key].count if key in found else 0
        found[key] = Kernel(kind, before + times, flops, equation)
    return list(found.values())


def _walk(jaxpr: Jaxpr, times: int) -> Iterator[tuple[Any, int]]:
    chosen = {}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "platform_index":
            chosen[equation.outvars[0]] = _branch(equation.params["platforms"])
        if name in ("conv_general_dilated", "dot_general"):
            yield equation, times
        rounds = equation.params["length"] if name == "scan" else 1
        parts = equation.params
        if name == "cond" and equation.invars[0] in chosen:
            parts = {"branch": parts["branches"][chosen[equation.invars[0]]]}
        for value in parts.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = part.jaxpr if isinstance(part, ClosedJaxpr) else part
                if isinstance(inner, Jaxpr):
                    yield from _walk(inner, times * rounds)


def _branch(platforms: Sequence[tuple[str, ...] | None]) -> int:
    """Returns which branch is for the present platform; None stands for all others."""
    platform = jax.devices()[0].platform
    names = {"gpu": ("gpu", "cuda", "rocm")}.get(platform, (platform,))
    fits = (branch is None or any(name in branch for name in names) for branch in platforms)
    return list(fits).index(True)


def _measure(equation: Any) -> tuple[str, int]:
    """Returns the kind of a kernel and its FLOPs."""
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (summed, _), _ = equation.params["dimension_numbers"]
        return "matrix product", 2 * out * math.prod(left[axis] for axis in summed)
    numbers = equation.params["dimension_numbers"]
    # Kernels come as (out, in, *window); the zeros between the rows of a dilated input are no work.
    window = math.prod(right[axis] for axis in numbers.rhs_spec[1:])
    flops = 2 * out * window // math.prod(equation.params["lhs_dilation"])
    # The gradient of a kernel is summed over examples, which are the first axis here.
    return "kernel gradient" if numbers.lhs_spec[1] == 0 else "convolution", flops


def time_of(kernel: Kernel, batch_size: int, repeats: int) -> list[float]:
    """Returns the times of one kernel, compiled alone, its batch divided among all devices."""
    equation, generator = kernel.equation, np.random.default_rng(0)
    mesh = sharding.make_mesh()

    def place(aval: Any) -> jax.Array:
        value = generator.standard_normal(aval.shape, np.float32).astype(aval.dtype)
        divided = batch_size % mesh.size == 0 and aval.shape[:1] == (batch_size,)
        return jax.device_put(value, (sharding.rows if divided else sharding.everywhere)(mesh))

    args = [place(v.aval) for v in equation.invars]
    compiled = (
        jax.jit(
            functools.partial(equation.primitive.bind, **equation.params),
            compiler_options=runtime.compiler_options(),
        )
        .lower(*args)
        .compile()
    )
    side = timing.calibrated(lambda n: timing.seconds(lambda: compiled(*args), n), 0.02)
    return timing.interleaved({"kernel": side}, repeats=repeats)["kernel"]


def shares(
    program: programs.Program,
    whole: float,
    *,
    repeats: int,
    tell: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Returns what the kernels of each kind take, and all of them together.

    Args:
      program: the program.
      whole: how long all of it takes, seconds.
      repeats: how often each kernel is timed.
      tell: is called with the number of kernels that are left, before each.

    Returns:
      For each kind, and "all": "seconds", the sum of medians times counts; "flops"; "count"; and
      "share" of `whole`.
    """
    found, kernels = {}, find(program.jaxpr)
    for left, kernel in enumerate(reversed(kernels)):
        tell(len(kernels) - left)
        taken = timing.summary(time_of(kernel, program.batch_size, repeats))["median"]
        for name in (kernel.kind, "all"):
            sums = found.setdefault(name, {"seconds": 0.0, "flops": 0, "count": 0})
            sums["seconds"] += kernel.count * taken
            sums["flops"] += kernel.count * kernel.flops
            sums["count"] += kernel.count
    for sums in found.values():
        sums["share"] = sums["seconds"] / whole
    return {name: found[name] for name in (*KINDS, "all") if name in found}
