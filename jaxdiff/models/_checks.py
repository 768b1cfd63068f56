"""Checks of fields and arguments of networks, made while tracing."""

from __future__ import annotations

from typing import Any

import jax


def check(fits: bool, name: str, expected: str, got: Any, cure: str) -> None:
    """Raises a ValueError that says what was expected, what came and what to do."""
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {got}: {cure}")


def describe(x: jax.Array) -> str:
    """Returns the dtype and shape of an array in words."""
    return f"{x.dtype} of shape {x.shape}"
