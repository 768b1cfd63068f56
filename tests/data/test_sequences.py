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


@pytest.mark.parametrize(
    ("x0", "mask", "vector", "message"),
    [
        (X0[..., 0], MASK, None, r"x0 must be \(N, L, C\).*\(5, 4\)"),
        (X0, MASK.astype(int), None, "mask must be bool"),
        (X0, MASK[:, :3], None, r"shape \(5, 4\)"),
        (X0, MASK & (np.arange(5) != 2)[:, None], None, "sequence 2 has no data"),
        (2 * X0, MASK, None, r"\[-1, 1\]"),
        (np.full_like(X0, np.nan), MASK, None, r"\[-1, 1\]"),
        (X0, MASK, np.zeros(5), r"vector must be \(5, D\)"),
    ],
)
def test_what_does_not_fit_is_refused(x0, mask, vector, message):
    with pytest.raises(ValueError, match=message):
        from_sequences(x0, mask, vector)


@pytest.mark.parametrize("option", [{"flip": True}, {"dequantize": True}, {"pad_to": 8}])
def test_options_of_images_are_refused(option):
    with pytest.raises(ValueError, match="for images"):
        make_pipeline(from_sequences(X0, MASK), batch_size=2, seed=0, **option)
