import json
import sys

import numpy as np
import pytest

pytest.importorskip("grain")

from jaxdiff.data import sources
from jaxdiff.data.pipeline import make_pipeline


def numbered(count, shape=(2, 3, 1)):
    """A source whose example i is told by its label, i, and whose pixels are random."""
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    return sources.from_arrays(images, np.arange(count))


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def join(batches, key="x0"):
    return np.concatenate([batch[key] for batch in batches])


AUGMENTED = {"seed": 3, "flip": True, "dequantize": True}


def test_all_pixel_values_are_scaled_to_float32():
    source = sources.from_arrays(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1))
    (batch,) = take(make_pipeline(source, batch_size=1, seed=0), 1)
    assert list(batch) == ["x0"]
    assert batch["x0"].dtype == np.float32
    exact = np.arange(256) / 127.5 - 1
    np.testing.assert_allclose(batch["x0"].ravel(), exact, rtol=0, atol=1e-7)
    assert batch["x0"].min() == -1
    assert batch["x0"].max() == 1


def test_batches_carry_shapes_types_and_labels():
    source = numbered(10)
    (batch,) = take(make_pipeline(source, batch_size=4, seed=0), 1)
    assert batch["x0"].shape == (4, 2, 3, 1)
    assert batch["cond"].shape == (4,)
    assert batch["cond"].dtype == np.int32
    expected = source.images[batch["cond"]] / 127.5 - 1
    np.testing.assert_allclose(batch["x0"], expected, rtol=0, atol=1e-7)


def test_dequantisation_is_uniform_within_a_pixel_value():
    source = numbered(100, (8, 8, 3))
    (batch,) = take(make_pipeline(source, batch_size=100, seed=0, dequantize=True), 1)
    noise = (batch["x0"].astype(np.float64) + 1) * 128 - source.images[batch["cond"]]
    assert batch["x0"].min() >= -1
    assert batch["x0"].max() <= 1
    assert noise.min() >= 0
    assert noise.max() <= 1  # 255 + U may round up to 256 in float32
    # Kolmogorov's statistic of 19,200 draws exceeds 2/sqrt(n) with probability 7e-4.
    ranks = np.arange(noise.size) / noise.size
    assert np.abs(np.sort(noise.ravel()) - ranks).max() < 2 / np.sqrt(noise.size)
    assert np.unique(noise.reshape(100, -1)[:, 0]).size == 100  # differs between examples


def test_flips_mirror_half_of_the_examples():
    source = numbered(400)
    (batch,) = take(make_pipeline(source, batch_size=400, seed=0, flip=True), 1)
    plain = np.float32(source.images[batch["cond"]]) / np.float32(127.5) - 1
    same = (batch["x0"] == plain).all(axis=(1, 2, 3))
    mirrored = (batch["x0"] == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 200) < 4 * 10  # four standard deviations: fails 6 times in 1e5
    (other,) = take(make_pipeline(source, batch_size=400, seed=0, flip=True, dequantize=True), 1)
    unmirrored = np.where(mirrored[:, None, None, None], plain[:, :, ::-1], plain)
    np.testing.assert_allclose(other["x0"], unmirrored, atol=1.01 / 128)  # the same are flipped


def test_flips_leave_the_source_alone():
    source = numbered(8)
    images = source.images.copy()
    take(make_pipeline(source, batch_size=8, flip=True, seed=0, num_epochs=4), 4)
    np.testing.assert_array_equal(source.images, images)


def test_padding_is_symmetric_background():
    source = numbered(4, (28, 27, 1))
    (batch,) = take(make_pipeline(source, batch_size=4, seed=0, shuffle=False, pad_to=32), 1)
    assert batch["x0"].shape == (4, 32, 32, 1)
    inside = batch["x0"][:, 2:30, 2:29]
    np.testing.assert_allclose(inside, source.images / 127.5 - 1, rtol=0, atol=1e-7)
    assert (batch["x0"] == -1).sum() == 4 * (32 * 32 - 28 * 27) + (source.images == 0).sum()


def test_volumes_are_batched_padded_and_flipped_along_their_width():
    source = numbered(6, (2, 4, 3, 1))
    options = {"batch_size": 6, "seed": 0, "shuffle": False}
    (plain,) = take(make_pipeline(source, **options), 1)
    (batch,) = take(make_pipeline(source, flip=True, pad_to=5, **options), 1)
    inside = batch["x0"][:, 1:3, :4, 1:4]
    for got, volume in zip(inside, plain["x0"], strict=True):
        assert (got == volume).all() or (got == volume[:, :, ::-1]).all()


@pytest.mark.parametrize(
    ("shape", "pad_to", "shrink"),
    [((6, 4, 3), None, 2), ((5, 3, 1), 6, 3), ((12, 12, 1), None, 6), ((4, 2, 6, 2), None, 2)],
)
def test_small_images_are_rounded_means_of_padded_ones(shape, pad_to, shrink):
    source = numbered(30, shape)
    options = {"batch_size": 30, "seed": 0, "flip": True, "pad_to": pad_to}
    (large,) = take(make_pipeline(source, **options), 1)
    (small,) = take(make_pipeline(source, shrink=shrink, **options), 1)
    pixels = np.rint((large["x0"].astype(np.float64) + 1) * 127.5)
    for axis in range(1, len(shape)):  # a mean of means of blocks of one size is their mean
        halves = np.split(pixels, pixels.shape[axis] // shrink, axis)
        pixels = np.concatenate([half.mean(axis, keepdims=True) for half in halves], axis)
    assert (small["x0"].shape == np.array(pixels.shape)).all()
    exact = np.round(np.round(pixels, 9)) / 127.5 - 1  # np.round: a half to the even neighbour
    np.testing.assert_allclose(small["x0"], exact, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(small["cond"], large["cond"])
    (noisy,) = take(make_pipeline(source, shrink=shrink, dequantize=True, **options), 1)
    noise = (noisy["x0"].astype(np.float64) + 1) * 128 - np.rint((small["x0"] + 1.0) * 127.5)
    assert noise.min() >= 0
    assert noise.max() <= 1  # one level of the small image
    assert noise.std() == pytest.approx(12**-0.5, rel=0.1)


# Order


def test_without_shuffling_the_order_is_the_sources_across_epochs():
    batches = take(make_pipeline(numbered(5), batch_size=3, seed=0, shuffle=False), 5)
    np.testing.assert_array_equal(join(batches, "cond"), np.arange(15) % 5)


def test_each_epoch_is_another_permutation():
    labels = join(take(make_pipeline(numbered(50), batch_size=10, seed=0), 20), "cond")
    epochs = labels.reshape(4, 50)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(50), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(epochs[0]) != tuple(range(50))


def test_seeds_differ_and_neighbours_share_no_epoch():
    orders = [
        join(take(make_pipeline(numbered(50), batch_size=50, seed=seed), 4), "cond").reshape(4, 50)
        for seed in range(4)
    ]
    assert len({tuple(epoch) for epochs in orders for epoch in epochs}) == 16


def test_the_order_is_fixed_for_ever():
    # The numbers are a promise: a change would alter every run that is resumed.
    labels = join(take(make_pipeline(numbered(6), batch_size=6, seed=7), 2), "cond")
    raw = np.random.Philox(
        key=np.random.SeedSequence(7, spawn_key=(1,)).generate_state(2, np.uint64), counter=0
    ).random_raw(6)
    np.testing.assert_array_equal(labels[:6], np.argsort(raw))


def test_every_place_is_equally_likely():
    # 2000 epochs of 4: the 16 counts have expectation 500, standard deviation 19.4.
    batches = take(make_pipeline(numbered(4), batch_size=8000, seed=0), 1)
    epochs = batches[0]["cond"].reshape(2000, 4)
    counts = [(epochs[:, place] == label).sum() for place in range(4) for label in range(4)]
    assert np.abs(np.array(counts) - 500).max() < 5 * 19.4


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
def test_examples_do_not_depend_on_the_batch_size(batch_size):
    source = numbered(13)
    reference = take(make_pipeline(source, batch_size=84, **AUGMENTED), 5)
    got = take(make_pipeline(source, batch_size=batch_size, **AUGMENTED), 420 // batch_size)
    for key in ("x0", "cond"):
        np.testing.assert_array_equal(join(got, key), join(reference, key))


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 8, "prefetch": 16}])
def test_examples_do_not_depend_on_threads(options):
    source = numbered(13)
    reference = take(make_pipeline(source, batch_size=5, **AUGMENTED), 30)
    got = take(make_pipeline(source, batch_size=5, **AUGMENTED, **options), 30)
    np.testing.assert_array_equal(join(got), join(reference))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_each_batch(process_count):
    source = numbered(13)
    whole = take(make_pipeline(source, batch_size=8, **AUGMENTED), 9)
    parts = [
        take(
            make_pipeline(
                source, batch_size=8, process_index=p, process_count=process_count, **AUGMENTED
            ),
            9,
        )
        for p in range(process_count)
    ]
    for step, batch in enumerate(whole):
        for key in ("x0", "cond"):
            np.testing.assert_array_equal(join([part[step] for part in parts], key), batch[key])


@pytest.mark.slow
def test_examples_do_not_depend_on_workers():
    source = numbered(13)
    reference = take(make_pipeline(source, batch_size=5, **AUGMENTED), 12)
    iterator = make_pipeline(source, batch_size=5, worker_count=2, **AUGMENTED)
    np.testing.assert_array_equal(join([next(iterator) for _ in range(7)]), join(reference[:7]))
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    iterator = make_pipeline(source, batch_size=5, worker_count=2, **AUGMENTED)
    iterator.set_state(state)
    np.testing.assert_array_equal(join(take(iterator, 5)), join(reference[7:]))


def test_sources_give_the_same_however_they_are_kept():
    source = numbered(13)
    lazy = [source[i] for i in range(13)]  # a bare list, without gather
    reference = take(make_pipeline(source, batch_size=5, **AUGMENTED), 6)
    got = take(make_pipeline(lazy, batch_size=5, **AUGMENTED), 6)
    for key in ("x0", "cond"):
        np.testing.assert_array_equal(join(got, key), join(reference, key))


def test_small_sources_repeat_within_a_batch():
    (batch,) = take(make_pipeline(numbered(3), batch_size=8, seed=0), 1)
    np.testing.assert_array_equal(np.sort(batch["cond"][:6].reshape(2, 3)), [[0, 1, 2]] * 2)
    (batch,) = take(make_pipeline(numbered(1), batch_size=4, seed=0), 1)
    assert (batch["x0"] == batch["x0"][:1]).all()


def test_epochs_end_and_lose_only_the_last_remainder():
    batches = list(make_pipeline(numbered(5), batch_size=4, seed=0, num_epochs=3))
    assert len(batches) == 3  # 15 examples: 3 batches, 3 left over
    np.testing.assert_array_equal(np.sort(join(batches, "cond")[:10].reshape(2, 5))[0], range(5))


# State


def test_state_is_the_number_of_batches():
    iterator = make_pipeline(numbered(13), batch_size=5, **AUGMENTED)
    assert iterator.get_state() == {"next_index": 0}
    next(iterator)
    next(iterator)
    assert iterator.get_state() == {"next_index": 2}
    iterator.close()


def test_a_run_resumes_exactly_from_anywhere():
    source = numbered(13)
    reference = take(make_pipeline(source, batch_size=6, **AUGMENTED), 8)
    iterator = make_pipeline(source, batch_size=6, **AUGMENTED)
    states = []
    for _ in reference:
        states.append(json.dumps(iterator.get_state()))
        next(iterator)
    for start in (5, 0, 3, 7):  # the same iterator may also be turned back
        iterator.set_state(json.loads(states[start]))
        np.testing.assert_array_equal(next(iterator)["x0"], reference[start]["x0"])
    iterator.close()
    for start, state in enumerate(states):
        fresh = make_pipeline(source, batch_size=6, **AUGMENTED)
        fresh.set_state(json.loads(state))
        np.testing.assert_array_equal(join(take(fresh, 8 - start)), join(reference[start:]))


def test_a_run_resumes_with_another_number_of_processes():
    source = numbered(13)
    iterator = make_pipeline(source, batch_size=6, **AUGMENTED)
    for _ in range(4):
        next(iterator)
    parts = [
        make_pipeline(source, batch_size=6, process_index=p, process_count=2, **AUGMENTED)
        for p in range(2)
    ]
    for part in parts:
        part.set_state(iterator.get_state())
    got = [take(part, 1)[0] for part in parts]
    np.testing.assert_array_equal(join(got), take(iterator, 1)[0]["x0"])


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"num_threads": -1}, "num_threads must be at least 0"),
        ({"prefetch": -1}, "prefetch must be at least 0"),
        ({"worker_count": -1}, "worker_count must be at least 0"),
        ({"process_count": 0}, "process_count must be at least 1"),
        ({"process_index": 2, "process_count": 2}, r"process_index must be in 0 .. 1 .*got 2"),
        ({"batch_size": 5, "process_count": 2}, "a multiple of process_count=2, got 5"),
        ({"batch_size": 11, "num_epochs": 2}, "2 epochs of 5 examples do not fill one batch of 11"),
        ({"shrink": 0}, "shrink must be at least 1, got 0"),
        ({"shrink": 2}, r"shrink must divide the images' size \(2, 3\), got 2: pad them"),
        ({"shrink": 3, "pad_to": 4}, r"shrink must divide the images' size \(4, 4\), got 3"),
        ({"pad_to": 2}, r"pad_to must be at least the images' size \(2, 3\), got 2"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(numbered(5), **{"batch_size": 4, "seed": 0, **options})


def test_sources_are_checked():
    with pytest.raises(ValueError, match="the source is empty"):
        make_pipeline([], batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"image 0 must be uint8 .* got float32 of shape"):
        make_pipeline([{"image": np.zeros((2, 2, 1), np.float32)}], batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"image 0 must be uint8 .* got uint8 of shape \(4,\)"):
        make_pipeline([{"image": np.zeros(4, np.uint8)}], batch_size=1, seed=0)
    sequences = sources.from_sequences(np.zeros((2, 4, 2)), np.ones((2, 4), bool))
    for options in ({"shrink": 2}, {"flip": True}, {"pad_to": 8}, {"dequantize": True}):
        with pytest.raises(ValueError, match="are for images, and the source has sequences"):
            make_pipeline(sequences, batch_size=1, seed=0, **options)
    mixed = [{"image": np.zeros((2, width, 1), np.uint8)} for width in (3, 4)]
    for batch_size in (1, 2):
        iterator = make_pipeline(mixed, batch_size=batch_size, seed=0, shuffle=False)
        with pytest.raises(ValueError, match="must have one shape"):
            take(iterator, 2)
        iterator.close()


def test_a_missing_grain_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r'needs grain here: pip install "jaxdiff\[data\]"'):
        make_pipeline(numbered(5), batch_size=4, seed=0)
