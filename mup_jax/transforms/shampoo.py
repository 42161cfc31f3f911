"""Shampoo: a Kronecker-factored preconditioner for each block of each matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.blocking import Sides
from mup_jax.transforms.engine import scale_by_blocks
from mup_jax.transforms.linalg import inverse_root
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import (
    check_decays,
    check_not_negative,
    check_positive,
    check_preconditioner,
)
from mup_jax.transforms.rule import Block, BlockRule
from mup_jax.transforms.statistics import (
    Factors,
    bias_correction,
    ema,
    make_factors,
    map_factors,
    multiply_sides,
    pack,
    packed_grams,
    packed_zeros,
    unpack,
)


class ShampooState(NamedTuple):
    """What `scale_by_shampoo` keeps of a block; factors are symmetric and packed."""

    mu: jax.Array
    statistics: Factors
    roots: Factors


def scale_by_shampoo(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-5,
    *,
    exponent: float | jax.Array = 0.5,
    relative_eps: bool = True,
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 20,
    stagger: bool = True,
    sides: Sides = "both",
    preconditioner_dtype: jax.typing.DTypeLike = jnp.float32,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions the momentum of each block on both sides (Shampoo).

    .. math::
      L \leftarrow \beta_2 L + (1 - \beta_2) G G^\top, \quad
      R \leftarrow \beta_2 R + (1 - \beta_2) G^\top G, \quad
      u = (\hat L + \epsilon_L I)^{-e} \hat M (\hat R + \epsilon_R I)^{-e}

    for each block G of a `(d_in, d_out)` gradient, with bias-corrected averages; `exponent` 1/4 is
    Shampoo, 1/2 is Shampoo². The statistics include the current gradient. A matrix whose gradient
    is not finite keeps its momentum and its preconditioner.

    Roots of the first few gradients know nothing of the directions that come next, and enlarge them
    by up to 1/ε: kept for ten steps from the first, they make updates thousands of times too large,
    or, grafted, of the wrong direction. With the default `exact_steps`, updates stay within a
    factor of two of those of `precondition_frequency=1` where the rank of a gradient is at least an
    eighth of the block's side (2.2 at a sixteenth; thousands at rank one, which takes as many exact
    steps as a block has rows). Distributed Shampoo and Anil et al. take grafting's own direction
    until a first refresh of all instead; SOAP's authors skip one step.

    Args:
      b1: decay of the momentum.
      b2: decay of the statistics.
      eps: ridge of the roots: times the largest eigenvalue of each factor where `relative_eps`,
        otherwise in units of the squared gradient.
      exponent: e, of each side.
      relative_eps: see `eps`.
      block_size: largest block side; None for whole matrices. Edge blocks are smaller.
      max_preconditioner_dim: a longer side of a matrix has no preconditioner and is not cut.
      precondition_frequency: steps between two refreshes of a block's roots.
      exact_steps: for so many steps all blocks are refreshed at every step; then the interval grows
        by a step every `exact_steps` steps, until it is `precondition_frequency`; see above.
      stagger: whether to spread the refreshes of the blocks over the steps; otherwise all at once
        where `step % precondition_frequency == 0`. All are refreshed, too, when a block gets its
        first gradient that is not zero.
      sides: "both", or "in" or "out" to precondition one side only.
      preconditioner_dtype: in which the roots are stored; bfloat16 saves a float per parameter.
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: an option is out of range, or a leaf is not a matrix or has no side to
        precondition.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.scale_by_shampoo(block_size=256, exponent=0.25)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Gupta et al., `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; blocks as in Anil et al.,
      `Scalable second order optimization <https://arxiv.org/abs/2002.09018>`_, 2020; Qiu et al.,
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
    check_positive(exponent=exponent)

    def make_rule(block: Block) -> BlockRule:
        def init(shape: tuple[int, int]) -> ShampooState:
            zeros = make_factors(shape, block, packed_zeros)
            roots = jax.tree.map(lambda x: x.astype(preconditioner_dtype), zeros)
            return ShampooState(jnp.zeros(shape, jnp.float32), zeros, roots)

        def accumulate(gradient: jax.Array, state: ShampooState, step: jax.Array) -> ShampooState:
            del step
            grams = packed_grams(gradient, block)
            average = lambda old, new: ema(old, new, b2)
            return state._replace(statistics=jax.tree.map(average, state.statistics, grams))

        def refresh(state: ShampooState, step: jax.Array) -> ShampooState:
            def root(statistic: jax.Array, previous: jax.Array) -> jax.Array:
                new = inverse_root(
                    unpack(statistic) / bias_correction(b2, step),
                    unpack(previous).astype(jnp.float32),
                    exponent,
                    eps=eps,
                    relative_eps=relative_eps,
                )
                return pack(new).astype(previous.dtype)

            return state._replace(roots=map_factors(root, state.statistics, state.roots))

        def direction(
            gradient: jax.Array, state: ShampooState, step: jax.Array
        ) -> tuple[jax.Array, ShampooState]:
            mu = ema(state.mu, gradient, b1)
            preconditioned = multiply_sides(jax.tree.map(unpack, state.roots), mu)
            return preconditioned / bias_correction(b1, step), state._replace(mu=mu)

        return BlockRule(init, direction, accumulate, refresh)

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
