"""Arrays of any rank as stacks of matrices."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
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


def _names(path: Any) -> tuple[str, ...]:
    """The names on the path of a leaf, but for that of a box around it, as `nnx.Param` is."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value"
    return tuple(names[:-1] if boxed else names)


def leaf_name(path: Any) -> str:
    """How messages call the leaf at a path."""
    return jax.tree_util.keystr(path) or "the leaf"


def beside(static: PyTree, tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """The value that a static tree has for each leaf of `tree`, in the order of these leaves.

    They are found by the names on their paths, so that trees may be of different types: a dict and
    a FrozenDict, modules that keep their sizes in their structure, leaves in a box of their
    framework and bare ones. What a mask has removed from `tree` is passed over.

    Args:
      static: of any values.
      tree: of arrays.
      is_leaf: of `static`.

    Raises:
      ValueError: `static` has no value for a leaf.
    """
    values = {_names(k): v for k, v in jax.tree.leaves_with_path(static, is_leaf=is_leaf)}
    found = []
    for path, _ in jax.tree.leaves_with_path(tree):
        if _names(path) not in values:
            known = ", ".join("/".join(names) for names in values) or "no leaf"
            raise ValueError(f"nothing for {leaf_name(path)}, only for {known}")
        found.append(values[_names(path)])
    return found


def map_static(
    function: Callable, static: PyTree, tree: PyTree, *rest: PyTree, is_leaf: Callable
) -> PyTree:
    """`function(value, leaf, ...)` over trees of arrays, beside a static tree; see `beside`."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [beside(static, tree, is_leaf), leaves, *map(jax.tree.leaves, rest)]
    return jax.tree.unflatten(treedef, [function(*row) for row in zip(*columns, strict=True)])


def resolve(given: Any, tree: PyTree, is_value: Callable[[Any], bool]) -> list[Any]:
    """A static value for each leaf of `tree`, in their order.

    Args:
      given: one value for all leaves, a tree of values, or a function of `tree` that returns one of
        these. A module may be a tree of values and callable; then it is not called.
      tree: of arrays.
      is_value: whether something is such a value.

    Raises:
      ValueError: `given` has no value for a leaf.
    """
    if callable(given) and not any(map(is_value, jax.tree.leaves(given, is_leaf=is_value))):
        given = given(tree)
    if is_value(given):
        return [given] * len(jax.tree.leaves(tree))
    return beside(given, tree, is_value)


def is_dimension_numbers(value: Any) -> bool:
    return value is None or isinstance(value, MuonDimensionNumbers)


def dimension_numbers(
    numbers: WeightDimensionNumbers, tree: PyTree
) -> list[MuonDimensionNumbers | None]:
    """Those of each leaf of `tree`, in their order; None for the default."""
    return resolve(numbers, tree, is_dimension_numbers)


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
    def group(self) -> str:
        """The name of the group of matrices of this shape, as "8x256x1024"."""
        return "x".join(map(str, self.matrix_shape))

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


def check_array(name: str, leaf: Any) -> None:
    """Refuses what is in a tree of parameters by mistake.

    Raises:
      ValueError: the leaf is no array, or one of complex numbers.
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"{name} is {type(leaf).__name__} and no array: give the arrays of the model alone, "
            "for example eqx.filter(model, eqx.is_array) or nnx.state(model, nnx.Param)"
        )
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise ValueError(
            f"{name} is complex, and directions of complex matrices are not defined here: keep its "
            "real and imaginary part as two leaves, or give it to another transformation with "
            "optax.partition"
        )


def matrix_layouts(tree: PyTree, numbers: WeightDimensionNumbers) -> list[MatrixLayout]:
    """The layout of every leaf of `tree`, in the order of its leaves.

    Raises:
      ValueError: a leaf is not a real matrix, or has None in a tree of dimension numbers.
    """
    layouts = []
    given = dimension_numbers(numbers, tree)
    for (path, leaf), number in zip(jax.tree.leaves_with_path(tree), given, strict=True):
        name = leaf_name(path)
        check_array(name, leaf)
        if number is None and numbers is not None:
            raise ValueError(
                f"weight_dimension_numbers has None for {name}, which says that it is not a matrix:"
                f" say MuonDimensionNumbers(0, 1) if it is, or {_PARTITION_HINT}"
            )
        layouts.append(matrix_layout(tuple(leaf.shape), number, name))
    return layouts
