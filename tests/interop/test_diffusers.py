"""Directories of diffusers without diffusers; `test_against_diffusers_models` is with it."""

import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import denoisers, guidance, interop, rng, sampling, schedules, solvers
from jaxdiff.interop import (
    _parameters,
    _unet2d,
    load_diffusers,
    read_tensors,
    save_diffusers,
    write_tensors,
)
from jaxdiff.interop._parameters import to_tensors
from jaxdiff.models import UNet
from tests.interop import torch_bytes as tb

CONFIG = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.30.0",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100}
shapes_of = functools.cache(_parameters.shapes_of)  # half a second each


def tensors_of(config, old=False, seed=0):
    """Random tensors under the names of diffusers, in float32."""
    model, _, channels = _unet2d.read_config("config", config)
    shapes = shapes_of(model, channels)
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: draw.normal(size=s.shape).astype(np.float32), shapes)
    return to_tensors(params, shapes, _unet2d.slots(model, old))


def write(directory, config=CONFIG, scheduler=SCHEDULER, tensors=None, index=None):
    directory.mkdir(exist_ok=True)
    model, drawn = ("unet", "scheduler") if index else ("", "")
    for folder in (directory / model, directory / drawn):
        folder.mkdir(exist_ok=True)
    interop._files.write_json(directory / model / "config.json", config)
    if scheduler is not None:
        path = directory / drawn / "scheduler_config.json"
        interop._files.write_json(path, scheduler)
    if index:
        interop._files.write_json(directory / "model_index.json", index)
    tensors = tensors_of(CONFIG) if tensors is None else tensors
    path = directory / model / "diffusion_pytorch_model.safetensors"
    write_tensors(path, tensors, {"format": "pt"})
    return directory


def test_names_and_shapes_are_those_of_diffusers():
    tensors = tensors_of(CONFIG)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["conv_in.weight"] == (8, 1, 3, 3)
    assert shapes["time_embedding.linear_1.weight"] == (32, 8)
    assert shapes["down_blocks.0.resnets.0.time_emb_proj.weight"] == (8, 32)
    assert shapes["down_blocks.0.downsamplers.0.conv.weight"] == (8, 8, 3, 3)
    assert shapes["down_blocks.1.resnets.0.conv_shortcut.weight"] == (16, 8, 1, 1)
    assert shapes["down_blocks.1.attentions.0.to_out.0.weight"] == (16, 16)
    assert shapes["mid_block.attentions.0.group_norm.weight"] == (16,)
    assert shapes["up_blocks.0.resnets.1.conv1.weight"] == (16, 24, 3, 3)
    assert shapes["up_blocks.0.upsamplers.0.conv.bias"] == (16,)
    assert shapes["up_blocks.1.resnets.1.norm2.bias"] == (8,)
    assert shapes["conv_norm_out.weight"] == (8,)
    # 7 residual blocks, 5 of them with a shortcut, 4 attentions, 2 changes of resolution.
    assert len(shapes) == 10 + 7 * 10 + 5 * 2 + 4 * 10 + 2 * 2 + 10


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("index", [None, {"_class_name": "DDIMPipeline", "unet": [1, 2]}])
def test_what_is_read_is_written_back_bit_for_bit(tmp_path, old, index):
    tensors = tensors_of(CONFIG, old)
    write(tmp_path / "a", tensors=tensors, index=index)
    pretrained = load_diffusers(tmp_path / "a")
    save_diffusers(tmp_path / "b", pretrained)
    files = [sorted((tmp_path / name).rglob("*.*")) for name in "ab"]
    assert [path.relative_to(tmp_path / "a") for path in files[0]] == [
        path.relative_to(tmp_path / "b") for path in files[1]
    ]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    assert len(files[0]) == (4 if index else 3)
    assert any(".proj_attn." in name for name in tensors) == old
    assert pretrained.drawing.method == ("ddim" if index else "ddpm")


def test_fine_tuned_parameters_are_written_in_the_dtypes_of_the_file(tmp_path):
    half = {name: tensor.astype(np.float16) for name, tensor in tensors_of(CONFIG).items()}
    pretrained = load_diffusers(write(tmp_path / "a", tensors=half))
    assert {leaf.dtype for leaf in jax.tree.leaves(pretrained.params)} == {jnp.dtype("float32")}
    tuned = jax.tree.map(lambda leaf: leaf * 2, pretrained.params)
    save_diffusers(tmp_path / "b", pretrained._replace(params=tuned))
    got = read_tensors(tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    for name, tensor in half.items():
        np.testing.assert_array_equal(got[name], tensor * np.float16(2), err_msg=name)
        assert got[name].dtype == np.float16


def test_the_config_becomes_the_fields_of_a_unet(tmp_path):
    config = CONFIG | {
        "num_class_embeds": 5,
        "dropout": 0.1,
        "resnet_time_scale_shift": "scale_shift",
        "sample_size": [8, 4],
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    pretrained = load_diffusers(write(tmp_path, config, tensors=tensors_of(config)))
    assert pretrained.model == UNet(
        out_channels=1,
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        num_groups=4,
        min_group_channels=1,
        dropout=0.1,
        scale_shift=True,
        num_classes=5,
        norm_epsilon=1e-5,
        mid_attention_norm=False,
    )
    assert pretrained.image_shape == (8, 4, 1)
    x = jnp.zeros((2, 8, 4, 1))
    out = jax.jit(pretrained.model.apply)(pretrained.params, x, 3, jnp.array([0, 4]))
    assert np.all(np.isfinite(out))
    assert np.any(out[0] != out[1])


def test_public_configs_make_networks_of_the_papers_sizes():
    """Those of google/ddpm-cifar10-32 and google/ddpm-cat-256, as they are on the hub."""
    fields = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "center_input_sample": False,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "time_embedding_type": "positional",
    }
    for size, widths, attended, count in (
        (32, [128, 256, 256, 256], 1, 35_746_307),
        (256, [128, 128, 256, 256, 512, 512], 4, 113_673_219),
    ):
        down = ["DownBlock2D"] * len(widths)
        down[attended] = "AttnDownBlock2D"
        up = [kind.replace("Down", "Up") for kind in down[::-1]]
        config = fields | {
            "sample_size": size,
            "block_out_channels": widths,
            "down_block_types": down,
            "up_block_types": up,
        }
        model, pair, channels = _unet2d.read_config("config.json", config)
        assert (pair, channels) == ((size, size), 3)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model, 3))) == count
        if size == 32:  # our own default, but for groups of fewer channels
            assert model == UNet(out_channels=3, min_group_channels=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("_class_name", "UNet2DConditionModel", "_class_name must be 'UNet2DModel', got 'UNet2DC"),
        ("down_block_types", ["DownBlock2D", "EvilBlock"], "among DownBlock2D.*, got 'EvilBlock'"),
        (
            "up_block_types",
            ["SkipUpBlock2D", "UpBlock2D"],
            "among UpBlock2D.*, got 'SkipUpBlock2D'",
        ),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"], "up_block_types must be attention at"),
        ("up_block_types", ["AttnUpBlock2D"], "up_block_types must be 2 blocks"),
        ("down_block_types", [3, "DownBlock2D"], "got 3"),
        ("act_fn", "gelu", "act_fn must be 'silu' or 'swish', got 'gelu'"),
        (
            "time_embedding_type",
            "fourier",
            "time_embedding_type must be 'positional', got 'fourier",
        ),
        ("class_embed_type", "timestep", "class_embed_type must be None, got 'timestep'"),
        ("center_input_sample", True, "center_input_sample must be False, got True"),
        ("mid_block_type", None, "mid_block_type must be 'UNetMidBlock2D', got None"),
        ("mid_block_scale_factor", 1.41, "mid_block_scale_factor must be 1, got 1.41"),
        ("add_attention", False, "add_attention must be True, got False"),
        ("downsample_padding", 2, "downsample_padding must be 0 or 1, got 2"),
        ("downsample_type", "fir", "downsample_type must be 'conv' or 'resnet', got 'fir'"),
        ("upsample_type", "resnet", "all changes of resolution must be"),
        ("resnet_time_scale_shift", "spatial", "resnet_time_scale_shift must be .* got 'spatial'"),
        ("attention_head_dim", 6, r"attention_head_dim must be a divisor .*\[16, 16\], got 6"),
        ("attention_head_dim", "8", "attention_head_dim must be null or a positive integer"),
        ("attn_norm_num_groups", 2, "attn_norm_num_groups must be null or 4, got 2"),
        ("norm_num_groups", 3, r"block_out_channels must be .* of the 3 groups, got \[8, 16\]"),
        ("norm_num_groups", True, "norm_num_groups must be a positive integer, got True"),
        ("block_out_channels", [8, 12], r"block_out_channels must be .* got \[8, 12\]"),
        ("block_out_channels", [], "block_out_channels must be"),
        ("time_embedding_dim", 64, "time_embedding_dim must be 32, got 64"),
        ("norm_eps", "1e-5", "norm_eps must be a number in"),
        ("dropout", 1, "dropout must be a number in"),
        ("freq_shift", float("nan"), "freq_shift must be a number in"),
        ("layers_per_block", 0, "layers_per_block must be a positive integer, got 0"),
        ("layers_per_block", 10**9, "layers_per_block must be .*, got 1000000000"),
        ("layers_per_block", 10**5, "layers_per_block must be <= 256, got 100000"),
        ("block_out_channels", [8] * 99, "block_out_channels must be"),
        ("block_out_channels", [2**40, 2**40], "block_out_channels must be"),
        ("out_channels", 2, "out_channels must be 1, in_channels .*, got 2"),
        ("sample_size", 9, "sample_size must be one or two multiples of 2, got 9"),
        ("encoder_hid_dim", 7, "encoder_hid_dim must be left out.*, got 7"),
    ],
)
def test_configs_that_cannot_be_followed_are_refused(tmp_path, field, value, message):
    write(tmp_path, CONFIG | {field: value})
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "KarrasVeScheduler"}, "_class_name must be DDPM.*, got 'KarrasVe"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be 'linear' or .*, got 'laplace'"),
        ({"prediction_type": "flow"}, "prediction_type must be 'epsilon' or .*, got 'flow'"),
        ({"variance_type": "learned"}, "variance_type must be .*, got 'learned'"),
        ({"variance_type": "learned_range"}, "out_channels must be 2, twice in_channels"),
        ({"thresholding": True}, "thresholding must be False, got True"),
        ({"timestep_spacing": ["leading"]}, "timestep_spacing must be"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps must be an integer from 1 to"),
        ({"steps_offset": -1}, "steps_offset must be an integer from 0 to 99, got -1"),
        ({"clip_sample_range": 0}, "clip_sample_range must be positive, got 0"),
        ({"beta_end": 1.5}, "beta"),
        ({"beta_start": None}, "beta_start must be a number in"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be null or 100 numbers"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: eps prediction is singular"),
        ({"timestep_values": [3, 1]}, r"timestep_values must be None, got \[3, 1\]"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas must be left out.*, got True"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas must be False, got True",
        ),
    ],
)
def test_schedulers_that_cannot_be_followed_are_refused(tmp_path, fields, message):
    write(tmp_path, scheduler=SCHEDULER | fields)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load_diffusers(tmp_path)


def test_schedulers_become_schedules_and_ways_of_drawing(tmp_path):
    fields = {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "skip_prk_steps": True,
    }
    pretrained = load_diffusers(write(tmp_path, scheduler=fields))
    expected = schedules.scaled_linear()
    np.testing.assert_array_equal(pretrained.schedule.betas, expected.betas)
    assert pretrained.parameterization.name == "v"
    drawing = interop.Drawing("ddim", 50, "leading", 1, ends_clean=False, clip=None)
    assert pretrained.drawing == drawing
    grid = interop.grid(pretrained, 4)
    assert grid.t.tolist() == [751, 501, 251, 1, 0]
    assert float(grid.sigma[-1]) > 0
    with pytest.raises(ValueError, match="num_steps must be an integer from 1 to the 1000 steps"):
        interop.grid(pretrained, 1001)
    with pytest.raises(ValueError, match="steps_offset 1 leads to index 1000 of 1000"):
        interop.grid(pretrained, 1000)


def test_a_network_alone_needs_a_scheduler(tmp_path):
    write(tmp_path, scheduler=None)
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json is not there.*scheduler="):
        load_diffusers(tmp_path)
    pretrained = load_diffusers(tmp_path, scheduler={"variance_type": "fixed_large"})
    assert pretrained.schedule.num_steps == 1000
    assert pretrained.drawing == interop.Drawing("ddpm", 1000, variance="large")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.bias"), r"tensor 'conv_in.bias' of shape \(8,\) is missing"),
        (
            lambda t: t.update({"mid_block.extra": np.ones(3)}),
            r"tensor 'mid_block.extra' of shape \(3,\) has no place",
        ),
        (
            lambda t: t.update({"conv_in.weight": np.ones((8, 3, 3, 3), np.float32)}),
            r"'conv_in.weight' must be of floats and of shape \(8, 1, 3, 3\), got float32 of shape "
            r"\(8, 3, 3, 3\)",
        ),
        (
            lambda t: t.update({"conv_in.bias": np.ones(8, np.int32)}),
            r"tensor 'conv_in.bias' must be of floats .* got int32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    tensors = tensors_of(CONFIG)
    change(tensors)
    write(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.safetensors: .*{message}"):
        load_diffusers(tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["safetensors", "bin"])
def test_hostile_weights_are_refused_and_nothing_executed(tmp_path, name):
    write(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights = tmp_path / f"diffusion_pytorch_model.{name}"
    weights.write_bytes(pickle.dumps({"conv_in.bias": Evil(tmp_path / "executed")}))
    with pytest.raises(ValueError, match=r"no safetensors file but a pickle|mentions .*open"):
        load_diffusers(tmp_path)
    assert not (tmp_path / "executed").exists()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="the file is cut off"):
        load_diffusers(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="get the weights, too"):
        load_diffusers(tmp_path)


def test_weights_of_torch_are_read(tmp_path):
    tensors = tensors_of(CONFIG)
    write(tmp_path, tensors=tensors)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    entries, storages = {}, {}
    for key, (name, tensor) in enumerate(tensors.items()):
        tensor = np.ascontiguousarray(tensor)
        strides = [stride // 4 for stride in tensor.strides]
        entries[name] = tb.tensor("Float", str(key), tensor.size, 0, tensor.shape, strides)
        storages[str(key)] = tensor.tobytes()
    tb.write_zip(tmp_path / "diffusion_pytorch_model.bin", tb.ordered(**entries), storages)
    save_diffusers(tmp_path / "b", load_diffusers(tmp_path))
    got = read_tensors(tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json, or unet/config\.json"):
        load_diffusers(tmp_path)
    write(tmp_path / "a", index={"_class_name": "StableDiffusionPipeline"})
    with pytest.raises(ValueError, match=r"_class_name must be DDPM.*, got 'StableDiffusionPip"):
        load_diffusers(tmp_path / "a")
    (tmp_path / "a" / "model_index.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match=r"model_index\.json must be a JSON file: 'a' stands"):
        load_diffusers(tmp_path / "a")
    (tmp_path / "a" / "model_index.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"model_index\.json must hold a JSON object, got list"):
        load_diffusers(tmp_path / "a")


def test_what_does_not_belong_to_its_config_is_not_written(tmp_path):
    pretrained = load_diffusers(write(tmp_path / "a"))
    other = pretrained._replace(model=pretrained.model.clone(head_dim=4))
    with pytest.raises(ValueError, match="head_dim must be 8, got 4"):
        save_diffusers(tmp_path / "b", other)
    with pytest.raises(ValueError, match="must come from load_diffusers"):
        save_diffusers(tmp_path / "b", pretrained._replace(source=None))
    tree = {"params": {**pretrained.params["params"]}}
    tree["params"]["conv_in"] = {"kernel": np.zeros((3, 3, 1, 8))}
    with pytest.raises(ValueError, match=r"conv_in/bias must be of shape \(8,\), got None"):
        save_diffusers(tmp_path / "b", pretrained._replace(params=tree))
    assert not (tmp_path / "b").exists()
    trained = pretrained._replace(model=pretrained.model.clone(dropout=0.3, remat=True))
    save_diffusers(tmp_path / "b", trained)


# Drawing


def walk(denoiser, solver, grid):
    keys = rng.per_example(jax.random.key(0), jnp.arange(4))
    x = rng.normal(keys, (3,))
    return sampling.walk(keys, denoiser, solver, grid, x)


def test_ddim_without_clipping_is_ours_and_with_it_keeps_the_noise():
    exact = denoisers.gaussian(jnp.array([0.5, -2.0, 1.0]), 0.7).denoiser
    grid = interop.grid(
        interop.Pretrained(
            None, None, schedules.linear(), None, None, False, interop.Drawing("ddim", 20)
        )
    )
    np.testing.assert_allclose(
        walk(exact, interop.ddim(None), grid)[0], walk(exact, solvers.ddim(), grid)[0], atol=1e-6
    )
    kept = walk(exact, interop.ddim(1.0), grid)[0]
    anew = walk(guidance.clip_x0(exact), solvers.ddim(), grid)[0]
    assert np.abs(kept - anew).max() > 0.01
    assert np.abs(kept).max() <= 1
    # The formula, in float64, over the grid's last steps.
    state, node, after = jnp.full((1, 3), 3.0), grid[10], grid[11]
    x0 = np.asarray(exact(state, node).x0, np.float64)
    eps = (3.0 - float(node.alpha) * x0) / float(node.sigma)
    want = float(after.alpha) * np.clip(x0, -0.4, 0.4) + float(after.sigma) * eps
    solver = interop.ddim(0.4)
    got, info = solver.step(None, exact, solver.init(state, node), node, after)
    np.testing.assert_allclose(got.x, want, atol=1e-5)
    assert np.abs(info.x0).max() <= np.float32(0.4)
    with pytest.raises(ValueError, match="clip must be None or positive, got 0"):
        interop.ddim(0)
