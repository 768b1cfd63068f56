"""Other libraries' checkpoints, read into our networks and written back.

Nothing here needs PyTorch or diffusers, and nothing ever unpickles: see `tensors` for the files,
`diffusers` and `openai` for what they mean, `pretrained` for what comes out and how to draw from
it.
"""

from jaxdiff.interop.diffusers import load_diffusers, save_diffusers
from jaxdiff.interop.pretrained import Drawing, Pretrained, Source, ddim, grid
from jaxdiff.interop.tensors import read_tensors, write_tensors

__all__ = [
    "Drawing",
    "Pretrained",
    "Source",
    "ddim",
    "grid",
    "load_diffusers",
    "read_tensors",
    "save_diffusers",
    "write_tensors",
]
