"""Checkpoints come back bit for bit, on any sharding, or say clearly why not."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.training import TrainState, checkpoints, init_state

CONFIG = {"seed": 3, "model": {"channels": [1, 2]}}


def make_state(step=7, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "a": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
        "b": {"c": jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16)},
    }
    optimizer = optax.MultiSteps(optax.chain(optax.clip(1.0), optax.adamw(1e-3)), 2)
    state = init_state(params, optimizer)
    return TrainState(jnp.int32(step), state.params, state.opt_state, state.ema)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    with checkpoints.open_folder(path, keep=2) as saved:
        for step in (5, 6, 7):
            checkpoints.save(saved, make_state(step), data={"next_index": step}, config=CONFIG)
    return path


def test_all_comes_back_bit_for_bit(folder):
    with checkpoints.open_folder(folder) as saved:
        assert saved.latest == 7
        restored = checkpoints.restore(saved, make_state(0, seed=1))
        assert_equal(restored.state, make_state(7))
        assert restored.data == {"next_index": 7}
        assert restored.config == CONFIG
        assert int(checkpoints.restore(saved, make_state(), step=6).state.step) == 6


def test_only_the_newest_are_kept(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["6", "7"]


def test_it_comes_back_on_another_mesh(folder):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype,
            sharding=NamedSharding(mesh, PartitionSpec("data") if a.ndim else PartitionSpec()),
        ),
        make_state(),
    )  # fmt: skip
    with checkpoints.open_folder(folder) as saved:
        state = checkpoints.restore(saved, like).state
    assert len(state.params["a"].sharding.device_set) == 8
    assert state.params["a"].addressable_shards[0].data.shape == (1, 16)
    assert_equal(state, make_state(7))


def test_what_is_missing_is_named(folder, tmp_path):
    with checkpoints.open_folder(folder) as saved:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 .*\[6, 7\]"):
            checkpoints.restore(saved, make_state(), step=3)
    with checkpoints.open_folder(tmp_path) as saved:
        assert saved.latest is None
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* has none"):
            checkpoints.restore(saved, make_state())
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoints.open_folder(tmp_path, keep=0)


def test_another_structure_is_refused(folder):
    other = init_state({"a": jnp.zeros((8, 16))}, optax.sgd(0.1))
    with checkpoints.open_folder(folder) as saved:
        with pytest.raises(checkpoints.CheckpointError, match="damaged or of another model"):
            checkpoints.restore(saved, other)


@pytest.mark.filterwarnings("ignore")  # of what Orbax leaves behind when it fails
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
@pytest.mark.parametrize("name", ["state/d/*", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_an_error_with_the_cure(folder, tmp_path, name, damage):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "7").glob(name)
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "truncate" else 0])
    with checkpoints.open_folder(tmp_path) as saved:
        with pytest.raises(
            checkpoints.CheckpointError, match=r"7: it is damaged.*step 6, delete that folder"
        ):
            checkpoints.restore(saved, make_state())
    # What the message says works.
    shutil.rmtree(tmp_path / "7")
    with checkpoints.open_folder(tmp_path) as saved:
        assert_equal(checkpoints.restore(saved, make_state()).state, make_state(6))


def test_an_unfinished_save_is_no_checkpoint_and_in_nobodys_way(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "7").rename(tmp_path / "7.orbax-checkpoint-tmp")
    with checkpoints.open_folder(tmp_path) as saved:
        assert saved.latest == 6
        checkpoints.save(saved, make_state(7), data={"next_index": 7}, config=CONFIG)
    with checkpoints.open_folder(tmp_path) as saved:
        assert_equal(checkpoints.restore(saved, make_state()).state, make_state(7))


def test_reading_touches_nothing(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    saving = tmp_path / "8.orbax-checkpoint-tmp"
    (saving / "state").mkdir(parents=True)
    with checkpoints.open_folder(tmp_path, keep=1, read_only=True) as saved:
        assert_equal(checkpoints.restore(saved, make_state()).state, make_state(7))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["6", "7", saving.name]
    with pytest.raises(FileNotFoundError, match=r"no folder of checkpoints at .*nowhere"):
        checkpoints.open_folder(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_nothing_is_pickled(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            assert b"pickle" not in path.read_bytes().lower()
    metadata = json.loads((folder / "7" / "_CHECKPOINT_METADATA").read_text())
    assert metadata["custom_metadata"]["config"] == CONFIG
