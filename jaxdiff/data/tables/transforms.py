"""Invertible transforms of one column of numbers to [-1, 1].

    y = 2 (g(x) - g_min) / (g_max - g_min) - 1                                              (1)

g is scikit-learn's Box-Cox, Yeo-Johnson (Yeo & Johnson 2000) or quantile transformer q, to [0, 1],
or the identity; or it turns quantiles of n numbers into those of a normal distribution, the easiest
for a diffusion model to meet:

    g(x) = Phi^-1(1/(2n) + (1 - 1/n) q(x))                                                 (2)

where the ends are those of n normal numbers, and not, as scikit-learn's, the same far ones for any
n. Only numbers are stored, as JSON: scikit-learn's objects are rebuilt from them. Numbers outside
the range that was fitted are clipped to it, both ways.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdiff.data._libraries import require

METHODS = ("quantile", "normal_quantile", "yeo_johnson", "box_cox", "none")
"""The transforms before min-max scaling."""

MAX_QUANTILES = 1000


@dataclass(frozen=True)
class Transform:
    """A fitted transform of one column.

    Attributes:
      method: one of `METHODS`, or `"constant"` for a column with one value.
      low: the smallest number fitted.
      high: the largest.
      low_g: g(low), which becomes -1.
      high_g: g(high), which becomes 1.
      lambda_: the power, of the power transforms.
      tail: 1/(2n) of eq. (2), of normal quantiles.
      quantiles: the numbers at `references`, of the quantile transforms.
      references: the levels of the quantiles.
    """

    method: str
    low: float
    high: float
    low_g: float = 0.0
    high_g: float = 0.0
    lambda_: float | None = None
    tail: float | None = None
    quantiles: tuple[float, ...] = ()
    references: tuple[float, ...] = ()

    def forward(self, values: np.ndarray) -> np.ndarray:
        """Returns numbers `(n,)` in [-1, 1]; 0 of a constant."""
        if self.method == "constant":
            return np.zeros(len(values))
        scaled = (self._g(np.clip(values, self.low, self.high)) - self.low_g) / self._range()
        return np.clip(2 * scaled - 1, -1, 1)

    def inverse(self, encoded: np.ndarray) -> np.ndarray:
        """Returns the numbers `(n,)` that `forward` maps to these; they are clipped to [-1, 1]."""
        if self.method == "constant":
            return np.full(len(encoded), self.low)
        scaled = (np.clip(np.asarray(encoded, np.float64), -1, 1) + 1) / 2
        values = self._g(self.low_g + scaled * self._range(), inverse=True)
        return np.clip(values, self.low, self.high)

    def to_json(self) -> dict[str, Any]:
        """Returns the transform as what `json.dumps` takes."""
        fields = dataclasses.asdict(self)
        return {**fields, "quantiles": list(self.quantiles), "references": list(self.references)}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Transform:
        """Returns the transform that `to_json` wrote."""
        lists = {name: tuple(fields[name]) for name in ("quantiles", "references")}
        return Transform(**{**fields, **lists})

    def _range(self) -> float:
        return self.high_g - self.low_g

    def _g(self, values: np.ndarray, inverse: bool = False) -> np.ndarray:
        """Applies g, or its inverse, to numbers `(n,)`."""
        values = np.asarray(values, np.float64)
        if self.method == "none" or not len(values):
            return values
        transformer = self._transformer()
        apply = transformer.inverse_transform if inverse else transformer.transform
        if self.method != "normal_quantile":
            return apply(values[:, None])[:, 0]
        special, inside = require("scipy.special"), 1 - 2 * self.tail
        if inverse:
            values = np.clip((special.ndtr(values) - self.tail) / inside, 0, 1)
            return apply(values[:, None])[:, 0]
        return special.ndtri(self.tail + inside * apply(values[:, None])[:, 0])

    def _transformer(self) -> Any:
        """Returns scikit-learn's transformer, with what was fitted."""
        preprocessing = require("sklearn.preprocessing")
        if self.method.endswith("quantile"):
            transformer = preprocessing.QuantileTransformer(
                n_quantiles=len(self.quantiles), subsample=None
            )
            transformer.n_quantiles_ = len(self.quantiles)
            transformer.quantiles_ = np.array(self.quantiles)[:, None]
            transformer.references_ = np.array(self.references)
        else:
            transformer = preprocessing.PowerTransformer(
                self.method.replace("_", "-"), standardize=False
            )
            transformer.lambdas_ = np.array([self.lambda_])
        transformer.n_features_in_ = 1
        return transformer


def fit_transform(values: np.ndarray, method: str, *, positive: bool) -> Transform:
    """Fits a transform to numbers.

    A power transform that float64 cannot invert (a huge power, fitted to few or nearly constant
    numbers, maps them all to one) gives way to `"none"`: plain min-max scaling.

    Args:
      values: `(n,)`, finite, n > 0.
      method: one of `METHODS`; Box-Cox is for positive numbers, others then get Yeo-Johnson.
      positive: whether all numbers, those to come too, are above 0.

    Returns:
      The transform.

    Raises:
      ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"transform must be one of {METHODS}, got {method!r}")
    values = np.asarray(values, np.float64)
    low, high = float(values.min()), float(values.max())
    if low == high:
        return Transform("constant", low, high)
    plain = Transform("none", low, high, low, high)
    if method == "none":
        return plain
    preprocessing = require("sklearn.preprocessing")
    if method.endswith("quantile"):
        fitted = preprocessing.QuantileTransformer(
            n_quantiles=min(MAX_QUANTILES, len(values)), subsample=None
        ).fit(values[:, None])
        found = Transform(
            method, low, high, 0.0, 1.0,
            quantiles=tuple(fitted.quantiles_[:, 0].tolist()),
            references=tuple(fitted.references_.tolist()),
        )  # fmt: skip
        if method == "quantile":
            return found
        tail = 0.5 / len(values)
        high_g = float(require("scipy.special").ndtri(1 - tail))
        return dataclasses.replace(found, tail=tail, low_g=-high_g, high_g=high_g)
    if method == "box_cox" and not positive:
        method = "yeo_johnson"
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # that a power is huge: `_inverts` sees it
        power = preprocessing.PowerTransformer(method.replace("_", "-"), standardize=False)
        try:
            lambda_ = float(power.fit(values[:, None]).lambdas_[0])
        except ValueError:  # SciPy found no power
            return plain
        found = Transform(method, low, high, lambda_=lambda_)
        low_g, high_g = found._g(np.array([low, high])).tolist()
        found = dataclasses.replace(found, low_g=low_g, high_g=high_g)
        return found if _inverts(found, values) else plain


def _inverts(transform: Transform, values: np.ndarray) -> bool:
    """Says whether a transform gives numbers back, to 1e-5 of their range, by way of float32."""
    if not np.isfinite(transform._range()) or transform._range() <= 0:
        return False
    back = transform.inverse(transform.forward(values).astype(np.float32))
    grid = transform.inverse(np.linspace(-1, 1, 101))
    close = np.abs(back - values) <= 1e-5 * (transform.high - transform.low)
    return bool(np.all(close) and np.all(np.isfinite(grid)))
