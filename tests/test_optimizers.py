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

# Square, as what rounding leaves in a null space is noise.
BASE, WIDTH, VOCABULARY = 8, 16, 16


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


# What makes them quick to compile.
OPTIONS = {name: {} for name in OPTIMIZERS} | {"muon": {"orthogonalizer": "svd"}}
SCHEDULE = (1.0, 0.0, 0.5)


def gradients():
    rng = np.random.default_rng(0)
    for _ in SCHEDULE:
        yield {key: jnp.float32(rng.normal(size=p.shape)) for key, p in PARAMS.items()}


def run(transformation, scale=1.0):
    state, update = transformation.init(PARAMS), jax.jit(transformation.update)
    updates = []
    for gradient in gradients():
        u, state = update(gradient, state, PARAMS)
        updates.append(jax.tree.map(lambda x: scale * x, u))
    return updates


@functools.cache
def compiled(name, with_shapes):
    """A step with hyperparameters as arguments: learning rates in training programs are traced."""

    def build(hyperparameters):
        return OPTIMIZERS[name](
            schedule=lambda count: jnp.array(SCHEDULE)[count],
            shapes=SHAPES if with_shapes else None,
            **OPTIONS[name],
            **hyperparameters,
        )

    return build, jax.jit(lambda g, state, hyper: build(hyper).update(g, state, PARAMS))


@functools.cache
def run_named(name, with_shapes, learning_rate=0.1, weight_decay=0.0, adam_learning_rate=0.1):
    hyperparameters = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    if name in ROUTED:
        hyperparameters["adam_learning_rate"] = adam_learning_rate
    build, update = compiled(name, with_shapes)
    state, updates = build(hyperparameters).init(PARAMS), []
    for gradient in gradients():
        u, state = update(gradient, state, hyperparameters)
        updates.append(u)
    return updates


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
    plain = run_named(name, with_shapes)
    got = run_named(name, with_shapes, 0.2, weight_decay=0.3, adam_learning_rate=0.2)
    width_ratio = WIDTH / BASE if with_shapes else 1.0
    for s, u, before in zip(SCHEDULE, got, plain, strict=True):
        for key, w in PARAMS.items():
            decay = 0.0 if key == "gain" else 0.3 / width_ratio
            want = 2 * before[key] - s * decay * w
            np.testing.assert_allclose(u[key], want, rtol=1e-4, atol=1e-6)
            assert np.any(u[key]) == (s > 0)


@functools.cache
def first_step(name):
    """The first updates by the defaults."""
    optimizer = OPTIMIZERS[name](0.1, shapes=SHAPES, **OPTIONS[name])
    return jax.jit(optimizer.update)(next(gradients()), optimizer.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_injected_hyperparameters(name):
    static = [k for k in inspect.signature(OPTIMIZERS[name]).parameters if k != "learning_rate"]
    injected = optax.inject_hyperparams(OPTIMIZERS[name], static_args=static)
    optimizer = injected(learning_rate=0.0, shapes=SHAPES, **OPTIONS[name])
    state = optimizer.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.1)
    got, _ = jax.jit(optimizer.update)(next(gradients()), state, PARAMS)
    assert_trees_close(got, first_step(name))


ROUTED = [name for name in OPTIMIZERS if name != "adamw"]
ADAM_ARGUMENTS = {"muon": (0.8, 0.98), "shampoo": (0.95, 0.98), "soap": (0.9, 0.98)}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("with_shapes", [False, True])
def test_adam_has_what_is_not_hidden_at_its_own_learning_rate(name, with_shapes):
    plain = run_named(name, with_shapes)
    faster = run_named(name, with_shapes, adam_learning_rate=0.3)
    adam = run(optax.scale_by_adam(*ADAM_ARGUMENTS[name]), -0.1)
    on_adam = {"embed", "head", "gain"} if with_shapes else {"gain"}
    for step, s in enumerate(SCHEDULE):
        for key in PARAMS:
            factor = rules.adam().learning_rate(SHAPES[key]) if with_shapes else 1.0
            want = s * factor * adam[step][key]
            if key in on_adam:
                np.testing.assert_allclose(plain[step][key], want, rtol=1e-3, atol=1e-6)
                np.testing.assert_allclose(faster[step][key], 3 * want, rtol=1e-3, atol=1e-6)
            else:
                np.testing.assert_allclose(faster[step][key], plain[step][key], rtol=1e-6)
                gap = np.linalg.norm(plain[step][key] - want)
                assert s == 0 or gap > 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["muon", "shampoo"])
def test_adam_has_the_common_learning_rate_by_default(name):
    assert_trees_close(first_step(name), run_named(name, True)[0])


def test_soap_has_the_width_side_of_embedding_and_readout_by_default():
    got, gradient = first_step("soap"), next(gradients())
    for key, sides in {"embed": "out", "head": "in"}.items():
        direction = mup_jax.scale_by_soap(sides=sides)
        u, _ = jax.jit(direction.update)(gradient[key], direction.init(PARAMS[key]))
        want = -0.1 * rules.soap(sides=sides).learning_rate(SHAPES[key]) * u
        assert np.linalg.norm(got[key] - want) <= 2e-3 * np.linalg.norm(want)


DIRECTIONS = {
    "muon": (mup_jax.scale_by_muon(orthogonalizer="svd"), rules.muon()),
    "shampoo": (
        mup_jax.graft(optax.scale_by_adam(0.95, 0.98), mup_jax.scale_by_shampoo(0.95, 0.98)),
        rules.grafted(rules.adam()),
    ),
    "soap": (mup_jax.scale_by_soap(), rules.soap()),
}


@pytest.mark.parametrize("name", ROUTED)
def test_hidden_matrices_get_the_direction_by_its_rule(name):
    direction, rule = DIRECTIONS[name]
    state, update = direction.init(PARAMS["hidden"]), jax.jit(direction.update)
    for s, gradient, got in zip(SCHEDULE, gradients(), run_named(name, True), strict=True):
        u, state = update(gradient["hidden"], state)
        want = -0.1 * s * rule.learning_rate(SHAPES["hidden"]) * u
        assert np.linalg.norm(got["hidden"] - want) <= 2e-3 * np.linalg.norm(want)


# Where Optax has the optimizer


def test_adamw_without_decay_is_optax_adam():
    adam = run(optax.scale_by_adam(0.9, 0.98, eps=1e-8), -0.1)
    want = [jax.tree.map(lambda x, s=s: s * x, u) for s, u in zip(SCHEDULE, adam, strict=True)]
    assert_trees_close(run_named("adamw", False), want, 1e-5)


def test_muon_is_that_of_optax():
    """Without Nesterov, for which Optax corrects the bias of momentum and gradient apart."""
    gradients = np.float32(np.random.default_rng(0).normal(size=(4, 12, 20)))
    ours = mup_jax.scale_by_muon(orthogonalizer="newton_schulz", nesterov=False)
    theirs = optax.contrib.scale_by_muon(nesterov=False)
    state, their_state = ours.init(gradients[0]), theirs.init(gradients[0])
    for gradient in gradients:
        got, state = jax.jit(ours.update)(gradient, state)
        want, their_state = jax.jit(theirs.update)(gradient, their_state)
        np.testing.assert_allclose(got, want, atol=2e-4)
