"""Tests of experiments.evaluate: bounds against the library's own, classes of known pictures."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("ml_collections")
pytest.importorskip("sklearn")

from experiments import build, drawing, evaluate, report, runs
from experiments.configs import digits_conditional, digits_learned_variance
from jaxdiff import data, denoisers, guidance, likelihood, schedules
from jaxdiff.base import Node, Prediction
from jaxdiff.training import checkpoints

ROOT = Path(__file__).parents[2]
EXACT = denoisers.gaussian(np.zeros(6), 0.3)


def tiny(module=digits_learned_variance, **changes):
    config = module.get_config()
    config.update(
        {
            "model": {"channels": 8, "channel_multipliers": (1,)},
            "schedule": {"num_steps": 6},
            "train": {"batch_size": 8, "num_steps": 2, "checkpoint_every": 2},
            "sample": {"num": 20, "batch_size": 8, "steps": 2},
        }
    )
    config.update(changes)
    return config


def both(x, node):
    """The exact denoiser, with a variance that differs from example to example."""
    fraction = jnp.linspace(0.2, 0.7, x.shape[0])[:, None] * jnp.ones_like(x)
    return EXACT.denoiser(x, node)._replace(variance=fraction)


def test_the_variances_share_the_noise_and_are_the_library_s_own():
    schedule, key, index = schedules.cosine(10), jax.random.key(3), jnp.arange(4, 12)
    x0 = EXACT.sample(jax.random.key(1), 8)
    chain, told = evaluate.make_chain(schedule, None)
    assert chain is schedule
    bounds = evaluate.make_bounds(
        lambda params, labels: both, chain, told, key, list(evaluate.FRACTIONS)
    )
    bits, terms = bounds(None, x0, index, None)
    for i, variance in enumerate(("small", "large", "learned")):
        one = functools.partial(likelihood.variational_bound, variance=variance, index=index)
        expected, parts = jax.jit(lambda x0, one=one: one(key, both, schedule, x0))(x0)
        np.testing.assert_allclose(bits[i], expected, rtol=1e-4)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=2e-5),
            terms,
            parts,
        )
    assert np.ptp(bits, axis=0).min() > 0.01


def test_the_network_is_evaluated_once_for_all_variances():
    def make(params, labels):
        return lambda x, node: Prediction(x @ params, jnp.zeros_like(x))

    chain, told = evaluate.make_chain(schedules.cosine(10), 5)
    bounds = evaluate.make_bounds(make, chain, told, jax.random.key(0), ["small", "large"])
    program = str(jax.make_jaxpr(bounds)(jnp.eye(6), jnp.zeros((8, 6)), jnp.arange(8), None))
    assert re.findall(r"f32\[([\d,]*)\] = dot_general", program) == ["8,6"]


@pytest.mark.parametrize("steps", [2, 7, 19])
def test_a_shorter_chain_visits_the_run_s_own_nodes(steps):
    schedule = schedules.cosine(20)
    chain, told = evaluate.make_chain(schedule, steps)
    assert chain.num_steps == len(told) == steps
    assert (told[0], told[-1]) == (0, 19)
    assert np.all(np.diff(told) > 0)
    assert np.ptp(np.diff(told)) <= 1
    for field in ("alpha", "sigma"):
        np.testing.assert_allclose(
            getattr(chain.at(np.arange(steps)), field), getattr(schedule.at(told), field), rtol=1e-6
        )


def test_the_network_is_told_the_run_s_own_times():
    chain, told = evaluate.make_chain(schedules.cosine(20), 7)
    seen = []

    def denoiser(x, node):
        jax.debug.callback(lambda t: seen.append(int(t)), node.t)
        return EXACT.denoiser(x, node)

    bounds = evaluate.make_bounds(
        lambda params, labels: denoiser, chain, told, jax.random.key(0), ["small"]
    )
    jax.block_until_ready(bounds(None, jnp.zeros((1, 6)), jnp.arange(1), None))
    jax.effects_barrier()
    assert sorted(seen) == list(told)


def test_a_continuous_schedule_is_cut_into_steps():
    schedule = schedules.vp_cosine()
    chain, told = evaluate.make_chain(schedule, 5)
    np.testing.assert_allclose(told, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(
        chain.at(np.arange(4)).sigma, schedule.at(jnp.asarray(told[:4])).sigma, rtol=1e-5
    )
    with pytest.raises(ValueError, match="--bound_steps=N"):
        evaluate.make_chain(schedule, None)
    with pytest.raises(ValueError, match="bound_steps must be at most 20"):
        evaluate.make_chain(schedules.cosine(20), 21)


def pictures(num, size=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, size, size, 1), np.uint8), np.arange(num, dtype=np.int32) % 10


def state_of_noise(config):
    """A train state of random numbers: nothing is compiled, and no layer is zero."""
    init, _ = build.make_training(config, (8, 8, 1))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda like: jnp.asarray(0.2 * rng.normal(size=like.shape), like.dtype),
        jax.eval_shape(init),
    )


def test_bounds_of_a_run():
    """In batches of which the last is not full; and told the labels, not guided."""
    config = tiny(labels={"num_classes": 10}, sample={"guidance": "classifier_free"})
    params = state_of_noise(config).params
    images, known = pictures(11)
    source = data.from_arrays(images, known)
    scores = evaluate.bound(config, params, (8, 8, 1), source, steps=4, seed=5, batch_size=8)

    # The same chain in one batch, and one variance after the other.
    chain, told = evaluate.make_chain(schedules.cosine(6), 4)
    network = guidance.clip_x0(
        denoisers.from_network(
            build.make_network(config, (8, 8, 1)), params, build.make_schedule(config),
            build.make_parameterization(config), jnp.asarray(known), learned_variance=True,
        )
    )  # fmt: skip

    def denoiser(x, node):
        return network(x, Node(jnp.asarray(told)[node.t], node.alpha, node.sigma))

    rows = {}
    for variance in ("small", "learned"):
        one = functools.partial(likelihood.variational_bound, variance=variance)
        bits, terms = jax.jit(lambda x0, one=one: one(jax.random.key(5), denoiser, chain, x0))(
            images / np.float32(127.5) - 1
        )
        rows[variance] = np.asarray(bits, np.float64)
        measured = scores["variances"][variance]
        np.testing.assert_allclose(measured["bits"]["mean"], bits.mean(), rtol=1e-4)
        error = rows[variance].std(ddof=1) / np.sqrt(11)
        np.testing.assert_allclose(measured["bits"]["error"], error, rtol=1e-3)
        np.testing.assert_allclose(measured["decoder"]["mean"], terms.decoder.mean(), rtol=1e-4)
        np.testing.assert_allclose(measured["steps"]["mean"], terms.steps.sum(0).mean(), rtol=1e-4)
        np.testing.assert_allclose(measured["prior"]["mean"], terms.prior.mean(), rtol=1e-3)
    assert set(scores["differences"]) == {"large - small", "learned - small", "learned - large"}
    paired = rows["learned"] - rows["small"]
    got = scores["differences"]["learned - small"]
    np.testing.assert_allclose(got["mean"], paired.mean(), rtol=1e-3)
    np.testing.assert_allclose(got["error"], paired.std(ddof=1) / np.sqrt(11), rtol=1e-3)


def test_bounds_count_the_pixels_of_the_images_not_the_padding(monkeypatch):
    exact = denoisers.gaussian(np.zeros((8, 8, 1)), 0.3).denoiser
    monkeypatch.setattr(drawing, "make_denoiser", lambda config, shape: lambda *args: exact)
    config = tiny(data={"pad_to": 8}, vlb_weight=None)
    images, known = pictures(4, size=6)
    got = evaluate.bound(config, None, (8, 8, 1), data.from_arrays(images, known), batch_size=4)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)]) / np.float32(127.5) - 1
    one = functools.partial(likelihood.variational_bound, jax.random.key(0), exact)
    bits, _ = jax.jit(lambda x0: one(schedules.cosine(6), x0))(padded)
    assert set(got["variances"]) == {"small", "large"}
    mean = float(bits.sum()) * 64 / 36 / 4
    np.testing.assert_allclose(got["variances"]["small"]["bits"]["mean"], mean, rtol=1e-4)


def test_models_and_data_that_have_no_bound_are_refused():
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        evaluate.bound(tiny(), None, (8, 8, 1), data.from_arrays(*pictures(1)))
    with pytest.raises(ValueError, match="not for self-conditioned models"):
        evaluate.bound(tiny(self_condition=True), None, (8, 8, 1), data.from_arrays(*pictures(2)))


def test_what_was_trained_on_is_not_scored():
    config = tiny()
    name, source = evaluate.held_out(config)
    assert (name, len(source)) == ("train[1400:]", 397)
    with pytest.raises(ValueError, match=r"100 of the 200 images of train\[1300:1500\] are among"):
        evaluate.held_out(config, "train[1300:1500]")
    assert len(evaluate.held_out(config, "train[1300:1500]", allow_overlap=True)[1]) == 200
    with pytest.raises(ValueError, match="name other data by --split"):
        evaluate.held_out(tiny(data={"split": "train"}))
    assert evaluate.held_out(tiny(data={"split": "train[:80%]"}))[0] == "train[80%:]"
    with pytest.raises(ValueError, match="--path is for runs on a folder"):
        evaluate.held_out(config, path="elsewhere")


def test_a_folder_needs_another_folder(tmp_path):
    from PIL import Image

    for name, seed in (("trained", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures(3, seed=seed)[0]):
            Image.fromarray(picture[..., 0]).convert("RGB").save(tmp_path / name / f"{i}.png")
    folder = {"name": "folder", "path": str(tmp_path / "trained"), "size": 8}
    config = tiny(data=folder)
    with pytest.raises(ValueError, match="another by --path=DIR"):
        evaluate.held_out(config)
    with pytest.raises(ValueError, match="3 of the 3 images"):
        evaluate.held_out(config, path=str(tmp_path / "trained"))
    assert len(evaluate.held_out(config, path=str(tmp_path / "other"))[1]) == 3


def test_classes_of_real_images_and_of_wrong_labels():
    source = data.in_memory(data.from_tfds("digits"))
    real = data.sources.gather(source, np.arange(400))
    scores = evaluate.classes(real["image"], real["label"], source)
    # Each image is its own nearest neighbour, but two others can outvote it.
    assert scores["agreement"] > 0.98
    assert scores["precision"] == 1
    assert 0.96 < scores["classifier_accuracy"] < 0.975
    assert set(scores["agreement_by_class"]) == set(map(str, range(10)))
    wrong = np.where(real["label"] == 3, 4, real["label"])
    scores = evaluate.classes(real["image"], wrong, source)
    share = np.mean(real["label"] == 3)
    assert abs(scores["agreement"] - (1 - share)) < 0.02
    assert "3" not in scores["agreement_by_class"]
    # The 4s, and as many 3s that are called 4.
    assert abs(scores["agreement_by_class"]["4"] - np.mean(real["label"][wrong == 4] == 4)) < 0.02
    with pytest.raises(ValueError, match=r"shape \(4, 4, 1\), real images \(8, 8, 1\)"):
        evaluate.classes(real["image"][:, :4, :4], real["label"], source)
    with pytest.raises(ValueError, match="no labels"):
        evaluate.classes(real["image"], wrong, data.from_arrays(real["image"]))


def test_files_of_samples_and_of_records_are_checked(tmp_path):
    with pytest.raises(runs.RunError, match=r"samples\.npz does not exist"):
        evaluate.load_samples(tmp_path / "samples.npz")
    np.savez(tmp_path / "plain.npz", images=pictures(2)[0])
    with pytest.raises(runs.RunError, match="holds no labels"):
        evaluate.load_samples(tmp_path / "plain.npz")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "plain.npz").read_bytes()[:100])
    with pytest.raises(runs.RunError, match="is damaged"):
        evaluate.load_samples(tmp_path / "bad.npz")
    for i in range(2):
        evaluate.append(tmp_path / "evaluation.json", {"i": i})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == [{"i": 0}, {"i": 1}]
    for text in ("{}", "[1"):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(runs.RunError, match="holds no list"):
            evaluate.append(tmp_path / "evaluation.json", {})
        assert (tmp_path / "evaluation.json").read_text() == text


@pytest.fixture
def run(tmp_path):
    """A run directory with a checkpoint of step 0 and samples, which cost no training."""
    config = tiny(digits_conditional, data={"split": "train[:1780]"}, vlb_weight=0.001)
    runs.write_json(tmp_path / "config.json", runs.as_json(config))
    runs.write_json(tmp_path / "run.json", runs.describe(config, 0, (8, 8, 1)))
    with checkpoints.open_folder(tmp_path / "checkpoints", keep=1) as saved:
        checkpoints.save(saved, state_of_noise(config), data={"next_index": 0}, config={})
    images, labels = pictures(20)
    report.save_samples(tmp_path / "samples", images / 127.5 - 1, {}, labels=labels)
    return tmp_path


def test_command_end_to_end(run, monkeypatch):
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={run}", "--classes"]
    options = ["--bound", "--batch_size=10", "--bound_steps=3"]
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"17 examples of train\[1780:\], 3 steps, parameters of step 0:", done.stdout)
    assert re.search(r"\nlearned - small +-?\d+\.\d{4} \+- \d+\.\d{4}\n", done.stdout)
    assert re.search(r"\nof the class asked for: [01]\.\d{3} \(.*about 0\.9\d\d of", done.stdout)
    assert f"20 samples of {run / 'samples.npz'} against 1780 real images" in done.stdout
    assert "\ncoverage: " in done.stdout
    records = json.loads((run / "evaluation.json").read_text())
    assert [record["part"] for record in records] == ["bound", "classes"]
    assert records[0]["variances"]["small"]["bits"]["mean"] > 0

    flags = SimpleNamespace(workdir=str(run), bound=False, classes=False)
    monkeypatch.setattr(evaluate, "FLAGS", flags)
    with pytest.raises(ValueError, match="--bound, --classes or both"):
        evaluate.main()
