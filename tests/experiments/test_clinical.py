"""From a table of visits to a synthetic cohort, in small."""

import functools
import json
import re

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")
pytest.importorskip("pandas")

import pandas as pd

from experiments import build, cohorts, evaluate_table, realism, runs, train, trained
from experiments.configs import clinical
from jaxdiff import evaluation
from jaxdiff.data import tables


def tiny(**changes):
    config = clinical.get_config()
    config.update(
        {
            "model": {"channels": 8, "channel_multipliers": (1,), "attention_levels": ()},
            "optimizer": {"warmup_steps": 2},
            "train": {"batch_size": 8, "num_steps": 4, "log_every": 2, "checkpoint_every": 2},
            "sample": {"num": 11, "batch_size": 8, "steps": 3},
        }
    )
    config.update(changes)
    return config


def visits_of(num, seed=0):
    """A made-up cohort: text ids, dates, a constant column, and each kind of column."""
    bits = np.random.default_rng(seed)
    rows = []
    for patient in range(num):
        day = pd.Timestamp("2020-01-01") + pd.Timedelta(days=int(bits.integers(0, 400)))
        arm = "ab"[patient % 2]
        for _ in range(1 + patient % 5):
            rows.append(
                {
                    "name": f"P{patient:03}",
                    "seen": day.date().isoformat(),
                    "arm": arm,
                    "dose": round(float(bits.lognormal()), 2) + 0.01,
                    "change": float(bits.normal()),
                    "grade": ["low", "middle", "high"][bits.integers(0, 3)],
                    "pain": int(bits.integers(0, 2)) if bits.random() < 0.7 else None,
                    "site": "one",
                }
            )
            day += pd.Timedelta(days=int(bits.integers(1, 90)))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "clinical"
    train.train(tiny(), workdir)
    return workdir


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on a file of one's own, told the static columns."""
    folder = tmp_path_factory.mktemp("own")
    visits_of(40).to_csv(folder / "visits.csv", index=False)
    config = tiny()
    config.data.update(
        {
            "name": "table", "path": str(folder / "visits.csv"), "patient": "name",
            "time": "seen", "static": "vector", "categories": "bits",
        }
    )  # fmt: skip
    config.evaluate.target = config.evaluate.positive = None
    config.sample.guidance = "classifier_free"
    train.train(config, folder / "run")
    return folder / "run"


def test_a_run_leaves_a_table_like_the_original(finished):
    table, schema = tables.pbc()
    original = pd.read_csv(finished / "synthetic.csv", nrows=0)
    assert list(original.columns) == list(schema.order)
    synthetic = tables.check_table(pd.read_csv(finished / "synthetic.csv"), schema)
    assert synthetic["id"].nunique() == 11
    pd.testing.assert_series_equal(synthetic.dtypes, tables.check_table(table, schema).dtypes)
    about = json.loads((finished / "run.json").read_text())
    assert about["scores"]["real"] == "held out"
    assert about["example_shape"] == [16, 31]
    page = (finished / "report.html").read_text()
    for heading in ("Visits", "Patients", "Dependence", "Some patients", "Training"):
        assert f"<h2>{heading}</h2>" in page
    assert not re.search(r'(src|href)="https?:', page)


def test_the_same_run_is_the_same_file(finished, tmp_path):
    train.train(tiny(), tmp_path / "again")
    for name in ("synthetic.csv", "cohort.json", "schema.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def loaded(workdir):
    config, params, shape, _ = trained.load(workdir, None, ema=True, tables_too=True)
    return config, params, shape, cohorts.load_templates(workdir)


def drawn(parts, size, **chosen):
    config, params, shape, templates = parts
    config = config.copy_and_resolve_references()
    config.sample.batch_size = size
    return cohorts.draw_table(config, params, shape, templates, **chosen)


def same(a, b):
    """Equal but for the last digits that a number is rounded to."""
    assert list(a["id"]) == list(b["id"])
    numbers = a.select_dtypes("number").columns
    pd.testing.assert_frame_equal(a.drop(columns=numbers), b.drop(columns=numbers))
    pd.testing.assert_frame_equal(a[numbers], b[numbers], rtol=1e-3, atol=0.011)


def test_patient_i_is_the_same_in_any_batch(finished):
    """The batch of 8 is divided over 8 devices, that of 4 is not."""
    assert jax.device_count() == 8
    parts = loaded(finished)
    whole = drawn(parts, 8)
    same(whole, drawn(parts, 4))
    later = drawn((parts[0], *parts[1:]), 8, first_index=5)
    both = whole[whole["id"] > 5]
    same(both.reset_index(drop=True), later[later["id"] <= 11].reset_index(drop=True))


def test_a_cohort_by_static_columns_and_length(finished):
    parts = loaded(finished)
    table = drawn(
        parts, 8, visits=3, where=cohorts.parse_where(["sex=f", "trt=1"], tables.pbc()[1])
    )
    assert set(table["sex"]) == {"f"}
    assert set(table["trt"]) == {1}
    assert set(table.groupby("id").size()) == {3}
    assert table["status"].nunique() > 1  # what is not given is drawn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bili=3", "static columns, futime, status, trt, age, sex, got 'bili=3'"),
        ("sex", "COLUMN=VALUE"),
        ("sex=x", "sex must be one of f, m, got 'x'"),
        ("age=old", "age must be a number, got 'old'"),
    ],
)
def test_where_names_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cohorts.parse_where([text], tables.pbc()[1])


def test_a_network_wants_what_each_column_says_of_itself():
    with pytest.raises(ValueError, match="needs what each column says of itself"):
        build.make_network(tiny(), (16, 31))


def test_lengths_are_those_of_the_data():
    """10,000 patients of a seed have the lengths of 3 templates, 1/3 each. False alarms: 1e-6."""
    templates = cohorts.Templates(None, None, np.array([2, 5, 7]), None)
    lengths = cohorts.plan(templates, (8, 1), num=10_000, seed=3).lengths
    counts = np.array([np.sum(lengths == n) for n in (2, 5, 7)])
    assert counts.sum() == 10_000
    assert np.all(np.abs(counts - 10_000 / 3) < 5.1 * np.sqrt(10_000 * 2 / 9))
    later = cohorts.plan(templates, (8, 1), num=5, seed=3, first_index=9_995).lengths
    np.testing.assert_array_equal(later, lengths[-5:])


def test_visits_out_of_range_are_refused(finished):
    with pytest.raises(ValueError, match=r"visits must lie in 1 \.\. 16, .* got 17"):
        drawn(loaded(finished), 8, visits=17)


def test_a_table_of_ones_own(own):
    schema = cohorts.read_schema(own / "schema.json")
    assert {c.name: c.kind for c in schema.columns} == {
        "arm": "binary", "dose": "positive", "change": "real", "grade": "categorical",
        "pain": "binary", "site": "categorical",
    }  # fmt: skip
    synthetic = tables.check_table(tables.read_table(own / "synthetic.csv"), schema)
    assert set(synthetic["site"]) == {"one"}
    assert str(synthetic["seen"].dtype).startswith("datetime64")
    assert set(synthetic["grade"]) <= {"low", "middle", "high"}


def test_static_columns_as_conditions(own):
    parts = loaded(own)
    assert parts[0].model.vector_dim == 2  # the arm, and that it is told
    table = drawn((parts[0], *parts[1:]), 8, where={"arm": "b"})
    assert set(table["arm"]) == {"b"}
    with pytest.raises(ValueError, match="not static"):
        drawn(parts, 8, where={"pain": 1})


def test_an_edited_schema_counts(own, tmp_path):
    config = runs.load_config(own)
    edited = json.loads((own / "schema.json").read_text())
    schema = tables.Schema.from_json(edited).replace("change", unit="mm", decimals=1)
    (tmp_path / "schema.json").write_text(json.dumps(schema.to_json()))
    config.data.schema = str(tmp_path / "schema.json")
    assert cohorts.load(config).codec.schema["change"].unit == "mm"
    (tmp_path / "schema.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no schema"):
        cohorts.load(config)


def test_nobody_is_in_both_parts():
    config = tiny()
    cohort = cohorts.load(config)
    assert not set(cohort.table["id"]) & set(cohort.held_out["id"])
    assert cohort.table["id"].nunique() == cohort.held_out["id"].nunique() == 156
    config.seed = 1
    assert set(cohorts.load(config).table["id"]) != set(cohort.table["id"])
    config.data.held_out = 0.0
    assert cohorts.load(config).held_out is None


def test_scores_of_a_run(finished, capsys, monkeypatch):
    three = functools.partial(evaluation.two_sample_auc, folds=3)
    monkeypatch.setattr(evaluation, "two_sample_auc", three)  # five take long
    (record,) = evaluate_table.evaluate([finished], None)
    scores = record["scores"]
    assert scores["synthetic"].keys() >= scores["real"].keys()
    # The patients trained on are close to those held out. After four steps columns are independent.
    assert scores["real"]["KS of numbers"] < 0.1 < scores["synthetic"]["KS of numbers"]
    assert scores["real"]["rank correlation"] < 0.1 < 0.2 < scores["synthetic"]["rank correlation"]
    assert scores["real"]["AUC of single visits, boosting"] < 0.6
    assert scores["synthetic"]["AUC of single visits, boosting"] > 0.65
    assert scores["independent columns"]["lag-1 of numbers, mean"] > 0.3
    printed = capsys.readouterr().out
    assert re.search(r"membership AUC, patients +0\.\d{3} +0\.\d{3}\n", printed)
    both = evaluate_table.mean([scores, scores])
    assert both == {name: pytest.approx(value) for name, value in scores.items()}


def test_another_table_is_not_scored(finished, tmp_path):
    table = pd.read_csv(finished / "synthetic.csv").assign(sex="x")
    table.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(tables.TableError, match=r"row 2.*'sex'"):
        evaluate_table.score(finished, tmp_path / "other.csv")
    with pytest.raises(runs.RunError, match="does not exist"):
        evaluate_table.score(finished, tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "held_out", 1.0, r"held_out must lie in \[0, 1\)"),
        ("data", "transform", "log", "transform must be one of"),
        ("evaluate", "neighbours", 5, "for images"),
        ("train", "sample_every", 2, "for images"),
        ("data", "flip", True, "for images"),
        ("labels", "num_classes", 3, "labels"),
    ],
)
def test_what_is_for_images_is_refused(tmp_path, section, key, value, message):
    config = tiny()
    config[section][key] = value
    with pytest.raises(ValueError, match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bad_table_is_refused_before_anything_is_written(tmp_path):
    table = visits_of(20)
    table.loc[3, "dose"] = -1
    table["dose"] = table["dose"].astype(object)
    table.loc[4, "dose"] = "much"
    table.to_csv(tmp_path / "visits.csv", index=False)
    config = tiny()
    config.data.update({"name": "table", "path": str(tmp_path / "visits.csv")})
    config.data.update({"patient": "name", "time": "seen"})
    with pytest.raises(tables.TableError, match="dose"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.data.path = None
    with pytest.raises(ValueError, match=r"needs data\.path"):
        train.train(config, tmp_path / "run")


def test_the_strawman_keeps_columns_and_breaks_records():
    table, schema = tables.pbc()
    table = tables.check_table(table, schema)
    strawman = realism.bootstrap(table, schema, seed=0)
    pd.testing.assert_frame_equal(strawman[["id", "day"]], table[["id", "day"]])
    scores = realism.realism(table, strawman, schema, classify=False)
    assert scores["KS of numbers"] < 0.05
    assert scores["visits a patient, KS"] == 0
    assert scores["lag-1 of numbers, mean"] > 0.5


def test_images_commands_refuse_a_table(finished):
    with pytest.raises(runs.RunError, match="model of a table"):
        trained.load(finished, None, ema=True)
