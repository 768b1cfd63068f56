"""Directories of diffusers' `UNet2DModel`, alone or in a pipeline, read and written back.

    config.json, diffusion_pytorch_model.safetensors, scheduler_config.json, model_index.json

or the first two in unet/ and the scheduler's in scheduler/. The parameters of `UNet` are those of
`UNet2DModel` one to one, so that what is read and written back is the same, bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.interop import _schedulers, _unet2d
from jaxdiff.interop._files import check_field, read_json, write_json
from jaxdiff.interop._parameters import from_tensors, shapes_of, to_tensors
from jaxdiff.interop.pretrained import Pretrained, Source
from jaxdiff.interop.tensors import read_tensors, write_tensors

_WEIGHTS = "diffusion_pytorch_model"
_METHODS = {"DDPMPipeline": "ddpm", "DDIMPipeline": "ddim", "PNDMPipeline": "ddim"}


def load_diffusers(
    directory: str | os.PathLike, *, scheduler: Mapping[str, Any] | None = None
) -> Pretrained:
    """Reads a directory of a diffusers `UNet2DModel` or of a pipeline with one.

    Args:
      directory: the directory, as it is downloaded or as `save_pretrained` writes it. Of several
        files of weights safetensors are preferred; files of PyTorch are read without unpickling.
      scheduler: the fields of a scheduler_config.json, for a directory without one; `{}` for a
        thousand steps of the linear schedule.

    Returns:
      The checkpoint. Parameters are float32 whatever the file has.

    Raises:
      FileNotFoundError: a file that is needed is not there; says which.
      ValueError: a file is damaged; a field of a config is unknown or has a value that cannot be
        followed; a tensor is missing, is one too many or has another shape. Says which.
    """
    directory = Path(directory)
    index = directory / "model_index.json"
    index = read_json(index) if index.is_file() else None
    folders = ("unet", "scheduler")
    if (directory / "config.json").is_file():
        folders = ("", "")
    elif not (directory / "unet" / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} must hold config.json, or unet/config.json of a pipeline: is it a "
            "directory of a diffusers UNet2DModel?"
        )
    method = None
    if index is not None:
        kind, where = index.get("_class_name"), f"{directory / 'model_index.json'}"
        expected = f"{' or '.join(_METHODS)} (or read the folder of its UNet2DModel alone)"
        check_field(where, "_class_name", kind, kind in _METHODS, expected)
        method = _METHODS[kind]

    where = directory / folders[0] / "config.json"
    config = read_json(where)
    model, size, channels = _unet2d.read_config(str(where), config)
    path = directory / folders[1] / "scheduler_config.json"
    if path.is_file():
        scheduler = read_json(path)
    elif scheduler is None:
        raise FileNotFoundError(
            f"{path} is not there: a network alone does not say what it was trained with; pass the "
            'fields of its scheduler, such as scheduler={"beta_schedule": "linear"}'
        )
    schedule, parameterization, drawing = _schedulers.read_scheduler(str(path), scheduler, method)
    learned = drawing.variance == "learned"
    fits, twice = model.out_channels == channels * (1 + learned), "twice " if learned else ""
    expected = f"{channels * (1 + learned)}, {twice}in_channels (variance_type: {drawing.variance})"
    check_field(str(where), "out_channels", model.out_channels, fits, expected)

    path = _weights(directory / folders[0])
    tensors = read_tensors(path)
    slot_of = _unet2d.slots(model, old=_has_old_names(tensors))
    params = from_tensors(str(path), tensors, shapes_of(model, channels), slot_of)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return Pretrained(
        model=model,
        params=params,
        schedule=schedule,
        parameterization=parameterization,
        image_shape=None if size is None else (*size, channels),
        learned_variance=learned,
        drawing=drawing,
        source=Source(config, scheduler, index, folders, dtypes),
    )


def save_diffusers(directory: str | os.PathLike, pretrained: Pretrained) -> None:
    """Writes a checkpoint of diffusers back; what was only read comes out bit for bit.

    Weights are written as safetensors, under the names and in the dtypes that were read, and the
    configs as they were. What `pretrained` says beside its parameters is not written.

    Args:
      directory: where to; made if it is not there. Files that are there are replaced.
      pretrained: what `load_diffusers` returned, perhaps with other parameters.

    Raises:
      ValueError: it does not come from diffusers, its model was changed, or the parameters are not
        those of the model; says which.
    """
    source = pretrained.source
    if source is None:
        raise ValueError(
            "pretrained must come from load_diffusers: other checkpoints have no config of "
            "diffusers; write their parameters with save_params"
        )
    model, _, channels = _unet2d.read_config("pretrained.source.config", source.config)
    for field in dataclasses.fields(model):
        if field.name in ("dropout", "dtype", "remat", "parent", "name"):
            continue
        got, expected = (getattr(m, field.name) for m in (pretrained.model, model))
        if got != expected:
            raise ValueError(
                f"pretrained.model must be that of its config: {field.name} must be {expected}, "
                f"got {got}"
            )
    slot_of = _unet2d.slots(model, old=_has_old_names(source.dtypes))
    tensors = to_tensors(pretrained.params, shapes_of(model, channels), slot_of)
    tensors = {name: np.asarray(tensors[name], dtype) for name, dtype in source.dtypes.items()}

    directory = Path(directory)
    folders = [directory / folder for folder in source.folders]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folders[0] / f"{_WEIGHTS}.safetensors", tensors, {"format": "pt"})
    write_json(folders[0] / "config.json", source.config)
    write_json(folders[1] / "scheduler_config.json", source.scheduler)
    if source.index is not None:
        write_json(directory / "model_index.json", source.index)


def _weights(folder: Path) -> Path:
    """Returns the file of a folder's weights, or the index of several."""
    endings = ("safetensors", "safetensors.index.json", "fp16.safetensors", "bin", "bin.index.json")
    for ending in endings:
        path = folder / f"{_WEIGHTS}.{ending}"
        if path.is_file():
            return path
    names = ", ".join(f"{_WEIGHTS}.{ending}" for ending in endings)
    raise FileNotFoundError(f"{folder} must hold one of {names}: get the weights, too")


def _has_old_names(names: Mapping[str, Any]) -> bool:
    """Whether the parts of attention have the names they had before diffusers 0.15."""
    return any(name.endswith(".proj_attn.weight") for name in names)
