"""ParamShape: what a scaling rule has to know of a parameter, in plain numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
from optax.contrib import MuonDimensionNumbers

from mup_jax.transforms.matrices import (
    MatrixLayout,
    PyTree,
    WeightDimensionNumbers,
    beside,
    check_array,
    dimension_numbers,
    leaf_name,
    map_static,
    matrix_layout,
    resolve,
)

Role = Literal["embedding", "hidden", "readout", "vector"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class ParamShape:
    """Fan-in, fan-out, depth and role of one parameter, in the target and in the base model.

    Plain Python numbers: sharding, jit and checkpoints cannot lose them. Vectors (biases, norm
    gains) count as matrices with a fan-in of 1.

    Attributes:
      role: what the parameter is in the model.
      d_in: fan-in.
      d_out: fan-out.
      base_d_in: fan-in in the base model.
      base_d_out: fan-out in the base model.
      depth_ratio: layers over layers of the base; 1 outside the residual blocks.
      residual_exponent: α, where residual branches are multiplied by depth_ratio^(-α).

    Example:
      >>> up = mup_jax.ParamShape("hidden", d_in=256, d_out=1024, base_d_in=64, base_d_out=256)
      >>> up.width_ratio, mup_jax.rules.adam().learning_rate(up)
      (4.0, 0.25)
    """

    role: Role
    d_in: int
    d_out: int
    base_d_in: int
    base_d_out: int
    depth_ratio: float = 1.0
    residual_exponent: float = 1.0

    @property
    def branch_divisor(self) -> float:
        """L^α: what the residual branches are divided by, over that of the base."""
        return self.depth_ratio**self.residual_exponent

    @property
    def width_ratio(self) -> float:
        """Target width over base width; fan-in and fan-out disagree only where one is fixed."""
        ratios = (self.d_in / self.base_d_in, self.d_out / self.base_d_out)
        return max(ratios, key=lambda ratio: max(ratio, 1 / ratio))


def is_shape(value: Any) -> bool:
    return isinstance(value, ParamShape)


def map_shapes(function: Callable, shapes: PyTree, tree: PyTree, *rest: PyTree) -> PyTree:
    """`function(shape, leaf, ...)` over trees of arrays, of which a mask may have removed some.

    Raises:
      ValueError: there is no shape for a leaf.
    """
    try:
        return map_static(function, shapes, tree, *rest, is_leaf=is_shape)
    except ValueError as error:
        raise ValueError(
            "the tree of shapes does not have the structure of the parameters: pass the same "
            f"parameter tree to infer_shapes and to the optimizer ({error})"
        ) from error


# Fan-in and fan-out of a hidden matrix grow alike, but for rounding to multiples; what differs by
# more has another reason.
_MOST_UNEVEN = 1.25


def _infer_role(path: str, here: MatrixLayout, there: MatrixLayout) -> Role:
    in_grows, out_grows = here.d_in != there.d_in, here.d_out != there.d_out
    uneven = (here.d_in * there.d_out) / (here.d_out * there.d_in)
    if in_grows and out_grows and max(uneven, 1 / uneven) > _MOST_UNEVEN:
        raise ValueError(
            f"{path} is {there.d_in}×{there.d_out} in the base and {here.d_in}×{here.d_out} here, "
            "which is not one width: give the base model the same vocabulary, inputs and outputs, "
            "or say with roles= what this matrix is"
        )
    if in_grows == out_grows or here.stack_axes:
        return "hidden"
    return "embedding" if out_grows else "readout"


def _of_vector(
    path: str, base: tuple[int, ...], here: tuple[int, ...], depth_ratio: float
) -> tuple[int, int]:
    """The width of a vector, or of a stack of them, here and in the base: the axis that differs."""
    axes = [axis for axis, (a, b) in enumerate(zip(here, base, strict=True)) if a != b]
    # Layers may differ too; then they do by the depth.
    of_width = [axis for axis in axes if here[axis] != depth_ratio * base[axis]]
    if len(of_width) > 1:
        raise ValueError(
            f"{path} is a vector of shape {base} in the base and {here} here: which axis is its "
            "width? Only that one may differ, and that of layers by depth_ratio"
        )
    axis = (of_width or axes or [-1])[-1]
    return (int(here[axis]), int(base[axis])) if here else (1, 1)


def infer_shapes(
    base_params: PyTree,
    params: PyTree,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    depth_ratio: float = 1.0,
    residual_exponent: float = 1.0,
    roles: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """Compares a model with its base model and returns a tree of ParamShape.

    Both trees may be abstract (`jax.eval_shape` of the initialisation costs nothing). A matrix is
    an embedding where only its fan-out differs from the base, a readout where only its fan-in does,
    and hidden otherwise; the matrices of a stack are hidden. `describe` shows what was found. Where
    shapes do not tell, `roles` has to:

    - a projection to a fixed number of key and value heads, in layers that are not stacked, looks
      like a readout and is hidden;
    - stacked vectors `(layers, width)` look like matrices and are vectors (of their axes the one
      that differs from the base is the width);
    - a stack of embeddings or of readouts looks hidden.

    A function can go by the names of the parameters, and leave the others to be inferred:

        def roles(params):
            role = lambda path, _: "hidden" if "kv" in jax.tree_util.keystr(path) else None
            return jax.tree.map_with_path(role, params)

    A table that is embedding and readout in one (tied) is one parameter and an embedding; the rules
    hold if the model divides its logits by the width ratio. An embedding stored `(width, V)` is
    turned around by its dimension numbers, `MuonDimensionNumbers(1, 0)`.

    Args:
      base_params: parameters, or their shapes, of the model in which hyperparameters were tuned.
      params: those of the model to train; the same structure.
      weight_dimension_numbers: which axes are fan-in and fan-out, as in `scale_by_muon`; scanned
        layers `(layers, d_in, d_out)` are `MuonDimensionNumbers(-2, -1)`, kernels of convolutions
        `(height, width, d_in, d_out)` are `MuonDimensionNumbers((0, 1, 2), 3)`.
      depth_ratio: layers of the model over layers of the base; counts for hidden parameters and
        vectors only.
      residual_exponent: α, from 1/2 to 1, where the model multiplies its residual branches by
        depth_ratio^(-α): 1 for transformers and all branches of several matrices (CompleteP,
        arXiv 2505.01618), 1/2 for branches of one matrix only (arXiv 2603.00541).
      roles: "embedding", "hidden", "readout" or "vector" for each parameter, or None to infer it,
        as a tree like `params` or a function of it. With the roles of all matrices given, the two
        trees may be equal: that is the base model itself, or one that is only deeper.

    Returns:
      A tree of ParamShape with the structure of `params`.

    Raises:
      ValueError: a parameter is missing in one of the models, is no real array or has another rank;
        nothing tells what a matrix is or which axis of a vector is its width; or an option is out
        of range.

    Example:
      >>> small, large = ({"w": jnp.ones((d, d)), "out": jnp.ones((d, 10))} for d in (32, 128))
      >>> shapes = mup_jax.infer_shapes(small, large)
      >>> shapes["w"].base_d_in, shapes["w"].d_in
      (32, 128)
    """
    if depth_ratio <= 0:
        raise ValueError(f"depth_ratio={depth_ratio}: give layers / base layers, above 0")
    if not 0.5 <= residual_exponent <= 1:
        raise ValueError(
            f"residual_exponent={residual_exponent}: give the α of the model's residual multiplier "
            "depth_ratio^(-α), from 0.5 to 1; without a multiplier no rule holds over depths"
        )
    paths = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    leaves, treedef = jax.tree.flatten(params)
    for path, leaf in zip(paths, leaves, strict=True):
        check_array(path, leaf)
    numbers = dimension_numbers(weight_dimension_numbers, params)
    given_roles = resolve(roles, params, lambda x: x is None or isinstance(x, str))
    rows = zip(paths, _base_leaves(base_params, params), leaves, given_roles, numbers, strict=True)
    depth = (depth_ratio, residual_exponent)
    shapes = [_shape_of(*row, depth) for row in rows]
    inferred = any(
        role is None and shape.role != "vector"
        for role, shape in zip(given_roles, shapes, strict=True)
    )
    if (roles is None or inferred) and all(shape.width_ratio == 1 for shape in shapes):
        raise ValueError(
            "no dimension of params differs from base_params, so nothing tells an embedding from a "
            "hidden matrix: pass the tuned base model's shapes; for the base model itself, or a "
            "model that is only deeper, say with roles= what each matrix is"
        )
    return jax.tree.unflatten(treedef, shapes)


def _base_leaves(base_params: PyTree, params: PyTree) -> list[Any]:
    """Those of the base model, in the order of the leaves of `params`."""
    found = []
    for whose, static, tree in (
        ("base_params", base_params, params),
        ("params", params, base_params),
    ):
        try:
            found.append(beside(static, tree))
        except ValueError as error:
            raise ValueError(
                "base_params and params have different parameters: build both with the same code "
                "and only other widths, and with as many layers where these are not stacked; "
                f"{whose} has {error}"
            ) from error
    return found[0]


def _shape_of(
    path: str,
    base: Any,
    leaf: Any,
    role: Any,
    number: MuonDimensionNumbers | None,
    depth: tuple[float, float],
) -> ParamShape:
    if len(base.shape) != len(leaf.shape):
        raise ValueError(f"{path} has shape {base.shape} in the base and {leaf.shape} here")
    if role is not None and role not in ROLES:
        raise ValueError(f"role {role!r} of {path}: choose one of {', '.join(ROLES)}")
    if len(leaf.shape) < 2 or role == "vector":
        size, base_size = _of_vector(path, base.shape, leaf.shape, depth[0])
        return ParamShape("vector", 1, size, 1, base_size, *depth)
    here, there = (matrix_layout(tuple(x.shape), number, path) for x in (leaf, base))
    role = _infer_role(path, here, there) if role is None else role
    of_blocks = depth if role == "hidden" else ()
    return ParamShape(role, here.d_in, here.d_out, there.d_in, there.d_out, *of_blocks)
