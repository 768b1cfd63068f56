import sys
import types

import numpy as np
import pytest

from jaxdiff.data import sources


def arrays(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def test_arrays_give_their_examples():
    images = arrays(5, 4, 3, 1)
    source = sources.from_arrays(images, np.arange(5)[::-1])
    assert len(source) == 5
    np.testing.assert_array_equal(source[3]["image"], images[3])
    assert source[3]["label"] == 1
    np.testing.assert_array_equal(source.gather([4, 4, 0])["label"], [0, 0, 4])
    assert "label" not in sources.from_arrays(images)[0]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), None, "must be uint8, got float32"),
        (np.zeros((2, 4, 4), np.uint8), None, r"got shape \(2, 4, 4\).*images\[..., None\]"),
        (np.zeros((0, 4, 4, 1), np.uint8), None, "must not be empty"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int), r"shape \(2,\).*got int64 .*\(3,\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "must be integers.*float64"),
    ],
)
def test_arrays_are_checked(images, labels, message):
    with pytest.raises(ValueError, match=message):
        sources.from_arrays(images, labels)


def as_list(images):
    return [{"image": image, "label": i} for i, image in enumerate(images)]


def test_in_memory_reads_any_source():
    images = arrays(600, 2, 3, 1)  # more than two chunks
    read = sources.in_memory(as_list(images))
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, np.arange(600))
    assert sources.in_memory(read) is read


def test_in_memory_refuses_what_is_too_large():
    source = as_list(arrays(10, 4, 4, 1))
    assert len(sources.in_memory(source, max_bytes=160)) == 10
    with pytest.raises(ValueError, match=r"10 images .* need 160 bytes, more than max_bytes=159"):
        sources.in_memory(source, max_bytes=159)


def test_in_memory_names_the_image_at_fault():
    with pytest.raises(ValueError, match="the source is empty"):
        sources.in_memory([])
    with pytest.raises(ValueError, match=r"image 0 has \(4, 4, 1\) and image 1 has \(4, 5, 1\)"):
        sources.in_memory(as_list([np.zeros((4, 4, 1), np.uint8), np.zeros((4, 5, 1), np.uint8)]))
    shapes = [(4, 4, 1)] * 256 + [(4, 5, 1)] * 9  # differ from one chunk to the next
    with pytest.raises(ValueError, match=r"image 0 has \(4, 4, 1\) and image 256 has \(4, 5, 1\)"):
        sources.in_memory(as_list([np.zeros(shape, np.uint8) for shape in shapes]))
    with pytest.raises(ValueError, match=r"image 0 must be uint8 .* got float64"):
        sources.in_memory(as_list([np.zeros((4, 4, 1))]))


def test_in_memory_shows_progress_on_a_terminal(monkeypatch):
    told = []
    bar = types.SimpleNamespace(update=told.append)

    class Tqdm:
        def __init__(self, total, **_):
            assert total == 600

        def __enter__(self):
            return bar

        def __exit__(self, *_):
            return None

    pytest.importorskip("tqdm")
    monkeypatch.setattr("tqdm.tqdm", Tqdm)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    sources.in_memory(as_list(arrays(600, 2, 2, 1)))
    assert sum(told) == 600
