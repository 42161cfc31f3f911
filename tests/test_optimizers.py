"""The contract of every ready-made optimizer, driven by their registry."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mup_jax
from mup_jax import infer_shapes, rules
from mup_jax.optimizers import OPTIMIZERS

BASE, WIDTH, VOCABULARY, K = 8, 16, 10, 2


def params_of(width):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    return {
        "embed": normal(VOCABULARY, width),
        "hidden": normal(width, width),
        "head": normal(width, VOCABULARY),
        "gain": normal(width),
    }


PARAMS = params_of(WIDTH)
SHAPES = infer_shapes(params_of(BASE), PARAMS, depth_ratio=3.0)


def run(optimizer, steps=3, params=PARAMS):
    """Updates at fixed parameters, so that runs can be compared step by step."""
    rng = np.random.default_rng(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    updates = []
    for _ in range(steps):
        gradient = {key: jnp.float32(rng.normal(size=p.shape)) for key, p in params.items()}
        u, state = update(gradient, state, params)
        updates.append(u)
    return updates


@functools.cache
def run_named(name, with_shapes, **options):
    options = dict(options)
    return run(OPTIMIZERS[name](0.1, shapes=SHAPES if with_shapes else None, **options))


def assert_trees_close(got, want, tolerance=1e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance * scale)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_signature(name):
    optimizer = OPTIMIZERS[name]
    assert getattr(mup_jax, name) is optimizer
    parameters = inspect.signature(optimizer).parameters
    assert list(parameters)[:4] == ["learning_rate", "schedule", "weight_decay", "shapes"]
    defaults = [parameters[key].default for key in ("schedule", "weight_decay", "shapes")]
    assert defaults == [None, 0.0, None]
    kinds = {p.kind for key, p in parameters.items() if key != "learning_rate"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}
    documented = inspect.getdoc(optimizer)
    assert all(f"{key}:" in documented for key in parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("with_shapes", [False, True])
def test_updates_are_minus_schedule_times_learning_rate_and_decay(name, with_shapes):
    schedule = lambda count: jnp.array([0.0, 0.5, 2.0])[count]
    plain = run_named(name, with_shapes)
    options = {"shapes": SHAPES if with_shapes else None}
    got = run(OPTIMIZERS[name](0.2, schedule=schedule, weight_decay=0.3, **options))
    width_ratio = WIDTH / BASE if with_shapes else 1.0
    for step in range(3):
        s = float(schedule(step))
        for key, u in got[step].items():
            decay = 0.0 if key == "gain" else 0.3 / width_ratio
            want = 2 * s * plain[step][key] - s * decay * PARAMS[key]
            np.testing.assert_allclose(u, want, rtol=1e-4, atol=1e-5)
    assert not any(np.any(u) for u in got[0].values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_may_be_traced(name):
    takes_adam = "adam_learning_rate" in inspect.signature(OPTIMIZERS[name]).parameters
    gradient = jax.tree.map(jnp.cos, PARAMS)

    def step(learning_rate, adam_learning_rate, weight_decay):
        options = {"adam_learning_rate": adam_learning_rate} if takes_adam else {}
        optimizer = OPTIMIZERS[name](
            learning_rate, weight_decay=weight_decay, shapes=SHAPES, **options
        )
        return optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)[0]

    assert_trees_close(jax.jit(step)(0.1, 0.02, 0.3), jax.jit(lambda: step(0.1, 0.02, 0.3))())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_injected_hyperparameters(name):
    static = [k for k in inspect.signature(OPTIMIZERS[name]).parameters if k != "learning_rate"]
    injected = optax.inject_hyperparams(OPTIMIZERS[name], static_args=static)
    optimizer = injected(learning_rate=0.0, shapes=SHAPES)

    @jax.jit
    def step(gradient, state, learning_rate):
        state.hyperparams["learning_rate"] = learning_rate
        return optimizer.update(gradient, state, PARAMS)

    state = optimizer.init(PARAMS)
    rng = np.random.default_rng(0)
    for want in run_named(name, True)[:2]:
        gradient = {key: jnp.float32(rng.normal(size=p.shape)) for key, p in PARAMS.items()}
        got, state = step(gradient, state, 0.1)
        assert_trees_close(got, want)


ROUTED = [name for name in OPTIMIZERS if name != "adamw"]
ADAM_ARGUMENTS = {"muon": (0.8, 0.98), "shampoo": (0.95, 0.98), "soap": (0.9, 0.98)}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("with_shapes", [False, True])
def test_adam_has_what_is_not_hidden_at_its_own_learning_rate(name, with_shapes):
    plain, faster = (
        run_named(name, with_shapes),
        run_named(name, with_shapes, adam_learning_rate=0.3),
    )
    adam = run(optax.adam(0.1, *ADAM_ARGUMENTS[name], eps=1e-8))
    on_adam = {"embed", "head", "gain"} if with_shapes else {"gain"}
    for step in range(3):
        for key in PARAMS:
            if key in on_adam:
                factor = rules.adam().learning_rate(SHAPES[key]) if with_shapes else 1.0
                want = factor * adam[step][key]
                np.testing.assert_allclose(plain[step][key], want, rtol=1e-3, atol=1e-6)
                np.testing.assert_allclose(faster[step][key], 3 * want, rtol=1e-3, atol=1e-6)
            else:
                np.testing.assert_array_equal(faster[step][key], plain[step][key])
                gap = np.linalg.norm(plain[step][key] - adam[step][key])
                assert gap > 0.1 * np.linalg.norm(adam[step][key])


DIRECTIONS = {
    "muon": (lambda: mup_jax.scale_by_muon(), rules.muon()),
    "shampoo": (
        lambda: mup_jax.graft(
            optax.scale_by_adam(0.95, 0.98), mup_jax.scale_by_shampoo(0.95, 0.98)
        ),
        rules.grafted(rules.adam()),
    ),
    "soap": (lambda: mup_jax.scale_by_soap(), rules.soap()),
}


@pytest.mark.parametrize("name", ROUTED)
def test_hidden_matrices_get_the_direction_by_its_rule(name):
    make, rule = DIRECTIONS[name]
    direction = run(make(), params={"hidden": PARAMS["hidden"]})
    rng = np.random.default_rng(0)
    del direction, rng
    optimizer = OPTIMIZERS[name](0.1, shapes=SHAPES)
    gradients = [{key: g * jnp.cos(p) for key, p in PARAMS.items()} for g in (1.0, -0.5)]
    state, inner = optimizer.init(PARAMS), make()
    inner_state = inner.init({"hidden": PARAMS["hidden"]})
    for gradient in gradients:
        got, state = optimizer.update(gradient, state, PARAMS)
        u, inner_state = inner.update({"hidden": gradient["hidden"]}, inner_state)
        want = -0.1 * rule.learning_rate(SHAPES["hidden"]) * u["hidden"]
        np.testing.assert_allclose(got["hidden"], want, rtol=2e-3, atol=1e-5)


# Where Optax has the optimizer


def test_adamw_without_decay_is_optax_adam():
    want = run(optax.adam(0.1, 0.9, 0.98, eps=1e-8))
    assert_trees_close(run_named("adamw", False), want, 1e-6)


def test_muon_is_that_of_optax():
    """Whose momentum is bias-corrected, which an orthogonalized matrix does not see, but not Nesterov's."""
    gradients = np.float32(np.random.default_rng(0).normal(size=(4, 12, 20)))
    ours = mup_jax.scale_by_muon(orthogonalizer="newton_schulz", nesterov=False)
    theirs = optax.contrib.scale_by_muon(nesterov=False)
    state, their_state = ours.init(gradients[0]), theirs.init(gradients[0])
    for gradient in gradients:
        got, state = jax.jit(ours.update)(gradient, state)
        want, their_state = jax.jit(theirs.update)(gradient, their_state)
        np.testing.assert_allclose(got, want, atol=2e-4)
