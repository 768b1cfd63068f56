"""Settings of all tests: strict JAX, eight virtual devices, a fixed hypothesis profile."""

import jax
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

settings.register_profile("jaxdiff", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("jaxdiff")
