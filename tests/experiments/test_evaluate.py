"""Tests of experiments.evaluate: bounds against the library's own, classes of known pictures."""

import functools
import html
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

from experiments import (
    build,
    drawing,
    evaluate,
    evaluate_likelihood,
    evaluate_samples,
    report,
    runs,
    runtime,
    scores,
    trained,
)
from experiments.configs import digits_conditional, digits_learned_variance
from jaxdiff import (
    data,
    denoisers,
    evaluation,
    guidance,
    interop,
    likelihood,
    schedules,
    validation,
)
from jaxdiff.base import Node, Prediction
from jaxdiff.evaluation import inception
from jaxdiff.training import checkpoints
from tests import small_runs

ROOT = Path(__file__).parents[2]
OF_PIXELS = ("validation", "manifold", "sliced", "classifier")
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
    chain, told = evaluate_likelihood.make_chain(schedule, None)
    assert chain is schedule
    bounds = evaluate_likelihood.make_bounds(
        lambda params, labels: both, chain, told, key, list(evaluate_likelihood.FRACTIONS)
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

    chain, told = evaluate_likelihood.make_chain(schedules.cosine(10), 5)
    bounds = evaluate_likelihood.make_bounds(
        make, chain, told, jax.random.key(0), ["small", "large"]
    )
    program = str(jax.make_jaxpr(bounds)(jnp.eye(6), jnp.zeros((8, 6)), jnp.arange(8), None))
    assert re.findall(r"f32\[([\d,]*)\] = dot_general", program) == ["8,6"]


@pytest.mark.parametrize("steps", [2, 7, 19])
def test_a_shorter_chain_visits_the_run_s_own_nodes(steps):
    schedule = schedules.cosine(20)
    chain, told = evaluate_likelihood.make_chain(schedule, steps)
    assert chain.num_steps == len(told) == steps
    assert (told[0], told[-1]) == (0, 19)
    assert np.all(np.diff(told) > 0)
    assert np.ptp(np.diff(told)) <= 1
    for field in ("alpha", "sigma"):
        np.testing.assert_allclose(
            getattr(chain.at(np.arange(steps)), field), getattr(schedule.at(told), field), rtol=1e-6
        )


def test_the_network_is_told_the_run_s_own_times():
    chain, told = evaluate_likelihood.make_chain(schedules.cosine(20), 7)
    seen = []

    def denoiser(x, node):
        jax.debug.callback(lambda t: seen.append(int(t)), node.t)
        return EXACT.denoiser(x, node)

    bounds = evaluate_likelihood.make_bounds(
        lambda params, labels: denoiser, chain, told, jax.random.key(0), ["small"]
    )
    jax.block_until_ready(bounds(None, jnp.zeros((1, 6)), jnp.arange(1), None))
    jax.effects_barrier()
    assert sorted(seen) == list(told)


def test_a_continuous_schedule_is_cut_into_steps():
    schedule = schedules.vp_cosine()
    chain, told = evaluate_likelihood.make_chain(schedule, 5)
    np.testing.assert_allclose(told, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(
        chain.at(np.arange(4)).sigma, schedule.at(jnp.asarray(told[:4])).sigma, rtol=1e-5
    )
    with pytest.raises(ValueError, match="--bound_steps=N"):
        evaluate_likelihood.make_chain(schedule, None)
    with pytest.raises(ValueError, match="bound_steps must be at most 20"):
        evaluate_likelihood.make_chain(schedules.cosine(20), 21)


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
    found = evaluate_likelihood.bound(
        config, params, (8, 8, 1), source, steps=4, seed=5, batch_size=8
    )["scores"]

    # The same chain in one batch, and one variance after the other.
    chain, told = evaluate_likelihood.make_chain(schedules.cosine(6), 4)
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
        measured = {part: found[f"{part}, {variance}"] for part in ("bits", *terms._fields)}
        np.testing.assert_allclose(measured["bits"]["mean"], bits.mean(), rtol=1e-4)
        error = rows[variance].std(ddof=1) / np.sqrt(11)
        np.testing.assert_allclose(measured["bits"]["error"], error, rtol=1e-3)
        np.testing.assert_allclose(measured["decoder"]["mean"], terms.decoder.mean(), rtol=1e-4)
        np.testing.assert_allclose(measured["steps"]["mean"], terms.steps.sum(0).mean(), rtol=1e-4)
        np.testing.assert_allclose(measured["prior"]["mean"], terms.prior.mean(), rtol=1e-3)
    differences = {name.removeprefix("bits, ") for name in found if " - " in name}
    assert differences == {"large - small", "learned - small", "learned - large"}
    paired = rows["learned"] - rows["small"]
    got = found["bits, learned - small"]
    np.testing.assert_allclose(got["mean"], paired.mean(), rtol=1e-3)
    np.testing.assert_allclose(got["error"], paired.std(ddof=1) / np.sqrt(11), rtol=1e-3)


def test_bounds_count_the_pixels_of_the_images_not_the_padding(monkeypatch):
    exact = denoisers.gaussian(np.zeros((8, 8, 1)), 0.3).denoiser
    monkeypatch.setattr(drawing, "make_denoiser", lambda config, shape: lambda *args: exact)
    config = tiny(data={"pad_to": 8}, vlb_weight=None)
    images, known = pictures(4, size=6)
    got = evaluate_likelihood.bound(
        config, None, (8, 8, 1), data.from_arrays(images, known), batch_size=4
    )
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)]) / np.float32(127.5) - 1
    one = functools.partial(likelihood.variational_bound, jax.random.key(0), exact)
    bits, _ = jax.jit(lambda x0: one(schedules.cosine(6), x0))(padded)
    assert "bits, large" in got["scores"]
    assert "bits, learned" not in got["scores"]
    mean = float(bits.sum()) * 64 / 36 / 4
    np.testing.assert_allclose(got["scores"]["bits, small"]["mean"], mean, rtol=1e-4)


def test_models_and_data_that_have_no_bound_are_refused():
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        evaluate_likelihood.bound(tiny(), None, (8, 8, 1), data.from_arrays(*pictures(1)))
    with pytest.raises(ValueError, match="not for self-conditioned models"):
        evaluate_likelihood.bound(
            tiny(self_condition=True), None, (8, 8, 1), data.from_arrays(*pictures(2))
        )


def test_what_was_trained_on_is_not_scored():
    config = tiny()
    name, source = evaluate_likelihood.held_out(config)
    assert (name, len(source)) == ("train[1400:]", 397)
    with pytest.raises(ValueError, match=r"100 of the 200 images of train\[1300:1500\] are among"):
        evaluate_likelihood.held_out(config, "train[1300:1500]")
    assert (
        len(evaluate_likelihood.held_out(config, "train[1300:1500]", allow_overlap=True)[1]) == 200
    )
    with pytest.raises(ValueError, match="name other data by --split"):
        evaluate_likelihood.held_out(tiny(data={"split": "train"}))
    assert evaluate_likelihood.held_out(tiny(data={"split": "train[:80%]"}))[0] == "train[80%:]"
    with pytest.raises(ValueError, match="--path is for runs on a folder"):
        evaluate_likelihood.held_out(config, path="elsewhere")


def test_a_folder_needs_another_folder(tmp_path):
    from PIL import Image

    for name, seed in (("trained", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures(3, seed=seed)[0]):
            Image.fromarray(picture[..., 0]).convert("RGB").save(tmp_path / name / f"{i}.png")
    folder = {"name": "folder", "path": str(tmp_path / "trained"), "size": 8}
    config = tiny(data=folder)
    with pytest.raises(ValueError, match="another by --path=DIR"):
        evaluate_likelihood.held_out(config)
    with pytest.raises(ValueError, match="3 of the 3 images"):
        evaluate_likelihood.held_out(config, path=str(tmp_path / "trained"))
    assert len(evaluate_likelihood.held_out(config, path=str(tmp_path / "other"))[1]) == 3


def test_losses_are_the_library_s_whatever_the_batch():
    config = tiny(labels={"num_classes": 10}, sample={"guidance": "classifier_free"})
    params = state_of_noise(config).params
    images, known = pictures(11)
    source = data.from_arrays(images, known)
    found = {
        size: evaluate_likelihood.validate(
            config, params, (8, 8, 1), source, seed=5, batch_size=size, points=4
        )
        for size in (4, 11)
    }
    for name, of in found[4]["scores"].items():
        np.testing.assert_allclose(of["mean"], found[11]["scores"][name]["mean"], rtol=1e-6)
    # Not clipped, and told the labels.
    denoiser = denoisers.from_network(
        build.make_network(config, (8, 8, 1)), params, build.make_schedule(config),
        build.make_parameterization(config), jnp.asarray(known), learned_variance=True,
    )  # fmt: skip
    grid, x0 = validation.grid(schedules.cosine(6), 4), images / np.float32(127.5) - 1
    errors = validation.errors(jax.random.key(5), denoiser, x0, grid)
    expected = validation.summarize(errors, grid, build.make_parameterization(config))
    measured = found[4]["scores"]["loss, weighted as in training"]
    np.testing.assert_allclose(measured["mean"], expected.weighted.mean, rtol=1e-5)
    np.testing.assert_allclose(measured["error"], expected.weighted.error, rtol=1e-4)
    (plot,) = found[4]["plots"].values()
    np.testing.assert_allclose(plot["series"]["eps"][1], expected.eps.mean, rtol=1e-5)


def test_likelihood_of_an_exact_model(monkeypatch):
    """A Gaussian around the levels: the mean of its dequantised bits is known."""
    std = 0.3
    exact = denoisers.gaussian(np.zeros((2, 2, 1)), std)
    monkeypatch.setattr(
        drawing, "make_denoiser", lambda config, shape: lambda *args: exact.denoiser
    )
    levels = np.clip(np.rint(127.5 * (np.asarray(exact.sample(jax.random.key(1), 12)) + 1)), 0, 255)
    source = data.from_arrays(levels.astype(np.uint8), np.zeros(12, np.int32))
    monkeypatch.setattr(build, "make_source", lambda config: source)
    config = tiny(data={"dequantize": True}, schedule={"num_steps": 1000}, vlb_weight=None)
    found = evaluate_likelihood.likelihood(
        config, None, (2, 2, 1), source, trace="exact", batch_size=12
    )["scores"]
    # With u uniform in a bin of the interval, x = (k + u) / 128 - 1.
    width = 2 / 256
    x = (levels.reshape(12, 4) + 0.5) * width - 1
    nats = x**2 / (2 * std**2) + width**2 / 24 / std**2 + np.log(std * np.sqrt(2 * np.pi) / width)
    bits = nats.mean(1) / np.log(2)
    np.testing.assert_allclose(
        found["bits, probability flow"]["mean"], bits.mean(), atol=3e-3
    )  # a draw of u moves it by 1e-3
    assert found["bits, no model"] == {"mean": 8.0, "error": 0.0}
    with pytest.raises(ValueError, match="--trace=exact"):
        evaluate_likelihood.likelihood(config, None, (2, 2, 1), source, draws=2)


def test_the_bound_in_continuous_time_is_the_library_s(monkeypatch):
    exact = denoisers.gaussian(np.zeros((8, 8, 1)), 0.3).denoiser
    monkeypatch.setattr(drawing, "make_denoiser", lambda config, shape: lambda *args: exact)
    images, known = pictures(5)
    source = data.from_arrays(images, known)
    found = evaluate_likelihood.continuous(
        tiny(vlb_weight=None), None, (8, 8, 1), source, seed=3, batch_size=2
    )["scores"]
    one = functools.partial(likelihood.continuous_bound, jax.random.key(3), exact)
    bits, terms = jax.jit(lambda x0: one(schedules.cosine(6), x0))(images / np.float32(127.5) - 1)
    for name, expected in (("bits", bits), ("diffusion", terms.diffusion), ("prior", terms.prior)):
        np.testing.assert_allclose(found[name]["mean"], expected.mean(), rtol=1e-4)
        np.testing.assert_allclose(
            found[name]["error"], np.std(expected, ddof=1) / np.sqrt(5), rtol=2e-3
        )


def test_a_gaussian_s_bits_are_the_mean_over_the_bin():
    bits = np.random.default_rng(0)
    known, held = (bits.integers(0, 256, (n, 2, 1, 1), np.uint8) for n in (50, 3))
    found = evaluate_likelihood.gaussian_bits(data.from_arrays(known), data.from_arrays(held))
    k = known.reshape(50, 2).astype(np.float64)
    cov = np.cov(k.T, bias=True) + np.eye(2) / 12
    nodes, weights = np.polynomial.legendre.leggauss(4)
    for got, v in zip(found, held.reshape(3, 2).astype(np.float64), strict=True):
        nats = 0.0
        for a, wa in zip(nodes / 2, weights / 2, strict=True):
            for b, wb in zip(nodes / 2, weights / 2, strict=True):
                off = v + np.array([a, b]) - k.mean(0)
                density = 0.5 * off @ np.linalg.solve(cov, off)
                nats += wa * wb * (density + 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1])
        np.testing.assert_allclose(got, nats / (2 * np.log(2)), rtol=1e-12)


def test_classes_of_real_images_and_of_wrong_labels():
    source = data.in_memory(data.from_tfds("digits"))
    real, known = evaluate_samples.gather(tiny(), source)
    images, labels = real[:400], known[:400]
    found = evaluate_samples.classes(images, labels, real, known)
    # Each image is its own nearest neighbour, but two others can outvote it.
    assert found["scores"]["of the class asked for"]["mean"] > 0.98
    assert 0.96 < found["scores"]["classifier's accuracy"]["mean"] < 0.975
    assert set(found["agreement_by_class"]) == set(map(str, range(10)))
    wrong = np.where(labels == 3, 4, labels)
    found = evaluate_samples.classes(images, wrong, real, known)
    share = np.mean(labels == 3)
    agreement = found["scores"]["of the class asked for"]
    assert abs(agreement["mean"] - (1 - share)) < 0.02
    expected = np.sqrt(agreement["mean"] * (1 - agreement["mean"]) / 400)
    np.testing.assert_allclose(agreement["error"], expected)
    assert "3" not in found["agreement_by_class"]
    # The 4s, and as many 3s that are called 4.
    assert abs(found["agreement_by_class"]["4"] - np.mean(labels[wrong == 4] == 4)) < 0.02
    with pytest.raises(ValueError, match=r"the data that .* have no labels"):
        evaluate_samples.classes(images, wrong, real, None)
    with pytest.raises(ValueError, match="not asked for by class"):
        evaluate_samples.classes(images, None, real, known)


def test_scores_of_pixels_are_the_library_s():
    (images, _), (real, _) = pictures(50), pictures(80, seed=1)
    a, b = (of.reshape(len(of), -1) / 255 for of in (images, real))
    found = evaluate_samples.manifold(images, real, neighbours=3)["scores"]
    for name, value in evaluation.manifold_scores(b, a, k=3)._asdict().items():
        assert found[name]["mean"] == value
        assert found[name]["error"] >= 0
    got = evaluate_samples.sliced(images, real, seed=2)["scores"]["sliced Wasserstein distance"]
    assert got["mean"] == evaluation.sliced_wasserstein(b, a, seed=2).value
    assert got["error"] > 0


def test_real_images_are_as_the_network_sees_them(monkeypatch):
    images, known = pictures(7, size=6)
    monkeypatch.setattr(evaluate_samples, "BATCH", 3)
    found, labels = evaluate_samples.gather(tiny(), data.from_arrays(images, known))
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(labels, known)
    found, labels = evaluate_samples.gather(
        tiny(data={"pad_to": 8, "shrink": 2}), data.from_arrays(images)
    )
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)]).reshape(7, 4, 2, 4, 2, 1)
    np.testing.assert_array_equal(found, np.rint(padded.mean((2, 4))))
    assert labels is None


def test_too_many_images_are_chosen_from_by_seed(monkeypatch):
    (images, _), (real, _) = pictures(60), pictures(80, seed=1)
    monkeypatch.setattr(evaluate_samples, "MOST_DIFFERENCES", 50 * 50 * 64)
    first, again, other = (evaluate_samples.manifold(images, real, seed=seed) for seed in (0, 0, 1))
    assert (first["num"], first["real"]) == (50, 50)
    assert first == again
    assert first["scores"] != other["scores"]


def test_samples_that_cannot_be_compared_are_refused():
    (images, _), (real, _) = pictures(50), pictures(50, size=6)
    with pytest.raises(ValueError, match=r"shape \(8, 8, 1\), the run's images \(6, 6, 1\)"):
        evaluate_samples.check(images, real)
    with pytest.raises(ValueError, match="at least 40 of them, got 39"):
        evaluate_samples.check(images[:39], images)


def test_inception_s_features_are_cached_by_data_weights_and_resize(tmp_path, monkeypatch):
    """Of a network in its place, which would take long."""
    asked = []

    def extract(params, images, *, resize, batch_size):
        asked.append((len(images), resize))
        features = images.reshape(len(images), -1)[:, :8] / 255 * params + (resize == "pytorch")
        return inception.Outputs(features, features, features)

    monkeypatch.setattr(inception, "from_tensors", lambda tensors: float(tensors["scale"]))
    monkeypatch.setattr(inception, "extract", extract)
    monkeypatch.setattr(runtime, "cache_folder", lambda: tmp_path)
    (images, _), (real, _) = pictures(50), pictures(80, seed=1)

    def found(real=real, scale=1.0, resize="pytorch"):
        path = tmp_path / "weights.safetensors"
        interop.write_tensors(path, {"scale": np.float32([scale])[0:1].reshape(())}, {})
        asked.clear()
        record = evaluate_samples.inception(images, real, path, resize=resize)
        return record["scores"], [n for n, _ in asked]

    first, computed = found()
    assert computed == [80, 50]
    a, b = (of.reshape(len(of), -1)[:, :8] / 255 + 1 for of in (images, real))
    exact = evaluation.frechet_distance(evaluation.moments(b), evaluation.moments(a))
    np.testing.assert_allclose(first["FID"]["mean"], exact, rtol=1e-6)
    assert found() == (first, [50])
    for change in ({"real": real[:70]}, {"scale": 2.0}, {"resize": "tensorflow"}):
        assert len(found(**change)[1]) == 2
    for path in (tmp_path / "features").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert found() == (first, [80, 50])


def test_files_of_samples_and_of_records_are_checked(tmp_path):
    with pytest.raises(runs.RunError, match=r"samples\.npz does not exist"):
        evaluate_samples.load_samples(tmp_path / "samples.npz")
    np.savez(tmp_path / "plain.npz", images=pictures(2)[0])
    assert evaluate_samples.load_samples(tmp_path / "plain.npz")[1] is None
    (tmp_path / "bad.npz").write_bytes((tmp_path / "plain.npz").read_bytes()[:100])
    with pytest.raises(runs.RunError, match="is damaged"):
        evaluate_samples.load_samples(tmp_path / "bad.npz")
    for i in range(2):
        scores.append(tmp_path / "evaluation.json", {"i": i})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == [{"i": 0}, {"i": 1}]
    for text in ("{}", "[1"):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(runs.RunError, match="holds no list"):
            scores.append(tmp_path / "evaluation.json", {})
        assert (tmp_path / "evaluation.json").read_text() == text


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (0.95432, 0.00571, "0.9543 +- 0.0057"),
        (123.4, 12.3, "123 +- 12"),
        (8.0, 0.0, "8.0000 +- 0.0000"),
        (1.2345678, None, "1.235"),
        (-0.5, float("nan"), "-0.5"),
        (1.2654e-9, 4.3e-12, "1.27e-09 +- 4e-12"),
    ],
)
def test_scores_have_the_digits_that_their_errors_leave(mean, error, expected):
    assert scores.text(scores.score(mean, error)) == expected


def test_runs_stand_side_by_side():
    def record(part, **values):
        return {"part": part, "scores": {k: scores.score(v, 0.1) for k, v in values.items()}}

    lines = scores.lines({"a": [record("p", x=1, y=2)], "bb": [record("p", x=3), record("q", x=4)]})
    assert [line.split() for line in lines] == [
        ["a", "bb"],
        ["p:", "x", "1.00", "+-", "0.10", "3.00", "+-", "0.10"],
        ["p:", "y", "2.00", "+-", "0.10"],
        ["q:", "x", "4.00", "+-", "0.10"],
    ]
    assert len({len(line) for line in lines[:2]}) == 1


@pytest.fixture
def run(tmp_path):
    """A run directory with a checkpoint of step 0 and samples, which cost no training."""
    config = tiny(digits_conditional, data={"split": "train[:1780]"}, vlb_weight=0.001)
    runs.write_json(tmp_path / "config.json", runs.as_json(config))
    runs.write_json(tmp_path / "run.json", runs.describe(config, 0, (8, 8, 1)))
    with checkpoints.open_folder(tmp_path / "checkpoints", keep=1) as saved:
        checkpoints.save(saved, state_of_noise(config), data={"next_index": 0}, config={})
    images, labels = pictures(40)
    report.save_samples(tmp_path / "samples", images / 127.5 - 1, {}, labels=labels)
    return tmp_path


def test_command_end_to_end(run):
    command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={run}", "--classes"]
    options = ["--metrics=bound,validation,manifold", "--batch_size=10", "--bound_steps=3"]
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{run}, bound: 17 examples of train[1780:], parameters of step 0\n" in done.stdout
    assert re.search(r"\nbound: bits, learned - small +-?\d+\.\d+ \+- \d+\.\d+\n", done.stdout)
    assert re.search(r"\nclasses: of the class asked for +[01]\.\d+ \+- 0\.\d+\n", done.stdout)
    assert f"40 samples, {run / 'samples.npz'}, against 1780 real images" in done.stdout
    assert "\nmanifold: coverage " in done.stdout
    records = json.loads((run / "evaluation.json").read_text())
    parts = ["bound", "validation", "manifold", "classes"]
    assert [record["part"] for record in records] == parts
    assert records[0]["scores"]["bits, small"]["mean"] > 0
    page = (run / "report.html").read_text()
    for record in records:
        for name, found in record["scores"].items():
            assert html.escape(f"{record['part']}: {name}") in page
            assert scores.text(found) in page
    assert page.count("<svg") or "svg+xml" in page


def options(**changes):
    flags = {
        "metrics": None, "bound": False, "classes": False, "inception": None, "samples": None,
        "split": None, "path": None,
    }  # fmt: skip
    return SimpleNamespace(**{**flags, **changes})


def test_what_is_scored(run, monkeypatch):
    config = runs.load_config(run)
    for given, expected in (
        ({}, ("validation", "manifold", "sliced", "classifier", "classes")),
        ({"inception": "x"}, (*OF_PIXELS, "inception", "classes")),
        ({"metrics": ["sliced"], "bound": True}, ("sliced", "bound")),
        ({"classes": True, "metrics": ["classes"]}, ("classes",)),
    ):
        monkeypatch.setattr(evaluate, "FLAGS", options(**given))
        assert evaluate.chosen(config) == expected
    monkeypatch.setattr(evaluate, "FLAGS", options(metrics=["manifolds"]))
    with pytest.raises(ValueError, match="did you mean 'manifold'"):
        evaluate.chosen(config)
    monkeypatch.setattr(evaluate, "FLAGS", options(metrics=["inception"]))
    with pytest.raises(ValueError, match="--inception=FILE"):
        evaluate.chosen(config)
    monkeypatch.setattr(evaluate, "FLAGS", options(workdir=f"{run},{run}"))
    with pytest.raises(ValueError, match="names a run twice"):
        evaluate.main()


def test_samples_drawn_anew_are_the_run_s_own_whatever_the_batch(run, monkeypatch):
    monkeypatch.setattr(build, "make_model", small_runs.make_model)
    config, found = runs.load_config(run), []
    init, _ = build.make_training(config, (8, 8, 1))
    state = jax.jit(init)()
    monkeypatch.setattr(trained, "load", lambda *a, **k: (config, state.params, (8, 8, 1), 7))
    for batch_size in (8, 12):
        flags = options(step=None, ema=True, batch_size=batch_size)
        monkeypatch.setattr(evaluate, "FLAGS", flags)
        images, labels, about = evaluate.draw(run, 12)
        assert (images.shape, about["step"]) == ((12, 8, 8, 1), 7)
        np.testing.assert_array_equal(labels, [*range(10), 0, 1])
        found.append(images.astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1
    assert np.ptp(found[0]) > 50


def test_data_without_labels_have_no_classifier_unless_it_was_asked_for(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "FLAGS", options(num=None, seed=0, batch_size=10))
    monkeypatch.setattr(evaluate_samples, "gather", lambda *args: (pictures(80, seed=1)[0], None))
    found = evaluate.of_samples(run, ["sliced", "classifier"], asked=False)
    assert [record["part"] for record in found] == ["sliced"]
    assert "classifier: left out, since the data have no labels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a classifier needs labels"):
        evaluate.of_samples(run, ["sliced", "classifier"], asked=True)
