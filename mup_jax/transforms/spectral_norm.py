"""Explicit normalization: any direction, scaled to the norm that feature learning asks for.

The spectral norm is estimated by power iteration on the leaves as they are, in products of whole
arrays that are summed over axes, as all norms here are.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.matrices import (
    MatrixLayout,
    WeightDimensionNumbers,
    matrix_layouts,
)
from mup_jax.transforms.norms import frobenius_norm, in_range, norm, unit
from mup_jax.transforms.options import check_static


class NormalizeSpectralNormState(NamedTuple):
    """State of `normalize_spectral_norm`."""

    count: jax.Array  # type: ignore[assignment]  # int32: steps so far
    vectors: Any  # float32: a unit vector of fan-in length per matrix; fan-out axes have length 1
    nonfinite: jax.Array  # int32: matrices of updates zeroed so far


class NormalizeRmsState(NamedTuple):
    """State of `normalize_rms`."""

    nonfinite: jax.Array  # int32: matrices of updates zeroed so far


def normalize_spectral_norm(
    *,
    iterations: int = 1,
    first_iterations: int = 5,
    first_steps: int = 50,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each matrix of updates the spectral norm √(d_out/d_in).

    .. math::
      y = u v, \quad \sigma = \|y\|, \quad v \leftarrow u^T y / \|u^T y\|, \quad
      u \leftarrow u \sqrt{d_{out} / d_{in}} / \sigma

    where u stands for (d_out, d_in) as in papers, d_in and d_out are absolute, and v is kept from
    step to step (where uᵀy = 0, as it was). Place it after any direction; no learning rate then
    changes with the width. As no spectral norm is smaller, σ is at least ‖u‖_F/√min(d_in, d_out):
    a sudden turn of the update cannot blow it up. A zero matrix stays zero; one that is not finite
    becomes zero and leaves its v alone.

    Args:
      iterations: power iterations at each step.
      first_iterations: those at each of the first `first_steps` steps.
      first_steps: see first_iterations.
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of updates into updates of the same shapes and dtypes.

    Raises:
      ValueError: iterations < 1; at `init` or `update`, a leaf is not a matrix.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = optax.chain(mup_jax.scale_by_soap(), mup_jax.normalize_spectral_norm())
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Qiu et al., `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """
    check_static(iterations=iterations, first_iterations=first_iterations, first_steps=first_steps)
    if min(iterations, first_iterations) < 1:
        raise ValueError(
            f"iterations={iterations}, first_iterations={first_iterations}: give at least one"
        )

    def initial_vector(layout: MatrixLayout, leaf: jax.Array) -> jax.Array:
        # Random, as no update is orthogonal to it by construction; from the leaf its sharding.
        zero = jnp.sum(jnp.zeros_like(leaf, jnp.float32), layout.out_axes, keepdims=True)
        # One vector for all matrices of a stack: a stack is its matrices one by one.
        shape = [d if a in layout.in_axes else 1 for a, d in enumerate(zero.shape)]
        v = zero + jax.random.normal(jax.random.key(0), shape, jnp.float32)
        return v / norm(v, layout.in_axes)

    def init(params: optax.Params) -> NormalizeSpectralNormState:
        leaves, treedef = jax.tree.flatten(params)
        layouts = matrix_layouts(params, weight_dimension_numbers)
        vectors = [initial_vector(*pair) for pair in zip(layouts, leaves, strict=True)]
        return NormalizeSpectralNormState(
            count=jnp.zeros((), jnp.int32),
            vectors=jax.tree.unflatten(treedef, vectors),
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def normalize(
        layout: MatrixLayout, u: jax.Array, v: jax.Array, n: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The normalized u, the new v, and how many matrices are not finite."""
        x, nonfinite = in_range(layout, u)

        def iterate(v: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jnp.sum(x * v, layout.in_axes, keepdims=True)
            back = jnp.sum(x * y, layout.out_axes, keepdims=True)
            length = norm(back, layout.in_axes)
            return jnp.where(length > 0, back / length, v), norm(y, layout.out_axes)

        v, sigma = jax.lax.fori_loop(1, n, lambda _, carry: iterate(carry[0]), iterate(v))
        least = frobenius_norm(layout, x) / math.sqrt(min(layout.d_in, layout.d_out))
        sigma = jnp.maximum(sigma, least)
        target = math.sqrt(layout.d_out / layout.d_in)
        normalized = jnp.where(sigma > 0, x * (target / sigma), 0.0)
        return normalized.astype(u.dtype), v, nonfinite

    def update(
        updates: optax.Updates, state: NormalizeSpectralNormState, params: Any = None
    ) -> tuple[optax.Updates, NormalizeSpectralNormState]:
        del params
        n = jnp.where(state.count < first_steps, first_iterations, iterations)
        leaves, treedef = jax.tree.flatten(updates)
        normalized, vectors, skipped = [], [], state.nonfinite
        for layout, u, v in zip(
            matrix_layouts(updates, weight_dimension_numbers),
            leaves,
            jax.tree.leaves(state.vectors),
            strict=True,
        ):
            u, v, nonfinite = normalize(layout, u, v, n)
            normalized.append(u)
            vectors.append(v)
            skipped = skipped + nonfinite
        new = NormalizeSpectralNormState(
            optax.safe_increment(state.count), jax.tree.unflatten(treedef, vectors), skipped
        )
        return jax.tree.unflatten(treedef, normalized), new

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def normalize_rms(
    *, weight_dimension_numbers: WeightDimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    """Gives each matrix of updates entries of root mean square 1.

    What `normalize_spectral_norm` is to other matrices, this is to embeddings, whose inputs select
    a row. A zero matrix stays zero; one that is not finite becomes zero.

    Args:
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of updates into updates of the same shapes and dtypes.

    Raises:
      ValueError: at `update`, a leaf is not a matrix.

    Example:
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.normalize_rms()
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Qiu et al., `Hyperparameter transfer <https://arxiv.org/abs/2512.05620>`_, 2025.
    """

    def init(params: optax.Params) -> NormalizeRmsState:
        del params
        return NormalizeRmsState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: NormalizeRmsState, params: Any = None
    ) -> tuple[optax.Updates, NormalizeRmsState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        normalized, skipped = [], state.nonfinite
        layouts = matrix_layouts(updates, weight_dimension_numbers)
        for layout, u in zip(layouts, leaves, strict=True):
            x, nonfinite = unit(layout, u)
            size = math.sqrt(layout.d_in * layout.d_out)
            normalized.append((size * x).astype(u.dtype))
            skipped = skipped + nonfinite
        return jax.tree.unflatten(treedef, normalized), NormalizeRmsState(skipped)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
