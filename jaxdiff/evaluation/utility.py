"""What models make of a synthetic table: whether they see through it, and what they learn of it.

Two-sample test (Lopez-Paz & Oquab 2017): a classifier is trained to tell real visits from synthetic
ones and judged on patients it has not seen. With s its score of a visit, x a synthetic visit and x'
a real one, its area under the ROC curve

    AUC = P(s(x) > s(x')) + ½ P(s(x) = s(x'))                                              (1)

is ½ if it cannot tell them apart, and 1 if it always can.

Train on synthetic, test on real (Esteban et al. 2017): the same model is trained once
on real and once on synthetic patients, and both are judged on other real patients. With A the
score of a model, A0 that of a guess, the synthetic table is worth

    A_synthetic / A_real    and    (A_synthetic - A0) / (A_real - A0);                      (2)

the second does not credit what a guess reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxdiff.evaluation import _models, _tables

if TYPE_CHECKING:
    import pandas as pd


class Utility(NamedTuple):
    """What a model learns from real and from synthetic patients, eq. (2).

    Attributes:
      metric: the score, `"auc"` (classes; one against the rest, mean over them) or `"r2"`.
      real: the score of the model that was trained on real patients.
      synthetic: the score of the model that was trained on synthetic ones.
      ratio: synthetic / real. NaN if real is not above 0.
      ratio_above_chance: the same after a guess's score, 0.5 or 0, is taken off both. NaN if the
        model that was trained on real patients does not beat a guess.
    """

    metric: str
    real: float
    synthetic: float
    ratio: float
    ratio_above_chance: float


def two_sample_auc(
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
    columns: Sequence[str],
    patient: str,
    *,
    categorical: Sequence[str] = (),
    classifier: str = "boosting",
    folds: int = 5,
    seed: int = 0,
) -> float:
    """Computes how well a classifier tells single visits of real patients from synthetic ones.

    Both tables weigh the same in training, whatever their sizes. All visits of a patient are in
    one fold, so that nobody is recognised by what is constant in him.

    Args:
      real: the real table, one row a visit.
      synthetic: the synthetic table.
      columns: the names of the columns that the classifier sees.
      patient: the column that names the patient; the same name in both tables is not the same
        patient.
      categorical: the columns whose numbers are categories; text always is.
      classifier: `"boosting"`, `"forest"` or `"logistic"`, see `jaxdiff.evaluation._models`.
      folds: in how many parts the patients are cut; each is judged by a classifier trained on the
        others.
      seed: of the folds and the classifier.

    Returns:
      The AUC of eq. (1), mean over the folds.

    Raises:
      ValueError: a column is missing, a table has fewer patients than folds, or an option is not
        one of those named.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    _models.check_model("classifier", classifier)
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    tables = {"real": real, "synthetic": synthetic}
    matrices, is_category = _tables.read_matrix(tables, columns, categorical)
    groups = np.concatenate(_tables.patients(tables, patient, folds))
    x = np.concatenate(matrices)
    y = np.repeat([0, 1], [len(real), len(synthetic)])
    counts = _counts(x, is_category)

    def auc(train: np.ndarray, test: np.ndarray) -> float:
        weights = (1 / np.bincount(y[train]))[y[train]]
        model = _models.make(classifier, is_category, counts, seed, real=False)
        _models.fit(model, x[train], y[train], weights * (len(train) / 2))
        return float(roc_auc_score(y[test], model.predict_proba(x[test])[:, 1]))

    # A mean over folds, not one AUC of all the visits: scores of different models do not compare.
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups)
    return float(np.mean([auc(train, test) for train, test in split]))


def train_synthetic_test_real(
    train_real: pd.DataFrame,
    synthetic: pd.DataFrame,
    test_real: pd.DataFrame,
    target: str,
    features: Sequence[str],
    *,
    positive: object = None,
    categorical: Sequence[str] = (),
    model: str = "logistic",
    seed: int = 0,
) -> Utility:
    """Compares what a model learns from synthetic patients with what it learns from real ones.

    The target is a class if `positive` is given, if it is text or named in `categorical`, or if it
    takes two values only; otherwise it is a number. Rows that lack it are left out.

    Args:
      train_real: the real table that the synthetic one stands for, one row a visit or a patient.
      synthetic: the synthetic table.
      test_real: the table of other real patients, on which both models are judged.
      target: the column to predict.
      features: the columns to predict it from.
      positive: the value of the target to tell from all others; None: tell all values apart.
      categorical: the columns whose numbers are categories; text always is.
      model: `"logistic"` (ridge regression for a number), `"forest"` or `"boosting"`, see
        `jaxdiff.evaluation._models`.
      seed: of the model.

    Returns:
      The scores. A synthetic table in which the target is constant teaches a guess.

    Raises:
      ValueError: a column is missing, the target is among the features or never observed, takes
        one value in a real table, or never the positive one.
    """
    _models.check_model("model", model)
    tables = {"train_real": train_real, "synthetic": synthetic, "test_real": test_real}
    if target in features:
        raise ValueError(f"target {target!r} must not be among the features: {list(features)}")
    matrices, is_category = _tables.read_matrix(tables, features, categorical)
    _tables.check_columns(tables, target)
    targets, is_class = _targets(tables, target, positive, target in categorical)
    known = [~np.isnan(y) for y in targets]
    matrices = [x[rows] for x, rows in zip(matrices, known, strict=True)]
    targets = [y[rows] for y, rows in zip(targets, known, strict=True)]
    for name, y in zip(tables, targets, strict=True):
        values = len(np.unique(y))
        if values < (1 if name == "synthetic" else 2):
            raise ValueError(
                f"target {target!r} has {values} different observed values in {name}: expected at "
                "least two to tell apart"
            )
    counts = _counts(np.concatenate(matrices), is_category)

    def score(x: np.ndarray, y: np.ndarray) -> float:
        fitted = None
        if len(np.unique(y)) > 1:
            fitted = _models.fit(_models.make(model, is_category, counts, seed, not is_class), x, y)
        judge = _auc if is_class else _r2
        return judge(fitted, y, matrices[2], targets[2])

    real, fake = (score(matrices[i], targets[i]) for i in (0, 1))
    chance = 0.5 if is_class else 0.0

    def ratio(less: float) -> float:
        return (fake - less) / (real - less) if real > less else float("nan")

    return Utility("auc" if is_class else "r2", real, fake, ratio(0.0), ratio(chance))


def _counts(x: np.ndarray, is_category: np.ndarray) -> np.ndarray:
    """Counts the categories of each column: its highest code and one; 0 for numbers."""
    return np.where(is_category, np.max(np.nan_to_num(x, nan=-1), axis=0, initial=-1) + 1, 0)


def _targets(
    tables: _tables.Tables, target: str, positive: object, categorical: bool
) -> tuple[tuple[np.ndarray, ...], bool]:
    """Reads the target of each table, NaN where missing, and whether it is a class."""
    column = _tables.read(tables, target, categorical or positive is not None)
    if positive is None:
        real = np.concatenate([column.values[0], column.values[2]])
        two = len(np.unique(real[~np.isnan(real)])) == 2
        return column.values, column.categories is not None or two
    if positive not in column.categories:
        raise ValueError(
            f"positive must be a value of {target!r}, got {positive!r}: its values are "
            f"{', '.join(map(repr, column.categories))}"
        )
    code = column.categories.index(positive)
    return tuple(np.where(np.isnan(v), np.nan, v == code) for v in column.values), True


def _auc(fitted: object, seen: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Computes the mean over the classes of y of the AUC of each against the rest."""
    from sklearn.metrics import roc_auc_score

    classes = np.unique(seen)
    scores = np.zeros((len(x), len(classes))) if fitted is None else fitted.predict_proba(x)

    def one(kind: float) -> float:
        column = np.flatnonzero(classes == kind)
        # A class that the model has never met has no score: 0 for all, an AUC of ½.
        score = scores[:, column[0]] if len(column) else np.zeros(len(x))
        return float(roc_auc_score(y == kind, score))

    return float(np.mean([one(kind) for kind in np.unique(y)]))


def _r2(fitted: object, seen: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    from sklearn.metrics import r2_score

    predicted = np.full(len(y), seen[0]) if fitted is None else fitted.predict(x)
    return float(r2_score(y, predicted))
