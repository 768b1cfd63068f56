"""What depends on the machine, chosen in one place; and how a command starts and fails."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import difflib
import gc
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import jaxlib
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments.runs import RunError
from jaxdiff.base import PyTree
from jaxdiff.training import sharding
from jaxdiff.training.checkpoints import CheckpointError

M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD = -4, -1, -2  # of glibc's malloc.h
PREEMPTED = 75
"""The exit status of a run that was told to stop, and has saved: `EX_TEMPFAIL`, try again."""
# What a user can mend; anything else is a defect and keeps its traceback.
MENDABLE = (RunError, CheckpointError, ImportError, OSError, TypeError, ValueError)


def start() -> None:
    """Sets up logging, devices and the cache of compiled programs; before anything is compiled.

    The cache is in `JAX_COMPILATION_CACHE_DIR`, or else in `cache_folder()`.
    """
    if devices := cpu_devices():
        jax.config.update("jax_num_cpu_devices", devices)
    # Tracing makes many objects that stay. To look through them for garbage after every 700 more
    # took a fifth of its time.
    gc.set_threshold(20_000)
    logging.set_verbosity(logging.ERROR)  # not what JAX, Orbax and TFDS remark on the way
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        libc = ctypes.CDLL(None)
        # A step's memory is that of the last one, and not asked of the system page by page again.
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 2**26)  # as large as heaps of threads get: none is ever given back
    # Those take no larger pieces, the main thread's does. So that is the one that runs programs on
    # a CPU, unless it is several devices; it would wait for them before long, anyway.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with contextlib.suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cpu_devices() -> int | None:
    """Returns what --cpu_devices says; None if it is not given: then XLA_FLAGS may say it."""
    given = "cpu_devices" in flags.FLAGS and flags.FLAGS["cpu_devices"].present
    return flags.FLAGS.cpu_devices if given else None


def cache_folder() -> Path:
    """Returns where what can be made again is kept: compiled programs, features of data sets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdiff"


_made_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("made_for", default=None)


@contextlib.contextmanager
def made_for(kind: str) -> Iterator[None]:
    """Has programs made for a platform, cpu, gpu or tpu, other than the one they are made on."""
    token = _made_for.set(kind)
    try:
        yield
    finally:
        _made_for.reset(token)


def platform() -> str:
    """Returns what programs are made for: cpu, gpu or tpu."""
    return _made_for.get() or jax.default_backend()


def scans_steps() -> bool:
    """Returns whether several train steps in one dispatch are to be a `lax.scan`.

    Not on CPU: there is little to be won, and a loop's program has other last bits, while a run is
    to be the same however its steps are handed out.
    """
    return platform() != "cpu"


def maps_devices(mesh: Mesh) -> bool:
    """Returns whether each device is to compute its share of a train step by itself.

    That is `jax.shard_map`, of parameters that are not divided. CPUs are faster so; compilers for
    accelerators find the same program by themselves.
    """
    return platform() == "cpu" and mesh.size > 1 and mesh.shape[sharding.FSDP] == 1


def packs(mesh: Mesh, params: PyTree) -> bool:
    """Returns whether a train state is to be packed (`experiments.packing`)."""
    leaves = jax.tree.leaves(params)
    plain = mesh.shape[sharding.FSDP] == 1 and len({leaf.dtype for leaf in leaves}) == 1
    # On a GPU it is a thousand small kernels less a step. Larger networks take so long that nothing
    # is won; on a CPU a second copy of them is memory, and on several GPUs their gradients are
    # better summed while others are computed.
    most = {"cpu": 2**22, "gpu": 2**27}.get(platform(), 0)
    return plain and len(leaves) > 1 and sum(leaf.size for leaf in leaves) <= most


def parts(shape: Sequence[int], *, training: bool = False) -> int:
    """Returns in how many parts, one after the other, a batch is to be drawn or trained with.

    The activations of 4,096 pixels stay in a CPU's cache, those of many more do not. Training,
    which keeps them all, is best with twice as many, and has less to keep.
    """
    batch, *spatial, _ = shape
    share, rest = divmod(batch, jax.device_count())
    pixels = math.prod(spatial)
    if platform() != "cpu" or len(spatial) != 2 or rest or share * pixels < 2**14:
        return 1
    most = 2 ** (13 if training else 12) // pixels
    size = max((n for n in range(1, most + 1) if share % n == 0), default=share)
    return share // size if 2 * size > most else 1  # much smaller parts would lose


class PreemptedError(BaseException):
    """Notice to stop was given, and all that was done is saved.

    It may be raised anywhere, like KeyboardInterrupt, and like that is no Exception: nobody must
    take it for a failure of what was just being done, such as reading a checkpoint.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by SIGTERM at step {step}: give the same command again to go on")


class Notice:
    """Whether the run is to stop: SIGTERM to a single process, or to any of several.

    In a `with`. SIGTERM raises `PreemptedError` where it arrives, or sets a flag in the part of the
    program that looks at it by itself (`looked_at`), the training loop. Several processes are told
    by JAX, which also hears the notices of clusters and makes all stop at the same step.
    """

    def __init__(self) -> None:
        self.flag, self.looking, self.step = False, False, 0

    def __enter__(self) -> Notice:
        self.alone = jax.process_count() == 1
        if self.alone:
            self.before = signal.signal(signal.SIGTERM, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        if self.alone:
            signal.signal(signal.SIGTERM, self.before)

    def _heard(self, *_: object) -> None:
        self.flag = True
        if not self.looking:
            raise PreemptedError(self.step)

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """Until the end of this block, `given` is asked often.

        Raises:
          PreemptedError: notice came after it was asked last.
        """
        self.looking = True
        try:
            yield
        finally:
            self.looking = False
        if self.flag:  # since it was asked last
            raise PreemptedError(self.step)

    def given(self, step: int) -> bool:
        """Returns whether to stop before the step after `step`."""
        self.step = step
        if self.alone:
            return self.flag
        return multihost_utils.reached_preemption_sync_point(step)


def release_memory() -> None:
    """Gives back to the system what has been freed, which glibc keeps for itself otherwise."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def memory() -> dict[str, int]:
    """Returns the bytes that this process and its first device have in use, as far as known."""
    found = {}
    with contextlib.suppress(OSError):  # there is no such file but on Linux
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["host_memory"] = pages * os.sysconf("SC_PAGE_SIZE")
    if stats := jax.local_devices()[0].memory_stats():
        found["device_memory"] = stats["bytes_in_use"]
        found["device_memory_peak"] = stats.get("peak_bytes_in_use", 0)
    return found


def define_process_flags() -> None:
    """Defines the flags that say which of several processes this one is, and on what devices."""
    flags.DEFINE_string(
        "coordinator",
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "HOST:PORT of process 0, of a run of several processes. Found by JAX on Cloud TPU, GKE, "
        "SLURM and Open MPI.",
    )
    for name, text in (("num_processes", "How many there are."), ("process_id", "Which is this.")):
        number = os.environ.get(f"JAX_{name.upper()}")
        flags.DEFINE_integer(name, number and int(number), text, lower_bound=0)
    flags.DEFINE_integer(
        "cpu_devices",
        1,
        "Devices that the CPU is to be; each works on its share of a batch by itself.",
        lower_bound=1,
    )


def join() -> None:
    """Joins the other processes of the run, if there are others; before anything else of JAX.

    Raises:
      ValueError: a flag is missing.
    """
    given = {name: getattr(flags.FLAGS, name, None) for name in ("num_processes", "process_id")}
    coordinator = getattr(flags.FLAGS, "coordinator", None)
    if coordinator is None:
        if any(value is not None for value in given.values()):
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT")
        if not _in_a_cluster():
            return
        jax.distributed.initialize()
    else:
        missing = [f"--{name}" for name, value in given.items() if value is None]
        if missing and not _in_a_cluster():
            raise ValueError(f"--coordinator needs {' and '.join(missing)}")
        jax.distributed.initialize(coordinator, **given)
    if jax.process_index():
        # One process speaks for all.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _in_a_cluster() -> bool:
    """Returns whether a cluster has started several processes, by the variables it sets."""
    several = [os.environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return (
        any(number.isdigit() and int(number) > 1 for number in several)
        or "," in hosts
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    )


def compiler_options() -> dict[str, str] | None:
    """Returns options that make networks faster on this backend (`experiments/benchmarks.md`)."""
    if platform() != "cpu" or not jaxlib.__version__.startswith("0.10."):
        return None
    # Convolutions by Eigen, which is faster than YNNPACK; and products of matrices, unless each
    # device has one core.
    kinds = ["REDUCE"] if jax.local_device_count() == 1 else ["REDUCE", "INDIVIDUAL_DOT"]
    names = ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)
    return {"xla_cpu_experimental_ynn_fusion_type": names}


def command(
    define_flags: Callable[[], None], main: Callable[[], None] | Mapping[str, Callable[[], None]]
) -> None:
    """Runs a command: defines and parses its flags, starts JAX, and fails clearly.

    What the user can mend ends the command with one clear line and exit status 1, or 2 where it is
    a flag. A run that was told to stop ends with `PREEMPTED`.

    Args:
      define_flags: defines the command's own flags.
      main: what to run; or several things by their names, of which the user gives one.
    """

    def run(argv: Sequence[str]) -> None:
        arguments = list(argv[1:])
        chosen = main if callable(main) else _subcommand(main, arguments)
        if arguments:
            _fail(f"unexpected argument {arguments[0]!r}: write options as --name=value", 2)
        start()
        try:
            join()
            chosen()
        except PreemptedError as error:
            print(error, file=sys.stderr)
            sys.exit(PREEMPTED)
        except MENDABLE as error:
            if os.environ.get("JAXDIFF_TRACEBACK"):
                raise
            _fail(f"{error}\n(JAXDIFF_TRACEBACK=1 shows where)", 1)

    # ml_collections parses --config.KEY as soon as the flag is defined.
    with _clear_flag_errors():
        define_process_flags()
        define_flags()
    flags.FLAGS.set_gnu_getopt(not callable(main))  # options may come after the subcommand
    app.run(run, flags_parser=_parse)


def _subcommand(
    among: Mapping[str, Callable[[], None]], arguments: list[str]
) -> Callable[[], None]:
    """Takes the subcommand off the arguments, and returns what it is to run."""
    if arguments and arguments[0] in among:
        return among[arguments.pop(0)]
    near = difflib.get_close_matches(arguments[0], among, n=1) if arguments else []
    hint = f": did you mean {near[0]!r}?" if near else ""
    got = repr(arguments[0]) if arguments else "none"
    _fail(f"the subcommand must be one of {', '.join(among)}, got {got}{hint}", 2)


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
