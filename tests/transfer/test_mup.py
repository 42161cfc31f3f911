"""The wrapper: a scaled gradient stands for a scaled ε, and weight decay beside it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mup_jax
from mup_jax import ParamShape, add_independent_weight_decay, infer_shapes, mup, rules

# Square, as the null space of a lone covariance has no basis of its own.
WIDTH, BASE, VOCABULARY, DEPTH = 12, 4, 12, 3.0


def params_of(width):
    return {
        "embed": jnp.ones((VOCABULARY, width)),
        "hidden": jnp.ones((width, width)),
        "head": jnp.ones((width, VOCABULARY)),
    }


PARAMS = params_of(WIDTH)
SHAPES = infer_shapes(params_of(BASE), PARAMS, depth_ratio=DEPTH)


def gradients(steps=3):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield {key: jnp.float32(0.1 * rng.normal(size=p.shape)) for key, p in PARAMS.items()}


def run(transformation, params=PARAMS):
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    updates = []
    for gradient in gradients():
        u, state = update({key: gradient[key] for key in params}, state, params)
        updates.append(u)
    return updates


# An ε of about the size of what it is added to, so that its rule matters.
EPSILON_CASES = {
    "adam": (lambda eps: optax.scale_by_adam(0.9, 0.98, eps=eps), rules.adam(), 0.1),
    "muon": (
        lambda eps: mup_jax.scale_by_muon(eps=eps, orthogonalizer="newton_schulz", ns_steps=2),
        rules.muon(),
        0.5,
    ),
    "soap": (
        lambda eps: mup_jax.scale_by_soap(eps=eps, block_size=None, stagger=False),
        rules.soap(block_size=None),
        0.1,
    ),
    "shampoo": (
        lambda eps: mup_jax.scale_by_shampoo(
            eps=eps, relative_eps=False, block_size=None, stagger=False
        ),
        rules.shampoo(relative_eps=False, block_size=None),
        0.1,
    ),
    "one-sided shampoo": (
        lambda eps: mup_jax.scale_by_shampoo(
            eps=eps, relative_eps=False, sides="in", stagger=False
        ),
        rules.shampoo(relative_eps=False, sides="in"),
        0.1,
    ),
}


@pytest.mark.parametrize(
    "name",
    [*list(EPSILON_CASES)[:4], pytest.param("one-sided shampoo", marks=pytest.mark.slow)],
)
def test_scaling_the_gradient_is_scaling_epsilon(name):
    make, rule, eps = EPSILON_CASES[name]
    scaled = run(mup(make(eps), rule, SHAPES))

    @functools.partial(jax.jit, static_argnums=0)
    def alone(key, eps):
        transformation, updates = make(eps), []
        state = transformation.init(PARAMS[key])
        for gradient in gradients():
            u, state = transformation.update(gradient[key], state)
            updates.append(u)
        return updates

    for key, shape in SHAPES.items():
        got = np.asarray([u[key] for u in scaled])
        want, other = (
            rule.learning_rate(shape) * np.asarray(alone(key, e))
            for e in (eps * rule.epsilon(shape), eps)
        )
        error = lambda x, want=want: np.linalg.norm(x - want) / np.linalg.norm(want)
        assert error(got) < 2e-3
        assert rule.epsilon(shape) == 1 or error(other) > 1e-2


# Depth

BLOCK_CASES = {name: (make(eps), rule) for name, (make, rule, eps) in EPSILON_CASES.items()} | {
    "sgd": (optax.trace(0.9), rules.sgd()),
    "lion": (optax.scale_by_lion(), rules.lion()),
    "lamb": (optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()), rules.lamb()),
    "adamuon": (mup_jax.scale_by_adamuon(orthogonalizer="svd"), rules.adamuon()),
    "relative shampoo": (mup_jax.scale_by_shampoo(stagger=False), rules.shampoo()),
    "spectral muon": (
        optax.chain(
            mup_jax.scale_by_muon(eps=0.5, orthogonalizer="newton_schulz", ns_steps=2),
            mup_jax.normalize_spectral_norm(),
        ),
        rules.spectrally_normalized(rules.muon()),
    ),
}


@pytest.mark.parametrize("name", BLOCK_CASES)
def test_a_layer_of_a_deep_model_changes_its_output_by_its_share(name):
    """Gradients within blocks are L^(-α) of those of the base, and the share is L^(α-1)."""
    inner, rule = BLOCK_CASES[name]
    depth, alphas = 16.0, (1.0, 0.75, 0.5)
    sizes = ("hidden", WIDTH, WIDTH, WIDTH, WIDTH)
    shapes = [ParamShape(*sizes), *(ParamShape(*sizes, depth, alpha) for alpha in alphas)]
    transformation = mup(inner, rule, shapes)
    params = [PARAMS["hidden"]] * len(shapes)
    state, update = transformation.init(params), jax.jit(transformation.update)
    for gradient in gradients():
        g = gradient["hidden"]
        u, state = update([g, *(depth**-alpha * g for alpha in alphas)], state, params)
    for alpha, got in zip(alphas, u[1:], strict=True):
        want = depth ** (alpha - 1) * u[0]
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize(
    ("inner", "rule", "learning_rate"),
    [(optax.identity(), rules.sgd(), 1.0), (optax.scale_by_adam(), rules.adam(), 1e-3)],
)
def test_residual_networks_change_alike_at_every_depth(inner, rule, learning_rate, alpha):
    width, base, depths = 16, 8, (8, 128)
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(2, 8, width))
    layers = np.float32(rng.normal(size=(max(depths), width, width)) / width**0.5)

    def change(depth):
        """RMS of that of the last features, in the first step."""
        # Small: the rules are about the leading order.
        multiplier = (base / depth) ** alpha / 8
        block = lambda x, w: (x + multiplier * jnp.tanh(x) @ w, None)
        features = jax.jit(lambda layers: jax.lax.scan(block, x, layers)[0])
        shape = ParamShape("hidden", width, width, width, width, depth / base, alpha)
        transformation = optax.chain(mup(inner, rule, shape), optax.scale(-learning_rate))
        w = layers[:depth]
        gradient = jax.jit(jax.grad(lambda w: jnp.mean(features(w) * target)))(w)
        update, _ = transformation.update(gradient, transformation.init(w), w)
        return np.sqrt(np.mean((features(w + update) - features(w)) ** 2))

    shallow, deep = map(change, depths)
    slope = math.log(deep / shallow) / math.log(depths[1] / depths[0])
    assert abs(slope) < 0.1


def test_relative_epsilon_needs_no_scaling():
    inner = mup_jax.scale_by_shampoo(block_size=None)
    rule = rules.shampoo(block_size=None)
    for got, plain in zip(run(mup(inner, rule, SHAPES)), run(inner), strict=True):
        for key, shape in SHAPES.items():
            np.testing.assert_allclose(got[key], rule.learning_rate(shape) * plain[key], rtol=1e-5)


def test_at_the_base_mup_is_the_transformation_itself():
    roles = {key: shape.role for key, shape in SHAPES.items()}
    shapes = infer_shapes(PARAMS, PARAMS, roles=roles)
    inner = optax.scale_by_adam()
    jax.tree.map(np.testing.assert_array_equal, run(mup(inner, rules.adam(), shapes)), run(inner))


def test_masked_and_partitioned_trees():
    muon, adam = mup_jax.scale_by_muon(orthogonalizer="svd"), optax.scale_by_adam()
    whole = {
        "muon": run(mup(muon, rules.muon(), SHAPES)),
        "adam": run(mup(adam, rules.adam(), SHAPES)),
    }
    labels = {"embed": "adam", "hidden": "muon", "head": "adam"}
    # Around the parts, and around a part within a mask: the shapes are those of the whole tree.
    routed = optax.partition(
        {"muon": mup(muon, rules.muon(), SHAPES), "adam": mup(adam, rules.adam(), SHAPES)}, labels
    )
    for step, got in enumerate(run(routed)):
        for key, label in labels.items():
            np.testing.assert_allclose(got[key], whole[label][step][key], rtol=1e-4, atol=1e-6)
    inside = mup(
        optax.masked(muon, {"embed": False, "hidden": True, "head": False}), rules.muon(), SHAPES
    )
    for step, got in enumerate(run(inside)):
        np.testing.assert_allclose(
            got["hidden"], whole["muon"][step]["hidden"], rtol=1e-4, atol=1e-6
        )


def test_the_wrapped_transformation_sees_parameters_and_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, params=params)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    transformation = mup(inner, rules.adam(), SHAPES)
    transformation.update(PARAMS, transformation.init(PARAMS), PARAMS, value=7.0)
    assert seen == {"value": 7.0, "params": PARAMS}


def test_shapes_of_another_tree_are_refused():
    transformation = mup(optax.scale_by_adam(), rules.adam(), SHAPES)
    other = {"embed": PARAMS["embed"], "layer": PARAMS["hidden"]}
    with pytest.raises(ValueError, match=r"infer_shapes.*\['layer'\]"):
        transformation.update(other, transformation.init(other))


def test_updates_keep_their_dtype():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    transformation = mup(mup_jax.scale_by_muon(), rules.muon(), SHAPES)
    out = jax.eval_shape(lambda p: transformation.update(p, transformation.init(p))[0], half)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}


# Independent weight decay

VECTOR_BASE, VECTOR = (
    {**params_of(BASE), "gain": jnp.ones(BASE)},
    {**PARAMS, "gain": jnp.ones(WIDTH)},
)
VECTOR_SHAPES = infer_shapes(VECTOR_BASE, VECTOR)


def decay_of(transformation, params=VECTOR):
    """What is added to updates of 5 for parameters of 1."""
    fives = jax.tree.map(lambda p: 5 * p, params)
    updates, _ = transformation.update(fives, transformation.init(params), params)
    return {key: float(np.unique(u - 5).item()) for key, u in updates.items()}


@pytest.mark.parametrize(
    ("options", "matrices", "gain"),
    [
        ({}, 0.6, 0.0),
        ({"shapes": VECTOR_SHAPES}, 0.2, 0.0),
        ({"shapes": VECTOR_SHAPES, "scaling": "constant"}, 0.6, 0.0),
        ({"mask": lambda p: jax.tree.map(lambda x: True, p)}, 0.6, 0.6),
        ({"shapes": VECTOR_SHAPES, "mask": lambda p: jax.tree.map(lambda x: True, p)}, 0.2, 0.2),
    ],
)
def test_what_weight_decay_adds(options, matrices, gain):
    got = decay_of(add_independent_weight_decay(0.6, **options))
    want = dict.fromkeys(PARAMS, matrices) | {"gain": gain}
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("shapes", [None, VECTOR_SHAPES])
def test_a_mask_says_what_decays(shapes):
    mask = {"embed": False, "hidden": True, "head": False, "gain": False}
    got = decay_of(add_independent_weight_decay(0.6, shapes, scaling="constant", mask=mask))
    assert got == pytest.approx({key: 0.6 * decays for key, decays in mask.items()}, abs=1e-6)


def test_weight_decay_scaled_by_the_learning_rate_stands_before_the_learning_rate():
    decay = add_independent_weight_decay(0.6, VECTOR_SHAPES, scaling=rules.muon())
    chain = optax.chain(decay, optax.scale(0.5))
    zero = jax.tree.map(jnp.zeros_like, VECTOR)
    got, _ = chain.update(zero, chain.init(VECTOR), VECTOR)
    for key, shape in VECTOR_SHAPES.items():
        want = 0.0 if key == "gain" else 0.5 * 0.6 * rules.muon().learning_rate(shape)
        np.testing.assert_allclose(got[key], want, rtol=1e-6)


def test_stacked_vectors_are_vectors_by_their_role():
    base, params = {"gains": jnp.ones((2, 4))}, {"gains": jnp.ones((2, 8))}
    shapes = infer_shapes(base, params, roles={"gains": "vector"})
    assert decay_of(add_independent_weight_decay(0.6, shapes), params) == {"gains": 0}


def test_weight_decay_of_a_traced_value():
    @jax.jit
    def step(weight_decay):
        transformation = add_independent_weight_decay(weight_decay, VECTOR_SHAPES)
        return transformation.update(VECTOR, transformation.init(VECTOR), VECTOR)[0]

    np.testing.assert_allclose(step(0.6)["hidden"], 1.2, rtol=1e-6)


def test_weight_decay_needs_parameters_and_a_known_scaling():
    transformation = add_independent_weight_decay(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        transformation.update(PARAMS, transformation.init(PARAMS))
    with pytest.raises(ValueError, match=r"'width'.*'1/width'.*rule"):
        add_independent_weight_decay(0.1, scaling="width")
    transformation = add_independent_weight_decay(0.1, SHAPES)
    with pytest.raises(ValueError, match="infer_shapes"):
        transformation.update(VECTOR, transformation.init(VECTOR), VECTOR)
