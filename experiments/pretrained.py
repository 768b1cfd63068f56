"""Models from elsewhere, as configurations and parameters: what is drawn from or trained further.

A directory is one of

    a run of ours             checkpoints/ and config.json
    an export of ours         model.safetensors and model.json, by `experiments.export`
    diffusers' UNet2DModel    config.json, diffusion_pytorch_model.safetensors,
                              scheduler_config.json; alone, or a pipeline's

Nothing in it is ever unpickled or executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import build, runs, trained
from experiments.config import default
from jaxdiff import interop
from jaxdiff.base import PyTree
from jaxdiff.training import sharding

# diffusers' names of schedules, and ours.
SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "sigmoid": "sigmoid",
    "squaredcos_cap_v2": "cosine",
}
EXPORT = "model.safetensors"
VLB_WEIGHT = 0.001  # that of Nichol & Dhariwal, for models with a learned variance


class Model(NamedTuple):
    """A model that is ready to use.

    Attributes:
      config: its configuration, of which `data`, `train` and so on may be defaults.
      params: its parameters, on the host.
      shape: that of one example, `(*spatial, C)`.
      step: how many updates it was trained for, as far as known.
    """

    config: ConfigDict
    params: PyTree
    shape: tuple[int, ...]
    step: int | None


def load(directory: Path) -> Model:
    """Returns the model in a directory.

    Raises:
      RunError: there is no such directory, or a run of ours in it cannot be used.
      CheckpointError: its checkpoint cannot be read.
      FileNotFoundError: a file that is needed is not there.
      ValueError: a file is damaged, or holds what our configurations have no words for.
    """
    if not directory.is_dir():
        raise runs.RunError(f"{directory} is no directory: name that of a model")
    if (directory / EXPORT).exists():
        return _export(directory)
    if (directory / "checkpoints").is_dir():
        config, params, shape, step = trained.load(directory, None, ema=True)
        return Model(config, sharding.to_host(params), shape, step)
    return _diffusers(directory)


def _export(directory: Path) -> Model:
    path = directory / EXPORT
    about = interop.load_metadata(path)
    try:
        config, shape = runs.read_config(about["config"]), tuple(about["example_shape"])
        step = int(about["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.with_suffix('.json')} is damaged, or of another version of jaxdiff: {error}"
        ) from error
    like = jax.eval_shape(build.make_training(config, shape)[0]).params
    return Model(config, jax.tree.map(np.asarray, interop.load_params(path, like)), shape, step)


def _diffusers(directory: Path) -> Model:
    found = interop.load_diffusers(directory)
    if found.image_shape is None:
        raise ValueError(
            f"{directory}: config.json does not say sample_size, the size of images: add it"
        )
    config = default()
    config.name = directory.name
    config.model.update(
        {name: getattr(found.model, name) for name in config.model if name != "dtype"}
    )
    classes = found.model.num_classes
    if classes:
        config.labels.update({"num_classes": classes, "null": False, "dropout": 0.0})
    names = {row: name for name, row in build.PARAMETERIZATIONS.items() if name != "edm"}
    config.parameterization = names[found.parameterization]
    config.vlb_weight = VLB_WEIGHT if found.learned_variance else None
    _tell_schedule(config, found)
    _tell_drawing(config, found.drawing)
    made = build.make_model(config, found.image_shape[-1])
    if made != found.model:
        raise ValueError(f"{directory}: no configuration makes its network, {found.model}")
    return Model(config, found.params, found.image_shape, None)


def _tell_schedule(config: ConfigDict, found: interop.Pretrained) -> None:
    """Writes the schedule into the configuration.

    Raises:
      ValueError: no name stands for it.
    """
    told = found.source.scheduler
    name = SCHEDULES[told.get("beta_schedule", "linear")]
    config.schedule.name, config.schedule.num_steps = name, found.schedule.num_steps
    config.schedule.zero_terminal_snr = told.get("rescale_betas_zero_snr", False)
    if name != "cosine":
        config.schedule.beta_start = told.get("beta_start", 1e-4)
        config.schedule.beta_end = told.get("beta_end", 0.02)
    made = None
    if told.get("trained_betas") is None:
        made = build.make_schedule(config)
    if made is None or not np.array_equal(made.alphas_bar, found.schedule.alphas_bar):
        raise ValueError(
            "the schedule of scheduler_config.json has no name here, such as trained_betas have "
            "none: use jaxdiff.interop.load_diffusers in a script of your own"
        )


def _tell_drawing(config: ConfigDict, drawing: interop.Drawing) -> None:
    """Writes into the configuration how to draw: its makers' spacing and method, our solvers.

    Raises:
      ValueError: the range that samples are clipped to is none of ours.
    """
    if drawing.clip not in (None, 1.0):
        raise ValueError(
            f"clip_sample_range must be 1, which images are scaled to, got {drawing.clip}: draw by "
            "jaxdiff.interop in a script of your own"
        )
    config.sample.threshold = "none" if drawing.clip is None else "static"
    config.sample.grid, config.sample.solver = drawing.spacing, drawing.method
    config.sample.steps = drawing.num_steps
    if drawing.method == "ddpm":
        config.sample.solver_options.variance = drawing.variance


def start_from(config: ConfigDict, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Returns the parameters that `config.init_from` names, and whose they are, for `run.json`.

    Args:
      config: the run's configuration.
      like: its parameters' shapes and types.

    Raises:
      ValueError: they are of another network; the message has what to set.
      RunError: as `load`; and so are others.
    """
    found = load(Path(config.init_from))
    if _shapes(found.params) != _shapes(like):
        flags = [
            _flag(f"{section}.{key}", new)
            for section in ("model", "labels")
            for key, _, new in runs.differences(
                runs.as_json(config)[section], runs.as_json(found.config)[section]
            )
        ]
        if (config.vlb_weight is None) != (found.config.vlb_weight is None):
            flags.append(_flag("vlb_weight", found.config.vlb_weight))
        raise ValueError(
            f"init_from={config.init_from} holds another network, for examples of shape "
            f"{found.shape}. To have the same one: {' '.join(flags) or 'data of these channels'}"
        )
    there, here = (
        {key: runs.as_json(of)[key] for key in ("schedule", "parameterization")}
        for of in (found.config, config)
    )
    for key, old, new in runs.differences(there, here):
        print(f"note: {key} is {new} here and was {old} in {config.init_from}", flush=True)
    return found.params, {"path": config.init_from, "sha256": runs.fingerprint(found.params)}


def _flag(key: str, value: Any) -> str:
    """Returns the flag that sets a key, as a shell takes it."""
    if isinstance(value, list):
        items = ",".join(map(str, value))
        return f'"--config.{key}=({items}{"," if len(value) == 1 else ""})"'
    return f"--config.{key}={value}"


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
