"""What depends on the machine, chosen in one place; and how a command starts and fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import jaxlib
from absl import app, flags, logging

from experiments.runs import RunError
from jaxdiff.training.checkpoints import CheckpointError

# What a user can mend; anything else is a defect and keeps its traceback.
MENDABLE = (RunError, CheckpointError, ImportError, OSError, TypeError, ValueError)


def start() -> None:
    """Sets up logging and the cache of compiled programs; call it before anything is compiled.

    The cache is in `JAX_COMPILATION_CACHE_DIR`, or else in `~/.cache/jaxdiff`.
    """
    logging.set_verbosity(logging.ERROR)  # not what JAX, Orbax and TFDS remark on the way
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path.home() / ".cache" / "jaxdiff"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compiler_options() -> dict[str, str] | None:
    """Returns options that make the train step faster on this backend."""
    if jax.default_backend() == "cpu" and jaxlib.__version__.startswith("0.10."):
        # Convolutions by Eigen, which is faster here than YNNPACK.
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    return None


def command(define_flags: Callable[[], None], main: Callable[[], None]) -> None:
    """Runs a command: defines and parses its flags, starts JAX, and fails clearly.

    What the user can mend ends the command with one clear line and exit status 1, or 2 where it is
    a flag.
    """

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}: write options as --name=value", 2)
        start()
        try:
            main()
        except MENDABLE as error:
            if os.environ.get("JAXDIFF_TRACEBACK"):
                raise
            _fail(f"{error}\n(JAXDIFF_TRACEBACK=1 shows where)", 1)

    # ml_collections parses --config.KEY as soon as the flag is defined.
    with _clear_flag_errors():
        define_flags()
    app.run(run, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    with _clear_flag_errors():
        return flags.FLAGS(argv)


@contextlib.contextmanager
def _clear_flag_errors() -> Iterator[None]:
    try:
        yield
    except flags.Error as error:
        _fail(str(error), 2)
    except (AttributeError, KeyError) as error:  # ml_collections' own, of an unknown key
        inner = error.args[0] if isinstance(error.args[0], Exception) else error
        # Without its dump of all keys there are, where none is near.
        text = str(inner.args[0]).partition("Other fields present")[0].strip()
        _fail("the configuration has no key " + text.replace("\n", ". "), 2)


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
