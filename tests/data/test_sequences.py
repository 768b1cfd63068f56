"""Sequences as a source, and the pipeline that leaves them as they are."""

import numpy as np
import pytest

from jaxdiff.data import from_arrays, from_sequences, in_memory, make_pipeline

MASK = np.arange(4)[None] < np.array([[4], [1], [2], [3], [2]])
X0 = np.linspace(-1, 1, 5 * 4 * 2).reshape(5, 4, 2)


def test_batches_are_the_examples_in_the_order_of_images():
    vector = np.arange(10.0).reshape(5, 2)
    batches = make_pipeline(from_sequences(X0, MASK, vector), batch_size=3, seed=7)
    images = from_arrays(np.zeros((5, 2, 2, 1), np.uint8), np.arange(5))
    order = make_pipeline(images, batch_size=3, seed=7)
    for _ in range(4):  # across the ends of epochs
        batch, which = next(batches), next(order)["cond"]
        np.testing.assert_array_equal(batch["x0"], X0[which].astype(np.float32))
        np.testing.assert_array_equal(batch["mask"], MASK[which][..., None])
        np.testing.assert_array_equal(batch["cond"]["mask"], MASK[which])
        np.testing.assert_array_equal(batch["cond"]["vector"], vector[which])
    assert batch["x0"].dtype == np.float32


def test_one_example_and_memory():
    source = from_sequences(X0, MASK)
    assert len(source) == 5
    assert in_memory(source) is source
    assert source[3]["cond"].keys() == {"mask"}
    np.testing.assert_array_equal(source[3]["mask"][:, 0], MASK[3])


def test_padding_may_hold_anything():
    x0 = np.where(MASK[..., None], X0, np.nan)
    assert np.isnan(from_sequences(x0, MASK)[1]["x0"][1:]).all()


def test_images_are_not_cropped_and_shares_are_shares():
    with pytest.raises(ValueError, match="for sequences"):
        make_pipeline(from_arrays(np.zeros((2, 2, 2, 1), np.uint8)), batch_size=1, seed=0, crop=0.1)
    with pytest.raises(ValueError, match=r"crop must lie in \[0, 1\]"):
        make_pipeline(from_sequences(X0, MASK), batch_size=1, seed=0, crop=1.5)


@pytest.mark.parametrize(
    ("x0", "mask", "vector", "message"),
    [
        (X0[..., 0], MASK, None, r"x0 must be \(N, L, C\).*\(5, 4\)"),
        (X0, MASK.astype(int), None, "mask must be bool"),
        (X0, MASK[:, :3], None, r"shape \(5, 4\)"),
        (X0, MASK & (np.arange(5) != 2)[:, None], None, "sequence 2 has no data"),
        (X0, np.roll(MASK, 1, axis=1), None, "True up to a sequence's end"),
        (2 * X0, MASK, None, r"\[-1, 1\]"),
        (np.full_like(X0, np.nan), MASK, None, r"\[-1, 1\]"),
        (X0, MASK, np.zeros(5), r"vector must be \(5, D\)"),
    ],
)
def test_what_does_not_fit_is_refused(x0, mask, vector, message):
    with pytest.raises(ValueError, match=message):
        from_sequences(x0, mask, vector)


def test_crops_are_parts_and_say_so():
    numbers = np.arange(20.0).reshape(5, 4, 1) / 20
    batches = make_pipeline(from_sequences(numbers, MASK), batch_size=7, seed=1, crop=0.7)
    whole = make_pipeline(from_sequences(numbers, MASK), batch_size=7, seed=1)
    seen = set()
    for _ in range(200):
        batch, source = next(batches), next(whole)
        parts = zip(batch["x0"], batch["cond"]["mask"], batch["cond"]["crop"], strict=True)
        for (x0, mask, (before, behind)), original, n in zip(
            parts, source["x0"], source["cond"]["mask"].sum(1), strict=True
        ):
            before, behind, length = int(before), int(behind), mask.sum()
            assert before + length + behind == n
            assert mask[:length].all()
            np.testing.assert_array_equal(x0[:length], original[before : before + length])
            assert not x0[length:].any()
            seen.add((int(n), before, behind))
    # Every part of every length: of n entries n (n + 1) / 2.
    assert len(seen) == 1 + 3 + 6 + 10


def test_as_many_are_cropped_as_asked_for():
    """Of 20,000 sequences of 4, 0.7 are cut, 1/16 of them to the whole. False alarms: 1e-6."""
    source = from_sequences(np.zeros((1, 4, 1)), np.ones((1, 4), bool))
    (batch,) = list(make_pipeline(source, batch_size=20_000, seed=0, crop=0.7, num_epochs=20_000))
    before, behind = batch["cond"]["crop"].T
    # A part is whole if it starts at the first (1/4) and ends at the last (1/4).
    share = 0.7 * (1 - 1 / 16)
    bound = 4.9 * np.sqrt(share * (1 - share) / 20_000)
    assert abs(np.mean((before > 0) | (behind > 0)) - share) < bound
    starts = 0.7 / 4 * np.ones(3)
    assert np.all(np.abs([np.mean(before == k) for k in (1, 2, 3)] - starts) < 4.9 * 0.0027)


def test_what_is_cropped_depends_on_the_position_alone():
    source = from_sequences(X0, MASK)
    whole = next(make_pipeline(source, batch_size=6, seed=3, crop=0.5))
    parts = make_pipeline(source, batch_size=3, seed=3, crop=0.5)
    for rows in (slice(0, 3), slice(3, 6)):
        part = next(parts)
        np.testing.assert_array_equal(part["x0"], whole["x0"][rows])
        np.testing.assert_array_equal(part["cond"]["crop"], whole["cond"]["crop"][rows])


@pytest.mark.parametrize("option", [{"flip": True}, {"dequantize": True}, {"pad_to": 8}])
def test_options_of_images_are_refused(option):
    with pytest.raises(ValueError, match="for images"):
        make_pipeline(from_sequences(X0, MASK), batch_size=2, seed=0, **option)
