"""What a study of solvers has to say: tables, sentences and a plot, all from its `study.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff import viz

DASHES = ("-", "--", ":", "-.", (0, (1, 3)), (0, (5, 4)))
TITLE = "The solvers compared"


def at(points: Iterable[Mapping[str, Any]], budget: int) -> Mapping[str, Any]:
    """Returns the point of a budget, or an empty mapping."""
    return next((point for point in points if point["budget"] == budget), {})


def closest(
    points: Mapping[str, Sequence[Mapping[str, Any]]], among: Sequence[str], budgets: Sequence[int]
) -> dict[str, Any]:
    """Returns for each budget the best solver, and how many times closer than ddim it is.

    Args:
      points: of each solver, `ddim` among them.
      among: the names of those that compete.
      budgets: the budgets.
    """
    best = {}
    for budget in budgets:
        errors = {name: at(points[name], budget).get("error") for name in among}
        errors = {name: error for name, error in errors.items() if error is not None}
        if errors:
            name = min(errors, key=errors.__getitem__)
            ratio = at(points["ddim"], budget)["error"] / errors[name]
            best[str(budget)] = {"solver": name, "times_closer_than_ddim": ratio}
    return best


def tables(found: Mapping[str, Any]) -> list[viz.Table]:
    """Returns the tables of a study."""
    made = []
    for name, here in found["spacings"].items():
        made += [
            _fixed(found, name, here),
            _adaptive(found, name, here),
            _random(found, name, here),
        ]
    return [table for table in made if table.rows]


def _names(found: Mapping[str, Any], *, adaptive: bool = False, random: bool = False) -> list[str]:
    return [
        name
        for name, its in found["solvers"].items()
        if its["adaptive"] == adaptive and its["random"] == random
    ]


def _fixed(found: Mapping[str, Any], spacing: str, here: Mapping[str, Any]) -> viz.Table:
    points, budgets = here["points"], found["budgets"]
    ddim = [at(points["ddim"], budget)["error"] for budget in budgets]
    rows = []
    for name in _names(found):
        cells = (at(points[name], budget) for budget in budgets)
        rows.append([name, *(_cell(c, "error", d) for c, d in zip(cells, ddim, strict=True))])
    if here["last_move"]:
        moves = (f"{here['last_move'][str(budget)]:.2e}" for budget in budgets)
        rows.append(["(exact up to the last move)", *moves])
    caption = (
        f"{spacing}: RMS distance to the exact solution and, in brackets, how many times closer "
        "than ddim; @n where n evaluations were taken. Of it, the solution and single precision "
        f"make {here['floor']:.0e}."
    )
    return viz.Table(rows, ("solver", *map(str, budgets)), caption)


def _adaptive(found: Mapping[str, Any], spacing: str, here: Mapping[str, Any]) -> viz.Table:
    rows = [
        [name, point["evaluations"], f"{point['error']:.2e}"]
        for name in _names(found, adaptive=True)
        for point in here["points"][name]
    ]
    caption = f"{spacing}: with steps chosen by tolerance."
    return viz.Table(rows, ("solver", "evaluations", "error"), caption)


def _random(found: Mapping[str, Any], spacing: str, here: Mapping[str, Any]) -> viz.Table:
    names, budgets = _names(found, random=True), found["budgets"]
    if not names:
        return viz.Table([])
    rows = [
        [name, *(_cell(at(here["points"][name], budget), "distance") for budget in budgets)]
        for name in ("ddim", *names)
    ]
    exact = found["exact_samples"]
    caption = (
        f"{spacing}: sliced Wasserstein distance to exact samples. That of other exact samples is "
        f"{exact['mean']:.1e} in the mean of {exact['sets']} sets, {exact['most']:.1e} at most."
    )
    return viz.Table(rows, ("solver", *map(str, budgets)), caption)


def _cell(point: Mapping[str, Any], value: str, ddim: float | None = None) -> str:
    if not point:
        return "-"
    text = f"{point[value]:.2e}"
    if ddim is not None:
        text += f" ({ddim / point[value]:.3g})"
    if point["evaluations"] != point["budget"]:
        text += f" @{point['evaluations']}"
    return text


def findings(found: Mapping[str, Any]) -> list[str]:
    """Returns in sentences how far multistep solvers are ahead of DDIM."""
    lines = [
        f"{name}, {budget} evaluations: the closest multistep solver is {best['solver']}, "
        f"{best['times_closer_than_ddim']:.3g} times closer to the exact solution than ddim"
        for name, here in found["spacings"].items()
        for budget, best in here["closest_multistep"].items()
    ]
    if len(found["spacings"]) == 1:
        return lines
    multistep = [name for name, its in found["solvers"].items() if its["multistep"]]
    for budget in found["budgets"]:
        errors = {
            (solver, name): at(here["points"][solver], budget).get("error", np.inf)
            for name, here in found["spacings"].items()
            for solver in ("ddim", *multistep)
        }
        best, ddim = (
            min(
                (key for key in errors if (key[0] == "ddim") == is_ddim), key=errors.get, default=()
            )
            for is_ddim in (False, True)
        )
        if best and np.isfinite(errors[best]):
            lines.append(
                f"{budget} evaluations, each on its best spacing: {best[0]} on {best[1]} is "
                f"{errors[ddim] / errors[best]:.3g} times closer than ddim on {ddim[1]}"
            )
    return lines


def text(found: Mapping[str, Any]) -> str:
    """Returns the study as text, the columns of its tables aligned."""
    parts = [found["problem"]]
    for table in tables(found):
        rows = [list(map(str, row)) for row in (table.header, *table.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        parts.append("\n".join([table.caption, *lines]))
    return "\n\n".join([*parts, "\n".join(findings(found))]).rstrip()


def curves(found: Mapping[str, Any], spacing: str) -> dict[str, np.ndarray]:
    """Returns the evaluations and errors of each solver that has errors, `(2, K)`."""
    curves: dict[str, list] = {}
    for name, points in found["spacings"][spacing]["points"].items():
        # The tolerances of the adaptive solver make one curve.
        its = found["solvers"][name]
        label = its["family"] if its["adaptive"] else name
        for point in points:
            if "error" in point:
                curves.setdefault(label, []).append((point["evaluations"], point["error"]))
    return {label: np.transpose(pairs) for label, pairs in curves.items()}


def picture(found: Mapping[str, Any]) -> np.ndarray:
    """Draws error against evaluations, a panel a spacing: uint8 `(H, W, 3)`."""
    # Without pyplot, which would choose the backend of the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spacings = found["spacings"]
    figure = Figure(figsize=(5.5 * len(spacings) + 2.5, 5.5), dpi=100, layout="constrained")
    all_axes = figure.subplots(1, len(spacings), sharey=True, squeeze=False)[0]
    # A colour a family, a dash an order or a variant.
    family = {name: its["family"] for name, its in found["solvers"].items()}
    colours = [name for name in dict.fromkeys(family.values()) if name != "ddim"]
    drawn, errors = {}, []
    for axes, spacing in zip(all_axes, spacings, strict=True):
        members: dict[str, int] = {}
        for name, curve in curves(found, spacing).items():
            own = family.get(name, name)
            members[own] = members.get(own, -1) + 1
            drawn[name] = axes.loglog(
                *curve,
                color="black" if own == "ddim" else f"C{colours.index(own)}",
                linestyle=DASHES[members[own] % len(DASHES)],
                linewidth=2.5 if own == "ddim" else 1.3,
                marker=".",
                zorder=3 if own == "ddim" else 2,  # others are the same solver
            )[0]
            errors += list(curve[1])
        floor = spacings[spacing]["floor"]
        axes.axhspan(floor / 1e3, floor, color="0.9")
        axes.set(title=spacing, xlabel="evaluations of the network")
        axes.grid(alpha=0.25, linewidth=0.6)
    all_axes[0].set_ylim(min(errors) / 2, max(errors) * 2)
    all_axes[0].set_ylabel("RMS distance to the exact solution")
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside right upper", frameon=False, fontsize=8
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def write(out: Path, found: Mapping[str, Any]) -> None:
    """Writes `study.png` and the self-contained `study.html` into a folder."""
    viz.save_png(out / "study.png", picture(found))
    sections = [
        viz.Section(TITLE, [found["problem"], *findings(found)]),
        viz.Section("Error against evaluations", [viz.Image(out / "study.png")]),
        viz.Section("Tables", tables(found)),
    ]
    viz.report_html(out / "study.html", title=f"jaxdiff: {TITLE.lower()}", sections=sections)
