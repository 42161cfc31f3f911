"""The schedule by which the preconditioners of blocks are computed anew."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mup_jax.transforms.accounting import counted
from mup_jax.transforms.division import IN, OUT, STACK, Division


class Turns(NamedTuple):
    """When the blocks `(n, rows, columns)` of a piece have their turn.

    The turn of a block is its position in the whole piece, modulo the frequency: equal on every
    mesh, and even for the blocks of any device.
    """

    local: np.ndarray  # (blocks of a device,): position of each, but for `start`
    start: Any  # position of the device's first block

    @classmethod
    def of(cls, grid: tuple[int, ...], division: Division) -> "Turns":
        """For the part `grid` of a piece that a device has."""
        # Matrix by matrix, then row by row: the stack is what every device has most of.
        n = division.shape[STACK]
        parts = [division.parts(axis) if division.cut[axis - 1] else 1 for axis in (IN, OUT)]
        whole = (n, grid[1] * parts[0], grid[2] * parts[1])
        strides = (1, n, n * whole[1])
        local = sum(
            stride * np.arange(length).reshape([-1 if a == axis else 1 for a in range(3)])
            for axis, (stride, length) in enumerate(zip(strides, grid, strict=True))
        )
        start: Any = division.offset(STACK, n)
        for axis in (IN, OUT):
            if division.cut[axis - 1]:
                start = start + strides[axis] * division.offset(axis, whole[axis])
        return cls(np.asarray(local).ravel(), start)

    def due(self, step: jax.Array, frequency: int) -> jax.Array:
        """Whose turn it is: bool `(blocks,)`."""
        return (self.local + self.start - step) % frequency == 0

    def table(self, frequency: int) -> np.ndarray:
        """For each turn the indices of its blocks; rows are filled with an index out of range."""
        members = [np.flatnonzero(self.local % frequency == turn) for turn in range(frequency)]
        table = np.full((frequency, max(map(len, members))), len(self.local), np.int32)
        for row, indices in zip(table, members, strict=True):
            row[: len(indices)] = indices
        return table

    def indices(self, step: jax.Array, frequency: int) -> jax.Array:
        """The blocks whose turn it is, filled with an index out of range."""
        return jnp.asarray(self.table(frequency))[(step - self.start) % frequency]


def refresh(
    step: jax.Array,
    frequency: int,
    fresh: Callable[..., Any],
    current: Any,
    *operands: Any,
    turns: Any,
    overdue: Any,
    stagger: bool,
    first: Callable[..., Any] | None = None,
    first_steps: int = 1,
) -> Any:
    """Replaces what belongs to a block, for each block once in `frequency` steps.

    Staggered, the blocks take turns, so that no step costs more than another; otherwise all are
    replaced where `step % frequency == 0`. The first gradients say little of those that follow, so
    all are replaced at each of the first `first_steps` steps, and then at intervals that grow by a
    step every `first_steps` steps until they are `frequency`. Those overdue are replaced at once.

    Args:
      step: int32 scalar, counted from 0.
      frequency: steps between two refreshes of a block.
      fresh: `(current, *operands) -> current`, on leaves of shape `(blocks, ...)`.
      current: `{group: [piece]}`, of trees of arrays `(n, rows, columns, ...)`: what to replace.
      *operands: likewise, read by `fresh`.
      turns: `{group: [Turns]}`.
      overdue: `{group: [(n, rows, columns) bool]}`: would be used before its first refresh.
      stagger: whether to spread the refreshes over the steps.
      first: as `fresh`, for those early steps and what is overdue; `fresh` when None.
      first_steps: how long all are replaced at every step, and each longer interval lasts.

    Returns:
      The new value of `current`.
    """
    is_turns = lambda x: isinstance(x, Turns)
    pieces = jax.tree.leaves(turns, is_leaf=is_turns)
    if not pieces:
        return current
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), (current, *operands))
    late = jax.tree.map(jnp.ravel, overdue)

    def each(function: Callable, tree: Any, *trees: Any) -> Any:
        """Over the arrays of every piece, beside one value a piece."""
        at_piece = lambda value, *parts: jax.tree.map(lambda *xs: function(value, *xs), *parts)
        return jax.tree.map(at_piece, tree, *trees, is_leaf=is_turns)

    def choose(due: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(due.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    interval = 1 + step // first_steps
    early = (interval <= frequency) & (step % interval == 0)

    def refresh_first(flat: Any) -> Any:
        def due(turn: Turns, late: jax.Array) -> jax.Array:
            in_turn = turn.due(step, frequency) if stagger else step % frequency == 0
            return late | in_turn | early

        return each(choose, each(due, turns, late), flat[0], (first or fresh)(*flat))

    def refresh_due(turns: Any, flat: Any) -> Any:
        def due(turn: Turns) -> jax.Array:
            return jnp.where(is_first, len(turn.local), turn.indices(step, frequency))

        indices = jax.tree.map(due, turns, is_leaf=is_turns)
        old = tuple(each(lambda i, x: x.at[i].get(mode="clip"), indices, part) for part in flat)
        put = lambda i, x, new: x.at[i].set(new, mode="drop")
        return each(put, indices, flat[0], fresh(*old))

    def refresh_piece(turn: Turns, *parts: Any) -> Any:
        """Only in those steps in which one of few blocks has its turn."""
        alone = lambda x: {"piece": [x]}
        refreshed = lambda *parts: refresh_due(alone(turn), tuple(map(alone, parts)))["piece"][0]
        share = min(1.0, len(turn.local) / frequency)
        due = ~is_first & jnp.any(turn.due(step, frequency))
        branch = counted(share, refreshed)
        return jax.lax.cond(due, branch, lambda current, *_: current, *parts)

    refresh_all = lambda flat: fresh(*flat)
    keep = lambda flat: flat[0]
    if frequency == 1 and first is None:
        new = refresh_all(flat)
    else:
        is_first = early | jnp.any(jnp.concatenate(jax.tree.leaves(late)))
        first_branch = counted(0, refresh_first)
        flat = (jax.lax.cond(is_first, first_branch, keep, flat), *flat[1:])
        if frequency == 1 or not stagger:
            due = ~is_first & (step % frequency == 0)
            new = jax.lax.cond(due, counted(1 / frequency, refresh_all), keep, flat)
        elif all(len(piece.local) >= frequency for piece in pieces):
            # Not a branch, which would copy all to change a part.
            new = refresh_due(turns, flat)
        else:
            new = jax.tree.map(refresh_piece, turns, *flat, is_leaf=is_turns)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), new, current)
