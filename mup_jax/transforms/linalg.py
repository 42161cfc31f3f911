"""Batched matrix functions in float32, each with a path for CPUs, for GPUs and for TPUs.

All functions act on the last two axes and broadcast over the ones before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mup_jax.transforms.iterations import cholesky_qr, jacobi, newton_root, trace
from mup_jax.transforms.orthogonalization import (
    Orthogonalizer,
    check_orthogonalizer,
    orthogonalize,
    quintic_coefficients,
)
from mup_jax.transforms.platforms import (
    FLOOR,
    ROUNDING,
    by_platform,
    factorize,
    identity,
    matmul,
    use_paths_of,
)

__all__ = [
    "FLOOR",
    "ROUNDING",
    "Orthogonalizer",
    "check_orthogonalizer",
    "eigenbasis",
    "identity",
    "inverse_root",
    "matmul",
    "orthogonalize",
    "quintic_coefficients",
    "refine_eigenbasis",
    "use_paths_of",
]


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `(..., d)` in descending order, eigenvectors as columns."""
    values, vectors = factorize(jnp.linalg.eigh, x)
    return values[..., ::-1], vectors[..., ::-1]


def _qr(x: jax.Array) -> jax.Array:
    return factorize(lambda x: jnp.linalg.qr(x)[0], x)


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x), axis=(-2, -1), keepdims=True)


def inverse_root(
    statistics: jax.Array,
    previous: jax.Array,
    exponent: float | jax.Array,
    *,
    eps: float,
    relative_eps: bool,
) -> jax.Array:
    """(A + ε I)^(-exponent) of symmetric positive semidefinite matrices.

    By eigendecomposition; on TPUs, where 1 / exponent is an integer, by Newton's iteration. Their
    errors are alike: 1e-6 for κ = 1e2, below 0.1 for a singular A and the smallest ε.

    Args:
      statistics: A, `(..., d, d)` in float32.
      previous: of the same shape: what to return for matrices that are not finite, or whose Newton
        iteration has not come within 1e-2 of the identity.
      exponent: positive.
      eps: the ridge ε, times the largest eigenvalue of A where `relative_eps`. At least 1e-6 times
        that eigenvalue is taken: below, float32 has no digits.
      relative_eps: see `eps`.

    Returns:
      `(..., d, d)` in float32, symmetric. A zero matrix, whose root says nothing, gives zero.
    """

    def ridge(largest: jax.Array) -> jax.Array:
        least = jnp.maximum(ROUNDING * largest, FLOOR)
        return jnp.maximum(eps * largest if relative_eps else eps, least)

    def by_eigenvalues(eigh: Callable[..., Any], x: jax.Array) -> jax.Array:
        values, vectors = eigh(x)
        # Rounding leaves eigenvalues of a semidefinite matrix slightly below zero.
        roots = (jnp.maximum(values, 0.0) + ridge(values[..., :1])) ** -exponent
        return matmul(vectors * roots[..., None, :], vectors.mT)

    with_lapack = functools.partial(by_eigenvalues, _eigh)
    without: Callable[..., Any] = functools.partial(by_eigenvalues, jacobi)
    if not isinstance(exponent, jax.Array):  # of a traced one it is not known
        p = round(1 / exponent)
        if math.isclose(p * exponent, 1):
            without = functools.partial(newton_root, p=p, ridge=ridge)
    root = by_platform(statistics, cpu=with_lapack, gpu=with_lapack, tpu=without)
    root = jnp.where(_is_finite(root), root, previous)
    return jnp.where(trace(statistics) <= FLOOR, 0.0, root)


def eigenbasis(statistics: jax.Array) -> jax.Array:
    """Eigenvectors, as columns in descending order of eigenvalue, of symmetric `(..., d, d)`.

    Orthogonal to rounding on every platform. On TPUs about 10 d elementwise passes over the batch:
    for first steps.
    """
    return by_platform(statistics, cpu=_eigh, gpu=_eigh, tpu=jacobi)[1]


def refine_eigenbasis(statistics: jax.Array, basis: jax.Array) -> jax.Array:
    """One step of orthogonal (subspace) iteration: Q <- qr(A Q), columns sorted by qᵀ A q.

    Args:
      statistics: A, symmetric positive semidefinite `(..., d, d)`.
      basis: Q, orthogonal `(..., d, d)`.

    Returns:
      An orthogonal `(..., d, d)` closer to the eigenvectors of A; Q where A is zero or not finite,
      or the factorization fails.
    """
    product = matmul(statistics, basis)
    rayleigh = jnp.sum(basis * product, axis=-2)
    largest = jnp.max(rayleigh, axis=-1)[..., None, None]
    alive = largest > FLOOR
    # What A maps to rounding noise keeps its direction.
    product = product / jnp.where(alive, largest, 1.0) + ROUNDING * basis
    order = jnp.argsort(-rayleigh, axis=-1)
    product = jnp.take_along_axis(product, order[..., None, :], axis=-1)
    refined = by_platform(product, cpu=_qr, gpu=cholesky_qr, tpu=cholesky_qr)
    return jnp.where(alive & _is_finite(refined), refined, basis)
