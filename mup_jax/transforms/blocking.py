"""A stack of matrices as stacks of equal blocks, and the schedule that refreshes them.

A side of length d is cut into d // b blocks of b and, where b does not divide d, one smaller block.
A matrix is then at most four *pieces*, each a grid of equal blocks: nothing is padded, so a block's
spectrum is that of the weights and the state has no dead entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Sides = Literal["both", "in", "out"]


class Segment(NamedTuple):
    """`number` consecutive blocks of `size`, beginning at `start`."""

    start: int
    size: int
    number: int


def _segments(length: int, block_size: int | None) -> list[Segment]:
    if block_size is None or length <= block_size:
        return [Segment(0, length, 1)]
    count, rest = divmod(length, block_size)
    segments = [Segment(0, block_size, count)]
    return [*segments, Segment(count * block_size, rest, 1)] if rest else segments


@dataclass(frozen=True)
class Blocking:
    """Which sides of `(d_in, d_out)` matrices are preconditioned, and how they are cut.

    A side that is left out by `sides`, or is longer than `max_preconditioner_dim`, has no
    preconditioner and is not cut.

    Raises:
      ValueError: an option is out of range, or no side of a matrix is left.
    """

    block_size: int | None
    max_preconditioner_dim: int
    sides: Sides = "both"

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: give a positive size, or None")
        if self.sides not in ("both", "in", "out"):
            raise ValueError(f"sides={self.sides!r}: choose 'both', 'in' or 'out'")

    def of(self, d_in: int, d_out: int) -> tuple[bool, bool]:
        """Whether the in side and the out side have a preconditioner."""
        on_in = self.sides != "out" and d_in <= self.max_preconditioner_dim
        on_out = self.sides != "in" and d_out <= self.max_preconditioner_dim
        return on_in, on_out

    def block_length(self, side: int) -> int:
        """The length of the blocks along a preconditioned side."""
        return side if self.block_size is None else min(side, self.block_size)

    def count(self, d_in: int, d_out: int) -> float:
        """The number of blocks of a matrix, d / b along each preconditioned side.

        A fraction where b does not divide d: an edge block counts by its size.
        """
        on_sides = zip((d_in, d_out), self.of(d_in, d_out), strict=True)
        return math.prod(d / self.block_length(d) for d, on in on_sides if on)

    def pieces(self, d_in: int, d_out: int) -> list[tuple[Segment, Segment]]:
        on_in, on_out = self.of(d_in, d_out)
        if not (on_in or on_out):
            raise ValueError(
                f"a {d_in}x{d_out} matrix has no side to precondition with sides={self.sides!r} and"
                f" max_preconditioner_dim={self.max_preconditioner_dim}: raise the limit, or give "
                "this leaf to another transformation with optax.partition"
            )
        rows = _segments(d_in, self.block_size if on_in else None)
        columns = _segments(d_out, self.block_size if on_out else None)
        return [(row, column) for row in rows for column in columns]

    def split(self, x: jax.Array) -> list[jax.Array]:
        """`(*stack, d_in, d_out)` -> for each piece `(*stack, rows, columns, b_in, b_out)`."""
        *stack, d_in, d_out = x.shape
        pieces = []
        for row, column in self.pieces(d_in, d_out):
            piece = x[
                ...,
                row.start : row.start + row.size * row.number,
                column.start : column.start + column.size * column.number,
            ]
            piece = piece.reshape(*stack, row.number, row.size, column.number, column.size)
            pieces.append(jnp.swapaxes(piece, -3, -2))
        return pieces

    def merge(self, pieces: list[jax.Array], d_in: int, d_out: int) -> jax.Array:
        """The inverse of `split`."""
        merged = []
        for piece in pieces:
            *stack, rows, columns, b_in, b_out = piece.shape
            piece = jnp.swapaxes(piece, -3, -2)
            merged.append(piece.reshape(*stack, rows * b_in, columns * b_out))
        n_columns = len({column.start for _, column in self.pieces(d_in, d_out)})
        lines = [
            jnp.concatenate(merged[i : i + n_columns], axis=-1)
            for i in range(0, len(merged), n_columns)
        ]
        return jnp.concatenate(lines, axis=-2)


def refresh(
    step: jax.Array,
    frequency: int,
    fresh: Callable[..., Any],
    current: Any,
    *operands: Any,
    stagger: bool,
    first: Callable[..., Any] | None = None,
    first_steps: int = 1,
    overdue: jax.Array | bool = False,
) -> Any:
    """Replaces `current` block by block, each block once in `frequency` steps.

    Staggered, a `frequency`-th of the blocks is refreshed each step, so that no step costs more
    than another; otherwise all of them where `step % frequency == 0`. During the first
    `first_steps` steps, and where `overdue`, every block is refreshed.

    Args:
      step: int32 scalar, counted from 0.
      frequency: steps between two refreshes of a block.
      fresh: `(current, *operands) -> current` on stacks of blocks `(N, ...)`.
      current: tree of `(*stack, rows, columns, ...)` arrays: the value to replace.
      *operands: trees of arrays with the same leading axes, read by `fresh`.
      stagger: whether to spread the refreshes over the steps.
      first: as `fresh`, for the first steps and where `overdue`; `fresh` when None.
      first_steps: for how many steps `first` runs.
      overdue: bool scalar, whether a block cannot wait for its turn.

    Returns:
      The new value of `current`.
    """
    if frequency < 1:
        raise ValueError(f"precondition_frequency={frequency}: give a positive number of steps")
    lead = jax.tree.leaves(current)[0].shape[:-2]
    flatten = lambda x: x.reshape(-1, *x.shape[len(lead) :])
    arguments = jax.tree.map(flatten, (current, *operands))
    n_blocks = jax.tree.leaves(arguments)[0].shape[0]
    n_due = -(-n_blocks // frequency) if stagger else n_blocks

    def refresh_due(arguments: Any) -> Any:
        begin = (step % frequency) * n_due if stagger else 0 * step
        start = jnp.minimum(begin, n_blocks - n_due)
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, n_due)
        old = jax.tree.map(take, arguments)
        # The last slice of a round may reach back over blocks that had their turn.
        due = start + jnp.arange(n_due) >= begin

        def put(x: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
            kept = jnp.where(due.reshape(-1, *[1] * (x.ndim - 1)), after, before)
            return jax.lax.dynamic_update_slice_in_dim(x, kept, start, 0)

        return jax.tree.map(put, arguments[0], old[0], fresh(*old))

    def refresh_all(arguments: Any) -> Any:
        return (first or fresh)(*arguments)

    if frequency == 1 and first is None:
        new = refresh_all(arguments)
    else:
        turn = step % frequency
        on_turn = turn * n_due < n_blocks if stagger else turn == 0
        at_once = overdue | (step < first_steps)
        branch = jnp.where(at_once, 2, jnp.where(on_turn, 1, 0))
        keep = lambda arguments: arguments[0]
        new = jax.lax.switch(branch, [keep, refresh_due, refresh_all], arguments)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), new, current)
