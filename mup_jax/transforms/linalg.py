"""Batched matrix functions in float32: the only place that calls a factorization.

All functions act on the last two axes and broadcast over the ones before.
"""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Orthogonalizer = Literal["polar_express", "newton_schulz", "svd"]

# Accelerators multiply float32 in reduced precision unless told otherwise, which is too coarse to
# compare eigenvalues or to rotate a second moment.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Below this a float32 statistic is rounding noise.
FLOOR = 1e-30
# And so is what is smaller than this times the largest value of its matrix.
ROUNDING = 1e-6

# K. Jordan et al. 2024, "Muon": the same quintic at every step.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# N. Amsel et al. 2025 (arXiv 2505.16932), algorithm 1: the optimal quintics for singular values in
# [1e-3, 1], one per step; from the eighth on they equal the last.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Singular values that rounding lifts above 1 would leave the interval of convergence.
_POLAR_EXPRESS_SAFETY = 1.01


def _several_cpu_devices() -> bool:
    flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    return flag or jax.config.values["jax_num_cpu_devices"] > 1


def _factorize(factorization: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """A factorization of matrices `(..., m, n)`.

    With several CPU devices in a process (as in tests) the devices' batched LAPACK calls wait for
    one thread pool, and for each other for ever; a call with one matrix does not use the pool.
    """
    if not _several_cpu_devices() or x.ndim == 2:
        return factorization(x)
    flat = jax.lax.map(factorization, x.reshape(-1, *x.shape[-2:]))
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), flat)


_eigh = functools.partial(_factorize, jnp.linalg.eigh)
_qr = functools.partial(_factorize, jnp.linalg.qr)
_svd = functools.partial(_factorize, functools.partial(jnp.linalg.svd, full_matrices=False))


def batch_by_shape(function: Callable[..., jax.Array], *trees: Any) -> Any:
    """`jax.tree.map(function, *trees)` in one call for all leaves whose matrices have one shape.

    The leaves are stacks of matrices `(n, ...)`, of which `function` maps each on its own. One call
    for many stacks keeps programs small and factorizations in one batch.
    """
    leaves = [jax.tree.leaves(tree) for tree in trees]
    members: dict[Any, list[int]] = {}
    for i, stacks in enumerate(zip(*leaves, strict=True)):
        members.setdefault(tuple(x.shape[1:] for x in stacks), []).append(i)
    results: list[Any] = [None] * len(leaves[0])
    for indices in members.values():
        merged = function(*(jnp.concatenate([stacks[i] for i in indices]) for stacks in leaves))
        ends = list(itertools.accumulate(len(leaves[0][i]) for i in indices))
        for i, part in zip(indices, jnp.split(merged, ends[:-1]), strict=True):
            results[i] = part
    return jax.tree.unflatten(jax.tree.structure(trees[0]), results)


def quintic_coefficients(method: Orthogonalizer, steps: int) -> list[tuple[float, float, float]]:
    """The polynomials a x + b x³ + c x⁵, one per step, of an iterative orthogonalizer."""
    if method == "newton_schulz":
        return [_NEWTON_SCHULZ] * steps
    s = _POLAR_EXPRESS_SAFETY
    last = len(_POLAR_EXPRESS) - 1
    return [
        (a / s, b / s**3, c / s**5)
        for a, b, c in (_POLAR_EXPRESS[min(i, last)] for i in range(steps))
    ]


def orthogonalize(
    x: jax.Array, method: Orthogonalizer = "polar_express", *, steps: int = 5, eps: float = 1e-8
) -> jax.Array:
    """The orthogonal polar factor U Vᵀ of x = U S Vᵀ.

    Args:
      x: `(..., m, n)`, any real dtype.
      method: "polar_express" or "newton_schulz" (matmuls only, approximate), or "svd" (exact).
      steps: iterations of the approximate methods.
      eps: added to the Frobenius norm by which the approximate methods divide x.

    Returns:
      `(..., m, n)` in float32. What x maps to zero stays zero.

    Raises:
      ValueError: an unknown method, or steps < 1.
    """
    if method not in ("polar_express", "newton_schulz", "svd"):
        raise ValueError(
            f"orthogonalizer={method!r}: choose 'polar_express', 'newton_schulz' or 'svd'"
        )
    if steps < 1:
        raise ValueError(f"steps={steps}: give at least one step")
    x = x.astype(jnp.float32)
    if method == "svd":
        u, s, vt = _svd(x)
        # Noise would come out as large as the rest.
        nonzero = (s > ROUNDING * s[..., :1]) & (s > FLOOR)
        return matmul(u * nonzero[..., None, :], vt)
    # The Gram matrix is iterated on the shorter side.
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # Dividing by the largest entry first keeps the squares of the norm in float32's range.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0)
    unit = x / scale
    norm = jnp.linalg.norm(unit, axis=(-2, -1), keepdims=True)
    x = unit / jnp.maximum(norm + eps / scale, FLOOR)
    for a, b, c in quintic_coefficients(method, steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def inverse_root(
    statistics: jax.Array, exponent: float, *, eps: float, relative_eps: bool
) -> jax.Array:
    """(A + ε I)^(-exponent) of symmetric positive semidefinite matrices by eigendecomposition.

    Args:
      statistics: A, `(..., d, d)` in float32.
      exponent: positive.
      eps: the ridge ε, times the largest eigenvalue of A where `relative_eps`.
      relative_eps: see `eps`.

    Returns:
      `(..., d, d)` in float32. A zero matrix, whose root says nothing, gives zero.
    """
    eigenvalues, vectors = _eigh(statistics)
    ridge = eps * eigenvalues[..., -1:] if relative_eps else eps
    # Rounding leaves eigenvalues of a semidefinite matrix slightly below zero.
    roots = (jnp.maximum(eigenvalues, 0.0) + jnp.maximum(ridge, FLOOR)) ** -exponent
    alive = jnp.trace(statistics, axis1=-2, axis2=-1) > FLOOR
    return matmul(vectors * jnp.where(alive[..., None], roots, 0.0)[..., None, :], vectors.mT)


def eigenbasis(statistics: jax.Array) -> jax.Array:
    """Eigenvectors, as columns in descending order of eigenvalue, of symmetric `(..., d, d)`."""
    _, vectors = _eigh(statistics)
    return vectors[..., ::-1]


def refine_eigenbasis(statistics: jax.Array, basis: jax.Array) -> jax.Array:
    """One step of orthogonal (subspace) iteration: Q <- qr(A Q), columns sorted by qᵀ A q.

    Args:
      statistics: A, symmetric `(..., d, d)`.
      basis: Q, orthogonal `(..., d, d)`.

    Returns:
      An orthogonal `(..., d, d)` closer to the eigenvectors of A.
    """
    product = matmul(statistics, basis)
    rayleigh = jnp.sum(basis * product, axis=-2)
    order = jnp.argsort(-rayleigh, axis=-1)
    product = jnp.take_along_axis(product, order[..., None, :], axis=-1)
    # A zero statistic would leave QR without a direction.
    alive = jnp.max(rayleigh, axis=-1)[..., None, None] > FLOOR
    return _qr(jnp.where(alive, product, basis))[0]
