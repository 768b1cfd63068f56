"""How good samples are.

Of any features: the Fréchet distance, which of Inception's is the FID (`frechet`), kernel distance,
of Inception's the KID (`kernel`), precision, recall, density and coverage (`manifold`), sliced
Wasserstein distance (`sliced`), and standard errors of them all (`uncertainty`). Of a classifier's
probabilities: the Inception Score (`inception_score`). The features are those of the network of
published FIDs (`inception`) or of a classifier of the data's own labels (`classifier`); these two
need Flax and are imported by name.

Of longitudinal tables, one row a visit: whether each column looks real (`fidelity`), whether
columns hang together, with each other and over time (`dependence`), what a classifier sees and what
can be learned (`utility`), and whether real patients are given away (`disclosure`).

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
from jaxdiff.evaluation.frechet import (
    Gaussian,
    Moments,
    frechet_distance,
    frechet_jackknife,
    from_arrays,
    grouped_moments,
    merge,
    merge_over,
    moments,
    to_arrays,
    to_host,
)
from jaxdiff.evaluation.inception_score import InceptionScore, inception_score
from jaxdiff.evaluation.kernel import KernelDistance, kernel_distance
from jaxdiff.evaluation.manifold import Manifold, manifold_scores
from jaxdiff.evaluation.sliced import SlicedWasserstein, sliced_wasserstein
from jaxdiff.evaluation.uncertainty import Estimate, half_samples, jackknife
from jaxdiff.evaluation.utility import Utility, train_synthetic_test_real, two_sample_auc

__all__ = [
    "Estimate",
    "Gaussian",
    "InceptionScore",
    "KernelDistance",
    "Manifold",
    "Moments",
    "SlicedWasserstein",
    "Utility",
    "closest_record",
    "correlation_difference",
    "frechet_distance",
    "frechet_jackknife",
    "from_arrays",
    "grouped_moments",
    "half_samples",
    "inception_score",
    "jackknife",
    "kernel_distance",
    "ks",
    "lag_one",
    "lag_one_matrix",
    "manifold_scores",
    "membership_auc",
    "merge",
    "merge_over",
    "missing_rates",
    "moments",
    "out_of_range",
    "patient_records",
    "privacy",
    "rank_correlation",
    "sliced_wasserstein",
    "to_arrays",
    "to_host",
    "total_variation",
    "train_synthetic_test_real",
    "two_sample_auc",
    "visits",
    "wasserstein",
]
