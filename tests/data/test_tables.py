"""Tables of visits: schemas, their inference, what is refused, reading and writing."""

import dataclasses
import gzip
import io
import json
import os

import numpy as np
import pandas as pd
import pytest

from jaxdiff.data.tables import (
    Column,
    Schema,
    TableError,
    check_table,
    infer_schema,
    pbc,
    read_table,
    write_table,
)  # fmt: skip

CSV = """\
id,day,sex,bili,grade,visits,note
1,0,f,1.25,0,11,a
1,30,f,2,1,12,b
2,0,m,0.5,2,,c
2,45,m,,2,14,a
2,90,m,4.75,0,15,
3,0,f,3.5,1,16,b
3,10,f,6.5,0,17,b
3,20,f,7.5,0,18,b
"""


def table(text=CSV):
    return pd.read_csv(io.StringIO(text))


def schema():
    return (
        infer_schema(table())
        .replace("bili", kind="positive", unit="mg/dl")
        .replace("visits", kind="positive", missing=True)
    )


def changed(row, column, value):
    """Returns the table with one cell changed; `row` as the file counts, the header being 1."""
    frame = table().astype({column: object})
    frame.loc[row - 2, column] = value
    return frame


# Schemas.


def test_pbc_has_the_right_schema():
    frame, found = pbc()
    assert frame.shape == (1945, 19)
    assert frame["id"].nunique() == 312
    assert (found.patient, found.time, found.time_unit) == ("id", "day", "days")
    assert (found.patient_dtype, found.time_dtype, found.time_decimals) == ("int", "int", 0)
    assert found.order == tuple(frame.columns)
    assert found.statics == ("futime", "status", "trt", "age", "sex")
    kinds = {kind: {c.name for c in found.columns if c.kind == kind}
             for kind in ("real", "positive", "binary", "categorical")}  # fmt: skip
    assert kinds == {
        "real": set(),
        "positive": {"futime", "age", "bili", "chol", "albumin", "alk_phos", "ast", "platelet",
                     "protime"},
        "binary": {"trt", "sex", "ascites", "hepato", "spiders"},
        "categorical": {"status", "edema", "stage"},
    }  # fmt: skip
    assert found["edema"].categories == (0.0, 0.5, 1.0)
    assert found["stage"].categories == (1, 2, 3, 4)
    assert found["sex"].categories == ("f", "m")
    missing = {c.name for c in found.columns if c.missing}
    assert missing == {"ascites", "hepato", "spiders", "chol", "alk_phos", "platelet"}
    assert found["chol"].dtype == "int"
    assert (found["bili"].decimals, found["albumin"].decimals, found["age"].decimals) == (
        1,
        2,
        None,
    )
    assert (found["bili"].unit, found["protime"].unit, found["age"].unit) == ("mg/dl", "s", "years")


def test_pbc_is_found_without_help_and_its_file_is_reproducible():
    import importlib.resources

    frame, found = pbc()
    inferred = infer_schema(frame)
    assert {c.name: c.kind for c in inferred.columns} == {c.name: c.kind for c in found.columns}
    assert inferred.statics == found.statics  # they do not change within any patient
    files = importlib.resources.files("jaxdiff.data.tables")
    packed = files.joinpath("pbcseq.csv.gz").read_bytes()
    assert packed[4:8] == bytes(4)  # gzip's time stamp
    assert len(packed) < 45_000
    assert gzip.decompress(packed).startswith(b"id,futime,status,trt,age,sex,day,ascites")
    assert "Murtaugh" in files.joinpath("PBC.md").read_text(encoding="utf-8")


def test_inference_of_every_kind():
    rng = np.random.default_rng(0)
    count = 40
    frame = pd.DataFrame(
        {
            "Patient_ID": np.repeat([f"p{i}" for i in range(10)], 4),
            "date": pd.to_datetime("2020-01-01") + pd.to_timedelta(np.arange(count), "D"),
            "real": rng.normal(size=count),
            "positive": rng.uniform(1, 2, count).round(3),
            "few": rng.choice([0.1, 0.2, 0.7], count),
            "codes": rng.integers(0, 10, count),
            "many": np.arange(count),
            "flag": rng.integers(0, 2, count).astype(bool),
            "same": 7,
            "cat": pd.Categorical(rng.choice(["x", "y", "z"], count)),
            "maybe": pd.array([None, True, False, True] * 10, "boolean"),
        }
    )
    found = infer_schema(frame)
    assert (found.patient, found.patient_dtype) == ("Patient_ID", "str")
    assert (found.time, found.time_dtype, found.time_decimals) == ("date", "datetime", 0)
    got = {c.name: (c.kind, c.dtype, c.decimals, c.missing) for c in found.columns}
    assert got == {
        "real": ("real", "float", None, False),
        "positive": ("positive", "float", 3, False),
        "few": ("categorical", "float", 1, False),
        "codes": ("categorical", "int", 0, False),
        "many": ("real", "int", 0, False),
        "flag": ("binary", "bool", None, False),
        "same": ("categorical", "int", 0, False),
        "cat": ("categorical", "str", None, False),
        "maybe": ("binary", "bool", None, True),
    }
    assert found["same"].categories == (7,)
    assert found["flag"].categories == (False, True)
    assert found.statics == ("same",)


def test_schema_is_edited_and_checked():
    found = schema()
    assert found.replace("grade", kind="real")["grade"].categories == ()
    assert found.replace("bili", name="bilirubin").order[3] == "bilirubin"
    assert found.reals == ("bili", "visits")
    assert found.categoricals == ("sex", "grade", "note")
    with pytest.raises(KeyError, match="no column 'x' besides"):
        found.replace("x", kind="real")
    with pytest.raises(ValueError, match=r"'sex': a real column holds ints or floats, not 'str'"):
        found.replace("sex", kind="real")
    with pytest.raises(ValueError, match="'grade': binary means two categories"):
        found.replace("grade", kind="binary")
    with pytest.raises(ValueError, match="kind must be one of"):
        Column("a", "text")
    with pytest.raises(ValueError, match="must be of dtype 'int', got 'a'"):
        Column("a", "binary", dtype="int", categories=("a", "b"))
    with pytest.raises(ValueError, match="distinct names"):
        dataclasses.replace(found, columns=(*found.columns, found["sex"]))
    with pytest.raises(ValueError, match="order must hold the names"):
        dataclasses.replace(found, order=found.order[1:])


def test_schema_survives_json():
    for found in (schema(), pbc()[1]):
        assert Schema.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rename": {"id": "who"}}, r"which column is the patient\? none is called one of .*'who'"),
        ({"rename": {"bili": "time"}}, r"which column is the time\? several could be: \['day', 't"),
        ({"patient": "x"}, "no column 'x' for the patient"),
        ({"patient": "day", "time": "day"}, "cannot both be column 'day'"),
        ({"set": {"bili": np.nan}}, "column 'bili': all 8 values are missing: drop the column"),
        ({"set": {"note": list("abcdefgh")}, "max_categories": 7}, "'note': text with 8 different"),
        ({"set": {"bili": pd.Timestamp("2020-01-01")}}, "column 'bili' holds dates: drop it"),
        ({"set": {"bili": [*range(7), np.inf]}}, r"row 9, column 'bili': the value is infinite"),
        ({"set": {"bili": [*"123456", "<0.5", "8"]}, "max_categories": 5},
         r"row 8, column 'bili': '<0.5' is no number, and most values are"),
        ({"set": {"day": [*"123456", "later", "8"]}}, "row 8, column 'day': 'later' is no time"),
    ],
)  # fmt: skip
def test_inference_refuses(change, match):
    frame = table().rename(columns=change.pop("rename", {})).assign(**change.pop("set", {}))
    with pytest.raises(TableError, match=match):
        infer_schema(frame, **change)


# What is refused: the row and the column are named.


@pytest.mark.parametrize(
    ("row", "column", "value", "match"),
    [
        (3, "day", 0, r"row 3 \(patient 1\), column 'day': two visits .* same time 0: also row 2"),
        (4, "sex", "x", r"row 4 \(patient 2\), column 'sex': unknown category 'x': known are \['f"),
        (3, "grade", 9, r"row 3 \(patient 1\), column 'grade': unknown category 9: known are \[0"),
        (6, "bili", "n/d", r"row 6 \(patient 2\), column 'bili': 'n/d' is not a finite number"),
        (6, "bili", "inf", r"row 6 \(patient 2\), column 'bili': 'inf' is not a finite number"),
        (6, "bili", 0.0, r"row 6 \(patient 2\), column 'bili': 0.0 is not above 0"),
        (2, "visits", 1.5, r"row 2 \(patient 1\), column 'visits': 1.5 is not a whole number"),
        (5, "id", None, r"row 5, column 'id': the patient is missing"),
        (5, "id", 1.5, r"row 5, column 'id': the schema's patients are ints, got 1.5"),
        (5, "day", None, r"row 5 \(patient 2\), column 'day': the time is missing: give it"),
        (5, "day", "soon", r"row 5 \(patient 2\), column 'day': .* whole numbers, got 'soon'"),
        (5, "sex", "f", r"row 5 .*'sex': a static column changes .* from 'm' to 'f' \(row 4\)"),
        (3, "sex", None, r"row 3 \(patient 1\), column 'sex': the value is missing, and the sch"),
        (3, "grade", None, r"row 3 \(patient 1\), column 'grade': the value is missing, and"),
    ],
)
def test_check_names_the_row_and_the_column(row, column, value, match):
    with pytest.raises(TableError, match=match):
        check_table(changed(row, column, value), schema())


def test_check_refuses_a_patient_with_no_visit():
    frame = pd.concat([table(), pd.DataFrame({"id": [4], "sex": ["f"], "grade": [0]})])
    with pytest.raises(TableError, match=r"row 10 \(patient 4\), .*'day'.* has no visit at all"):
        check_table(frame.reset_index(drop=True), schema())


def test_check_refuses_another_schema():
    frame = table().drop(columns="bili").assign(new=1)
    with pytest.raises(TableError, match=r"another schema .* lacks \['bili'\], it also has \['new"):
        check_table(frame, schema())
    twice = pd.concat([table(), table()[["bili"]]], axis=1)
    with pytest.raises(TableError, match=r"has twice \['bili'\]"):
        check_table(twice, schema())
    with pytest.raises(TableError, match="holds no row"):
        check_table(table().iloc[:0], schema())


def test_static_column_may_not_come_and_go():
    found = schema().replace("sex", missing=True)
    with pytest.raises(TableError, match=r"row 3 .*'sex': a static .* from 'f' to 'missing'"):
        check_table(changed(3, "sex", None), found)


def test_static_column_may_be_missing_throughout_a_patient():
    frame = table().assign(arm=[1, 1, None, None, None, 2, 2, 2])
    found = infer_schema(frame)
    assert found["arm"].static
    assert found["arm"].missing
    assert (
        check_table(frame, found)["arm"].isna().tolist() == [False] * 2 + [True] * 3 + [False] * 3
    )


def test_rows_are_named_as_in_the_file_after_a_selection():
    part = changed(7, "bili", "?")
    part = part[part["id"] == 3]
    with pytest.raises(TableError, match=r"row 7 \(patient 3\)"):
        check_table(part, schema())
    with pytest.raises(TableError, match=r"row 2 \(patient 3\)"):  # labels that are no line numbers
        check_table(part.set_index(pd.Index(list("abc"))), schema())


def test_check_counts_further_rows():
    frame = table().assign(bili=["x", "y", *range(1, 7)])
    with pytest.raises(
        TableError, match=r"row 2 .*'x' is not a finite number \(1 more such rows\)"
    ):
        check_table(frame, schema())


def test_check_sorts_and_sets_dtypes():
    shuffled = table().sample(frac=1, random_state=0)
    checked = check_table(shuffled[shuffled.columns[::-1]], schema())
    assert list(checked.columns) == list(schema().order)
    assert checked["id"].tolist() == [1, 1, 2, 2, 2, 3, 3, 3]
    assert checked["day"].tolist() == [0, 30, 0, 45, 90, 0, 10, 20]
    assert checked["grade"].dtype == np.int64
    assert checked["bili"].dtype == np.float64
    assert checked["visits"].dtype == pd.Int64Dtype()
    assert checked["visits"].isna().sum() == 1
    pd.testing.assert_frame_equal(check_table(checked, schema()), checked)


def test_check_may_take_the_unexpected_as_missing():
    frame = changed(4, "grade", 9)
    frame.loc[0, "grade"] = None
    checked = check_table(frame, schema(), unseen="missing")
    assert checked["grade"].isna().tolist() == [True, False, True] + [False] * 5
    with pytest.raises(ValueError, match="unseen must be one of"):
        check_table(frame, schema(), unseen="drop")


def test_dates_are_read_in_iso_form_only():
    frame = table().assign(
        day=["2020-01-31", "2020-02-29"] + [f"2020-03-0{i}" for i in range(1, 7)]
    )
    found = infer_schema(frame)
    assert (found.time_dtype, found.time_decimals, found.time_unit) == ("datetime", 0, "days")
    assert check_table(frame, found)["day"].dtype == "datetime64[us]"
    for bad in ("31/01/2020", "2020-01-31T00:00:00Z", "2020-01-31 00:00+02:00", "2020-02-30"):
        with pytest.raises(TableError, match=r"row 2 .*column 'day'.* ISO 8601"):
            check_table(frame.assign(day=[bad, *frame["day"][1:]]), found)
    zoned = frame.assign(day=pd.to_datetime(frame["day"]).dt.tz_localize("UTC"))
    with pytest.raises(TableError, match="'day': times with a zone"):
        infer_schema(zoned)
    clock = frame.assign(day=pd.to_datetime(frame["day"]) + pd.Timedelta(hours=5))
    assert infer_schema(clock).time_decimals is None


# Files.


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_files_round_trip(tmp_path, name):
    checked = check_table(table(), schema())
    path = tmp_path / "new" / name
    write_table(table().iloc[::-1], path, schema())
    pd.testing.assert_frame_equal(check_table(read_table(path), schema()), checked)
    first = path.read_bytes()
    write_table(checked, path, schema())
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == [name]  # no temporary file stays


def test_written_csv_reads_with_the_dtypes_of_the_original(tmp_path):
    frame, found = pbc()
    write_table(frame, tmp_path / "t.csv", found)
    again = pd.read_csv(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(again, frame)
    text = (tmp_path / "t.csv").read_text().splitlines()
    assert text[1] == "1,400,2,1,58.76522929500342,f,0,1,1,1,1.0,14.5,261,2.6,1718,138.0,190,12.2,4"
    assert text[2].split(",")[12] == ""
    # With no value missing, ints are still read as floats; with whole numbers only, floats too.
    few = frame[frame.notna().all(axis=1) & (frame["edema"] != 0.5)]
    write_table(few, tmp_path / "few.csv", found)
    assert (pd.read_csv(tmp_path / "few.csv").dtypes == frame.dtypes).all()


def test_dates_and_bools_are_written_plainly(tmp_path):
    frame = table().assign(
        day=pd.date_range("2020-02-28", periods=8), flag=[True, False] * 4, note='a "quoted", text'
    )
    found = infer_schema(frame)
    write_table(frame, tmp_path / "t.csv", found)
    again = pd.read_csv(tmp_path / "t.csv")
    assert again["day"].tolist()[:3] == ["2020-02-28", "2020-02-29", "2020-03-01"]
    assert again["flag"].dtype == bool
    pd.testing.assert_frame_equal(check_table(again, found), check_table(frame, found))
    clock = frame.assign(day=frame["day"] + pd.Timedelta(seconds=3601))
    write_table(clock, tmp_path / "t.csv", infer_schema(clock))
    assert pd.read_csv(tmp_path / "t.csv")["day"][0] == "2020-02-28 01:00:01"


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("mine")
    with pytest.raises(TableError, match="unknown category"):
        write_table(changed(4, "sex", "x"), path, schema())
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["t.csv"]


def test_reading_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no table .*none\.csv"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(TableError, match=r"t\.xlsx: a table's name ends in \.csv"):
        read_table(tmp_path / "t.xlsx")
    for name, content in (("t.csv", b""), ("t.csv.gz", b"no gzip"), ("t.parquet", b"no parquet"),
                          ("u.csv", b"\xff\xfe\xff"), ("v.csv", b"a,b\n1,2\n1,2,3\n")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TableError, match=f"cannot read .*{name}"):
            read_table(tmp_path / name)
    frame = table()
    assert read_table(frame) is frame
