"""Error against network evaluations: every solver, on an exact denoiser or on a trained one.

    python -m experiments.solver_study
    python -m experiments.solver_study --grid=uniform_log_snr,quadratic,karras --evaluations=8,16
    python -m experiments.solver_study --workdir=runs/digits --solvers=ddim,dpm_solver_pp_2m,unipc_2

All samples start from the same noise. Each solver takes as many steps as the budget of evaluations
is enough for; what it took is counted by the sampling loop, not by the solver's name. Deterministic
solvers should arrive at the solution of the probability flow, which in y = x / alpha and l =
log(alpha / sigma) is

    dy/dl = x0(y) - y,    followed from the first node of the grid to clean data               (1)

(eq. 1 of `jaxdiff.solvers._steps`). Their error is the root mean square, over samples and
coordinates, of the distance to it. Without `--workdir` the data are a mixture of Gaussians whose
x0(y) is known in closed form, and eq. (1) is solved in float64 to 10 digits. With it, the solution
is that of the network's own flow by `--reference_steps` steps of DPM-Solver++(3M), and is checked
by DEIS. The network is asked as it is, without guidance and thresholding, whose kinks are not what
is studied here.

Stochastic solvers have no such solution. On the mixture they are judged by the distribution of
their samples: the sliced Wasserstein distance to exact samples, beside that of other exact samples.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from experiments import build, drawing, runs, runtime, solver_report
from experiments.solver_problems import Problem, mixture_problem, network_problem, rms, walk
from jaxdiff import grids
from jaxdiff.base import Node, Schedule, Solver

FLAGS = flags.FLAGS
SIGMA_MAX = 80.0  # EDM's: above it a mixture, or images, are noise to float32
TOLERANCES = (1e-2, 1e-3, 1e-4)
PROJECTIONS = 128
EXACT_SETS = 8


class Row(NamedTuple):
    """A solver of the table, and what of a grid it needs.

    Attributes:
      solver: its name in `drawing.SOLVERS`.
      options: its options.
      nodes: the largest number of noisy nodes for which a budget of evaluations is enough.
      refine: puts the nodes of its stages into a grid.
      least: the fewest noisy nodes that it can walk.
      multistep: whether it works with the values of past steps.
      random: whether it draws noise.
    """

    solver: str
    options: Mapping[str, Any] = {}
    nodes: Callable[[int], int] = lambda budget: budget
    refine: Callable[[Schedule, Node], Node] = lambda schedule, grid: grid
    least: int = 1
    multistep: bool = False
    random: bool = False


def _multistep(solver: str, **options: Any) -> Row:
    return Row(solver, options, multistep=True)


def _singlestep(solver: str, order: int) -> Row:
    return Row(
        solver,
        {"order": order, "kind": "singlestep"},
        # The last evaluation is that of the move to clean data.
        nodes=lambda budget: (budget - 1) // order + 1,
        refine=lambda schedule, grid: grids.with_midpoints(schedule, grid, order),
    )


ROWS = {
    "ddim": Row("ddim"),
    "euler": Row("euler"),
    "heun": Row("heun", nodes=lambda budget: (budget + 1) // 2),
    "dpm_solver_2s": _singlestep("dpm_solver", 2),
    "dpm_solver_3s": _singlestep("dpm_solver", 3),
    "dpm_solver_2m": _multistep("dpm_solver", order=2, kind="multistep", average="midpoint"),
    "dpm_solver_3m": _multistep("dpm_solver", order=3, kind="multistep"),
    "dpm_solver_pp_1": Row("dpm_solver_pp", {"order": 1}),
    "dpm_solver_pp_2s": _singlestep("dpm_solver_pp", 2),
    "dpm_solver_pp_3s": _singlestep("dpm_solver_pp", 3),
    "dpm_solver_pp_2m": _multistep("dpm_solver_pp", order=2),
    "dpm_solver_pp_2m_exact": _multistep("dpm_solver_pp", order=2, average="exact"),
    "dpm_solver_pp_3m": _multistep("dpm_solver_pp", order=3),
    "unipc_1": _multistep("unipc", order=1),
    "unipc_2": _multistep("unipc", order=2),
    "unipc_2_bh1": _multistep("unipc", order=2, variant="bh1"),
    "unipc_3": _multistep("unipc", order=3),
    "deis_2": _multistep("deis", order=2),
    "deis_3": _multistep("deis", order=3),
    "deis_4": _multistep("deis", order=4),
    "lms_2": _multistep("lms", order=2),
    "lms_4": _multistep("lms", order=4),
    "plms": Row("plms", nodes=lambda budget: budget - 1, multistep=True),
    # Three steps of four evaluations each, which cannot be the one to clean data.
    "pndm": Row(
        "pndm", nodes=lambda budget: budget - 9, refine=grids.with_halves, least=4, multistep=True
    ),
    **{
        f"probability_flow_{tolerance:.0e}": Row(
            "probability_flow", {"rtol": tolerance, "atol": tolerance}
        )
        for tolerance in TOLERANCES
    },
    "ddpm": Row("ddpm", random=True),
    "ddpm_large": Row("ddpm", {"variance": "large"}, random=True),
    "ddim_eta_1": Row("ddim", {"eta": 1.0}, random=True),
    "euler_ancestral": Row("euler_ancestral", random=True),
    "sde_dpm_solver_pp_1": Row("sde_dpm_solver_pp", {"order": 1}, random=True),
    "sde_dpm_solver_pp_2m": Row("sde_dpm_solver_pp", {"order": 2}, random=True),
    "predictor_corrector": Row(
        "predictor_corrector", nodes=lambda budget: (budget + 1) // 2, random=True
    ),
}


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    define = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "A run directory; the mixture if not given.", **define)
    flags.DEFINE_string("out", "runs/solver_study", "Folder to write to.", **define)
    flags.DEFINE_integer("step", None, "The checkpoint to use; else the newest.", **define)
    flags.DEFINE_bool("ema", True, "Use the average of the parameters.", **define)
    flags.DEFINE_list("evaluations", "10,20,50", "The budgets.", **define)
    flags.DEFINE_list("grid", "uniform_log_snr", "The spacings of the steps.", **define)
    flags.DEFINE_float(
        "sigma_max",
        None,
        f"The first sigma/alpha, of spacings in it; else the schedule's, {SIGMA_MAX:g} at most.",
        **define,
    )
    flags.DEFINE_float(
        "sigma_min", None, "The last sigma/alpha, of spacings in it; else the schedule's.", **define
    )
    flags.DEFINE_list("solvers", None, "Only these; else all. ddim is always there.", **define)
    flags.DEFINE_integer(
        "num", None, "Samples; else 4096 of the mixture, 64 of a run.", 2, **define
    )
    flags.DEFINE_integer("seed", 0, "The seed of all noise.", 0, **define)
    flags.DEFINE_integer("reference_steps", 500, "Of a run's solution.", 10, **define)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the distance of two samples `(N, D)` of equal size, in the units of the data.

    The root mean square, over random directions, of the 2-Wasserstein distances of what the samples
    are along them (Rabin et al. 2012), which are those of the sorted values.
    """
    directions = np.random.default_rng(0).normal(size=(PROJECTIONS, a.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    along_a, along_b = (np.sort(x @ directions.T, axis=0) for x in (a, b))
    return rms(along_a - along_b)


def spacing(
    name: str, schedule: Schedule, sigma_max: float | None, sigma_min: float | None
) -> Callable[[int], Node]:
    """Returns the spacing `number of noisy nodes -> grid` of a name.

    Raises:
      ValueError: there is no such spacing, or it takes no such option; when called, the number or
        an end is not in range.
    """
    make = build.choose("grid", name, drawing.GRIDS)
    end = 1.0 if schedule.num_steps is None else schedule.num_steps - 1
    noisiest = -float(schedule.log_snr(end)) / 2
    if "sigma_max" in inspect.signature(make).parameters and sigma_max is None:
        sigma_max = SIGMA_MAX if noisiest > math.log(SIGMA_MAX) else None
    options = {"sigma_max": sigma_max, "sigma_min": sigma_min}
    return lambda nodes: build.call("grid", name, drawing.GRIDS, options, schedule, nodes)


def make_solver(problem: Problem, row: Row) -> Solver:
    """Returns the solver of a row."""
    schedule = (problem.schedule,) if row.solver == "probability_flow" else ()
    return build.call("solver", row.solver, drawing.SOLVERS, row.options, *schedule)


def points(
    problem: Problem, row: Row, grid_of: Callable[[int], Node], budgets: Sequence[int]
) -> Iterable[dict[str, Any]]:
    """Yields what a solver achieves: `budget`, `evaluations`, `error` and `distance`.

    There is no `error` for solvers that draw noise, and no `distance` where the data's distribution
    is not known. Budgets that are not enough for a single walk are left out.
    """
    adaptive, solver = row.solver == "probability_flow", make_solver(problem, row)
    for budget in budgets[-1:] if adaptive else budgets:
        nodes = row.nodes(budget)
        if nodes < row.least:
            continue
        grid = row.refine(problem.schedule, grid_of(nodes))
        if adaptive and nodes > 1:
            grid = grid[jnp.array([0, -2, -1])]  # it chooses what lies between
        samples, evaluations = walk(problem, solver, grid)
        point = {"budget": None if adaptive else budget, "evaluations": evaluations}
        if not row.random:
            point["error"] = rms(samples - problem.solution(grid[0]).samples)
        if problem.data is not None:
            point["distance"] = sliced_wasserstein(samples, problem.data(0))
        yield point


def study(
    problem: Problem,
    names: Sequence[str],
    spacings: Mapping[str, Callable[[int], Node]],
    budgets: Sequence[int],
) -> dict[str, Any]:
    """Returns all that is to be told, as JSON holds it."""
    found: dict[str, Any] = {
        "problem": problem.about,
        "budgets": list(budgets),
        "solvers": {
            name: {
                "family": ROWS[name].solver,
                "adaptive": ROWS[name].solver == "probability_flow",
                "multistep": ROWS[name].multistep,
                "random": ROWS[name].random,
            }
            for name in names
        },
        "spacings": {},
    }
    # The user's mistakes are known before the first walk.
    longest = {name: grid_of(budgets[-1]) for name, grid_of in spacings.items()}
    for name in names:
        make_solver(problem, ROWS[name])
    with tqdm.tqdm(total=len(spacings) * len(names), unit="solver", disable=None) as bar:
        for name, grid_of in spacings.items():
            bar.set_description(name)
            solution = problem.solution(longest[name][0])
            here: dict[str, Any] = {"floor": solution.floor, "points": {}, "last_move": {}}
            for solver in names:
                here["points"][solver] = list(points(problem, ROWS[solver], grid_of, budgets))
                bar.update()
            if problem.exact_to is not None:
                for budget in budgets:
                    grid = grid_of(budget)
                    end = problem.solution(grid[0]).samples
                    here["last_move"][str(budget)] = rms(problem.exact_to(grid[0], grid[-2]) - end)
            multistep = [solver for solver in names if ROWS[solver].multistep]
            here["closest_multistep"] = solver_report.closest(here["points"], multistep, budgets)
            found["spacings"][name] = here
    if problem.data is not None:
        sets = [sliced_wasserstein(problem.data(i + 1), problem.data(0)) for i in range(EXACT_SETS)]
        found["exact_samples"] = {
            "sets": EXACT_SETS,
            "mean": float(np.mean(sets)),
            "most": max(sets),
        }
    return found


def choices() -> tuple[list[str], list[int]]:
    """Returns the names of the solvers and the budgets that the flags ask for.

    Raises:
      ValueError: a name or a number is none, or a solver draws noise where only the flow is known.
    """
    fitting = [name for name, row in ROWS.items() if not (FLAGS.workdir and row.random)]
    if importlib.util.find_spec("diffrax") is None:
        fitting = [name for name in fitting if ROWS[name].solver != "probability_flow"]
    names = fitting if FLAGS.solvers is None else ["ddim", *FLAGS.solvers]
    for name in names:
        if build.choose("solvers", name, ROWS).random and FLAGS.workdir:
            raise ValueError(
                f"{name} draws noise, and has no exact solution: what its samples are worth is "
                "known for the mixture only, without --workdir"
            )
    try:
        budgets = sorted({int(budget) for budget in FLAGS.evaluations})
    except ValueError:
        budgets = []
    if not budgets or budgets[0] < 2:
        raise ValueError(
            "evaluations must be integers of at least 2, such as --evaluations=10,20,50, got "
            f"{','.join(FLAGS.evaluations)}"
        )
    return list(dict.fromkeys(names)), budgets


def main() -> None:
    """Runs the command."""
    names, budgets = choices()
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    if FLAGS.workdir:
        problem = network_problem(
            Path(FLAGS.workdir),
            num=FLAGS.num or 64,
            seed=FLAGS.seed,
            step=FLAGS.step,
            ema=FLAGS.ema,
            reference_steps=FLAGS.reference_steps,
            sigma_min=FLAGS.sigma_min,
        )
    else:
        problem = mixture_problem(FLAGS.num or 4096, FLAGS.seed)
    spacings = {
        name: spacing(name, problem.schedule, FLAGS.sigma_max, FLAGS.sigma_min)
        for name in FLAGS.grid or [""]
    }
    found = study(problem, names, spacings, budgets)
    found["seed"] = FLAGS.seed
    print(solver_report.text(found))
    runs.write_json(out / "study.json", found)
    solver_report.write(out, found)
    print(f"\nlook at {out / 'study.html'}; the numbers are in {out / 'study.json'}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
