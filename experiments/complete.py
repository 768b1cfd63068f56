"""Completes records with a trained model of a table: fills in missing values, or goes on with them.

    python -m experiments.complete --workdir=runs/clinical --table=records.csv
    python -m experiments.complete --workdir=runs/clinical --table=records.csv --forecast=3
    python -m experiments.complete --workdir=runs/clinical --hide=0.2

The first draws what is missing in the table, given all that is not, and writes it filled in to
WORKDIR/completed/imputed.csv: the mean of the draws' numbers, and their most frequent category.

The second draws three further visits of each patient and writes WORKDIR/completed/forecast.csv: a
table like the first, the past as it was; of several draws one below the other, their number in a
column `draw` in front. Their mean would be no record that anybody has. Records so long that with
the new visits they would be longer than any that was trained on are told by their last visits only.

The third says how well the first does: of patients held out (or of --table) it hides some of the
values that change from visit to visit, fills them in and prints the error, beside what takes no
model: the patient's last observed value (else the next, else as follows), and the column's mean or
most frequent category. Errors of numbers are in units of the column's standard deviation. Scores
are added to the list in WORKDIR/evaluation.json.

Visits, their times and the static columns that are there count as known. What is drawn for the
patient at place i of the sorted table does not depend on the batch size.
"""

from __future__ import annotations

import csv
import functools
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import build, cohorts, drawing, hidden_values, runs, runtime, scores, trained
from experiments.config import default
from jaxdiff import columns, grids
from jaxdiff.base import PyTree
from jaxdiff.data import tables

if TYPE_CHECKING:
    from pandas import DataFrame

FLAGS = flags.FLAGS


class Model(NamedTuple):
    """A trained model of a table.

    Attributes:
      config: the run's configuration.
      params: the network's parameters.
      shape: of one example, `(L, C)`.
      codec: of the table.
      own: what each column says of itself.
      resamples: how often each stretch of the way is walked.
      jump_length: the length of such a stretch, in steps; None for a fifth of all steps.
    """

    config: ConfigDict
    params: PyTree
    shape: tuple[int, ...]
    codec: tables.Codec
    own: columns.Columns
    resamples: int = 2
    jump_length: int | None = None


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    """Defines the command's flags; not on import, where they would meet another command's."""
    string, integer = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_integer)
    )
    string("workdir", "runs/clinical", "The run directory of the trained model.")
    string("table", None, "The table of records: a CSV or Parquet file.")
    string("out", None, "Folder to write to; WORKDIR/completed if not given.")
    integer("forecast", None, "How many visits to add to each record.", 1)
    flags.DEFINE_float(
        "hide", None, "The share of observed values to hide and score.", flag_values=values
    )
    integer("draws", None, "How many draws: 100, averaged, or 1 forecast if not given.", 1)
    integer("step", None, "The checkpoint to use; the newest if not given.")
    flags.DEFINE_bool("ema", True, "Use the average of the parameters.", flag_values=values)
    integer("seed", None, "The seed; the run's own if not given.", 0)
    flags.DEFINE_enum(
        "solver", "ddpm", list(drawing.SOLVERS), "The solver; one that draws noise as it goes.",
        flag_values=values,
    )  # fmt: skip
    integer("steps", 25, "How many steps.", 1)
    integer("batch_size", None, "How many patients at a time; as the run if not given.", 1)
    integer("resamples", 2, "How often each stretch of the way is walked (RePaint).", 1)
    integer("jump_length", None, "The length of such a stretch; a fifth of the steps else.", 1)


def draw(
    model: Model,
    sequences: tables.Sequences,
    lengths: np.ndarray,
    known: np.ndarray,
    known_mask: np.ndarray,
    num: int,
) -> np.ndarray:
    """Draws records given what is known of them.

    Args:
      model: the model.
      sequences: the records, encoded.
      lengths: `(N,)`, how many visits they shall have.
      known: `(N, L, C)`, what is known of them, where `known_mask` is set.
      known_mask: `(N, L, C)` bool.
      num: how many draws, M.

    Returns:
      `(M, N, L, C)` float32.
    """
    config = model.config
    grid = drawing.make_grid(config)
    if model.resamples > 1:
        jump_length = model.jump_length or max(1, config.sample.steps // 5)
        grid = grids.resample(grid, jump_length, model.resamples)
    compiled = cohorts.make_draw(config, model.shape, model.own, edits=True, grid=grid)
    plan = cohorts.Plan(lengths, cohorts.told(sequences.static), known, known_mask)
    key = jax.random.key(config.sample.seed)
    return np.stack(
        [
            cohorts.draw(
                config, model.params, model.shape, plan, compiled,
                key=jax.random.fold_in(key, number),
            )
            for number in range(num)
        ]
    )  # fmt: skip


def check(codec: tables.Codec, frame: DataFrame) -> DataFrame:
    """Returns a table of which any value that can be drawn may be missing, in canonical form.

    Raises:
      TableError: it has another schema than the model, an unknown category, or lacks a value that
        the model is told.
    """
    schema = codec.schema
    for column in schema.columns:
        if not (column.static and codec.static == "vector"):
            schema = schema.replace(column.name, missing=True)
    return tables.check_table(frame, schema)


def impute(model: Model, frame: DataFrame, num: int) -> DataFrame:
    """Returns a table with what is missing filled in, from `num` draws, sorted.

    Static columns that are conditions of the model stay as they are: it does not draw them.

    Raises:
      TableError: see `check`; or a record is longer than those the model was trained on.
    """
    codec = model.codec
    # By itself `encode` would take an unknown category for a missing value, to be replaced.
    check(codec, frame)
    sequences = codec.encode(frame, length=model.shape[0], unseen="missing")
    given = codec.known_for_imputation(sequences)
    return codec.impute(frame, draw(model, sequences, sequences.lengths, *given, num))


def forecast(model: Model, frame: DataFrame, visits: int, num: int) -> list[DataFrame]:
    """Returns `num` tables in which all records go on, by so many visits; sorted.

    A model draws records no longer than those it was trained on: where with the new visits one
    would be, it is told the last visits only.

    Raises:
      TableError: the table has another schema than the model.
      ValueError: so many visits leave no place for a record.
    """
    codec, longest = model.codec, model.shape[0]
    if visits >= longest:
        raise ValueError(
            f"--forecast must be less than {longest}, the longest record that the model knows, got "
            f"{visits}"
        )
    table = tables.check_table(frame, codec.schema)
    records = table.groupby(codec.schema.patient)
    if long := int((records.size() > longest - visits).sum()):
        print(f"of the records of {long} patients only the last {longest - visits} visits are told")
    told = records.tail(longest - visits).reset_index(drop=True)
    sequences = codec.encode(told, length=longest)
    known, known_mask, _, lengths = codec.known_for_forecast(sequences, visits, length=longest)
    drawn = draw(model, sequences, lengths, known, known_mask, num)
    return [_continued(codec, table, sequences, x0, lengths) for x0 in drawn]


def _continued(
    codec: tables.Codec,
    table: DataFrame,
    sequences: tables.Sequences,
    x0: np.ndarray,
    lengths: np.ndarray,
) -> DataFrame:
    """Puts the visits that `x0` has more than `sequences` after those of a canonical table."""
    import pandas as pd

    schema, old = codec.schema, sequences.lengths
    decoded = codec.decode(x0, lengths, sequences.static, ids=sequences.ids)
    ends = np.cumsum(lengths)
    future = np.arange(ends[-1]) >= np.repeat(ends - lengths + old, lengths)
    new = decoded[future].reset_index(drop=True)
    # The gaps are drawn; they count from the last real visit, which may not decode exactly.
    times, last = decoded[schema.time].to_numpy(), table.groupby(schema.patient).tail(1)
    shift = last[schema.time].to_numpy() - times[ends - lengths + old - 1]
    new[schema.time] = times[future] + np.repeat(shift, lengths - old)
    if schema.time_dtype == "float" and schema.time_decimals is not None:
        new[schema.time] = new[schema.time].round(schema.time_decimals)
    for name in schema.statics:
        new[name] = last[name].array.repeat(lengths - old)
    return tables.check_table(pd.concat([table, new], ignore_index=True), schema)


def write_forecasts(drawn: Sequence[DataFrame], path: Path, schema: tables.Schema) -> None:
    """Writes tables into one CSV file, their numbers, from 1 on, in a column `draw` in front.

    Raises:
      ValueError: the tables have such a column.
    """
    if "draw" in schema.order:
        raise ValueError("the table has a column 'draw' of its own: forecast with --draws=1")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["draw", *schema.order])
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.csv"
        for number, table in enumerate(drawn, 1):
            tables.write_table(table, one, schema)
            with one.open(newline="") as file:
                writer.writerows([number, *row] for row in list(csv.reader(file))[1:])
    runs.write_text(path, text.getvalue())


def held_out(workdir: Path, model: Model) -> DataFrame:
    """Returns the patients that a run was not trained on; of longer records the first visits.

    Raises:
      ValueError: there are none.
    """
    table = cohorts.load(model.config).held_out
    if table is None:
        raise ValueError(
            f"{workdir} was trained on all patients: name others by --table, or train it with "
            "--config.data.held_out=0.5"
        )
    schema, longest = model.codec.schema, model.shape[0]
    table = tables.check_table(table, schema)
    return table[table.groupby(schema.patient).cumcount() < longest].reset_index(drop=True)


def score_hidden(workdir: Path, model: Model, table: DataFrame, draws: int) -> dict[str, Any]:
    """Hides values, fills them in, prints the scores and returns them."""
    schema = model.codec.schema
    table = check(model.codec, table)
    shown, hidden = hidden_values.hide(table, schema, FLAGS.hide, model.config.sample.seed)
    scores = hidden_values.score(table, shown, impute(model, shown, draws), hidden, schema)
    patients = table[schema.patient].nunique()
    print(f"{workdir}: {hidden.sum()} hidden values of {patients} patients, {draws} draws")
    hidden_values.tell(scores)
    return {"num": int(hidden.sum()), "patients": patients, "scores": scores}


def main() -> None:
    """Runs the command."""
    workdir = Path(FLAGS.workdir)
    if FLAGS.hide is not None and FLAGS.forecast is not None:
        raise ValueError("--hide scores imputation: leave one of --hide and --forecast unset")
    config, params, shape, step = trained.load(workdir, FLAGS.step, ema=FLAGS.ema, tables_too=True)
    if not build.is_table(config):
        raise runs.RunError(f"{workdir} holds a model of images, and this command is for tables")
    for name in ("seed", "solver", "steps", "batch_size"):
        if getattr(FLAGS, name) is not None:
            config.sample[name] = getattr(FLAGS, name)
    config.sample.solver_options = default().sample.solver_options  # the run's are of its own
    saved = cohorts.load_templates(workdir)
    model = Model(config, params, shape, saved.codec, saved.own, FLAGS.resamples, FLAGS.jump_length)
    frame = tables.read_table(FLAGS.table) if FLAGS.table else None
    draws = FLAGS.draws or (100 if FLAGS.forecast is None else 1)
    if FLAGS.hide is not None:
        record = score_hidden(
            workdir, model, held_out(workdir, model) if frame is None else frame, draws
        )
        options = {name: config.sample[name] for name in ("seed", "steps", "solver")}
        options |= {name: getattr(FLAGS, name) for name in ("hide", "resamples", "ema")}
        options["draws"] = draws
        about = {"part": "imputation", "table": FLAGS.table, "step": step, **options}
        scores.append(workdir / scores.FILE, about | record)
        print(f"added to {workdir / 'evaluation.json'}")
        return
    if frame is None:
        raise ValueError("name the table to complete by --table, or score by --hide=0.2")
    out = Path(FLAGS.out or workdir / "completed")
    out.mkdir(parents=True, exist_ok=True)
    if FLAGS.forecast is None:
        path, table = out / "imputed.csv", impute(model, frame, draws)
        tables.write_table(table, path, saved.codec.schema)
        count, left = (int(each.isna().to_numpy().sum()) for each in (frame, table))
        print(f"filled in {count - left} values with the parameters of step {step}")
        if left:
            print(f"{left} values of static columns are missing still: the model draws none")
    else:
        path = out / "forecast.csv"
        drawn = forecast(model, frame, FLAGS.forecast, draws)
        if len(drawn) == 1:
            tables.write_table(drawn[0], path, saved.codec.schema)
        else:
            write_forecasts(drawn, path, saved.codec.schema)
        print(f"drew {FLAGS.forecast} visits of each patient with the parameters of step {step}")
    print(f"look at {path}")


if __name__ == "__main__":
    runtime.command(define_flags, main)
