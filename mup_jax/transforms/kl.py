r"""Factors of gradients that the other factor has whitened, for KL-Shampoo and KL-SOAP.

.. math::
  S_{in} \leftarrow \beta_2 S_{in} + \tfrac{1 - \beta_2}{d_{out}} G S_{out}^{-1} G^\top, \quad
  S_{out} \leftarrow \beta_2 S_{out} + \tfrac{1 - \beta_2}{d_{in}} G^\top S_{in}^{-1} G

Where both stand still, S_out ⊗ S_in is nearest to the covariance of G in Kullback-Leibler
divergence. To each other they are Q diag(λ) Qᵀ with a basis Q that is refreshed now and then, and
λ = diag(QᵀSQ), which is averaged at every step in that basis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mup_jax.transforms.platforms import FLOOR, identity, matmul
from mup_jax.transforms.rule import Block
from mup_jax.transforms.statistics import (
    Factors,
    ema,
    make_factors,
    multiply_sides,
    new_bases,
    pack,
    packed_zeros,
    unpack,
)


class KLFactors(NamedTuple):
    """Of one block. All but the bases are weighted sums, with the weight that they have in all."""

    statistics: Factors  # symmetric, packed
    bases: Factors
    eigenvalues: Factors  # `(1, d)`: those of the statistics in the bases
    weight: jax.Array  # scalar; zero before the first gradient


def new_factors(
    shape: tuple[int, int], block: Block, dtype: jax.typing.DTypeLike = jnp.float32
) -> KLFactors:
    return KLFactors(
        make_factors(shape, block, packed_zeros),
        make_factors(shape, block, lambda d: identity(2, d).astype(dtype)),
        make_factors(shape, block, lambda d: jnp.zeros((1, d), jnp.float32)),
        jnp.zeros((), jnp.float32),
    )


def scale_sides(
    factors: KLFactors, x: jax.Array, exponent: float, eps: float | jax.Array
) -> jax.Array:
    """Λ_in^e X Λ_out^e of an X in the bases; ε is relative to the largest λ of each side."""

    def powers(eigenvalues: jax.Array) -> jax.Array:
        values = jnp.maximum(eigenvalues / jnp.maximum(factors.weight, FLOOR), 0.0)
        return jnp.maximum(values + eps * jnp.max(values), FLOOR) ** exponent

    on_in, on_out = factors.eigenvalues
    if on_in is not None:
        x = powers(on_in).mT * x
    return x if on_out is None else x * powers(on_out)


def accumulate_factors(
    gradient: jax.Array, factors: KLFactors, block: Block, b2: float, eps: float | jax.Array
) -> KLFactors:
    """Takes a gradient in, into both factors as they were before.

    An identity of the size of the first gradient that is not zero counts as one gradient before it,
    so that the first inverses exist.
    """
    d_in, d_out = block.shape
    mean_square = block.sum_over_parts(jnp.sum(jnp.square(gradient))) / (d_in * d_out)
    is_first = (factors.weight == 0) & (mean_square > FLOOR)
    size = jnp.where(is_first, mean_square ** (1 / sum(block.sides)) * (1 - b2), 0.0)
    old = KLFactors(
        jax.tree.map(
            lambda s, q: s + size * pack(identity(2, len(q))), factors.statistics, factors.bases
        ),
        jax.tree.map(lambda q: q.astype(jnp.float32), factors.bases),
        jax.tree.map(lambda values: values + size, factors.eigenvalues),
        jnp.where(is_first, 1 - b2, factors.weight),
    )

    def of_side(
        statistic: jax.Array | None,
        basis: jax.Array | None,
        eigenvalues: jax.Array | None,
        whitened: jax.Array,
        d_other: int,
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """The average of X Xᵀ, and its diagonal in the basis."""
        if statistic is None or basis is None or eigenvalues is None:
            return None, None
        gram = block.sum_over_parts(matmul(whitened, whitened.mT)) / d_other
        squares = jnp.sum(jnp.square(matmul(basis.mT, whitened)), axis=-1)[None] / d_other
        diagonal = block.sum_over_parts(squares)
        return ema(statistic, pack(gram), b2), ema(eigenvalues, diagonal, b2)

    def whiten(keep: Callable[[Factors], Factors]) -> jax.Array:
        """The gradient in the basis of one side, with unit variance there."""
        alone = old._replace(eigenvalues=keep(old.eigenvalues))
        return scale_sides(alone, multiply_sides(keep(old.bases), gradient), -0.5, eps)

    by_out = whiten(lambda pair: pair._replace(on_in=None))
    by_in = whiten(lambda pair: pair._replace(on_out=None))
    ins, outs = zip(old.statistics, old.bases, old.eigenvalues, strict=True)
    s_in, l_in = of_side(*ins, by_out, d_out)
    s_out, l_out = of_side(*outs, by_in.mT, d_in)
    weight = jnp.where(old.weight > 0, ema(old.weight, jnp.ones_like(old.weight), b2), 0.0)
    return KLFactors(Factors(s_in, s_out), factors.bases, Factors(l_in, l_out), weight)


def refresh_factors(factors: KLFactors, *, exact: bool) -> KLFactors:
    """New bases, as by `new_bases`, and the eigenvalues in them."""

    def diagonal(statistic: jax.Array, basis: jax.Array) -> jax.Array:
        basis = basis.astype(jnp.float32)
        return jnp.sum(basis * matmul(unpack(statistic), basis), axis=-2, keepdims=True)

    bases = new_bases(factors.statistics, factors.bases, exact=exact)
    eigenvalues = jax.tree.map(diagonal, factors.statistics, bases)
    return factors._replace(bases=bases, eigenvalues=eigenvalues)
