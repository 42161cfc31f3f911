"""The polar factor of a matrix by matrix products."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from mup_jax.transforms.platforms import (
    FLOOR,
    ROUNDING,
    by_platform,
    identity,
    matmul,
    one_at_a_time,
)

Orthogonalizer = Literal["tuned", "polar_express", "newton_schulz", "svd"]
Quintic = tuple[float, float, float]

# J. You 2025, tuned for float32 and bfloat16 together, one quintic per step. Six steps:
# https://docs.modula.systems/algorithms/newton-schulz. Five steps, as published in modded-nanogpt
# and used by microsoft/dion: https://x.com/YouJiacheng/status/1905861218138804534.
_TUNED: dict[int, list[Quintic]] = {
    5: [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    6: [
        (3955 / 1024, -8306 / 1024, 5008 / 1024),
        (3735 / 1024, -6681 / 1024, 3463 / 1024),
        (3799 / 1024, -6499 / 1024, 3211 / 1024),
        (4019 / 1024, -6385 / 1024, 2906 / 1024),
        (2677 / 1024, -3029 / 1024, 1162 / 1024),
        (2172 / 1024, -1833 / 1024, 682 / 1024),
    ],
}

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

# For T steps on n×m the plain form needs T (2 m/n + 1) products of n×n matrices, the Gram form
# 2 m/n + 4 T - 3: it saves (T - 1)(2 m/n - 3).
_GRAM_FORM_PAYS_FROM = 1.5
# Rounding leaves eigenvalues of -1e-7 in the Gram matrix, which each step multiplies by a². They
# stay small for four steps of Polar Express and five of the others; after ten, the result may have
# any size.
_GRAM_FORM_GROWTH = 3e5


def quintic_coefficients(method: Orthogonalizer, ns_steps: int | None = None) -> list[Quintic]:
    """The polynomials a x + b x³ + c x⁵, one per step, of an iterative orthogonalizer.

    Raises:
      ValueError: an unknown method, or one that has no such number of steps.
    """
    if method == "tuned":
        ns_steps = 6 if ns_steps is None else ns_steps
        if ns_steps not in _TUNED:
            raise ValueError(
                f"ns_steps={ns_steps}: 'tuned' has lists of 5 and 6 steps; 'polar_express' takes "
                "any number"
            )
        return _TUNED[ns_steps]
    ns_steps = 5 if ns_steps is None else ns_steps
    if ns_steps < 1:
        raise ValueError(f"ns_steps={ns_steps}: give at least one step")
    if method == "newton_schulz":
        return [_NEWTON_SCHULZ] * ns_steps
    if method != "polar_express":
        raise ValueError(
            f"orthogonalizer={method!r}: choose 'tuned', 'polar_express', 'newton_schulz' or 'svd'"
        )
    s = _POLAR_EXPRESS_SAFETY
    last = len(_POLAR_EXPRESS) - 1
    return [
        (a / s, b / s**3, c / s**5)
        for a, b, c in (_POLAR_EXPRESS[min(i, last)] for i in range(ns_steps))
    ]


def check_orthogonalizer(
    method: Orthogonalizer,
    ns_steps: int | None = None,
    gram_form: bool | None = None,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> None:
    """Raises the ValueError of `orthogonalize`, before there is a matrix."""
    if method != "svd":
        quintic_coefficients(method, ns_steps)
    if jnp.dtype(compute_dtype) != jnp.float32 and (method == "svd" or gram_form):
        what = "orthogonalizer='svd'" if method == "svd" else "gram_form=True"
        raise ValueError(f"compute_dtype={jnp.dtype(compute_dtype)}: {what} needs float32")


def _normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / (‖x‖_F + ε), of the same accuracy for any x of finite entries."""
    # Dividing by the largest entry first keeps the squares of the norm in float32's range.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0)
    unit = x / scale
    norm = jnp.linalg.norm(unit, axis=(-2, -1), keepdims=True)
    return unit / jnp.maximum(norm + eps / scale, FLOOR)


def _iterate(coefficients: list[Quintic], x: jax.Array) -> jax.Array:
    """X <- a X + (b A + c A²) X with A = X Xᵀ, once for each (a, b, c)."""
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _iterate_gram(coefficients: list[Quintic], x: jax.Array) -> jax.Array:
    """The same on A: X <- p_T(A_T) ... p_1(A_1) X, where A_{t+1} = p_t(A_t) A_t p_t(A_t).

    Everything but X commutes. Before rounding errors have grown too much, A is taken anew. With
    bfloat16's products that would be after one step, so they are of full precision. J. Zhang, N.
    Amsel, B. Chen, T. Dao 2026, "Gram Newton-Schulz".
    """
    one = identity(x.ndim, x.shape[-2])

    def polynomial(abc: Quintic, gram: jax.Array) -> jax.Array:
        a, b, c = abc
        return a * one + b * gram + c * matmul(gram, gram)

    runs: list[list[Quintic]] = []
    growth = math.inf
    for a, b, c in coefficients:
        growth *= a * a
        if growth > _GRAM_FORM_GROWTH:
            runs.append([])
            growth = a * a
        runs[-1].append((a, b, c))
    for first, *others in runs:
        gram = matmul(x, x.mT)
        product = p = polynomial(first, gram)
        for abc in others:
            gram = matmul(matmul(p, gram), p)
            p = polynomial(abc, gram)
            product = matmul(p, product)
        x = matmul(product, x)
    return x


def _by_svd(x: jax.Array) -> jax.Array:
    svd = functools.partial(jnp.linalg.svd, full_matrices=False)
    # Matrices of several shapes may have theirs side by side; see `platforms.after`.
    u, s, vt = by_platform(x, cpu=one_at_a_time(svd), gpu=svd, tpu=svd)
    # Noise would come out as large as the rest.
    nonzero = (s > ROUNDING * s[..., :1]) & (s > FLOOR)
    return matmul(jnp.where(nonzero[..., None, :], u, 0.0), vt)


def orthogonalize(
    x: jax.Array,
    method: Orthogonalizer = "tuned",
    *,
    ns_steps: int | None = None,
    eps: float = 1e-8,
    gram_form: bool | None = None,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """The orthogonal polar factor U Vᵀ of x = U S Vᵀ.

    Args:
      x: `(..., m, n)`, any real dtype.
      method: "tuned" (quintics fitted to their number of steps), "polar_express" or "newton_schulz"
        (Jordan's one quintic): products only, approximate; or "svd": exact, and slow on
        accelerators.
      ns_steps: iterations of the approximate methods: 6 or 5 for "tuned", any number, by default 5,
        for the others.
      eps: added to the Frobenius norm by which the approximate methods divide x.
      gram_form: whether to iterate on x xᵀ, or xᵀ x if smaller, and multiply with x at the end. The
        same but for rounding. It takes products in full float32, where the other form takes the
        platform's fastest. None: on CPUs, if it has fewer operations.
      compute_dtype: of the products of the plain form. bfloat16 halves their memory and, on
        accelerators, takes their fastest units; with "tuned" it comes within 0.05 of the polar
        factor (relative to its norm) up to condition 100, float32 within 0.003. Float32 is
        the default everywhere: CPUs have nothing faster, and accelerators take bfloat16's or TF32's
        units for it unless `jax_default_matmul_precision` says otherwise.

    Returns:
      `(..., m, n)` in float32. What x maps to zero stays zero.

    Raises:
      ValueError: an unknown method, a number of steps that it does not have, or a `compute_dtype`
        that "svd" or the Gram form cannot have.
    """
    check_orthogonalizer(method, ns_steps, gram_form, compute_dtype)
    x = x.astype(jnp.float32)
    if method == "svd":
        return _by_svd(x)
    # The Gram matrix is taken of the shorter side.
    tall = x.shape[-2] > x.shape[-1]
    x = _normalize(x.mT if tall else x, eps)
    coefficients = quintic_coefficients(method, ns_steps)
    plain = functools.partial(_iterate, coefficients)
    in_gram_form = functools.partial(_iterate_gram, coefficients)
    if jnp.dtype(compute_dtype) != jnp.float32:
        x = plain(x.astype(compute_dtype)).astype(jnp.float32)
    elif gram_form is None and x.shape[-1] >= _GRAM_FORM_PAYS_FROM * x.shape[-2]:
        x = by_platform(x, cpu=in_gram_form, gpu=plain, tpu=plain)
    else:
        x = (in_gram_form if gram_form else plain)(x)
    return x.mT if tall else x
