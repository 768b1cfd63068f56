"""Files of tensors, good and hostile. Those of PyTorch are written by hand, see `torch_bytes`."""

import json
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.interop import read_tensors, write_tensors
from tests.interop import torch_bytes as tb

WORDS = np.arange(12, dtype=np.float32)
KINDS = [
    *(np.float64, np.float32, np.float16, jnp.bfloat16, np.int64, np.int32, np.int16, np.int8),
    *(np.uint8, np.bool_, np.uint16, np.uint32, np.uint64, np.complex64, jnp.float8_e4m3fn),
]


def same(got, want):
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def raw_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# safetensors


def test_safetensors_come_back_with_their_dtypes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {np.dtype(k).name: rng.integers(0, 2, (2, 3)).astype(k) for k in KINDS}
    tensors |= {"scalar": np.float32(1.5), "empty": np.zeros((0, 3), np.int16), "ö/1": WORDS[::2]}
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    got = read_tensors(tmp_path / "a.safetensors")
    same(dict(sorted(got.items())), dict(sorted(tensors.items())))
    assert os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(ValueError, match="read-only"):
        got["float32"][0] = 1


def test_safetensors_of_known_bytes(tmp_path):
    header = {"b": entry(0, 8), "__metadata__": {"x": "y"}, "a": entry(8, 16, [2, 1])}
    path = raw_safetensors(tmp_path / "x", header, WORDS[:4].tobytes())
    same(read_tensors(path), {"b": WORDS[:2], "a": WORDS[2:4].reshape(2, 1)})


def test_safetensors_are_the_librarys_own(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(1)
    kinds = [np.dtype(k) for k in KINDS[:3] + KINDS[4:9]]
    tensors = {f"{k.name}.{i}": rng.integers(0, 9, (i, 3)).astype(k) for k in kinds for i in (1, 2)}
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    library.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    got = library.load_file(tmp_path / "ours")
    same(dict(sorted(got.items())), dict(sorted(tensors.items())))
    same(read_tensors(tmp_path / "theirs"), read_tensors(tmp_path / "ours"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": np.array(["x"])}, None, "tensor 'a' must have a dtype among .*, got <U1"),
        ({"a": np.zeros(2, np.complex128)}, None, "tensor 'a' .* got complex128"),
        ({3: WORDS}, None, "name of a tensor must be a string, got 3"),
        ({"__metadata__": WORDS}, None, "name of a tensor .* '__metadata__'"),
        ({"a": WORDS}, {"step": 3}, "metadata must map strings to strings"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, tensors, metadata, message):
    write_tensors(tmp_path / "a", {"old": WORDS})
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "a", tensors, metadata)
    same(read_tensors(tmp_path / "a"), {"old": WORDS})
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_tensors(tmp_path / "a", {"old": WORDS})

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(tmp_path / "a", {"new": WORDS})
    same(read_tensors(tmp_path / "a"), {"old": WORDS})
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 48), "b": entry(40, 56)}, 56, "'b', from byte 40 to 56, overlaps.*'a'"),
        ({"a": entry(0, 40), "b": entry(44, 48)}, 48, "'b', .* leaves a gap behind tensor 'a'"),
        ({"a": entry(0, 48)}, 44, "'a' ends at byte 48 of 44: the file is cut off"),
        ({"a": entry(0, 40)}, 48, "8 bytes behind tensor 'a' belong to no tensor"),
        ({"a": entry(0, 48, [11])}, 48, r"'a', F32 of shape \[11\], does not fill its 48 bytes"),
        ({"a": entry(0, 48, [-12])}, 48, "'a' must have a dtype, a shape and two data_offsets"),
        ({"a": entry(0, 48, [2.0, 6])}, 48, "'a' must have"),
        ({"a": entry(0, 48, [True, 12])}, 48, "'a' must have"),
        ({"a": entry(0, 0, [2**60, 2**60, 0])}, 0, "'a' must have"),
        ({"a": entry(0, 4, [1] * 70)}, 4, "'a' must have"),
        ({"a": {"dtype": "F32", "shape": [12]}}, 48, "'a' must have"),
        ({"a": [1, 2]}, 48, "'a' must have"),
        ({"a": entry(0, 48, dtype="F4")}, 48, "'a' must have a dtype among .*, got 'F4'"),
        ({"a": entry(0, 48, dtype=["F32"])}, 48, "'a' must have"),
        (b'{"a":1,"a":2}', 0, "header must be JSON: 'a' stands there twice"),
        (b"{" * 100_000, 0, "header must be JSON"),
        (b'{"\xff":1}', 0, "header must be JSON"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, size, message):
    path = raw_safetensors(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=rf"bad\.safetensors.*{message}"):
        read_tensors(path)


def test_safetensors_cut_off_anywhere_are_refused(tmp_path):
    write_tensors(tmp_path / "a", {"x": WORDS, "y": WORDS[:1]})
    whole = (tmp_path / "a").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut"):
            read_tensors(tmp_path / "cut")


def test_an_absurd_length_of_header_reserves_no_memory(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match=f"header is said to be {2**62} bytes long"):
        read_tensors(tmp_path / "a")


# Shards


def shards(tmp_path, weight_map):
    write_tensors(tmp_path / "1.safetensors", {"a": WORDS})
    tb.write_zip(
        tmp_path / "2.bin", tb.ordered(b=tb.tensor("Float", "0", 2, 0, [2], [1])), {"0": bytes(8)}
    )
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 56}, "weight_map": weight_map}))
    return path


def test_shards_are_put_together(tmp_path):
    path = shards(tmp_path, {"b": "2.bin", "a": "1.safetensors"})
    same(read_tensors(path), {"b": np.zeros(2, np.float32), "a": WORDS})


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "c": "2.bin"}, "2.bin: tensor 'b' is not expected here"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "tensor 'b' is missing"),
        ({"a": "../1.safetensors"}, "tensor 'a' must be in a file beside it, got '../1"),
        ({"a": "/etc/passwd"}, "tensor 'a' must be in a file beside it"),
        ({"a": "model.safetensors.index.json"}, "tensor 'a' must be in a file beside it"),
        ({"a": "3.safetensors"}, "names 3.safetensors, which is not beside it"),
        ({"a": 1}, "must map names of tensors to names of files"),
        ([1], "must be the index of a sharded checkpoint"),
    ],
)
def test_bad_indices_are_refused(tmp_path, weight_map, message):
    with pytest.raises(ValueError, match=message):
        read_tensors(shards(tmp_path, weight_map))


# torch.save

SAVED = tb.ordered(
    plain=tb.tensor("Float", "0", 12, 0, [3, 4], [4, 1]),
    turned=tb.tensor("Float", "0", 12, 1, [3, 3], [1, 4]),
    scalar=tb.tensor("Float", "0", 12, 7, [], []),
    one=tb.tensor("Float", "0", 12, 11, [1, 1], [99, 1]),
    spread=tb.tensor("Float", "0", 12, 5, [2, 3], [0, 0]),
    none=tb.tensor("Float", "0", 12, 0, [0, 3], [3, 1]),
    low=tb.tensor("BFloat16", "7", 2, 0, [2], [1]),
    nested=b"}(" + tb.string("deep") + b"]" + tb.tensor("Long", "8", 1, 0, [1], [1]) + b"a" + b"u",
    step=tb.integer(3),
)
BYTES = {
    "0": WORDS.tobytes(),
    "7": np.array([1.5, -2], jnp.bfloat16).tobytes(),
    "8": np.int64([2**40]).tobytes(),
}
WANTED = {
    "plain": WORDS.reshape(3, 4),
    "turned": WORDS[1:].reshape(-1)[np.arange(3)[:, None] + 4 * np.arange(3)],
    "scalar": WORDS[7],
    "one": WORDS[11:].reshape(1, 1),
    "spread": np.full((2, 3), 5, np.float32),
    "none": np.zeros((0, 3), np.float32),
    "low": np.array([1.5, -2], jnp.bfloat16),
    "nested.deep.0": np.int64([2**40]),
}


def write_old_mixed(path, saved=SAVED, storages=BYTES):
    tb.write_old(path, saved, storages, itemsize=1)
    data = path.read_bytes()
    for key, size in (("7", 2), ("8", 8)):  # entries are counted, not bytes
        raw = storages[key]
        data = data.replace(
            struct.pack("<q", len(raw)) + raw, struct.pack("<q", len(raw) // size) + raw
        )
    raw = storages["0"]
    path.write_bytes(
        data.replace(struct.pack("<q", len(raw)) + raw, struct.pack("<q", len(raw) // 4) + raw)
    )


@pytest.mark.parametrize("form", ["zip", "old"])
def test_both_formats_of_torch_with_strides_offsets_and_shared_memory(tmp_path, form):
    path = tmp_path / "a.safe.pth"
    tb.write_zip(path, SAVED, BYTES) if form == "zip" else write_old_mixed(path)
    got = read_tensors(path)
    same(got, WANTED)
    assert np.shares_memory(got["plain"], got["turned"])
    assert not any(tensor.flags.writeable for tensor in got.values() if tensor.size)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_torch_files_cut_off_anywhere_are_refused(tmp_path, form):
    path = tmp_path / "cut.pth"
    saved = tb.ordered(a=tb.tensor("Float", "0", 2, 0, [2], [1]))
    (tb.write_zip if form == "zip" else tb.write_old)(path, saved, {"0": bytes(8)})
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            read_tensors(path)


def one(kind="Float", key="0", size=2, offset=0, shape=(2,), strides=(1,)):
    return tb.ordered(a=tb.tensor(kind, key, size, offset, shape, strides))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (one(offset=1), "tensor 'a' of shape .* offset 1 lies outside of its storage 0"),
        (one(strides=(2,)), "tensor 'a' .* strides .* lies outside"),
        (one(shape=(2, 2**30, 2**30), strides=(1, 0, 0)), "tensor 'a' .* lies outside"),
        (one(shape=(-2,)), "its pickle calls .*_rebuild_tensor_v2"),
        (one(strides=(-1,)), "its pickle calls"),
        (one(strides=(1, 1)), "its pickle calls"),
        (one(size=3), "tensor 'a': its storage 0 must have 12 bytes, got 8"),
        (one(size=-1), "is no storage"),
        (one(key="1"), "tensor 'a': its storage 1 is missing"),
        (one(kind="Complex"), "mentions torch.ComplexStorage, .* nothing was executed"),
        (tb.integer(3), "there is no tensor in it"),
        (tb.name_of("os", "system") + tb.tuple_of(tb.string("x")) + b"R", "mentions os.system"),
        (tb.string("os") + tb.string("system") + b"\x93", "mentions os.system"),
        (tb.name_of("collections", "OrderedDict") + tb.tuple_of(tb.integer(1)) + b"R", "calls"),
        (tb.name_of("torch", "FloatStorage") + tb.tuple_of(tb.integer(9)) + b"R", "calls"),
        (tb.integer(1) + tb.integer(1) + b"R", "calls 1 with 1"),
        (b"}" + tb.name_of("torch", "FloatStorage") + b"\x81", "instruction NEWOBJ"),
        (b"(ios\nsystem\n", "instruction INST, .* refused"),
        (tb.integer(1) + b"}b", "sets attributes of 1"),
        (tb.string("x") + b"Q", "refers to 'x', which is no storage"),
        (b"}(" + 2 * (tb.string("k") + b"N") + b"u", "has the key 'k' twice"),
        (b"}(" + b")N" + b"u", r"a dictionary with the key \(\)"),
        (b"h\x05", "damaged or cut off"),
        (b"t", "damaged or cut off"),
        (b"](" + tb.integer(1), "damaged or cut off"),
        (b"\x80", "damaged or cut off"),
    ],
)
def test_pickles_that_do_anything_else_are_refused(tmp_path, saved, message):
    path = tmp_path / "bad.pth"
    tb.write_zip(path, saved, {"0": bytes(8)})
    with pytest.raises(ValueError, match=rf"bad\.pth: (.*{message})"):
        read_tensors(path)


def test_dictionaries_within_themselves_end(tmp_path):
    loop = b"}q\x00(" + tb.string("again") + b"h\x00u"
    laughs = b"}q\x00"  # each dictionary ten times in the next: 10^20 places, no tensor
    for i in range(20):
        inner = b"".join(tb.string(str(k)) + b"h" + bytes([i]) for k in range(10))
        laughs += b"}(" + inner + b"uq" + bytes([i + 1])
    for saved in (loop, tb.tuple_of(laughs)):
        tb.write_zip(tmp_path / "a.pth", saved, {})
        with pytest.raises(ValueError, match="nested too deeply"):
            read_tensors(tmp_path / "a.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pth", "a.ckpt"])
def test_nothing_is_executed(tmp_path, protocol, name):
    mark = tmp_path / "executed"
    evil = pickle.dumps({"a": Evil(mark)}, protocol=protocol)
    (tmp_path / name).write_bytes(evil)
    with pytest.raises(ValueError, match=r"no safetensors file but a pickle|mentions .*open"):
        read_tensors(tmp_path / name)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
    with pytest.raises(ValueError, match=r"no safetensors file but a zip|mentions .*open"):
        read_tensors(tmp_path / name)
    assert not mark.exists()
    pickle.loads(evil)["a"].close()
    assert mark.exists()  # it would have


def test_zips_that_are_not_torchs_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(ValueError, match="is another zip archive"):
        read_tensors(path)
    tb.write_zip(path, one(), {"0": bytes(8)}, byteorder="big")
    with pytest.raises(ValueError, match="little-endian"):
        read_tensors(path)
    tb.write_zip(path, one(size=2**20), {"0": bytes(2**22)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(path)


@pytest.mark.parametrize("text", [b"", b"version https://git-lfs.github.com/spec/v1", b"{}", b"[]"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.safetensors").write_bytes(text)
    with pytest.raises(ValueError, match=r"a\.safetensors must be"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        read_tensors("nowhere.safetensors")


# Against PyTorch


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("new", [True, False])
def test_reads_what_torch_saves(tmp_path, new, protocol):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    kinds = [
        *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool),
    ]
    saved = {
        "state_dict": network.state_dict(),
        "views": [base, base.T, base[1:, ::2], base[0, 0].expand(3, 2)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "kinds": {str(kind): torch.tensor([[0, 1]], dtype=kind) for kind in kinds},
        "step": 7,
        "lr": 1e-3,
        "none": None,
    }
    options = dict(_use_new_zipfile_serialization=new, pickle_protocol=protocol)
    torch.save(saved, tmp_path / "a.ckpt", **options)
    got = read_tensors(tmp_path / "a.ckpt")
    wanted = {f"state_dict.{name}": tensor for name, tensor in saved["state_dict"].items()}
    wanted |= {f"views.{i}": tensor for i, tensor in enumerate(saved["views"])}
    wanted |= {"parameter": saved["parameter"].detach()}
    wanted |= {f"kinds.{kind}": tensor for kind, tensor in saved["kinds"].items()}
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert str(got[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(got[name].astype(np.float64), tensor.double().numpy())
