"""Tests of experiments.forward: a tiny run, and what it shows against what it should show."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

PIL_Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from experiments import forward  # noqa: E402
from jaxdiff import denoisers, schedules  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
MIXTURE = denoisers.gaussian_mixture(
    forward.WEIGHTS, np.array(forward.MEANS)[:, None], forward.STDS
)


def frames_and_width(path):
    with PIL_Image.open(path) as picture:
        return picture.n_frames, picture.width


def test_command_end_to_end(tmp_path):
    photo = PIL_Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    )
    photo.save(tmp_path / "photo.png")
    out = tmp_path / "deep" / "out"
    command = [sys.executable, "-m", "experiments.forward"]
    options = ["--steps=8", "--frames=2", "--samples=500", "--schedule=cosine", f"--out={out}"]
    options += [f"--image={tmp_path / 'photo.png'}", "--image_size=45"]
    result = subprocess.run(
        command + options, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    names = ["photo-cosine", "mixture-constant", *(f"mixture-{n}" for n in forward.DISCRETE)]
    files = [f"{name}.{end}" for name in names for end in ("gif", "html")] + ["forward.html"]
    assert sorted(path.name for path in out.iterdir()) == sorted(files)  # and no temporary file
    for file in files:
        assert f"wrote {out / file} (" in result.stdout
    assert "drawing" not in result.stderr, "no progress bar where there is no terminal"

    for name in names:
        width = 45 if name == "photo-cosine" else 640
        # Clean, half of the steps, all of them.
        assert frames_and_width(out / f"{name}.gif") == (3, width)
        page = (out / f"{name}.html").read_text()
        assert page.count("<figure>") == page.count("data:image/png;base64,") == 3
        assert "<figcaption>clean data, alpha = 1.000, sigma = 0.000</figcaption>" in page
        assert f"<figcaption>t = {39 if 'constant' in name else 7}, alpha = " in page
        assert 'type="range" min="0" max="2"' in page
    report = (out / "forward.html").read_text()
    assert all(f"<td>{name}</td>" in report for name in forward.DISCRETE)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ("--schedule=cosin", "linear.*scaled_linear.*cosine.*sigmoid.*quadratic.*exponential"),
        ("--only=foto", "photo.*mixture"),
        ("--steps=0", "steps"),
        ("--stesp=3", "stesp.*Did you mean: steps"),
    ],
)
def test_wrong_options_are_named(option, match):
    values = flags.FlagValues()
    forward.define_flags(values)
    with pytest.raises(flags.Error, match=f"(?s){match}"):
        values(["forward", option])


def test_missing_and_wrong_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        forward.load_photo(str(tmp_path / "nowhere.png"), 64)
    with pytest.raises(ValueError, match=r"test_forward\.py is not an image"):
        forward.load_photo(__file__, 64)


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out=.*below is not a folder that can be written to"):
        forward.check_out(str(tmp_path / "file" / "below"))


def test_photograph_is_scaled_and_upright(tmp_path):
    x = forward.load_photo(None, 64)
    assert x.shape == (43, 64, 3)
    assert x.dtype == np.float32
    assert -1 <= x.min() < -0.8 < 0.8 < x.max() <= 1
    # A camera's portrait: stored lying, with a tag that says so.
    picture = PIL_Image.new("L", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "portrait.jpg", exif=exif)
    assert forward.load_photo(str(tmp_path / "portrait.jpg"), 64).shape == (20, 10, 3)


@pytest.mark.parametrize(("steps", "frames"), [(8, 2), (7, 3), (5, 50), (1, 1)])
def test_states_are_at_the_nodes_they_are_said_to_be_at(steps, frames):
    schedule = schedules.linear(steps, 0.1, 0.5)
    # So many pixels that mean and deviation tell the node: standard errors of 1/200 at most,
    # five of them are passed by chance once in 10^6 comparisons.
    x0 = np.full((1, 40_000), 3.0, np.float32)
    chain = forward.run_chain(jax.random.key(0), schedule, x0, frames)
    assert len(chain.states) == len(chain.nodes) == len(chain.captions) <= frames + 1
    assert int(chain.nodes[-1].t) == steps - 1
    for state, node in zip(chain.states, chain.nodes, strict=True):
        assert abs(state.mean() - 3 * node.alpha) <= 5 * node.sigma / 200 + 1e-6
        assert abs(state.std() - node.sigma) <= 5 * node.sigma / 200 + 1e-6


@pytest.fixture(scope="module")
def chains():
    made = {"constant": schedules.from_betas(np.full(40, 0.5))}
    made |= {name: make(200) for name, make in forward.DISCRETE.items()}
    x0 = MIXTURE.sample(jax.random.key(1), 5000)
    return {k: forward.run_chain(jax.random.key(1), v, x0, 5) for k, v in made.items()}


@pytest.mark.parametrize("name", ["constant", *forward.DISCRETE])
def test_density_integrates_to_one_and_samples_follow_it(chains, name):
    chain = chains[name]
    for node in chain.nodes:
        density = np.exp(np.asarray(MIXTURE.log_density(forward.X[:, None], node), np.float64))
        # What lies outside the plot is less than 1e-4; the trapezoidal rule is better than that.
        assert abs(np.trapezoid(density, forward.X) - 1) < 2e-4
        # Two independent formulas: the plotted density is the slope of the function under test.
        slope = np.gradient(forward.cdf(forward.X, node), forward.X)
        np.testing.assert_allclose(slope, density, atol=2e-4)
    # Seven tests over all frames; together they fail by chance once in 10^5 (seeds are fixed).
    bound = forward.ks_bound(5000, 7 * len(chain.nodes), 1e-5)
    assert max(map(forward.ks_statistic, chain.states, chain.nodes)) < bound


def test_statistic_sees_a_wrong_process(chains):
    chain = chains["linear"]
    bound = forward.ks_bound(5000, len(chain.nodes), 1e-5)
    # Samples one frame late are not samples of the density.
    assert min(map(forward.ks_statistic, chain.states[2:4], chain.nodes[1:3])) > bound


def test_statistic_is_scipys():
    from scipy import stats

    node = schedules.linear().at(300)
    samples = np.random.default_rng(0).normal(size=400)
    expected = stats.kstest(samples, lambda x: forward.cdf(x, node)).statistic
    np.testing.assert_allclose(forward.ks_statistic(samples, node), expected, rtol=1e-12)
