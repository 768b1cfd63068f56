"""Nodes on the host, in float64: what grids are put together from, before they are rounded once.

A discrete schedule knows its log-SNR l at its indices. Between them l is linear in the index, and
alpha and sigma are exactly those of l, so that a fractional index means one noise level and a
network is never told another than the one it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff._checks import is_concrete
from jaxdiff.base import Array, Node, PyTree, Schedule

_OUTSIDE = (
    "a grid is computed on the host and needs the schedule's values: make it outside of jit, or "
    "close over the schedule instead of passing it as an argument"
)


def check_schedule(schedule: Schedule) -> None:
    """Checks that the values of a schedule are known.

    Raises:
      ValueError: they are not; the schedule is an argument of a compiled function.
    """
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(schedule)):
        raise ValueError(_OUTSIDE)


def check_count(name: str, value: int, most: int | None = None, of: str = "") -> None:
    """Checks that `value` is an integer from 1 to `most`.

    Raises:
      ValueError: it is not.
    """
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < 1 or (most is not None and value > most):
        wanted = "a positive integer" if most is None else f"an integer from 1 to {of}{most}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def evaluate(function: Callable[[Array], PyTree], values: np.ndarray) -> PyTree:
    """Returns an elementwise JAX function of a vector, on the host and in float64.

    Raises:
      ValueError: the function closes over values only known inside of a compiled program.
    """
    # Few lengths, since each would be a compilation of each operation.
    length = 256
    while length < values.size:
        length *= 4
    padded = np.concatenate([values, np.full(length - values.size, values[-1])])
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        result = function(jnp.asarray(padded, jnp.float64))
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(result)):
        raise ValueError(_OUTSIDE)
    return jax.tree.map(lambda a: np.asarray(a, np.float64)[: values.size], result)


def at_times(schedule: Schedule, t: np.ndarray) -> Node:
    """Returns the nodes at times `(N,)` in range; indices of a discrete schedule may be fractional.

    Raises:
      ValueError: an index lies between the last two of a schedule that ends at zero SNR.
    """
    if schedule.num_steps is None:
        node = evaluate(schedule.at, t)
        return Node(t, node.alpha, node.sigma)
    nodes, nearest = schedule.nodes, np.round(t).astype(np.int32)
    alpha, sigma = (np.asarray(a, np.float64)[nearest] for a in (nodes.alpha, nodes.sigma))
    between = t != nearest
    if not np.any(between):
        return Node(nearest, alpha, sigma)
    table = _log_snr_table(schedule)
    with np.errstate(invalid="ignore"):
        log_snr = np.interp(t, np.arange(table.size), table)
    if not np.all(np.isfinite(log_snr[between])):
        raise ValueError(
            f"there is no log-SNR between the last two indices, {table.size - 2} and "
            f"{table.size - 1}, of a schedule that ends at zero signal: got t = {t[between].max()}"
        )
    fill_alpha, fill_sigma = evaluate(schedule.levels, np.where(between, log_snr, 0))
    return Node(t, np.where(between, fill_alpha, alpha), np.where(between, fill_sigma, sigma))


def at_log_snr(schedule: Schedule, log_snr: np.ndarray) -> Node:
    """Returns the nodes at finite log-SNRs `(N,)`; t is float, held within the schedule's."""
    if schedule.num_steps is None:
        t = evaluate(schedule.time, log_snr)
    else:
        table = _log_snr_table(schedule)
        finite = np.flatnonzero(np.isfinite(table))
        t = np.interp(-log_snr, -table[finite], finite.astype(np.float64))
    return Node(t, *evaluate(schedule.levels, log_snr))


def log_snr_range(schedule: Schedule, *, has_signal: bool = False) -> tuple[float, float]:
    """Returns the log-SNR of the noisiest and of the cleanest node; either may be infinite.

    With `has_signal` the noisiest index of a discrete schedule is the last that has some signal.
    """
    if schedule.num_steps is None:
        ends = evaluate(schedule.log_snr, np.array([1.0, 0.0]))
    else:
        table = _log_snr_table(schedule)
        if has_signal and np.isfinite(table[0]):
            table = table[np.isfinite(table)]
        ends = table[[-1, 0]]
    return float(ends[0]), float(ends[1])


def clean_node(schedule: Schedule) -> Node:
    """Returns clean data as a grid of one node."""
    t = np.array([0.0]) if schedule.num_steps is None else np.array([-1], np.int32)
    return Node(t, np.array([1.0]), np.array([0.0]))


def log_snr_of(grid: Node) -> np.ndarray:
    """Returns the log-SNR of the nodes of a grid on the host; both ends may be infinite."""
    with np.errstate(divide="ignore"):
        return 2 * (np.log(grid.alpha) - np.log(grid.sigma))


def noise_to_signal(grid: Node) -> np.ndarray:
    """Returns sigma/alpha of the nodes of a grid on the host; infinite where there is no signal."""
    with np.errstate(divide="ignore"):
        return grid.sigma / grid.alpha


def on_host(grid: Node) -> Node:
    """Returns a grid with NumPy fields, float64.

    Raises:
      ValueError: its values are not known, or it has fewer than two nodes.
    """
    if not all(is_concrete(field) for field in jax.tree.leaves(grid)):
        raise ValueError("a grid is changed on the host and its values must be known: do it "
                         "outside of jit, or close over the grid")  # fmt: skip
    if jnp.ndim(grid.sigma) != 1 or jnp.size(grid.sigma) < 2:
        raise ValueError(f"a grid needs fields (N+1,) with N >= 1, got {jnp.shape(grid.sigma)}")
    return Node(np.asarray(grid.t), *(np.asarray(a, np.float64) for a in (grid.alpha, grid.sigma)))


def join(parts: Sequence[Node]) -> Node:
    """Returns the grid of all parts after one another, rounded and moved to the device.

    t is int32 where all parts have integer times, and else float; floats are float32, or float64
    where JAX has that enabled.
    """
    t, alpha, sigma = (
        np.concatenate([np.atleast_1d(getattr(part, name)) for part in parts])
        for name in ("t", "alpha", "sigma")
    )
    dtype = jnp.int32 if np.issubdtype(t.dtype, np.integer) else float
    with jax.ensure_compile_time_eval():
        return Node(jnp.asarray(t, dtype), jnp.asarray(alpha, float), jnp.asarray(sigma, float))


def _log_snr_table(schedule: Schedule) -> np.ndarray:
    nodes = schedule.nodes
    return log_snr_of(Node(0, *(np.asarray(a, np.float64) for a in (nodes.alpha, nodes.sigma))))
