"""What is written is read back with another tool than wrote it."""

import os
import stat

import numpy as np
import pytest

from jaxdiff import viz

PIL_Image = pytest.importorskip("PIL.Image")


def frames_of(number, height=6, width=5, channels=3):
    return np.random.default_rng(0).integers(
        0, 256, (number, height, width, channels), dtype=np.uint8
    )


def test_to_uint8_inverts_the_scaling_of_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(viz.to_uint8(levels / np.float32(127.5) - 1), levels)


def test_to_uint8_clips_and_keeps_shape():
    x = np.array([-np.inf, -3.0, 0.0, 7.0, np.inf, 1.0]).reshape(2, 1, 1, 3)
    result = viz.to_uint8(x)
    assert result.dtype == np.uint8
    assert result.ravel().tolist() == [0, 0, 128, 255, 255, 255]
    assert result.shape == x.shape


def test_to_uint8_takes_jax_arrays_and_half_precision():
    import jax.numpy as jnp

    x = jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(1, 2, 2, 3)
    expected = viz.to_uint8(np.asarray(x.astype(jnp.float32)))
    np.testing.assert_array_equal(viz.to_uint8(x), expected)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.full((2, 2, 1), np.nan), ValueError, "NaN in 4 of 4"),
        (np.zeros((2, 2, 1), np.uint8), TypeError, "uint8"),
        (np.zeros((2, 2)), ValueError, r"\(2, 2\)"),
        (np.zeros((2, 2, 2)), ValueError, r"\(2, 2, 2\)"),
    ],
)
def test_to_uint8_errors(x, error, match):
    with pytest.raises(error, match=match):
        viz.to_uint8(x)


@pytest.mark.parametrize("columns", [None, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_grid_holds_every_image_at_its_place(columns, padding):
    images = frames_of(5, 4, 6)
    grid = viz.image_grid(images, columns, padding, scale=2, background=7)
    across = 3 if columns is None else min(columns, 5)
    down = -(-5 // across)
    assert grid.shape == (down * (8 + padding) + padding, across * (12 + padding) + padding, 3)
    left_over = np.ones(grid.shape, bool)
    for i, image in enumerate(images):
        top = padding + (i // across) * (8 + padding)
        left = padding + (i % across) * (12 + padding)
        cell = np.s_[top : top + 8, left : left + 12]
        np.testing.assert_array_equal(grid[cell][::2, ::2], image)
        np.testing.assert_array_equal(grid[cell][1::2, 1::2], image)
        left_over[cell] = False
    assert (grid[left_over] == 7).all()


def test_grid_enlarges_small_images_only():
    def side(n):
        return viz.image_grid(np.zeros((1, n, n, 1)), padding=0).shape[0]

    assert [side(n) for n in (8, 28, 32, 33, 256)] == [32, 56, 32, 33, 256]


def test_grid_scales_floats():
    grid = viz.image_grid(np.ones((1, 2, 2, 1)), padding=0, scale=1)
    assert grid.dtype == np.uint8
    assert (grid == 255).all()


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((2, 2, 1), {}, r"\(N, H, W, C\)"),
        ((0, 2, 2, 1), {}, "N > 0"),
        ((1, 2, 2, 4), {}, r"\(1, 2, 2, 4\)"),
        ((1, 2, 2, 1), {"columns": 0}, "columns=0"),
        ((1, 2, 2, 1), {"scale": 0}, "scale=0"),
        ((1, 2, 2, 1), {"padding": -1}, "padding=-1"),
    ],
)
def test_grid_errors(shape, options, match):
    with pytest.raises(ValueError, match=match):
        viz.image_grid(np.zeros(shape), **options)


def test_caption_is_below_and_keeps_the_image():
    image = np.full((10, 200, 3), 90, np.uint8)
    result = viz.with_caption(image, "t = 400, alpha = 0.31, sigma = 0.95")
    np.testing.assert_array_equal(result[:10], image)
    assert (result[10:] < 100).sum() > 300  # letters
    edges = np.concatenate([result[10:, :2], result[10:, -2:]], axis=1)
    assert (edges == 255).all(), "the text fits"


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3)])
def test_png_round_trip(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = viz.save_png(tmp_path / "new" / "a.png", image)
    with PIL_Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture).reshape(shape), image)


def read_gif(path):
    with PIL_Image.open(path) as picture:
        frames, durations = [], []
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB")))
            durations.append(picture.info["duration"])
        return np.stack(frames), durations, picture.info.get("loop")


def test_grey_gif_is_exact_and_rests_on_its_last_frame(tmp_path):
    frames = frames_of(7, 12, 9, 1)
    path = viz.save_gif(tmp_path / "a.gif", frames, milliseconds=50, last_milliseconds=900)
    read, durations, loop = read_gif(path)
    np.testing.assert_array_equal(read[..., :1], frames)
    assert durations == [50] * 6 + [900]
    assert loop == 0


def test_colour_gif_is_close(tmp_path):
    ramp = np.linspace(0, 255, 64)
    x, y = np.meshgrid(ramp, ramp)
    frames = [np.stack([x, y, np.full_like(x, b)], -1).astype(np.uint8) for b in (0, 100, 200)]
    read, _, _ = read_gif(viz.save_gif(tmp_path / "a.gif", frames))
    assert read.shape == (3, 64, 64, 3)
    # 256 colours for 4096, none of them common: single pixels are off, their local means are not.
    means = (read - np.asarray(frames, float)).reshape(3, 8, 8, 8, 8, 3).mean((2, 4))
    assert np.abs(means).max() < 8


def test_gif_of_a_plot_keeps_its_common_colours(tmp_path):
    # White and blue, and 300 rare colours, most of them close to white.
    frame = np.full((80, 80, 3), 255, np.uint8)
    frame[::4] = (0, 114, 178)
    rare = np.stack(
        [np.r_[np.arange(255, 155, -1), np.arange(254, 54, -1)], *[np.full(300, 254)] * 2]
    )
    frame[1, :, :], frame[2, :, :], frame[3, :, :] = rare.T[:240].reshape(3, 80, 3)
    frame[5, :60] = rare.T[240:]
    read, _, _ = read_gif(viz.save_gif(tmp_path / "a.gif", np.stack([frame, frame[::-1]])))
    for shown, meant in zip(read, (frame, frame[::-1]), strict=True):
        common = (meant == 255).all(-1) | (meant == (0, 114, 178)).all(-1)
        np.testing.assert_array_equal(shown[common], meant[common])
        assert np.abs(shown.astype(int) - meant).max() < 60


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = viz.save_png(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        viz.save_png(path, np.ones((2, 2), np.uint8))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_files_have_the_permissions_of_ordinary_files(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    path = viz.save_png(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize(
    ("frames", "options", "error", "match"),
    [
        ([], {}, ValueError, "empty"),
        (np.zeros((2, 4, 4, 3)), {}, TypeError, "to_uint8"),
        ([frames_of(1)[0], frames_of(1, 7)[0]], {}, ValueError, "one shape"),
        (frames_of(2, channels=2), {}, ValueError, "C 1 or 3"),
        (frames_of(2), {"milliseconds": 5}, ValueError, "milliseconds"),
    ],
)
def test_frame_errors(tmp_path, frames, options, error, match):
    with pytest.raises(error, match=match):
        viz.save_gif(tmp_path / "a.gif", frames, **options)
    with pytest.raises(error, match=match):
        viz.html_player(
            tmp_path / "a.html", frames, title="", captions=[""] * len(frames), **options
        )
    assert not list(tmp_path.iterdir())
