"""Guidance: functions from denoiser to denoiser, which compose.

All of them work on the clean data that a denoiser believes in. Noise, score and velocity follow
from it and x, so whatever is changed here, the solver stays consistent with it. Where two beliefs
are combined in an affine way it is the same in each of these spaces; clipping is not affine, and so
comes last, around all else. `Prediction.evaluations` counts what the whole composition asked of the
denoisers inside.

Example:
  >>> import jax.numpy as jnp
  >>> from jaxdiff import denoisers, guidance, schedules
  >>> cat, animal = denoisers.gaussian([0.8], 0.1), denoisers.gaussian([0.0], 0.5)
  >>> guided = guidance.classifier_free(cat.denoiser, animal.denoiser, scale=2.0)
  >>> denoiser = guidance.clip_x0(guidance.interval(guided, cat.denoiser, 0.2, 5.0))
  >>> node = schedules.linear().at(500)
  >>> prediction = denoiser(jnp.zeros((1, 1)), node)
  >>> print(prediction.x0, prediction.evaluations)
  [[1.]] 2
"""

from jaxdiff.guidance import rules
from jaxdiff.guidance.classifier_free import (
    Rule,
    adaptive_projected,
    autoguidance,
    cfg_plus_plus,
    classifier_free,
    classifier_free_stacked,
    combine,
    combine_stacked,
    interval,
    stack_cond,
)
from jaxdiff.guidance.gradients import classifier, energy
from jaxdiff.guidance.thresholding import clip_x0, dynamic_threshold

__all__ = [
    "Rule",
    "adaptive_projected",
    "autoguidance",
    "cfg_plus_plus",
    "classifier",
    "classifier_free",
    "classifier_free_stacked",
    "clip_x0",
    "combine",
    "combine_stacked",
    "dynamic_threshold",
    "energy",
    "interval",
    "rules",
    "stack_cond",
]
