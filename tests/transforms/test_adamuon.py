"""AdaMuon against its reference, against Optax's second moment, and on gradients at the edge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import mup_jax
from tests import reference

RNG = np.random.default_rng(0)
GRADIENTS = RNG.normal(size=(6, 12, 20)) + RNG.normal(size=(12, 20))


def run(transformation, gradients):
    state, update = transformation.init(gradients[0]), jax.jit(transformation.update)
    updates = []
    for gradient in gradients:
        u, state = update(gradient, state)
        updates.append(u)
    return updates, state


def adamuon(**options):
    return mup_jax.scale_by_adamuon(orthogonalizer="newton_schulz", ns_steps=5, **options)


@pytest.mark.parametrize("options", [{}, {"b1": 0.9, "b2": 0.7, "nesterov": False}, {"eps": 0.1}])
def test_agrees_with_float64_reference(options):
    got, state = run(adamuon(**options), list(np.float32(GRADIENTS)))
    textbook = reference.AdaMuon(**options)
    for u, gradient in zip(got, GRADIENTS, strict=True):
        want = textbook.update(gradient)
        # Where O changes its sign its second moment is small, and so is the denominator.
        assert np.linalg.norm(u - want) <= 2e-3 * np.linalg.norm(want)
    assert int(state.count) == len(GRADIENTS)


def test_is_muon_before_the_second_moment_of_optax():
    gradients = [{"w": g, "v": g.T} for g in np.float32(GRADIENTS)]
    muon = mup_jax.scale_by_muon(orthogonalizer="newton_schulz", ns_steps=5)
    rms = optax.scale_by_rms(0.95, eps_in_sqrt=False, bias_correction=True)
    want, _ = run(optax.chain(muon, rms), gradients)
    got, _ = run(adamuon(), gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, want)


def test_a_stack_is_its_matrices_one_by_one():
    stacks = np.float32(RNG.normal(size=(3, 4, 6, 5)))
    numbers = MuonDimensionNumbers(-2, -1)
    got, _ = run(adamuon(weight_dimension_numbers=numbers), list(stacks))
    for layer in range(4):
        want, _ = run(adamuon(), list(stacks[:, layer]))
        for u, expected in zip(got, want, strict=True):
            np.testing.assert_allclose(u[layer], expected, rtol=1e-3, atol=1e-4)


def test_zero_gradients_give_zero_updates():
    updates, _ = run(adamuon(), [jnp.zeros((3, 4))] * 3)
    np.testing.assert_array_equal(updates, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_a_bad_gradient_is_skipped(bad):
    spoilt = np.float32(GRADIENTS)
    spoilt[2, 0, 0] = bad
    updates, state = run(adamuon(), list(spoilt))
    assert np.isfinite(updates).all()
    assert int(state.nonfinite) == 1
    _, without = run(adamuon(), list(np.delete(spoilt, 2, axis=0)))
    mu = lambda state: state.blocks["12x20"][0].state.mu
    jax.tree.map(np.testing.assert_array_equal, *(mu(x) for x in (state, without)))


def test_a_first_gradient_of_zero():
    late, _ = run(adamuon(), [np.zeros((12, 20), np.float32), *np.float32(GRADIENTS)])
    fine, _ = run(adamuon(), list(np.float32(GRADIENTS)))
    # The bias correction counts all steps.
    ratio = np.linalg.norm(late[1]) / np.linalg.norm(fine[0])
    assert ratio == pytest.approx(np.sqrt((1 - 0.95**2) / (1 - 0.95)), rel=1e-3)


def test_bfloat16_gradients_have_a_float32_state():
    gradients = [jnp.asarray(g, jnp.bfloat16) for g in GRADIENTS]
    updates, state = run(adamuon(), gradients)
    assert {u.dtype for u in updates} == {jnp.dtype(jnp.bfloat16)}
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    want, _ = run(adamuon(), [g.astype(jnp.float32) for g in gradients])
    np.testing.assert_allclose(np.float32(updates), want, rtol=0.01)


def test_what_is_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"optax\.partition"):
        adamuon().init({"gain": jnp.zeros(3)})
