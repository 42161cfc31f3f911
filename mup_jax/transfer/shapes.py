"""ParamShape: what a scaling rule has to know of a parameter, in plain numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax

from mup_jax.transforms.matrices import (
    MatrixLayout,
    PyTree,
    WeightDimensionNumbers,
    map_static,
    matrix_layout,
    resolve_dimension_numbers,
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


def map_shapes(function: Callable, shapes: PyTree, tree: PyTree) -> PyTree:
    """`function(shape, leaf)` over a tree of ParamShape beside a tree that a mask may have cut.

    Raises:
      ValueError: the trees have different structures.
    """
    try:
        return map_static(function, shapes, tree, is_leaf=is_shape)
    except ValueError as error:
        raise ValueError(
            "the tree of shapes does not have the structure of the parameters: pass the same "
            f"parameter tree to infer_shapes and to the optimizer ({error})"
        ) from error


def _infer_role(here: MatrixLayout, there: MatrixLayout) -> Role:
    in_grows, out_grows = here.d_in != there.d_in, here.d_out != there.d_out
    if in_grows == out_grows or here.stack_axes:
        return "hidden"
    return "embedding" if out_grows else "readout"


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
    - stacked vectors `(layers, width)` look like matrices and are vectors;
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
      ValueError: structures or ranks differ, no dimension differs and the role of a matrix is to be
        inferred, or an option is out of range.
    """
    structures: list[Any] = [jax.tree.structure(tree) for tree in (base_params, params)]
    if structures[0] != structures[1]:
        raise ValueError(
            "base_params and params have different structures: build both with the same code and "
            "only other widths, and with as many layers where these are not stacked; got "
            f"{structures[0]} and {structures[1]}"
        )
    if depth_ratio <= 0:
        raise ValueError(f"depth_ratio={depth_ratio}: give layers / base layers, above 0")
    if not 0.5 <= residual_exponent <= 1:
        raise ValueError(
            f"residual_exponent={residual_exponent}: give the α of the model's residual multiplier "
            "depth_ratio^(-α), from 0.5 to 1; without a multiplier no rule holds over depths"
        )
    if callable(roles):
        roles = roles(params)
    given_roles = jax.tree.map(lambda _: None, params) if roles is None else roles
    paths = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    numbers = resolve_dimension_numbers(weight_dimension_numbers, params)
    inferred = []

    def shape_of(path: str, base: Any, leaf: Any, role: Any, number: Any) -> ParamShape:
        if len(base.shape) != len(leaf.shape):
            raise ValueError(f"{path} has shape {base.shape} in the base and {leaf.shape} here")
        if role is not None and role not in ROLES:
            raise ValueError(f"role {role!r} of {path}: choose one of {', '.join(ROLES)}")
        depth = (depth_ratio, residual_exponent)
        if len(leaf.shape) < 2 or role == "vector":
            size, base_size = (int(x.shape[-1]) if x.shape else 1 for x in (leaf, base))
            return ParamShape("vector", 1, size, 1, base_size, *depth)
        here, there = (matrix_layout(tuple(x.shape), number, path) for x in (leaf, base))
        if role is None:
            role = _infer_role(here, there)
            inferred.append(path)
        of_blocks = depth if role == "hidden" else ()
        return ParamShape(role, here.d_in, here.d_out, there.d_in, there.d_out, *of_blocks)

    shapes = jax.tree.map(shape_of, paths, base_params, params, given_roles, numbers)
    if (roles is None or inferred) and all(s.width_ratio == 1 for s in jax.tree.leaves(shapes)):
        raise ValueError(
            "no dimension of params differs from base_params, so nothing tells an embedding from a "
            "hidden matrix: pass the tuned base model's shapes; for the base model itself, or a "
            "model that is only deeper, say with roles= what each matrix is"
        )
    return shapes
