"""Evaluation of synthetic tables against closed forms, plain loops and generators known to cheat.

Seeds are fixed; bounds of random statistics are at least 4 standard errors away, so a correct
implementation with fresh seeds fails any one of them in fewer than 1 of 10,000 runs.
"""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxdiff import evaluation
from jaxdiff.evaluation import _models, disclosure, manifold

LETTERS = np.array(list("abc"))


def cohort(rng, patients=60, visits=5, shift=0.0):
    """Patients with an AR(1) laboratory value, a category that goes with it, and a sex."""
    lab = np.empty((patients, visits))
    lab[:, 0] = rng.normal(size=patients)
    for k in range(1, visits):
        lab[:, k] = 0.8 * lab[:, k - 1] + 0.6 * rng.normal(size=patients)
    other = rng.normal(size=lab.shape)
    stage = LETTERS[np.clip(np.round(lab + 0.3 * other), -1, 1).astype(int) + 1]
    frame = pd.DataFrame(
        {
            "id": np.repeat(np.arange(patients), visits),
            "day": np.tile(np.arange(visits), patients),
            "lab": lab.ravel() + shift,
            "other": other.ravel(),
            "stage": stage.ravel(),
            "sex": np.repeat(rng.integers(0, 2, patients), visits),
        }
    )
    frame.loc[rng.random(len(frame)) < 0.2, "other"] = np.nan
    frame.loc[rng.random(len(frame)) < 0.1, "stage"] = None
    return frame


COLUMNS = ["lab", "other", "stage"]


# Columns.


def test_distances_of_normals_are_the_closed_forms():
    rng = np.random.default_rng(0)
    real = pd.DataFrame({"x": 3 * rng.normal(size=40_000)})
    fake = pd.DataFrame({"x": 3 * rng.normal(size=40_000) + 1.5})  # half a standard deviation
    # sup |Phi(x) - Phi(x - 1/2)| = 2 Phi(1/4) - 1; standard error below 0.5 sqrt(2/n) = 0.0035.
    expected = 2 * stats.norm.cdf(0.25) - 1
    assert evaluation.ks(real, fake, ["x"])["x"] == pytest.approx(expected, abs=0.014)
    # A shift moves all the mass by itself; standard error sqrt(2/n) = 0.007.
    assert evaluation.wasserstein(real, fake, ["x"])["x"] == pytest.approx(0.5, abs=0.029)


def test_total_variation_is_half_the_sum_and_reads_types_alike():
    real = pd.DataFrame({"e": pd.array([0, 0, 1, 1, None], "Int64"), "t": [*list("aabb"), None]})
    fake = pd.DataFrame({"e": [0.0, 1.0, 1.0, 2.0], "t": ["a", "b", None, "c"]})
    scores = evaluation.total_variation(real, fake, ["e", "t"])
    assert scores["e"] == pytest.approx((0.25 + 0 + 0.25) / 2)
    assert scores["t"] == pytest.approx((1 / 6 + 1 / 6 + 1 / 3) / 2)


def test_whole_numbers_and_text_in_one_column_are_one_set_of_categories():
    real = pd.DataFrame({"n": ["0", "1", "2+", "2+"]})
    fake = pd.DataFrame({"n": [0.0, 1.0, np.nan]})  # as read from a CSV without "2+"
    assert evaluation.total_variation(real, fake, ["n"])["n"] == pytest.approx(0.5)
    assert evaluation.out_of_range(real, fake, ["n"]) == {"n": 0.0}


def test_a_table_is_at_no_distance_from_itself():
    frame = cohort(np.random.default_rng(0))
    assert evaluation.ks(frame, frame, ["lab", "other"]) == {"lab": 0.0, "other": 0.0}
    assert evaluation.wasserstein(frame, frame, ["lab", "other"]) == {"lab": 0.0, "other": 0.0}
    assert evaluation.total_variation(frame, frame, ["stage", "sex"]) == {"stage": 0.0, "sex": 0.0}
    assert evaluation.correlation_difference(frame, frame, COLUMNS) == 0.0
    spreads = evaluation.visits(frame, frame, "id", "day")
    assert [spread.ks for spread in spreads.values()] == [0.0, 0.0]
    assert set(evaluation.out_of_range(frame, frame, COLUMNS).values()) == {0.0}


def test_missing_rates_and_out_of_range_count():
    real = pd.DataFrame(
        {"x": [1.0, 2.0, np.nan, 4.0], "c": ["a", "b", "b", None], "n": [0, 1, 3, 3]}
    )
    fake = pd.DataFrame(
        {"x": [0.5, 4.0, 5.0, np.nan], "c": ["a", "z", None, None], "n": [2, 0, 1, 4]}
    )
    rates = evaluation.missing_rates(real, fake, ["x", "c"])
    assert rates["x"] == (0.25, 0.25, 0.0)
    assert rates["c"] == (0.25, 0.5, 0.25)
    assert evaluation.out_of_range(real, fake, ["x", "c", "n"]) == {"x": 2 / 3, "c": 0.5, "n": 0.25}
    assert evaluation.out_of_range(real, fake, ["n"], categorical=["n"]) == {"n": 0.5}


def test_a_constant_column_is_handled():
    real, fake = (pd.DataFrame({"x": [v] * 7}) for v in (0.1, 0.2))
    assert evaluation.wasserstein(real, real, ["x"]) == {"x": 0.0}
    assert evaluation.wasserstein(real, fake, ["x"]) == {"x": np.inf}
    assert evaluation.ks(real, fake, ["x"]) == {"x": 1.0}


# Dependence.


def test_rank_correlation_is_that_of_complete_pairs():
    frame = cohort(np.random.default_rng(1))
    found = evaluation.rank_correlation(frame, COLUMNS)
    coded = frame.assign(stage=frame["stage"].map({"a": 0, "b": 1, "c": 2}))
    np.testing.assert_allclose(found, coded[COLUMNS].corr("spearman"), atol=1e-12)
    # No strictly increasing map of a column changes it.
    skewed = frame.assign(lab=np.exp(3 * frame["lab"]))
    np.testing.assert_allclose(evaluation.rank_correlation(skewed, COLUMNS), found, atol=1e-12)


def test_correlation_difference_is_the_mean_over_pairs():
    x = np.arange(6.0)
    real = pd.DataFrame({"a": x, "b": x, "c": x})
    fake = pd.DataFrame({"a": x, "b": -x, "c": np.ones(6)})
    # (a, b) differ by 2; the pairs with c count as uncorrelated, 1 away.
    assert evaluation.correlation_difference(real, fake, list("abc")) == pytest.approx(4 / 3)
    # A column that does not vary in the real table is left out.
    assert evaluation.correlation_difference(fake, real, list("abc")) == pytest.approx(2.0)


def test_lag_one_of_an_autoregression_is_the_closed_form():
    frame = cohort(np.random.default_rng(2), patients=4000, visits=6)
    frame["lab"] = np.exp(2 * frame["lab"])
    frame["patient_constant"] = frame["id"] % 17
    shuffled = frame.sample(frac=1, random_state=0)
    found = evaluation.lag_one(shuffled, ["lab", "other", "patient_constant"], "id", "day")
    # Spearman's rho of a Gaussian pair is 6/pi asin(r/2); standard error below 1/sqrt(12,000).
    assert found["lab"] == pytest.approx(6 / np.pi * np.arcsin(0.4), abs=0.036)
    assert found["other"] == pytest.approx(0.0, abs=0.036)
    assert found["patient_constant"] == pytest.approx(1.0)


def test_lag_one_matrix_tells_before_from_after():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(300, 5))
    b = np.roll(a, 1, axis=1)  # b at a visit is a at the visit before, but for the first
    rows = pd.DataFrame(
        {
            "id": np.repeat(np.arange(300), 5),
            "day": np.tile(np.arange(5), 300),
            "a": a.ravel(),
            "b": b.ravel(),
        }
    )
    found = evaluation.lag_one_matrix(rows, ["a", "b"], "id", "day")
    assert found[0, 1] == pytest.approx(1.0)  # b follows a
    assert np.abs(found[1, 0]) < 0.12  # a does not follow b; standard error 1/sqrt(1200) = 0.029
    lags = evaluation.lag_one(rows, ["a", "b"], "id", "day")
    np.testing.assert_allclose(np.diag(found), list(lags.values()))


def test_visits_are_counted_within_patients():
    real = pd.DataFrame({"id": [7, 7, 7, 3, 3], "day": [10, 0, 40, 5, 105]})
    fake = pd.DataFrame({"id": ["x", "y", "y"], "day": [0, 0, 50]})
    found = evaluation.visits(real, fake, "id", "day")
    count, gap = found["count"], found["gap"]
    assert (count.real_mean, count.synthetic_mean) == (2.5, 1.5)
    assert count.ks == pytest.approx(0.5)
    assert (gap.real_mean, gap.real_median) == (pytest.approx(140 / 3), 30.0)
    assert (gap.synthetic_mean, gap.ks) == (50.0, pytest.approx(2 / 3))


# Classifiers.


@pytest.fixture
def small(monkeypatch):
    """Cuts the forest to 30 trees."""
    from sklearn import ensemble

    kind = ensemble.RandomForestClassifier
    monkeypatch.setattr(
        ensemble, "RandomForestClassifier", lambda n_estimators, **rest: kind(30, **rest)
    )


@pytest.mark.parametrize("classifier", _models.MODELS)
def test_classifiers_see_a_shift_and_nothing_else(small, classifier):
    rng = np.random.default_rng(4)
    real, same, shifted = cohort(rng), cohort(rng), cohort(rng, shift=4.0)
    real["empty"] = same["empty"] = shifted["empty"] = np.nan

    def auc(fake):
        return evaluation.two_sample_auc(
            real, fake, [*COLUMNS, "empty"], "id", classifier=classifier, folds=3
        )

    # Standard error at most 0.053, by simulation.
    assert auc(same) == pytest.approx(0.5, abs=0.21)
    assert auc(shifted) > 0.95
    assert auc(shifted) == auc(shifted)


def test_classifiers_see_which_values_are_missing():
    rng = np.random.default_rng(5)
    real, fake = cohort(rng), cohort(rng)
    fake["other"] = fake["other"].fillna(0.1)
    for classifier in ("boosting", "logistic"):
        auc = evaluation.two_sample_auc(real, fake, ["other"], "id", classifier=classifier, folds=3)
        assert auc > 0.57  # the 20 % give 0.6; standard error 0.01


@pytest.mark.parametrize("classifier", _models.MODELS)
def test_values_may_be_missing_in_the_test_alone(small, classifier):
    frame = cohort(np.random.default_rng(5)).dropna()
    lacking = frame.assign(other=np.nan, stage=None)
    found = evaluation.train_synthetic_test_real(
        frame, lacking, lacking, "sex", COLUMNS, model=classifier
    )
    assert 0 <= found.real <= 1
    assert evaluation.train_synthetic_test_real(
        lacking, frame, frame, "sex", COLUMNS, model=classifier
    )


def test_a_patient_is_in_one_fold():
    # Each patient has his own constant. Folds by row would know it again, with an AUC near 1.
    rng = np.random.default_rng(6)
    real, fake = cohort(rng, 80, 10), cohort(rng, 80, 10)
    for frame in (real, fake):
        frame["constant"] = rng.normal(size=80)[frame["id"]]
    auc = evaluation.two_sample_auc(real, fake, ["constant"], "id")
    assert auc == pytest.approx(0.5, abs=0.31)  # standard error 0.077, by simulation


def test_categories_are_no_order():
    # Even codes are real, odd ones synthetic: a line through the codes cannot tell.
    rng = np.random.default_rng(7)
    code = rng.integers(0, 4, 400)
    frames = [pd.DataFrame({"id": np.arange(400), "c": 2 * code + i}) for i in (0, 1)]
    told = evaluation.two_sample_auc(*frames, ["c"], "id", categorical=["c"], classifier="logistic")
    untold = evaluation.two_sample_auc(*frames, ["c"], "id", classifier="logistic")
    assert told == 1.0
    assert untold < 0.7


def task(rng, n=1500, slope=1.0):
    x = rng.normal(size=n)
    risk = rng.random(n) < stats.norm.cdf(3 * slope * x)
    return pd.DataFrame(
        {
            "x": np.where(rng.random(n) < 0.1, np.nan, x),
            "noise": rng.normal(size=n),
            "dead": np.where(risk, "yes", "no"),
            "kind": LETTERS[np.digitize(slope * x, [-0.5, 0.5])],
            "value": 2 * slope * x + rng.normal(size=n),
        }
    )


def utility(fake, target, seed=8, **settings):
    rng = np.random.default_rng(seed)
    train, test = task(rng), task(rng)
    return evaluation.train_synthetic_test_real(
        train, fake(rng), test, target, ["x", "noise"], **settings
    )


def test_a_good_table_teaches_what_the_real_one_does():
    for target in ("dead", "kind", "value"):
        found = utility(task, target)
        assert found.metric == ("r2" if target == "value" else "auc")
        assert found.ratio == pytest.approx(1.0, abs=0.03)
        assert found.ratio_above_chance == pytest.approx(1.0, abs=0.05)


def test_a_wrong_table_teaches_the_wrong_thing():
    upside_down = utility(lambda rng: task(rng, slope=-1.0), "dead")
    assert upside_down.synthetic == pytest.approx(1 - upside_down.real, abs=0.05)
    assert upside_down.ratio_above_chance == pytest.approx(-1.0, abs=0.1)
    constant = utility(lambda rng: task(rng).assign(dead="no"), "dead")
    assert constant.synthetic == 0.5
    assert constant.ratio_above_chance == 0.0
    assert utility(lambda rng: task(rng, slope=-1.0), "value").synthetic < 0


def test_scores_are_the_known_answers():
    # Of Gaussian x and y = 2x + e, a tenth of x missing, R² = 0.9 * 4/5.
    found = utility(task, "value")
    assert found.real == pytest.approx(0.72, abs=0.06)
    # Of dead = (3x + e > 0) the best score is x, here with a tenth at the median.
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    dead = rng.random(2000) < stats.norm.cdf(3 * x)
    x = np.where(rng.random(2000) < 0.1, 0.0, x)
    best = np.mean(np.sign(x[dead][:, None] - x[~dead]) / 2 + 0.5)
    assert utility(task, "dead").real == pytest.approx(best, abs=0.05)
    # One value against the others is the task of telling whether it is the one.
    told = utility(task, "kind", positive="c")
    assert told.metric == "auc"
    assert told.real > 0.9
    # A class that the synthetic table never shows is worth a guess to the mean of three.
    lost = utility(lambda rng: task(rng).query("kind != 'b'"), "kind")
    full = utility(task, "kind")
    assert lost.synthetic < full.synthetic - 0.01


@pytest.mark.parametrize("model", ["boosting", "forest"])
def test_other_models_learn_the_task(small, model):
    assert utility(task, "dead", model=model).ratio == pytest.approx(1.0, abs=0.06)


# Privacy.


def distance_by_definition(a, b, scale, columns, numbers):
    total = 0.0
    for column in columns:
        x, y = a[column], b[column]
        if pd.isna(x) or pd.isna(y):
            total += pd.isna(x) != pd.isna(y)
        elif column in numbers:
            known = scale[column].dropna()
            f, g = ((np.mean(known < v) + np.mean(known <= v)) / 2 for v in (x, y))
            total += abs(f - g)
        else:
            total += x != y
    return total / len(columns)


@given(st.integers(0, 10_000))
def test_closest_record_is_by_definition(seed):
    rng = np.random.default_rng(seed)
    values = pd.DataFrame(
        {
            "x": rng.choice([0.0, 1.0, 1.0, 5.0, 100.0, np.nan], 12),
            "c": rng.choice(np.array(["u", "v", None], object), 12),
        }
    )
    a, b = values.iloc[:4], values.iloc[4:]
    found = evaluation.closest_record(a, b, ["x", "c"], scale=values)
    expected = [
        min(distance_by_definition(r, s, values, ["x", "c"], ["x"]) for _, s in b.iterrows())
        for _, r in a.iterrows()
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(9)
    a, b = cohort(rng, 20), cohort(rng, 30)
    whole = evaluation.closest_record(a, b, COLUMNS)
    points = rng.normal(size=(2, 60, 3))
    scores = evaluation.manifold_scores(*points)
    monkeypatch.setattr(disclosure, "_CHUNK_VALUES", 400)
    monkeypatch.setattr(manifold, "_CHUNK_VALUES", 100)
    np.testing.assert_array_equal(evaluation.closest_record(a, b, COLUMNS), whole)
    np.testing.assert_allclose(evaluation.manifold_scores(*points), scores)


def test_patients_are_summed_up():
    frame = pd.DataFrame(
        {
            "id": ["q", "p", "q", "q", "p"],
            "day": [20, 0, 0, 90, 0],
            "x": [4.0, 7.0, np.nan, 2.0, np.nan],
            "c": ["v", None, "v", "u", None],
            "n": pd.array([1, 0, 0, None, 0], "Int64"),
            "sex": [None, "m", "f", "f", "m"],
        }
    )
    found = evaluation.patient_records(
        frame, "id", "day", ["x", "c", "n"], static=["sex"], categorical=["n"]
    )
    assert list(found.index) == ["q", "p"]
    q, p = found.loc["q"], found.loc["p"]
    assert (q["visits"], q["span"], q["sex"]) == (3, 90, "f")
    assert (q["x_first"], q["x_mean"], q["x_last"]) == (4, 3, 2)
    assert (q["c_first"], q["c_mode"], q["c_last"]) == ("v", "v", "u")
    assert (q["n_first"], q["n_mode"], q["n_last"]) == (0, 0, 1)  # a tie: the lowest
    assert (p["visits"], p["span"], p["sex"], p["x_mean"]) == (2, 0, "m", 7)
    assert p[["c_first", "c_mode", "c_last"]].isna().all()


def privacy(train, held_out, synthetic):
    return evaluation.privacy(
        train, held_out, synthetic, "id", "day", COLUMNS, static=["sex"], categorical=["sex"]
    )


def test_copies_give_their_patients_away():
    rng = np.random.default_rng(10)
    train, held_out = cohort(rng), cohort(rng)
    renamed = train.assign(id=1000 - train["id"]).sample(frac=1, random_state=0)
    for found in privacy(train, held_out, renamed).values():
        assert found.distance == 0
        assert found.ratio == 0
        assert found.copies == 1
        assert found.real_copies == 0
        assert found.membership_auc > 0.999


def test_an_independent_cohort_gives_nobody_away():
    rng = np.random.default_rng(11)
    train, held_out, synthetic = cohort(rng, 200), cohort(rng, 200), cohort(rng, 400)
    for found in privacy(train, held_out, synthetic).values():
        assert found.copies == found.real_copies == 0
        # Standard error 0.039, by simulation.
        assert found.ratio == pytest.approx(1.0, abs=0.15)
        # 200 patients a side: standard error at most 0.029.
        assert found.membership_auc == pytest.approx(0.5, abs=0.116)


def test_partial_copies_are_counted_and_noise_hides_little():
    rng = np.random.default_rng(12)
    train, held_out, fresh = cohort(rng), cohort(rng), cohort(rng)
    half = pd.concat([train, fresh.assign(id=fresh["id"] + 1000)])
    noisy = train.assign(lab=train["lab"] + 1e-3 * rng.normal(size=len(train)))
    for found in privacy(train, held_out, half).values():
        assert found.copies == pytest.approx(0.5)
    for found in privacy(train, held_out, noisy).values():
        assert found.copies == 0
        assert found.ratio < 0.2
        assert found.membership_auc > 0.9


def test_membership_of_records_is_that_of_patients():
    rng = np.random.default_rng(13)
    tables = cohort(rng), cohort(rng), cohort(rng)
    whole = privacy(*tables)
    records = [
        evaluation.patient_records(t, "id", "day", COLUMNS, static=["sex"], categorical=["sex"])
        for t in tables
    ]
    auc = evaluation.membership_auc(*records, list(records[0]), categorical=["sex"])
    assert auc == pytest.approx(whole["patients"].membership_auc)
    scale = pd.concat(records[:2])
    near = evaluation.closest_record(
        records[2], records[0], list(scale), categorical=["sex"], scale=scale
    )
    assert np.median(near) == pytest.approx(whole["patients"].distance)


# Errors.


def test_bad_tables_are_refused():
    frame = cohort(np.random.default_rng(14), 4)
    with pytest.raises(ValueError, match="synthetic has no column 'lab': its columns are id"):
        evaluation.ks(frame, frame.drop(columns="lab"), ["lab"])
    with pytest.raises(ValueError, match="must be a list of names, got 'lab'"):
        evaluation.ks(frame, frame, "lab")
    with pytest.raises(ValueError, match="at least one column and none twice"):
        evaluation.rank_correlation(frame, [])
    with pytest.raises(ValueError, match="column 'lab' of synthetic has no observed value"):
        evaluation.ks(frame, frame.assign(lab=np.nan), ["lab"])
    with pytest.raises(ValueError, match="'stage' must hold numbers, but has text such as 'a'"):
        evaluation.wasserstein(frame, frame, ["stage"])
    with pytest.raises(ValueError, match="'lab' must be finite"):
        evaluation.ks(frame, frame.assign(lab=np.inf), ["lab"])
    with pytest.raises(ValueError, match="real has no rows"):
        evaluation.total_variation(frame[:0], frame, ["sex"])
    with pytest.raises(ValueError, match=r"no pair of .* has a correlation"):
        evaluation.correlation_difference(frame[:2], frame, ["lab", "sex"])
    dated = frame.assign(day=pd.Timestamp("2020-01-01"))
    with pytest.raises(ValueError, match="'day' holds dates"):
        evaluation.lag_one(dated, ["lab"], "id", "day")


def test_bad_patients_are_refused():
    frame = cohort(np.random.default_rng(15), 4)
    single = frame.drop_duplicates("id")
    with pytest.raises(ValueError, match="no patient of synthetic has two visits"):
        evaluation.visits(frame, single, "id", "day")
    with pytest.raises(ValueError, match="real has 4 patients, expected at least 5"):
        evaluation.two_sample_auc(frame, frame, ["lab"], "id")
    with pytest.raises(ValueError, match="held_out has 1 patients"):
        privacy(frame, frame[:5], frame)
    nameless = frame.assign(id=frame["id"].where(frame.index != 6))
    with pytest.raises(ValueError, match="names the patient, but is missing in row 6"):
        evaluation.lag_one(nameless, ["lab"], "id", "day")
    timeless = frame.assign(day=frame["day"].where(frame.index != 6))
    with pytest.raises(ValueError, match="must hold the time of each visit"):
        evaluation.lag_one(timeless, ["lab"], "id", "day")


def test_bad_options_are_refused():
    frame = cohort(np.random.default_rng(16), 6)
    with pytest.raises(ValueError, match="must be one of boosting, forest, logistic, got 'svm'"):
        evaluation.two_sample_auc(frame, frame, ["lab"], "id", classifier="svm")
    with pytest.raises(ValueError, match="folds must be at least 2"):
        evaluation.two_sample_auc(frame, frame, ["lab"], "id", folds=1)
    with pytest.raises(ValueError, match="must not be among the features"):
        evaluation.train_synthetic_test_real(frame, frame, frame, "sex", ["sex"])
    with pytest.raises(ValueError, match=r"positive must be a value of 'sex', got 3"):
        evaluation.train_synthetic_test_real(frame, frame, frame, "sex", ["lab"], positive=3)
    with pytest.raises(ValueError, match="'sex' has 1 different observed values in test_real"):
        evaluation.train_synthetic_test_real(frame, frame, frame.assign(sex=1), "sex", ["lab"])
    with pytest.raises(ValueError, match="both name"):
        evaluation.privacy(frame, frame, frame, "id", "day", ["lab"], static=["lab"])
