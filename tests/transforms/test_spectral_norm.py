"""Normalized updates: their norms, their vectors, meshes, and updates at the edge."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax import normalize_rms, normalize_spectral_norm
from tests import reference

STACKED = MuonDimensionNumbers(-2, -1)
RNG = np.random.default_rng(0)


def normal(*shape):
    return np.float32(RNG.normal(size=shape))


by_default = normalize_spectral_norm()
# Compiled once for each shape.
by_default = by_default._replace(update=jax.jit(by_default.update))


def run(transformation, updates):
    state, update = transformation.init(updates[0]), jax.jit(transformation.update)
    normalized = []
    for u in updates:
        u, state = update(u, state)
        normalized.append(u)
    return normalized, state


def spectral_norms(matrices):
    return np.linalg.norm(np.float64(matrices), 2, axis=(-2, -1))


# The spectral norm


def test_agrees_with_float64_reference():
    still = RNG.normal(size=(8, 12))
    gradients = [still + 0.2 * RNG.normal(size=still.shape) for _ in range(12)]
    transformation = optax.chain(
        mup_jax.scale_by_muon(nesterov=False, orthogonalizer="newton_schulz", ns_steps=5),
        normalize_spectral_norm(iterations=2, first_iterations=4, first_steps=3),
    )
    got, _ = run(transformation, list(np.float32(gradients)))
    v = transformation.init(np.float32(still))[1].vectors
    textbook = reference.SpectralNorm(
        reference.Muon(nesterov=False), np.float64(v)[:, 0], [4] * 3 + [2] * 9
    )
    for u, gradient in zip(got, gradients, strict=True):
        want = textbook.update(gradient)
        assert np.linalg.norm(u - want) <= 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7), (1, 6), (6, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_a_still_update_gets_the_norm_of_its_shape(shape, scale):
    u = normal(*shape)
    got, state = run(by_default, [scale * u] * 30)
    target = math.sqrt(shape[1] / shape[0])
    assert spectral_norms(got[-1]) == pytest.approx(target, rel=1e-3)
    np.testing.assert_allclose(got[-1], u * (target / spectral_norms(u)), rtol=1e-3)
    assert int(state.nonfinite) == 0


def test_one_iteration_a_step_follows_a_direction_that_moves():
    still = normal(10, 6)
    moving = [still + 0.1 * normal(10, 6) for _ in range(80)]
    got, _ = run(normalize_spectral_norm(), moving)
    np.testing.assert_allclose(spectral_norms(got[5:]), math.sqrt(6 / 10), rtol=0.05)


@pytest.mark.parametrize(
    ("numbers", "to_matrices"),
    [
        (STACKED, lambda x: x.reshape(6, 4, 5)),
        (MuonDimensionNumbers((0, 1, 2), 3), lambda x: x.reshape(1, 24, 5)),
        (MuonDimensionNumbers(3, (1, 2)), lambda x: np.moveaxis(x.reshape(2, 12, 5), 2, 1)),
    ],
)
def test_any_layout_is_its_matrices_one_by_one(numbers, to_matrices):
    updates = [normal(2, 3, 4, 5) for _ in range(3)]
    many = normalize_spectral_norm(
        first_iterations=50, weight_dimension_numbers=lambda params: {"w": numbers}
    )
    got, _ = run(many, [{"w": u} for u in updates])
    for u, normalized in zip(updates, got, strict=True):
        matrices = to_matrices(u)
        target = math.sqrt(matrices.shape[2] / matrices.shape[1])
        want = matrices * (target / spectral_norms(matrices))[:, None, None]
        np.testing.assert_allclose(to_matrices(normalized["w"]), want, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_an_update_that_says_nothing_is_zero_and_changes_no_vector(bad):
    updates = [normal(3, 6, 4) for _ in range(4)]
    updates[2][1] = bad
    transformation = normalize_spectral_norm(weight_dimension_numbers=STACKED)
    got, state = run(transformation, updates)
    _, before = run(transformation, updates[:2])
    _, after = run(transformation, updates[:3])
    np.testing.assert_array_equal(got[2][1], 0)
    np.testing.assert_array_equal(after.vectors[1], before.vectors[1])
    assert np.isfinite(got).all()
    assert (spectral_norms(got[2][::2]) > 0).all()
    assert int(state.nonfinite) == (bad != 0)


def test_one_bad_entry_spoils_no_other_matrix():
    fine = {"a": normal(3, 4), "b": normal(3, 4)}
    spoilt = {"a": fine["a"], "b": fine["b"].copy()}
    spoilt["b"][0, 0] = np.nan
    (got,), _ = run(normalize_spectral_norm(), [spoilt])
    (want,), _ = run(normalize_spectral_norm(), [fine])
    np.testing.assert_array_equal(got["a"], want["a"])
    np.testing.assert_array_equal(got["b"], 0)


def test_training_may_begin_with_zero_updates():
    u = normal(6, 4)
    got, _ = run(normalize_spectral_norm(), [np.zeros((6, 4), np.float32)] * 2 + [u] * 20)
    np.testing.assert_array_equal(got[:2], 0)
    assert spectral_norms(got[-1]) == pytest.approx(math.sqrt(4 / 6), rel=1e-3)


def test_a_sudden_turn_does_not_blow_the_update_up():
    first, second = np.zeros((2, 6, 4), np.float32)
    first[0, 0] = second[1, 1] = 1.0
    got, _ = run(normalize_spectral_norm(), [first] * 60 + [second])
    assert 0 < spectral_norms(got[-1]) <= 2 * math.sqrt(4 / 6) * 1.001


def test_dtypes():
    updates = [jnp.asarray(normal(6, 4), jnp.bfloat16) for _ in range(3)]
    got, state = run(normalize_spectral_norm(), updates)
    want, _ = run(normalize_spectral_norm(), [u.astype(jnp.float32) for u in updates])
    assert got[0].dtype == jnp.bfloat16
    assert state.vectors.dtype == jnp.float32
    np.testing.assert_allclose(np.float32(got), want, rtol=0.01)


def test_buffers_may_be_taken_over():
    transformation = normalize_spectral_norm()
    u = normal(6, 4)
    update = jax.jit(transformation.update, donate_argnums=1)
    _, state = update(u, transformation.init(u))
    assert int(state.count) == 1


def test_masked_leaves_pass():
    is_matrix = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
    tree = {"gain": normal(4), "w": normal(6, 4)}
    (got,), _ = run(optax.masked(normalize_spectral_norm(), is_matrix), [tree])
    (want,), _ = run(normalize_spectral_norm(), [tree["w"]])
    np.testing.assert_array_equal(got["gain"], tree["gain"])
    np.testing.assert_array_equal(got["w"], want)


@pytest.mark.parametrize("normalize", [normalize_spectral_norm, normalize_rms])
def test_extra_arguments_and_what_is_not_a_matrix(normalize):
    transformation = normalize()
    u = normal(3, 4)
    transformation.update(u, transformation.init(u), u, value=1.0)
    with pytest.raises(ValueError, match=r"optax\.partition"):
        run(transformation, [{"gain": normal(4)}])


@pytest.mark.parametrize("options", [{"iterations": 0}, {"first_iterations": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="iterations=0"):
        normalize_spectral_norm(**options)


# The root mean square


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_rms_of_every_matrix_is_one(scale):
    u = scale * normal(2, 5, 3)
    (got,), _ = run(normalize_rms(weight_dimension_numbers=STACKED), [u])
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(got), axis=(1, 2))), 1, rtol=1e-5)
    np.testing.assert_allclose(got[0] / got[0, 0, 0], u[0] / u[0, 0, 0], rtol=1e-5)


def test_rms_of_what_says_nothing_is_zero():
    u = normal(3, 5, 4)
    u[0], u[1, 2, 3] = 0.0, np.inf
    (got,), state = run(normalize_rms(weight_dimension_numbers=STACKED), [u])
    np.testing.assert_array_equal(got[:2], 0)
    assert np.sqrt(np.mean(np.square(got[2]))) == pytest.approx(1)
    assert int(state.nonfinite) == 1


# Meshes


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("normalize", [normalize_spectral_norm, normalize_rms])
def test_sharded_updates(normalize, kind):
    trees = [{"stack": normal(3, 8, 6), "w": normal(16, 4)} for _ in range(4)]
    trees[1]["w"][3, 1] = np.nan
    specs = {"stack": jax.P(None, "data", "model"), "w": jax.P("data", "model")}
    numbers = {"stack": STACKED, "w": MuonDimensionNumbers()}
    transformation = normalize(weight_dimension_numbers=numbers)
    want, want_state = run(transformation, trees)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        put = lambda tree: jax.tree.map(
            lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), tree, specs
        )
        got, state = run(transformation, [put(tree) for tree in trees])
        # A loop over steps carries the state: its type must not change.
        looped, _ = jax.jit(
            lambda tree, state: jax.lax.fori_loop(
                0, 2, lambda _, carry: transformation.update(*carry), (tree, state)
            )
        )(put(trees[0]), transformation.init(put(trees[0])))
    assert all(u["w"].sharding.spec == specs["w"] for u in [looped, *got])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (got, state), (want, want_state))
