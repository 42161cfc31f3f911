"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.blocking import Blocking, Sides
from mup_jax.transforms.groups import Groups, MatrixGroups, State
from mup_jax.transforms.linalg import (
    FLOOR,
    ROUNDING,
    batch_by_shape,
    eigenbasis,
    identity,
    matmul,
    refine_eigenbasis,
)
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import (
    check_decays,
    check_not_negative,
    check_static,
    check_steps,
)
from mup_jax.transforms.refresh import Turns, refresh
from mup_jax.transforms.statistics import (
    Factors,
    Pair,
    abstract_factors,
    bias_correction,
    ema,
    is_alive,
    multiply_sides,
    unpack,
    update_factors,
)


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`; one entry per matrix shape."""

    count: jax.Array  # type: ignore[assignment]  # int32: steps so far
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]  # second moment, in the bases of the blocks
    statistics: Factors
    bases: Factors
    nonfinite: jax.Array  # int32: matrices of gradients skipped so far


# The bases of a block and the second moment in them.
Based = tuple[Pair, jax.Array]


def _squared_rotation(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.square(matmul(old.mT.astype(jnp.float32), new.astype(jnp.float32)))


def _move(find_basis: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A refresh of bases that takes the second moments V along.

    V <- (S_in∘S_in)ᵀ V (S_out∘S_out) with S = Q_oldᵀ Q_new: exact for a gradient whose rotated
    entries are uncorrelated. A permutation of the basis carries V along with its directions, so
    eigenvalues may swap order.
    """

    def fresh(current: dict[str, list[Based]], statistics: Factors) -> dict[str, list[Based]]:
        old = {key: [bases for bases, _ in pieces] for key, pieces in current.items()}

        def basis(statistic: jax.Array, previous: jax.Array) -> jax.Array:
            new = find_basis(unpack(statistic), previous.astype(jnp.float32))
            return new.astype(previous.dtype)

        new = batch_by_shape(basis, statistics, old)
        squared_rotation = jax.tree.map(_squared_rotation, old, new)
        return {
            key: [
                (new[key][i], multiply_sides(squared_rotation[key][i], nu))
                for i, (_, nu) in enumerate(pieces)
            ]
            for key, pieces in current.items()
        }

    return fresh


def _rotate(basis: Pair, block: jax.Array, first: jax.Array) -> jax.Array:
    """Qᵀ X Q for a gradient or momentum X.

    At a block's first gradient both bases come from it alone, and make it diagonal. What rounding
    leaves beside the diagonal would be divided by its own size and come out as ±1.
    """
    rotated = multiply_sides(basis, block)
    if any(q is None for q in basis):
        return rotated
    return jnp.where(first, rotated * identity(rotated.ndim, *rotated.shape[-2:]), rotated)


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

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; Qiu et al.,
      `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """
    check_static(
        precondition_frequency=precondition_frequency,
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        preconditioner_dtype=preconditioner_dtype,
        exact_steps=exact_steps,
    )
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps)
    check_steps(precondition_frequency=precondition_frequency, exact_steps=exact_steps)
    blocking = Blocking(block_size, max_preconditioner_dim, sides)

    def init(params: optax.Params) -> ScaleBySoapState:
        groups = MatrixGroups(params, weight_dimension_numbers, blocking)
        factors = partial(abstract_factors, groups.divisions, blocking)
        fields: State = {
            "mu": groups.matrices,
            "nu": groups.matrices,
            "statistics": factors(packed=True),
            "bases": factors(packed=False, dtype=preconditioner_dtype),
        }
        return ScaleBySoapState(
            count=jnp.zeros((), jnp.int32),
            **groups.zeros(fields),
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: ScaleBySoapState, params: Any = None
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        groups = MatrixGroups(updates, weight_dimension_numbers, blocking)

        def step(
            gradients: Groups, healthy: Groups, state: State, steps_before: jax.Array
        ) -> tuple[Groups, State]:
            mu: Groups = {}
            statistics: Factors = {}
            based: dict[str, list[Based]] = {}
            turns: Groups = {}
            is_new: Groups = {}
            overdue: Groups = {}
            for key, gradient in gradients.items():
                division = groups.divisions[key]
                mu[key] = ema(state["mu"][key], gradient, b1, healthy[key])
                blocks = blocking.split(gradient, division.cut)
                statistics[key] = [
                    update_factors(pair, block, b2, healthy[key][..., None, None], division)
                    for pair, block in zip(state["statistics"][key], blocks, strict=True)
                ]
                nus = blocking.split(state["nu"][key], division.cut)
                based[key] = list(zip(state["bases"][key], nus, strict=True))
                turns[key] = [Turns.of(block.shape[:3], division) for block in blocks]
                # Blocks without a second moment; the first gradient that counts may come late.
                largest = [division.over_uncut(jax.lax.pmax, jnp.max(v, (-2, -1))) for v in nus]
                is_new[key] = [v == 0 for v in largest]
                overdue[key] = [
                    is_alive(statistic) & new
                    for statistic, new in zip(statistics[key], is_new[key], strict=True)
                ]
            based = refresh(
                steps_before,
                precondition_frequency,
                _move(refine_eigenbasis),
                based,
                statistics,
                turns=turns,
                overdue=overdue,
                stagger=stagger,
                first=_move(lambda statistics, _: eigenbasis(statistics)),
                first_steps=exact_steps,
            )
            count = steps_before + 1
            correction = jnp.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)
            nu: Groups = {}
            directions: Groups = {}
            for key, gradient in gradients.items():
                division = groups.divisions[key]
                nus, pieces = [], []
                for (basis, old_nu), new, block, momentum in zip(
                    based[key],
                    is_new[key],
                    blocking.split(gradient, division.cut),
                    blocking.split(mu[key], division.cut),
                    strict=True,
                ):
                    rotate = partial(_rotate, basis, first=new[..., None, None])
                    v = ema(old_nu, jnp.square(rotate(block)), b2, healthy[key][..., None, None])
                    size = jnp.sqrt(v)
                    # Directions without a gradient have v of rounding noise, or exactly zero.
                    peak = jnp.max(size, axis=(-2, -1), keepdims=True)
                    noise = ROUNDING * division.over_uncut(jax.lax.pmax, peak)
                    adam = rotate(momentum) / jnp.maximum(size + eps, jnp.maximum(noise, FLOOR))
                    back = jax.tree.map(lambda q: q.mT, basis)
                    nus.append(v)
                    pieces.append(multiply_sides(back, adam))
                nu[key] = blocking.merge(nus, gradient.shape, division.cut)
                merged = blocking.merge(pieces, gradient.shape, division.cut)
                directions[key] = merged * correction
            bases = {key: [basis for basis, _ in pieces] for key, pieces in based.items()}
            return directions, {"mu": mu, "nu": nu, "statistics": statistics, "bases": bases}

        directions, new, skipped = groups.run(
            step,
            updates,
            {
                "mu": state.mu,
                "nu": state.nu,
                "statistics": state.statistics,
                "bases": state.bases,
            },
            state.count,
            params=params,
        )
        return directions, ScaleBySoapState(
            count=state.count + 1, **new, nonfinite=state.nonfinite + skipped
        )

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
