"""The least effort of XLA.

The programs of most tests are small, run a few times and took most of their time to compile, which
takes about a fifth of it so.
"""

import jax

LITTLE = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# For what runs longer than it compiles: compiler options that undo it.
FULL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
if jax.__version_info__[:2] != (0, 10):
    LITTLE = FULL = {}  # only where they are known: another flag ends the process
FLAGS = tuple(f"--{name}={str(value).lower()}" for name, value in LITTLE.items())
