"""UNet2DModels of diffusers, converted: their outputs, their tensors, their pipelines' samples.

Skips where PyTorch and diffusers are absent. To run it where they are:

    pip install -e ".[test]" diffusers torch
    pytest -n 0 -s tests/interop/test_against_diffusers_models.py
"""

import filecmp
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import denoisers, guidance, interop, rng, sampling, solvers
from jaxdiff.interop import load_diffusers, read_tensors, save_diffusers

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("DIFFUSERS_VERBOSITY", "error")
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")

# As google/ddpm-cifar10-32 has it.
CIFAR10 = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)
# As google/ddpm-celebahq-256 and ddpm-ema-* have it, but for their widths 128, 128, 256, ...
CELEBA = dict(
    CIFAR10,
    sample_size=64,
    block_out_channels=(32, 32, 64, 64, 128, 128),
    down_block_types=4 * ("DownBlock2D",) + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + 4 * ("UpBlock2D",),
)
SMALL = dict(
    sample_size=16,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
EVERYWHERE = dict(down_block_types=3 * ("AttnDownBlock2D",), up_block_types=3 * ("AttnUpBlock2D",))
MODELS = {
    "cifar10": CIFAR10,
    "cifar10 small": dict(CIFAR10, block_out_channels=(32, 64, 64, 64)),
    "celebahq": CELEBA,
    "defaults": SMALL,
    "attention everywhere": dict(SMALL, **EVERYWHERE, attention_head_dim=16),
    "classes": dict(SMALL, num_class_embeds=7, norm_num_groups=8, norm_eps=1e-4),
    "scale shift": dict(SMALL, resnet_time_scale_shift="scale_shift"),
    "scale shift, normed": dict(
        SMALL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32
    ),
    "blocks": dict(
        SMALL,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        out_channels=6,
        sample_size=(8, 16),
    ),
}


def make(config, seed=0):
    """A UNet2DModel with no parameter left at zero or one."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, (p[0].numel() if "class" not in name else 1) ** -0.5)
            else:
                p.normal_("norm" in name and name.endswith("weight"), 0.1)
    return model


@pytest.fixture(params=MODELS, scope="module")
def case(request, tmp_path_factory):
    """A model and the directory of a pipeline with it."""
    model = make(MODELS[request.param])
    learned = dict(variance_type="learned_range") if model.config.out_channels == 6 else {}
    scheduler = diffusers.DDPMScheduler(**learned)
    directory = tmp_path_factory.mktemp("saved")
    diffusers.DDPMPipeline(model, scheduler).save_pretrained(directory)
    return request.param, model, directory


def inputs(model, batch=2, seed=0):
    size = model.config.sample_size
    size = (size, size) if isinstance(size, int) else size
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(batch, *size, model.config.in_channels)).astype(np.float32)
    labels = draw.integers(0, 7, batch) if model.config.num_class_embeds else None
    return x, draw.integers(0, 1000, batch), labels


def test_outputs_agree(case):
    name, model, directory = case
    pretrained = load_diffusers(directory)
    x, t, labels = inputs(model)
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(x.transpose(0, 3, 1, 2)),
            torch.from_numpy(t),
            None if labels is None else torch.from_numpy(labels),
        ).sample.numpy()
    ours = jax.jit(pretrained.model.apply)(pretrained.params, x, t, labels)
    difference = np.abs(ours - theirs.transpose(0, 2, 3, 1)).max()
    print(f"{name}: {difference:.1e} of {np.abs(theirs).max():.1f}")
    assert np.abs(theirs).max() > 1
    assert difference < 1e-4
    assert pretrained.image_shape == x.shape[1:]
    assert pretrained.learned_variance == (model.config.out_channels == 6)


def test_converted_back_all_files_are_the_same_bit_for_bit(case, tmp_path):
    _, model, directory = case
    save_diffusers(tmp_path / "back", load_diffusers(directory))
    files = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    back = sorted(str(p.relative_to(tmp_path / "back")) for p in tmp_path.rglob("*.*"))
    assert files == [file for file in back if (directory / file).is_file()]
    assert filecmp.cmpfiles(directory, tmp_path / "back", files, shallow=False) == (files, [], [])
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "back" / "unet")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


DRAWINGS = {
    "DDIM": ("cifar10 small", dict()),
    "offset": (
        "attention everywhere",
        dict(steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear"),
    ),
    "cosine, to index 0": (
        "defaults",
        dict(set_alpha_to_one=False, beta_schedule="squaredcos_cap_v2"),
    ),
    "v, zero SNR": (
        "scale shift",
        dict(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    ),
    "x0, clipped": ("defaults", dict(prediction_type="sample", clip_sample_range=0.1)),
    "v, not clipped": (
        "defaults",
        dict(
            prediction_type="v_prediction",
            clip_sample=False,
            trained_betas=np.linspace(1e-4, 0.02, 1000).tolist(),
        ),
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_ddim_samples_agree(name, tmp_path):
    config, fields = DRAWINGS[name]
    model = make(dict(MODELS[config], sample_size=16))
    with torch.no_grad():
        # Random networks are steep: with a weight of 0.1 for 0.01, a change of their own start by
        # 1e-6 already changes their own samples by 0.4.
        model.conv_out.weight.mul_(0.01)
    pipeline = diffusers.DDIMPipeline(model, diffusers.DDIMScheduler(**fields))
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pretrained = load_diffusers(tmp_path)
    assert pretrained.drawing[:2] == ("ddim", 50)

    noise = np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        start = torch.from_numpy(noise.transpose(0, 3, 1, 2))
        module = "diffusers.pipelines.ddim.pipeline_ddim.randn_tensor"
        patch.setattr(module, lambda *args, **kwargs: start)
        theirs = pipeline(batch_size=2, output_type="np").images
    denoiser = denoisers.from_network(
        pretrained.model.apply,
        pretrained.params,
        pretrained.schedule,
        pretrained.parameterization,
    )
    keys = rng.per_example(jax.random.key(0), jnp.arange(2))
    grid, solver = interop.grid(pretrained), interop.ddim(pretrained.drawing.clip)
    x = jax.jit(lambda x: sampling.walk(keys, denoiser, solver, grid, x)[0])(noise)
    ours = np.clip(np.asarray(x) / 2 + 0.5, 0, 1)
    difference = np.abs(ours - theirs).max()
    print(f"{name}: {difference:.1e}, {np.mean((theirs > 0) & (theirs < 1)):.2f} within (0, 1)")
    assert difference < 1e-3
    if name == "DDIM":  # it matters that theirs does not find the noise anew
        clipped = guidance.clip_x0(denoiser)
        x = jax.jit(lambda x: sampling.walk(keys, clipped, solvers.ddim(), grid, x)[0])(noise)
        assert np.abs(np.clip(np.asarray(x) / 2 + 0.5, 0, 1) - theirs).max() > 0.1


@pytest.mark.parametrize("num_steps", [1, 7, 50, 1000])
@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_visit_their_timesteps(tmp_path, num_steps, kind, spacing):
    scheduler = getattr(diffusers, f"{kind}Scheduler")(timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    _, parameterization, drawing = interop._schedulers.read_scheduler(
        "x", json.loads(scheduler.to_json_string()), None
    )
    schedule = interop._schedulers._schedule("x", interop._schedulers._DEFAULTS)
    pretrained = interop.Pretrained(None, None, schedule, parameterization, None, False, drawing)
    grid = interop.grid(pretrained, num_steps)
    assert grid.t.tolist() == [*scheduler.timesteps.tolist(), -1]
    assert drawing.method == kind.lower()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_of_ancestral_sampling_agrees(variance, prediction):
    scheduler = diffusers.DDPMScheduler(variance_type=variance, prediction_type=prediction)
    scheduler.set_timesteps(50)
    schedule, parameterization, drawing = interop._schedulers.read_scheduler(
        "x", json.loads(scheduler.to_json_string()), None
    )
    learned, clip = drawing.variance == "learned", drawing.clip
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 4, 4, 3)).astype(np.float32)
    out = draw.uniform(-1, 1, size=(2, 4, 4, 6 if learned else 3)).astype(np.float32)
    z = np.asarray(rng.normal(rng.per_example(jax.random.key(0), jnp.arange(2)), (4, 4, 3)))
    pretrained = interop.Pretrained(None, None, schedule, parameterization, None, learned, drawing)
    denoiser = guidance.clip_x0(
        denoisers.from_network(
            lambda *args: jnp.asarray(out),
            None,
            schedule,
            parameterization,
            learned_variance=learned,
        ),
        -clip,
        clip,
    )
    grid, solver = interop.grid(pretrained, 50), solvers.ddpm(drawing.variance)
    for i in (20, 49):
        keys = rng.per_example(jax.random.key(0), jnp.arange(2))
        state = solver.init(jnp.asarray(x), grid[i])
        ours = solver.step(keys, denoiser, state, grid[i], grid[i + 1])[0].x
        with pytest.MonkeyPatch.context() as patch:
            noise = torch.from_numpy(z.transpose(0, 3, 1, 2).copy())
            module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
            patch.setattr(module, lambda *args, noise=noise, **kwargs: noise)
            output, sample = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (out, x))
            theirs = scheduler.step(output, scheduler.timesteps[i], sample).prev_sample
        np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_schedule="sigmoid", num_train_timesteps=300),
        dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ],
)
def test_schedules_agree(fields):
    scheduler = diffusers.DDPMScheduler(**fields)
    schedule, *_ = interop._schedulers.read_scheduler(
        "x", json.loads(scheduler.to_json_string()), None
    )
    table = scheduler.alphas_cumprod.double().numpy()
    # Theirs is a product in float32.
    np.testing.assert_allclose(schedule.alphas_bar, table, rtol=3e-4, atol=1e-7)
    np.testing.assert_allclose(schedule.betas, scheduler.betas, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_files_of_torch_come_back(tmp_path, dtype):
    model = make(SMALL).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, safe_serialization=False)
    pretrained = load_diffusers(tmp_path, scheduler={})
    assert {leaf.dtype for leaf in jax.tree.leaves(pretrained.params)} == {jnp.dtype("float32")}
    save_diffusers(tmp_path / "back", pretrained)
    got = read_tensors(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    for name, p in model.named_parameters():
        assert str(got[name].dtype) == dtype
        np.testing.assert_array_equal(got[name].astype(np.float32), p.detach().float(), name)


def test_shards_are_put_together(tmp_path):
    model = make(SMALL)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    pretrained = load_diffusers(tmp_path, scheduler={})
    save_diffusers(tmp_path / "back", pretrained)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "back")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
