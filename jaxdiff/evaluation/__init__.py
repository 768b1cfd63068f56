"""How good samples are.

Of any features: precision, recall, density and coverage (`manifold`). Of longitudinal tables, one
row a visit: whether each column looks real (`fidelity`), whether columns hang together, with each
other and over time (`dependence`), what a classifier sees and what can be learned (`utility`), and
whether real patients are given away (`disclosure`).

The tables are pandas DataFrames in long format. A value that is NaN, NA or None is missing. A
column is read as numbers if every value in all of the compared tables is one, and as categories
if it holds text or is named in `categorical`. pandas, SciPy and scikit-learn are imported when a
function needs them, not before.
"""

from jaxdiff.evaluation.dependence import (
    correlation_difference,
    lag_one,
    lag_one_matrix,
    rank_correlation,
    visits,
)
from jaxdiff.evaluation.disclosure import (
    closest_record,
    membership_auc,
    patient_records,
    privacy,
)
from jaxdiff.evaluation.fidelity import (
    ks,
    missing_rates,
    out_of_range,
    total_variation,
    wasserstein,
)
from jaxdiff.evaluation.manifold import Manifold, manifold_scores
from jaxdiff.evaluation.utility import Utility, train_synthetic_test_real, two_sample_auc

__all__ = [
    "Manifold",
    "Utility",
    "closest_record",
    "correlation_difference",
    "ks",
    "lag_one",
    "lag_one_matrix",
    "manifold_scores",
    "membership_auc",
    "missing_rates",
    "out_of_range",
    "patient_records",
    "privacy",
    "rank_correlation",
    "total_variation",
    "train_synthetic_test_real",
    "two_sample_auc",
    "visits",
    "wasserstein",
]
