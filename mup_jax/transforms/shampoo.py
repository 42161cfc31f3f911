"""Shampoo: a Kronecker-factored preconditioner for each block of each matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.blocking import Blocking, Sides, refresh
from mup_jax.transforms.linalg import batch_by_shape, inverse_root
from mup_jax.transforms.matrices import MatrixGroups, WeightDimensionNumbers
from mup_jax.transforms.statistics import (
    Factors,
    ema,
    init_factors,
    is_alive,
    is_healthy,
    multiply_sides,
    update_factors,
)


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`; one entry per matrix shape."""

    count: jax.Array  # type: ignore[assignment]  # int32: steps so far
    mu: dict[str, jax.Array]
    statistics: Factors
    roots: Factors
    nonfinite: jax.Array  # int32: matrices of gradients skipped so far


def scale_by_shampoo(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-5,
    *,
    exponent: float = 0.5,
    relative_eps: bool = True,
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    stagger: bool = True,
    sides: Sides = "both",
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
      stagger: whether to spread the refreshes of the blocks over the steps; otherwise all at once
        where `step % precondition_frequency == 0`. All are refreshed at the first step, and when a
        block gets its first gradient that is not zero.
      sides: "both", or "in" or "out" to precondition one side only.
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: an option is out of range, or a leaf is not a matrix or has no side to
        precondition.

    References:
      Gupta et al., `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; blocks as in Anil et al.,
      `Scalable second order optimization <https://arxiv.org/abs/2002.09018>`_, 2020; Qiu et al.,
      `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """
    blocking = Blocking(block_size, max_preconditioner_dim, sides)

    def init(params: optax.Params) -> ScaleByShampooState:
        groups = MatrixGroups(params, weight_dimension_numbers).stack(params)

        return ScaleByShampooState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, groups),
            statistics=init_factors(groups, blocking, diagonal=0.0),
            roots=init_factors(groups, blocking, diagonal=0.0),
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: ScaleByShampooState, params: Any = None
    ) -> tuple[optax.Updates, ScaleByShampooState]:
        del params
        groups = MatrixGroups(updates, weight_dimension_numbers)
        count = state.count + 1
        correction = 1 - b2**count

        mu, momenta, statistics = {}, {}, {}
        skipped = state.nonfinite
        overdue = jnp.zeros((), bool)
        for key, gradient in groups.stack(updates).items():
            healthy = is_healthy(gradient)
            skipped = skipped + jnp.sum(~healthy, dtype=jnp.int32)
            mu[key] = ema(state.mu[key], gradient, b1, healthy)
            momenta[key] = mu[key] / (1 - b1**count)
            statistics[key] = [
                update_factors(pair, block, b2, healthy[..., None, None])
                for pair, block in zip(state.statistics[key], blocking.split(gradient), strict=True)
            ]
            # The first gradient that is neither zero nor bad may come late.
            for root, statistic in zip(state.roots[key], statistics[key], strict=True):
                overdue |= jnp.any(is_alive(statistic) & ~is_alive(root))

        def fresh_roots(roots: Factors, statistics: Factors) -> Factors:
            del roots
            root = lambda s: inverse_root(
                s / correction, exponent, eps=eps, relative_eps=relative_eps
            )
            return batch_by_shape(root, statistics)

        roots = refresh(
            state.count,
            precondition_frequency,
            fresh_roots,
            state.roots,
            statistics,
            stagger=stagger,
            overdue=overdue,
        )
        directions = {}
        for key, momentum in momenta.items():
            pieces = [
                multiply_sides(pair, block)
                for pair, block in zip(roots[key], blocking.split(momentum), strict=True)
            ]
            directions[key] = blocking.merge(pieces, *momentum.shape[-2:])
        return groups.unstack(directions), ScaleByShampooState(
            count, mu, statistics, roots, skipped
        )

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
