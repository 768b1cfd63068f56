"""Likelihood: nats and bits per dimension, by variational bounds and by the probability flow."""

from jaxdiff.likelihood.continuous import ContinuousTerms, continuous_bound
from jaxdiff.likelihood.dequantization import (
    dequantized_bits,
    importance_weighted,
    logit_normal,
    truncated_normal,
    uniform,
)
from jaxdiff.likelihood.flow import Flow, probability_flow
from jaxdiff.likelihood.variational import Terms, variational_bound

__all__ = [
    "ContinuousTerms",
    "Flow",
    "Terms",
    "continuous_bound",
    "dequantized_bits",
    "importance_weighted",
    "logit_normal",
    "probability_flow",
    "truncated_normal",
    "uniform",
    "variational_bound",
]
