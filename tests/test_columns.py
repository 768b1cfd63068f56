"""Columns of sequences against enumeration and conditioning in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import columns, denoisers, grids, losses, predictions, sample, schedules, solvers
from jaxdiff.base import Node

L = 5
SIGNS = np.array([False, True, False, True])
START, STAY = {1: 0.3, 3: 0.6}, {1: (0.9, 1 - 0.7 / 3), 3: (1 - 6e-7, 1 - 4e-7)}
OWN = columns.Columns(
    SIGNS,
    np.array([0.1, -0.4, -0.3, 0.2]),
    np.array(
        [
            0.2 * 0.8 ** np.arange(L),
            0.84 * (2 / 3) ** np.arange(L),
            np.full(L, 0.09),
            np.full(L, 0.96),
        ]
    ),
)
MASK = np.arange(L)[None] < np.array([5, 3, 1])[:, None]
SCHEDULE = schedules.cosine()


def silent(params, x, noise_level, cond):
    return jnp.zeros_like(x)


def noisy(t, seed=0):
    """Returns x_t of draws of the columns, and the node."""
    bits = np.random.default_rng(seed)
    x0 = bits.choice([-1.0, 1.0], (3, L, 4))
    cov = columns.covariance(OWN)
    for c in (0, 2):
        x0[..., c] = OWN.mean[c] + bits.multivariate_normal(np.zeros(L), cov[c], 3)
    node = SCHEDULE.at(jnp.array(t))
    alpha, sigma = (np.asarray(f, np.float64)[:, None, None] for f in (node.alpha, node.sigma))
    x = (alpha * x0 + sigma * bits.normal(size=x0.shape)).astype(np.float32)
    return x, node, alpha[:, 0, 0], sigma[:, 0, 0]


def enumerated(x, n, alpha, sigma, start, stay):
    """Returns E[x0 | x] of a chain of signs, over all its 2^n paths."""
    weights, paths = [], list(itertools.product([0, 1], repeat=n))
    for path in paths:
        p = start if path[0] else 1 - start
        for a, b in itertools.pairwise(path):
            p *= stay[a] if a == b else 1 - stay[a]
        weights.append(
            np.log(p) - np.sum((x[:n] - alpha * (2 * np.array(path) - 1)) ** 2) / (2 * sigma**2)
        )
    weights = np.exp(np.array(weights) - np.max(weights))
    weights /= weights.sum()
    up = weights @ np.array(paths)
    return 2 * up - 1


@pytest.mark.parametrize("t", [(200, 500, 900), (400, 20, 999)])
def test_a_column_alone_is_bayes_rule(t):
    x, node, alpha, sigma = noisy(t)
    got = columns.alone(OWN, jnp.asarray(x), node, jnp.asarray(MASK))
    cov = columns.covariance(OWN)
    for b, n in enumerate(MASK.sum(1)):
        y = x[b, :n].astype(np.float64)
        for c in (0, 2):
            k = cov[c][:n, :n]
            joint = alpha[b] ** 2 * k + sigma[b] ** 2 * np.eye(n)
            gain = alpha[b] * k @ np.linalg.inv(joint)
            mean = OWN.mean[c] + gain @ (y[:, c] - alpha[b] * OWN.mean[c])
            spread = np.sqrt(np.diagonal(k - alpha[b] * gain @ k))
            np.testing.assert_allclose(got.x0[b, :n, c], mean, rtol=2e-3, atol=2e-4)
            np.testing.assert_allclose(got.spread[b, :n, c], spread, rtol=5e-3, atol=2e-4)
        for c in (1, 3):
            want = enumerated(y[:, c], n, alpha[b], sigma[b], START[c], STAY[c])
            np.testing.assert_allclose(got.x0[b, :n, c], want, atol=2e-4)
            np.testing.assert_allclose(np.tanh(got.log_odds[b, :n, c] / 2), want, atol=2e-4)
    np.testing.assert_array_equal(got.x0[~MASK], 0)
    np.testing.assert_array_equal(got.spread[..., SIGNS], 0)
    np.testing.assert_array_equal(got.log_odds[..., ~SIGNS], 0)


def test_one_visit_of_a_number_is_the_skip_connection_of_edm():
    schedule, sd = schedules.edm(), 0.4
    one = columns.Columns(np.array([False]), np.zeros(1), np.array([[sd**2]]))

    def linear(params, x, noise_level, cond):
        return params * x

    t = jnp.array([0.2, 0.6])
    node, x = schedule.at(t), jnp.array([[[0.3]], [[-2.0]]])
    network = columns.corrected(linear, one, schedule, predictions.x0)
    got = denoisers.from_network(network, 0.7, schedule, predictions.x0, {"mask": jnp.ones((2, 1))})
    alpha, sigma = node.over(x).alpha, node.over(x).sigma
    shown = alpha * sd * x / (alpha**2 * sd**2 + sigma**2)
    want = predictions.edm(sd).x0(0.7 * shown, x, node)
    np.testing.assert_allclose(got(x, node).x0, want, rtol=1e-4)


@pytest.mark.parametrize("name", ["x0", "eps", "v", "flow"])
def test_a_silent_network_is_the_columns_alone_in_any_parameterization(name):
    x, node, *_ = noisy((300, 600, 950))
    chosen = getattr(predictions, name)
    network = columns.corrected(silent, OWN, SCHEDULE, chosen)
    denoiser = denoisers.from_network(network, None, SCHEDULE, chosen, {"mask": jnp.asarray(MASK)})
    want = columns.alone(OWN, jnp.asarray(x), node, jnp.asarray(MASK)).x0
    got = np.asarray(denoiser(jnp.asarray(x), node).x0)
    np.testing.assert_allclose(got[MASK], np.asarray(want)[MASK], rtol=2e-3, atol=1e-3)


def test_what_a_network_says_is_added_as_spreads_and_as_half_log_odds():
    x, node, *_ = noisy((300, 600, 950))
    said = columns.alone(OWN, jnp.asarray(x), node, jnp.asarray(MASK))

    def half(params, x, noise_level, cond):
        return jnp.full_like(x, 0.5)

    network = columns.corrected(half, OWN, SCHEDULE, predictions.x0)
    got = np.asarray(network(None, jnp.asarray(x), node.t, {"mask": jnp.asarray(MASK)}))
    numbers, signs = got[..., ~SIGNS][MASK], got[..., SIGNS][MASK]
    want = np.asarray(said.x0 + 0.5 * said.spread)[..., ~SIGNS][MASK]
    np.testing.assert_allclose(numbers, want, rtol=1e-5)
    odds = np.asarray(said.log_odds)[..., SIGNS][MASK]
    np.testing.assert_allclose(signs, np.tanh(odds / 2 + 0.5), rtol=1e-5)
    np.testing.assert_array_equal(got[~MASK], 0)


def test_silent_samples_have_the_columns_distribution():
    """Means, covariances and persistence; false alarm 1e-5 at most: 5 standard errors, 16 times."""
    num = 4000
    network = columns.corrected(silent, OWN, SCHEDULE, predictions.v)
    denoiser = denoisers.from_network(
        network, None, SCHEDULE, predictions.v, {"mask": jnp.ones((num, L), bool)}
    )
    grid = grids.trailing(SCHEDULE, 100)
    x0 = np.asarray(
        jax.jit(lambda k: sample(k, denoiser, solvers.ddpm(), grid, (num, L, 4)))(jax.random.key(0))
    )
    cov = columns.covariance(OWN)
    for c in (0, 2):
        sd = np.sqrt(cov[c][0, 0])
        assert abs(x0[..., c].mean() - OWN.mean[c]) < 5 * sd / np.sqrt(num)
        # Discretisation is allowed a hundredth.
        bound = 5 * np.sqrt(2 / num) * sd**2 + 0.01 * sd**2
        np.testing.assert_allclose(np.cov(x0[..., c].T), cov[c], atol=bound)
    for c in (1, 3):
        assert np.mean(np.abs(np.abs(x0[..., c]) - 1) < 1e-2) > 0.99
        up = x0[..., c] > 0
        share = START[c]
        assert abs(up[:, 0].mean() - share) < 5 * np.sqrt(share * (1 - share) / num) + 0.01
        for state in (0, 1):
            here = up[:, :-1] == state
            stay = np.mean(up[:, 1:][here] == state)
            want = STAY[c][state]
            assert abs(stay - want) < 5 * np.sqrt(want * (1 - want) / here.sum()) + 0.01


def test_padding_and_neighbours_change_nothing():
    x, node, *_ = noisy((300, 600, 950))
    network = columns.corrected(silent, OWN, SCHEDULE, predictions.v)
    clean = np.asarray(network(None, jnp.asarray(x), node.t, {"mask": jnp.asarray(MASK)}))
    dirty = np.where(MASK[..., None], x, np.nan)
    got = network(None, jnp.asarray(dirty), node.t, {"mask": jnp.asarray(MASK)})
    np.testing.assert_array_equal(got, clean)
    for b, n in enumerate(MASK.sum(1)):
        one = network(
            None, jnp.asarray(x[b : b + 1, :n]), node.t[b : b + 1], {"mask": jnp.ones((1, n))}
        )
        np.testing.assert_allclose(one[0], clean[b, :n], rtol=1e-4, atol=1e-5)


def test_fit_recovers_what_was_drawn():
    """Means and covariances of 4,000 records, within 5 standard errors or more."""
    bits = np.random.default_rng(0)
    num, cov = 4000, columns.covariance(OWN)
    x0 = np.zeros((num, L, 4))
    for c in (0, 2):
        x0[..., c] = OWN.mean[c] + bits.multivariate_normal(np.zeros(L), cov[c], num)
    state = bits.random((num, 2)) < np.array([START[1], START[3]])
    for k in range(L):
        x0[:, k, SIGNS] = np.where(state, 1.0, -1.0)
        keep = np.where(state, [STAY[1][1], 1], [STAY[1][0], 1])
        state = state ^ (bits.random((num, 2)) > keep)
    observed = (np.arange(L)[None] < bits.integers(1, L + 1, num)[:, None])[..., None]
    observed = observed & (bits.random(x0.shape) < 0.8)
    x0 = np.where(observed, x0, np.nan)
    got = columns.fit(x0, observed, SIGNS, np.array([False, False, True, True]))
    np.testing.assert_allclose(got.mean, OWN.mean, atol=0.08)
    np.testing.assert_allclose(got.autocovariance, OWN.autocovariance, atol=0.06)
    np.testing.assert_array_equal(got.autocovariance[3], got.autocovariance[3, 0])


def test_what_was_not_observed_is_not_counted():
    x0 = np.array([[-1, -1, 1, 1, 1, 1.0]])[..., None]
    seen = np.array([[True, True, False, True, True, True]])[..., None]
    got = columns.fit(x0, seen, np.array([True]), np.array([False]))
    mean = (3 - 2) / (5 + 1)
    np.testing.assert_allclose(got.mean, [mean])
    # Pairs of neighbours: one of -1 and two of 1; and ten of full correlation.
    one = ((1 + mean) ** 2 + 2 * (1 - mean) ** 2 + 10 * (1 - mean**2)) / 13
    np.testing.assert_allclose(got.autocovariance[0, :2], [1 - mean**2, one])
    many = np.tile(np.array([1.0, 3.0, 100.0]), (40, 1))[..., None]
    many[::2] = -many[::2]
    got = columns.fit(many, np.abs(many) < 50, np.array([False]), np.array([False]))
    assert got.mean[0] == 0
    # No pair two visits apart was seen: that of one visit is taken.
    np.testing.assert_allclose(got.autocovariance, [[5.0, 3.4, 3.4]])


def test_of_what_never_changes_a_record_counts_once():
    x0 = np.array([[1.0, 1, 1, 1], [-1, 0, 0, 0]])[..., None]
    for signs, mean in ((True, 0.0), (False, 0.0)):
        got = columns.fit(x0, x0 != 0, np.array([signs]), np.array([True]))
        np.testing.assert_allclose(got.mean, [mean])
        np.testing.assert_allclose(got.autocovariance, [[1.0] * 4])


def test_a_sign_that_alternates_is_a_chain_too():
    x0 = np.tile([1.0, -1.0], 20)[None, :, None]
    own = columns.fit(x0, x0 != 0, np.array([True]), np.array([False]))
    assert own.autocovariance[0, 1] < 0
    node = Node(jnp.int32(0), jnp.float32(0.1), jnp.float32(1.0))
    noisy = jnp.zeros((1, 40, 1)).at[0, 0, 0].set(100.0)  # certainly 1
    got = columns.alone(own, noisy, node, jnp.ones((1, 40))).x0[0, :3, 0]
    assert got[0] > 0.99
    assert got[1] < -0.3 < 0.1 < got[2]


def test_covariances_are_made_positive_definite():
    # Lags that no process has: k(1) = k(0), k(2) = -k(0).
    odd = OWN._replace(autocovariance=np.array([[1.0, 1.0, -1.0]] * 4))
    assert np.linalg.eigvalsh(odd.autocovariance[0][[[0, 1, 2], [1, 0, 1], [2, 1, 0]]]).min() < 0
    assert np.linalg.eigvalsh(columns.covariance(odd)).min() > 0.9e-4


@pytest.mark.parametrize("schedule", [schedules.rectified_flow(), SCHEDULE])
def test_it_is_finite_at_both_ends_and_so_is_its_gradient(schedule):
    ends = jnp.array([0.0, 1.0]) if schedule.num_steps is None else jnp.array([0, 999])
    x = jnp.asarray(noisy((1, 1, 1))[0][:2])

    def linear(params, x, noise_level, cond):
        return params * x

    network = columns.corrected(linear, OWN, schedule, predictions.v)
    total = lambda p, x: jnp.sum(network(p, x, ends, {"mask": jnp.ones((2, L))}) ** 2)  # noqa: E731
    value, grads = jax.value_and_grad(total, argnums=(0, 1))(1.0, x)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_keys_further_inputs_and_further_outputs_are_handed_on():
    seen = {}

    def apply_fn(params, x, level, cond, dropout_keys):
        seen["shape"] = x.shape
        return jnp.concatenate([x, jnp.ones_like(x[..., :4])], -1) * dropout_keys[:, None, None]

    network = columns.corrected(apply_fn, OWN, SCHEDULE, predictions.v)
    x = jnp.ones((2, L, 8))
    out = network(None, x, jnp.array([3, 4]), {"mask": jnp.ones((2, L))},
                  dropout_keys=jnp.array([5.0, 6.0]))  # fmt: skip
    assert seen["shape"] == (2, L, 8)
    assert out.shape == (2, L, 12)
    np.testing.assert_array_equal(
        out[..., 8:], np.array([5.0, 6.0])[:, None, None] * np.ones((2, L, 4))
    )


def test_it_trains_what_columns_tell_of_each_other():
    # Two signs that are always equal: alone each is even; together noise is halved.
    def equal(params, x, noise_level, cond):
        return params * x[..., ::-1]

    own = columns.Columns(np.array([True, True]), np.zeros(2), np.ones((2, 1)))
    x0 = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (512, 1, 1)), jnp.float32)
    batch = {"x0": jnp.repeat(x0, 2, axis=2), "cond": {"mask": jnp.ones((512, 1), bool)}}
    loss = losses.denoising_loss(
        columns.corrected(equal, own, SCHEDULE, predictions.v), SCHEDULE, predictions.v
    )
    of = jax.jit(lambda p: jnp.mean(loss(p, jax.random.key(0), batch)[0]))
    alone, together = of(0.0), of(0.8)
    assert together < 0.9 * alone
    assert jax.grad(of)(0.0) < 0


def test_what_does_not_fit_is_refused():
    ones = np.ones((2, 3, 1), bool)
    x0 = np.ones((2, 3, 1))
    yes, no = np.array([True]), np.array([False])
    with pytest.raises(ValueError, match=r"must both be \(N, L, C\), got \(2, 3\) and bool"):
        columns.fit(x0[..., 0], ones, yes, no)
    with pytest.raises(ValueError, match=r"signs must be \(1,\) bool, got bool \(2,\)"):
        columns.fit(x0, ones, np.array([True, False]), no)
    with pytest.raises(ValueError, match=r"static must be \(1,\) bool, got int64 \(1,\)"):
        columns.fit(x0, ones, yes, np.array([0]))
    with pytest.raises(ValueError, match=r"nothing was observed of channels \[0\]"):
        columns.fit(x0, ~ones, yes, no)
    with pytest.raises(ValueError, match=r"must hold -1 and 1, and channels \[0\] do not"):
        columns.fit(0.5 * x0, ones, yes, no)
    node = Node(jnp.int32(0), jnp.float32(0.6), jnp.float32(0.8))
    with pytest.raises(ValueError, match=r"x must be \(B, L, 4\), L at most 5"):
        columns.alone(OWN, jnp.ones((1, 6, 4)), node, jnp.ones((1, 6)))
    network = columns.corrected(silent, OWN, SCHEDULE, predictions.v)
    with pytest.raises(ValueError, match=r'columns want cond\["mask"\]'):
        network(None, jnp.ones((1, L, 4)), jnp.zeros(1, int), None)
    short = columns.corrected(lambda p, x, t, c: x[..., :2], OWN, SCHEDULE, predictions.v)
    with pytest.raises(ValueError, match="the network must have 4 outputs, got 2"):
        short(None, jnp.ones((1, L, 4)), jnp.zeros(1, int), {"mask": jnp.ones((1, L))})
