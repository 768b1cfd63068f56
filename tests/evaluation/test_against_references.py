"""Scores against torch-fidelity, pytorch-fid and prdc; each test skips where they are absent.

pip install -e ".[test]" torch torchvision pytorch-fid torch-fidelity prdc
pytest -n 0 -s -m "slow or not slow" tests/evaluation/test_against_references.py
"""

import warnings

import jax
import numpy as np
import pytest

from jaxdiff import evaluation
from jaxdiff.evaluation import inception, kernel
from tests.evaluation.inception_tensors import random_tensors

pytestmark = pytest.mark.filterwarnings("ignore")


def features(n, shift=0.0, d=16, seed=0):
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(size=(n, d)) @ np.diag(np.linspace(0.2, 1.5, d)) + shift)


REAL, SAMPLES = features(400, seed=1), features(300, 0.15, seed=2)


def reference(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def test_kernel_distance_is_torch_fidelitys():
    metric = reference("torch_fidelity.metric_kid")
    torch = pytest.importorskip("torch")
    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1}
    options |= {"kid_kernel_poly_gamma": None, "rng_seed": 2020, "verbose": False}
    # Both draw from NumPy's legacy generator here: the very same subsets.
    draw = np.random.RandomState(2020)
    pairs = [
        [x[draw.choice(len(x), 100, replace=False)] for x in (SAMPLES, REAL)] for _ in range(20)
    ]
    found = [kernel.mmd(real, samples)[0] for samples, real in pairs]
    expected = metric.kid_features_to_metric(
        torch.from_numpy(SAMPLES), torch.from_numpy(REAL),
        **options, kid_subsets=20, kid_subset_size=100,
    )  # fmt: skip
    assert np.mean(found) == pytest.approx(expected[metric.KEY_METRIC_KID_MEAN], rel=1e-10)
    assert np.std(found) == pytest.approx(expected[metric.KEY_METRIC_KID_STD], rel=1e-10)
    ours = evaluation.kernel_distance(REAL, SAMPLES, subsets=20, subset_size=100)
    drawn = np.std(found) * 4 * np.sqrt(2 / 20)
    assert ours.subset_mean == pytest.approx(np.mean(found), abs=drawn)


def test_inception_score_is_torch_fidelitys():
    metric = reference("torch_fidelity.metric_isc")
    torch = pytest.importorskip("torch")
    logits = 3 * np.random.default_rng(0).normal(size=(103, 12))
    expected = metric.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    p = np.exp(logits)
    found = evaluation.inception_score(p / p.sum(1, keepdims=True), splits=10)
    assert found.mean == pytest.approx(expected[metric.KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert found.deviation == pytest.approx(expected[metric.KEY_METRIC_ISC_STD], rel=1e-10)


@pytest.mark.parametrize("k", [3, 5])
def test_manifold_scores_are_those_of_prdc(k):
    prdc = reference("prdc")
    expected = prdc.compute_prdc(REAL, SAMPLES, nearest_k=k)
    found = evaluation.manifold_scores(REAL, SAMPLES, k=k)._asdict()
    assert found == pytest.approx(expected, rel=1e-12)
    assert 0.3 < found["precision"] < 1  # and not where all are 0 or 1
    assert 0.3 < found["recall"] < 1


def test_precision_and_recall_are_torch_fidelitys():
    metric = reference("torch_fidelity.metric_prc")
    torch = pytest.importorskip("torch")
    expected = metric.prc_features_to_metric(
        torch.from_numpy(SAMPLES), torch.from_numpy(REAL),
        prc_neighborhood=3, prc_batch_size=10000, save_cpu_ram=False, verbose=False,
    )  # fmt: skip
    found = evaluation.manifold_scores(REAL, SAMPLES, k=3)
    assert found.precision == pytest.approx(expected[metric.KEY_METRIC_PRECISION], rel=1e-6)
    assert found.recall == pytest.approx(expected[metric.KEY_METRIC_RECALL], rel=1e-6)


def test_frechet_distance_is_pytorch_fids():
    fid = reference("pytorch_fid.fid_score")
    statistics = [(x.mean(0), np.cov(x.T)) for x in (REAL, SAMPLES)]
    expected = fid.calculate_frechet_distance(*statistics[0], *statistics[1])
    a, b = (evaluation.moments(x) for x in (REAL, SAMPLES))
    assert evaluation.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    read = [evaluation.from_arrays({"mu": m, "sigma": s}) for m, s in statistics]
    assert evaluation.frechet_distance(*read) == pytest.approx(expected, rel=1e-9)


def images(n, seed):
    """Smooth colour pictures, uint8 `(n, 32, 32, 3)`; of another contrast for another seed."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(size=(n, 5, 3)) * (60 + 15 * seed)
    at = np.arange(32) / 32
    basis = np.stack([np.cos(2 * np.pi * (k * at[:, None] + j * at)) for k, j in FREQUENCIES])
    return np.clip(128 + np.einsum("nkc,khw->nhwc", waves, basis), 0, 255).astype(np.uint8)


FREQUENCIES = [(0, 1), (1, 0), (1, 2), (3, 1), (5, 4)]


@pytest.fixture(scope="module")
def networks():
    """pytorch-fid's network with random weights, and the same weights here."""
    theirs = reference("pytorch_fid.inception")
    torch = pytest.importorskip("torch")
    tensors = random_tensors(inception.tensor_shapes())

    def load(*args, **kwargs):
        network = theirs._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        names = {n for n in network.state_dict() if not n.endswith("num_batches_tracked")}
        assert names == set(tensors)  # every name of theirs is one of ours
        return {name: torch.from_numpy(t) for name, t in tensors.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", load)
        network = theirs.InceptionV3().eval()
    return network, inception.from_tensors(tensors)


def of_pytorch(network, x, resize=True):
    import torch

    network.resize_input = resize
    x = torch.from_numpy(np.moveaxis(x, -1, 1)).float() / 255
    with torch.no_grad():
        return network(x)[0][:, :, 0, 0].numpy()


@pytest.mark.slow
def test_inception_features_and_fid_are_pytorch_fids(networks):
    network, params = networks
    fid = reference("pytorch_fid.fid_score")
    sets = [images(20, seed) for seed in (0, 1)]
    theirs = [of_pytorch(network, x) for x in sets]
    ours = [inception.extract(params, x, devices=jax.devices()[:1]).features for x in sets]
    for a, b in zip(theirs, ours, strict=True):
        spread = a.std(0).mean()  # of a feature over the images
        assert spread > 1e-2
        error = np.abs(a - b).max()
        print(f"features: largest error {error:.1e}, mean {a.mean():.2f}, spread {spread:.3f}")
        assert error < 1e-3 * spread
    # With all 2048 features of so few images theirs gives up ("Imaginary component"): of a quarter.
    few = slice(None, None, 4)
    statistics = [(x[:, few].mean(0), np.cov(x[:, few].T)) for x in theirs]
    expected = fid.calculate_frechet_distance(*statistics[0], *statistics[1])
    found = evaluation.frechet_distance(*(evaluation.moments(x[:, few]) for x in ours))
    print(f"FID {found:.6f}, theirs {expected:.6f}")
    assert found == pytest.approx(expected, rel=1e-3)
    # All features, their network, by float64 in the space that the images span.
    a, b = (x.astype(np.float64) - x.mean(0, dtype=np.float64) for x in theirs)
    gap = theirs[0].mean(0, dtype=np.float64) - theirs[1].mean(0, dtype=np.float64)
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = gap @ gap + ((a**2).sum() + (b**2).sum() - 2 * overlap) / (len(a) - 1)
    found = evaluation.frechet_distance(*(evaluation.moments(x) for x in ours))
    print(f"of all features {found:.6f}, theirs {expected:.6f}")
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_inception_without_a_resize_is_pytorch_fids(networks):
    network, params = networks
    x = np.random.default_rng(0).integers(0, 256, (2, 96, 75, 3), np.uint8)
    theirs = of_pytorch(network, x, resize=False)
    ours = inception.InceptionV3().apply({"params": params}, x / np.float32(127.5) - 1)
    np.testing.assert_allclose(ours.features, theirs, rtol=0, atol=1e-3 * theirs.std(0).mean())
    kernel, bias = (np.asarray(params["fc"][name], np.float64) for name in ("kernel", "bias"))
    logits = np.asarray(ours.features, np.float64) @ kernel
    np.testing.assert_allclose(ours.logits_unbiased, logits, atol=1e-4)
    np.testing.assert_allclose(ours.logits, logits + bias, atol=1e-4)


def test_resizes_are_theirs():
    module = reference("torch_fidelity.interpolate_compat_tensorflow")
    torch = pytest.importorskip("torch")
    resize = module.interpolate_bilinear_2d_like_tensorflow1x
    for shape in ((32, 32), (8, 45), (400, 310)):
        x = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
        planes = torch.from_numpy(np.moveaxis(x, -1, 1)).float()
        like_tf = (resize(planes, size=(299, 299), align_corners=False) - 128) / 128
        like_torch = torch.nn.functional.interpolate(
            planes / 255, size=(299, 299), mode="bilinear", align_corners=False
        )
        for name, expected in (("tensorflow", like_tf), ("pytorch", 2 * like_torch - 1)):
            found = inception.prepare(x, name)
            # Their float32 places between pixels are rounded in another order.
            np.testing.assert_allclose(found, np.moveaxis(expected.numpy(), 1, -1), atol=3e-5)
