"""Tests of experiments.edit on a network of small random numbers, which costs no training."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

pytest.importorskip("grain")
pytest.importorskip("ml_collections")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from experiments import build, edit, runs, trained
from experiments.configs import digits_conditional
from jaxdiff import rng
from jaxdiff.training import checkpoints

ROOT = Path(__file__).parents[2]
SHAPE = (8, 8, 1)


def frames(path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.n_frames


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a checkpoint; the network listens to the labels."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    workdir.mkdir()
    config = digits_conditional.get_config()
    config.update(
        {
            "model": {"channels": 8, "channel_multipliers": (1,)},
            "schedule": {"num_steps": 50},
            "train": {"num_steps": 1},
        }
    )
    init, _ = build.make_training(config, SHAPE)
    draw = np.random.default_rng(0)
    state = jax.tree.map(
        lambda like: jnp.asarray(0.1 * draw.normal(size=like.shape), like.dtype),
        jax.eval_shape(init),
    )
    runs.write_json(workdir / "config.json", runs.as_json(config))
    runs.write_json(workdir / "run.json", runs.describe(config, 0, SHAPE))
    with checkpoints.open_folder(workdir / "checkpoints", keep=1) as saved:
        checkpoints.save(saved, state, data={"next_index": 0}, config={})
    return workdir


@pytest.fixture
def command(run, tmp_path, monkeypatch):
    """Runs the command in this process; returns edit.npz as a dictionary."""

    def call(*arguments):
        values = flags.FlagValues()
        edit.define_flags(values)
        values(["edit", f"--workdir={run}", f"--out={tmp_path}", *arguments])
        monkeypatch.setattr(edit, "FLAGS", values)
        edit.main()
        with np.load(tmp_path / "edit.npz") as archive:
            return dict(archive)

    return call


def test_inversion_and_back_is_the_start(command, tmp_path, capsys):
    got = command("--task=inversion", "--num=4", "--steps=20", "--first_index=3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit.gif", "edit.npz", "edit.png"]
    assert got["labels"].tolist() == [3, 4, 5, 6]  # the digits come in turn
    assert got["start"].shape == got["latents"].shape == got["result"].shape == (4, *SHAPE)
    error = np.abs(got["result"] - got["start"]).max()
    assert error < 1e-4
    assert np.abs(got["latents"] - got["start"]).max() > 0.1
    text = capsys.readouterr().out
    assert f"in 20 steps (125 evaluations) and down again: difference {error:.3g} at most" in text
    assert frames(tmp_path / "edit.gif") > 30  # 20 up and 20 down, but for those that look the same
    # Without what the run samples with.
    options = json.loads(str(got["options"]))
    assert (options["guidance"], options["threshold"]) == ("none", "none")
    assert (options["solver"], options["grid"], options["iterations"]) == ("ddim", "quadratic", 5)

    usual = command("--task=inversion", "--num=4", "--steps=20", "--iterations=1", "--nogif")
    assert np.abs(usual["result"] - usual["start"]).max() > 1e-3


def test_inpainting_keeps_known_pixels_bit_for_bit(command, tmp_path, capsys):
    options = ["--task=inpainting", "--steps=6", "--mask=random", "--jump_length=2", "--nogif"]
    got = command(*options, "--resamples=2", "--num=4", "--seed=1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit.npz", "edit.png"]
    mask = got["mask"]
    assert 0.3 < mask.mean() < 0.7
    np.testing.assert_array_equal(got["result"][mask], got["start"][mask])
    assert np.abs(got["result"] - got["start"])[~mask].max() > 0.1
    text = capsys.readouterr().out
    assert "of the pixels: difference 0 at most, 0 RMS" in text
    # Of six nodes three are a jump's ends: twice two steps more; guidance asks twice.
    assert "drawn in 20 evaluations" in text
    # An image is filled alike wherever it stands in the batch.
    part = command(*options, "--resamples=2", "--num=2", "--first_index=2", "--seed=1")
    np.testing.assert_array_equal(part["mask"], mask[2:])
    np.testing.assert_allclose(part["result"], got["result"][2:], atol=1e-5)


def test_masks():
    keys = rng.per_example(jax.random.key(0), jnp.arange(2))

    def rows(name, shape):
        mask = np.asarray(edit.make_mask(name, keys, shape))
        assert mask.shape == (2, *shape[:2], 1)
        np.testing.assert_array_equal(mask[0], mask[1])
        return ["".join(".x"[int(known)] for known in row) for row in mask[0, :, :, 0]]

    assert rows("left", (2, 4, 3)) == ["xx..", "xx.."]
    assert rows("top", (4, 2, 1)) == ["xx", "xx", "..", ".."]
    assert rows("center", (4, 4, 1)) == ["xxxx", "x..x", "x..x", "xxxx"]
    assert rows("center", (3, 8, 1)) == ["xxxxxxxx", "xx....xx", "xxxxxxxx"]
    first, second = np.asarray(edit.make_mask("random", keys, (8, 8, 1)))
    assert (first != second).any()


def test_image_to_image(command, capsys):
    options = ["--task=image_to_image", "--num=3", "--steps=10", "--solver=ddim", "--grid=trailing"]
    got = command(*options, "--strength=0.3", "--seed=2")
    keys = rng.per_example(jax.random.key(2), jnp.arange(3))
    noise = rng.normal(rng.stream(keys, rng.Stream.START), SHAPE)
    node = build.SCHEDULES["cosine"](50).at(14)  # three strides of five
    noisy = node.alpha * got["start"] + node.sigma * noise
    np.testing.assert_allclose(got["noisy"], noisy, rtol=1e-5, atol=1e-6)
    assert "back in 3 steps and 6 evaluations" in capsys.readouterr().out  # with guidance
    assert np.abs(got["result"] - got["start"]).max() > 0.01
    got = command(*options, "--strength=0")
    np.testing.assert_array_equal(got["result"], got["start"])


def test_interpolation_begins_and_ends_at_the_images(command, tmp_path):
    got = command("--task=interpolation", "--num=4", "--steps=20", "--points=3")
    assert got["labels"].tolist() == [0, 1, 2, 3]
    assert got["result"].shape == (2, 3, *SHAPE)
    # Each end needs the label of its own image.
    np.testing.assert_allclose(got["result"][:, 0], got["start"][::2], atol=1e-4)
    np.testing.assert_allclose(got["result"][:, -1], got["start"][1::2], atol=1e-4)
    assert np.abs(got["result"][:, 1] - got["result"][:, 0]).max() > 0.1
    assert got["weights"].tolist() == [0, 0.5, 1]
    assert frames(tmp_path / "edit.gif") == 5  # there and back; the far end stands as one


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--task=inversion", "--strength=0.2"], "--strength is for --task=image_to_image, not"),
        (["--task=inversion", "--solver=ddim"], "is for --task=inpainting or image_to_image, not"),
        (["--task=inpainting", "--iterations=2"], "--task=inversion or interpolation, not for inp"),
        (["--task=interpolation", "--num=3", "--steps=9"], "in pairs, got --num=3"),
        (["--num=1798"], "holds 1797 images, got --first_index=0 and --num=1798"),
        (["--steps=51"], "num_steps must be an integer from 1 to the schedule's 50"),
        (
            ["--task=inpainting", "--steps=5"],
            "jump_length must be an integer from 1 to .* 4, got 10",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(command, tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        command(*arguments)
    assert not list(tmp_path.iterdir())


def test_self_conditioned_networks_are_not_inverted(command, monkeypatch):
    load = trained.load

    def self_conditioned(*args, **kwargs):
        config, *rest = load(*args, **kwargs)
        config.self_condition = True
        return config, *rest

    monkeypatch.setattr(trained, "load", self_conditioned)
    with pytest.raises(ValueError, match="self-conditioned network cannot be inverted"):
        command("--task=inversion")


def test_the_command_line_names_what_is_wrong(run):
    module = [sys.executable, "-m", "experiments.edit", f"--workdir={run}"]
    done = subprocess.run([*module, "--strength=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "flag --strength=2" in done.stderr
    assert "Traceback" not in done.stderr
