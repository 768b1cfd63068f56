"""Models of tables that may lack values: the same three for every task, with their preprocessing.

They take the float64 matrices of `_tables.read_matrix`: numbers and codes of categories, NaN where
missing.

    logistic    numbers: median for the missing and an indicator, standardised; categories: one-hot,
                missing being one of them; logistic regression, or ridge regression for numbers
    forest      300 trees, at least 5 rows a leaf, on numbers and codes as they are
    boosting    gradient-boosted trees on histograms; they know which columns are categories
"""

from __future__ import annotations

from typing import Any

import numpy as np

MODELS = ("boosting", "forest", "logistic")
_MAX_CATEGORIES = 255  # what histograms hold; the codes of a longer column are taken for numbers


def check_model(name: str, model: str) -> None:
    """Checks the name of a model.

    Raises:
      ValueError: there is no such model.
    """
    if model not in MODELS:
        raise ValueError(f"{name} must be one of {', '.join(MODELS)}, got {model!r}")


def make(model: str, is_category: np.ndarray, counts: np.ndarray, seed: int, real: bool) -> Any:
    """Makes an unfitted model of scikit-learn.

    Args:
      model: its name, one of `MODELS`.
      is_category: which columns of the matrix are categories, bool `(K,)`.
      counts: how many categories each column has, int `(K,)`.
      seed: of the model.
      real: whether the target is a number, not a class.

    Returns:
      The model, for `fit`.
    """
    from sklearn import ensemble

    if model == "forest":
        kind = ensemble.RandomForestRegressor if real else ensemble.RandomForestClassifier
        return kind(n_estimators=300, min_samples_leaf=5, random_state=seed)
    if model == "boosting":
        kind = (
            ensemble.HistGradientBoostingRegressor
            if real
            else ensemble.HistGradientBoostingClassifier
        )
        # Early stopping would set rows aside, not patients.
        return kind(
            categorical_features=is_category & (counts <= _MAX_CATEGORIES),
            early_stopping=False,
            random_state=seed,
        )
    return _linear(is_category, real)


def _linear(is_category: np.ndarray, real: bool) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    filled = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(filled, StandardScaler()), np.flatnonzero(~is_category)),
            ("categories", OneHotEncoder(handle_unknown="ignore"), np.flatnonzero(is_category)),
        ],
        sparse_threshold=0,
    )
    return make_pipeline(columns, Ridge() if real else LogisticRegression(max_iter=2000))


def fit(model: Any, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """Fits a model on x `(N, K)` and y `(N,)`, with weights `(N,)` of the rows; returns it."""
    # Histograms cannot be made of a column without values: it becomes a constant.
    x = np.where(np.isnan(x).all(0), 0.0, x)
    if weights is None:
        return model.fit(x, y)
    if hasattr(model, "steps"):
        return model.fit(x, y, **{f"{model.steps[-1][0]}__sample_weight": weights})
    return model.fit(x, y, sample_weight=weights)
