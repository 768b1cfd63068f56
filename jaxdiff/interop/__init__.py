"""Other libraries' checkpoints, read into our networks and written back.

Nothing here needs PyTorch or diffusers, and nothing ever unpickles: see `tensors` for the files,
`diffusers` and `openai` for what they mean, `pretrained` for what comes out and how to draw from
it, and `exports` for our own parameters in files that other libraries read.
"""

from jaxdiff.interop.diffusers import load_diffusers, save_diffusers
from jaxdiff.interop.exports import load_metadata, load_params, save_params
from jaxdiff.interop.openai import load_openai
from jaxdiff.interop.pretrained import Drawing, Pretrained, Source, ddim, grid
from jaxdiff.interop.tensors import read_tensors, write_tensors

__all__ = [
    "Drawing",
    "Pretrained",
    "Source",
    "ddim",
    "grid",
    "load_diffusers",
    "load_metadata",
    "load_openai",
    "load_params",
    "read_tensors",
    "save_diffusers",
    "save_params",
    "write_tensors",
]
