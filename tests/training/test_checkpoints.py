"""Checkpoints come back bit for bit, on any sharding, or say clearly why not."""

import collections
import contextlib
import dataclasses
import gc
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdiff.training import TrainState, checkpoints, init_state, sharding

# Orbax leaves coroutines and threads behind when it fails, which are warned of at any time.
LEFTOVERS = pytest.mark.filterwarnings("ignore")
CONFIG = {"seed": 3, "model": {"channels": [1, 2]}}


@pytest.fixture(autouse=True)
def _leftovers_are_collected(request):
    """In the test that made them, not in a later one."""
    yield
    if request.node.get_closest_marker("filterwarnings"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()


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


def test_what_eight_devices_saved_comes_back_on_fewer(tmp_path):
    def places(count):
        mesh = sharding.make_mesh(-1, count, jax.devices()[:count])
        return sharding.fully_sharded(mesh, make_state(), small=1)

    with checkpoints.open_folder(tmp_path) as saved:
        divided = jax.device_put(make_state(), places(8))
        assert divided.params["b"]["c"].addressable_shards[0].data.shape == (64, 8)
        checkpoints.save(saved, divided, data={}, config=CONFIG)
        for count in (1, 2, 4):
            like = sharding.placed(make_state(), places(count))
            state = checkpoints.restore(saved, like).state
            assert len(state.params["a"].sharding.device_set) == count
            assert_equal(state, make_state())


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


@LEFTOVERS
@pytest.mark.parametrize("damage", ["truncate", "remove"])
@pytest.mark.parametrize("name", ["state/d/*", "state/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(folder, tmp_path, name, damage):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "7").glob(name)
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])
    with checkpoints.open_folder(tmp_path) as saved:
        with pytest.raises(
            checkpoints.CheckpointError, match=r"7: it is damaged.*step 6, delete that folder"
        ):
            checkpoints.restore(saved, make_state())
        with pytest.warns(
            checkpoints.CheckpointWarning, match=r"/7, now .*/7.damaged, is damaged: going .* 6"
        ):
            restored = checkpoints.restore_newest(saved, make_state())
        assert_equal(restored.state, make_state(6))
        assert names(tmp_path) == ["6", "7.damaged"]
        # The run goes on, and comes to the same step again.
        checkpoints.save(saved, make_state(7), data={"next_index": 7}, config=CONFIG)
        assert_equal(checkpoints.restore_newest(saved, make_state()).state, make_state(7))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@LEFTOVERS
def test_every_flipped_bit_is_found_or_harmless(folder, tmp_path):
    rng = random.Random(0)
    files = sorted(p.relative_to(folder) for p in (folder / "7").rglob("*") if p.is_file())
    found = collections.Counter()
    for i, file in enumerate(files * 4):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        flip(copy / file, rng.randrange((copy / file).stat().st_size), rng.randrange(8))
        with checkpoints.open_folder(copy) as saved, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            restored = checkpoints.restore_newest(saved, make_state(0, seed=1))
        step = int(restored.state.step)
        assert_equal(restored.state, make_state(step))
        assert restored.data == {"next_index": step}
        assert restored.config == CONFIG
        fell_back = any(w.category is checkpoints.CheckpointWarning for w in told)
        assert (step, names(copy)) == ((6, ["6", "7.damaged"]) if fell_back else (7, ["6", "7"]))
        found[file.name] += fell_back
    assert found["_CHECKPOINT_METADATA"] >= 1
    assert found["_METADATA"] >= 1
    assert sum(found.values()) > len(files)


@LEFTOVERS
def test_metadata_that_orbax_cannot_read_does_not_keep_the_folder_closed(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    metadata = tmp_path / "7" / "_CHECKPOINT_METADATA"
    flip(metadata, metadata.read_bytes().index(b"performance_metrics"))
    with checkpoints.open_folder(tmp_path, keep=1) as saved:
        assert saved.steps == [6, 7]
        assert int(checkpoints.restore_newest(saved, make_state()).state.step) == 6
        checkpoints.save(saved, make_state(7), data={}, config={})
    # Those that were there when it was opened are counted among those to keep.
    assert names(tmp_path) == ["7", "7.damaged"]


@LEFTOVERS
def test_changed_values_are_found_whatever_their_place(folder, tmp_path):
    """Files that are whole for Orbax, but of another content."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "7" / "state")
    shutil.copytree(folder / "6" / "state", tmp_path / "7" / "state")
    path = tmp_path / "6" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"next_index": 6', '"next_index": 8'))
    with checkpoints.open_folder(tmp_path) as saved:
        with pytest.raises(
            checkpoints.CheckpointError, match=r"wrong checksums of 1 arrays, such as \['step'\]"
        ):
            checkpoints.restore(saved, make_state())
        with pytest.raises(checkpoints.CheckpointError, match="_CHECKPOINT_METADATA is damaged"):
            checkpoints.restore(saved, make_state(), step=6)


def test_checkpoints_from_before_there_were_checksums_are_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "7" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    del metadata["custom_metadata"]["checksums"]
    path.write_text(json.dumps(metadata))
    with checkpoints.open_folder(tmp_path) as saved:
        assert_equal(checkpoints.restore(saved, make_state()).state, make_state(7))


@LEFTOVERS
def test_if_none_is_whole_nothing_is_moved(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = init_state({"a": jnp.zeros((8, 16))}, optax.sgd(0.1))
    with checkpoints.open_folder(tmp_path) as saved:
        with pytest.raises(
            checkpoints.CheckpointError,
            match=r"(?s)of another model or optimiser. All are left .*/7: .*other arrays.*/6: ",
        ):
            checkpoints.restore_newest(saved, other)
        assert names(tmp_path) == ["6", "7"]
        assert_equal(checkpoints.restore_newest(saved, make_state()).state, make_state(7))
    with checkpoints.open_folder(tmp_path / "new") as saved:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* has none"):
            checkpoints.restore_newest(saved, other)


@LEFTOVERS
def test_what_is_damaged_is_kept_under_names_of_its_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for aside in ("7.damaged", "7.damaged-2", "7.damaged-3"):
        flip(tmp_path / "7" / "_CHECKPOINT_METADATA", 0)
        with checkpoints.open_folder(tmp_path, keep=2) as saved:
            with pytest.warns(checkpoints.CheckpointWarning, match=f"now .*/{aside}, is damaged"):
                assert checkpoints.restore_newest(saved, make_state()).data == {"next_index": 6}
            assert saved.latest == 6
            checkpoints.save(saved, make_state(7), data={"next_index": 7}, config=CONFIG)
    with checkpoints.open_folder(tmp_path, keep=2) as saved:
        for step in (8, 9):
            checkpoints.save(saved, make_state(step), data={}, config={})
    assert names(tmp_path) == ["7.damaged", "7.damaged-2", "7.damaged-3", "8", "9"]


@LEFTOVERS
def test_two_damaged_ones_are_gone_back_over(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.copytree(folder / "7", tmp_path / "8")
    for step in (7, 8):
        flip(tmp_path / str(step) / "_CHECKPOINT_METADATA", 0)
    with checkpoints.open_folder(tmp_path, read_only=True) as saved:
        with pytest.warns(checkpoints.CheckpointWarning) as told:
            assert int(checkpoints.restore_newest(saved, make_state()).state.step) == 6
    assert any("/8 is damaged: going back to step 6" in str(w.message) for w in told)
    assert names(tmp_path) == ["6", "7", "8"]
    with checkpoints.open_folder(tmp_path) as saved:
        with pytest.warns(checkpoints.CheckpointWarning) as told:
            assert int(checkpoints.restore_newest(saved, make_state()).state.step) == 6
    assert sum(w.category is checkpoints.CheckpointWarning for w in told) == 2
    assert names(tmp_path) == ["6", "7.damaged", "8.damaged"]


def test_trees_of_any_kind_are_kept(tmp_path):
    tree = {"a": [jnp.arange(3), jnp.ones(2, bool)], "b": jnp.float32(0.1)}
    metadata = {"stage": (1, 2.5), "names": {3: None}}
    with checkpoints.open_folder(tmp_path, keep=None) as saved:
        for step in range(5):
            checkpoints.save_tree(saved, step, tree, metadata)
        assert saved.steps == [*range(5)] or saved.steps == [*range(4)]  # it is being written
        found, about = checkpoints.restore_tree(saved, jax.tree.map(jnp.zeros_like, tree), 0)
        assert saved.steps == [*range(5)]
        with pytest.raises(ValueError, match="there is a checkpoint of step 4"):
            checkpoints.save_tree(saved, 4, tree, {})
        with pytest.raises(ValueError, match="must not have the key 'checksums'"):
            checkpoints.save_tree(saved, 5, tree, {"checksums": 1})
        with pytest.raises(checkpoints.CheckpointError, match="not of a train state"):
            checkpoints.restore(saved, FakeState(**tree))
    assert_equal(found, tree)
    assert about == json.loads(json.dumps(metadata))


@dataclasses.dataclass
class FakeState:
    a: list
    b: jax.Array
    history: None = None
    skipped: None = None
    averages: None = None


def test_other_types_come_back_after_the_check(folder):
    like = jax.tree.map(lambda a: a.astype(jnp.float32) if a.ndim else a, make_state())
    with checkpoints.open_folder(folder) as saved:
        assert_equal(
            checkpoints.restore(saved, like).state,
            jax.tree.map(lambda a, b: a.astype(b.dtype), make_state(7), like),
        )


def test_the_state_may_be_donated_at_once(tmp_path):
    update = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    with checkpoints.open_folder(tmp_path) as saved:
        state = make_state(1)
        for _ in range(3):
            checkpoints.save(saved, state, data={}, config={})
            state = update(state)
        restored = checkpoints.restore(saved, make_state()).state
    assert_equal(restored, update(update(make_state(1))))


# One of two processes, with two devices each; each tells what it came back with.
PROCESS = """
import sys, warnings
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxdiff.training import checkpoints, TrainState

first = jax.process_index() == 0
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
whole = NamedSharding(sharding.mesh, PartitionSpec())
make = jax.jit(
    lambda step: TrainState(step, {"w": step * np.ones((8, 4), np.float32)}, (), {}),
    out_shardings=TrainState(whole, {"w": sharding}, (), {}),
)
with checkpoints.open_folder(sys.argv[3], keep=None) as saved:
    for step in (1, 2, 3, 4):
        checkpoints.save(saved, make(step), data={"next_index": step}, config={})
    saved.wait()
    if first:  # for all to see
        for path in (saved.path(4) / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:-9])
    multihost_utils.sync_global_devices("damaged")

    load = checkpoints.ocp.load_checkpointables
    def broken(path, like):  # for the second process only
        tree = load(path, like)
        if not first and path.name == "3":
            raise OSError("bad sector")
        return tree
    checkpoints.ocp.load_checkpointables = broken

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state, data, _ = checkpoints.restore_newest(saved, make(0))
    told = [str(w.message) for w in told if w.category is checkpoints.CheckpointWarning]
    assert len(told) == (2 if first else 0), told
    assert all(np.all(s.data == 2.0) for s in state.params["w"].addressable_shards)
    print("step", int(state.step), data["next_index"], saved.steps, told, flush=True)
    checkpoints.save(saved, make(3), data={"next_index": 3}, config={})
    saved.wait()
    checkpoints.ocp.load_checkpointables = load
    assert int(checkpoints.restore(saved, make(0)).state.step) == 3
"""


@pytest.mark.slow
def test_two_processes_take_the_same_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(i), str(tmp_path)],
            cwd=Path(__file__).parents[2], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
        assert "step 2 2 [1, 2]" in output
    assert names(tmp_path) == ["1", "2", "3", "3.damaged", "4.damaged"]


@pytest.fixture
def small_disk(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.name != "posix" or shutil.which("mount") is None:
        pytest.skip("no mount here")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def save_all(saved, steps):
    for step in steps:
        checkpoints.save(saved, make_state(step), data={}, config={})
    saved.wait()


@LEFTOVERS
# From nothing at all to just too little: other files of a checkpoint fail to be written.
@pytest.mark.parametrize("pages", [0, 5, 12])
def test_a_full_disk_is_told_and_harms_no_older_checkpoint(small_disk, pages):
    folder, filler = small_disk / "checkpoints", small_disk / "filler"
    with checkpoints.open_folder(folder, keep=1) as saved:
        checkpoints.save(saved, make_state(5), data={"next_index": 5}, config=CONFIG)
        saved.wait()
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(filler, filler.stat().st_size - 4096 * pages)
        expected = (
            rf"cannot save checkpoint {folder}/6. The older .* intact \(steps \[5\]\): make room, "
            r"or .* same command again. Cause: (?s:.*)No space left"
        )
        # At wait or at the next save; and the open folder does not give up, nor does a new one.
        for steps in ([6], [6, 7]):
            with pytest.raises(checkpoints.CheckpointError, match=expected):
                save_all(saved, steps)
            assert_equal(checkpoints.restore_newest(saved, make_state()).state, make_state(5))
    saved = checkpoints.open_folder(folder, keep=1)
    assert_equal(checkpoints.restore_newest(saved, make_state()).state, make_state(5))
    with pytest.raises(checkpoints.CheckpointError, match=expected), saved:
        checkpoints.save(saved, make_state(6), data={}, config={})
    filler.unlink()
    with checkpoints.open_folder(folder, keep=1) as saved:
        checkpoints.save(saved, make_state(6), data={}, config={})
        assert_equal(checkpoints.restore_newest(saved, make_state()).state, make_state(6))
    assert names(folder) == ["6"]


@LEFTOVERS
def test_a_folder_that_vanishes_is_told(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    with checkpoints.open_folder(tmp_path / "a") as saved:
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(checkpoints.CheckpointError, match=r"steps none.*a has vanished"):
            checkpoints.save(saved, make_state(8), data={}, config={})
    assert not (tmp_path / "a").exists()


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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the files that are open")
def test_saves_leave_no_files_and_threads_behind(tmp_path):
    def in_use():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    with checkpoints.open_folder(tmp_path, keep=2) as saved:
        for step in range(6):
            checkpoints.save(saved, make_state(step), data={}, config=CONFIG)
            saved.wait()
            if step == 2:  # threads that are kept and used again have been started
                before = in_use()
        assert in_use() <= before
