"""Shampoo: a Kronecker-factored preconditioner for each block of each matrix."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.blocking import Blocking, Sides
from mup_jax.transforms.groups import Groups, MatrixGroups, State
from mup_jax.transforms.linalg import batch_by_shape, inverse_root
from mup_jax.transforms.matrices import WeightDimensionNumbers
from mup_jax.transforms.options import (
    check_decays,
    check_not_negative,
    check_positive,
    check_static,
    check_steps,
)
from mup_jax.transforms.refresh import Turns, refresh
from mup_jax.transforms.statistics import (
    Factors,
    abstract_factors,
    bias_correction,
    ema,
    is_alive,
    multiply_sides,
    pack,
    unpack,
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

    References:
      Gupta et al., `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018; blocks as in Anil et al.,
      `Scalable second order optimization <https://arxiv.org/abs/2002.09018>`_, 2020; Qiu et al.,
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
    check_positive(exponent=exponent)
    blocking = Blocking(block_size, max_preconditioner_dim, sides)

    def init(params: optax.Params) -> ScaleByShampooState:
        groups = MatrixGroups(params, weight_dimension_numbers, blocking)
        factors = partial(abstract_factors, groups.divisions, blocking, packed=True)
        return ScaleByShampooState(
            count=jnp.zeros((), jnp.int32),
            **groups.zeros(
                {
                    "mu": groups.matrices,
                    "statistics": factors(),
                    "roots": factors(dtype=preconditioner_dtype),
                }
            ),
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: ScaleByShampooState, params: Any = None
    ) -> tuple[optax.Updates, ScaleByShampooState]:
        groups = MatrixGroups(updates, weight_dimension_numbers, blocking)

        def step(
            gradients: Groups, healthy: Groups, state: State, steps_before: jax.Array
        ) -> tuple[Groups, State]:
            count = steps_before + 1
            correction = bias_correction(b2, count)
            mu: Groups = {}
            statistics: Factors = {}
            turns: Groups = {}
            overdue: Groups = {}
            for key, gradient in gradients.items():
                division = groups.divisions[key]
                mu[key] = ema(state["mu"][key], gradient, b1, healthy[key])
                blocks = blocking.split(gradient, division.cut)
                statistics[key] = [
                    update_factors(pair, block, b2, healthy[key][..., None, None], division)
                    for pair, block in zip(state["statistics"][key], blocks, strict=True)
                ]
                turns[key] = [Turns.of(block.shape[:3], division) for block in blocks]
                # The first gradient that is neither zero nor bad may come late.
                overdue[key] = [
                    is_alive(statistic) & ~is_alive(root)
                    for root, statistic in zip(state["roots"][key], statistics[key], strict=True)
                ]

            def fresh_roots(roots: Factors, statistics: Factors) -> Factors:
                def root(statistic: jax.Array, previous: jax.Array) -> jax.Array:
                    new = inverse_root(
                        unpack(statistic) / correction,
                        unpack(previous).astype(jnp.float32),
                        exponent,
                        eps=eps,
                        relative_eps=relative_eps,
                    )
                    return pack(new).astype(previous.dtype)

                return batch_by_shape(root, statistics, roots)

            roots = refresh(
                steps_before,
                precondition_frequency,
                fresh_roots,
                state["roots"],
                statistics,
                turns=turns,
                overdue=overdue,
                stagger=stagger,
                first_steps=exact_steps,
            )
            directions = {}
            for key, momentum in mu.items():
                cut = groups.divisions[key].cut
                pieces = [
                    multiply_sides(jax.tree.map(unpack, pair), block)
                    for pair, block in zip(roots[key], blocking.split(momentum, cut), strict=True)
                ]
                merged = blocking.merge(pieces, momentum.shape, cut)
                directions[key] = merged / bias_correction(b1, count)
            return directions, {"mu": mu, "statistics": statistics, "roots": roots}

        directions, new, skipped = groups.run(
            step,
            updates,
            {"mu": state.mu, "statistics": state.statistics, "roots": state.roots},
            state.count,
            params=params,
        )
        return directions, ScaleByShampooState(
            count=state.count + 1, **new, nonfinite=state.nonfinite + skipped
        )

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
