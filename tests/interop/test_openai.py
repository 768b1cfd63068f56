"""OpenAI's checkpoints, against their network written anew in PyTorch (skips where that is absent).

What is here of their architecture follows their papers' appendices and the layout of their files:
module names give the tensors their names.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules
from jaxdiff.interop import Drawing, load_openai, write_tensors

# Three levels, attention at the second and third.
FIELDS = dict(width=32, mults=(1, 2, 2), blocks=2, attention=(1, 2), channels=3, out=3)
GUESSED = dict(image_size=16, num_heads=4)
CASES = {
    "improved": (dict(heads=4), GUESSED),
    "improved, learned sigma, scale shift, classes": (
        dict(heads=4, out=6, scale_shift=True, classes=5),
        GUESSED | dict(noise_schedule="cosine", diffusion_steps=4000, rescale_timesteps=True),
    ),
    "guided": (
        dict(head_channels=16, out=6, scale_shift=True, by_blocks=True, classes=5),
        dict(image_size=16, num_head_channels=16),
    ),
    "new order, one block": (
        dict(head_channels=16, blocks=1, by_blocks=True, new_order=True, attention=(2,)),
        dict(image_size=16, num_head_channels=16, use_new_attention_order=True),
    ),
    "one level": (dict(heads=1, mults=(1,), attention=()), dict(image_size=5, num_heads=1)),
}


def network(torch, *, width, mults, blocks, attention, channels, out, heads=None,
            head_channels=None, scale_shift=False, by_blocks=False, new_order=False,
            classes=None):  # fmt: skip
    """Their UNet."""
    nn, f = torch.nn, torch.nn.functional

    class Resample(nn.Module):
        def __init__(self, name, conv):
            super().__init__()
            self.up = name == "conv"
            self.add_module(name, conv)

        def forward(self, x, emb):
            if self.up:
                return self.conv(f.interpolate(x, scale_factor=2, mode="nearest"))
            return self.op(x)

    class Res(nn.Module):
        def __init__(self, c, d, change=None):
            super().__init__()
            self.change = change
            self.in_layers = nn.Sequential(
                nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, d, 3, padding=1)
            )
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * width, d + d * scale_shift))
            self.out_layers = nn.Sequential(
                nn.GroupNorm(32, d), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(d, d, 3, padding=1)
            )
            self.skip_connection = nn.Identity() if c == d else nn.Conv2d(c, d, 1)

        def resample(self, x):
            if self.change == "up":
                return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            return f.avg_pool2d(x, 2) if self.change == "down" else x

        def forward(self, x, emb):
            h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
            told = self.emb_layers(emb)[:, :, None, None]
            if scale_shift:
                scale, shift = told.chunk(2, 1)
                h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
            else:
                h = self.out_layers(h + told)
            return self.skip_connection(self.resample(x)) + h

    class Attention(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.heads = heads or c // head_channels
            self.norm, self.qkv = nn.GroupNorm(32, c), nn.Conv1d(c, 3 * c, 1)
            self.proj_out = nn.Conv1d(c, c, 1)

        def forward(self, x, emb):
            b, c = x.shape[:2]
            flat = x.reshape(b, c, -1)
            qkv = self.qkv(self.norm(flat))
            if new_order:
                q, k, v = (p.reshape(b * self.heads, c // self.heads, -1) for p in qkv.chunk(3, 1))
            else:
                q, k, v = qkv.reshape(b * self.heads, 3 * c // self.heads, -1).chunk(3, 1)
            weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(c // self.heads)
            h = torch.einsum("bts,bcs->bct", weight.softmax(-1), v)
            return x + self.proj_out(h.reshape(b, c, -1)).reshape(x.shape)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            dim = 4 * width
            self.time_embed = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
            if classes:
                self.label_emb = nn.Embedding(classes, dim)
            c, kept = width, [width]
            inputs = [nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)])]
            for level, mult in enumerate(mults):
                for _ in range(blocks):
                    d = mult * width
                    inputs.append(
                        nn.ModuleList([Res(c, d), *([Attention(d)] if level in attention else [])])
                    )
                    c = d
                    kept.append(c)
                if level < len(mults) - 1:
                    conv = Resample("op", nn.Conv2d(c, c, 3, stride=2, padding=1))
                    inputs.append(nn.ModuleList([Res(c, c, "down") if by_blocks else conv]))
                    kept.append(c)
            self.middle_block = nn.ModuleList([Res(c, c), Attention(c), Res(c, c)])
            outputs = []
            for level in reversed(range(len(mults))):
                for i in range(blocks + 1):
                    d = mults[level] * width
                    parts = [Res(c + kept.pop(), d)]
                    c = d
                    if level in attention:
                        parts.append(Attention(c))
                    if level and i == blocks:
                        conv = Resample("conv", nn.Conv2d(c, c, 3, padding=1))
                        parts.append(Res(c, c, "up") if by_blocks else conv)
                    outputs.append(nn.ModuleList(parts))
            self.input_blocks, self.output_blocks = nn.ModuleList(inputs), nn.ModuleList(outputs)
            self.out = nn.Sequential(
                nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, out, 3, padding=1)
            )

        def forward(self, x, t, y=None):
            rates = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
            angles = t[:, None].float() * rates
            emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))
            emb = emb if y is None else emb + self.label_emb(y)
            h = self.input_blocks[0][0](x)
            kept = [h]
            for block in self.input_blocks[1:]:
                for part in block:
                    h = part(h, emb)
                kept.append(h)
            for part in self.middle_block:
                h = part(h, emb)
            for block in self.output_blocks:
                h = torch.cat([h, kept.pop()], 1)
                for part in block:
                    h = part(h, emb)
            return self.out(h)

    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():  # nothing at zero or one
        for name, p in net.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 1 if "label" in name else p[0].numel() ** -0.5)
            else:
                p.normal_(0, 0.1)
                if ".norm." in name or name.endswith(("layers.0.weight", "out.0.weight")):
                    p.add_(name.endswith("weight"))
    return net


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree_with_their_network(tmp_path, name):
    torch = pytest.importorskip("torch")
    fields, options = CASES[name]
    net = network(torch, **FIELDS | fields)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    pretrained = load_openai(tmp_path / "a.pt", **options)
    size, classes = options["image_size"], fields.get("classes")
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, size, size, 3)).astype(np.float32)
    t, y = np.array([3, 700]), np.array([4, 0]) if classes else None
    with torch.no_grad():
        theirs = net(
            torch.from_numpy(x.transpose(0, 3, 1, 2)),
            torch.from_numpy(t * (1000 / options.get("diffusion_steps", 1000))),
            None if y is None else torch.from_numpy(y),
        ).numpy()
    ours = jax.jit(pretrained.model.apply)(pretrained.params, x, t, y)
    difference = np.abs(ours - theirs.transpose(0, 2, 3, 1)).max()
    print(f"{name}: {difference:.1e} of {np.abs(theirs).max():.1f}")
    assert np.abs(theirs).max() > 1
    assert difference < 1e-4
    model = pretrained.model
    full = FIELDS | fields
    assert model.channel_multipliers == full["mults"]
    assert model.attention_levels == full["attention"]
    assert model.num_res_blocks == full["blocks"]
    assert model.num_classes == classes
    assert model.scale_shift == full.get("scale_shift", False)
    assert pretrained.learned_variance == (full["out"] == 6)
    assert pretrained.image_shape == (size, size, 3)


# Without PyTorch: a network of two levels, each of its tensors written by hand.


def res(prefix, c, d, width):
    shapes = {
        "in_layers.0.weight": (c,), "in_layers.0.bias": (c,),
        "in_layers.2.weight": (d, c, 3, 3), "in_layers.2.bias": (d,),
        "emb_layers.1.weight": (d, 4 * width), "emb_layers.1.bias": (d,),
        "out_layers.0.weight": (d,), "out_layers.0.bias": (d,),
        "out_layers.3.weight": (d, d, 3, 3), "out_layers.3.bias": (d,),
    }  # fmt: skip
    if c != d:
        shapes |= {"skip_connection.weight": (d, c, 1, 1), "skip_connection.bias": (d,)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def tensors():
    shapes = {
        "time_embed.0.weight": (128, 32), "time_embed.0.bias": (128,),
        "time_embed.2.weight": (128, 128), "time_embed.2.bias": (128,),
        "input_blocks.0.0.weight": (32, 1, 3, 3), "input_blocks.0.0.bias": (32,),
        **res("input_blocks.1.0", 32, 32, 32),
        "input_blocks.2.0.op.weight": (32, 32, 3, 3), "input_blocks.2.0.op.bias": (32,),
        **res("input_blocks.3.0", 32, 64, 32),
        **res("middle_block.0", 64, 64, 32),
        "middle_block.1.norm.weight": (64,), "middle_block.1.norm.bias": (64,),
        "middle_block.1.qkv.weight": (192, 64, 1), "middle_block.1.qkv.bias": (192,),
        "middle_block.1.proj_out.weight": (64, 64, 1), "middle_block.1.proj_out.bias": (64,),
        **res("middle_block.2", 64, 64, 32),
        **res("output_blocks.0.0", 128, 64, 32),
        **res("output_blocks.1.0", 96, 64, 32),
        "output_blocks.1.1.conv.weight": (64, 64, 3, 3), "output_blocks.1.1.conv.bias": (64,),
        **res("output_blocks.2.0", 96, 32, 32),
        **res("output_blocks.3.0", 64, 32, 32),
        "out.0.weight": (32,), "out.0.bias": (32,),
        "out.2.weight": (1, 32, 3, 3), "out.2.bias": (1,),
    }  # fmt: skip
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_what_names_and_shapes_say_and_what_arguments_say(tmp_path):
    saved = tensors()
    write_tensors(tmp_path / "a.safetensors", saved)
    pretrained = load_openai(
        tmp_path / "a.safetensors", image_size=8, num_heads=4, diffusion_steps=250, dropout=0.3
    )
    model = pretrained.model
    assert (model.channels, model.channel_multipliers, model.num_res_blocks) == (32, (1, 2), 1)
    assert (model.attention_levels, model.resample_blocks, model.dropout) == ((), False, 0.3)
    assert pretrained.image_shape == (8, 8, 1)
    expected = schedules.linear(250, 4e-4, 0.08)
    np.testing.assert_array_equal(pretrained.schedule.betas, expected.betas)
    assert pretrained.parameterization.name == "eps"
    drawing = Drawing("ddpm", 250, "linspace", noise_before_clipping=False, variance="large")
    assert pretrained.drawing == drawing
    # Heads first, then queries, keys and values: those of head 2 begin at 2 * 3 * 16.
    attention = pretrained.params["params"]["mid_attention"]
    weight = saved["middle_block.1.qkv.weight"][:, :, 0]
    for i, name in enumerate(("query", "key", "value")):
        rows = slice(2 * 48 + 16 * i, 2 * 48 + 16 * (i + 1))
        np.testing.assert_array_equal(attention[name]["kernel"][:, 32:48], weight[rows].T)
    cosine = load_openai(
        tmp_path / "a.safetensors",
        image_size=8,
        num_head_channels=16,
        noise_schedule="cosine",
        predict_xstart=True,
        use_new_attention_order=True,
        rescale_timesteps=True,
        diffusion_steps=4000,
    )
    attention = cosine.params["params"]["mid_attention"]
    np.testing.assert_array_equal(attention["key"]["kernel"], weight[64:128].T)
    assert (cosine.parameterization.name, cosine.model.noise_level_scale) == ("x0", 0.25)
    np.testing.assert_array_equal(cosine.schedule.betas, schedules.cosine(4000).betas)
    assert jax.tree.leaves(cosine.params)[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, dict(num_heads=None), "one of num_heads and num_head_channels must be given"),
        ({}, dict(num_head_channels=16), "one of num_heads and num_head_channels"),
        ({}, dict(num_heads=3), "num_heads must be a divisor of the 64 channels"),
        ({}, dict(noise_schedule="quadratic"), "noise_schedule must be 'linear' or 'cosine'"),
        ({}, dict(image_size=9), "image_size must be a multiple of 2, .*got 9"),
        ({}, dict(diffusion_steps=0), "diffusion_steps must be a positive integer, got 0"),
        ({"out.2.bias": None}, {}, r"tensor 'out.2.bias' of shape \(1,\) is missing"),
        ({"out.2.weight": None}, {}, "tensor 'out.2.weight' is missing"),
        ({"out.2.weight": (3, 32, 3, 3)}, {}, "'out.2.weight' must have 1 outputs .*got 3"),
        ({"input_blocks.0.0.weight": (32, 1)}, {}, "must have 4 axes, got shape"),
        ({"input_blocks.9.0.op.weight": (1,)}, {}, "tensors of 'input_blocks.4' are missing"),
        ({"extra": (3,)}, {}, r"tensor 'extra' of shape \(3,\) has no place"),
        ({"middle_block.1.qkv.weight": (64, 64, 1)}, {}, r"of shape \(192, 64, 1\), got \(64, 64"),
        ({"middle_block.1.norm.weight": (62,)}, {}, "qkv"),
        ({"time_embed.0.weight": (128, 64)}, {}, "widths of the levels must be multiples"),
        (
            {"input_blocks.3.0.in_layers.2.weight": (64, 32, 1, 1)},
            {},
            r"'input_blocks.3.0.in_layers.2.weight' .* shape \(64, 32, 3, 3\), got .*\(64, 32, 1",
        ),
    ],
)
def test_what_is_no_such_network_is_refused(tmp_path, change, options, message):
    saved = tensors()
    for name, shape in change.items():
        if shape is None:
            saved.pop(name)
        else:
            saved[name] = np.zeros(shape, np.float32)
    write_tensors(tmp_path / "a.safetensors", saved)
    with pytest.raises(ValueError, match=message):
        load_openai(tmp_path / "a.safetensors", **dict(image_size=8, num_heads=4) | options)


def test_other_checkpoints_are_refused(tmp_path):
    write_tensors(tmp_path / "a", {"conv_in.weight": np.zeros((8, 3, 3, 3), np.float32)})
    with pytest.raises(ValueError, match=r"must have the tensors of a UNet.*got conv_in\.weight"):
        load_openai(tmp_path / "a", image_size=8, num_heads=4)
