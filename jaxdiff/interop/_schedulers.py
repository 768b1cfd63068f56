"""diffusers' scheduler_config.json as a schedule, a parameterization and a way of drawing.

The schedulers of diffusers share the fields that say what a network was trained with. Drawing is
left to DDPM and DDIM: of the other schedulers the shared fields are read and the rest is not, which
is what diffusers' own DDIMPipeline does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxdiff import predictions, schedules
from jaxdiff.interop._files import check_field
from jaxdiff.interop.pretrained import Drawing
from jaxdiff.predictions import Parameterization
from jaxdiff.schedules import NoiseSchedule

# The fields of DDPM's and DDIM's schedulers and what they are where a config leaves them out.
_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "timestep_values": None,  # before diffusers 0.3
}
# Without effect: they belong to thresholding, to PNDM or to versions long gone.
_IGNORED = {"dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps", "tensor_format"}
_OWN = ("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler")
_ALIKE = (
    *("PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
)
_PREDICTIONS = {
    "epsilon": predictions.eps,
    "sample": predictions.x0,
    "v_prediction": predictions.v,
}
_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned",
}
_SCHEDULES = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "sigmoid": schedules.sigmoid,
    "squaredcos_cap_v2": lambda num_steps, start, end: schedules.cosine(num_steps),
}
_MOST_STEPS = 1_000_000


def read_scheduler(
    where: str, config: Mapping[str, Any], method: str | None
) -> tuple[NoiseSchedule, Parameterization, Drawing]:
    """Reads a scheduler's config.

    Args:
      where: the file, for messages.
      config: what stands in it.
      method: "ddpm" or "ddim" if a pipeline says it; None leaves it to the scheduler.

    Raises:
      ValueError: the scheduler or a field is unknown, or has a value that is not among what can be
        followed; names both.
    """
    kind = config.get("_class_name", "DDPMScheduler")
    check_field(where, "_class_name", kind, kind in _OWN + _ALIKE, " or ".join(_OWN + _ALIKE))
    config = dict(config)
    if "predict_epsilon" in config:  # before diffusers 0.10
        old = config.pop("predict_epsilon")
        config.setdefault("prediction_type", "epsilon" if old else "sample")
    if kind in _OWN:
        for name, value in config.items():
            known = name in _DEFAULTS or name in _IGNORED or name.startswith("_")
            check_field(where, name, value, known, f"left out; known are {', '.join(_DEFAULTS)}")
    else:
        flow = config.get("use_flow_sigmas", False)
        check_field(where, "use_flow_sigmas", flow, not flow, "False")
        config.pop("variance_type", None)  # of SDE solvers, which are not followed
    fields = {**_DEFAULTS, **config}

    choices = {
        "prediction_type": _PREDICTIONS,
        "variance_type": _VARIANCES,
        "beta_schedule": _SCHEDULES,
        "timestep_spacing": ("leading", "trailing", "linspace"),
        "thresholding": (False,),
        "clip_sample": (False, True),
        "rescale_betas_zero_snr": (False, True),
        "set_alpha_to_one": (False, True),
        "timestep_values": (None,),
    }
    for name, values in choices.items():
        value = fields[name]
        fits = (value is None or isinstance(value, (str, bool))) and value in values
        check_field(where, name, value, fits, " or ".join(map(repr, values)))
    steps, offset, clip = (
        fields[name] for name in ("num_train_timesteps", "steps_offset", "clip_sample_range")
    )
    fits = type(steps) is int and 1 <= steps <= _MOST_STEPS
    check_field(where, "num_train_timesteps", steps, fits, f"an integer from 1 to {_MOST_STEPS}")
    fits = type(offset) is int and 0 <= offset < steps
    check_field(where, "steps_offset", offset, fits, f"an integer from 0 to {steps - 1}")
    check_field(where, "clip_sample_range", clip, _is_number(clip) and clip > 0, "positive")
    for name in ("beta_start", "beta_end"):
        check_field(where, name, fields[name], _is_number(fields[name]), "a number in (0, 1)")

    schedule = _schedule(where, fields)
    parameterization = _PREDICTIONS[fields["prediction_type"]]
    try:
        predictions.check_signal(parameterization, schedule.ends_at_zero_snr)
    except ValueError as error:
        raise ValueError(f"{where}: rescale_betas_zero_snr: {error}") from error
    if method is None:
        method = "ddpm" if kind.startswith("DDPM") else "ddim"
    drawing = Drawing(
        method=method,
        num_steps=min(1000 if method == "ddpm" else 50, steps),
        spacing=fields["timestep_spacing"],
        steps_offset=offset,
        # Ancestral sampling always ends at clean data.
        ends_clean=fields["set_alpha_to_one"] or method == "ddpm",
        clip=float(clip) if fields["clip_sample"] else None,
        variance=_VARIANCES[fields["variance_type"]],
    )
    return schedule, parameterization, drawing


def _schedule(where: str, fields: Mapping[str, Any]) -> NoiseSchedule:
    """Makes the schedule of the fields."""
    steps, betas = fields["num_train_timesteps"], fields["trained_betas"]
    try:
        if betas is None:
            make = _SCHEDULES[fields["beta_schedule"]]
            schedule = make(steps, fields["beta_start"], fields["beta_end"])
        else:
            fits = isinstance(betas, list) and len(betas) == steps and all(map(_is_number, betas))
            expected = f"null or {steps} numbers, as num_train_timesteps is {steps}"
            check_field(where, "trained_betas", betas, fits, expected)
            schedule = schedules.from_betas(betas)
        if fields["rescale_betas_zero_snr"]:
            schedule = schedules.zero_terminal_snr(schedule)
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}") from error
    return schedule


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
