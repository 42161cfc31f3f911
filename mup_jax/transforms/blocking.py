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
      ValueError: an option is out of range; from `pieces`, `split` and `merge`, no side is left.
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
    overdue: jax.Array,
    first: Callable[..., Any] | None = None,
    first_steps: int = 1,
) -> Any:
    """Replaces the matrices of `current`, each once in `frequency` steps.

    Staggered, a `frequency`-th of every stack is refreshed at each step, so that no step costs more
    than another; otherwise all of them where `step % frequency == 0`. During the first
    `first_steps` steps, and where `overdue`, everything is refreshed.

    Args:
      step: int32 scalar, counted from 0.
      frequency: steps between two refreshes of a matrix.
      fresh: `(current, *operands) -> current`, on leaves of shape `(n, rows, columns)`.
      current: tree of `(..., rows, columns)` arrays: what to replace.
      *operands: trees of such arrays, read by `fresh`; leaves that belong to the same blocks have
        the same leading axes.
      stagger: whether to spread the refreshes over the steps.
      overdue: bool scalar: something would be used before its first refresh.
      first: as `fresh`, for the first steps and where overdue; `fresh` when None.
      first_steps: for how many steps `first` runs.

    Returns:
      The new value of `current`.
    """
    if frequency < 1:
        raise ValueError(f"precondition_frequency={frequency}: give a positive number of steps")
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), (current, *operands))
    turn = step % frequency

    def window(n: int) -> tuple[int, jax.Array, jax.Array]:
        """Length and start of the slice of a stack whose turn it is, and who in it is due."""
        length = -(-n // frequency)
        start = jnp.minimum(turn * length, n - length)
        # The last slices of a round may reach back over matrices that had their turn.
        due = start + jnp.arange(length) >= turn * length
        return length, start, due[:, None, None]

    def refresh_due(flat: Any) -> Any:
        def take(x: jax.Array) -> jax.Array:
            length, start, _ = window(len(x))
            return jax.lax.dynamic_slice_in_dim(x, start, length)

        def put(x: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            _, start, due = window(len(x))
            return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(due, new, old), start, 0)

        old = jax.tree.map(take, flat)
        return jax.tree.map(put, flat[0], old[0], fresh(*old))

    refresh_all = lambda flat: fresh(*flat)
    refresh_first = lambda flat: (first or fresh)(*flat)
    if frequency == 1:
        usual = refresh_all
    elif stagger:
        usual = refresh_due
    else:
        keep = lambda flat: flat[0]
        usual = lambda flat: jax.lax.cond(turn == 0, refresh_all, keep, flat)
    if first is None and frequency == 1:
        new = usual(flat)
    else:
        new = jax.lax.cond((step < first_steps) | overdue, refresh_first, usual, flat)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), new, current)
