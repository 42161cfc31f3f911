"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.blocking import Blocking, Sides, refresh
from mup_jax.transforms.linalg import (
    FLOOR,
    ROUNDING,
    batch_by_shape,
    eigenbasis,
    matmul,
    refine_eigenbasis,
)
from mup_jax.transforms.matrices import MatrixGroups, WeightDimensionNumbers
from mup_jax.transforms.statistics import (
    Factors,
    Pair,
    ema,
    init_factors,
    is_alive,
    is_healthy,
    multiply_sides,
    update_factors,
)


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`; one entry per matrix shape."""

    count: jax.Array  # type: ignore[assignment]  # int32: steps so far
    mu: dict[str, jax.Array]
    nu: dict[str, list[jax.Array]]  # second moment of each piece, in the basis
    statistics: Factors
    bases: Factors
    nonfinite: jax.Array  # int32: matrices of gradients skipped so far


def _move(find_basis: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A refresh of bases that takes the second moments V along.

    V <- (S_in∘S_in)ᵀ V (S_out∘S_out) with S = Q_oldᵀ Q_new: exact for a gradient whose rotated
    entries are uncorrelated. A permutation of the basis carries V along with its directions, so
    eigenvalues may swap order.
    """

    def fresh(bases_and_nu: tuple[Factors, Any], statistics: Factors) -> tuple[Factors, Any]:
        old, nu = bases_and_nu
        new = batch_by_shape(find_basis, statistics, old)
        squared_rotation = jax.tree.map(lambda q, q_new: jnp.square(matmul(q.mT, q_new)), old, new)
        moved = {
            key: [multiply_sides(pair, v) for pair, v in zip(pairs, nu[key], strict=True)]
            for key, pairs in squared_rotation.items()
        }
        return new, moved

    return fresh


def _rotate(basis: Pair, block: jax.Array, first: jax.Array) -> jax.Array:
    """Qᵀ X Q for a gradient or momentum X.

    At a block's first gradient both bases come from it alone, and make it diagonal. What rounding
    leaves beside the diagonal would be divided by its own size and come out as ±1.
    """
    rotated = multiply_sides(basis, block)
    if any(q is None for q in basis):
        return rotated
    return jnp.where(first, rotated * jnp.eye(rotated.shape[-2], rotated.shape[-1]), rotated)


def scale_by_soap(
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
    *,
    block_size: int | None = 512,
    max_preconditioner_dim: int = 10_000,
    precondition_frequency: int = 10,
    exact_steps: int = 1,
    stagger: bool = True,
    sides: Sides = "both",
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs Adam in the eigenbasis of Shampoo's statistics (SOAP).

    .. math::
      G' = Q_L^\top G Q_R, \quad V \leftarrow \beta_2 V + (1 - \beta_2) G'^2, \quad
      u = Q_L \frac{Q_L^\top M Q_R}{\sqrt V + \epsilon} Q_R^\top
          \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}

    for each block G of a `(d_in, d_out)` gradient, where Q_L, Q_R are eigenvectors of the averages
    of G Gᵀ and Gᵀ G. The momentum M stays in the original basis. When a basis moves, V moves along
    by the squared rotation between the two. A matrix whose gradient is not finite keeps its
    momentum, its second moment and its statistics.

    Args:
      b1: decay of the momentum.
      b2: decay of the second moment and of the statistics.
      eps: added to √V, in units of the gradient.
      block_size: largest block side; None for whole matrices. Edge blocks are smaller.
      max_preconditioner_dim: a longer side of a matrix is not rotated and not cut.
      precondition_frequency: steps between two refreshes of a block's basis, each one step of
        orthogonal iteration (a QR factorization).
      exact_steps: during the first steps, at least one, all bases are eigendecompositions, at every
        step (the first paper's code takes 50); also when a block gets its first gradient that is
        not zero.
      stagger: as in `scale_by_shampoo`.
      sides: "both", or "in" or "out" to rotate one side only.
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: an option is out of range, or a leaf is not a matrix or has no side to rotate.

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; Qiu et al.,
      `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """
    blocking = Blocking(block_size, max_preconditioner_dim, sides)
    if exact_steps < 1:
        raise ValueError(f"exact_steps={exact_steps}: the first basis needs at least one step")

    def init(params: optax.Params) -> ScaleBySoapState:
        groups = MatrixGroups(params, weight_dimension_numbers).stack(params)
        zeros = jax.tree.map(jnp.zeros_like, groups)

        return ScaleBySoapState(
            count=jnp.zeros((), jnp.int32),
            mu=zeros,
            nu={key: blocking.split(x) for key, x in zeros.items()},
            statistics=init_factors(groups, blocking, diagonal=0.0),
            bases=init_factors(groups, blocking, diagonal=1.0),
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: ScaleBySoapState, params: Any = None
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        del params
        groups = MatrixGroups(updates, weight_dimension_numbers)
        gradients = groups.stack(updates)
        count = state.count + 1

        mu, healthy, statistics = {}, {}, {}
        # Blocks without a second moment; the first gradient that counts may come late.
        is_new = {key: [jnp.all(v == 0, axis=(-2, -1)) for v in vs] for key, vs in state.nu.items()}
        skipped = state.nonfinite
        overdue = jnp.zeros((), bool)
        for key, gradient in gradients.items():
            healthy[key] = is_healthy(gradient)
            skipped = skipped + jnp.sum(~healthy[key], dtype=jnp.int32)
            mu[key] = ema(state.mu[key], gradient, b1, healthy[key])
            statistics[key] = [
                update_factors(pair, block, b2, healthy[key][..., None, None])
                for pair, block in zip(state.statistics[key], blocking.split(gradient), strict=True)
            ]
            for pair, new in zip(statistics[key], is_new[key], strict=True):
                overdue |= jnp.any(is_alive(pair) & new)
        bases, carried = refresh(
            state.count,
            precondition_frequency,
            _move(refine_eigenbasis),
            (state.bases, state.nu),
            statistics,
            stagger=stagger,
            overdue=overdue,
            first=_move(lambda statistics, _: eigenbasis(statistics)),
            first_steps=exact_steps,
        )
        nu: dict[str, list[jax.Array]] = {}
        directions = {}
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        for key, gradient in gradients.items():
            nu[key], pieces = [], []
            for basis, old_nu, new, block, momentum in zip(
                bases[key],
                carried[key],
                is_new[key],
                blocking.split(gradient),
                blocking.split(mu[key]),
                strict=True,
            ):
                rotate = partial(_rotate, basis, first=new[..., None, None])
                v = ema(old_nu, jnp.square(rotate(block)), b2, healthy[key][..., None, None])
                size = jnp.sqrt(v)
                # Directions without a gradient have v of rounding noise, or exactly zero.
                noise = ROUNDING * jnp.max(size, axis=(-2, -1), keepdims=True)
                adam = rotate(momentum) / jnp.maximum(size + eps, jnp.maximum(noise, FLOOR))
                back = jax.tree.map(lambda q: q.mT, basis)
                nu[key].append(v)
                pieces.append(multiply_sides(back, adam) * correction)
            directions[key] = blocking.merge(pieces, *gradient.shape[-2:])
        return groups.unstack(directions), ScaleBySoapState(
            count, mu, nu, statistics, bases, skipped
        )

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
