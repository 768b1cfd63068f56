"""Every solver of the table: exactness, order, contract, independence of neighbours."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxdiff import denoisers, grids, rng, sampling, schedules, solvers
from jaxdiff.base import Node, Prediction, SolverState
from tests import quick_to_compile
from tests.solver_table import MIXTURE, SCHEDULE, SOLVERS, vp_grid

DETERMINISTIC = [name for name, case in SOLVERS.items() if case.order]


def walk(solver, exact, grid, x, seed=0, first=0):
    keys = rng.per_example(jax.random.key(seed), first + jnp.arange(x.shape[0]))
    return sampling.walk(keys, exact.denoiser, solver, grid, x)


# The data of the order tests: smooth, so that few steps are enough to see the order.
SMOOTH = [0.5, 0.3, 0.2], np.array([0.0, 1.0, -0.6]), np.array([0.5, 0.6, 0.4])


def exact_flow(starts, lams):
    """The probability flow of SMOOTH at the given log(alpha/sigma), in float64: `(N+1, B)`."""
    weights, means, stds = SMOOTH

    def velocity(lam, x):
        alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
        var = ((alpha * stds) ** 2 + sigma**2)[:, None]
        offset = x - alpha * means[:, None]
        log_p = np.log(weights)[:, None] - 0.5 * (offset**2 / var + np.log(var))
        share = np.exp(log_p - log_p.max(0))
        share /= share.sum(0)
        x0 = (share * (means[:, None] + alpha * stds[:, None] ** 2 / var * offset)).sum(0)
        eps = (x - alpha * x0) / sigma
        return alpha * sigma**2 * x0 - sigma * alpha**2 * eps

    ends = lams[0], lams[-1]
    solution = solve_ivp(
        velocity, ends, starts, method="DOP853", rtol=1e-13, atol=1e-14, t_eval=lams
    )
    return solution.y.T


def order_error(case, num_steps):
    """The error of a walk over a uniform log-SNR interior grid, after an exact start."""
    lams = np.linspace(-2.0, 2.0, num_steps * case.stages + 1)
    if case.halves:
        lams = np.sort(np.concatenate([lams, (lams[:3] + lams[1:4]) / 2]))
    exact = denoisers.gaussian_mixture(SMOOTH[0], SMOOTH[1][:, None], SMOOTH[2])
    grid = vp_grid(lams)
    flow = jnp.asarray(exact_flow(np.linspace(-2, 2, 9), lams))[..., None]

    @jax.jit
    def run(grid, flow):
        def step(state, i):
            known = {"x": flow[i], "base_x": flow[jnp.maximum(i - 1, 0)]}
            known = state._replace(**{k: v for k, v in known.items() if k in state._fields})
            state = jax.tree.map(lambda a, b: jnp.where(i < case.startup, a, b), known, state)
            keys = rng.per_example(jax.random.key(0), jnp.arange(9))
            return case.solver.step(keys, exact.denoiser, state, grid[i], grid[i + 1])[0], None

        state = case.solver.init(flow[0], grid[0])
        return jax.lax.scan(step, state, jnp.arange(len(lams) - 1))[0].x

    return np.sqrt(np.mean((np.asarray(run(grid, flow)) - flow[-1]) ** 2))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name):
    case, counts = SOLVERS[name], np.array([128, 256, 512])
    with jax.enable_x64(True):
        errors = [order_error(case, n) for n in counts]
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(order - case.order) < 0.15, (order, errors)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_trajectories_are_those_of_the_flow_of_gaussian_data(name):
    # Along it (x - alpha m) / sqrt(alpha² s² + sigma²) is constant; at every node, from pure noise.
    mean, std = 0.6, 0.4
    exact = denoisers.gaussian([mean], [std])
    case = SOLVERS[name]
    lams = np.linspace(-4, 3, 120 * case.stages + 1)
    if case.halves:
        lams = np.sort(np.concatenate([lams, (lams[:3] + lams[1:4]) / 2]))
    grid = vp_grid(lams)
    keys = rng.per_example(jax.random.key(0), jnp.arange(16))
    x = rng.normal(keys, (1,))
    _, record = jax.jit(
        lambda x: sampling.walk(
            keys, exact.denoiser, case.solver, grid, x, trajectory_every=case.stages
        )
    )(x)
    alpha, sigma = (np.float64(f)[:: case.stages] for f in (grid.alpha, grid.sigma))
    width = np.sqrt((alpha * std) ** 2 + sigma**2)
    scaled = (np.asarray(x, np.float64) - alpha[0] * mean) / width[0]
    true = (alpha * mean)[1:, None, None] + width[1:, None, None] * scaled
    worst = np.abs(np.asarray(record.x) - true).max(axis=(1, 2))
    states = slice(6, None) if case.halves else slice(None)  # a half's state is no sample yet
    assert worst[states].max() < (0.03 if case.order == 1 else 0.002), worst.max()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 30])
def test_a_point_mass_is_hit_exactly(name, num_steps):
    point = np.array([0.5, -0.25, 1.0])
    exact = denoisers.point_mass(point)
    grid = grids.trailing(SCHEDULE, num_steps)
    x, record = jax.jit(
        lambda key: sampling.sample(
            key, exact.denoiser, SOLVERS[name].solver, grid, (4, 3), trajectory_every=num_steps
        )
    )(jax.random.key(0))
    # Those that arrive by past values of the noise have rounded it at sigma/alpha = 157, too.
    past = name.startswith("lms") or name in ("plms", "pndm")
    np.testing.assert_allclose(x, np.broadcast_to(point, (4, 3)), atol=3e-3 if past else 1e-6)
    if SOLVERS[name].evaluations:
        assert int(record.evaluations) == SOLVERS[name].evaluations(num_steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_from_zero_signal_are_finite(name):
    schedule = schedules.from_alphas_bar(np.linspace(0.99, 0, 10))
    grid = grids.trailing(schedule, 10)
    solver = SOLVERS[name].solver
    if name == "probability_flow":
        solver = solvers.probability_flow(schedule)
    if name.startswith("lms") or name == "pndm":
        grid = grid[1:]  # in terms of sigma/alpha, or of a step continued from there: undefined
    x = jax.jit(lambda key: sampling.sample(key, MIXTURE.denoiser, solver, grid, (50, 1)))(
        jax.random.key(0)
    )
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 5


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_keeps_the_contract(name):
    # Structure and types never change, the caller's jit compiles once, gradients are finite.
    solver = SOLVERS[name].solver
    now, next = SCHEDULE.at(500), SCHEDULE.at(400)
    x = jax.random.normal(jax.random.key(0), (3, 1))
    keys = rng.per_example(jax.random.key(1), jnp.arange(3))
    state = solver.init(x, now)
    after, info = jax.eval_shape(
        lambda state: solver.step(keys, MIXTURE.denoiser, state, now, next), state
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [a.dtype for a in jax.tree.leaves(after)] == [a.dtype for a in jax.tree.leaves(state)]
    assert [a.shape for a in jax.tree.leaves(after)] == [a.shape for a in jax.tree.leaves(state)]
    assert after.x.shape == info.x0.shape == x.shape

    grid = grids.trailing(SCHEDULE, 10)
    run = jax.jit(
        lambda key, x: sampling.walk(
            rng.per_example(key, jnp.arange(3)), MIXTURE.denoiser, solver, grid, x
        )[0]
    )
    one = run(jax.random.key(0), x)
    run(jax.random.key(1), x + 1)
    assert run._cache_size() == 1
    grads = jax.jit(jax.grad(lambda x: run(jax.random.key(0), x).sum()))(x)
    assert np.isfinite(grads).all()
    # The neighbours change, the sample does not.
    two = run(jax.random.key(0), x + jnp.array([0.0, 1.0, -3.0])[:, None])
    np.testing.assert_array_equal(one[0], two[0])
    assert np.abs(one[1:] - two[1:]).max() > 1e-4
    # Those that draw nothing have nothing of the key.
    three = run(jax.random.key(1), x)
    assert np.array_equal(one, three) == (name in DETERMINISTIC or name == "probability_flow")


@pytest.mark.parametrize("name", SOLVERS)
def test_batched_nodes_give_what_scalar_nodes_give(name):
    solver = SOLVERS[name].solver
    x = jax.random.normal(jax.random.key(0), (2, 1))
    times = jnp.array([[500, 30], [400, 20], [300, 10]])

    def run(keys, x, times):
        def step(state, i):
            step_keys = rng.stream(keys, rng.Stream.STEP, i)
            now, next = SCHEDULE.at(times[i]), SCHEDULE.at(times[i + 1])
            return solver.step(step_keys, MIXTURE.denoiser, state, now, next)[0], None

        return jax.lax.scan(step, solver.init(x, SCHEDULE.at(times[0])), jnp.arange(2))[0].x

    keys = rng.per_example(jax.random.key(1), jnp.arange(2))
    both = jax.jit(run)(keys, x, times)
    for i in range(2):
        one = jax.jit(run)(keys[i : i + 1], x[i : i + 1], times[:, i])
        np.testing.assert_allclose(one, both[i : i + 1], rtol=2e-4, atol=2e-5)


def test_an_sde_solver_follows_one_path_on_all_grids():
    # Doubling the number of steps halves the distance to the samples of twice as many steps; with
    # noise by the number of the step they are other samples altogether.
    def ends(solver):
        def run(n):
            grid = grids.trailing(SCHEDULE, n)
            return jax.jit(
                lambda: sampling.sample(
                    jax.random.key(0), MIXTURE.denoiser, solver, grid, (500, 1)
                ),
                compiler_options=quick_to_compile.FULL if solver.one_path else None,
            )()

        xs = [run(n) for n in (62, 250, 500, 1000)]
        return [float(jnp.mean(jnp.abs(a - b))) for a, b in itertools.pairwise(xs)]

    gaps = ends(solvers.sde_dpm_solver_pp(2))
    assert gaps[-1] < gaps[0] / 3
    assert gaps[-1] < 0.02
    assert min(ends(solvers.ddpm())) > 0.2


def test_adaptive_flow_is_exact_to_its_tolerance_for_each_sample():
    exact = denoisers.gaussian([0.6], [0.4])
    grid = grids.trailing(SCHEDULE, 2)[:2]
    x = jnp.linspace(-3, 3, 12)[:, None]
    scaled = (x - grid.alpha[0] * 0.6) / np.hypot(0.4 * grid.alpha[0], grid.sigma[0])
    true = grid.alpha[1] * 0.6 + np.hypot(0.4 * grid.alpha[1], grid.sigma[1]) * scaled
    for tol, bound in ((1e-3, 5e-3), (1e-6, 2e-5)):
        solver = solvers.probability_flow(SCHEDULE, rtol=tol, atol=tol)
        got, record = jax.jit(lambda x, s=solver: walk(s, exact, grid, x))(x)
        assert np.abs(got - true).max() < bound
        assert 6 < int(record.evaluations) < 400


def test_self_conditioning_hands_on_the_last_prediction():
    seen = []

    def denoiser(x, node, x0_prev):
        seen.append(x0_prev)
        return Prediction(0.5 * x)

    solver = solvers.self_conditioned(solvers.ddim())
    keys = rng.per_example(jax.random.key(0), jnp.arange(2))
    x, grid = jnp.ones((2, 1)), grids.trailing(SCHEDULE, 4)
    state = solver.init(x, grid[0])
    for i in range(2):
        state, info = solver.step(keys, denoiser, state, grid[i], grid[i + 1])
    np.testing.assert_array_equal(seen[0], jnp.zeros_like(x))
    np.testing.assert_array_equal(seen[1], 0.5 * x)
    np.testing.assert_array_equal(state.x0, info.x0)


def test_a_learned_variance_lies_where_the_prediction_says():
    now, next = SCHEDULE.at(500), SCHEDULE.at(400)
    x = jnp.zeros((4000, 1))

    def std(variance, fraction=None):
        keys = rng.per_example(jax.random.key(0), jnp.arange(4000))
        fraction = None if fraction is None else jnp.full_like(x, fraction)
        denoiser = lambda x, node: Prediction(jnp.zeros_like(x), fraction)  # noqa: E731
        solver = solvers.ddpm(variance)
        return float(solver.step(keys, denoiser, SolverState(x), now, next)[0].x.std())

    small, large = std("small"), std("large")
    assert std("learned", 0.0) == pytest.approx(small, rel=1e-4)
    assert std("learned", 1.0) == pytest.approx(large, rel=1e-4)
    assert std("learned", 0.5) == pytest.approx(np.sqrt(small * large), rel=1e-4)
    with pytest.raises(ValueError, match="needs a denoiser that predicts one"):
        std("learned")


def test_bad_options_are_refused():
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
            solvers.ddim(eta)
    with pytest.raises(ValueError, match='"small", "large" or "learned"'):
        solvers.ddpm("medium")
    for make, most in (
        (solvers.dpm_solver, 3),
        (solvers.dpm_solver_pp, 3),
        (solvers.deis, 4),
        (solvers.lms, 4),
        (solvers.unipc, 3),
        (solvers.sde_dpm_solver_pp, 2),
    ):
        for order in (0, most + 1, 1.5):
            with pytest.raises(ValueError, match="order must be"):
                make(order)
    with pytest.raises(ValueError, match='"multistep" or "singlestep"'):
        solvers.dpm_solver(2, "manystep")
    with pytest.raises(ValueError, match='"midpoint" or "exact"'):
        solvers.dpm_solver_pp(2, average="heun")
    with pytest.raises(ValueError, match='"midpoint" or "exact"'):
        solvers.sde_dpm_solver_pp(2, average="heun")
    with pytest.raises(ValueError, match='"bh1" or "bh2"'):
        solvers.unipc(2, "bh3")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        solvers.predictor_corrector(solvers.ddpm(), 0)
    with pytest.raises(ValueError, match="snr must be positive"):
        solvers.predictor_corrector(solvers.ddpm(), 1, 0.0)
    with pytest.raises(ValueError, match="rtol and atol must be positive"):
        solvers.probability_flow(SCHEDULE, rtol=0.0)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        solvers.probability_flow(SCHEDULE, max_steps=0)


def test_a_flow_that_needs_too_many_steps_is_not_a_sample():
    solver = solvers.probability_flow(SCHEDULE, rtol=1e-6, atol=1e-6, max_steps=2)
    x, _ = walk(solver, MIXTURE, grids.trailing(SCHEDULE, 2), jnp.ones((2, 1)))
    assert np.isnan(x).all()


def test_diffrax_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"jaxdiff\[ode\]"):
        solvers.probability_flow(SCHEDULE)


def test_moves_towards_noise_are_forward_noising_and_ask_nothing():
    # Down to lambda = 2, up to 0, down to 2: the marginals of Gaussian data survive.
    exact = denoisers.gaussian([0.0], [0.5])
    lams = np.concatenate([np.linspace(-3, 2, 60), np.linspace(0, 2, 40)])
    grid = vp_grid(lams)
    keys = rng.per_example(jax.random.key(0), jnp.arange(20000))
    for name in ("ddim", "dpm_solver_pp_2m", "sde_dpm_solver_pp_2m"):
        solver = SOLVERS[name].solver
        _, record = jax.jit(
            lambda x, solver=solver: sampling.walk(
                keys, exact.denoiser, solver, grid, x, trajectory_every=1
            ),
            compiler_options=quick_to_compile.FULL if solver.one_path else None,
        )(grid.sigma[0] * rng.normal(rng.stream(keys, rng.Stream.START), (1,)))
        assert int(record.evaluations) == 98  # of 99 moves
        x = np.asarray(record.x[..., 0])
        alpha, sigma = np.asarray(grid.alpha), np.asarray(grid.sigma)
        for k in (58, 59, 98):
            true = np.hypot(0.5 * alpha[k + 1], sigma[k + 1])
            assert abs(x[k].std() / true - 1) < 0.03  # 6 standard errors, and the steps' own error
        # The move up adds noise that was not there.
        ratio = alpha[60] / alpha[59]
        fresh = x[59] - ratio * x[58]
        assert abs(np.corrcoef(fresh, x[58])[0, 1]) < 5 / np.sqrt(20000)
        np.testing.assert_array_equal(record.x0[59], record.x0[58])


def test_a_node_is_any_point():
    # Nodes of a variance-exploding process: the same samples, scaled.
    grid = vp_grid(np.linspace(-3, 3, 20))
    exploding = Node(grid.t, jnp.ones_like(grid.alpha), grid.sigma / grid.alpha)
    keys = rng.per_example(jax.random.key(0), jnp.arange(8))
    x = rng.normal(rng.stream(keys, rng.Stream.START), (1,))
    for name in ("dpm_solver_pp_2m", "dpm_solver_3m", "lms_4", "unipc_2"):
        solver = SOLVERS[name].solver
        a = jax.jit(lambda x, s=solver: sampling.walk(keys, MIXTURE.denoiser, s, grid, x)[0])(x)
        b = jax.jit(lambda x, s=solver: sampling.walk(keys, MIXTURE.denoiser, s, exploding, x)[0])(
            x / grid.alpha[0]
        )
        np.testing.assert_allclose(a / grid.alpha[-1], b, rtol=1e-3, atol=1e-4)
