"""Other libraries' checkpoints, read into our networks and written back."""

from jaxdiff.interop.tensors import read_tensors, write_tensors

__all__ = ["read_tensors", "write_tensors"]
