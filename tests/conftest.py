"""Settings of all tests: strict JAX, eight virtual devices, a fixed hypothesis profile."""

import atexit
import gc
import os
import shutil
import tempfile

import jax
import pytest
from hypothesis import settings

from tests import quick_to_compile

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# All workers, and the commands that tests run, share one cache of compiled programs and one folder
# of data sets, of the process that starts them: what is the same is made once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _shared = tempfile.mkdtemp(prefix="jaxdiff-tests-")
    atexit.register(shutil.rmtree, _shared, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_shared, "cache")
    os.environ["TFDS_DATA_DIR"] = os.path.join(_shared, "tfds")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

gc.set_threshold(100_000, 20, 20)  # as in experiments.runtime.start; it took a tenth of the time

settings.register_profile("jaxdiff", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("jaxdiff")


def pytest_configure(config):
    """Sets what this process and those that it starts read when they first compile or fit."""
    # Each worker has its core: scikit-learn's threads would spin while they wait for another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The files in the order of testpaths. Those with the fewest tests would be last otherwise, and
    # they are the longest: one worker would wait for the other.
    if "not slow" in config.option.markexpr:
        config.option.loadscopereorder = False
    # Slow tests run long: not for them, unless they say so.
    if "not slow" in config.option.markexpr:
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags += [flag for flag in quick_to_compile.FLAGS if flag not in flags]
        os.environ["XLA_FLAGS"] = " ".join(flags)


@pytest.fixture(scope="module", autouse=True)
def _keys_are_used_once(request):
    """Checks keys in the library's tests; some of experiments would take nearly twice as long."""
    jax.config.update("jax_debug_key_reuse", "experiments" not in request.path.parts)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """A file's are of no use to the next. They came to 4 GB, in which garbage is looked for."""
    yield
    jax.clear_caches()
