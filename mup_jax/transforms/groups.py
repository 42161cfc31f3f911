"""Leaves of equal matrix shape as one array, divided over the mesh in use.

Every matrix transformation works on *groups*: all leaves of a tree whose matrices have the same
shape are one stack `(n, d_in, d_out)`, so that a program grows with the number of different shapes
and not with the number of leaves or layers. Under a mesh a device works on its part of each group,
see `mup_jax.transforms.sharding_plan`.
"""

import collections
import contextvars
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from mup_jax.transforms.blocking import Blocking
from mup_jax.transforms.matrices import (
    MatrixLayout,
    PyTree,
    WeightDimensionNumbers,
    leaf_name,
    matrix_layouts,
)
from mup_jax.transforms.mesh import MeshInUse
from mup_jax.transforms.sharding_plan import (
    IN,
    OUT,
    STACK,
    UNDIVIDED,
    Layout,
    ShardingPlan,
    StateArray,
    plan_sharding,
)

# One entry per group.
Groups = dict[str, Any]


@dataclass(frozen=True)
class _Group:
    """The leaves of one matrix shape: their positions in the tree and how each is laid out."""

    members: tuple[int, ...]
    layouts: tuple[MatrixLayout, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        stack, d_in, d_out = self.layouts[0].group_shape
        return stack * len(self.members), d_in, d_out

    def stack(self, leaves: list[jax.Array]) -> jax.Array:
        """Leaves, or a device's parts of them, as `(n, d_in, d_out)`; the leaf varies fastest."""
        matrices = []
        for i, layout in zip(self.members, self.layouts, strict=True):
            local = replace(layout, shape=leaves[i].shape)
            matrices.append(local.to_matrices(leaves[i]))
        return _interleaved(matrices)

    def unstack(self, x: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
        """The inverse of `stack`, in shapes and dtypes of the leaves."""
        parts = []
        columns = zip(_separated(x, len(self.members)), self.members, self.layouts, strict=True)
        for matrices, i, layout in columns:
            local = replace(layout, shape=like[i].shape)
            parts.append(local.from_matrices(matrices).astype(like[i].dtype))
        return parts

    def split_state(self, x: jax.Array) -> list[jax.Array]:
        """What an array `(n, ...)` of the state has for each leaf: `(*stack_shape, ...)`."""
        parts = zip(_separated(x, len(self.members)), self.layouts, strict=True)
        return [part.reshape(*layout.stack_shape, *part.shape[1:]) for part, layout in parts]

    def join_state(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The inverse of `split_state`."""
        flat = [
            part.reshape(-1, *part.shape[len(layout.stack_shape) :])
            for part, layout in zip(parts, self.layouts, strict=True)
        ]
        return _interleaved(flat)

    def leaf_spec(self, layout: MatrixLayout, parameter_layout: Layout) -> jax.P:
        """The sharding of a leaf."""
        entries: list[Any] = [None] * len(layout.shape)
        for axes, names in zip(_axes(layout), parameter_layout, strict=True):
            if names:
                entries[axes[0]] = names
        return jax.P(*entries)

    def can_have(self, parameter_layout: Layout, sizes: Mapping[str, int]) -> bool:
        """Whether the first axis of every leaf's stack, in side and out side can be divided so."""
        return all(
            not names
            or (axes and layout.shape[axes[0]] % math.prod(sizes[name] for name in names) == 0)
            for layout in self.layouts
            for axes, names in zip(_axes(layout), parameter_layout, strict=True)
        )

    def parameter_layout(self, leaves: list[Any], mesh: MeshInUse) -> Layout:
        """The layout in which gradients arrive, that of most leaves.

        Automatic axes do not show in a type. They are taken to divide in side and out side in turn,
        as fully sharded and tensor-parallel weights have it; where that is not so, the compiler
        moves shards (by all-to-all) before and after.
        """
        seen: collections.Counter[Layout] = collections.Counter()
        for i, layout in zip(self.members, self.layouts, strict=True):
            spec = mesh.spec(leaves[i])
            stack, d_in, d_out = (spec[axes[0]] if axes else () for axes in _axes(layout))
            seen[stack, d_in, d_out] += 1
        possible = [layout for layout, _ in seen.most_common() if self.can_have(layout, mesh.sizes)]
        stack, *sides = possible[0] if possible else UNDIVIDED
        turn = 0
        for name in mesh.of_type(AxisType.Auto):
            for side in (turn, 1 - turn):
                tried = [*sides]
                tried[side] = (*sides[side], name)
                if self.can_have((stack, tried[0], tried[1]), mesh.sizes):
                    sides, turn = tried, 1 - side
                    break
        return stack, sides[0], sides[1]


def _interleaved(parts: Sequence[jax.Array]) -> jax.Array:
    """Arrays `(n, ...)` as one, in which they alternate along the first axis."""
    stacked = jnp.stack(parts, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _separated(x: jax.Array, number: int) -> list[jax.Array]:
    """The inverse of `_interleaved`."""
    x = x.reshape(-1, number, *x.shape[1:])
    return [x[:, position] for position in range(number)]


def _axes(layout: MatrixLayout) -> tuple[tuple[int, ...], ...]:
    return layout.stack_axes, layout.in_axes, layout.out_axes


# Equal to itself alone: what is static in a tree has to be comparable and to have a hash.
@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class GroupMembers:
    """Which leaves of a tree are in which groups: a state of groups <-> one of leaves."""

    treedef: Any
    groups: dict[str, _Group]

    def split(self, state: Groups) -> PyTree:
        """The state of all groups -> a tree with that of each leaf alone.

        The arrays of a leaf have its own stack axes in place of that of its group.

        Raises:
          ValueError: a group has other matrices than the leaves.
        """
        self._check(state)
        parts: list[Any] = [None] * self.treedef.num_leaves
        for key, group in self.groups.items():
            arrays, of_arrays = jax.tree.flatten(state[key])
            columns = [group.split_state(x) for x in arrays]
            for position, i in enumerate(group.members):
                parts[i] = jax.tree.unflatten(of_arrays, [column[position] for column in columns])
        return jax.tree.unflatten(self.treedef, parts)

    def join(self, tree: PyTree) -> Groups:
        """The inverse of `split`."""
        parts = self.treedef.flatten_up_to(tree)
        return {
            key: jax.tree.map(
                lambda *arrays, group=group: group.join_state(arrays),
                *(parts[i] for i in group.members),
            )
            for key, group in self.groups.items()
        }

    def _check(self, state: Groups) -> None:
        indices = jax.tree.unflatten(self.treedef, range(self.treedef.num_leaves))
        names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(indices)]
        for key in [*self.groups, *(key for key in state if key not in self.groups)]:
            group = self.groups.get(key)
            members = ", ".join(names[i] for i in group.members) if group else "no leaf"
            wanted = group.shape[0] if group else 0
            arrays = jax.tree.leaves(state.get(key))
            found = arrays[0].shape[0] if arrays else wanted if key in state else 0
            if found != wanted:
                raise ValueError(
                    f"the state has {found} matrices in its group {key}, and the parameters have "
                    f"{wanted} ({members}): give the parameters and the optimizer that it is of"
                )


# Whether `MatrixGroups.init` gives `GroupMembers` in place of a state.
_describing = contextvars.ContextVar("describing", default=False)


def describe(init: Callable[[PyTree], Any], params: PyTree) -> Any:
    """The abstract state that `init` gives, with `GroupMembers` in place of each state of groups.

    What a mask or a partition has given to which transformation is known to their `init` alone.
    """
    token = _describing.set(True)
    try:
        # A function of its own, as JAX keeps what it has traced. So does `jax.jit` inside `init`.
        with jax.disable_jit():
            return jax.eval_shape(lambda params: init(params), params)
    finally:
        _describing.reset(token)


def is_healthy(gradients: jax.Array, plan: ShardingPlan) -> jax.Array:
    """Whether the squares of matrices `(n, d_in, d_out)` are finite in float32: `(n,)` bool.

    The trace of G Gᵀ bounds all its entries, so a healthy gradient has finite statistics.
    """
    squares = jnp.sum(jnp.square(gradients), axis=(-2, -1))
    return jnp.isfinite(plan.reduce(jax.lax.psum, squares, IN, OUT))


class MatrixGroups:
    """The leaves of a tree as one array `(n, d_in, d_out)` per matrix shape.

    Groups are named by that shape, as "8x256x1024". A state has for each group a tree of arrays.

    Attributes:
      plans: how each group is sharded over the mesh in use.
    """

    def __init__(
        self, tree: PyTree, numbers: WeightDimensionNumbers, blocking: Blocking | None = None
    ) -> None:
        self._treedef: Any
        leaves, self._treedef = jax.tree.flatten(tree)
        self._leaves = leaves
        # `optax.tree.map_params` gives an object in place of parameters, to see which parts of a
        # state are like them. No group is.
        is_node = self._treedef.num_nodes == 1 and not leaves
        self._is_placeholder = is_node and not isinstance(tree, (Mapping, list, tuple, type(None)))
        layouts = matrix_layouts(tree, numbers)
        members: dict[str, list[int]] = {}
        for i, layout in enumerate(layouts):
            members.setdefault(layout.group, []).append(i)
        self._groups = {
            key: _Group(tuple(indices), tuple(layouts[i] for i in indices))
            for key, indices in members.items()
        }
        self._mesh = MeshInUse.of(leaves)
        self._blocking = blocking or Blocking()
        self.plans: dict[str, ShardingPlan] = {
            key: plan_sharding(
                group.shape,
                group.parameter_layout(leaves, self._mesh),
                self._mesh.sizes,
                self._blocking,
            )
            for key, group in self._groups.items()
        }

    @property
    def members(self) -> GroupMembers:
        """Which leaves are in which groups."""
        return GroupMembers(self._treedef, self._groups)

    def init(self, make: Callable[[ShardingPlan], Any], arrays: Groups) -> Groups:
        """The state of each group, stored as `run` wants it.

        Args:
          make: gives a device's part of it, in the layout of the computation.
          arrays: a `StateArray` for each array that `make` gives.
        """
        if self._is_placeholder:
            placeholder: Any = jnp.zeros(())
            return placeholder
        if _describing.get():
            described: Any = self.members
            return described
        devices = self._mesh.entered(self._leaves)
        if devices is None:
            # The first update divides it.
            return {
                key: make(plan_sharding(plan.shape, UNDIVIDED, {}, self._blocking))
                for key, plan in self.plans.items()
            }

        def local() -> Groups:
            state = {key: make(plan) for key, plan in self.plans.items()}
            return self._map_state(ShardingPlan.to_storage, state, arrays)

        with devices:
            return self._mesh.shard(local, (), self._specs(arrays))()

    def _map_state(self, function: Callable, state: Groups, arrays: Groups) -> Groups:
        """`function(plan, x, array)` for each x of a state."""
        return {
            key: jax.tree.map(partial(function, plan), state[key], arrays[key])
            for key, plan in self.plans.items()
        }

    def _specs(self, arrays: Groups) -> Groups:
        is_array = lambda x: isinstance(x, StateArray)
        return {
            key: jax.tree.map(plan.spec, arrays[key], is_leaf=is_array)
            for key, plan in self.plans.items()
        }

    def run(
        self,
        step: Callable[..., tuple[Groups, Groups]],
        updates: PyTree,
        state: Groups,
        arrays: Groups,
        *scalars: Any,
        params: PyTree | None = None,
    ) -> tuple[PyTree, Groups, jax.Array]:
        """Runs one step of an optimizer, every device on its part of each group.

        Args:
          step: `(gradients, healthy, state, *scalars) -> (directions, state)` on the parts of a
            device: gradients and directions `{key: (n, d_in, d_out)}` in float32, `healthy`
            `{key: (n,)}` says of which matrices the gradients can be used.
          updates: a tree like the one given at construction: gradients.
          state: from `init`, or from the last step.
          arrays: as in `init`.
          *scalars: passed on.
          params: whose sharding the directions get, where there are any.

        Returns:
          The directions as a tree like the gradients, the new state, and the number of matrices
          whose gradients were not healthy.
        """
        leaves = jax.tree.leaves(updates)

        def local(leaves: list[jax.Array], state: Groups, scalars: Any) -> Any:
            gradients, healthy = {}, {}
            for key, group in self._groups.items():
                plan = self.plans[key]
                gradients[key] = plan.to_compute(group.stack(leaves)).astype(jnp.float32)
                healthy[key] = is_healthy(gradients[key], plan)
            state = self._map_state(ShardingPlan.from_storage, state, arrays)
            directions, state = step(gradients, healthy, state, *scalars)

            results: list[Any] = [None] * len(leaves)
            skipped = jnp.zeros((), jnp.int32)
            for key, group in self._groups.items():
                plan = self.plans[key]
                dtype = jnp.result_type(*(leaves[i] for i in group.members))
                whole = plan.from_compute(directions[key].astype(dtype))
                for i, part in zip(group.members, group.unstack(whole, leaves), strict=True):
                    results[i] = part
                unhealthy = jnp.sum(~healthy[key], dtype=jnp.int32)
                skipped += plan.reduce(jax.lax.psum, unhealthy, STACK)
            return results, self._map_state(ShardingPlan.to_storage, state, arrays), skipped

        leaf_specs: list[Any] = [None] * len(leaves)
        for key, group in self._groups.items():
            for i, layout in zip(group.members, group.layouts, strict=True):
                leaf_specs[i] = group.leaf_spec(layout, self.plans[key].parameter_layout)
        state_specs = self._specs(arrays)
        sharded = self._mesh.shard(
            local, (leaf_specs, state_specs, jax.P()), (leaf_specs, state_specs, jax.P())
        )
        results, state, skipped = sharded(leaves, state, scalars)
        models = leaves if params is None else jax.tree.leaves(params)
        rows = zip(results, leaves, models, strict=True)
        results = [self._mesh.like(new, old, param) for new, old, param in rows]
        return jax.tree.unflatten(self._treedef, results), state, skipped
