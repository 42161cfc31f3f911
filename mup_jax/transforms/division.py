"""How the matrices of a group are divided over the devices of a mesh.

Parameters arrive in the layout that the model gave them; a device works on whole matrices, or on
whole blocks of matrices. So a mesh axis along which a shard holds whole blocks stays where it is,
and any other is moved to the stack: each device then has fewer matrices, and more of each. Where
matrices are few and one of their sides has no preconditioner (a vocabulary), it is moved to that
side, which may be divided at any place. Such a move is one all-to-all, and its way back another.
Axes over which a parameter is replicated divide the work too: on the way in a device takes its part
of what it has, on the way back parts are gathered.

State is stored as it is worked on, unless the devices do not divide it evenly.
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


class _Move(NamedTuple):
    """One mesh axis on its way from an array axis (None: replicated) to another."""

    name: str
    size: int
    source: int | None
    target: int

    def enter(self, x: jax.Array) -> jax.Array:
        """Pads the target axis with zeros where the devices do not divide it."""
        missing = -x.shape[self.target] % self.size
        if missing:
            x = jnp.pad(x, [(0, missing if a == self.target else 0) for a in range(x.ndim)])
        if self.source is not None:
            return jax.lax.all_to_all(x, self.name, self.target, self.source, tiled=True)
        part = x.shape[self.target] // self.size
        start = jax.lax.axis_index(self.name) * part
        return jax.lax.dynamic_slice_in_dim(x, start, part, self.target)

    def leave(self, x: jax.Array, length: int) -> jax.Array:
        """The inverse of `enter`; `length` is that of the target axis before it."""
        if self.source is None:
            x = jax.lax.all_gather(x, self.name, axis=self.target, tiled=True)
        else:
            x = jax.lax.all_to_all(x, self.name, self.source, self.target, tiled=True)
        return jax.lax.slice_in_dim(x, 0, length, axis=self.target)


def _enter(moves: tuple[_Move, ...], x: jax.Array) -> jax.Array:
    return functools.reduce(lambda x, move: move.enter(x), moves, x)


def _leave(moves: tuple[_Move, ...], x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The inverse of `_enter` on an array of `shape`."""
    lengths, n = [], dict(enumerate(shape))
    for move in moves:
        lengths.append(n[move.target])
        n[move.target] = -(-n[move.target] // move.size)
        if move.source is not None:
            n[move.source] *= move.size
    for move, length in zip(reversed(moves), reversed(lengths), strict=True):
        x = move.leave(x, length)
    return x


def _part(
    shape: Sequence[int], layout: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> list[int]:
    """The shape of a device's part of an array."""
    return [
        length // math.prod(sizes[name] for name in names)
        for length, names in zip(shape, layout, strict=True)
    ]


@dataclass(frozen=True)
class Division:
    """Where the axes of a mesh lie on a group of matrices `(n, d_in, d_out)`.

    Attributes:
      shape: of the whole group.
      sizes: of the mesh axes.
      given: the layout in which gradients arrive.
      work: the layout in which they are worked on.
      moves: from the one to the other.
      cut: whether the in and the out side are cut into blocks; a side that is not, beside one that
        is, may be divided at any place, and sums over it run over devices.
    """

    shape: tuple[int, int, int]
    sizes: Mapping[str, int]
    given: Layout
    work: Layout
    moves: tuple[_Move, ...]
    cut: tuple[bool, bool]

    def parts(self, axis: int) -> int:
        """Into how many parts an axis of the group is divided for the work."""
        return math.prod(self.sizes[name] for name in self.work[axis])

    def enter(self, x: jax.Array) -> jax.Array:
        """A device's part of a group, in the layout given -> in that of the work."""
        return _enter(self.moves, x)

    def leave(self, x: jax.Array) -> jax.Array:
        """The inverse of `enter`."""
        return _leave(self.moves, x, _part(self.shape, self.given, self.sizes))

    def offset(self, axis: int, length: int) -> jax.Array | int:
        """Where a device's part of an axis of the group begins, of `length` parts in all."""
        offset: Any = 0
        for name in self.work[axis]:
            # As a move fills up the last part.
            length = -(-length // self.sizes[name])
            offset = offset + length * jax.lax.axis_index(name)
        return offset

    def over(self, reduction: Any, x: jax.Array, *axes: int) -> jax.Array:
        """`jax.lax.psum`, `pmax` or `pmin` over the devices along the given axes of the group."""
        names = tuple(name for axis in axes for name in self.work[axis])
        return reduction(x, names) if names else x

    def over_uncut(self, reduction: Any, x: jax.Array) -> jax.Array:
        """As `over`, over the devices that have parts of the same block."""
        uncut = (axis for axis, cut in zip((IN, OUT), self.cut, strict=True) if not cut)
        return self.over(reduction, x, *uncut)

    def _stored(self, shape: tuple[int, ...]) -> tuple[list[tuple[str, ...]], tuple[_Move, ...]]:
        """How a state array `(n, d_in, d_out)` or `(n, rows, columns, d, d)` is stored.

        Mesh axes that do not divide theirs lie along the last but one or the last axis, or nowhere.
        """
        names: list[tuple[str, ...]] = [()] * len(shape)
        local = list(shape)
        moves: list[_Move] = []

        def fits(name: str, axis: int) -> bool:
            return local[axis] % self.sizes[name] == 0

        def lay(name: str, axis: int) -> None:
            local[axis] //= self.sizes[name]
            names[axis] += (name,)

        uneven: list[tuple[str, int]] = []
        for axis in (IN, OUT, STACK):
            if axis == STACK or len(shape) == 3 or self.cut[axis - 1]:
                for name in self.work[axis]:
                    # What follows an axis that comes later has to come later too.
                    if fits(name, axis) and axis not in {target for _, target in uneven}:
                        lay(name, axis)
                    else:
                        uneven.append((name, axis))
        for name, target in uneven:
            places = [axis % len(shape) for axis in (-2, -1)]
            places = [axis for axis in places if axis != target and fits(name, axis)]
            if places:
                lay(name, places[0])
            moves.append(_Move(name, self.sizes[name], places[0] if places else None, target))
        return names, tuple(moves)

    def spec(self, shape: tuple[int, ...]) -> jax.P:
        """The sharding of a state array of this (global) shape."""
        return jax.P(*(names or None for names in self._stored(shape)[0]))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a device's part of a state array, as it is stored."""
        return tuple(_part(shape, self._stored(shape)[0], self.sizes))

    def enter_state(self, x: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
        """A device's part of a `whole` state array, as it is stored -> as it is used."""
        return _enter(self._stored(whole.shape)[1], x)

    def leave_state(self, x: jax.Array, whole: jax.ShapeDtypeStruct) -> jax.Array:
        """The inverse of `enter_state`."""
        return _leave(self._stored(whole.shape)[1], x, self.stored_shape(whole.shape))


def _units(d_in: int, d_out: int, blocking: Blocking) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """The lengths of each side that have to stay together, and which sides are cut into blocks."""
    cut = blocking.of(d_in, d_out)
    units = []
    for d, on in zip((d_in, d_out), cut, strict=True):
        block = blocking.block_length(d)
        # Edge blocks would begin at other places in each shard.
        whole_blocks = block if d % block == 0 else d
        units.append(whole_blocks if on else 1)
    return (units[0], units[1]), cut


def divide(
    shape: tuple[int, int, int], given: Layout, sizes: Mapping[str, int], blocking: Blocking
) -> Division:
    """Divides the work on a group of matrices over the axes of a mesh.

    Args:
      shape: `(n, d_in, d_out)` of the group.
      given: the mesh axes along each of them.
      sizes: of all mesh axes.
      blocking: what has to stay together.

    Returns:
      The division.
    """
    units, cut = _units(*shape[1:], blocking)
    work = [list(names) for names in given]
    local = _part(shape, given, sizes)
    moves: list[_Move] = []

    def move(name: str, source: int | None, target: int) -> None:
        moves.append(_Move(name, sizes[name], source, target))
        local[target] = -(-local[target] // sizes[name])
        work[target].append(name)

    # Where work can be divided unevenly: the stack, and the free side of one-sided matrices.
    free = [axis for axis in (IN, OUT) if any(cut) and not cut[axis - 1]]

    def least_padded(name: str) -> int:
        size = sizes[name]
        return min((STACK, *free), key=lambda axis: -(-local[axis] // size) * size / local[axis])

    for axis in (OUT, IN):
        while work[axis] and local[axis] % units[axis - 1]:
            name = work[axis].pop()
            local[axis] *= sizes[name]
            move(name, axis, least_padded(name))
    for name in sizes:
        if any(name in names for names in work):
            continue
        axes = zip((STACK, IN, OUT), (1, *units), strict=True)
        divisible = [axis for axis, unit in axes if local[axis] % (sizes[name] * unit) == 0]
        if divisible:
            move(name, None, divisible[0])
        elif local[least_padded(name)] > 1:
            move(name, None, least_padded(name))
    layout: Layout = (tuple(work[0]), tuple(work[1]), tuple(work[2]))
    return Division(shape, sizes, given, layout, tuple(moves), cut)
