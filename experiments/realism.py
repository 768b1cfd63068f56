"""Scores of synthetic patients, beside two marks: how close real patients come, and chance.

Synthetic patients, made from those trained on, are compared with real patients held out. So are
the patients trained on themselves, the floor that no honest cohort falls below; and a strawman,
which draws every value of every column on its own from those trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdiff import evaluation, viz
from jaxdiff.data.tables import Schema

if TYPE_CHECKING:
    from pandas import DataFrame

CLASSIFIERS = ("boosting", "forest")
SHOWN = 6  # patients whose trajectories are drawn


def columns(schema: Schema) -> tuple[list[str], list[str]]:
    """Returns the columns of numbers and of categories that change from visit to visit."""
    moving = [column for column in schema.columns if not column.static]
    varied = [column for column in moving if column.is_real or len(column.categories) > 1]
    return (
        [column.name for column in varied if column.is_real],
        [column.name for column in varied if not column.is_real],
    )


def statics(schema: Schema) -> list[str]:
    """Returns the static columns that take more than one value."""
    chosen = [schema[name] for name in schema.statics]
    return [c.name for c in chosen if c.is_real or len(c.categories) > 1]


def bootstrap(table: DataFrame, schema: Schema, seed: int) -> DataFrame:
    """Returns the strawman: the same patients and visit times, every value drawn on its own."""
    bits = np.random.default_rng(seed)
    shuffled = {
        column.name: table[column.name].iloc[bits.integers(0, len(table), len(table))].array
        for column in schema.columns
    }
    return table.assign(**shuffled)


def numbered(table: DataFrame, schema: Schema) -> DataFrame:
    """Returns the table with times that are dates as days."""
    if schema.time_dtype != "datetime":
        return table
    days = table[schema.time].to_numpy("datetime64[us]").astype(np.int64) / 86_400_000_000
    return table.assign(**{schema.time: days})


def firsts(table: DataFrame, schema: Schema) -> DataFrame:
    """Returns the first row of each patient: static columns count once, not once a visit."""
    return table.drop_duplicates(schema.patient)


def realism(
    real: DataFrame, synthetic: DataFrame, schema: Schema, *, classify: bool = True, seed: int = 0
) -> dict[str, float]:
    """Returns how far a synthetic table is from a real one; 0 is best, and 0.5 for the AUCs.

    Args:
      real: real patients.
      synthetic: synthetic patients.
      schema: what both hold.
      classify: whether to train classifiers to tell them apart, which takes the longest.
      seed: of the classifiers.
    """
    real, synthetic = numbered(real, schema), numbered(synthetic, schema)
    reals, categories = columns(schema)
    both, fixed = [*reals, *categories], statics(schema)
    fixed_reals = [name for name in fixed if schema[name].is_real]
    fixed_categories = [name for name in fixed if not schema[name].is_real]
    every, coded = [*both, *fixed], [*categories, *fixed_categories]

    def distance(score: Any, tables: tuple[DataFrame, DataFrame], names: list[str]) -> float:
        """Returns the mean over columns; one of which all was drawn missing is at distance 1."""
        drawn = [name for name in names if tables[1][name].notna().any()]
        found = score(*tables, drawn) if drawn else {}
        return float(np.mean([found.get(name, 1.0) for name in names]))

    everyone, first = (real, synthetic), (firsts(real, schema), firsts(synthetic, schema))
    scores = {}
    for tables, of_numbers, of_categories, prefix in (
        (everyone, reals, categories, ""),
        (first, fixed_reals, fixed_categories, "static: "),
    ):
        if of_numbers:
            scores[f"{prefix}KS of numbers"] = distance(evaluation.ks, tables, of_numbers)
            scores[f"{prefix}Wasserstein of numbers"] = distance(
                evaluation.wasserstein, tables, of_numbers
            )
        if of_categories:
            scores[f"{prefix}total variation of categories"] = distance(
                evaluation.total_variation, tables, of_categories
            )
    if len(both) > 1:
        scores["rank correlation"] = evaluation.correlation_difference(real, synthetic, both)
    if all(table.duplicated(schema.patient).any() for table in everyone):
        before, after = (
            evaluation.lag_one(table, both, schema.patient, schema.time) for table in everyone
        )
        for what, names in (("numbers", reals), ("categories", categories)):
            # What does not vary among the synthetic patients counts as uncorrelated.
            moved = [abs(before[name] - np.nan_to_num(after[name])) for name in names]
            if moved:
                scores[f"lag-1 of {what}, mean"] = float(np.nanmean(moved))
                scores[f"lag-1 of {what}, worst"] = float(np.nanmax(moved))
        visits = evaluation.visits(real, synthetic, schema.patient, schema.time)
        scores["visits a patient, KS"] = visits["count"].ks
        scores["gaps between visits, KS"] = visits["gap"].ks
    missing = evaluation.missing_rates(real, synthetic, every)
    scores["missing values, worst"] = max(abs(rate.difference) for rate in missing.values())
    drawn = [name for name in every if synthetic[name].notna().any()]
    outside = evaluation.out_of_range(real, synthetic, drawn, categorical=coded)
    scores["out of range, worst"] = max(outside.values())
    if classify:
        for name in CLASSIFIERS:
            scores[f"AUC of single visits, {name}"] = evaluation.two_sample_auc(
                real, synthetic, [*every, schema.time], schema.patient,
                categorical=coded, classifier=name, seed=seed,
            )  # fmt: skip
    return scores


def privacy(
    train: DataFrame, held_out: DataFrame, synthetic: DataFrame, schema: Schema
) -> dict[str, float]:
    """Returns how much closer synthetic records are to those trained on than strangers are.

    The ratio of distances is 1, and the AUC of telling who was trained on 0.5, where nobody is
    given away.
    """
    reals, categories = columns(schema)
    fixed = statics(schema)
    coded = [*categories, *(name for name in fixed if not schema[name].is_real)]
    parts = (numbered(table, schema) for table in (train, held_out, synthetic))
    scores = evaluation.privacy(
        *parts, schema.patient, schema.time, [*reals, *categories],
        static=fixed, categorical=coded,
    )  # fmt: skip
    return {
        f"{what}, {name}": getattr(score, field)
        for name, score in scores.items()
        for what, field in (
            ("distance to closest record / that of strangers", "ratio"),
            ("copies", "copies"),
            ("membership AUC", "membership_auc"),
        )
    }


def utility(
    train: DataFrame,
    held_out: DataFrame,
    synthetic: DataFrame,
    schema: Schema,
    target: str,
    positive: str | None,
) -> dict[str, float]:
    """Returns what a model learns from synthetic patients, against what it learns from real ones.

    A logistic regression predicts the target at a visit from what was found at that visit: the
    columns that change, not the static ones, of which some may be known only later.

    Raises:
      ValueError: there is no such column, or it has no such value.
    """
    if target not in schema.order:
        raise ValueError(f"evaluate.target must be a column, {', '.join(schema.order)}: {target!r}")
    value: Any = None
    if positive is not None:
        known = {str(category): category for category in schema[target].categories}
        if positive not in known:
            raise ValueError(
                f"evaluate.positive must be a value of {target}, {', '.join(known)}: {positive!r}"
            )
        value = known[positive]
    reals, categories = columns(schema)
    features = [name for name in (*reals, *categories) if name != target]
    scores = evaluation.train_synthetic_test_real(
        train, synthetic, held_out, target, features, positive=value, categorical=categories
    )
    kind = f"{scores.metric.upper()} of predicting {target}"
    return {
        f"{kind}, trained on real": scores.real,
        f"{kind}, trained on synthetic": scores.synthetic,
        f"{kind}, ratio": scores.ratio,
        f"{kind}, ratio above chance": scores.ratio_above_chance,
    }


def sections(real: DataFrame, synthetic: DataFrame, schema: Schema) -> list[viz.Section]:
    """Returns the parts of a report that show real and synthetic patients side by side."""
    reals, categories = columns(schema)
    fixed = statics(schema)
    groups = {"real": numbered(real, schema), "synthetic": numbered(synthetic, schema)}
    once = {name: firsts(table, schema) for name, table in groups.items()}
    fixed_reals = [name for name in fixed if schema[name].is_real]
    fixed_categories = [name for name in fixed if not schema[name].is_real]
    units = {column.name: column.unit for column in schema.columns}
    time = f"{schema.time} / {schema.time_unit}" if schema.time_unit else schema.time

    def numbers(tables: Mapping[str, DataFrame], names: Sequence[str]) -> dict[str, Any]:
        return {key: {n: floats(table[n]) for n in names} for key, table in tables.items()}

    def blocks(
        tables: Mapping[str, DataFrame], of_numbers: list[str], of_categories: list[str]
    ) -> list[Any]:
        found: list[Any] = []
        if of_numbers:
            found.append(viz.Densities(numbers(tables, of_numbers), units=units))
        if of_categories:
            values = {key: {n: table[n] for n in of_categories} for key, table in tables.items()}
            order = {n: schema[n].categories for n in of_categories}
            found.append(viz.Bars(values, categories=order))
        return found

    both = [*reals, *categories]
    maps = {key: evaluation.rank_correlation(table, both) for key, table in groups.items()}
    lags = {
        key: evaluation.lag_one_matrix(table, both, schema.patient, schema.time)
        for key, table in groups.items()
    }
    shown = reals[:4]
    lines = {
        key: {
            name: [(floats(r[schema.time]), floats(r[name])) for r in first_records(table, schema)]
            for name in shown
        }
        for key, table in groups.items()
    }
    parts = [
        ("Visits", blocks(groups, reals, categories)),
        ("Patients", [visits_plot(groups, schema), *blocks(once, fixed_reals, fixed_categories)]),
        (
            "Dependence",
            [
                viz.Heatmaps(
                    {**maps, "difference": maps["synthetic"] - maps["real"]}, both,
                    caption="Rank correlations of the columns of a visit",
                ),
                viz.Heatmaps(
                    {**lags, "difference": lags["synthetic"] - lags["real"]}, both,
                    caption="Rank correlations of a visit (rows) with the next (columns)",
                ),
            ],
        ),
    ]  # fmt: skip
    if shown:
        caption = f"The first {SHOWN} patients of each table with at least three visits"
        parts.append(
            (
                "Some patients",
                [viz.Trajectories(lines, units=units, time_label=time, caption=caption)],
            )
        )
    return [viz.Section(heading, found) for heading, found in parts]


def visits_plot(groups: Mapping[str, DataFrame], schema: Schema) -> viz.Densities:
    """Returns the plot of how many visits patients have, and how far apart."""

    def of(table: DataFrame) -> dict[str, Any]:
        gaps = table.groupby(schema.patient)[schema.time].diff()
        return {
            "visits a patient": table.groupby(schema.patient).size().to_numpy(),
            "gap between visits": floats(gaps.dropna()),
        }

    return viz.Densities({name: of(table) for name, table in groups.items()})


def first_records(table: DataFrame, schema: Schema) -> list[DataFrame]:
    """Returns the records of the first patients that have something to show."""
    records = [record for _, record in table.groupby(schema.patient, sort=False)]
    return [record for record in records if len(record) > 2][:SHOWN]


def floats(column: Any) -> np.ndarray:
    """Returns a column of a table as float64, NaN where missing."""
    return column.to_numpy(np.float64, na_value=np.nan)
