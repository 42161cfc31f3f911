"""Grafting: the step size of one transformation with the direction of another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.matrices import (
    WeightDimensionNumbers,
    check_array,
    dimension_numbers,
    leaf_name,
    matrix_layout,
)
from mup_jax.transforms.options import check_not_negative


class GraftState(NamedTuple):
    """State of `graft`: those of its two transformations."""

    magnitude: Any
    direction: Any


def _squared_norm(numbers: Any, x: jax.Array) -> jax.Array:
    """Σ x² of each matrix, in float32, with its axes kept."""
    axes = None
    if x.ndim > 1:
        layout = matrix_layout(x.shape, numbers)
        axes = layout.in_axes + layout.out_axes
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True)


def _zero_unless_finite(numbers: Any, gradient: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(_squared_norm(numbers, gradient)), gradient, 0)


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
    see the same gradients, but for a matrix whose gradient is not finite, which is zero to Q1: most
    transformations would keep it in their state for ever. A zero direction gives zero.

    Args:
      magnitude: Q1.
      direction: Q2.
      eps: in units of Q2's update.
      weight_dimension_numbers: as in `scale_by_muon`; scalars and vectors count as one matrix.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: a leaf of more than two axes without dimension numbers.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.graft(optax.scale_by_adam(), mup_jax.scale_by_shampoo())
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Agarwal et al., `Disentangling adaptive gradient methods <https://arxiv.org/abs/2002.11803>`_,
      2020.
    """
    check_not_negative(eps=eps)
    magnitude = optax.with_extra_args_support(magnitude)
    direction = optax.with_extra_args_support(direction)

    def init(params: optax.Params) -> GraftState:
        return GraftState(magnitude.init(params), direction.init(params))

    def update(
        updates: optax.Updates, state: GraftState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GraftState]:
        for path, leaf in jax.tree.leaves_with_path(updates):
            check_array(leaf_name(path), leaf)
        numbers = dimension_numbers(weight_dimension_numbers, updates)
        leaves, treedef = jax.tree.flatten(updates)
        finite = jax.tree.unflatten(treedef, map(_zero_unless_finite, numbers, leaves))
        sizes, magnitude_state = magnitude.update(finite, state.magnitude, params, **extra_args)
        directions, direction_state = direction.update(
            updates, state.direction, params, **extra_args
        )

        def rescale(numbers: Any, size: jax.Array, along: jax.Array) -> jax.Array:
            wanted, length = (jnp.sqrt(_squared_norm(numbers, x)) for x in (size, along))
            ratio = jnp.where(length > 0, wanted / (length + eps), 0.0)
            return (along.astype(jnp.float32) * ratio).astype(along.dtype)

        grafted = map(rescale, numbers, jax.tree.leaves(sizes), jax.tree.leaves(directions))
        return jax.tree.unflatten(treedef, grafted), GraftState(magnitude_state, direction_state)

    return optax.GradientTransformationExtraArgs(init, update)
