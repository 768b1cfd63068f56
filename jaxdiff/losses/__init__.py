"""Losses, one value per example, their weightings, and the terms of the variational bound."""

from jaxdiff.losses._masks import masked_mean
from jaxdiff.losses.consistency import (
    consistency_denoiser,
    consistency_distillation,
    consistency_training,
    inverse_gap,
    lognormal_steps,
    pseudo_huber,
    squared,
)
from jaxdiff.losses.denoising import denoising_loss
from jaxdiff.losses.distillation import progressive_distillation, two_step_target
from jaxdiff.losses.multiscale import multiscale_mean_square
from jaxdiff.losses.variational import (
    bound_term,
    discretized_log_likelihood,
    first_variance,
    gaussian_kl,
    node_before,
    prior_term,
)
from jaxdiff.losses.weightings import (
    Weighting,
    edm,
    elbo,
    flow_matching,
    min_snr,
    p2,
    sigmoid,
    snr,
    snr_plus_one,
    truncated_snr,
    unit,
)

__all__ = [
    "Weighting",
    "bound_term",
    "consistency_denoiser",
    "consistency_distillation",
    "consistency_training",
    "denoising_loss",
    "discretized_log_likelihood",
    "edm",
    "elbo",
    "first_variance",
    "flow_matching",
    "gaussian_kl",
    "inverse_gap",
    "lognormal_steps",
    "masked_mean",
    "min_snr",
    "multiscale_mean_square",
    "node_before",
    "p2",
    "prior_term",
    "progressive_distillation",
    "pseudo_huber",
    "sigmoid",
    "snr",
    "snr_plus_one",
    "squared",
    "truncated_snr",
    "two_step_target",
    "unit",
]
