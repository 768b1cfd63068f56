"""Discrete noise schedules: how fast the data turns into noise, in T steps.

A discrete schedule is known by its betas (Ho et al. 2020, section 2), the variances of the noise
that each of the T steps of the forward chain adds:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                               (1)
    alpha_t = 1 - beta_t,   alpha_bar_t = prod_{s <= t} alpha_s                            (2)
    q(x_t | x0) = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I)                             (3)

Index 0 of every array is the papers' t = 1; before it lies clean data. All is computed in float64
on the host and rounded once, to float32: in float32 itself, 1 - alpha_bar would have few digits
left at the clean end.

Example:
  >>> schedule = linear()
  >>> schedule.num_steps, float(schedule.betas[0]), float(schedule.betas[-1])
  (1000, 9.99...e-05, 0.019999...)
  >>> node = schedule.at(999)
  >>> print(f"{node.alpha:.6f} {node.sigma:.6f}")
  0.006353 0.999980
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxdiff._checks import check_index, is_concrete
from jaxdiff.base import Array, Node
from jaxdiff.schedules.continuous import variance_preserving


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A discrete schedule; make it with one of the functions below.

    Attributes:
      betas: float32 `(T,)`, the variances of eq. (1).
      alphas: float32 `(T,)`, `1 - betas`.
      alphas_bar: float32 `(T,)`, eq. (2).
      nodes: all points of the process, fields `(T,)`: `alpha` is the square root of `alphas_bar`,
        `sigma` that of `1 - alphas_bar`.
    """

    betas: Array
    alphas: Array
    alphas_bar: Array
    nodes: Node

    @property
    def num_steps(self) -> int:
        """The number of steps, T."""
        return self.betas.shape[0]

    @property
    def ends_at_zero_snr(self) -> bool:
        """Whether the last node is known to hold no signal at all (alpha exactly 0)."""
        alpha = self.nodes.alpha
        # On the host: in a traced function an index into a constant is a traced value.
        return is_concrete(alpha) and float(np.asarray(alpha)[-1]) == 0.0

    def at(self, t: Array | int) -> Node:
        """Returns the node at index `t`.

        No gradient flows back into the schedule.

        Args:
          t: integers in `0 .. T-1`, shape `()` or `(B,)`.

        Returns:
          The node, with fields of the shape of `t`.

        Raises:
          TypeError: `t` is not of an integer type.
          ValueError: a known value of `t` is out of range. In a compiled program an index out of
            range gives NaN, where a plain gather would silently clamp it.
        """
        return Node(jnp.asarray(t), take(self.nodes.alpha, t), take(self.nodes.sigma, t))

    def log_snr(self, t: Array | int) -> Array:
        """Returns log(alpha² / sigma²) at index `t`, shape of `t`; errors as `at`."""
        return self.at(t).log_snr

    def time(self, log_snr: Array | float) -> Array:
        """Returns the index at a log-SNR, float, interpolated and held within `[0, T-1]`."""
        table = jnp.maximum(self.nodes.log_snr, -100)  # the last may be -inf
        return jnp.interp(-jnp.asarray(log_snr), -table, jnp.arange(self.num_steps, dtype=float))

    def levels(self, log_snr: Array) -> tuple[Array, Array]:
        """Returns alpha and sigma at a log-SNR, also between the indices."""
        return variance_preserving(log_snr)


def take(table: Array, t: Array | int) -> Array:
    """Returns `table[t]` for a table `(T,)`; an index out of range fails as `NoiseSchedule.at`."""
    num_steps = table.shape[0]
    t = check_index(t, num_steps)
    values = jax.lax.stop_gradient(table)[jnp.clip(t, 0, num_steps - 1)]
    return jnp.where((t >= 0) & (t < num_steps), values, jnp.nan)


def from_betas(betas: ArrayLike) -> NoiseSchedule:
    """Makes the schedule with the given variances of the steps, eq. (1).

    Args:
      betas: `(T,)`, each strictly between 0 and 1.

    Returns:
      The schedule.

    Raises:
      ValueError: `betas` is not a vector, is empty, or has a value outside (0, 1).
    """
    betas = _vector("betas", betas)
    if bad := np.flatnonzero(~((betas > 0) & (betas < 1))).tolist():
        raise ValueError(
            f"every beta must lie in (0, 1), got betas[{bad[0]}] = {betas[bad[0]]}: beta is the "
            "variance of a step's noise; a schedule that ends at zero signal-to-noise is made "
            "with from_alphas_bar"
        )
    # log1p keeps the digits of 1 - alpha_bar at the clean end.
    log_alphas_bar = np.cumsum(np.log1p(-betas))
    return _schedule(betas, np.exp(log_alphas_bar), -np.expm1(log_alphas_bar))


def from_alphas_bar(alphas_bar: ArrayLike) -> NoiseSchedule:
    """Makes the schedule with the given remaining signal, eq. (2).

    Args:
      alphas_bar: `(T,)`, strictly decreasing, in (0, 1); the last may be 0, which makes a schedule
        of zero terminal signal-to-noise ratio (Lin et al. 2023).

    Returns:
      The schedule.

    Raises:
      ValueError: `alphas_bar` is not a vector, is empty, leaves its range or does not decrease.
    """
    alphas_bar = _vector("alphas_bar", alphas_bar)
    if not (np.all(np.diff(alphas_bar) < 0) and alphas_bar[0] < 1 and alphas_bar[-1] >= 0):
        raise ValueError(
            "alphas_bar must decrease strictly and lie in (0, 1), its last value in [0, 1), "
            f"got {alphas_bar}"
        )
    alphas = alphas_bar / np.concatenate([[1.0], alphas_bar[:-1]])
    return _schedule(1 - alphas, alphas_bar, 1 - alphas_bar)


def linear(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Betas at equal distances (Ho et al. 2020, section 4).

    Args:
      num_steps: T.
      beta_start: the first beta, in (0, 1).
      beta_end: the last beta, in (0, 1).

    Raises:
      ValueError: `num_steps` is not a positive integer, or a beta lies outside (0, 1). So do all
        schedules below.
    """
    return from_betas(beta_start + (beta_end - beta_start) * _ramp(num_steps))


def quadratic(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Betas whose square roots are at equal distances ("quad" in the code of Ho et al. 2020)."""
    _check_ends(beta_start, beta_end)
    start, end = np.sqrt(beta_start), np.sqrt(beta_end)
    return from_betas((start + (end - start) * _ramp(num_steps)) ** 2)


def scaled_linear(
    num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> NoiseSchedule:
    """`quadratic` under the name and with the ends of latent diffusion (Rombach et al. 2022)."""
    return quadratic(num_steps, beta_start, beta_end)


def exponential(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Betas in equal ratios: beta_start * (beta_end / beta_start)^(t / (T-1))."""
    _check_ends(beta_start, beta_end)
    return from_betas(beta_start * (beta_end / beta_start) ** _ramp(num_steps))


def sigmoid(
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    steepness: float = 6.0,
) -> NoiseSchedule:
    """Betas on a logistic curve from -steepness to steepness (GeoDiff, Xu et al. 2022)."""
    if not steepness > 0:
        raise ValueError(f"steepness must be positive, got {steepness}")
    logistic = 1 / (1 + np.exp(-steepness * (2 * _ramp(num_steps) - 1)))
    return from_betas(beta_start + (beta_end - beta_start) * logistic)


def cosine(num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar on a squared cosine (Nichol & Dhariwal 2021, eq. 17), betas clipped.

    alpha_bar_t = f(t) / f(0), f(t) = cos²((t/T + s) / (1 + s) * pi/2), beta_t <= max_beta.

    Args:
      num_steps: T.
      s: the offset that keeps the first betas from being too small, >= 0.
      max_beta: where betas are clipped, in (0, 1).
    """
    check_num_steps(num_steps)
    if not s >= 0:
        raise ValueError(f"s must not be negative, got {s}")
    angle = (np.arange(num_steps + 1) / num_steps + s) / (1 + s) * np.pi / 2
    # 1 - cos²(b) / cos²(a) = sin(b - a) sin(b + a) / cos²(a), without the cancellation.
    now, after = angle[:-1], angle[1:]
    betas = np.sin(after - now) * np.sin(after + now) / np.cos(now) ** 2
    return from_betas(np.minimum(betas, max_beta))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Moves and scales the signal so that the last node has none (Lin et al. 2023, algorithm 1).

    alpha_t becomes (alpha_t - alpha_T) alpha_1 / (alpha_1 - alpha_T): the first node stays, the
    last has alpha exactly 0. Networks for it must not predict eps or score.

    Args:
      schedule: any discrete schedule of two or more steps.

    Raises:
      ValueError: the schedule has one step, or its values are not known (inside of a compiled
        program).
    """
    if schedule.num_steps < 2:
        raise ValueError("the schedule must have at least 2 steps, got 1, which is first and last")
    alpha = np.exp(log_alphas_bar(schedule) / 2)
    return from_alphas_bar(((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2)


def log_alphas_bar(schedule: NoiseSchedule) -> np.ndarray:
    """Returns log(alpha_bar), eq. (2), float64 `(T,)`, to the precision of the stored betas.

    Raises:
      ValueError: the schedule's values are not known (inside of a compiled program).
    """
    if not is_concrete(schedule.betas):
        raise ValueError(
            "a schedule is changed on the host and its values must be known: do it outside of jit, "
            "or close over the schedule instead of passing it as an argument"
        )
    betas, alphas = (np.asarray(a, np.float64) for a in (schedule.betas, schedule.alphas))
    with np.errstate(divide="ignore"):  # the last alpha may be 0
        # alphas_bar itself, in float32, has no digits left at the clean end.
        return np.cumsum(np.where(betas < 0.5, np.log1p(-betas), np.log(alphas)))


def check_num_steps(num_steps: int) -> None:
    """Checks that a number of steps is a positive integer.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(num_steps, (int, np.integer)) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive integer, got {num_steps!r}")


def _schedule(betas: np.ndarray, alphas_bar: np.ndarray, noise: np.ndarray) -> NoiseSchedule:
    # Concrete arrays also where a schedule is made inside a traced function.
    with jax.ensure_compile_time_eval():
        nodes = Node(
            jnp.asarray(np.arange(betas.size), jnp.int32),
            jnp.asarray(np.sqrt(alphas_bar), jnp.float32),
            jnp.asarray(np.sqrt(noise), jnp.float32),
        )
        tables = (jnp.asarray(table, jnp.float32) for table in (betas, 1 - betas, alphas_bar))
        return NoiseSchedule(*tables, nodes)


def _ramp(num_steps: int) -> np.ndarray:
    check_num_steps(num_steps)
    return np.linspace(0.0, 1.0, num_steps)


def _check_ends(beta_start: float, beta_end: float) -> None:
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise ValueError(f"{name} must lie in (0, 1), got {beta}")


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{name} must be a vector with at least one value, got {values.shape}")
    return values
