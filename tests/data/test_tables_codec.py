"""The codec: tables to sequences and back, and what inpainting may take as given."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdiff.data.tables import (
    Channel,
    Codec,
    TableError,
    Transform,
    check_table,
    fit_codec,
    infer_schema,
    pbc,
)
from jaxdiff.data.tables.transforms import fit_transform

METHODS = ("quantile", "normal_quantile", "yeo_johnson", "box_cox", "none")


def small():
    """Two records: of three visits and of one. `lab` and the static `arm` may miss."""
    frame = pd.DataFrame(
        {
            "id": [5, 5, 5, 9],
            "day": [0, 10, 40, 3],
            "arm": ["a", "a", "a", None],
            "age": [50.0, 50.0, 50.0, 70.0],
            "lab": [1.5, np.nan, 2.5, np.nan],
            "flag": [True, False, True, True],
            "grade": [0, 1, 2, 4],
            "site": [3, 3, 3, 3],
        }
    )
    schema = infer_schema(frame).replace("lab", kind="positive").replace("age", kind="real")
    return frame, schema.replace("arm", kind="binary", categories=("a", "b"))


def same(back, want, decimals_of):
    """Asserts that tables are equal: all but reals without decimals exactly."""
    assert list(back.columns) == list(want.columns)
    assert (back.dtypes == want.dtypes).all()
    for name in want.columns:
        reals = pd.api.types.is_float_dtype(want[name])
        if reals and name in decimals_of and decimals_of[name] is None:
            spread = want[name].max() - want[name].min()
            np.testing.assert_allclose(back[name], want[name], rtol=1e-6, atol=2e-5 * spread)
        else:
            pd.testing.assert_series_equal(back[name], want[name], check_exact=True)


def decimals_of(schema):
    found = {name: schema[name].decimals for name in schema.reals}
    return found | {schema.time: schema.time_decimals}


# Round trips.


@pytest.mark.parametrize("static", ["channels", "vector"])
@pytest.mark.parametrize("categories", ["one_hot", "bits"])
@pytest.mark.parametrize("transform", METHODS)
def test_pbc_round_trip(transform, categories, static):
    frame, schema = pbc()
    codec = fit_codec(frame, schema, transform=transform, categories=categories, static=static)
    length = codec.padded_length(8)
    sequences = codec.encode(frame, length=length)
    want = check_table(frame, schema)
    back = codec.decode(sequences.x0, sequences.lengths, sequences.static, ids=sequences.ids)
    same(back, want, decimals_of(schema))
    # Shapes, padding, mask.
    bits = categories == "bits"
    statics = 2 + (2 if bits else 3) + 2  # futime, age; status; trt, sex
    dynamic = 3 * 2 + (2 if bits else 3) + 4 + 3 * 2 + (2 if bits else 4) + 1
    vector = static == "vector"
    assert sequences.x0.shape == (312, 16, dynamic + (0 if vector else statics))
    assert sequences.static.shape == (312, statics if vector else 0)
    assert sequences.x0.dtype == sequences.static.dtype == np.float32
    assert np.abs(sequences.x0).max() == 1
    assert np.array_equal(sequences.mask.sum(1), sequences.lengths)
    assert np.array_equal(sequences.mask, np.arange(16)[None] < sequences.lengths[:, None])
    assert not sequences.x0[~sequences.mask].any()
    assert not sequences.observed[~sequences.mask].any()


def test_reals_round_trip_before_rounding():
    frame, schema = pbc()
    for name in schema.reals:
        schema = schema.replace(name, decimals=None, dtype="float")
    codec = fit_codec(frame, schema)
    sequences = codec.encode(frame)
    back = codec.decode(sequences.x0, sequences.lengths, ids=sequences.ids)
    same(back, check_table(frame, schema), decimals_of(schema))


@st.composite
def tables(draw):
    """Small random tables: every dtype, dates or numbers as times, missing values."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    rows, seed = sum(lengths), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    steps = rng.integers(1, 400, rows)
    time = np.cumsum(steps) if draw(st.booleans()) else np.arange(rows)
    times = draw(st.sampled_from(["int", "float", "date", "clock"]))
    if times == "float":
        time = np.round(time * 0.25, 2)
    elif times == "date":
        time = pd.Timestamp("1984-02-28") + pd.to_timedelta(time, "D")
    elif times == "clock":
        time = pd.Timestamp("2001-02-28") + pd.to_timedelta(time, "h")
    frame = pd.DataFrame(
        {
            "patient": [f"p{n}" for n in numbers] if draw(st.booleans()) else numbers + 1000,
            "time": time,
            "real": np.round(rng.normal(scale=30, size=rows), draw(st.integers(0, 3))),
            "free": rng.normal(size=rows),
            "positive": np.exp(rng.normal(size=rows)).round(2) + 0.01,
            "whole": rng.integers(-50, 10**6, rows),
            "flag": rng.integers(0, 2, rows).astype(bool),
            "code": rng.integers(0, 7, rows),
            "text": rng.choice(list("abcde"), rows),
            "sex": rng.choice(["f", "m"], len(lengths))[numbers],
            "age": rng.uniform(20, 90, len(lengths)).round(1)[numbers],
            "constant": draw(st.sampled_from([0, 1.5, "x", True])),
        }
    )
    for name in ("real", "positive", "whole", "flag", "code", "text"):
        if draw(st.booleans()) and rows > 1:
            hidden = rng.random(rows) < 0.4
            hidden[rng.integers(rows)] = False  # not all
            frame[name] = frame[name].astype(object).mask(hidden)
    return frame.sample(frac=1, random_state=seed % 1000)


def forced(frame):
    """Returns the inferred schema, with reals where few values made categories of them."""
    schema = infer_schema(frame, patient="patient", time="time")
    for name in ("real", "free", "whole", "age", "positive"):
        kind = "positive" if name in ("positive", "age") else "real"
        schema = schema.replace(name, kind=kind)
    return schema


@given(
    tables(),
    st.sampled_from(METHODS),
    st.sampled_from(["one_hot", "bits"]),
    st.sampled_from(["channels", "vector"]),
    st.sampled_from(["carry", "zero"]),
)
def test_round_trip_of_random_tables(frame, transform, categories, static, fill):
    schema = forced(frame)
    codec = fit_codec(
        frame, schema, transform=transform, categories=categories, static=static, fill=fill
    )
    sequences = codec.encode(frame, length=codec.max_length + 1)
    back = codec.decode(sequences.x0, sequences.lengths, sequences.static, ids=sequences.ids)
    want = check_table(frame, schema)
    if schema.time_dtype == "datetime" and schema.time_decimals is None:
        # The start is a float32 of days since 1970: it is not exact to the second. Gaps are.
        late = (back["time"] - want["time"]).abs()
        assert late.max() <= pd.Timedelta(minutes=2)
        back["time"] = want["time"]
    same(back, want, decimals_of(schema))
    again = Codec.from_json(json.loads(json.dumps(codec.to_json())))
    assert again == codec
    for one, other in zip(again.encode(frame), codec.encode(frame), strict=True):
        assert np.array_equal(one, other)


@given(
    tables(),
    st.sampled_from(METHODS),
    st.sampled_from(["one_hot", "bits"]),
    st.sampled_from(["channels", "vector"]),
    st.integers(0, 1000),
)
def test_noise_decodes_to_a_valid_table(frame, transform, categories, static, seed):
    schema = forced(frame)
    codec = fit_codec(frame, schema, transform=transform, categories=categories, static=static)
    rng = np.random.default_rng(seed)
    x0 = rng.normal(scale=3, size=(6, 5, len(codec.channels)))
    vector = rng.normal(scale=3, size=(6, len(codec.static_channels)))
    lengths = rng.integers(1, 6, 6)
    drawn = codec.decode(x0, lengths, vector)
    pd.testing.assert_frame_equal(check_table(drawn, schema), drawn)
    assert len(drawn) == lengths.sum()
    for name in schema.reals:
        assert drawn[name].dropna().between(frame[name].min(), frame[name].max()).all()


# What the channels hold.


def test_channels_of_a_small_table():
    frame, schema = small()
    codec = fit_codec(frame, schema, transform="none")
    assert codec.channels == (
        Channel("arm", "value", True), Channel("arm", "missing", True),
        Channel("age", "value", True),
        Channel("lab", "value", False), Channel("lab", "missing", False),
        Channel("flag", "value", False),
        *(Channel("grade", "category", False, number) for number in range(4)),
        Channel("gap", "gap", False), Channel("start", "start", True),
    )  # fmt: skip
    got = codec.encode(frame)
    want = np.array(
        [  # arm, seen, age, lab, seen, flag, grade, gap, start
            [-1, 1, -1, -1, 1, 1, 1, -1, -1, -1, 0, -1],
            [-1, 1, -1, -1, -1, -1, -1, 1, -1, -1, -1, -1],
            [-1, 1, -1, 1, 1, 1, -1, -1, 1, -1, 1, -1],
        ]
    )
    np.testing.assert_allclose(got.x0[0], want)
    np.testing.assert_allclose(got.x0[1, 0], [0, -1, 1, 0, -1, 1, -1, -1, -1, 1, 0, 1])
    assert not got.observed[0, 0, 10]  # no gap before the first visit
    assert not got.observed[0, 1, 3]  # carried, not seen
    assert not got.observed[1, 0, 0]
    assert got.observed.sum() == (12 * 4 - 2 - 2 - 1)
    assert got.ids.tolist() == [5, 9]
    assert got.lengths.tolist() == [3, 1]


def test_bits_are_binary_numbers_and_invalid_ones_go_to_the_nearest():
    frame, schema = small()
    schema = schema.replace("grade", categories=(0, 1, 2, 4, 5))
    codec = fit_codec(frame, schema, categories="bits")
    where = [n for n, channel in enumerate(codec.channels) if channel.name == "grade"]
    x0 = codec.encode(frame).x0
    np.testing.assert_array_equal(x0[0][:, where], [[-1, -1, -1], [1, -1, -1], [-1, 1, -1]])
    np.testing.assert_array_equal(x0[1, 0, where], [1, 1, -1])  # 4 has number 3
    # Number 5 = 101 is no category's. The nearest are 1 = 001 and 4 = 100, as the weaker bit says.
    for bits, grade in (((0.9, -0.9, 0.2), 1), ((0.2, -0.9, 0.9), 5), ((0.9, 0.2, 0.9), 4)):
        x0[1, 0, where] = bits
        assert codec.decode(x0, [3, 1])["grade"].iloc[3] == grade


def test_fill_carries_the_last_value_else_the_next():
    frame = pd.DataFrame(
        {"id": 1, "day": range(6), "lab": [np.nan, 1.0, np.nan, np.nan, 3.0, np.nan]}
    )
    schema = infer_schema(frame).replace("lab", kind="real")
    carried = fit_codec(frame, schema, transform="none").encode(frame).x0[0]
    np.testing.assert_array_equal(carried[:, 0], [-1, -1, -1, -1, 1, 1])
    np.testing.assert_array_equal(carried[:, 1], [-1, 1, -1, -1, 1, -1])
    zero = fit_codec(frame, schema, transform="none", fill="zero").encode(frame).x0[0]
    np.testing.assert_array_equal(zero[:, 0], [0, -1, 0, 0, 1, 0])


def test_regular_times_and_constants_take_no_channel():
    frame = pd.DataFrame({"id": [1, 1, 1, 2, 2, 2], "day": [7, 14, 21] * 2, "x": range(6),
                          "same": 2.5, "drug": "d", "rare": [np.nan] * 5 + [1.0]})  # fmt: skip
    schema = infer_schema(frame).replace("x", kind="real").replace("same", kind="real")
    codec = fit_codec(frame, schema)
    # A constant that is sometimes missing has the indicator alone.
    assert codec.channels == (Channel("x", "value", False), Channel("rare", "missing", False))
    sequences = codec.encode(frame)
    same(codec.decode(sequences.x0, [3, 3]), check_table(frame, schema), decimals_of(schema))


def test_static_columns_are_fitted_once_a_patient():
    frame = pd.DataFrame({"id": np.repeat([1, 2, 3], [1, 1, 8]), "day": range(10),
                          "age": np.repeat([10.0, 20.0, 30.0], [1, 1, 8])})  # fmt: skip
    schema = infer_schema(frame).replace("age", kind="real")
    transform = dict(fit_codec(frame, schema).transforms)["age"]
    assert transform.quantiles == (10.0, 20.0, 30.0)


def test_static_channels_decode_by_their_mean_over_real_visits():
    frame, schema = small()
    codec = fit_codec(frame, schema, transform="none")
    age = codec.channels.index(Channel("age", "value", True))
    x0 = np.zeros((1, 6, len(codec.channels)))
    x0[0, :, age] = [-1, 0, 0.4, 1, 1, 1]
    assert codec.decode(x0, [3])["age"].tolist() == [58.0] * 3  # mean -0.2 of 50 .. 70


def test_times_always_increase_and_start_where_they_should():
    frame = pd.DataFrame({"id": [1, 1, 2, 2], "time": [0.5, 0.75, 1.5, 2.75], "x": [1, 2, 3, 4]})
    codec = fit_codec(frame, infer_schema(frame))
    back = codec.decode(np.full((2, 40, len(codec.channels)), -1.0), [40, 40])
    want = 0.5 + 0.25 * np.arange(40)
    np.testing.assert_array_equal(back["time"], np.tile(want, 2))


def test_patients_are_named():
    frame, schema = small()
    codec = fit_codec(frame, schema)
    x0 = np.zeros((2, 4, len(codec.channels)))
    assert codec.decode(x0, [1, 2], first_id=7)["id"].tolist() == [7, 8, 8]
    assert codec.decode(x0, [1, 1], ids=np.array([9, 3]))["id"].tolist() == [9, 3]
    text = frame.assign(id=["x", "x", "x", "y"])
    codec = fit_codec(text, infer_schema(text).replace("lab", kind="positive"))
    x0 = np.zeros((2, 4, len(codec.channels)))
    assert codec.decode(x0, [1, 1])["id"].tolist() == ["S000001", "S000002"]
    with pytest.raises(ValueError, match="ids must be 2 different names"):
        codec.decode(x0, [1, 1], ids=["a", "a"])


def test_a_record_decodes_alike_alone_and_whatever_the_padding_holds():
    frame, schema = pbc()
    codec = fit_codec(frame, schema)
    rng = np.random.default_rng(0)
    x0, lengths = rng.normal(size=(5, 16, len(codec.channels))), np.array([1, 16, 4, 7, 2])
    whole = codec.decode(x0, lengths)
    garbage = np.where(np.arange(16)[None, :, None] < lengths[:, None, None], x0, np.nan)
    pd.testing.assert_frame_equal(codec.decode(garbage, lengths), whole)
    alone = codec.decode(x0[2:3], lengths[2:3], first_id=3)
    pd.testing.assert_frame_equal(alone, whole[whole["id"] == 3].reset_index(drop=True))


# Transforms.


@pytest.mark.parametrize("method", METHODS)
def test_transform_is_monotone_and_clips(method):
    values = np.exp(np.random.default_rng(0).normal(size=300))
    transform = fit_transform(values, method, positive=True)
    assert transform.method == method
    encoded = transform.forward(np.sort(values))
    assert np.all(np.diff(encoded) > 0)
    assert (encoded[0], encoded[-1]) == (-1, 1)
    np.testing.assert_array_equal(transform.forward(np.array([1e-9, 1e9])), [-1, 1])
    low, high = values.min(), values.max()
    np.testing.assert_allclose(transform.inverse(np.array([-5.0, 5.0])), [low, high])
    np.testing.assert_allclose(transform.inverse(transform.forward(values)), values, rtol=1e-9)
    assert Transform.from_json(json.loads(json.dumps(transform.to_json()))) == transform


def test_transforms_are_scikit_learns():
    from sklearn.preprocessing import PowerTransformer, QuantileTransformer

    values = np.random.default_rng(1).gamma(2.0, size=(200, 1))
    for method in ("yeo_johnson", "box_cox"):
        theirs = PowerTransformer(method.replace("_", "-")).fit_transform(values)[:, 0]
        theirs = 2 * (theirs - theirs.min()) / np.ptp(theirs) - 1
        ours = fit_transform(values[:, 0], method, positive=True).forward(values[:, 0])
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    theirs = QuantileTransformer(n_quantiles=200, subsample=None).fit_transform(values)[:, 0]
    ours = fit_transform(values[:, 0], "quantile", positive=True).forward(values[:, 0])
    np.testing.assert_allclose(ours, 2 * theirs - 1, atol=1e-12)


def test_box_cox_is_for_positive_numbers_and_huge_powers_are_refused():
    values = np.random.default_rng(0).normal(size=50)
    assert fit_transform(values, "box_cox", positive=False).method == "yeo_johnson"
    nearly = 1000 + 1e-3 * np.array([0.0, 1.0, 1.0, 1.0, 50.0])
    for method in METHODS:
        transform = fit_transform(nearly, method, positive=True)
        back = transform.inverse(transform.forward(nearly).astype(np.float32))
        np.testing.assert_allclose(back, nearly, atol=1e-6)
    assert fit_transform(nearly, "box_cox", positive=True).method == "none"
    with pytest.raises(ValueError, match="transform must be one of"):
        fit_transform(values, "log", positive=True)


# Refusals.


def test_encode_refuses_or_takes_as_missing():
    frame, schema = small()
    codec = fit_codec(frame, schema)
    odd = frame.assign(grade=[0, 1, 3, 4])
    with pytest.raises(
        TableError, match=r"row 4 \(patient 5\), column 'grade': unknown category 3"
    ):
        codec.encode(odd)
    got = codec.encode(odd, unseen="missing")
    where = [n for n, channel in enumerate(codec.channels) if channel.name == "grade"]
    assert not got.observed[0, 2, where].any()
    np.testing.assert_array_equal(got.x0[0, 2, where], got.x0[0, 1, where])  # carried
    with pytest.raises(TableError, match="patient 5 has 3 visits, more than length=2"):
        codec.encode(frame, length=2)
    with pytest.raises(TableError, match="column 'lab': all 4 values are missing"):
        fit_codec(frame.assign(lab=np.nan), schema)
    for option in ("categories", "static", "fill", "transform"):
        with pytest.raises(ValueError, match=f"{option} must be one of"):
            fit_codec(frame, schema, **{option: "x"})


def test_decode_refuses_what_does_not_fit():
    frame, schema = small()
    codec = fit_codec(frame, schema)
    x0 = np.zeros((2, 4, len(codec.channels)))
    with pytest.raises(ValueError, match=r"x0 must be \(N, L, 12\)"):
        codec.decode(x0[..., 1:], [1, 1])
    for lengths in ([1], [0, 1], [1, 5]):
        with pytest.raises(ValueError, match=r"lengths must be \(2,\), each in 1 .. 4"):
            codec.decode(x0, lengths)
    x0[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="x0 is NaN in record 1"):
        codec.decode(x0, [1, 1])
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        codec.padded_length(0)
    vector = fit_codec(frame, schema, static="vector")
    with pytest.raises(ValueError, match=r"static must be \(1, 3\)"):
        vector.decode(np.zeros((1, 4, len(vector.channels))), [1])


# Beyond generation.


def test_known_for_imputation():
    frame, schema = small()
    codec = fit_codec(frame, schema)
    sequences = codec.encode(frame, length=4)
    known, mask = codec.known_for_imputation(sequences)
    indicator = np.array([channel.role == "missing" for channel in codec.channels])
    np.testing.assert_array_equal(known[..., indicator], 1.0 * sequences.mask[..., None] + [[0, 0]])
    np.testing.assert_array_equal(mask[..., indicator], sequences.mask[..., None] & [[True, True]])
    np.testing.assert_array_equal(mask[..., ~indicator], sequences.observed[..., ~indicator])
    rest = np.where(sequences.observed, sequences.x0, 0)
    np.testing.assert_array_equal(known[..., ~indicator], rest[..., ~indicator])


def test_known_for_forecast():
    frame, schema = small()
    codec = fit_codec(frame, schema)
    sequences = codec.encode(frame, length=4)
    known, known_mask, mask, lengths = codec.known_for_forecast(sequences, [2, 1])
    assert known.shape == (2, 5, 12)
    assert lengths.tolist() == [5, 2]
    np.testing.assert_array_equal(mask, np.arange(5)[None] < lengths[:, None])
    static = np.array([channel.static for channel in codec.channels])
    assert known_mask[0, 3:, static].all()
    assert not known_mask[:, :, ~static][0, 3:].any()
    np.testing.assert_array_equal(known[0, 3:, :][:, static], sequences.x0[0, [2, 2]][:, static])
    np.testing.assert_array_equal(known_mask[0, :3], sequences.observed[0, :3])
    assert not known_mask[1, 1, 0]  # the arm of patient 9 is not known
    assert known_mask[1, 1, 1]  # but that it is missing
    assert not known_mask[~mask].any()
    assert not known[~known_mask].any()
    assert codec.known_for_forecast(sequences, 1, length=8)[0].shape == (2, 8, 12)
    with pytest.raises(ValueError, match="length must be at least 6"):
        codec.known_for_forecast(sequences, 3, length=5)
    with pytest.raises(ValueError, match="visits must be a number"):
        codec.known_for_forecast(sequences, -1)


def test_known_static():
    frame, schema = small()
    codec = fit_codec(frame, schema, transform="none")
    known, mask = codec.known_static({"arm": "b", "age": 60.0}, 3, 4)
    assert known.shape == mask.shape == (3, 4, 12)
    np.testing.assert_array_equal(known[..., :3], np.broadcast_to([1, 1, 0], (3, 4, 3)))
    assert mask[..., :3].all()
    assert not mask[..., 3:].any()
    _, mask = codec.known_static({"arm": None}, 1, 1)
    assert mask[0, 0, :3].tolist() == [False, True, False]
    with pytest.raises(TableError, match=r"^column 'arm': unknown category 'c': known are \['a'"):
        codec.known_static({"arm": "c"}, 1, 1)
    with pytest.raises(TableError, match="column 'age': the value is missing"):
        codec.known_static({"age": None}, 1, 1)
    with pytest.raises(ValueError, match="'lab' is not static: the static columns are"):
        codec.known_static({"lab": 1.0}, 1, 1)
    vector = fit_codec(frame, schema, transform="none", static="vector")
    known, mask = vector.known_static({"age": 70.0}, 3, 4)
    np.testing.assert_array_equal(known, np.broadcast_to([0, 0, 1], (3, 3)))
    np.testing.assert_array_equal(mask, np.broadcast_to([False, False, True], (3, 3)))


def test_signs_are_the_channels_that_hold_nothing_else():
    frame, schema = small()
    for categories in ("one_hot", "bits"):
        codec = fit_codec(frame, schema, transform="none", categories=categories)
        sequences = codec.encode(frame)
        held = sequences.x0[sequences.mask], sequences.observed[sequences.mask]
        for number, sign in enumerate(codec.signs):
            values = held[0][:, number][held[1][:, number]]
            channel = codec.channels[number]
            number_of = channel.name in ("age", "lab") and channel.role == "value"
            real = channel.role in ("gap", "start") or number_of
            assert sign == (not real)
            assert not sign or set(values) <= {-1, 1}


def test_static_vectors():
    frame, schema = small()
    codec = fit_codec(frame, schema, transform="none", static="vector")
    want = [[-1, 1, -1], [0, -1, 1]]
    np.testing.assert_array_equal(codec.encode(frame).static, want)
    np.testing.assert_array_equal(codec.encode_static(frame), want)
    values = {"arm": ["a", None], "age": [50, 70.0], "site": 3}
    np.testing.assert_array_equal(codec.encode_static(values), want)
    assert codec.encode_static({"arm": "b", "age": 60, "site": 3}).tolist() == [[1, 1, 0]]
    with pytest.raises(ValueError, match=r"lacks \['age', 'site'\]"):
        codec.encode_static({"arm": "a"})
    with pytest.raises(ValueError, match="column 'age': 2 values, and others have 3"):
        codec.encode_static({"arm": ["a", "b", "b"], "age": [50, 60], "site": 3})
    with pytest.raises(ValueError, match="use known_static"):
        fit_codec(frame, schema).encode_static(values)


def test_impute_keeps_what_was_observed_and_fills_the_rest():
    frame, schema = pbc()
    codec = fit_codec(frame, schema)
    hidden, rng = frame.copy(), np.random.default_rng(0)
    for name in ("bili", "sex", "stage", "platelet"):
        gone = rng.random(len(frame)) < 0.2
        gone = frame["id"].isin([3, 4]) if name == "sex" else gone
        hidden[name] = hidden[name].mask(gone)
    # The best of models draws the truth: then imputing gives it back where it was hidden.
    truth = codec.encode(frame)
    draws = np.stack([truth.x0] * 3)
    filled = codec.impute(hidden, draws)
    assert not filled.isna().any().any()
    want = check_table(frame, schema)
    for name in want.columns:
        known = want[name].notna().to_numpy()
        np.testing.assert_array_equal(filled[name][known].tolist(), want[name][known].tolist())
    assert (filled.drop(columns=["sex"]).dtypes == want.drop(columns=["sex"]).dtypes).all()


def test_impute_takes_means_and_votes():
    frame, schema = small()
    codec = fit_codec(frame, schema, transform="none")
    draws = np.zeros((3, 2, 3, 12))
    lab, arm = codec.channels.index(Channel("lab", "value", False)), 0
    draws[:, 0, 1, lab] = [-1, -1, 1]  # 1.5, 1.5, 2.5
    draws[:, 1, 0, arm] = [-1, 1, 1]
    filled = codec.impute(frame, draws)
    assert filled["lab"].tolist() == [1.5, 1.8, 2.5, 2.0]
    assert filled["arm"].tolist() == ["a", "a", "a", "b"]
    vector = fit_codec(frame, schema, static="vector")
    kept = vector.impute(frame, np.zeros((1, 2, 3, len(vector.channels))))
    assert kept["arm"].isna().tolist() == [False, False, False, True]
    for shape in ((2, 3, 12), (3, 1, 3, 12)):
        with pytest.raises(ValueError, match=r"draws must be \(M, 2, L, C\)"):
            codec.impute(frame, np.zeros(shape))
