"""Averages of gradients and of their products, as the rules of blocks need them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mup_jax.transforms.linalg import eigenbasis, refine_eigenbasis
from mup_jax.transforms.platforms import after, matmul
from mup_jax.transforms.rule import Block


class Factors(NamedTuple):
    """A matrix for the in side and one for the out side of a block, for those preconditioned."""

    on_in: jax.Array | None
    on_out: jax.Array | None


def make_factors(shape: tuple[int, int], block: Block, make: Callable[[int], jax.Array]) -> Factors:
    """`make(d)` for each preconditioned side, of length d."""
    sides = zip(shape, block.sides, strict=True)
    return Factors(*(make(d) if on else None for d, on in sides))


def packed_zeros(d: int) -> jax.Array:
    """Half of a symmetric `(d, d)` matrix of zeros; see `pack`."""
    return pack(jnp.zeros((d, d), jnp.float32))


def packed_grams(x: jax.Array, block: Block) -> Factors:
    """Half of X Xᵀ (in side) and of Xᵀ X (out side) of `(m, n)` blocks X."""
    of = lambda product: pack(block.sum_over_parts(product))
    on_in, on_out = block.sides
    return Factors(of(matmul(x, x.mT)) if on_in else None, of(matmul(x.mT, x)) if on_out else None)


def multiply_sides(factors: Factors, x: jax.Array) -> jax.Array:
    """Aᵀ X B for factors (A, B) and `(m, n)` blocks X."""
    if factors.on_in is not None:
        x = matmul(factors.on_in.mT, x)
    if factors.on_out is not None:
        x = matmul(x, factors.on_out)
    return x


def map_factors(function: Callable[..., jax.Array], *factors: Factors) -> Factors:
    """`function` of the matrices of a side, which factorizes them, for each side.

    Sides of one length are one batch, which keeps programs small. Others come one after the other,
    see `platforms.after`.
    """
    ins, outs = zip(*factors, strict=True)
    if ins[0] is None or outs[0] is None:
        return Factors(*(None if side[0] is None else function(*side) for side in (ins, outs)))
    if ins[0].shape == outs[0].shape:
        on_in, on_out = jax.vmap(function)(*map(jnp.stack, zip(ins, outs, strict=True)))
        return Factors(on_in, on_out)
    on_in = function(*ins)
    return Factors(on_in, function(*(after(on_in, x) for x in outs)))


def ema(old: jax.Array, new: jax.Array, decay: float | jax.Array) -> jax.Array:
    """decay·old + (1 - decay)·new."""
    return decay * old + (1 - decay) * new


def momentum(
    mu: jax.Array, gradient: jax.Array, decay: float | jax.Array, nesterov: bool
) -> tuple[jax.Array, jax.Array]:
    """The new average of gradients, and what to take for it: with `nesterov` a step ahead of it."""
    mu = ema(mu, gradient, decay)
    return mu, ema(mu, gradient, decay) if nesterov else mu


def new_bases(statistics: Factors, bases: Factors, *, exact: bool) -> Factors:
    """Eigenvectors of packed statistics, exact or by a step from the bases before."""

    def basis(statistic: jax.Array, previous: jax.Array) -> jax.Array:
        whole = unpack(statistic)
        refine = lambda: refine_eigenbasis(whole, previous.astype(jnp.float32))
        return (eigenbasis(whole) if exact else refine()).astype(previous.dtype)

    return map_factors(basis, statistics, bases)


def bias_correction(decay: float | jax.Array, count: jax.Array) -> jax.Array:
    """1 - decay^count: by what to divide an average that began at zero, after so many steps."""
    return 1 - decay ** count.astype(jnp.float32)


def pack(x: jax.Array) -> jax.Array:
    """Half of a symmetric matrix: `(..., d, d)` -> `(..., d + 1, d / 2)`, for odd d `(d + 1) / 2`.

    The lower triangle of the first half of the matrix lies beside the upper triangle of the second;
    below is the square between the two. With d odd there is one row less.
    """
    d = x.shape[-1]
    half, even = (d + 1) // 2, 1 - d % 2
    keep = [(0, 0)] * (x.ndim - 2)
    first = jnp.pad(jnp.tril(x[..., :half, :half]), [*keep, (even, 0), (0, 0)])
    second = jnp.pad(jnp.triu(x[..., half:, half:]), [*keep, (0, 1), (1 - even, 0)])
    return jnp.concatenate([first + second, x[..., half:, :half]], axis=-2)


def unpack(x: jax.Array) -> jax.Array:
    """The inverse of `pack`."""
    rows, half = x.shape[-2:]
    even = rows > 2 * half
    d = rows - even
    low = jnp.tril(x[..., even : even + half, :])
    high = jnp.triu(x[..., : d - half, 1 - even :])
    between = x[..., half + even :, :]
    first = jnp.concatenate([low + jnp.tril(low, -1).mT, between.mT], axis=-1)
    second = jnp.concatenate([between, high + jnp.triu(high, 1).mT], axis=-1)
    return jnp.concatenate([first, second], axis=-2)
