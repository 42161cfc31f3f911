"""Factorizations as loops of matrix products, for platforms where LAPACK's have no equal.

On TPUs eigh compiles for minutes and gathers its batch from all devices; on GPUs a batched QR is a
sequential loop. Each loop here is one small program for any size, maps over the leading axes, and
stops when every matrix of the batch has converged.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mup_jax.transforms.accounting import counted
from mup_jax.transforms.platforms import FLOOR, ROUNDING, factorize, identity, matmul

# Newton's iteration multiplies the smallest eigenvalue, at least ROUNDING, by 2 to e a step: 24
# steps for p = 1, 18 for p = 4.
_NEWTON_STEPS, _NEWTON_USUAL = 40, 20
# Largest entry of M - I. Rounding leaves 1e-7 p.
_NEWTON_DONE = 1e-5
_NEWTON_TOLERANCE = 1e-2

# Jacobi sweeps converge quadratically but for the smallest eigenvalues. 512×512 takes 8 to 13.
_JACOBI_SWEEPS, _JACOBI_USUAL = 15, 10
# Norm off the diagonal / norm, per √d. Rounding leaves 4e-8.
_JACOBI_DONE = 1e-7

# Two passes from a basis that is nearly right, seven for 512 nearly parallel columns.
_CHOLESKY_PASSES, _CHOLESKY_USUAL = 8, 2
# Largest entry of Qᵀ Q - I before a pass that leaves nothing but rounding, 1e-6.
_CHOLESKY_DONE = 1e-2

State = tuple[jax.Array, ...]


def trace(x: jax.Array) -> jax.Array:
    """`(..., d, d)` -> `(..., 1, 1)`."""
    return jnp.trace(x, axis1=-2, axis2=-1)[..., None, None]


def _largest_entry(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)


def _repeat(
    step: Callable[..., State], state: State, limit: int, done: float, *, usual: int
) -> State:
    """Applies `state = step(*state[1:])` while any error, `state[0]`, is larger than `done`.

    NaN counts as done. Of `limit` steps `usual` ones are counted.
    """
    step = counted(usual, step)

    def unfinished(carry: tuple[int, State]) -> jax.Array:
        count, (error, *_) = carry
        return (count < limit) & jnp.any(error > done)

    return jax.lax.while_loop(
        unfinished, lambda carry: (carry[0] + 1, step(*carry[1][1:])), (0, state)
    )[1]


def jacobi(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `(..., d)` in descending order and eigenvectors (columns) of symmetric x.

    Jacobi rotations of d/2 disjoint pairs of rows at a time, elementwise. A sweep is a round robin:
    pairs are (i, i + d/2), and after each round all rows but the first move one seat around the
    table, so that after d - 1 rounds all have met and sit as before. R. Brent, F. Luk 1985, "The
    solution of singular-value and symmetric eigenvalue problems on multiprocessor arrays".
    """
    d = x.shape[-1]
    n = max(4, d + d % 2)
    scale = jnp.maximum(_largest_entry(x), FLOOR)
    x = jnp.pad(x / scale, [(0, 0)] * (x.ndim - 2) + [(0, n - d)] * 2)
    one = identity(x.ndim, n)

    def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
        top, bottom = jnp.split(x, 2, axis=-2)
        top, bottom = cosine * top - sine * bottom, sine * top + cosine * bottom
        parts = [top[..., :1, :], bottom[..., :1, :], top[..., 1:-1, :]]
        return jnp.concatenate([*parts, bottom[..., 1:, :], top[..., -1:, :]], axis=-2)

    def play_round(_: int, state: State) -> State:
        rotated, rows = state
        top, bottom = jnp.split(jnp.diagonal(rotated, axis1=-2, axis2=-1), 2, axis=-1)
        between = jnp.diagonal(rotated, offset=n // 2, axis1=-2, axis2=-1)
        cotangent = (bottom - top) / (2 * jnp.where(between == 0, 1.0, between))
        tangent = jnp.where(cotangent < 0, -1.0, 1.0) / (
            jnp.abs(cotangent) + jnp.sqrt(1 + cotangent * cotangent)
        )
        tangent = jnp.where(between == 0, 0.0, tangent)[..., None]
        cosine = jax.lax.rsqrt(1 + tangent * tangent)
        sine = tangent * cosine
        rotated = rotate(rotate(rotated, cosine, sine).mT, cosine, sine)
        return rotated, rotate(rows, cosine, sine)

    def measure(rows: jax.Array) -> State:
        rotated = matmul(matmul(rows, x), rows.mT)
        norm = functools.partial(jnp.linalg.norm, axis=(-2, -1))
        return norm(rotated * (1 - one)) / norm(rotated), rotated, rows

    def sweep(rotated: jax.Array, rows: jax.Array) -> State:
        _, rows = jax.lax.fori_loop(0, n - 1, play_round, (rotated, rows))
        # Undoes the rounding of n rotations: a Newton-Schulz step towards orthogonal rows.
        rows = matmul(1.5 * one - 0.5 * matmul(rows, rows.mT), rows)
        return measure(rows)

    first = measure(jnp.zeros_like(x) + one)
    _, rotated, rows = _repeat(
        sweep, first, _JACOBI_SWEEPS, _JACOBI_DONE * n**0.5, usual=_JACOBI_USUAL
    )
    # The rows and columns that fill up are zero: they are never mixed with others.
    values = jnp.diagonal(rotated, axis1=-2, axis2=-1)[..., :d]
    order = jnp.argsort(-values, axis=-1)
    vectors = jnp.take_along_axis(rows[..., :d, :d].mT, order[..., None, :], axis=-1)
    return jnp.take_along_axis(values, order, axis=-1) * scale[..., 0], vectors


def _largest_eigenvalue(x: jax.Array) -> jax.Array:
    """tr x²⁵⁷ / tr x²⁵⁶ of semidefinite x, `(..., 1, 1)`: for d = 512 at most 1.2% too small."""

    def square(_: int, power: jax.Array) -> jax.Array:
        squared = matmul(power, power)
        return squared / trace(squared)

    power = jax.lax.fori_loop(0, 8, square, x / trace(x))
    return jnp.sum(power * x, axis=(-2, -1), keepdims=True)


def _power(x: jax.Array, exponent: int) -> jax.Array:
    if exponent == 1:
        return x
    half = _power(x, exponent // 2)
    square = matmul(half, half)
    return matmul(square, x) if exponent % 2 else square


def newton_root(x: jax.Array, p: int, ridge: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(x + ε I)^(-1/p) of symmetric semidefinite x; NaN where the iteration does not converge.

    M <- Tᵖ M and R <- R T with T = I + (I - M) / p lead M to I and R to the root. C.-H. Guo, N.
    Higham 2006, "A Schur-Newton method for the matrix pth root and its inverse".

    Args:
      x: `(..., d, d)`.
      p: positive.
      ridge: ε, at least ROUNDING times its argument, the largest eigenvalue `(..., 1, 1)`.
    """
    unit = trace(x)
    x = x / unit
    largest = _largest_eigenvalue(x)
    shift = ridge(largest * unit) / unit
    one = identity(x.ndim, x.shape[-1])
    # The iteration converges for eigenvalues of M between 0 and p + 1, best for at most this.
    scale = (p + 1) / (2 * (largest + shift))
    m = scale * (x + shift * one)
    root = scale ** (1 / p) * (jnp.zeros_like(x) + one)

    def step(m: jax.Array, root: jax.Array) -> State:
        # What has converged would gather rounding while it waits for others.
        active = _largest_entry(m - one) > _NEWTON_DONE
        t = one + (one - m) / p
        m = jnp.where(active, matmul(_power(t, p), m), m)
        root = jnp.where(active, matmul(root, t), root)
        return _largest_entry(m - one), m, root

    first = (_largest_entry(m - one), m, root)
    error, _, root = _repeat(step, first, _NEWTON_STEPS, _NEWTON_DONE, usual=_NEWTON_USUAL)
    # The other half of rounding is antisymmetric, and large where eigenvalues are small.
    root = (root + root.mT) / 2
    return jnp.where(error <= _NEWTON_TOLERANCE, root * unit ** (-1 / p), jnp.nan)


def cholesky_qr(x: jax.Array) -> jax.Array:
    """The Q of a QR factorization of square x, `(..., d, d)`; NaN where it is not orthogonal.

    x <- x L⁻ᵀ with L Lᵀ = xᵀ x. Columns of length one and a jitter let the first pass succeed for
    any x; every pass divides the condition by the root of the jitter, until it is 1. T. Fukaya et
    al. 2020, "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices".
    """
    one = identity(x.ndim, x.shape[-1])

    def unit_columns(x: jax.Array) -> jax.Array:
        return x / jnp.linalg.norm(x, axis=-2, keepdims=True)

    def divide(gram: jax.Array, x: jax.Array) -> jax.Array:
        factor = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
        return jax.lax.linalg.triangular_solve(factor, x, lower=True, transpose_a=True)

    def one_pass(x: jax.Array) -> State:
        gram = matmul(x.mT, x)
        jitter = ROUNDING * jnp.linalg.norm(gram, axis=(-2, -1), keepdims=True)
        q = unit_columns(factorize(divide, gram + jitter * one, x))
        return _largest_entry(gram - one), q

    first = (jnp.full_like(x[..., :1, :1], jnp.inf), unit_columns(x))
    error, q = _repeat(one_pass, first, _CHOLESKY_PASSES, _CHOLESKY_DONE, usual=_CHOLESKY_USUAL)
    return jnp.where(error <= _CHOLESKY_DONE, q, jnp.nan)
