"""The state of matrix transformations parameter by parameter, and back for other parameters."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mup_jax.transforms.engine import Blocks, ScaleByBlocksState
from mup_jax.transforms.groups import (
    GroupMembers,
    Groups,
    MatrixGroups,
    describe,
)
from mup_jax.transforms.matrices import (
    PyTree,
    WeightDimensionNumbers,
    dimension_numbers,
    matrix_layout,
)
from mup_jax.transforms.mesh import axis_names

_OTHER_STATE = "the state is not of this optimizer and these parameters"


def state_by_parameter(
    state: PyTree,
    params: optax.Params,
    optimizer: optax.GradientTransformation | None = None,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> PyTree:
    """The state of an optimizer with that of each parameter at its own place.

    `scale_by_blocks`, and so Shampoo, SOAP and Muon, keep the state of all matrices of one shape in
    common arrays. Here each `ScaleByBlocksState` has instead, as its `blocks`, a tree like the
    parameters that it is of, with a list of `Blocks` at each: one where block sizes divide the
    sides, up to four with edge blocks. Their arrays have the stack axes of the parameter first,
    then `(rows, columns)` of the grid of blocks. All else is as it was, such as Adam's moments.

    Such a state can be cut, extended and stored like parameters. `state_from_parameters` makes one
    of it that an optimizer takes.

    Args:
      state: of any optimizer.
      params: the parameters that it is the state of.
      optimizer: that it is the state of, which knows the dimension numbers, and which parameters a
        mask or a partition gives to which transformation. None: parameters are found by their
        matrix shapes, if a transformation has all of a shape.
      weight_dimension_numbers: without `optimizer`, as in `scale_by_muon`; in a tree of them, None
        for a parameter that is no matrix of the state.

    Returns:
      The state. On a mesh its arrays may be divided along other axes than those of `state`.

    Raises:
      ValueError: the parameters, their dimension numbers or the optimizer do not fit the state.

    Example:
      The momentum of one parameter of two that have the same shape:

      >>> import jax.numpy as jnp, mup_jax
      >>> params = {"a": jnp.ones((16, 8)), "b": jnp.ones((16, 8))}
      >>> state = mup_jax.scale_by_muon().init(params)
      >>> mup_jax.state_by_parameter(state, params).blocks["b"][0].state.mu.shape
      (1, 1, 16, 8)
    """
    if not all(map(_is_of_groups, _all_blocks(state))):
        raise ValueError("the state is by parameter already: give it to state_from_parameters")
    if optimizer is not None:
        described = _describe(optimizer, params)
    else:
        members = lambda blocks, _: _find_members(blocks, params, weight_dimension_numbers)
        described = _map_blocks(members, state, state)
    return _map_blocks(_split, described, state)


def state_from_parameters(
    by_parameter: PyTree, params: optax.Params, optimizer: optax.GradientTransformation
) -> PyTree:
    """The state of an optimizer, of a state parameter by parameter.

    The parameters need not be those of that state: one that is in both, by its path, keeps its
    state, a new one gets what `optimizer.init` gives it, and one that is gone is dropped. Counts of
    steps stay, so that averages of a new parameter are corrected for bias as those of the others.

    Args:
      by_parameter: from `state_by_parameter`.
      params: that the state is to be of.
      optimizer: that it is to be of; of the same chain of transformations.

    Returns:
      The state, in the shardings in which `optimizer.init` gives it.

    Raises:
      ValueError: the state of a parameter has not the shapes that the parameter needs, or
        `by_parameter` is of another optimizer.

    Example:
      A parameter more; and two layers more, which begin with copies of the states of the last two:

      >>> import jax, jax.numpy as jnp, mup_jax
      >>> from optax.contrib import MuonDimensionNumbers
      >>> numbers = {"layers": MuonDimensionNumbers(-2, -1), "head": MuonDimensionNumbers(0, 1)}
      >>> params = {"layers": jnp.ones((4, 8, 8))}
      >>> optimizer = mup_jax.scale_by_muon(weight_dimension_numbers=numbers)
      >>> state = optimizer.init(params)

      >>> kept = mup_jax.state_by_parameter(state, params, optimizer)
      >>> params["head"] = jnp.zeros((8, 2))
      >>> state = mup_jax.state_from_parameters(kept, params, optimizer)

      >>> deeper = lambda x: jnp.concatenate([x, x[-2:]])
      >>> kept = mup_jax.state_by_parameter(state, params, optimizer)
      >>> kept.blocks["layers"] = jax.tree.map(deeper, kept.blocks["layers"])
      >>> params["layers"] = deeper(params["layers"])
      >>> state = mup_jax.state_from_parameters(kept, params, optimizer)
      >>> sorted(state.blocks)
      ['6x8x8', '8x2']
    """
    described = _describe(optimizer, params)
    fresh = optimizer.init(params)
    merged = _merge(by_parameter, _map_blocks(_split, described, fresh), params)
    joined = _map_blocks(GroupMembers.join, described, merged)
    return jax.tree.map(_placed, joined, fresh)


def _is_state(x: Any) -> bool:
    return isinstance(x, ScaleByBlocksState)


def _all_blocks(state: PyTree) -> list[Any]:
    return [x.blocks for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]


def _is_of_groups(blocks: Any) -> bool:
    """Whether these are blocks by matrix shape, and not by parameter."""
    return isinstance(blocks, dict) and all(
        re.fullmatch(r"\d+(x\d+)+", str(name)) for name in blocks
    )


def _describe(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    if not hasattr(optimizer, "init"):
        raise ValueError(f"optimizer={optimizer!r}: give the transformation that the state is of")
    return describe(optimizer.init, params)


def _map_blocks(function: Callable[[Any, Any], Any], described: PyTree, state: PyTree) -> PyTree:
    """`state` with `function(described, state)` of the blocks in each `ScaleByBlocksState`."""
    treedef: Any
    known, treedef = jax.tree.flatten(described, is_leaf=_is_state)
    try:
        given = treedef.flatten_up_to(state)
    except ValueError as error:
        raise ValueError(f"{_OTHER_STATE}: {error}") from error
    converted = []
    for of, x in zip(known, given, strict=True):
        if _is_state(of) != _is_state(x):
            raise ValueError(f"{_OTHER_STATE}: it has {type(x).__name__} for {type(of).__name__}")
        converted.append(x._replace(blocks=function(of.blocks, x.blocks)) if _is_state(of) else x)
    return jax.tree.unflatten(treedef, converted)


def _split(members: GroupMembers, blocks: PyTree) -> PyTree:
    return members.split(jax.tree.map(_with_whole_stack, blocks))


def _find_members(blocks: Groups, params: PyTree, numbers: WeightDimensionNumbers) -> GroupMembers:
    """All parameters whose matrix shapes are those of groups."""

    def is_member(leaf: Any, number: Any) -> bool:
        # In a tree, None says that the leaf is not a matrix.
        if number is None and numbers is not None:
            return False
        try:
            return matrix_layout(tuple(leaf.shape), number).group in blocks
        except ValueError:
            return False

    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, dimension_numbers(numbers, params), strict=True)
    masked = [pair[0] if is_member(*pair) else optax.MaskedNode() for pair in pairs]
    return MatrixGroups(jax.tree.unflatten(treedef, masked), numbers).members


def _merge(by_parameter: PyTree, fresh: PyTree, params: PyTree) -> PyTree:
    """`fresh`, with what `by_parameter` has in its place."""
    if any(blocks and _is_of_groups(blocks) for blocks in _all_blocks(by_parameter)):
        raise ValueError(
            "by_parameter has matrices by shape, as an optimizer has them: give what "
            "state_by_parameter makes of it"
        )
    known, needed = (
        {
            jax.tree_util.keystr(path): entry
            for path, entry in jax.tree.leaves_with_path(tree, is_leaf=_is_entry)
        }
        for tree in (by_parameter, fresh)
    )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    of_parameters = {place for place in needed if any(name in place for name in names)}
    if missing := sorted(needed.keys() - of_parameters - known.keys()):
        raise ValueError(f"by_parameter has no {missing[0]}: it is the state of another optimizer")
    if of_parameters and not of_parameters & known.keys():
        raise ValueError(
            f"by_parameter has nothing for any of {', '.join(names)}: give parameters with the "
            "paths that they had, or begin anew with optimizer.init"
        )

    def choose(path: Any, new: Any) -> Any:
        place = jax.tree_util.keystr(path)
        if place not in known:
            return new
        _check_alike(place, known[place], new)
        return jax.tree.map(_placed, known[place], new)

    return jax.tree.map_with_path(choose, fresh, is_leaf=_is_entry)


def _is_entry(x: Any) -> bool:
    """Whether x is what one parameter has in a `ScaleByBlocksState`."""
    return isinstance(x, list) and bool(x) and all(isinstance(blocks, Blocks) for blocks in x)


def _check_alike(place: str, given: Any, wanted: Any) -> None:
    def arrays(tree: Any) -> dict[str, str]:
        types = [(path, jax.typeof(x)) for path, x in jax.tree.leaves_with_path(tree)]
        return {jax.tree_util.keystr(p): f"{x.dtype} of shape {x.shape}" for p, x in types}

    has, needs = arrays(given), arrays(wanted)
    for path in needs | has:
        if has.get(path) != needs.get(path):
            raise ValueError(
                f"by_parameter has {has.get(path, 'nothing')} at {place}{path}, and the parameter "
                f"needs {needs.get(path, 'nothing')}: change the state as the parameter, or take "
                "it out for what init gives"
            )


def _with_whole_stack(x: jax.Array) -> jax.Array:
    """`x` with the explicit mesh axes along its first axis along another, or nowhere.

    JAX lets no array be cut along an axis that they divide.
    """
    sharding = jax.typeof(x).sharding
    names, *rest = sharding.spec or (None,)
    if names is None:
        return x
    size = math.prod(sharding.mesh.shape[name] for name in axis_names(names))
    places = [i for i, entry in enumerate(rest) if entry is None and x.shape[i + 1] % size == 0]
    if places:
        rest[places[0]] = names
    return jax.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(None, *rest)))


def _placed(x: Any, like: Any) -> jax.Array:
    """`x` in the sharding of `like`."""
    if isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer):
        sharding = jax.typeof(like).sharding
        return x if jax.typeof(x).sharding == sharding else jax.reshard(x, sharding)
    # What is not committed goes wherever the arrays are that it is used with.
    return jax.device_put(x, like.sharding) if like.committed else jnp.asarray(x)
