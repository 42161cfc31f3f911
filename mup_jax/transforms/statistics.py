"""Second-moment statistics of blocks, safe against bad gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from mup_jax.transforms.blocking import Blocking
from mup_jax.transforms.division import Division
from mup_jax.transforms.linalg import FLOOR, matmul

# Something for the in side and the out side of blocks; None for a side without preconditioner.
Pair = tuple[Any, Any]

# The pairs of each piece of the blocking, for each group.
Factors = dict[str, list[Pair]]


def ema(old: jax.Array, new: jax.Array, decay: float, healthy: jax.Array) -> jax.Array:
    """decay·old + (1 - decay)·new where `healthy`; elsewhere old, so that nothing bad enters."""
    return jnp.where(healthy, decay * old + (1 - decay) * new, old)


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


def abstract_factors(
    divisions: dict[str, Division],
    blocking: Blocking,
    *,
    packed: bool,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Factors:
    """An abstract `(n, rows, columns, d, d)` factor for each preconditioned side of the blocks.

    `packed` for symmetric matrices, of which half is kept.
    """

    def factor(grid: tuple[int, ...], d: int) -> jax.ShapeDtypeStruct:
        square = jax.ShapeDtypeStruct((*grid, d, d), dtype)
        return jax.eval_shape(pack, square) if packed else square

    factors: Factors = {}
    for key, division in divisions.items():
        n, d_in, d_out = division.shape
        on_in, on_out = blocking.of(d_in, d_out)
        factors[key] = []
        for row, column in blocking.pieces(d_in, d_out):
            grid = (n, row.number, column.number)
            pair = (factor(grid, row.size), factor(grid, column.size))
            factors[key].append((pair[0] if on_in else None, pair[1] if on_out else None))
    return factors


def update_factors(
    pair: Pair, block: jax.Array, decay: float, healthy: jax.Array, division: Division
) -> Pair:
    """Packed averages of G Gᵀ (in side) and Gᵀ G (out side) of blocks G `(..., b_in, b_out)`."""
    on_in, on_out = pair
    if on_in is not None:
        gram = division.over_uncut(jax.lax.psum, matmul(block, block.mT))
        on_in = ema(on_in, pack(gram), decay, healthy)
    if on_out is not None:
        gram = division.over_uncut(jax.lax.psum, matmul(block.mT, block))
        on_out = ema(on_out, pack(gram), decay, healthy)
    return on_in, on_out


def is_alive(pair: Pair) -> jax.Array:
    """Whether blocks `(...)` have statistics that are more than rounding noise."""
    factor = jax.tree.leaves(pair)[0]
    return jnp.max(jnp.abs(factor), axis=(-2, -1)) > FLOOR


def multiply_sides(pair: Pair, block: jax.Array) -> jax.Array:
    """Aᵀ X B for the pair (A, B) and `(..., b_in, b_out)` blocks X."""
    on_in, on_out = pair
    if on_in is not None:
        block = matmul(on_in.mT, block)
    if on_out is not None:
        block = matmul(block, on_out)
    return block
