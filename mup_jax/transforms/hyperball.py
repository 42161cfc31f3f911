"""Hyperball: matrices of constant norm, and updates in proportion to it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.matrices import MatrixLayout, WeightDimensionNumbers, matrix_layouts
from mup_jax.transforms.norms import frobenius_norm, unit


class HyperballState(NamedTuple):
    """State of `hyperball`."""

    radius: Any  # float32: R of each matrix; fan-in and fan-out axes have length 1
    inner: Any
    scale: Any
    nonfinite: jax.Array  # int32: matrices of updates of `inner` zeroed so far


def hyperball(
    inner: optax.GradientTransformation,
    scale: optax.GradientTransformation,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Holds the Frobenius norm of each matrix, and of its update, by a wrapper of any direction.

    .. math::
      W \leftarrow R \, \frac{W - \eta s(t) R \, u / \|u\|_F}{\|W - \eta s(t) R \, u / \|u\|_F\|_F},
      \quad R = \|W_0\|_F

    with the update u of `inner`. Nothing decays, as there is nothing to keep small. The learning
    rate η is relative to the matrix: about the angle, in radians, by which a step turns it. It
    stands between two normalizations, of the update before it and of the matrix after it, so that
    it is an argument here and not a link of the chain around: MuonH and AdamH are

        muon_h = mup_jax.hyperball(mup_jax.scale_by_muon(), optax.scale_by_learning_rate(0.01))
        adam_h = mup_jax.hyperball(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))

    and what is returned is the whole step, for `optax.apply_updates`. Vectors and embeddings are
    for another optimizer, by `optax.partition`:

        optimizer = optax.partition({"matrix": muon_h, "other": optax.adam(1e-3)}, labels)

    A rule of the learning rate belongs to `scale` too, as u loses its size; see
    `mup_jax.rules.hyperball`.

        by_rule = mup_jax.mup(optax.identity(), mup_jax.rules.hyperball(), shapes)
        scale = optax.chain(by_rule, optax.scale_by_learning_rate(0.01))

    A matrix of zeros has no norm to hold. Its R is √d_out, which is the norm of one with entries
    N(0, 1/d_in), and its norm grows to this by its updates, each of which is at most ηR. (Its norm
    at once would be W = -R u/‖u‖_F after the first update, at any η.) Where u or the step is zero
    or not finite, W stays as it is.

    Args:
      inner: a direction without learning rate, such as `scale_by_muon` or a chain of several.
      scale: from R u/‖u‖_F to the step that is added to W, sign included: the learning rate, its
        schedule, factors of parameters.
      weight_dimension_numbers: as in `scale_by_muon`; the matrices of a stack have norms of their
        own.

    Returns:
      A transformation of gradients into steps of the shapes and dtypes of the parameters, which its
      `update` needs.

    Raises:
      ValueError: `scale` is no transformation; at `init` or `update`, a leaf is not a matrix; at
        `update`, no parameters.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> muon_h = mup_jax.hyperball(mup_jax.scale_by_muon(), optax.scale_by_learning_rate(0.01))
      >>> updates, state = muon_h.update(params, muon_h.init(params), params)

    References:
      Wen et al., `Hyperball optimization <https://arxiv.org/abs/2606.16899>`_, 2026.
    """
    if not hasattr(scale, "update"):
        raise ValueError(f"scale={scale!r}: give optax.scale_by_learning_rate of it")
    inner = optax.with_extra_args_support(inner)
    scale = optax.with_extra_args_support(scale)

    def init(params: optax.Params) -> HyperballState:
        leaves, treedef = jax.tree.flatten(params)
        layouts = matrix_layouts(params, weight_dimension_numbers)
        radius = [_radius(*pair) for pair in zip(layouts, leaves, strict=True)]
        return HyperballState(
            jax.tree.unflatten(treedef, radius),
            inner.init(params),
            scale.init(params),
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: HyperballState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, HyperballState]:
        if params is None:
            raise ValueError("hyperball needs the parameters: update(updates, state, params)")
        layouts = matrix_layouts(updates, weight_dimension_numbers)
        directions, inner_state = inner.update(updates, state.inner, params, **extra_args)

        leaves, treedef = jax.tree.flatten(directions)
        radii = jax.tree.leaves(state.radius)
        units = [unit(*pair) for pair in zip(layouts, leaves, strict=True)]
        on_sphere = [radius * u for radius, (u, _) in zip(radii, units, strict=True)]
        nonfinite = sum((n for _, n in units), start=state.nonfinite)
        steps, scale_state = scale.update(
            jax.tree.unflatten(treedef, on_sphere), state.scale, params, **extra_args
        )
        moves = map(_move, layouts, radii, jax.tree.leaves(params), jax.tree.leaves(steps))
        new = HyperballState(state.radius, inner_state, scale_state, nonfinite)
        return jax.tree.unflatten(treedef, moves), new

    return optax.GradientTransformationExtraArgs(init, update)


def _radius(layout: MatrixLayout, w: jax.Array) -> jax.Array:
    norm = frobenius_norm(layout, w)
    return jnp.where(norm > 0, norm, math.sqrt(layout.d_out))


def _move(layout: MatrixLayout, radius: jax.Array, w: jax.Array, step: jax.Array) -> jax.Array:
    """From w to the point of its sphere that w + step is above; zero where there is none."""
    axes = layout.in_axes + layout.out_axes
    at, step = w.astype(jnp.float32), step.astype(jnp.float32)
    length = frobenius_norm(layout, at + step)
    moved = jnp.isfinite(length) & (length > 0) & jnp.any(step != 0, axis=axes, keepdims=True)
    # What began at zero grows until it has its radius, but for rounding, and never shrinks.
    norm = frobenius_norm(layout, at)
    held = jnp.where(norm < 0.99 * radius, jnp.clip(length, norm, radius), radius)
    ratio = jnp.where(moved, held / length, 1.0)
    # Not the difference of two matrices, in which a small step would drown.
    return jnp.where(moved, (ratio - 1) * at + ratio * step, 0.0).astype(w.dtype)
