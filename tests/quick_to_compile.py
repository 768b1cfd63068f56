"""The least effort of XLA.

The programs of most tests are small, run a few times and took most of their time to compile, which
takes about a fifth of it so.
"""

import jax

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
if jax.__version_info__[:2] != (0, 10):
    FLAGS = ()  # only where they are known: another flag ends the process
