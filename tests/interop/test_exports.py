"""Parameters as safetensors and JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.interop import load_metadata, load_params, read_tensors, save_params, write_tensors
from jaxdiff.models import UNet

TREE = {
    "params": {
        "dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}
    },
    "step": np.int32(7),
}


def test_parameters_come_back_bit_for_bit(tmp_path):
    fields = dict(channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_levels=())
    model = UNet(out_channels=1, **fields)
    x = jnp.zeros((1, 4, 4, 1))
    like = jax.eval_shape(model.init, jax.random.key(0), x, 0)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda s: draw.normal(size=s.shape).astype(s.dtype), like)
    metadata = {"step": 3, "config": {"model": [1, None, 0.5, "ö"]}}
    save_params(tmp_path / "model.safetensors", params, metadata)
    got = load_params(tmp_path / "model.safetensors", like)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert load_metadata(tmp_path / "model.safetensors") == metadata
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_names_are_paths_and_dtypes_stay(tmp_path):
    save_params(tmp_path / "a.safetensors", TREE)
    got = read_tensors(tmp_path / "a.safetensors")
    assert set(got) == {"params/dense/kernel", "params/dense/bias", "step"}
    assert got["params/dense/bias"].dtype == jnp.bfloat16
    back = load_params(tmp_path / "a.safetensors", TREE)
    jax.tree.map(np.testing.assert_array_equal, back, TREE)
    assert load_metadata(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("step"), "parameter 'step' of shape .. is missing"),
        (lambda t: t.update(more=np.ones(2)), r"parameter 'more' of shape \(2,\) is not expected"),
        (
            lambda t: t.update({"params/dense/kernel": np.ones((3, 2), np.float32)}),
            r"parameter 'params/dense/kernel' must have shape \(2, 3\), got \(3, 2\)",
        ),
        (
            lambda t: t.update({"params/dense/bias": np.ones(3, np.float16)}),
            "parameter 'params/dense/bias' must have dtype bfloat16, got float16",
        ),
    ],
)
def test_what_is_not_expected_is_refused(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    save_params(path, TREE)
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)
    with pytest.raises(ValueError, match=rf"a\.safetensors: {message}"):
        load_params(path, TREE)


@pytest.mark.parametrize(
    ("params", "metadata", "message"),
    [
        ({"a": {"b/c": np.ones(1)}}, None, "keys that are words without '/', got 'b/c'"),
        ({"a": {3: np.ones(1)}}, None, "keys that are words .* got 3"),
        ({"a": [np.ones(1)]}, None, "nested dictionaries of arrays, got list at 'a'"),
        (np.ones(1), None, "nested dictionaries of arrays, got ndarray"),
        ({"a": jax.random.key(0)}, None, "nested dictionaries of arrays, got .* at 'a'"),
        ({}, None, "at least one array"),
        ({"a": np.ones(1)}, {"x": np.ones(1)}, "metadata must be what JSON gives back"),
        ({"a": np.ones(1)}, {"x": (1, 2)}, "metadata must be what JSON gives back"),
        ({"a": np.ones(1)}, {"x": float("nan")}, "metadata must be what JSON gives back"),
        ({"a": np.ones(1)}, {3: 1}, "metadata must be what JSON gives back"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, params, metadata, message):
    with pytest.raises(ValueError, match=message):
        save_params(tmp_path / "a.safetensors", params, metadata)
    assert not list(tmp_path.iterdir())


def test_names_of_files(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*a\.json"):
        save_params(tmp_path / "a.json", TREE)
    with pytest.raises(FileNotFoundError):
        load_params(tmp_path / "a.safetensors", TREE)
    save_params(tmp_path / "a.safetensors", TREE)
    (tmp_path / "a.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_metadata(tmp_path / "a.safetensors")
