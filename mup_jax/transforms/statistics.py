"""Second-moment statistics of blocks, safe against bad gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from mup_jax.transforms.blocking import Blocking
from mup_jax.transforms.linalg import FLOOR, matmul

# A `(..., b_in, b_in)` and a `(..., b_out, b_out)` matrix for `(..., b_in, b_out)` blocks; None for
# a side without preconditioner.
Pair = tuple[Any, Any]

# The pairs of each piece of the blocking, for each matrix shape.
Factors = dict[str, list[Pair]]


def is_healthy(gradients: jax.Array) -> jax.Array:
    """Whether the squares of matrices `(..., m, n)` are finite in float32: `(..., 1, 1)` bool.

    The trace of G Gᵀ bounds all its entries, so a healthy gradient has finite statistics.
    """
    return jnp.isfinite(jnp.sum(jnp.square(gradients), axis=(-2, -1), keepdims=True))


def ema(old: jax.Array, new: jax.Array, decay: float, healthy: jax.Array) -> jax.Array:
    """decay·old + (1 - decay)·new where `healthy`; elsewhere old, so that nothing bad enters."""
    return jnp.where(healthy, decay * old + (1 - decay) * new, old)


def init_factors(groups: dict[str, jax.Array], blocking: Blocking, diagonal: float) -> Factors:
    """`diagonal` times the identity for every preconditioned side of every block."""

    def factor(block: jax.Array, size: int) -> jax.Array:
        return jnp.broadcast_to(diagonal * jnp.eye(size), (*block.shape[:-2], size, size))

    def pair(block: jax.Array, on_in: bool, on_out: bool) -> Pair:
        b_in, b_out = block.shape[-2:]
        return factor(block, b_in) if on_in else None, factor(block, b_out) if on_out else None

    return {
        key: [pair(block, *blocking.of(*x.shape[-2:])) for block in blocking.split(x)]
        for key, x in groups.items()
    }


def update_factors(pair: Pair, block: jax.Array, decay: float, healthy: jax.Array) -> Pair:
    """The averages of G Gᵀ (in side) and Gᵀ G (out side) of `(..., b_in, b_out)` blocks G."""
    on_in, on_out = pair
    if on_in is not None:
        on_in = ema(on_in, matmul(block, block.mT), decay, healthy)
    if on_out is not None:
        on_out = ema(on_out, matmul(block.mT, block), decay, healthy)
    return on_in, on_out


def is_alive(pair: Pair) -> jax.Array:
    """Whether blocks `(...)` have statistics that are more than rounding noise."""
    return jnp.trace(jax.tree.leaves(pair)[0], axis1=-2, axis2=-1) > FLOOR


def multiply_sides(pair: Pair, block: jax.Array) -> jax.Array:
    """Aᵀ X B for the pair (A, B) and `(..., b_in, b_out)` blocks X."""
    on_in, on_out = pair
    if on_in is not None:
        block = matmul(on_in.mT, block)
    if on_out is not None:
        block = matmul(block, on_out)
    return block
