"""What a configuration can name: every solver, spacing, guidance, schedule and loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ml_collections")

from absl import flags

from experiments import build, drawing, sample
from experiments.config import default

SHAPE = (4, 4, 1)


def tiny(**changes):
    config = default()
    config.update(
        {
            "schedule": {"name": "cosine"},
            "parameterization": "v",
            "model": {
                "channels": 4,
                "channel_multipliers": (1,),
                "num_res_blocks": 1,
                "attention_levels": (),
            },
            "train": {"batch_size": 4},
            "sample": {"batch_size": 4, "steps": 8},
            "labels": {"num_classes": 3},
        }
    )
    config.update(changes)
    return config


def params_of(config):
    return jax.eval_shape(build.make_training(config, SHAPE)[0]).params


def drawn(config, **weak):
    params = params_of(config)
    weak = {name: params for name in weak}
    return jax.eval_shape(drawing.make_draw(config, SHAPE), params, 0, **weak)


@pytest.mark.parametrize("name", drawing.SOLVERS)
def test_every_solver_draws(name):
    assert drawn(tiny(sample={"solver": name})).shape == (4, *SHAPE)


@pytest.mark.parametrize("name", drawing.GRIDS)
def test_every_spacing_has_the_steps_asked_for(name):
    grid = drawing.make_grid(tiny(sample={"grid": name}))
    assert grid.sigma.shape == (9,)
    assert float(grid.sigma[-1]) == 0


@pytest.mark.parametrize("name", drawing.GUIDANCE)
@pytest.mark.parametrize("threshold", drawing.THRESHOLDS)
def test_every_guidance_and_threshold_draws(name, threshold):
    config = tiny(sample={"guidance": name, "threshold": threshold})
    weak = {"weak": None} if name == "autoguidance" else {}
    assert drawn(config, **weak).shape == (4, *SHAPE)


def test_options_reach_the_functions():
    options = {"solver": "dpm_solver_pp", "solver_options": {"order": 3, "kind": "singlestep"}}
    state = drawing.make_solver(tiny(sample=options)).init(
        jnp.zeros((1, 1)), build.make_schedule(tiny()).at(5)
    )
    assert len(state.values) == 2
    karras = {"grid": "karras", "grid_options": {"rho": 3.0, "sigma_max": 20.0}}
    grid = drawing.make_grid(tiny(sample=karras))
    np.testing.assert_allclose(grid.sigma[0] / grid.alpha[0], 20.0, rtol=1e-5)
    churned = {**karras, "churn": 4.0, "churn_options": {"s_max": 1.0}}
    ratio = np.asarray(drawing.make_grid(tiny(sample=churned)).sigma)
    assert 0 < np.sum(np.diff(ratio) > 0) < 8
    halves = drawing.make_grid(tiny(sample={"solver": "pndm"}))
    assert halves.sigma.shape == (12,)


def test_guidance_counts_what_it_costs():
    # The scale of 1 and the interval save the second network.
    def count(**options):
        config = tiny(sample={"guidance": "classifier_free", "guidance_options": options})
        make = drawing.make_denoiser(config, SHAPE)
        params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params_of(config))
        node = build.make_schedule(config).at(500)
        denoiser = make(params, jnp.zeros(4, jnp.int32))
        return int(denoiser(jnp.zeros((4, *SHAPE)), node).evaluations)

    assert count(scale=3.0) == 2
    assert count(scale=1.0) == 1
    assert count(scale=3.0, low=0.1, high=5.0) == 2
    assert count(scale=3.0, low=5.0) == 1


def test_labels_come_in_turn_or_as_asked():
    labels = drawing.make_labels(tiny(), 4, 5)
    np.testing.assert_array_equal(labels, [1, 2, 0, 1, 2])
    np.testing.assert_array_equal(drawing.make_labels(tiny(sample={"label": 2}), 0, 3), [2, 2, 2])


@pytest.mark.parametrize("name", build.SCHEDULES)
def test_every_schedule_trains(name):
    config = tiny(schedule={"name": name}, parameterization="flow")
    loss = jax.eval_shape(build.make_loss(config, SHAPE), params_of(config), *_batch())[0]
    assert loss.shape == (4,)


@pytest.mark.parametrize("name", build.WEIGHTINGS)
def test_every_weighting_trains(name):
    schedule = "vp_linear" if name == "elbo" else "cosine"
    config = tiny(weighting=name, schedule={"name": schedule})
    loss = jax.eval_shape(build.make_loss(config, SHAPE), params_of(config), *_batch())[0]
    assert loss.shape == (4,)


@pytest.mark.parametrize("name", build.TIMESTEPS)
def test_every_sampler_of_times_trains(name):
    config = tiny(timesteps=name)
    init, step = build.make_training(config, SHAPE)
    batch = {name: array for name, array in _batch()[1].items() if name != "index"}
    state, metrics = jax.eval_shape(step, jax.eval_shape(init), batch)
    assert metrics["loss"].shape == ()
    assert (state.history is not None) == (name == "loss_aware")


@pytest.mark.parametrize(
    "changes",
    [
        {"self_condition": True, "labels": {"num_classes": 0}},
        {
            "vlb_weight": 0.001,
            "sample": {"solver": "ddpm", "solver_options": {"variance": "learned"}},
        },
        {"offset_noise": 0.1},
        {"parameterization": "edm", "schedule": {"name": "edm"}, "weighting": "edm"},
        {"schedule": {"name": "rectified_flow", "shift": 3.0}, "parameterization": "flow"},
        {"schedule": {"name": "scaled_linear", "zero_terminal_snr": True}},
    ],
)  # fmt: skip
def test_every_option_of_training_trains_and_draws(changes):
    config = tiny(**changes)
    params = params_of(config)
    key, batch = _batch()
    if not config.labels.num_classes:
        del batch["cond"]
    loss = jax.eval_shape(build.make_loss(config, SHAPE), params, key, batch)[0]
    assert loss.shape == (4,)
    assert drawn(config).shape == (4, *SHAPE)


def _batch():
    key = jax.eval_shape(lambda: jax.random.key(0))
    x0 = jax.ShapeDtypeStruct((4, *SHAPE), jnp.float32)
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    return key, {"x0": x0, "cond": labels, "index": labels}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sample": {"solver": "ddmp"}}, "did you mean 'ddpm'"),
        ({"sample": {"solver": "ddim", "solver_options": {"order": 2}}}, "takes no order"),
        ({"sample": {"grid": "trailing", "grid_options": {"rho": 2.0}}}, "takes no rho"),
        ({"sample": {"guidance_options": {"scale": 2.0}}}, "takes no scale: it has no options"),
        ({"sample": {"label": 3}}, r"must lie in 0 \.\. 2"),
        ({"labels": {"num_classes": 0}, "sample": {"label": 1}}, "trained with labels"),
        (
            {"labels": {"num_classes": 0}, "sample": {"guidance": "cfg_plus_plus"}},
            "trained with conditions",
        ),
        ({"schedule": {"name": "vp_linear", "zero_terminal_snr": True}}, "for discrete schedules"),
        ({"schedule": {"name": "linear", "shift": 2.0}}, "for continuous schedules"),
        ({"weighting": "snr", "weighting_options": {"gamma": 2.0}}, "takes no gamma"),
    ],
)
def test_what_does_not_fit_is_refused(changes, match):
    config = tiny(**changes)

    def use():
        build.make_loss(config, SHAPE)
        drawing.make_draw(config, SHAPE)
        drawing.make_denoiser(config, SHAPE)(None, jnp.zeros(4, jnp.int32))

    with pytest.raises(ValueError, match=match):
        use()


def test_autoguidance_needs_a_worse_network():
    config = tiny(sample={"guidance": "autoguidance"})
    with pytest.raises(ValueError, match="worse network"):
        drawing.make_denoiser(config, SHAPE)(None, jnp.zeros(4, jnp.int32))


def test_flags_override_and_forget_the_options_of_another(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(sample, "FLAGS", values)
    monkeypatch.setattr(flags, "FLAGS", values)
    for kind in ("string", "integer", "bool", "float", "enum"):
        define = getattr(flags, f"DEFINE_{kind}")
        monkeypatch.setattr(
            sample.flags, f"DEFINE_{kind}",
            lambda *args, _define=define, **kwargs: _define(*args, flag_values=values, **kwargs),
        )  # fmt: skip
    sample.define_flags()
    values(["sample", "--solver=unipc", "--order=3", "--beta_a=0.5", "--grid=beta", "--scale=2"])
    config = tiny(
        sample={
            "solver": "ddpm", "solver_options": {"variance": "large"},
            "guidance": "classifier_free", "guidance_options": {"low": 0.1},
        }
    )  # fmt: skip
    sample.override(config)
    assert config.sample.solver == "unipc"
    assert config.sample.solver_options.variance is None
    assert config.sample.solver_options.order == 3
    assert config.sample.grid_options.a == 0.5
    assert (config.sample.guidance_options.scale, config.sample.guidance_options.low) == (2.0, 0.1)
