import subprocess
import sys

import pytest

from jaxdiff.data import _libraries

HEAVY = ("flax", "orbax", "tensorflow_datasets", "grain", "sklearn", "PIL", "tensorflow")


def test_importing_the_package_imports_no_data_library():
    code = f"import sys, jaxdiff.data; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r'grain here: pip install "jaxdiff\[data\]"'):
        _libraries.require("grain")


def test_a_library_that_is_broken_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        _libraries.require("broken_library")


def test_quiet_hides_talk_but_not_errors():
    code = """
import logging, sys
from absl import logging as absl_logging
from jaxdiff.data._libraries import quiet
try:
    with quiet():
        print("talk")
        print("progress", file=sys.stderr)
        absl_logging.info("hint")
        absl_logging.warning("advice")
        absl_logging.error("logged error")
        raise RuntimeError("raised error")
except RuntimeError as error:
    print(error)
assert not logging.getLogger().handlers
absl_logging.warning("warning afterwards")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "raised error\n"
    logged = [line.rpartition(":")[2] for line in done.stderr.splitlines()]
    assert logged == ["logged error", "warning afterwards"]
