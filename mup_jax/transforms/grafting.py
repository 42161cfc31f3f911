"""Grafting: the step size of one transformation with the direction of another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.matrices import (
    WeightDimensionNumbers,
    is_dimension_numbers,
    map_static,
    matrix_layout,
    resolve_dimension_numbers,
)


class GraftState(NamedTuple):
    """State of `graft`: those of its two transformations."""

    magnitude: Any
    direction: Any


def graft(
    magnitude: optax.GradientTransformation,
    direction: optax.GradientTransformation,
    *,
    eps: float = 0.0,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the update of `direction` the Frobenius norm of that of `magnitude`, per matrix.

    .. math::
      u = Q_2(G) \frac{\|Q_1(G)\|_F}{\|Q_2(G)\|_F + \epsilon}

    written Q1#Q2, with norms over whole matrices also where a transformation works on blocks. Both
    see the same gradients. A zero direction gives zero.

    Args:
      magnitude: Q1.
      direction: Q2.
      eps: in units of Q2's update.
      weight_dimension_numbers: as in `scale_by_muon`; scalars and vectors count as one matrix.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: a leaf of more than two axes without dimension numbers.

    References:
      Agarwal et al., `Disentangling adaptive gradient methods <https://arxiv.org/abs/2002.11803>`_,
      2020.
    """
    magnitude = optax.with_extra_args_support(magnitude)
    direction = optax.with_extra_args_support(direction)

    def init(params: optax.Params) -> GraftState:
        return GraftState(magnitude.init(params), direction.init(params))

    def update(
        updates: optax.Updates, state: GraftState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GraftState]:
        sizes, magnitude_state = magnitude.update(updates, state.magnitude, params, **extra_args)
        directions, direction_state = direction.update(
            updates, state.direction, params, **extra_args
        )

        def rescale(numbers: Any, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            size, along = (x.astype(jnp.float32) for x in pair)
            axes = None
            if size.ndim > 1:
                layout = matrix_layout(size.shape, numbers)
                axes = layout.in_axes + layout.out_axes
            norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
            length = norm(along)
            ratio = jnp.where(length > 0, norm(size) / (length + eps), 0.0)
            return (along * ratio).astype(pair[1].dtype)

        grafted = map_static(
            rescale,
            resolve_dimension_numbers(weight_dimension_numbers, updates),
            jax.tree.map(lambda size, along: (size, along), sizes, directions),
            is_leaf=is_dimension_numbers,
        )
        return grafted, GraftState(magnitude_state, direction_state)

    return optax.GradientTransformationExtraArgs(init, update)
