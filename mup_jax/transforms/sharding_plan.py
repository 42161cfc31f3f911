"""How the matrices of a group, and the work on them, are sharded over a mesh.

Gradients arrive in the layout of the parameters; a device computes on whole matrices, or on whole
blocks of matrices. So a mesh axis along which a shard holds whole blocks stays where it is,
and any other is moved to the stack: each device then has fewer matrices, and more of each. Where
matrices are few and one of their sides has no preconditioner (a vocabulary), it is moved to that
side, which may be divided at any place. Such a move is one all-to-all, and its way back another.
That side is filled up with zeros to a length that most numbers of devices divide, the same on every
mesh, so that its state is stored as it is used.
Axes over which a parameter is replicated divide the work too: on the way in a device takes its part
of what it has, on the way back parts are gathered.

State is stored in the layout of the computation, unless the devices do not divide it evenly.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mup_jax.transforms.blocking import Blocking

# Axes of a group `(n, d_in, d_out)`.
STACK, IN, OUT = 0, 1, 2

# The mesh axes along each axis of a group, major first.
Layout = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
UNDIVIDED: Layout = ((), (), ())


def _fit(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """x cut off, or filled up with zeros, to a shape."""
    if x.shape == tuple(shape):
        return x
    x = x[tuple(map(slice, shape))]
    return jnp.pad(x, [(0, wanted - had) for wanted, had in zip(shape, x.shape, strict=True)])


def _filled_up(length: int) -> int:
    """A multiple of 128, or of the largest power of two below, that is longer by 1% at most."""
    multiples = (-(-length // 2**power) * 2**power for power in range(7, -1, -1))
    return next(multiple for multiple in multiples if multiple <= 1.01 * length)


class _Move(NamedTuple):
    """Mesh axes, major first, on their way from an array axis (None: replicated) to another."""

    names: tuple[str, ...]
    size: int
    source: int | None
    target: int

    def apply(self, x: jax.Array) -> jax.Array:
        """Fills up the target axis with zeros where the devices do not divide it."""
        part = -(-x.shape[self.target] // self.size)
        x = _fit(x, [part * self.size if a == self.target else n for a, n in enumerate(x.shape)])
        if self.source is not None:
            return jax.lax.all_to_all(x, self.names, self.target, self.source, tiled=True)
        start = jax.lax.axis_index(self.names) * part
        return jax.lax.dynamic_slice_in_dim(x, start, part, self.target)

    def undo(self, x: jax.Array, length: int) -> jax.Array:
        """The inverse of `apply`; `length` is that of the target axis before it."""
        if self.source is None:
            x = jax.lax.all_gather(x, self.names, axis=self.target, tiled=True)
        else:
            x = jax.lax.all_to_all(x, self.names, self.source, self.target, tiled=True)
        return jax.lax.slice_in_dim(x, 0, length, axis=self.target)


def _apply(moves: Sequence[_Move], x: jax.Array) -> jax.Array:
    return functools.reduce(lambda x, move: move.apply(x), moves, x)


def _shapes(moves: Sequence[_Move], shape: Sequence[int]) -> list[list[int]]:
    """That of an array before each move, and after the last."""
    shapes = [[*shape]]
    for move in moves:
        moved = [*shapes[-1]]
        moved[move.target] = -(-moved[move.target] // move.size)
        if move.source is not None:
            moved[move.source] *= move.size
        shapes.append(moved)
    return shapes


def _undo(moves: Sequence[_Move], x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The inverse of `_apply` on an array of `shape`."""
    *shapes, _ = _shapes(moves, shape)
    for move, before in zip(reversed(moves), reversed(shapes), strict=True):
        x = move.undo(x, before[move.target])
    return x


def _part(
    shape: Sequence[int], layout: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> list[int]:
    """The shape of a device's part of an array."""
    return [
        length // math.prod(sizes[name] for name in names)
        for length, names in zip(shape, layout, strict=True)
    ]


def _filled_up_part(
    shape: Sequence[int],
    layout: Sequence[tuple[str, ...]],
    sizes: Mapping[str, int],
    on: tuple[bool, bool],
) -> list[int]:
    """The shape of a device's part of a group in the layout of the parameters, before any move.

    Sides without preconditioners are filled up, unless they are divided already, and would begin at
    other places in each part.
    """
    part = _part(shape, layout, sizes)
    for axis in _parted(on):
        if not layout[axis]:
            part[axis] = _filled_up(part[axis])
    return part


def _parted(on: tuple[bool, bool]) -> tuple[int, ...]:
    """The axes along which devices may have parts of the same block."""
    return tuple(axis for axis in (IN, OUT) if not on[axis - 1])


class StateArray(NamedTuple):
    """A whole array of a group's state."""

    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    axes: tuple[int | None, int | None, int | None]  # those along the group's three axes, if any


@dataclass(frozen=True)
class ShardingPlan:
    """Where the axes of a mesh lie on a group of matrices `(n, d_in, d_out)`.

    Attributes:
      shape: of the whole group.
      sizes: of the mesh axes.
      parameter_layout: in which gradients arrive.
      compute_layout: in which they are worked on.
      moves: from the one to the other.
      on: whether the in and the out side are preconditioned, and cut into blocks; a side that is
        not, beside one that is, may be divided at any place, and sums over it run over devices.
    """

    shape: tuple[int, int, int]
    sizes: Mapping[str, int]
    parameter_layout: Layout
    compute_layout: Layout
    moves: tuple[_Move, ...]
    on: tuple[bool, bool]

    @property
    def part(self) -> tuple[int, int, int]:
        """The shape of what a device computes on."""
        n, d_in, d_out = _shapes(self.moves, self._filled_up_part)[-1]
        return n, d_in, d_out

    @property
    def _filled_up_part(self) -> list[int]:
        return _filled_up_part(self.shape, self.parameter_layout, self.sizes, self.on)

    def number_of_parts(self, axis: int) -> int:
        """Into how many parts an axis of the group is divided for the computation."""
        return math.prod(self.sizes[name] for name in self.compute_layout[axis])

    def to_compute(self, x: jax.Array) -> jax.Array:
        """A device's part of a group, in the layout of the parameters -> in that of the work."""
        return _apply(self.moves, _fit(x, self._filled_up_part))

    def from_compute(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_compute`."""
        part = _part(self.shape, self.parameter_layout, self.sizes)
        return _fit(_undo(self.moves, x, self._filled_up_part), part)

    def offset(self, axis: int, length: int) -> jax.Array | int:
        """Where a device's part of an axis of the group begins, of `length` parts in all."""
        offset: Any = 0
        for name in self.compute_layout[axis]:
            # As a move fills up the last part.
            length = -(-length // self.sizes[name])
            offset = offset + length * jax.lax.axis_index(name)
        return offset

    def names(self, *axes: int) -> tuple[str, ...]:
        """The mesh axes along axes of the group."""
        return tuple(name for axis in axes for name in self.compute_layout[axis])

    def reduce(self, reduction: Any, x: jax.Array, *axes: int) -> jax.Array:
        """`jax.lax.psum`, `pmax` or `pmin` over the devices along the given axes of the group."""
        names = self.names(*axes)
        return reduction(x, names) if names else x

    @property
    def parted(self) -> tuple[int, ...]:
        """The axes along which devices may have parts of the same block."""
        return _parted(self.on)

    def _storage(self, array: StateArray) -> tuple[list[tuple[str, ...]], tuple[_Move, ...]]:
        """The mesh axes along each axis of a stored array, and the moves from there to the work.

        Mesh axes that do not divide theirs lie along another axis, the shortest that they divide,
        or nowhere.
        """
        names: list[tuple[str, ...]] = [()] * len(array.shape)
        local = list(array.shape)
        uneven: list[tuple[str, int]] = []
        targets: set[int] = set()

        def fits(name: str, axis: int) -> bool:
            return local[axis] % self.sizes[name] == 0

        for axis in (IN, OUT, STACK):
            along = array.axes[axis]
            if along is None:  # alike on all these devices
                continue
            is_filled_up = self._is_filled_up(axis)
            for name in self.compute_layout[axis]:
                # What follows an axis that comes later has to come later too.
                if along not in targets and fits(name, along) and not is_filled_up:
                    names[along] += (name,)
                    local[along] //= self.sizes[name]
                else:
                    uneven.append((name, along))
                    targets.add(along)
        moves = []
        lent: list[tuple[str, ...]] = [()] * len(array.shape)
        for name, target in uneven:
            places = [a for a in range(len(local)) if a not in targets and fits(name, a)]
            source = min(places, key=local.__getitem__, default=None)
            if source is not None:
                # The minor axis leaves first, so that what stays is in order.
                lent[source] = (name, *lent[source])
                local[source] //= self.sizes[name]
            moves.append(_Move((name,), self.sizes[name], source, target))
        return [a + b for a, b in zip(names, lent, strict=True)], tuple(moves)

    def spec(self, array: StateArray) -> jax.P:
        """The sharding in which an array of the state is stored."""
        return jax.P(*(names or None for names in self._storage(array)[0]))

    def stored_shape(self, array: StateArray) -> tuple[int, ...]:
        """The shape of a device's part of an array, as it is stored."""
        return tuple(_part(array.shape, self._storage(array)[0], self.sizes))

    def _is_filled_up(self, axis: int) -> bool:
        """Whether state has an axis longer than it is in use, as parameters are divided there."""
        length = self.shape[axis]
        is_divided = bool(self.parameter_layout[axis])
        return axis in self.parted and is_divided and _filled_up(length) > length

    def _used_shape(self, array: StateArray) -> list[int]:
        """That of a device's part of an array, as it is stored, without what is never used."""
        shape = [*self.stored_shape(array)]
        for axis in self.parted:
            along = array.axes[axis]
            if along is not None and self._is_filled_up(axis):
                shape[along] = self.shape[axis]
        return shape

    def from_storage(self, x: jax.Array, array: StateArray) -> jax.Array:
        """A device's part of an array, as it is stored -> as it is used."""
        return _apply(self._storage(array)[1], _fit(x, self._used_shape(array)))

    def to_storage(self, x: jax.Array, array: StateArray) -> jax.Array:
        """The inverse of `from_storage`."""
        used = _undo(self._storage(array)[1], x, self._used_shape(array))
        return _fit(used, self.stored_shape(array))


def _units(d_in: int, d_out: int, blocking: Blocking) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """The lengths of each side that have to stay together, and which sides are cut."""
    on_sides = blocking.preconditioned_sides(d_in, d_out)
    units = []
    for d, on in zip((d_in, d_out), on_sides, strict=True):
        block = blocking.block_length(d)
        # Edge blocks would begin at other places in each shard.
        whole_blocks = block if d % block == 0 else d
        units.append(whole_blocks if on else 1)
    return (units[0], units[1]), on_sides


def plan_sharding(
    shape: tuple[int, int, int], layout: Layout, sizes: Mapping[str, int], blocking: Blocking
) -> ShardingPlan:
    """Divides the work on a group of matrices over the axes of a mesh.

    Args:
      shape: `(n, d_in, d_out)` of the group.
      layout: of the parameters, the mesh axes along each axis of the group.
      sizes: of all mesh axes.
      blocking: what has to stay together.

    Returns:
      The plan.
    """
    units, on = _units(*shape[1:], blocking)
    work = [list(names) for names in layout]
    local = _filled_up_part(shape, layout, sizes, on)
    moves: list[_Move] = []

    def move(names: Sequence[str], source: int | None, target: int) -> None:
        size = size_of(names)
        moves.append(_Move((*names,), size, source, target))
        local[target] = -(-local[target] // size)
        work[target].extend(names)

    def size_of(names: Sequence[str]) -> int:
        return math.prod(sizes[name] for name in names)

    def least_padded(size: int) -> int:
        uneven = STACK, *_parted(on)  # where work can be divided unevenly
        return min(uneven, key=lambda axis: -(-local[axis] // size) * size / local[axis])

    for axis in (OUT, IN):
        leaving: list[str] = []
        while work[axis] and local[axis] % units[axis - 1]:
            leaving.insert(0, work[axis].pop())
            local[axis] *= sizes[leaving[0]]
        if leaving:
            move(leaving, axis, least_padded(size_of(leaving)))
    for name in sizes:
        if any(name in names for names in work):
            continue
        axes = zip((STACK, IN, OUT), (1, *units), strict=True)
        divisible = [axis for axis, unit in axes if local[axis] % (sizes[name] * unit) == 0]
        if divisible:
            move([name], None, divisible[0])
        elif local[least_padded(sizes[name])] > 1:
            move([name], None, least_padded(sizes[name]))
    compute_layout: Layout = (tuple(work[0]), tuple(work[1]), tuple(work[2]))
    return ShardingPlan(shape, sizes, layout, compute_layout, tuple(moves), on)
