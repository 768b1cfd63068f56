"""Inception-V3 without PyTorch: names, shapes, pools, resizes, and files that are not its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.evaluation import inception, inception_network
from tests.evaluation.inception_tensors import random_tensors


def test_names_and_shapes_are_those_of_the_public_file():
    shapes = inception.tensor_shapes()
    # Counted in the published file: 94 convolutions, each with a normalisation of four vectors,
    # and the last layer.
    convolutions = [name for name in shapes if name.endswith(".conv.weight")]
    assert len(convolutions) == 94
    assert len(shapes) == 94 * 5 + 2
    learned = [s for name, s in shapes.items() if "running" not in name]
    # 23,834,568 without the auxiliary head for 1000 classes; 8 more of 2049 each.
    assert sum(np.prod(s) for s in learned) == 23_834_568 + 8 * 2049
    some = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch1x1.bn.weight": (320,),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: shapes[name] for name in some} == some


def test_pools_are_those_of_tensorflow():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    average, largest = np.empty_like(x), np.empty_like(x)
    for i in range(5):
        for j in range(4):
            window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            average[:, i, j] = window.mean((1, 2))  # padding does not count
            largest[:, i, j] = window.max((1, 2))
    np.testing.assert_allclose(inception_network._average_pool(x), average, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(inception_network._max_pool(x, 1, "SAME"), largest)


def test_only_the_last_block_pools_by_the_maximum():
    images = jnp.zeros((2, 75, 75, 3))
    params = jax.eval_shape(inception_network.init, jax.random.key(0))
    traced = jax.jit(inception_network.InceptionV3().apply).trace({"params": params}, images)
    program = str(traced.jaxpr)
    # Two between the first layers, one where blocks 6a and 7a halve the size, one in 7c; averages
    # in 5b-5d, 6b-6e and 7b, each with the counts that it divides by.
    assert program.count("reduce_window_max[") == 5
    assert program.count("reduce_window_sum[") == 2 * 8
    shapes = [leaf.shape for leaf in jax.tree.leaves(traced.out_info)]
    assert shapes == [(2, 2048), (2, 1008), (2, 1008)]


def by_definition(image, resize):
    """One channel `(H, W)`, pixel by pixel in float64."""
    height, width = image.shape
    out = np.empty((inception.SIZE, inception.SIZE))

    def place(i, size):
        at = i * size / inception.SIZE
        if resize == "pytorch":
            at = min(max((i + 0.5) * size / inception.SIZE - 0.5, 0), size - 1)
        low = int(at)
        return low, min(low + 1, size - 1), at - low

    columns = [place(j, width) for j in range(inception.SIZE)]
    for i in range(inception.SIZE):
        top, bottom, down = place(i, height)
        row = image[top] * (1 - down) + image[bottom] * down
        out[i] = [row[a] * (1 - right) + row[b] * right for a, b, right in columns]
    return out


@pytest.mark.parametrize("resize", inception.RESIZES)
@pytest.mark.parametrize("shape", [(8, 11), (320, 301)])
def test_resizes_are_by_definition(resize, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = by_definition(image.astype(np.float64), resize)
    found = inception.prepare(image[None, :, :, None], resize)
    assert found.shape == (1, 299, 299, 3)
    scaled = expected / 127.5 - 1 if resize == "pytorch" else expected / 128 - 1
    np.testing.assert_allclose(found[0], np.repeat(scaled[..., None], 3, -1), atol=2e-4)
    real = inception.prepare(image[None, :, :, None].astype(np.float32) / 127.5 - 1, resize)
    np.testing.assert_allclose(real, found, atol=1e-5)


def test_the_size_of_the_network_is_kept():
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    same = inception.prepare(image, "pytorch")
    np.testing.assert_allclose(same, image / 127.5 - 1, atol=1e-6)


def test_tensors_become_parameters():
    tensors = random_tensors(inception.tensor_shapes())
    extra = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.int64(0), "AuxLogits.fc.bias": None}
    params = inception.from_tensors(tensors | extra)
    kernel = tensors["Mixed_6b.branch7x7_2.conv.weight"]
    found = params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"]
    np.testing.assert_array_equal(found[0, 5, 3, 2], kernel[2, 3, 0, 5])
    np.testing.assert_array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)
    norm = params["Conv2d_1a_3x3"]["bn"]
    for mine, theirs in {
        "scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"
    }.items():  # fmt: skip
        np.testing.assert_array_equal(norm[mine], tensors[f"Conv2d_1a_3x3.bn.{theirs}"])
    initial = jax.eval_shape(inception_network.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, initial)


def test_other_files_are_refused_by_name():
    tensors = {n: np.zeros(s, np.float32) for n, s in inception.tensor_shapes().items()}
    name = "Mixed_7a.branch3x3_1.bn.running_mean"

    def refused(changed, match):
        with pytest.raises(ValueError, match=match):
            inception.from_tensors(changed)

    lacking = {n: t for n, t in tensors.items() if n != name}
    refused(lacking, f"lack {name}$")
    refused(tensors | {"Mixed_8a.weight": np.zeros(1)}, "have the unknown Mixed_8a.weight$")
    refused({"weight": np.zeros(1)}, r"lack .* and 467 more and have the unknown weight")
    wide = np.zeros((1000, 2048), np.float32)
    refused(tensors | {"fc.weight": wide}, r"fc.weight must have the shape \(1008, 2048\), got")
    refused(tensors | {name: np.full(192, np.nan)}, f"{name} has NaN")
    refused(tensors | {name: np.zeros(192, np.int8)}, f"{name} must be floating, got int8")


def test_other_images_are_refused():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"shape \(N, H, W, 3 or 1\), got \(8, 8, 3\)"):
        inception.prepare(image[0])
    with pytest.raises(ValueError, match=r"uint8 in 0 .. 255 or floating in .*, got int32"):
        inception.prepare(image.astype(np.int32))
    with pytest.raises(ValueError, match="resize must be one of pytorch, tensorflow, got 'pil'"):
        inception.extract({}, image, resize="pil")
    with pytest.raises(ValueError, match=r"floating images must be in .* as large as 255"):
        inception.extract({}, image + np.float32(255))
