"""The benchmark: what is made of times, sizes, kernels and their FLOPs, and its commands."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ml_collections")

from absl import flags
from jax import lax

from experiments import (
    benchmark,
    build,
    chips,
    figures,
    fresh,
    kernels,
    programs,
    runs,
    runtime,
    sizes,
    timing,
    training_speed,
)
from experiments.config import default
from tests import quick_to_compile, small_runs


def tiny(**changes):
    config = default()
    config.name = "tiny"
    config.update(
        {
            "model": {
                "channels": 4,
                "channel_multipliers": (1,),
                "num_res_blocks": 1,
                "attention_levels": (),
            },
            "train": {"batch_size": 8},
            "sample": {"batch_size": 8, "steps": 3},
        }
    )
    config.update(changes)
    return sizes.Size(config, (4, 4, 1))


# Times.


def test_sides_are_asked_in_turn_and_warmed_up_first():
    asked, ticks = [], iter(range(100))

    def side(name):
        def ask():
            asked.append(name)
            return next(ticks)

        return ask

    told = []
    found = timing.interleaved(
        {name: side(name) for name in "abc"},
        repeats=2,
        warmup=1,
        tell=lambda: told.append(len(asked)),
    )
    assert "".join(asked) == "abc" * 3
    assert found == {"a": [3, 6], "b": [4, 7], "c": [5, 8]}  # 0, 1 and 2 were the warm-up
    assert told == list(range(1, 10))


def test_a_side_that_fails_is_left_out_and_the_others_go_on():
    times = iter([1.0, 2.0, 3.0])
    asked = []

    def breaks():
        asked.append("breaks")
        if len(asked) == 2:
            raise timing.SideError("out of memory")
        return 1.0

    found = timing.interleaved(
        {"breaks": breaks, "works": lambda: next(times)}, repeats=3, warmup=0
    )
    assert str(found["breaks"]) == "out of memory"
    assert found["works"] == [1, 2, 3]
    assert len(asked) == 2


def test_fast_calls_are_timed_several_at_once():
    calls = []

    def run(times):
        calls.append(times)
        return 0.01 if len(calls) > 1 else 5.0  # the first compiles

    side = timing.calibrated(run, at_least=0.25)
    assert [side(), side()] == [0.01, 0.01]
    assert calls == [1, 1, 25, 25]
    calls.clear()
    assert timing.calibrated(run, at_least=0.001)() == 0.01
    assert calls == [1, 1]  # the second is long enough to be the measurement


def test_seconds_are_of_one_call(monkeypatch):
    now = iter([10.0, 12.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    calls = []
    assert timing.seconds(lambda: calls.append(1), times=4) == 0.5
    assert len(calls) == 4


def test_medians_spreads_and_ratios():
    assert timing.summary([5.0, 1.0, 2.0]) == {
        "median": 2.0,
        "min": 1.0,
        "max": 5.0,
        "all": [5.0, 1.0, 2.0],
    }
    # Repeat by repeat: the machine was ten times slower in the second.
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == timing.summary([2.0, 3.0, 1.0])


# Sizes and programs.


@pytest.mark.parametrize(
    ("name", "parameters", "batch_size", "groups", "attention"),
    [
        ("digits", 1_001_729, 64, 8, 1),
        ("mnist", 6_469_889, 32, 16, 1),
        ("cifar10", 35_746_307, 8, 32, 1),
        ("celebahq", 113_673_219, 1, 32, 4),
    ],
)
def test_sizes_count_as_stated(name, parameters, batch_size, groups, attention):
    size = sizes.make(name)
    assert programs.count_parameters(size) == size.parameters == parameters
    assert size.config.train.batch_size == size.config.sample.batch_size == batch_size
    peer = size.peer
    assert (peer["sample_size"], peer["sample_size"], peer["in_channels"]) == size.shape
    assert peer["norm_num_groups"] == groups
    kinds = [kind.startswith("Attn") for kind in peer["down_block_types"]]
    assert [level for level, attends in enumerate(kinds) if attends] == [attention]
    assert [kind.startswith("Attn") for kind in peer["up_block_types"]] == kinds[::-1]
    assert len(peer["block_out_channels"]) == len(kinds)


def test_sizes_can_be_changed():
    size = sizes.make("digits", dtype="bfloat16", batch_size=16)
    assert size.config.model.dtype == "bfloat16"
    assert size.config.train.batch_size == size.config.sample.batch_size == 16
    assert not size.config.optimizer.clip_norm
    with pytest.raises(ValueError, match=r"--size must be one of .* did you mean 'mnist'"):
        sizes.make("mnits")


def test_accelerators_take_larger_batches(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    size = sizes.make("cifar10")
    assert (size.config.train.batch_size, size.config.sample.batch_size) == (512, 256)


def test_programs_run_and_count_their_work(monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)
    size = tiny()
    forward, sample, train = (programs.make(name, size) for name in ("forward", "sample", "train"))
    assert forward.call().shape == sample.call().shape == (8, 4, 4, 1)
    assert np.isfinite(np.asarray(sample.call())).all()
    losses = [float(train.call()["loss"]) for _ in range(20)]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 20  # each goes on from the one before
    pixels, hidden = 8 * 4 * 4, 16
    assert forward.flops > 2 * pixels * (2 * hidden + hidden)
    assert train.flops > 2 * forward.flops
    # What stands in the loop counts as often as it goes around.
    assert 3 * forward.flops < sample.flops < 3 * (forward.flops + 100 * pixels)
    with pytest.raises(ValueError, match="did you mean 'sample'"):
        programs.make("samples", size)
    odd = programs.with_changes(size, {"train": {"batch_size": 9}})
    with pytest.raises(ValueError, match="9 can't be divided among 8 devices"):
        programs.train(odd)
    assert size.config.train.batch_size == 8


def test_the_compiler_counts_about_as_much():
    size = tiny()
    network = build.make_network(size.config, size.shape)
    args = jax.eval_shape(lambda: (programs.training(size)[0]().params, *noise(size)))
    traced = jax.jit(network).trace(*args)
    # It leaves out products with padding, and counts what is no product.
    counted = sum(kernel.count * kernel.flops for kernel in kernels.find(traced.jaxpr))
    assert 0.6 * counted < traced.lower().cost_analysis()["flops"] < 1.2 * counted


@pytest.mark.parametrize(
    ("shape", "devices", "drawn", "trained"),
    [
        ((32, 32, 32, 1), 1, 8, 4),
        ((32, 32, 32, 1), 2, 4, 2),
        ((24, 32, 32, 1), 2, 1, 1),  # half of it is little
        ((33, 32, 32, 1), 2, 1, 1),
        ((30, 28, 28, 1), 1, 6, 3),  # of 5 images, and of 10
        ((31, 32, 32, 1), 1, 1, 1),  # only by itself
        ((8, 32, 32, 3), 1, 1, 1),
        ((4, 64, 64, 3), 1, 4, 2),
        ((2, 128, 128, 3), 1, 1, 1),
        ((64, 8, 8, 1), 1, 1, 1),
        ((4096, 16, 8), 1, 1, 1),  # sequences
    ],
)
def test_large_batches_have_parts_on_a_cpu(shape, devices, drawn, trained, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert (runtime.parts(shape), runtime.parts(shape, training=True)) == (drawn, trained)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (runtime.parts(shape), runtime.parts(shape, training=True)) == (1, 1)


@pytest.mark.parametrize("labels", [0, 3])
def test_samples_do_not_depend_on_parts(labels, monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)
    size = tiny(
        labels={"num_classes": labels}, sample={"guidance": "classifier_free"} if labels else {}
    )
    whole, forward = programs.sample(size), programs.forward(size)
    seen, own = [], jax.devices()[:2]
    monkeypatch.setattr(jax, "device_count", lambda: len(own))
    monkeypatch.setattr(jax, "devices", lambda: own)
    monkeypatch.setattr(runtime, "parts", lambda shape, **_: seen.append(shape) or 4)
    parts, call = programs.sample(size), programs.forward(size)
    assert set(seen) == {(8, 4, 4, 1)}
    np.testing.assert_allclose(parts.call(), whole.call(), atol=1e-5)
    np.testing.assert_allclose(call.call(), forward.call(), atol=1e-5)
    # Of a loop's body the compiler counts one turn, which is a quarter of the batch.
    assert call.flops == pytest.approx(forward.flops, rel=0.1)


def test_train_steps_do_not_depend_on_parts(monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)
    size = tiny(train={"batch_size": 4 * jax.device_count()})
    whole = programs.train(size)
    monkeypatch.setattr(runtime, "parts", lambda shape, **_: 4)
    parts = programs.train(size)
    loops = [str(program.jaxpr).count("scan[") for program in (whole, parts)]
    assert loops[1] == loops[0] + 1
    for _ in range(2):
        np.testing.assert_allclose(parts.call()["loss"], whole.call()["loss"], rtol=1e-5)
    # The optimiser's, once a step, are counted as often: much of so small a network's.
    assert parts.flops == pytest.approx(whole.flops, rel=0.3)


def noise(size):
    return jnp.zeros((8, *size.shape)), jnp.zeros(8, jnp.int32)


def test_programs_of_labelled_networks(monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)
    size = tiny(labels={"num_classes": 3})
    assert programs.forward(size).call().shape == (8, 4, 4, 1)
    assert programs.host_batch(size)["cond"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


# Kernels.


def conv(x, w, stride=1):
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def found_in(function, *shapes):
    jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return kernels.find(jaxpr)


X, W, SQUARE = (8, 6, 6, 3), (3, 3, 3, 5), (3, 3, 3, 3)


def test_kernels_of_a_small_network_are_counted_exactly():
    def network(x, w, dense):
        x = conv(x, w)
        return x.mean((1, 2)) @ dense

    convolution, product = found_in(network, X, W, (5, 7))
    assert (convolution.kind, convolution.count) == ("convolution", 1)
    assert convolution.flops == 2 * 8 * 6 * 6 * 5 * (3 * 3 * 3)
    assert (product.kind, product.count, product.flops) == ("matrix product", 1, 2 * 8 * 5 * 7)


def test_of_what_platforms_do_differently_only_this_ones_counts():
    def product(x, y):
        by_platform = {"cpu": lambda x, y: x @ y @ y, "tpu": lambda x, y: x @ y, "default": jnp.dot}
        return lax.platform_dependent(x, y, **by_platform)

    (found,) = found_in(product, (3, 4), (4, 4))
    assert found.count == 2

    def without_this_one(x, y):
        return lax.platform_dependent(x, y, tpu=lambda x, y: x @ y @ y, default=jnp.dot)

    (found,) = found_in(without_this_one, (3, 4), (4, 4))
    assert found.count == 1


def test_gradients_are_told_apart():
    def loss(x, w):
        return jnp.sum(jnp.square(conv(x, w)))

    found = found_in(jax.grad(loss, argnums=(0, 1)), X, W)
    # Forward; towards the input; towards the kernel. Each is as many products as the first.
    assert sorted(kernel.kind for kernel in found) == [
        "convolution",
        "convolution",
        "kernel gradient",
    ]
    assert {kernel.flops for kernel in found} == {2 * 8 * 6 * 6 * 5 * 27}


def test_zeros_between_the_rows_of_a_strided_gradient_are_no_work():
    def loss(x, w):
        return jnp.sum(jnp.square(conv(x, w, stride=2)))

    found = found_in(jax.grad(loss, argnums=(0, 1)), X, W)
    assert len(found) == 3
    assert {kernel.flops for kernel in found} == {2 * 8 * 3 * 3 * 5 * 27}


def test_grouped_convolutions_do_less():
    def grouped(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    (found,) = found_in(grouped, X, (3, 3, 1, 6))
    assert found.flops == 2 * 8 * 6 * 6 * 6 * (3 * 3 * 1)


def test_what_is_called_is_looked_into():
    @jax.custom_vjp
    def own(x, w):
        return conv(x, w)

    own.defvjp(lambda x, w: (own(x, w), w), lambda w, g: (g, w))

    def several(x, w):
        x = jax.jit(conv)(x, w)  # 1
        x = jax.checkpoint(conv)(x, w)  # 2
        x = own(x, w)  # 3
        x, _ = lax.scan(lambda x, _: (conv(conv(x, w), w), None), x, length=5)  # 13
        return lax.cond(x[0, 0, 0, 0] > 0, lambda: conv(x, w), lambda: x)  # 14

    (found,) = found_in(several, X, SQUARE)
    assert found.count == 14


def test_shares_of_the_whole(monkeypatch):
    def network(x, w):
        return conv(conv(x, w), w) + conv(x[:, :3], w).sum()

    program = programs.Program(
        call=None,
        batch_size=8,
        flops=0.0,
        memory={},
        lines=0,
        times={},
        jaxpr=jax.make_jaxpr(network)(jnp.zeros(X), jnp.zeros(SQUARE)),
        args=(),
    )
    monkeypatch.setattr(
        kernels, "time_of", lambda kernel, batch_size, repeats: [9.0, 1.0, 1e-3 * kernel.count]
    )
    left = []
    found = kernels.shares(program, 16.0, repeats=3, tell=left.append)
    assert left == [2, 1]
    whole, part = 2 * 8 * 36 * 3 * 27, 2 * 8 * 18 * 3 * 27
    expected = {"seconds": 3.0, "flops": 2 * whole + part, "count": 3, "share": 3 / 16}
    assert found == {"convolution": expected, "all": expected}


def test_a_kernel_is_timed_alone():
    found = found_in(jax.grad(lambda x, w: jnp.sum(conv(x, w) ** 2), argnums=1), X, W)
    for kernel in found:
        times = kernels.time_of(kernel, 8, repeats=2)
        assert len(times) == 2
        assert min(times) > 0


# What is told.


def test_the_share_of_the_peak(monkeypatch):
    size = tiny(model={"dtype": "bfloat16"})
    program = programs.Program(None, 8, 1e12, {"arguments": 2**20}, 0, {}, None, ())
    assert figures.of(size, program, 2.0)["share_of_peak"] is None  # a CPU's is not known
    monkeypatch.setattr(chips, "of_kind", lambda kind: chips.Chip(1e12, 5e11, 1.0, 1.0))
    told = figures.of(size, program, 2.0)
    assert told["images_per_second"] == 4
    assert told["share_of_peak"] == pytest.approx(0.5 / jax.device_count())
    assert figures.of(tiny(), program, 2.0)["share_of_peak"] == pytest.approx(
        1 / jax.device_count()
    )
    assert figures.in_words({**told, "device_memory_peak": None}) == [
        "4",
        "500 GFLOP/s",
        "6.2 %",
        "1.0 MiB",
    ]
    assert figures.in_words({**told, "device_memory_peak": 2**30})[-1] == "1.0 GiB at most"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(kind, name):
    assert chips.of_kind(kind) == {**chips.GPUS, **chips.TPUS}.get(name)


# The commands.


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a subcommand in this process; returns what it prints and what it keeps."""

    def call(name, *arguments):
        values, kept = flags.FlagValues(), tmp_path / "found.json"
        benchmark.define_flags(values)
        values(["benchmark", f"--json={kept}", *arguments])
        monkeypatch.setattr(benchmark, "FLAGS", values)
        benchmark.MAIN[name]()
        return capsys.readouterr().out, json.loads(kept.read_text())[name]

    return call


@pytest.fixture
def small(monkeypatch):
    """The commands measure a network that compiles at once."""
    monkeypatch.setattr(build, "make_model", small_runs.make_model)
    monkeypatch.setattr(sizes, "make", lambda name, **options: tiny())


@pytest.mark.usefixtures("small")
def test_training_is_timed(command):
    said, found = command("train", "--size=x", "--train_steps=2", "--repeats=2", "--kernels")
    figures = found["tiny"]
    assert len(figures["step"]["all"]) == len(figures["loop"]["all"]) == 2
    ratios = [a / b for a, b in zip(figures["step"]["all"], figures["loop"]["all"], strict=True)]
    assert figures["speed_of_the_loop"]["all"] == pytest.approx(ratios)
    assert figures["run"]["parameters"] == programs.count_parameters(tiny())
    assert figures["data"] == "grain"
    # Two dense layers: forward, towards the kernels and towards the second's input.
    assert figures["kernels"]["all"]["count"] == 5
    assert "matrix product" in said


@pytest.mark.usefixtures("small")
def test_sampling_is_timed(command):
    said, found = command("sample", "--size=x", "--steps=2", "--repeats=2", "--warmup=0")
    figures = found["tiny"]
    assert figures["steps"] == 2
    assert len(figures["ratio"]["all"]) == 2
    table = said.splitlines()
    assert table[0].startswith("size")
    assert table[1].startswith("tiny")


@pytest.mark.usefixtures("small")
def test_pipelines_are_timed(command, monkeypatch):
    real = timing.calibrated
    monkeypatch.setattr(timing, "calibrated", lambda run, at_least: real(run, 0.01))
    _, found = command("data", "--size=x", "--repeats=2")
    assert {len(found["tiny"][side]["all"]) for side in ("grain", "resident", "train")} == {2}


@pytest.mark.usefixtures("small")
def test_where_grain_is_missing(command, monkeypatch):
    monkeypatch.setattr(training_speed, "has_grain", lambda: False)
    with pytest.raises(FileNotFoundError):  # nothing is kept
        command("data", "--size=x")
    _, found = command("train", "--size=x", "--train_steps=2", "--repeats=1")
    assert found["tiny"]["data"].startswith("one batch")


@pytest.mark.usefixtures("small")
def test_compilation_is_timed(command, monkeypatch):
    asked, caches = [], []

    def ask(what, size, program, *, cpu_devices=None, cache=None):
        asked.append((what, program, size.config.sample.steps, cpu_devices))
        warm = cache in caches
        caches.append(cache)
        assert os.path.isdir(cache)
        return {
            "lower_s": 1.0,
            "compile_s": 0.5 if warm else 9.0,
            "lines": 7,
            "memory": {"temporaries": 1024},
        }

    seconds = iter([9.0, 9.0, 1.0, 1.25, 2.0, 2.1, 3.0, 3.1])
    monkeypatch.setattr(fresh, "ask", ask)
    monkeypatch.setattr(fresh, "seconds_to_import", lambda names: next(seconds))
    said, found = command("compile", "--size=x", "--repeats=3")
    assert asked[::6] == [
        ("compile", "train", 50, None),
        ("compile", "sample", 10, None),
        ("compile", "sample", 1000, None),
    ]
    told = found["tiny"]["programs"]["sample, 1000 steps"]
    assert told["cold"]["all"] == [10, 10, 10]
    assert told["warm"]["all"] == [1.5, 1.5, 1.5]
    assert not any(map(os.path.exists, caches))
    assert found["imports"]["difference"]["median"] == pytest.approx(0.1)
    assert "import jax: 2.000 s; import jax, jaxdiff: 2.100 s, 0.100 s more" in said


# ml_collections loads the file in a way that is going out of use.
reads_a_config = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")


@reads_a_config
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=digits,mnits"], "--size must be one of .* did you mean 'mnist'"),
        (["--train_steps=3"], "--train_steps belongs to train, not to sample"),
        (["--memory"], "--memory belongs to peers"),
        (["--size=digits", "--config=experiments/configs/digits.py"], "not both"),
    ],
)
def test_flags_that_make_no_sense(command, arguments, message):
    with pytest.raises(ValueError, match=message):
        command("sample", *arguments)


@reads_a_config
def test_a_configuration_instead_of_a_size(monkeypatch):
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values(["x", "--config=experiments/configs/mnist.py", "--batch_size=4", "--dtype=bfloat16"])
    monkeypatch.setattr(benchmark, "FLAGS", values)
    (size,) = benchmark.chosen_sizes("train")
    assert size.shape == (32, 32, 1)
    assert size.config.train.batch_size == size.config.sample.batch_size == 4
    assert size.config.model.dtype == "bfloat16"
    assert size.peer is None


def failed(monkeypatch, capsys, main, *arguments):
    """Returns the exit status of a command and what it says, its flags already parsed."""
    for name in ("start", "join", "define_process_flags"):
        monkeypatch.setattr(runtime, name, lambda: None)
    monkeypatch.setattr(runtime.app, "run", lambda run, flags_parser: run(["command", *arguments]))
    status = 0
    try:
        runtime.command(lambda: None, main)
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().err.strip()


def test_subcommands_are_found_by_name(monkeypatch, capsys):
    ran = []
    main = {"train": lambda: ran.append("train"), "sample": lambda: ran.append("sample")}
    assert failed(monkeypatch, capsys, main, "sample") == (0, "")
    assert ran == ["sample"]
    many = "error: the subcommand must be one of train, sample, got "
    assert failed(monkeypatch, capsys, main) == (2, many + "none")
    assert failed(monkeypatch, capsys, main, "trian") == (
        2,
        many + "'trian': did you mean 'train'?",
    )
    assert failed(monkeypatch, capsys, main, "train", "more") == (
        2,
        "error: unexpected argument 'more': write options as --name=value",
    )
    assert failed(monkeypatch, capsys, lambda: None, "train")[0] == 2
    assert ran == ["sample"]


CPU_DEVICES = """
import jax
from absl import flags
from experiments import runtime
runtime.command(lambda: None, {"count": lambda: print(jax.device_count())})
"""


def test_how_many_devices_the_cpu_is():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    for arguments, count in (([], 3), (["--cpu_devices=2"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", CPU_DEVICES, "count", *arguments],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.stdout.strip() == str(count), done.stderr


def test_fresh_processes_answer():
    size = tiny()
    found = fresh.ask("compile", size, "forward", cpu_devices=2)
    assert found["compile_s"] > 0
    assert found["lines"] > 10
    with pytest.raises(runs.RunError, match="batch of 8 can't be divided among 3"):
        fresh.ask("compile", size, "forward", cpu_devices=3)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux only")
def test_the_peak_of_memory_can_be_forgotten():
    before = fresh.resident("VmRSS")
    block = np.ones(2**24)  # 128 MiB
    assert fresh.resident("VmHWM") > before + 2**26
    del block
    fresh.reset_peak()
    assert fresh.resident("VmHWM") < before + 2**26


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "experiments.benchmark", "train", f"--json={path}"]
    done = subprocess.run(
        [*command, "--size=digits", "--repeats=1", "--train_steps=2", "--batch_size=8"],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": " ".join(quick_to_compile.FLAGS)},
    )
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout
    found = json.loads(path.read_text())["train"]["digits"]
    assert found["run"]["parameters"] == 1_001_729
    assert found["images_per_second"] > 0
