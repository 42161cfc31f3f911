"""Norms of matrices on the leaves as they are, in float32, with their axes kept.

They are sums over axes: no transpose, no reshape, and under a mesh no sharding that cannot be
summed over.
"""

import jax
import jax.numpy as jnp

from mup_jax.transforms.matrices import MatrixLayout


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The root of Σ x² over axes, which have length 1 then."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


def frobenius_norm(layout: MatrixLayout, x: jax.Array) -> jax.Array:
    """‖x‖_F of each matrix."""
    return norm(x, layout.in_axes + layout.out_axes)


def in_range(layout: MatrixLayout, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrices over their largest entries, in float32, and how many are not finite.

    Squares and products of the result stay in range; what is zero or not finite becomes zero.
    """
    axes = layout.in_axes + layout.out_axes
    u = u.astype(jnp.float32)
    largest = jnp.max(jnp.abs(u), axis=axes, keepdims=True)
    # Not of the largest: between devices a maximum loses NaN.
    finite = jnp.all(jnp.isfinite(u), axis=axes, keepdims=True)
    usable = finite & (largest >= jnp.finfo(jnp.float32).tiny)
    return jnp.where(usable, u / largest, 0.0), jnp.sum(~finite, dtype=jnp.int32)


def unit(layout: MatrixLayout, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Matrices over their Frobenius norms, in float32, and how many are not finite.

    What is zero or not finite becomes zero.
    """
    x, nonfinite = in_range(layout, u)
    length = frobenius_norm(layout, x)
    return x / jnp.where(length > 0, length, 1.0), nonfinite
