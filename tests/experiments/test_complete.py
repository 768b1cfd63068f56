"""Completing records with networks of small random numbers, which cost no training."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

pytest.importorskip("grain")
pytest.importorskip("ml_collections")
pytest.importorskip("pandas")
pytest.importorskip("sklearn")

import pandas as pd

from experiments import build, cohorts, complete, drawing, hidden_values, runs
from experiments.configs import clinical
from jaxdiff.base import Prediction
from jaxdiff.data import tables
from jaxdiff.training import checkpoints

ROOT = Path(__file__).parents[2]


def make_records(num=16, seed=0):
    """Patients with 1 to 6 visits, and gaps in all kinds of columns."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(1, num + 1):
        sex, age = rng.choice(["f", "m"]), float(rng.integers(30, 80))
        day = int(rng.integers(0, 50))
        for _ in range(1 + (patient * 5) % 6):
            rows.append(
                {
                    "patient": patient, "sex": None if patient % 7 == 0 else sex, "age": age,
                    "day": day, "bili": round(float(np.exp(rng.normal())), 1),
                    "shift": float(rng.normal()), "count": int(rng.integers(100, 200)),
                    "ascites": bool(rng.random() < 0.4), "stage": rng.choice(["I", "II", "III"]),
                }
            )  # fmt: skip
            day += int(rng.integers(1, 300))
    table = pd.DataFrame(rows)
    for name in ("bili", "count", "ascites", "stage"):
        values = table[name].astype(object).to_numpy(copy=True)
        values[rng.random(len(values)) < 0.2] = None
        table[name] = pd.Series(values, dtype=object)
    table["bili"] = table["bili"].astype(float)
    return table


def make_run(path, workdir, **data):
    """Writes what a run on a table leaves, at step 2."""
    config = clinical.get_config()
    config.update(
        {
            "data": {"name": "table", "path": str(path), "held_out": 0.25, **data},
            "model": {"channels": 8},
            "sample": {"batch_size": 8, "steps": 4},
        }
    )
    cohort = cohorts.load(config)
    cohorts.resolve(config, cohort)
    shape = cohort.sequences.x0.shape[1:]
    init, _ = build.make_training(config, shape, cohort.own)
    draw = np.random.default_rng(0)
    state = jax.tree.map(
        lambda like: jnp.asarray(0.1 * draw.normal(size=like.shape), like.dtype),
        jax.eval_shape(init),
    )
    state = dataclasses.replace(state, step=jnp.asarray(2, state.step.dtype))
    workdir.mkdir()
    runs.write_json(workdir / "config.json", runs.as_json(config))
    runs.write_json(workdir / "run.json", runs.describe(config, 0, shape))
    cohorts.save(workdir, cohort)
    with checkpoints.open_folder(workdir / "checkpoints", keep=1) as saved:
        checkpoints.save(saved, state, data={"next_index": 0}, config={})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on all kinds of columns, and the table."""
    folder = tmp_path_factory.mktemp("complete")
    make_records().to_csv(folder / "records.csv", index=False)
    make_run(folder / "records.csv", folder / "run")
    return folder


@pytest.fixture(scope="module")
def model(trained):
    return load(trained / "run")


def load(workdir, **changes):
    config, params, shape, _ = complete.trained.load(workdir, None, ema=True, tables_too=True)
    config.sample.update(changes)
    saved = complete.cohorts.load_templates(workdir)
    return complete.Model(config, params, shape, saved.codec, saved.own)


@pytest.fixture(scope="module")
def records(trained):
    return tables.read_table(trained / "records.csv")


@pytest.fixture(scope="module")
def imputed(model, records):
    return complete.impute(model, records, 2)


def same(a, b):
    """Returns which cells of two tables agree; missing ones agree with missing ones."""
    gone = a.isna() & b.isna()
    return gone | (a.astype(object).where(a.notna(), 0) == b.astype(object).where(b.notna(), 0))


def test_imputation_keeps_what_was_observed_and_leaves_no_gap(model, records, imputed):
    before = tables.check_table(records, model.codec.schema)
    observed = before.notna()
    assert not observed["sex"].all()  # a static column, too
    assert not observed["stage"].all()
    assert same(before, imputed)[observed].where(observed, True).to_numpy().all()
    assert imputed.notna().to_numpy().all()
    for name in model.codec.schema.categoricals:
        assert set(imputed[name]) <= set(model.codec.schema[name].categories)
    assert (imputed["bili"] > 0).all()
    assert imputed.groupby("patient")["sex"].nunique().max() == 1
    tables.check_table(imputed, model.codec.schema)  # it is a table of the model's schema


def test_a_patient_is_the_same_whatever_the_batch_size(trained, records, imputed):
    other = complete.impute(load(trained / "run", batch_size=3), records, 2)
    for name in imputed.columns:
        if name in ("bili", "shift", "age"):
            np.testing.assert_allclose(other[name], imputed[name], rtol=1e-4, atol=1e-4)
        else:
            assert (other[name].astype(object) == imputed[name].astype(object)).all(), name
    few = records[records["patient"] <= 5]
    first = complete.impute(load(trained / "run", batch_size=8), few, 2)
    assert same(first, imputed.iloc[: len(few)]).to_numpy().all()


def test_another_seed_draws_others(trained, records, imputed):
    other = complete.impute(load(trained / "run", seed=1), records, 2)
    assert not same(other, imputed).to_numpy().all()


def test_values_that_the_schema_wants_are_drawn_but_unknown_categories_refused(model, records):
    lacking = records.copy()
    lacking.loc[3, "shift"] = np.nan  # never missing in training
    assert np.isfinite(complete.impute(model, lacking, 1)["shift"]).all()
    wrong = records.copy()
    wrong.loc[4, "stage"] = "IV"
    with pytest.raises(tables.TableError, match=r"row 6 .*'stage': unknown category 'IV'"):
        complete.impute(model, wrong, 1)
    with pytest.raises(tables.TableError, match=r"another schema .* lacks \['bili'\]"):
        complete.impute(model, records.drop(columns="bili"), 1)


def lengthened(records, patient, visits):
    """Returns the records with more visits of a patient."""
    last = records[records["patient"] == patient].iloc[[-1] * visits].copy()
    last["day"] += np.arange(1, visits + 1)
    return pd.concat([records, last], ignore_index=True)


def test_longer_records_than_the_model_knows_are_refused(model, records):
    with pytest.raises(tables.TableError, match=r"patient 2 has \d+ visits, more than length=6"):
        complete.impute(model, lengthened(records, 2, 6), 1)


@pytest.mark.parametrize("long", [False, True])
def test_a_forecast_keeps_the_past_and_adds_visits(model, records, tmp_path, capsys, long):
    schema = model.codec.schema
    past = lengthened(records, 2, 9) if long else records
    (drawn,) = complete.forecast(model, past, 2, 1)
    tables.write_table(past, tmp_path / "past.csv", schema)
    tables.write_table(drawn, tmp_path / "future.csv", schema)
    before, after = (
        (tmp_path / name).read_text().splitlines() for name in ("past.csv", "future.csv")
    )
    assert after[0] == before[0]
    place = drawn.groupby("patient").cumcount().to_numpy()
    visits = past.groupby("patient").size()
    new = place >= visits[drawn["patient"]].to_numpy()
    assert [line for line, added in zip(after[1:], new, strict=True) if not added] == before[1:]
    assert (drawn[new].groupby("patient").size() == 2).all()
    assert new.sum() == 2 * len(visits)
    gaps = drawn.groupby("patient")["day"].diff().dropna()
    assert (gaps > 0).all()
    assert drawn.groupby("patient")[["sex", "age"]].nunique().max().max() == 1
    # Records of 5 and 6 visits leave no place for two more in the model's 6.
    assert "only the last 4 visits are told" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--forecast must be less than 6"):
        complete.forecast(model, records, 6, 1)


def test_dates_of_a_forecast_go_on_from_the_last_real_one(trained, tmp_path, records):
    records = records.assign(day=pd.Timestamp("2001-02-03") + pd.to_timedelta(records.day, "D"))
    records["day"] = records["day"].dt.strftime("%Y-%m-%d")
    records.to_csv(tmp_path / "dates.csv", index=False)
    make_run(tmp_path / "dates.csv", tmp_path / "run", static="vector")
    model = load(tmp_path / "run")
    # Twenty years later than what the model was trained on: beyond its range of first visits.
    later = records.assign(day=records["day"].str.replace("^20", "22", regex=True))
    (drawn,) = complete.forecast(model, later, 1, 1)
    last = later.groupby("patient")["day"].max().to_numpy().astype("datetime64[us]")
    times = drawn.groupby("patient")["day"].max().to_numpy().astype("datetime64[us]")
    longest = records.assign(day=pd.to_datetime(records["day"])).groupby("patient")["day"].diff()
    assert (times > last).all()
    assert (times - last <= longest.max()).all()
    # Static columns are conditions here: they are told, and not drawn.
    filled = complete.impute(model, later, 1)
    assert filled.drop(columns="sex").notna().to_numpy().all()
    assert (
        filled["sex"].isna() == tables.check_table(later, model.codec.schema)["sex"].isna()
    ).all()
    later.loc[0, "age"] = np.nan
    with pytest.raises(tables.TableError, match=r"row 2 .*'age': the value is missing"):
        complete.impute(model, later, 1)


def cells(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_forecasts_of_several_draws_are_one_file(model, records, tmp_path):
    drawn = complete.forecast(model, records, 1, 2)
    schema = model.codec.schema
    complete.write_forecasts(drawn, tmp_path / "forecast.csv", schema)
    rows = cells(tmp_path / "forecast.csv")
    assert rows[0] == ["draw", *schema.order]
    assert [row[0] for row in rows[1:]] == ["1"] * len(drawn[0]) + ["2"] * len(drawn[1])
    for number, table in enumerate(drawn, 1):
        tables.write_table(table, tmp_path / "one.csv", schema)
        one = cells(tmp_path / "one.csv")[1:]
        assert [row[1:] for row in rows if row[0] == str(number)] == one
    assert not same(*drawn).to_numpy().all()
    named = tables.infer_schema(records.rename(columns={"shift": "draw"}))
    with pytest.raises(ValueError, match=r"a column 'draw' of its own"):
        complete.write_forecasts(drawn, tmp_path / "other.csv", named)


def by_hand():
    table = pd.DataFrame(
        {
            "id": [1, 1, 1, 2, 2, 3],
            "day": [0, 1, 2, 0, 1, 0],
            "lab": [1.0, 2.0, 3.0, 10.0, 20.0, 6.0],
            "grade": ["a", "b", "b", "a", "b", "c"],
        }
    )
    schema = tables.infer_schema(table, patient="id", time="day")
    schema = schema.replace("lab", kind="positive", dtype="float", categories=(), static=False)
    schema = schema.replace(
        "grade", kind="categorical", dtype="str", categories=("a", "b", "c"), static=False
    )
    return tables.check_table(table, schema), schema


def test_scores_by_hand():
    table, schema = by_hand()
    hidden = np.zeros((6, 2), bool)
    # lab: the second visit of 1, the first of 2, the only one of 3; grade: those, and both of 2.
    hidden[[1, 3, 5], 0] = True
    hidden[[1, 3, 4, 5], 1] = True
    shown = table.assign(
        lab=[1.0, np.nan, 3.0, np.nan, 20.0, np.nan], grade=["a", None, "b", None, None, None]
    )
    filled = table.assign(lab=[1.0, 2.5, 3.0, 9.0, 20.0, 6.0], grade=["a", "b", "b", "a", "a", "a"])
    scores = hidden_values.score(table, shown, filled, hidden, schema)
    spread = np.std([1, 2, 3, 10, 20, 6])
    # Carried: 1 for 2, 20 (the next) for 10, 8 (the mean of 1, 3, 20) for 6; and for the grades
    # a for b, and a (the first of the most frequent ones left) for a, b and c.
    wrong = {
        hidden_values.MODEL: ([0.5, 1, 0], 2 / 4),
        hidden_values.CARRIED: ([1, 10, 2], 1 / 4),
        hidden_values.TYPICAL: ([6, 2, 2], 1 / 4),
    }
    assert list(scores) == list(wrong)
    for way, (errors, accuracy) in wrong.items():
        rms = np.sqrt(np.mean(np.square(errors)))
        columns = scores[way].pop("columns")
        assert columns["lab"] == pytest.approx(
            {hidden_values.NUMBERS: np.mean(errors) / spread, hidden_values.SQUARED: rms / spread}
        )
        assert columns["grade"] == {hidden_values.CATEGORIES: accuracy}
        assert scores[way] == pytest.approx({**columns["lab"], **columns["grade"]})


def test_values_are_carried_within_a_patient_only():
    nan = np.nan
    shown = np.array([[nan, 1], [5, nan], [nan, nan], [nan, nan], [nan, 2]])
    filled = hidden_values.carried(shown, np.array([1, 1, 1, 2, 2]), np.array([7.0, 8.0]))
    np.testing.assert_array_equal(filled, [[5, 1], [5, 1], [5, 1], [7, 2], [7, 2]])


def test_hiding_hides_the_share_of_what_was_observed(records, model):
    schema = model.codec.schema
    table = complete.check(model.codec, records)
    shown, hidden = hidden_values.hide(table, schema, 0.2, seed=0)
    names = ["bili", "shift", "count", "ascites", "stage"]
    observed = table[names].notna().to_numpy()
    assert hidden.sum() == round(0.2 * observed.sum())
    assert (shown[names].notna().to_numpy() == (observed & ~hidden)).all()
    rest = [name for name in schema.order if name not in names]
    assert shown[rest].equals(table[rest])
    again, other = (hidden_values.hide(table, schema, 0.2, seed=seed)[1] for seed in (0, 1))
    assert (again == hidden).all()
    assert not (other == hidden).all()
    # Whatever the kind of the column, the rest reads as it was.
    kept = complete.check(model.codec, shown)
    assert same(kept, table)[names].to_numpy()[observed & ~hidden].all()
    with pytest.raises(ValueError, match=r"--hide must lie in \(0, 1\), got 1.0"):
        hidden_values.hide(table, schema, 1.0, 0)
    with pytest.raises(ValueError, match=r"column 'bili': --hide=0.99 leaves no value"):
        hidden_values.hide(table, schema, 0.99, 0)


def test_an_exact_model_of_correlated_columns_beats_what_takes_no_model(monkeypatch):
    """Gaussian data, whose denoiser is known: x0 = m + a S (a^2 S + s^2)^-1 (x_t - a m)."""
    rng, num, visits = np.random.default_rng(0), 60, 4
    common = rng.normal(size=num * visits)
    table = pd.DataFrame(
        {
            "id": np.repeat(np.arange(num), visits),
            "day": np.tile(np.arange(visits), num),
            **{name: common + 0.3 * rng.normal(size=len(common)) for name in ("u", "v", "w")},
        }
    )
    codec = tables.fit_codec(table, transform="none")
    assert len(codec.channels) == 3
    rows = codec.encode(table).x0.reshape(-1, 3)
    mean, cov = jnp.asarray(rows.mean(0)), jnp.asarray(np.cov(rows.T), jnp.float32)

    def exact(x, node):
        alpha, sigma = node.alpha, node.sigma
        gain = alpha * cov @ jnp.linalg.inv(alpha**2 * cov + sigma**2 * jnp.eye(3))
        far = x - alpha * mean[None, None]
        return Prediction(mean[None, None] + jnp.einsum("ij,blj->bli", gain, far))

    monkeypatch.setattr(drawing, "make_denoiser", lambda *args: lambda params, cond: exact)
    config = clinical.get_config()
    config.sample.update({"steps": 40, "batch_size": num})
    model = complete.Model(config, None, (visits, 3), codec, None, resamples=3)
    table = tables.check_table(table, codec.schema)
    shown, hidden = hidden_values.hide(table, codec.schema, 0.2, seed=0)
    filled = complete.impute(model, shown, 10)
    scores = hidden_values.score(table, shown, filled, hidden, codec.schema)
    error = {way: each[hidden_values.SQUARED] for way, each in scores.items()}
    # The best guess is off by 0.35 standard deviations given both others, 0.40 given one and 1 if
    # none is; at 20 % hidden 0.41 in all, the mean of ten draws 0.43. Of some 144 values the root
    # mean square has a standard error of about 8 %: this is three of them above.
    assert error[hidden_values.MODEL] < 0.53
    assert error[hidden_values.TYPICAL] > 0.8
    assert error[hidden_values.CARRIED] > 1.1


@pytest.fixture
def command(trained, monkeypatch):
    """Runs the command in this process."""

    def call(*arguments):
        values = flags.FlagValues()
        complete.define_flags(values)
        own = ["--draws=2", "--steps=4"]
        values(["complete", f"--workdir={trained / 'run'}", *own, *arguments])
        monkeypatch.setattr(complete, "FLAGS", values)
        complete.main()

    return call


def test_the_command_scores(command, trained, capsys):
    command("--hide=0.3", "--steps=3", "--resamples=2", "--jump_length=1")
    assert "mean over columns" in capsys.readouterr().out
    (record,) = json.loads((trained / "run" / "evaluation.json").read_text())
    assert record["part"] == "imputation"
    assert (record["hide"], record["steps"], record["resamples"]) == (0.3, 3, 2)
    assert (record["step"], record["patients"]) == (2, 4)  # a quarter was held out
    assert list(record["scores"]) == sorted(
        [hidden_values.MODEL, hidden_values.CARRIED, hidden_values.TYPICAL]
    )
    assert set(record["scores"][hidden_values.MODEL]["columns"]) <= {
        "bili", "shift", "count", "ascites", "stage",
    }  # fmt: skip


def test_the_command_writes_tables(command, trained, model, records, imputed, capsys):
    table, schema = f"--table={trained / 'records.csv'}", model.codec.schema
    command(table)
    gaps = int(records.isna().to_numpy().sum())
    assert f"filled in {gaps} values with the parameters of step 2" in capsys.readouterr().out
    written = tables.read_table(trained / "run" / "completed" / "imputed.csv")
    pd.testing.assert_frame_equal(*(tables.check_table(t, schema) for t in (written, imputed)))
    command(table, "--forecast=1", "--draws=1", f"--out={trained / 'other'}")
    written = tables.read_table(trained / "other" / "forecast.csv")
    assert len(tables.check_table(written, schema)) == len(records) + 16
    command(table, "--forecast=1")
    written = tables.read_table(trained / "run" / "completed" / "forecast.csv")
    assert written["draw"].value_counts().to_dict() == {1: len(records) + 16, 2: len(records) + 16}


def test_the_command_says_what_is_wrong(trained):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.complete", f"--workdir={trained / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: name the table to complete by --table")


def test_two_tasks_at_once_are_refused(command):
    with pytest.raises(ValueError, match=r"leave one of --hide and --forecast unset"):
        command("--hide=0.2", "--forecast=1")


def test_what_a_run_without_patients_held_out_says(trained, model):
    model.config.data.held_out = 0.0
    with pytest.raises(ValueError, match=r"was trained on all patients: name others by --table"):
        complete.held_out(trained / "run", model)
    model.config.data.held_out = 0.25
    with pytest.raises(runs.RunError, match=r"holds no run"):
        complete.trained.load(trained, None, ema=True, tables_too=True)
