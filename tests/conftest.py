"""Settings of all tests: strict JAX, eight virtual devices, a fixed hypothesis profile."""

import atexit
import shutil
import tempfile

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests that build the same program again need not compile it again.
_cache = tempfile.mkdtemp(prefix="jaxdiff-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

settings.register_profile("jaxdiff", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("jaxdiff")


@pytest.fixture(scope="module", autouse=True)
def _keys_are_used_once(request):
    """Checks keys in the library's tests; some of experiments would take nearly twice as long."""
    jax.config.update("jax_debug_key_reuse", "experiments" not in request.path.parts)
