"""Planning: topologies by name, what programs cost, whether they fit and how long they take."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ml_collections")

from jax.sharding import NamedSharding, PartitionSpec

from experiments import ahead, build, chips, drawing, estimate, hlo, plan, runs, runtime
from experiments.config import default
from experiments.configs import images_256
from jaxdiff.training import sharding

GIB = 2**30


def tiny(**changes):
    config = default()
    config.name = "tiny"
    config.update(
        {
            "schedule": {"name": "cosine"},
            "parameterization": "v",
            "model": {
                "channels": 32,
                "channel_multipliers": (1,),
                "num_res_blocks": 1,
                "attention_levels": (),
            },
            "train": {"batch_size": 32, "num_steps": 1000},
            "sample": {"num": 20, "batch_size": 8, "steps": 4},
        }
    )
    config.update(changes)
    return config


def costs(**changes):
    return {
        "flops": 1e12,
        "bytes": 1e9,
        "between_devices": 0,
        "arguments": 4 * GIB,
        "outputs": 4 * GIB,
        "aliased": 4 * GIB,
        "temporaries": 2 * GIB,
        "program": 0,
        **changes,
    }


def figures(train=None, **changes):
    """What `ahead.measure` finds: a state of 4 GiB on each of 4 devices, 2 GiB of temporaries."""
    return {
        "parameters": 10,
        "device_kind": "TPU v5 lite",
        "mesh": {"data": 4, "fsdp": 1},
        "state": {"parameters": GIB, "optimiser": 2 * GIB, "averages": GIB, "counts": 0},
        "state_by_fsdp": {"1": 4 * GIB, "2": 2 * GIB, "4": GIB},
        "stages": [
            {
                "shape": [8, 8, 1],
                "batch_size": 32,
                "num_steps": 1000,
                "batch": 2048,
                "train": train or costs(),
            }
        ],
        "sample": costs(arguments=GIB, outputs=0, aliased=0, temporaries=GIB),
        **changes,
    }


# Names of devices.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v5e:4x4", ("tpu", "v5e", (4, 4), 16)),
        ("v5e:1x1", ("tpu", "v5e", (1, 1), 1)),
        ("v4:2x2x1", ("tpu", "v4", (2, 2, 1), 4)),
        ("v3:4x4", ("tpu", "v3", (4, 4), 32)),  # two devices a chip
        ("gpu:8xA100-80GB", ("gpu", "A100-80GB", (), 8)),
        ("gpu:2xh100", ("gpu", "H100", (), 2)),
        ("cpu:8", ("cpu", "cpu", (), 8)),
    ],
)
def test_topologies_have_names(text, expected):
    assert chips.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "VERSION:SIDES with one of v2, v3, v4, v5e"),
        ("v9:4x4", "v5e.*got 'v9:4x4'"),
        ("gpu:8xA100", "gpu:NUMBERxNAME with one of A100-40GB, A100-80GB"),
        ("gpu:H100", "gpu:NUMBERxNAME"),
        ("cpu:0", "CPUs, like cpu:8"),
        ("v5e:2x2x2", "v5e has 2 sides.*like 4x4"),
        ("v5e:3x3", "1 or even"),
        ("v4:4x4", "v4 has 3 sides"),
    ],
)
def test_an_unknown_topology_is_named_with_those_there_are(text, match):
    with pytest.raises(ValueError, match=match):
        chips.parse(text)


def test_a_device_of_half_a_chip_has_half_of_it():
    whole, half = chips.TPUS["v4"], chips.TPUS["v3"]
    assert (whole.bfloat16, whole.memory) == (275e12, 32 * GIB)
    assert (half.bfloat16, half.memory) == (61.5e12, 16 * GIB)
    assert chips.parse("cpu:8").chip is None


# What programs cost.


def test_what_stands_in_a_loop_is_counted_once_and_scaled():
    # This is why `costs` is told how often a loop goes around.
    def ten(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=10)[0]

    x, w = jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct((256, 256), "float32")
    compiled = jax.jit(ten, donate_argnums=0).lower(x, w).compile()
    found = ahead.costs(compiled, passes=10)
    np.testing.assert_allclose(found["flops"], 10 * 2 * 64 * 256 * 256, rtol=0.05)
    assert found["arguments"] == 4 * (64 * 256 + 256 * 256)
    assert found["outputs"] == found["aliased"] == 4 * 64 * 256
    assert found["between_devices"] == 0


@pytest.mark.parametrize(("inside", "times"), [(False, 1), (True, 10)])
def test_bytes_between_devices_are_those_gathered(inside, times):
    mesh = sharding.make_mesh(fsdp=4)
    rows, everywhere = sharding.rows(mesh), sharding.everywhere(mesh)

    def gather(w):
        return jax.lax.with_sharding_constraint(w, everywhere)

    def ten(x, w):
        def body(carry, _):
            x, w = carry
            # Of a w that changes nothing can be gathered beforehand.
            return (jnp.tanh(x @ (gather(w) if inside else w)), w * 1.1 if inside else w), None

        return jax.lax.scan(body, (x, w if inside else gather(w)), None, length=10)[0][0]

    divided = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=divided)
    compiled = jax.jit(ten, out_shardings=rows).lower(x, w).compile()
    found = ahead.costs(compiled, passes=10)
    assert found["between_devices"] == times * 4 * 256 * 256


def test_collectives_are_counted_once():
    text = """HloModule jit_step

%fused.1 (p: bf16[4,8]) -> bf16[8,8] {
  ROOT %ag.2 = bf16[8,8]{1,0:T(8,128)} all-gather(bf16[4,8]{1,0} %p), channel_id=3, dimensions={0}
}

ENTRY %main (a: bf16[4,8], b: f32[16]) -> (bf16[8,8], f32[16]) {
  %ag.1 = bf16[8,8]{1,0} all-gather(%a), channel_id=3, dimensions={0}
  %start = (f32[16]{0}, f32[32]{0}) all-gather-start(%b), channel_id=4, dimensions={0}
  %done = f32[32]{0} all-gather-done(%start), channel_id=4
  %both = (f32[16]{0}, pred[5]{0}) all-reduce(%b, %c), channel_id=5, to_apply=%add
}
"""
    # The same gather in a fusion, the larger part of one that is started, and one of two arrays.
    assert hlo.collective_bytes(text) == 2 * 64 + 4 * 32 + (4 * 16 + 5)


def test_the_traffic_of_a_program_for_gpus():
    text = """HloModule jit_step

%fused.1 (p: bf16[4,8], q: bf16[64,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %q = bf16[64,8]{1,0} parameter(1)
  %wide = f32[64,8]{1,0} convert(%q)
  %few = f32[4,8]{1,0} slice(%wide), slice={[0:4], [0:8]}
  %less = bf16[4,8]{1,0} convert(%few)
  ROOT %sum = bf16[4,8]{1,0} add(%p, %less)
}

%body (s: (f32[16], s32[])) -> (f32[16], s32[]) {
  %s = (f32[16]{0}, s32[]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%s), index=0
  %y = f32[16]{0} custom-call(%x, %x), custom_call_target="any"
  %i = s32[] get-tuple-element(%s), index=1
  ROOT %t = (f32[16]{0}, s32[]) tuple(%y, %i)
}

%condition (s: (f32[16], s32[])) -> pred[] {
  %s.1 = (f32[16]{0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=1
  ROOT %less = pred[] compare(%i.1, %i.1), direction=LT
}

%inner (c: f32[16]) -> f32[16] {
  %c = f32[16]{0} parameter(0)
  ROOT %copy = f32[16]{0} copy(%c)
}

ENTRY %main (a: bf16[4,8], b: bf16[64,8], s: (f32[16], s32[])) -> f32[16] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[64,8]{1,0} parameter(1)
  %s.2 = (f32[16]{0}, s32[]) parameter(2)
  %f = bf16[4,8]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused.1
  %start = ((f32[16]{0}), f32[16]{0}) all-reduce-start(%f), channel_id=1, to_apply=%add
  %done = f32[16]{0} all-reduce-done(%start)
  %loop = (f32[16]{0}, s32[]) while(%s.2), condition=%condition, body=%body
  %z = f32[16]{0} get-tuple-element(%loop), index=0
  ROOT %last = f32[16]{0} call(%z), to_apply=%inner
}
"""
    # A sum of 32 numbers and 32 of 512; one that is started; a copy that is called; ten times more.
    once = 3 * 64 + (2 * 64 + 64) + 2 * 64
    assert hlo.traffic(text, passes=10) == (once + 10 * 3 * 64, 3 + 10)
    assert hlo.traffic(text).bytes == once + 3 * 64


def test_programs_are_made_for_devices_that_are_not_there():
    assert runtime.platform() == "cpu"
    many = (32 * jax.device_count(), 32, 32, 3)
    assert runtime.parts(many) > 1
    assert not runtime.scans_steps()
    with runtime.made_for("tpu"):
        assert runtime.parts(many) == 1  # which are for a CPU's caches
        assert runtime.compiler_options() is None
        assert runtime.scans_steps()
    assert runtime.platform() == "cpu"


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (32.00G) exceeds available HBM (15.75G).",
            32 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm."
            "\nTotal hbm usage >= ...",
            512.5 * 2**20,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory.", None),
    ],
)
def test_a_compiler_says_what_would_be_needed(message, needed):
    found = ahead.out_of_memory(message)
    assert found["needed"] == needed
    assert found["refused"].startswith(("Ran out", "Out of"))
    assert "\n" not in found["refused"]


def test_the_real_programs_are_measured(monkeypatch):
    monkeypatch.setattr(ahead, "devices_of", lambda topology: jax.devices()[: topology.devices])
    config = tiny(mesh={"fsdp": 2}, labels={"num_classes": 3})
    found = ahead.measure(config, chips.parse("cpu:4"), (8, 8, 1))
    count, state = found["parameters"], found["state"]
    assert found["mesh"] == {"data": 2, "fsdp": 2}
    # All but small arrays lie on half of the devices; Adam has two moments.
    assert 0.5 < state["parameters"] / (4 * count) < 0.55
    assert state["averages"] == state["parameters"]
    assert state["optimiser"] == pytest.approx(2 * state["parameters"], abs=64)
    whole, half, quarter = (found["state_by_fsdp"][key] for key in ("1", "2", "4"))
    assert half == sum(state.values())
    assert 4 * count * 4 <= whole < 4 * count * 4 + 100
    assert quarter < half < whole
    (stage,) = found["stages"]
    assert stage["num_steps"] == 1000
    assert stage["batch"] == 8 * (4 * 64 + 4)  # 32 images and labels on 4 devices
    assert stage["train"]["arguments"] == sum(state.values()) + stage["batch"]
    # A convolution of 3 x 3 alone, forward and back; the network has five of them, and little more.
    one = 3 * 2 * 8 * 64 * 9 * 32 * 32
    assert 5 * one < stage["train"]["flops"] < 14 * one
    assert stage["train"]["between_devices"] > 4 * count / 2  # gradients and gathered parameters
    # 8 samples in 4 steps on 4 devices: a third of the arithmetic of an image of training, and less
    # where convolutions have fewer products, of which derivatives have all.
    ratio = found["sample"]["flops"] / stage["train"]["flops"]
    assert 0.5 < ratio / (2 * 4 / (3 * 8)) < 1.15


# What follows.


def test_the_roofline_is_the_longer_of_two_times():
    chip = chips.Chip(bfloat16=2e12, float32=1e12, bandwidth=1e9, memory=0)
    found = estimate.roofline({"flops": 4e12, "bytes": 3e9}, chip, "bfloat16")
    assert found == {"arithmetic": 2.0, "memory": 3.0, "seconds": 3.0, "bound": "memory"}
    found = estimate.roofline({"flops": 4e12, "bytes": 3e9}, chip, "float32")
    assert (found["seconds"], found["bound"]) == (4.0, "arithmetic")
    assert estimate.roofline({"flops": 4e12}, chip, "float32")["memory"] == 0


def test_a_run_that_fits_takes_its_steps_and_samples():
    config, topology = tiny(), chips.parse("v5e:2x2")
    result = estimate.assess(config, topology, figures())
    assert result["needed"] == 6 * GIB  # the new state takes the place of the old
    assert result["needed_drawing"] == 5 * GIB
    assert (result["fits"], result["try"]) == (True, [])
    step = max(1e12 / 197e12, 1e9 / 819e9)
    assert result["whole"] == pytest.approx(1000 * step)
    assert result["drawing"]["whole"] == pytest.approx(3 * step)  # 20 samples, 8 at a time


def test_stages_add_up():
    found = figures()
    found["stages"] = [{**found["stages"][0], "num_steps": 400}, found["stages"][0]]
    found["stages"][1] = {**found["stages"][1], "num_steps": 600, "train": costs(flops=4e12)}
    result = estimate.assess(tiny(), chips.parse("v5e:2x2"), found)
    assert result["whole"] == pytest.approx((400 * 1e12 + 600 * 4e12) / 197e12)


def test_of_a_gpu_counts_what_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert estimate.usable_memory(chips.parse("gpu:1xH100")) == 60 * GIB
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert estimate.usable_memory(chips.parse("gpu:1xH100")) == pytest.approx(72 * GIB)


def test_of_cpus_nothing_is_said_that_is_not_known():
    result = estimate.assess(tiny(), chips.parse("cpu:4"), figures())
    assert (result["fits"], result["usable"]) == (None, None)
    assert "whole" not in result
    text = "\n".join(plan.lines(tiny(), chips.parse("cpu:4"), figures(), result))
    assert "temporaries         2.0 GiB" in text
    assert "fit" not in text
    assert "roofline" not in text


@pytest.mark.parametrize(
    ("changes", "train", "expected"),
    [
        # 4 GiB of state and 13 of temporaries: 16 are enough for the state divided by two.
        ({}, {"temporaries": 13 * GIB}, ["--config.mesh.fsdp=2: .* 2.0 GiB on a device, not 4.0"]),
        # 15.5 of temporaries leave half a GiB for the state, and its least is 1 GiB.
        (
            {},
            {"temporaries": 15.5 * GIB},
            ["--config.mesh.fsdp=4", "model.remat=True", "microbatches=2: about 7.8 GiB"],
        ),
        ({"model": {"remat": True}}, {"temporaries": 40 * GIB}, ["fsdp=4", "microbatches=4"]),
        (
            {"model": {"remat": True}},
            {"temporaries": 400 * GIB},
            ["fsdp=4", "microbatches=8", "a smaller network"],
        ),
        # The compiler refuses, and says how much it would be.
        ({}, {"refused": "Ran out", "needed": 17 * GIB}, ["mesh.fsdp=2"]),
        (
            {},
            {"refused": "Ran out", "needed": None},
            ["fsdp=4", "remat", "microbatches=8", "small"],
        ),
    ],
)
def test_advice_is_what_would_be_enough(changes, train, expected):
    train = {"flops": 1e12, **train} if "refused" in train else costs(**train)
    result = estimate.assess(tiny(**changes), chips.parse("v5e:2x2"), figures(train))
    assert result["fits"] is False
    assert len(result["try"]) == len(expected)
    for given, wanted in zip(result["try"], expected, strict=True):
        assert re.search(wanted, given)


def test_a_state_that_is_too_large_needs_more_devices():
    found = figures(costs(arguments=100 * GIB))
    found["state"] = {"parameters": 100 * GIB}
    found["state_by_fsdp"] = {"1": 100 * GIB, "2": 50 * GIB, "4": 25 * GIB}
    result = estimate.assess(tiny(), chips.parse("v5e:2x2"), found)
    assert result["try"][-1] == (
        "more devices, or larger ones: the state alone takes 25.0 GiB on each"
    )


def test_drawing_alone_may_not_fit():
    sample = costs(arguments=GIB, outputs=0, aliased=0, temporaries=24 * GIB)
    config = tiny(sample={"batch_size": 64})
    result = estimate.assess(config, chips.parse("v5e:2x2"), figures(sample=sample))
    # 12 of 24 GiB are free beside the state.
    assert result["try"] == ["--config.sample.batch_size=32"]
    refused = {"refused": "Ran out", "needed": None, "flops": 1e12}
    result = estimate.assess(config, chips.parse("v5e:2x2"), figures(sample=refused))
    assert result["try"] == ["--config.sample.batch_size=32"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (estimate.in_bytes(12), "12 bytes"),
        (estimate.in_bytes(1.5 * GIB), "1.5 GiB"),
        (estimate.in_bytes(2 * 1024**4), "2.0 TiB"),
        (estimate.in_units(293.4e9, "FLOP"), "293 GFLOP"),
        (estimate.in_units(999.9e9, "B"), "1 TB"),
        (estimate.in_units(2.5e18, "FLOP"), "2,500 PFLOP"),
        (estimate.in_time(2e-5), "20 µs"),
        (estimate.in_time(0.0015), "1.5 ms"),
        (estimate.in_time(90), "1.5 minutes"),
        (estimate.in_time(86400), "24 hours"),
        (estimate.in_time(10 * 86400), "10 days"),
    ],
)
def test_figures_are_readable(text, expected):
    assert text == expected


# The command.


def test_the_shape_needs_no_data():
    assert plan.example_shape(tiny()) == (8, 8, 1)
    assert plan.example_shape(tiny(data={"name": "mnist", "pad_to": 32})) == (32, 32, 1)
    assert plan.example_shape(tiny(data={"name": "folder", "size": 64})) == (64, 64, 3)
    assert plan.example_shape(tiny(data={"name": "mine"}), (16, 16, 3)) == (16, 16, 3)
    for name, match in (("mine", "--shape=256,256,3"), ("folder", "--shape"), ("pbc", "a table")):
        with pytest.raises(ValueError, match=match):
            plan.example_shape(tiny(data={"name": name}))


def test_what_is_missing_or_cannot_be_divided_is_said_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "jaxdiff\[plan\]"'):
        plan.check(tiny(), chips.parse("v5e:4x4"))
    plan.check(tiny(), chips.parse("cpu:4"))
    with pytest.raises(ValueError, match=r"number, 5, .* got 32: try 35"):
        plan.check(tiny(), chips.parse("cpu:5"))
    with pytest.raises(ValueError, match=r"times train.microbatches=3, got 32: try 36"):
        plan.check(tiny(train={"microbatches": 3}), chips.parse("cpu:4"))


def test_errors_of_the_other_process_are_told(monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        plan.measure(tiny(schedule={"name": "cosin"}), "cpu:2", (8, 8, 1))
    monkeypatch.setattr(plan.sys, "executable", "false")
    with pytest.raises(runs.RunError, match="compiling for cpu:2 failed with status 1"):
        plan.measure(tiny(), "cpu:2", (8, 8, 1))


def test_the_command_prints_and_writes_all(monkeypatch, tmp_path, capsys):
    flags = SimpleNamespace(
        config=tiny(), topology="cpu:4", shape=None, json=str(tmp_path / "plan.json")
    )
    monkeypatch.setattr(plan, "FLAGS", flags)
    monkeypatch.setattr(plan, "measure", lambda *args: figures())
    plan.main()
    assert "tiny: 10 parameters, float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["found"] == figures()
    flags.shape = ["8", "x"]
    with pytest.raises(ValueError, match="--shape must be like 256,256,3"):
        plan.main()


def test_what_does_not_fit_is_said():
    found = figures(costs(temporaries=15 * GIB), device_kind="cpu")
    topology = chips.parse("gpu:4xL4")  # 18 of its 24 GiB
    result = estimate.assess(tiny(), topology, found)
    printed = list(plan.lines(tiny(), topology, found, result))
    assert printed[-2:] == [
        "It does not fit. Try",
        "  --config.mesh.fsdp=2: the state is then 2.0 GiB on a device, not 4.0 GiB",
    ]
    assert "Compiled for as many CPU devices" in printed[2]
    assert "  in all, training    19.0 GiB of 18.0 GiB" in printed
    found["stages"][0]["train"] = {"refused": "Ran out of memory.", "needed": None, "flops": 1e12}
    result = estimate.assess(tiny(), topology, found)
    printed = list(plan.lines(tiny(), topology, found, result))
    assert "  the compiler says   Ran out of memory." in printed
    assert "  in all, training    more than there is of 18.0 GiB" in printed
    found = figures({**costs(), "kernels": 1234}, device_kind="L4")
    result = estimate.assess(tiny(), topology, found)
    printed = list(plan.lines(tiny(), topology, found, result))
    assert "Compiled for this GPU" in printed[2]
    assert printed.count("  kernels             1,234") == 1


def test_the_configuration_for_256_pixels():
    config = images_256.get_config()
    config.mesh.fsdp = 1
    init, _ = build.make_training(config, plan.example_shape(config))
    params = jax.eval_shape(init).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 281_974_659
    schedule = build.make_schedule(config)
    # The cosine's log-SNR is 0 at the middle; four times the pixels a side are 2 log 4 less.
    assert float(schedule.log_snr(jnp.float32(0.5))) == pytest.approx(-2 * math.log(4), abs=1e-4)
    assert drawing.make_grid(config).sigma.shape == (51,)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
COUNTS = """
from experiments import ahead, chips
for name in chips.TPUS:
    topology = chips.parse(name + (":2x4" if name in chips.TWO_SIDES else ":2x2x2"))
    print(name, topology.devices, len(ahead.devices_of(topology)))
"""


@needs_libtpu
def test_jax_sees_as_many_devices_as_are_counted():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", COUNTS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    counts = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in counts] == list(chips.TPUS)
    assert all(here == there for _, here, there in counts)


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_is_planned_for_without_one(tmp_path):
    path = tmp_path / "plan.json"
    command = [
        *(sys.executable, "-m", "experiments.plan", "--topology=v5e:2x2", f"--json={path}"),
        *("--config.model.channels=32", "--config.model.channel_multipliers=(1,)"),
        *("--config.sample.num=10", "--config.mesh.fsdp=2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "It fits" in done.stdout
    found = json.loads(path.read_text())["found"]
    assert found["device_kind"] == "TPU v5 lite"
    train = found["stages"][0]["train"]
    # On a TPU arrays are padded to tiles.
    assert train["arguments"] >= sum(found["state"].values()) + found["stages"][0]["batch"]
    assert train["between_devices"] > 0

    # A batch that is too large is refused by the compiler, and that is said.
    done = subprocess.run(
        [*command, "--config.train.batch_size=4000000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Ran out of memory" in done.stdout
    assert "--config.model.remat=True" in done.stdout


@pytest.mark.skipif(not chips.compiles_for_gpus(), reason="JAX's plugin for CUDA is not installed")
@pytest.mark.slow
def test_a_gpu_is_planned_for_without_one(tmp_path):
    path = tmp_path / "plan.json"
    command = [
        *(sys.executable, "-m", "experiments.plan", "--topology=gpu:2xL4", f"--json={path}"),
        *("--config.model.channels=32", "--config.model.channel_multipliers=(1,)"),
        *("--config.model.num_heads=2", "--config.sample.num=10", "--config.sample.batch_size=10"),
    ]

    def found(*more):
        options = "--config.model.dtype=bfloat16", "--config.mesh.fsdp=2", *more
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Compiled for this GPU" in done.stdout
        return json.loads(path.read_text())["found"]

    plain = found()
    assert plain["device_kind"] == "L4"
    train = plain["stages"][0]["train"]
    assert train["arguments"] == sum(plain["state"].values()) + plain["stages"][0]["batch"]
    assert train["between_devices"] > 0
    assert train["kernels"] > 100
    assert plain["sample"]["kernels"] > 50 * 50  # steps
    # The weights of attention are never in memory.
    flash = found("--config.model.flash_attention=True")
    assert flash["stages"][0]["train"]["kernels"] < train["kernels"]
