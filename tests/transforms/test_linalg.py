"""Factorizations against numpy float64, on well and ill conditioned input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.linalg import (
    eigenbasis,
    inverse_root,
    orthogonalize,
    refine_eigenbasis,
)

RNG = np.random.default_rng(0)


def orthogonal(n):
    return np.linalg.qr(RNG.normal(size=(n, n)))[0]


def with_singular_values(values, m, n):
    values = np.asarray(values)
    k = len(values)
    return orthogonal(m)[:, :k] * values @ orthogonal(n)[:k]


def polar(x):
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    alive = s > 1e-6 * s[..., :1]
    return (u * alive[..., None, :]) @ vt


def polar_error(x, got):
    """The error that a singular value of 1 has, in the root mean square."""
    want = polar(x)
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


@functools.cache
def orthogonalizer(method, steps=5):
    return jax.jit(functools.partial(orthogonalize, method=method, steps=steps))


METHODS = {("svd", 1): 1e-5, ("polar_express", 8): 1e-3, ("newton_schulz", 5): 0.3}
# Input with the method's typical error: κ = 30 in one stack of three.
STACK = np.stack([with_singular_values(np.geomspace(1, 30, 12), 12, 20) for _ in range(3)])


@pytest.mark.parametrize(("method", "steps"), METHODS)
def test_distance_from_the_polar_factor(method, steps):
    f, bound = orthogonalizer(method, steps), METHODS[method, steps]
    wide = f(np.float32(STACK))
    assert polar_error(STACK, wide) < bound
    tall = f(np.float32(STACK.swapaxes(-1, -2)))
    np.testing.assert_allclose(tall.mT, wide, atol=2e-5)
    # The approximate methods agree on singular vectors, and bound the singular values.
    assert np.linalg.svd(np.asarray(wide), compute_uv=False).max() < 1 + bound


@pytest.mark.parametrize(("method", "steps"), METHODS)
def test_any_scale_and_rank(method, steps):
    f, bound = orthogonalizer(method, steps), METHODS[method, steps]
    deficient = with_singular_values([1.0, 0.5, 0.25], 12, 20)
    stack = np.float32(np.stack([np.zeros((12, 20)), deficient, STACK[0]]))
    zero, low_rank, full = f(stack)
    np.testing.assert_array_equal(zero, 0)
    assert polar_error(deficient, low_rank) < bound
    large = f(np.float32(1e20) * stack)
    np.testing.assert_allclose(large, jnp.stack([zero, low_rank, full]), atol=1e-4)
    # Far below ε the result is small, and never larger than at scale 1.
    small = np.asarray(f(np.float32(1e-20) * stack))
    assert np.isfinite(small).all()
    assert np.linalg.norm(small) <= np.linalg.norm(large)


@pytest.mark.parametrize("method", ["svd", "polar_express"])
def test_small_scales_without_eps(method):
    f = jax.jit(lambda x: orthogonalize(x, method, steps=8, eps=0.0))
    assert polar_error(STACK, f(np.float32(1e-20 * STACK))) < 1e-3


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_polar_express_converges_sooner_than_newton_schulz(condition):
    x = np.float32(with_singular_values(np.geomspace(1, condition, 20), 20, 20))
    error = lambda *how: polar_error(x, orthogonalizer(*how)(x))
    assert error("polar_express", 8) < error("polar_express", 5) < error("newton_schulz", 5)
    assert error("svd", 1) < 1e-3


def test_bad_orthogonalizers_are_refused():
    with pytest.raises(ValueError, match="polar_express"):
        orthogonalize(jnp.eye(2), "qr")
    with pytest.raises(ValueError, match="steps=0"):
        orthogonalize(jnp.eye(2), steps=0)


@functools.cache
def root(exponent, eps=1e-5, relative_eps=True):
    options = {"exponent": exponent, "eps": eps, "relative_eps": relative_eps}
    return jax.jit(functools.partial(inverse_root, **options))


def semidefinite(condition, n=12):
    q = orthogonal(n)
    return q * np.geomspace(1, 1 / condition, n) @ q.T


@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_inverse_root_agrees_with_float64(exponent):
    stack = np.stack([semidefinite(c) for c in (1e2, 1e4, 1e6)])
    for scale in (1.0, 1e-12, 1e12):
        got = root(exponent)(np.float32(scale * stack))
        for statistics, x in zip(stack * scale, np.asarray(got), strict=True):
            values, q = np.linalg.eigh(statistics)
            want = q * (values + 1e-5 * values[-1]) ** -exponent @ q.T
            # The ridge bounds what rounding of the small eigenvalues can do.
            assert np.linalg.norm(x - want) < 0.02 * np.linalg.norm(want)


def test_inverse_root_with_absolute_eps():
    got = root(0.5, eps=2.0, relative_eps=False)(jnp.diag(jnp.array([7.0, 2.0, 0.0])))
    np.testing.assert_allclose(got, np.diag([1 / 3, 1 / 2, 1 / np.sqrt(2)]), atol=1e-6)


@pytest.mark.parametrize("relative_eps", [True, False])
def test_the_root_of_nothing_is_zero(relative_eps):
    stack = jnp.stack([jnp.zeros((3, 3)), 1e-38 * jnp.eye(3)])
    np.testing.assert_array_equal(root(0.5, 1e-12, relative_eps)(stack), 0)


def off_diagonal(statistics, basis):
    rotated = basis.swapaxes(-1, -2) @ statistics @ basis
    diagonal = np.diagonal(rotated, axis1=-2, axis2=-1)
    return np.linalg.norm(rotated) - np.linalg.norm(diagonal)


def test_eigenbasis_descends():
    statistics = np.stack([semidefinite(1e3), 5 * semidefinite(30)])
    basis = np.asarray(jax.jit(eigenbasis)(np.float32(statistics)), np.float64)
    rotated = basis.swapaxes(-1, -2) @ statistics @ basis
    values = np.diagonal(rotated, axis1=-2, axis2=-1)
    assert (np.diff(values, axis=-1) < 0).all()
    np.testing.assert_allclose(values, np.linalg.eigvalsh(statistics)[:, ::-1], rtol=1e-3)


def test_refinement_converges_and_stays_orthogonal():
    statistics = np.stack([semidefinite(1e4), semidefinite(1e6)])
    basis = np.stack([orthogonal(12), np.eye(12)])
    refine = jax.jit(refine_eigenbasis)
    masses = []
    for _ in range(60):
        basis = np.asarray(refine(np.float32(statistics), np.float32(basis)), np.float64)
        masses.append(off_diagonal(statistics, basis))
        identity = np.broadcast_to(np.eye(12), basis.shape)
        np.testing.assert_allclose(basis.swapaxes(-1, -2) @ basis, identity, atol=1e-5)
    assert masses[0] > 1e-3
    assert masses[-1] < 1e-6
    values = np.diagonal(basis.swapaxes(-1, -2) @ statistics @ basis, axis1=-2, axis2=-1)
    np.testing.assert_allclose(values[:, :6], np.linalg.eigvalsh(statistics)[:, :5:-1], rtol=1e-4)


def test_refinement_follows_eigenvalues_that_swap():
    basis = jnp.eye(3)
    refined = jax.jit(refine_eigenbasis)(jnp.diag(jnp.array([1.0, 5.0, 2.0])), basis)
    np.testing.assert_allclose(jnp.abs(refined), np.eye(3)[[2, 0, 1]], atol=1e-6)


def test_refinement_by_zero_keeps_an_orthogonal_basis():
    basis = np.float32(orthogonal(5))
    refined = np.asarray(jax.jit(refine_eigenbasis)(jnp.zeros((5, 5)), basis))
    np.testing.assert_allclose(np.abs(refined.T @ basis), np.eye(5), atol=1e-5)
