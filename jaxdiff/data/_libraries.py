"""The data libraries: imported when they are needed, and kept quiet."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from types import ModuleType


def require(module: str) -> ModuleType:
    """Imports a module of the data libraries.

    Raises:
      ImportError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # installed, but something that it needs is not
        raise ImportError(
            f'jaxdiff.data needs {package} here: pip install "jaxdiff[data]"', name=package
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS from talking: what it prints, its progress bars, its log below errors.

    Errors show: those that are raised pass through, and those that are logged go where they would.
    """
    root, absl = logging.getLogger(), logging.getLogger("absl")
    level, handler = absl.level, None
    if not root.handlers:
        # Else the first thing logged would make absl install a handler for good, which writes to
        # what stderr is just then: nowhere.
        handler = logging.StreamHandler()
        root.addHandler(handler)
    absl.setLevel(logging.ERROR)
    silence = io.StringIO()
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            yield
    finally:
        absl.setLevel(level)
        if handler is not None:
            root.removeHandler(handler)
