"""Arrays of any rank as stacks of matrices."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

PyTree: TypeAlias = Any
WeightDimensionNumbers: TypeAlias = (
    MuonDimensionNumbers | PyTree | Callable[[PyTree], PyTree] | None
)

_PARTITION_HINT = (
    "give other leaves to another transformation, for example optax.partition("
    "{'matrix': tx, 'other': optax.scale_by_adam()}, "
    "lambda params: jax.tree.map(lambda p: 'matrix' if p.ndim == 2 else 'other', params))"
)


def map_static(function: Callable, static: PyTree, tree: PyTree, is_leaf: Callable) -> PyTree:
    """Maps over `tree` beside a tree of static values of the same structure.

    Subtrees that a mask removed (`optax.MaskedNode`, or None) are passed through.
    """

    def at_leaf(value: Any, leaf: Any) -> Any:
        masked = leaf is None or isinstance(leaf, optax.MaskedNode)
        return leaf if masked else function(value, leaf)

    return jax.tree.map(at_leaf, static, tree, is_leaf=is_leaf)


def is_dimension_numbers(value: Any) -> bool:
    return value is None or isinstance(value, MuonDimensionNumbers)


def resolve_dimension_numbers(numbers: WeightDimensionNumbers, tree: PyTree) -> PyTree:
    """A tree like `tree` with a MuonDimensionNumbers, or None for the default, at each leaf."""
    if callable(numbers):
        numbers = numbers(tree)
    if is_dimension_numbers(numbers):
        return jax.tree.map(lambda _: numbers, tree)
    return map_static(lambda n, _: n, numbers, tree, is_leaf=is_dimension_numbers)


@dataclass(frozen=True)
class MatrixLayout:
    """How one array of shape `shape` is a stack `(*stack_shape, d_in, d_out)` of matrices."""

    shape: tuple[int, ...]
    stack_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in axes)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        return self._sizes(self.stack_axes)

    @property
    def d_in(self) -> int:
        return math.prod(self._sizes(self.in_axes))

    @property
    def d_out(self) -> int:
        return math.prod(self._sizes(self.out_axes))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        return (*self.stack_shape, self.d_in, self.d_out)

    @property
    def _permutation(self) -> tuple[int, ...]:
        return self.stack_axes + self.in_axes + self.out_axes

    @property
    def group_shape(self) -> tuple[int, int, int]:
        """`(n, d_in, d_out)` with all stack axes in one."""
        return math.prod(self.stack_shape), self.d_in, self.d_out

    def to_matrices(self, x: jax.Array) -> jax.Array:
        """`shape` -> `(n, d_in, d_out)`."""
        return jnp.transpose(x, self._permutation).reshape(self.group_shape)

    def from_matrices(self, x: jax.Array) -> jax.Array:
        """`(n, d_in, d_out)` -> `shape`."""
        permutation = self._permutation
        x = x.reshape(self._sizes(permutation))
        return jnp.transpose(x, sorted(range(len(permutation)), key=permutation.__getitem__))


def matrix_layout(
    shape: tuple[int, ...], numbers: MuonDimensionNumbers | None, name: str = "a leaf"
) -> MatrixLayout:
    """The layout of an array; `numbers` None means a plain `(d_in, d_out)` matrix.

    Raises:
      ValueError: the array is not a matrix, or `numbers` does not fit it.
    """
    rank = len(shape)
    if rank < 2 or math.prod(shape) == 0:
        raise ValueError(f"{name} of shape {shape} is not a matrix: {_PARTITION_HINT}")
    if numbers is None:
        if rank > 2:
            raise ValueError(
                f"{name} of shape {shape} is not a matrix: say which axes are fan-in and fan-out, "
                "for example weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(-2, -1) "
                f"for layers stacked as (layers, d_in, d_out), or {_PARTITION_HINT}"
            )
        numbers = MuonDimensionNumbers()

    def normalize(axes: Any) -> tuple[int, ...]:
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if not axes or any(not -rank <= a < rank for a in axes):
            raise ValueError(f"{numbers} does not fit {name} of shape {shape}: axes out of range")
        return tuple(a % rank for a in axes)

    in_axes, out_axes = normalize(numbers.reduction_axis), normalize(numbers.output_axis)
    if len({*in_axes, *out_axes}) != len(in_axes) + len(out_axes):
        raise ValueError(f"{numbers} names an axis of {name} of shape {shape} twice")
    stack_axes = tuple(a for a in range(rank) if a not in in_axes + out_axes)
    return MatrixLayout(shape, stack_axes, in_axes, out_axes)


def matrix_layouts(tree: PyTree, numbers: WeightDimensionNumbers) -> PyTree:
    """The MatrixLayout of every leaf of `tree`, as a tree of the same structure."""
    numbers = resolve_dimension_numbers(numbers, tree)
    named = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (jax.tree_util.keystr(path) or "the leaf", leaf.shape), tree
    )
    return map_static(
        lambda n, leaf: matrix_layout(leaf[1], n, leaf[0]),
        numbers,
        named,
        is_leaf=is_dimension_numbers,
    )
