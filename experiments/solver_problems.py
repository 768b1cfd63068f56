"""What the solvers are compared on: an exact denoiser, or a trained network's.

Deterministic solvers should arrive at the solution of the probability flow, which in y = x / alpha
and l = log(alpha / sigma) is

    dy/dl = x0(y) - y,    followed from the first node of the grid to clean data               (1)

(eq. 1 of `jaxdiff.solvers._steps`). For a mixture of Gaussians x0(y) is known in closed form, and
eq. (1) is solved in float64 to 10 digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from experiments import build, drawing, trained
from jaxdiff import denoisers, grids, rng, sampling, schedules, solvers
from jaxdiff.base import Array, Denoiser, Node, PyTree, Schedule, Solver

COMPONENTS, DIMENSIONS = 5, 8
CLEAN = 1e-5  # sigma/alpha from where y is x0 to 10 digits


class Problem(NamedTuple):
    """What is to be solved.

    Attributes:
      about: what it is, in a line.
      schedule: the noise schedule.
      denoiser: `params -> denoiser`.
      params: of the denoiser; an argument of the compiled programs.
      seed: of all noise.
      noise: what the samples start from, in units of sigma, `(B, *event)`.
      solution: `first node -> Solution`.
      exact_to: `(first node, last node) -> samples`: eq. (1) to the last noisy node, then one move
        to clean data; None where it is not known.
      data: `number -> samples` of the data's distribution, or None where it is not known.
    """

    about: str
    schedule: Schedule
    denoiser: Callable[[PyTree], Denoiser]
    params: PyTree
    seed: int
    noise: Array
    solution: Callable[[Node], Solution]
    exact_to: Callable[[Node, Node], np.ndarray] | None = None
    data: Callable[[int], np.ndarray] | None = None


class Solution(NamedTuple):
    """The solution of eq. (1), float64 `(B, *event)`, and below what errors say nothing."""

    samples: np.ndarray
    floor: float


def mixture(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns weights `(K,)`, means `(K, D)` in [-1, 1] and standard deviations `(K, D)`."""
    draw, shape = np.random.default_rng(seed), (COMPONENTS, DIMENSIONS)
    weights = draw.dirichlet(np.full(COMPONENTS, 3.0))
    return weights, draw.uniform(-1, 1, shape), draw.uniform(0.2, 0.5, shape)


def expected_x0(parts: tuple[np.ndarray, ...], y: np.ndarray, rho: float) -> np.ndarray:
    """Returns E[x0 | y = x0 + rho eps] of a mixture, by hand, in float64: `(B, D)`."""
    weights, means, stds = parts
    variance, offset = stds**2 + rho**2, y[:, None] - means
    log_p = np.log(weights) - 0.5 * np.sum(offset**2 / variance + np.log(variance), axis=-1)
    share = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    return np.sum(share[..., None] * (means + stds**2 / variance * offset), axis=1)


def exact_flow(
    parts: tuple[np.ndarray, ...], y: np.ndarray, start: float, end: float
) -> np.ndarray:
    """Follows eq. (1) of a mixture from sigma/alpha = start to end, then takes x0: `(B, D)`."""

    def velocity(half_log_snr: float, flat: np.ndarray) -> np.ndarray:
        y = flat.reshape(-1, DIMENSIONS)
        return (expected_x0(parts, y, math.exp(-half_log_snr)) - y).ravel()

    ends = -math.log(start), -math.log(end)
    solved = solve_ivp(velocity, ends, y.ravel(), method="DOP853", rtol=1e-10, atol=1e-10)
    if not solved.success:
        raise RuntimeError(f"the reference solution failed: {solved.message}")
    return expected_x0(parts, solved.y[:, -1].reshape(y.shape), end)


def mixture_problem(num: int, seed: int) -> Problem:
    """Returns the problem of the mixture under the linear schedule of 1000 steps."""
    parts, schedule = mixture(), schedules.linear()
    exact = denoisers.gaussian_mixture(*parts)
    noise = starts(num, seed, (DIMENSIONS,))

    @functools.cache
    def flow(alpha: float, sigma: float, end: float) -> np.ndarray:
        return exact_flow(parts, sigma / alpha * np.float64(noise), sigma / alpha, end)

    def exact_to(first: Node, last: Node) -> np.ndarray:
        return flow(float(first.alpha), float(first.sigma), _ratio(last))

    @functools.cache
    def floor(sigma_max: float) -> float:
        # What single precision leaves: of many steps to a node, against eq. (1) to that node.
        grid = grids.uniform_log_snr(schedule, 1000, sigma_max=sigma_max)
        found, _ = walk(problem, solvers.dpm_solver_pp(3), grid)
        return rms(found - exact_to(grid[0], grid[-2]))

    def solution(first: Node) -> Solution:
        samples = flow(float(first.alpha), float(first.sigma), CLEAN)
        return Solution(samples, floor(_ratio(first)))

    def data(number: int) -> np.ndarray:
        # Of another seed each, and none of them that of the starts.
        return np.asarray(exact.sample(jax.random.key(seed + 1000 + number), num), np.float64)

    problem = Problem(
        f"a mixture of {COMPONENTS} Gaussians in {DIMENSIONS} dimensions, linear schedule of "
        f"{schedule.num_steps} steps, {num} samples",
        schedule, lambda _: exact.denoiser, None, seed, noise, solution, exact_to, data,
    )  # fmt: skip
    return problem


def network_problem(
    workdir: Path,
    *,
    num: int,
    seed: int,
    step: int | None = None,
    ema: bool = True,
    reference_steps: int = 500,
    sigma_min: float | None = None,
) -> Problem:
    """Returns the problem of a trained network.

    Its solution is what `reference_steps` steps of DPM-Solver++(3M) arrive at, uniform in log-SNR
    and to clean data at last; DEIS on the same grid says how well that is known.

    Args:
      workdir: its run directory.
      num: how many samples; they have the run's labels in turn.
      seed: the seed of the starts.
      step: its checkpoint; the newest if None.
      ema: whether to take the average of the parameters.
      reference_steps: see above.
      sigma_min: the last sigma/alpha before clean data; the schedule's if None.

    Raises:
      RunError: see `experiments.trained.load`.
      ValueError: the network is self-conditioned: there is no flow.
    """
    config, params, shape, step = trained.load(workdir, step, ema=ema)
    if config.self_condition:
        raise ValueError(
            f"{workdir} holds a self-conditioned network, whose steps depend on those before: it "
            "has no probability flow to compare with"
        )
    config.sample.guidance, config.sample.threshold = "none", "none"
    schedule, make = build.make_schedule(config), drawing.make_denoiser(config, shape)
    labels = drawing.make_labels(config, 0, num)
    noise = starts(num, seed, shape)

    @functools.cache
    def solve(sigma_max: float) -> Solution:
        if math.isinf(sigma_max):
            raise ValueError(
                "the grid starts from zero signal, where the solution is not defined by log-SNR: "
                "take a spacing by noise, such as --grid=uniform_log_snr,karras"
            )
        grid = grids.uniform_log_snr(
            schedule, reference_steps, sigma_max=sigma_max, sigma_min=sigma_min
        )
        found, other = (
            walk(problem, s, grid)[0] for s in (solvers.dpm_solver_pp(3), solvers.deis(3))
        )
        return Solution(found, rms(found - other))

    problem = Problem(
        f"the network of {workdir} at step {step}, {num} samples",
        schedule, lambda params: make(params, labels), params, seed, noise,
        lambda first: solve(_ratio(first)),
    )  # fmt: skip
    return problem


def starts(num: int, seed: int, shape: tuple[int, ...]) -> Array:
    """Returns the noise that `sampling.sample` starts from, in units of sigma."""
    keys = rng.per_example(jax.random.key(seed), jnp.arange(num))
    return rng.normal(rng.stream(keys, rng.Stream.START), shape)


def walk(problem: Problem, solver: Solver, grid: Node) -> tuple[np.ndarray, int]:
    """Returns the samples, float64, and how many evaluations they took."""

    # Noise and parameters are arguments, so that they are not compiled in.
    @jax.jit
    def program(params: PyTree, noise: Array) -> tuple[Array, sampling.Record]:
        keys = rng.per_example(jax.random.key(problem.seed), jnp.arange(noise.shape[0]))
        return sampling.walk(keys, problem.denoiser(params), solver, grid, grid.sigma[0] * noise)

    samples, record = program(problem.params, problem.noise)
    return np.asarray(samples, np.float64), int(record.evaluations)


def rms(difference: np.ndarray) -> float:
    """Returns the root mean square of all entries."""
    return float(np.sqrt(np.mean(np.square(difference))))


def _ratio(node: Node) -> float:
    alpha = float(node.alpha)
    return float(node.sigma) / alpha if alpha else math.inf
