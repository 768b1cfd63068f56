"""The types that the rest of the library speaks: points of the process, predictions, slots.

Types only. A diffusion process is known here by its points: at each of them

    x_t = alpha * x0 + sigma * eps,    eps ~ N(0, I)                                   (1)

(the notation of VDM, Kingma et al. 2021, and of DPM-Solver, Lu et al. 2022). Schedules answer
with a `Node`, grids are a `Node` with an axis more, denoisers and solvers are functions of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    """One point of the process, or one per example, or a whole grid of them.

    Attributes:
      t: the index that a network is told. Discrete: int32, `0 .. T-1`, and -1 for clean data.
        Continuous: float in [0, 1], 0 for clean data. Shape `()`, `(B,)` or `(N+1,)`.
      alpha: the factor of the clean data in eq. (1), float32, shape as `t`.
      sigma: the standard deviation of the noise in eq. (1), float32, shape as `t`.
    """

    t: Array
    alpha: Array
    sigma: Array

    # Without it `for node in grid` would never end: JAX clamps an index that is out of range.
    __iter__ = None

    def over(self, x: Array) -> Node:
        """Returns the node with fields that broadcast against `x` `(B, ...)`.

        A scalar field stays; a `(B,)` field becomes `(B, 1, ..., 1)`.
        """

        def expand(field: Array) -> Array:
            field = jnp.asarray(field)
            return field if field.ndim == 0 else field.reshape(field.shape + (1,) * (x.ndim - 1))

        return jax.tree.map(expand, self)

    def __getitem__(self, index: Any) -> Node:
        """Returns the node, or the part of the grid, at `index`."""
        return jax.tree.map(lambda field: field[index], self)

    @property
    def log_snr(self) -> Array:
        """log(alpha² / sigma²): +inf at the clean node, -inf at zero signal."""
        return 2 * (jnp.log(self.alpha) - jnp.log(self.sigma))


class Schedule(Protocol):
    """How fast the data turns into noise: discrete or continuous, see `jaxdiff.schedules`.

    Times t are integers `0 .. T-1` for a discrete schedule, and floats in [0, 1], 0 = data, for a
    continuous one.
    """

    @property
    def num_steps(self) -> int | None:
        """The number of steps T of a discrete schedule; None for a continuous one."""
        ...

    @property
    def ends_at_zero_snr(self) -> bool:
        """Whether the noisiest node is known to hold no signal at all (alpha exactly 0)."""
        ...

    def at(self, t: Array | float | int) -> Node:
        """Returns the node at t, `()` or `(B,)`."""
        ...

    def log_snr(self, t: Array | float | int) -> Array:
        """Returns log(alpha² / sigma²) at t, shape of `t`; it decreases with t."""
        ...

    def time(self, log_snr: Array | float) -> Array:
        """Returns the t at which the log-SNR has this value, the inverse of `log_snr`, float.

        For a discrete schedule it is interpolated between the indices and held within
        `[0, T-1]`.
        """
        ...

    def levels(self, log_snr: Array) -> tuple[Array, Array]:
        """Returns the alpha and sigma that the schedule's process has at a log-SNR."""
        ...


class Prediction(NamedTuple):
    """What a denoiser believes of x.

    Attributes:
      x0: the expected clean data, float, `(B, *spatial, C)`.
      variance: the network's own variance coefficient, shape of `x0`, or None. In [0, 1] it
        interpolates between the logarithms of the "small" and the "large" variance (Nichol &
        Dhariwal 2021, eq. 15).
      evaluations: how many evaluations of a network it took, per example: int, or int32 `()`.
    """

    x0: Array
    variance: Array | None = None
    evaluations: Array | int = 1


class Denoiser(Protocol):
    """A function that says what clean data lies behind x.

    Network, parameters, conditioning, guidance and clipping are already inside.
    """

    def __call__(self, x: Array, node: Node) -> Prediction:
        """Maps x `(B, *spatial, C)` at a node with scalar or `(B,)` fields to a prediction."""
        ...


class Network(Protocol):
    """Any network, of any framework, as a function of its parameters.

    The signature is `(params, x, noise_level, cond) -> output`, with x and output
    `(B, *spatial, C)`, `noise_level` `(B,)` (the node's t) and `cond` a pytree of arrays `(B, ...)`
    or None. A loss made with `dropout=True` also passes `dropout_keys=`, one typed key per example.
    """

    def __call__(
        self, params: PyTree, x: Array, noise_level: Array, cond: PyTree, **kwargs: Any
    ) -> Array:
        """Applies the network."""
        ...


class Info(NamedTuple):
    """What a solver's step reports but does not carry.

    Attributes:
      x0: the clean data that the step believed in, for previews, `(B, *spatial, C)`.
      evaluations: the sum of the `evaluations` of the predictions that the step asked for: int, or
        int32 `()`.
    """

    x0: Array
    evaluations: Array | int


class SolverState(NamedTuple):
    """The state of a one-step solver; multistep solvers carry more, but always `x`.

    Attributes:
      x: the samples at the node reached so far, `(B, *spatial, C)`.
    """

    x: Array


class Solver(NamedTuple):
    """A way from noise to data, as a pair of pure functions.

    Attributes:
      init: `(x, node) -> state`; `state.x` is always present, and the structure and types of the
        state never change.
      step: `(keys, denoiser, state, now, next) -> (state, info)` moves from one node to the next;
        `keys` holds one typed key per example, `(B,)`, for this step alone.
      one_path: the keys are the same in every step: those of one Brownian path per example, which
        the solver reads at the nodes (`jaxdiff.rng.ornstein_uhlenbeck`).
      climbs: the steps also go towards noise. Without it a move of the grid towards noise is
        forward noising, done by the sampling loop, after which the solver starts anew.
    """

    init: Callable[[Array, Node], Any]
    step: Callable[[Array, Denoiser, Any, Node, Node], tuple[Any, Info]]
    one_path: bool = False
    climbs: bool = False


Batch = Mapping[str, Any]
"""A batch: `x0` `(B, *spatial, C)`; optionally `cond`, `mask`, `index` `(B,)` and `history`."""

LossFn = Callable[[PyTree, Array, Batch], tuple[Array, Mapping[str, Any]]]
"""`loss_fn(params, key, batch) -> (per_example (B,), aux)`."""
