import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
from sklearn.datasets import load_digits

from jaxdiff.data import _libraries, digits, from_tfds, in_memory


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    digits.prepare(data_dir)
    return data_dir


def test_digits_are_those_of_scikit_learn(digits_dir):
    source = from_tfds("digits", data_dir=digits_dir)
    original = load_digits()
    assert len(source) == 1797
    read = in_memory(source)
    assert read.images.shape == (1797, 8, 8, 1)
    assert read.images.dtype == np.uint8
    exact = np.floor(original.images * 255 / 16 + 0.5)  # exact in float64: multiples of 1/16
    np.testing.assert_array_equal(read.images[..., 0], exact)
    np.testing.assert_array_equal(read.labels, original.target)
    assert source[7]["label"] == original.target[7]
    assert "tensorflow" not in sys.modules


def test_digits_are_an_ordinary_tfds_data_set(digits_dir):
    tfds = _libraries.require("tensorflow_datasets")
    builder = tfds.builder("digits", data_dir=digits_dir)
    assert builder.info.full_name == "digits/1.0.0"
    assert builder.info.features["label"].num_classes == 10
    assert builder.info.splits["train"].num_examples == 1797
    assert "UCI" in builder.info.citation


def test_digits_are_prepared_once_and_quietly(tmp_path, capfd):
    path = digits.prepare(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert digits.prepare(tmp_path) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert [entry.name for entry in path.parent.iterdir()] == ["1.0.0"]  # nothing is left behind
    assert capfd.readouterr() == ("", "")


def test_digits_survive_that_another_process_is_first(tmp_path, monkeypatch):
    write = digits._write

    def write_late(builder_cls, root):
        staged = write(builder_cls, root)
        monkeypatch.setattr(digits, "_write", write)
        digits.prepare(tmp_path)
        return staged

    monkeypatch.setattr(digits, "_write", write_late)
    path = digits.prepare(tmp_path)
    assert [entry.name for entry in path.parent.iterdir()] == ["1.0.0"]
    assert len(from_tfds("digits", data_dir=tmp_path)) == 1797


def test_digits_are_prepared_by_two_processes_at_once(tmp_path):
    code = "import sys, jaxdiff.data as d; print(len(d.from_tfds('digits', data_dir=sys.argv[1])))"
    command = [sys.executable, "-c", code, tmp_path]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["1797", "1797"]
    assert [entry.name for entry in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_digits_interrupted_leave_nothing(tmp_path, monkeypatch):
    write = digits._write

    def interrupted(builder_cls, root):
        write(builder_cls, root)
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits.prepare(tmp_path)
    assert list((tmp_path / "digits").iterdir()) == []


def test_digits_say_where_they_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the digits data set to .*TFDS_DATA_DIR"):
        from_tfds("digits", data_dir=tmp_path / "file" / "below")


def test_digits_are_written_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert digits.prepare("~/data") == tmp_path / "data" / "digits" / "1.0.0"
