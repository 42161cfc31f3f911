"""Norms that are held, against float64, in every layout, and on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax import hyperball
from tests import reference

STACKED = MuonDimensionNumbers(-2, -1)
RNG = np.random.default_rng(0)
RATE = 0.1


def normal(*shape):
    return np.float32(RNG.normal(size=shape))


def muon_h(learning_rate=RATE, weight_dimension_numbers=None):
    numbers = {"weight_dimension_numbers": weight_dimension_numbers}
    direction = mup_jax.scale_by_muon(orthogonalizer="svd", **numbers)
    return hyperball(direction, optax.scale_by_learning_rate(learning_rate), **numbers)


def adam_h(learning_rate=RATE, weight_dimension_numbers=None):
    return hyperball(
        optax.scale_by_adam(0.9, 0.98),
        optax.scale_by_learning_rate(learning_rate),
        weight_dimension_numbers=weight_dimension_numbers,
    )


def sgd_h(learning_rate=RATE, weight_dimension_numbers=None):
    return hyperball(
        optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
        weight_dimension_numbers=weight_dimension_numbers,
    )


def train(transformation, params, gradients):
    """The parameters after each step, and the last state."""
    state = transformation.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    trajectory = []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        trajectory.append(params)
    return trajectory, state


def norms(w):
    return np.linalg.norm(np.float64(w), axis=(-2, -1))


# What it does


SCHEDULE = optax.linear_schedule(0.0, 0.3, 5)


@pytest.mark.parametrize("rate", [RATE, SCHEDULE])
@pytest.mark.parametrize(
    ("make", "direction"),
    [
        (muon_h, lambda: reference.Muon(coefficients=None)),
        (adam_h, lambda: reference.Adam()),
    ],
)
def test_agrees_with_float64_reference(make, direction, rate):
    w, gradients = normal(6, 9), normal(10, 6, 9)
    rates = [float(rate(t)) if callable(rate) else rate for t in range(10)]
    textbook = reference.Hyperball(direction(), np.float64(w), rates)
    got, _ = train(make(rate), w, gradients)
    for after, gradient in zip(got, np.float64(gradients), strict=True):
        want = textbook.update(gradient)
        assert np.linalg.norm(after - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("make", [muon_h, adam_h, sgd_h])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_norms_are_held(make, scale):
    w = normal(3, 8, 5) * np.float32([1e-3, 1.0, 30.0])[:, None, None]
    got, _ = train(make(weight_dimension_numbers=STACKED), w, scale * normal(50, 3, 8, 5))
    np.testing.assert_allclose(norms(got), np.tile(norms(w), (50, 1)), rtol=1e-5)
    # Whatever the size of gradients and of matrices, a step turns them by about RATE, and by less
    # where momentum has aligned them.
    cosines = np.sum(np.float64(got[1:]) * got[:-1], axis=(-2, -1)) / norms(w) ** 2
    typical = np.median(np.arccos(cosines), axis=0)
    assert ((typical > 0.7 * RATE) & (typical < 1.05 * RATE)).all()


def test_small_steps_are_accurate():
    w, gradient = normal(6, 9), normal(6, 9)
    transformation = sgd_h(1e-6)
    update, _ = transformation.update(gradient, transformation.init(w), w)
    w, gradient = np.float64(w), np.float64(gradient)
    along = np.sum(gradient * w) / np.sum(w * w) * w
    want = -1e-6 * norms(w) / norms(gradient) * (gradient - along)
    # Across w; along it is the rounding of its norm.
    across = update - np.sum(update * w) / np.sum(w * w) * w
    np.testing.assert_allclose(across, want, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_a_matrix_of_zeros_grows_to_the_norm_of_a_random_one(shape):
    steps, rate = 12, 0.3
    w, gradients = np.stack([np.zeros(shape, np.float32), normal(*shape)]), normal(2, *shape)
    # The same at every step, so that the norm grows by as much as it may.
    got, state = train(sgd_h(rate, weight_dimension_numbers=STACKED), w, [gradients] * steps)
    root = np.sqrt(shape[1])
    np.testing.assert_allclose(np.ravel(state.radius), [root, norms(w[1])], rtol=1e-6)
    grown = np.minimum(rate * np.arange(1, steps + 1), 1) * root
    np.testing.assert_allclose(norms(got)[:, 0], grown, rtol=1e-5)
    np.testing.assert_allclose(norms(got)[:, 1], norms(w[1]), rtol=1e-5)
    np.testing.assert_allclose(got[0][0], -rate * root * gradients[0] / norms(gradients[0]), 1e-5)
    # A step back does not shrink it.
    back, _ = train(sgd_h(rate, weight_dimension_numbers=STACKED), w, [gradients, -gradients])
    np.testing.assert_allclose(norms(back)[:, 0], rate * root, rtol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_an_update_that_says_nothing_leaves_its_matrix_alone(bad):
    w, gradients = normal(3, 6, 4), normal(4, 3, 6, 4)
    gradients[2, 1] = bad
    with jax.debug_nans(bad == 0):
        got, state = train(sgd_h(weight_dimension_numbers=STACKED), w, gradients)
    np.testing.assert_array_equal(got[2][1], got[1][1])
    assert (norms(got[2] - got[1])[::2] > 0).all()
    np.testing.assert_allclose(norms(got[3]), norms(w), rtol=1e-5)
    assert int(state.nonfinite) == (bad != 0)


@pytest.mark.parametrize("rate", [0.0, np.nan])
def test_a_step_that_says_nothing_leaves_all_alone(rate):
    w = np.stack([normal(6, 4), np.zeros((6, 4), np.float32)])
    got, _ = train(sgd_h(rate, weight_dimension_numbers=STACKED), w, normal(1, 2, 6, 4))
    np.testing.assert_array_equal(got[0], w)


def test_bfloat16():
    w, gradients = jnp.asarray(normal(24, 16), jnp.bfloat16), normal(50, 24, 16)
    got, state = train(adam_h(), w, list(jnp.asarray(gradients, jnp.bfloat16)))
    assert got[-1].dtype == jnp.bfloat16
    assert state.radius.dtype == jnp.float32
    # Entries are rounded by up to 2^-9, to either side.
    np.testing.assert_allclose(norms(np.stack(got)), norms(w), rtol=1e-3)
    # The matrix decides, not the gradient: a step of bfloat16 would miss the sphere.
    kept, _ = train(adam_h(), normal(24, 16), list(jnp.asarray(gradients, jnp.bfloat16)))
    np.testing.assert_allclose(norms(kept), norms(kept[0]), rtol=1e-5)


# Layouts


@pytest.mark.parametrize("make", [muon_h, adam_h])
def test_a_stack_is_its_matrices_one_by_one(make):
    w, gradients = normal(2, 3, 6, 4), normal(4, 2, 3, 6, 4)
    stack, state = train(make(weight_dimension_numbers=STACKED), w, gradients)
    assert state.radius.shape == (2, 3, 1, 1)
    alone, _ = train(make(), w[1, 2], gradients[:, 1, 2])
    np.testing.assert_allclose(np.stack(stack)[:, 1, 2], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "shape"),
    [
        (MuonDimensionNumbers((0, 1, 2), 3), (24, 5)),
        (MuonDimensionNumbers((-1,), (0, 1, 2)), (5, 24)),
    ],
)
def test_convolutions_are_the_matrices_that_they_reshape_to(numbers, shape):
    to_matrix = lambda x: x.reshape(24, 5) if shape[0] == 24 else x.reshape(24, 5).T
    w, gradients = normal(2, 3, 4, 5), normal(4, 2, 3, 4, 5)
    got, _ = train(
        muon_h(weight_dimension_numbers=lambda params: {"kernel": numbers}),
        {"kernel": w},
        [{"kernel": g} for g in gradients],
    )
    want, _ = train(muon_h(), to_matrix(w), [to_matrix(g) for g in gradients])
    for after, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(to_matrix(after["kernel"]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (2, 3, 4)])
def test_what_is_not_a_matrix_is_refused(shape):
    with pytest.raises(ValueError, match=r"\['leaf'\].*optax\.partition"):
        adam_h().init({"leaf": jnp.zeros(shape), "matrix": jnp.zeros((3, 4))})


def test_parameters_are_needed():
    transformation = adam_h()
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        transformation.update(normal(3, 4), transformation.init(normal(3, 4)))


def test_a_bare_learning_rate_is_refused():
    with pytest.raises(ValueError, match=r"scale=0\.1: give optax\.scale_by_learning_rate"):
        hyperball(optax.scale_by_adam(), 0.1)


# Inside of others


def test_in_a_chain_and_a_partition():
    params = {"w": normal(6, 4), "gain": normal(4)}
    gradients = [{"w": normal(6, 4), "gain": normal(4)} for _ in range(3)]
    labels = lambda params: jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "other", params)
    optimizer = optax.chain(
        optax.scale(1e-3),
        optax.partition({"matrix": muon_h(), "other": optax.adam(RATE)}, labels),
    )
    got, _ = train(optimizer, params, gradients)
    want, _ = train(muon_h(), params["w"], [g["w"] for g in gradients])
    for after, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(after["w"], expected, rtol=1e-4, atol=1e-5)
        assert not np.array_equal(after["gain"], params["gain"])


@pytest.mark.parametrize("make", [muon_h, adam_h])
def test_an_injected_rate_is_that_rate(make):
    w, gradients = normal(6, 4), normal(6, 6, 4)
    injected = optax.inject_hyperparams(make)(learning_rate=SCHEDULE)
    got, state = train(injected, w, gradients)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(SCHEDULE(5))
    want, _ = train(make(SCHEDULE), w, gradients)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_extra_arguments_reach_both():
    def note(updates, state, params=None, *, value, **extra_args):
        return updates, state + value

    counting = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), note)
    transformation = hyperball(counting, optax.chain(counting, optax.scale(-RATE)))
    w = normal(3, 4)
    _, state = transformation.update(w, transformation.init(w), w, value=2.0)
    assert float(state.inner) == float(state.scale[0]) == 2.0


def test_a_rule_scales_the_angle():
    w = {"w": normal(8, 6)}
    base = {"w": jax.ShapeDtypeStruct((2, 6), jnp.float32)}
    shapes = mup_jax.infer_shapes(base, w, roles=lambda params: {"w": "readout"})
    rule = mup_jax.rules.hyperball()
    by_rule = mup_jax.mup(optax.identity(), rule, shapes)
    scaled = hyperball(
        optax.scale_by_adam(0.9, 0.98), optax.chain(by_rule, optax.scale_by_learning_rate(RATE))
    )
    gradients = [{"w": g} for g in normal(3, 8, 6)]
    got, _ = train(scaled, w, gradients)
    want, _ = train(adam_h(RATE * rule.learning_rate(shapes["w"])), w, gradients)
    np.testing.assert_allclose(got[-1]["w"], want[-1]["w"], rtol=1e-5, atol=1e-6)


# Meshes


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("make", [adam_h, pytest.param(muon_h, marks=pytest.mark.slow)])
def test_sharded_parameters(make, kind):
    shapes = {"stack": (3, 8, 6), "w": (16, 4), "zeros": (8, 4)}
    specs = {"stack": jax.P(None, "data", "model"), "w": jax.P("data", "model"), "zeros": jax.P()}
    params = {name: normal(*shape) for name, shape in shapes.items()}
    params["zeros"] *= 0
    gradients = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(4)]
    gradients[2]["w"][3, 1] = np.nan
    numbers = {name: STACKED if name == "stack" else MuonDimensionNumbers() for name in shapes}
    transformation = make(weight_dimension_numbers=numbers)
    want, want_state = train(transformation, params, gradients)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    put = lambda tree: {
        name: jax.device_put(x, jax.NamedSharding(mesh, specs[name])) for name, x in tree.items()
    }
    with jax.set_mesh(mesh):
        sharded = put(params)
        got, state = train(transformation, sharded, [put(tree) for tree in gradients])

        # A loop over steps carries the state: its type must not change.
        def step(_, carry):
            params, state = carry
            updates, state = transformation.update(sharded, state, params)
            return optax.apply_updates(params, updates), state

        looped, _ = jax.jit(lambda *carry: jax.lax.fori_loop(0, 2, step, carry))(
            sharded, jax.jit(transformation.init)(sharded)
        )
    for name, x in sharded.items():
        assert got[-1][name].sharding.is_equivalent_to(x.sharding, x.ndim)
        assert kind == AxisType.Auto or looped[name].sharding == got[-1][name].sharding
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, (got, state.radius), (want, want_state.radius))
    assert int(state.nonfinite) == int(want_state.nonfinite)
