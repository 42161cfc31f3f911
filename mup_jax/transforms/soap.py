"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.blocking import Sides
from mup_jax.transforms.engine import scale_by_blocks
from mup_jax.transforms.linalg import FLOOR, ROUNDING, identity, matmul
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import (
    check_decays,
    check_not_negative,
    check_preconditioner,
)
from mup_jax.transforms.rule import Block, BlockRule
from mup_jax.transforms.statistics import (
    Factors,
    bias_correction,
    ema,
    make_factors,
    multiply_sides,
    new_bases,
    packed_grams,
    packed_zeros,
)


class SoapState(NamedTuple):
    """What `scale_by_soap` keeps of a block."""

    mu: jax.Array
    nu: jax.Array  # second moment, in the bases
    statistics: Factors  # symmetric, packed
    bases: Factors


def carry(nu: jax.Array, old: Factors, new: Factors) -> jax.Array:
    """The second moment V in new bases: (S_in∘S_in)ᵀ V (S_out∘S_out) with S = Q_oldᵀ Q_new.

    It is exact for a gradient whose rotated entries are uncorrelated. A permutation of a basis
    carries V along with its directions, so eigenvalues may swap order.
    """

    def squared_rotation(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.square(matmul(old.mT.astype(jnp.float32), new.astype(jnp.float32)))

    return multiply_sides(jax.tree.map(squared_rotation, old, new), nu)


def adam_in_bases(
    gradient: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    bases: Factors,
    step: jax.Array,
    block: Block,
    b1: float,
    b2: float,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SOAP's update of a block, and its new moments."""
    mu = ema(mu, gradient, b1)
    is_first = block.max_over_parts(jnp.max(nu)) == 0

    def rotate(x: jax.Array) -> jax.Array:
        """Qᵀ X Q.

        At a block's first gradient both bases come from it alone, and make it diagonal. What
        rounding leaves beside it would be divided by its own size and come out as ±1.
        """
        rotated = multiply_sides(bases, x)
        if not all(block.sides):
            return rotated
        return jnp.where(is_first, rotated * identity(2, *x.shape), rotated)

    nu = ema(nu, jnp.square(rotate(gradient)), b2)
    size = jnp.sqrt(nu)
    # Directions without a gradient have V of rounding noise, or exactly zero.
    noise = ROUNDING * block.max_over_parts(jnp.max(size))
    adam = rotate(mu) / jnp.maximum(size + eps, jnp.maximum(noise, FLOOR))
    update = multiply_sides(jax.tree.map(lambda q: q.mT, bases), adam)
    correction = jnp.sqrt(bias_correction(b2, step)) / bias_correction(b1, step)
    return update * correction, mu, nu


def scale_by_soap(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    *,
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 20,
    stagger: bool = True,
    sides: Sides = "both",
    preconditioner_dtype: jax.typing.DTypeLike = jnp.float32,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs Adam in the eigenbasis of Shampoo's statistics (SOAP).

    .. math::
      G' = Q_L^\top G Q_R, \quad V \leftarrow \beta_2 V + (1 - \beta_2) G'^2, \quad
      u = Q_L \frac{Q_L^\top M Q_R}{\sqrt V + \epsilon} Q_R^\top
          \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}

    for each block G of a `(d_in, d_out)` gradient, where Q_L, Q_R are eigenvectors of the averages
    of G Gᵀ and Gᵀ G. The momentum M stays in the original basis. A matrix whose gradient is not
    finite keeps its momentum, its second moment and its statistics.

    Three things differ from the authors' code. When a basis moves, V moves along by the squared
    rotation between the two, instead of staying: on random gradients of condition 20, with a
    refresh every ten steps, updates are apart by half of their norm after the first refresh and by
    a fifth after the sixth. The first step is taken, instead of skipped. And at a block's first
    gradient, whose own basis makes it diagonal, what is beside the diagonal is taken for zero: it
    is rounding noise, which divided by its own size would come out as ±1 everywhere.

    Args:
      b1: decay of the momentum.
      b2: decay of the second moment and of the statistics.
      eps: added to √V, in units of the gradient.
      block_size: largest block side; None for whole matrices. Edge blocks are smaller.
      max_preconditioner_dim: a longer side of a matrix is not rotated and not cut.
      precondition_frequency: steps between two refreshes of a block's basis, each one step of
        orthogonal iteration (a QR factorization).
      exact_steps: as in `scale_by_shampoo`. These refreshes, and that at a block's first gradient
        that is not zero, are eigendecompositions.
      stagger: as in `scale_by_shampoo`.
      sides: "both", or "in" or "out" to rotate one side only.
      preconditioner_dtype: in which the bases are stored; bfloat16 saves a float per parameter.
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: an option is out of range, or a leaf is not a matrix or has no side to rotate.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.scale_by_soap(block_size=256)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; Qiu et al.,
      `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """
    check_preconditioner(
        precondition_frequency=precondition_frequency,
        exact_steps=exact_steps,
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        preconditioner_dtype=preconditioner_dtype,
    )
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps)

    def make_rule(block: Block) -> BlockRule:
        def init(shape: tuple[int, int]) -> SoapState:
            zeros = jnp.zeros(shape, jnp.float32)
            bases = make_factors(shape, block, lambda d: jnp.zeros((d, d), preconditioner_dtype))
            return SoapState(zeros, zeros, make_factors(shape, block, packed_zeros), bases)

        def accumulate(gradient: jax.Array, state: SoapState, step: jax.Array) -> SoapState:
            del step
            grams = packed_grams(gradient, block)
            average = lambda old, new: ema(old, new, b2)
            return state._replace(statistics=jax.tree.map(average, state.statistics, grams))

        def refresh(state: SoapState, step: jax.Array, *, exact: bool = False) -> SoapState:
            del step
            bases = new_bases(state.statistics, state.bases, exact=exact)
            return state._replace(bases=bases, nu=carry(state.nu, state.bases, bases))

        def direction(
            gradient: jax.Array, state: SoapState, step: jax.Array
        ) -> tuple[jax.Array, SoapState]:
            update, mu, nu = adam_in_bases(
                gradient, state.mu, state.nu, state.bases, step, block, b1, b2, eps
            )
            return update, state._replace(mu=mu, nu=nu)

        return BlockRule(init, direction, accumulate, refresh, partial(refresh, exact=True))

    return scale_by_blocks(
        make_rule,
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        sides=sides,
        precondition_frequency=precondition_frequency,
        first_steps=exact_steps,
        stagger=stagger,
        weight_dimension_numbers=weight_dimension_numbers,
    )
