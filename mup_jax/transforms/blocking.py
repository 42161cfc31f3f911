"""A stack of matrices as stacks of equal blocks.

A side of length d is cut into d // b blocks of b and, where b does not divide d, one smaller block.
A matrix is then at most four *pieces*, each a grid of equal blocks. None is padded along a side
with a preconditioner, so its spectrum is that of the weights.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Sides = Literal["both", "in", "out"]
# Whether the in side and the out side are cut into blocks, each with a preconditioner.
PreconditionedSides = tuple[bool, bool]


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
      ValueError: an option is out of range; from `check`, no side is left.
    """

    block_size: int | None = None
    max_preconditioner_dim: int | None = None
    sides: Sides = "both"

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: give a positive size, or None")
        if self.sides not in ("both", "in", "out"):
            raise ValueError(f"sides={self.sides!r}: choose 'both', 'in' or 'out'")

    def preconditioned_sides(self, d_in: int, d_out: int) -> PreconditionedSides:
        """Whether the in side and the out side have a preconditioner."""
        limit = self.max_preconditioner_dim
        within = lambda d: limit is None or d <= limit
        return self.sides != "out" and within(d_in), self.sides != "in" and within(d_out)

    def block_length(self, side: int) -> int:
        """The length of the blocks along a preconditioned side."""
        return side if self.block_size is None else min(side, self.block_size)

    def count(self, d_in: int, d_out: int) -> float:
        """The number of blocks of a matrix, d / b along each preconditioned side.

        A fraction where b does not divide d: an edge block counts by its size.
        """
        on_sides = zip((d_in, d_out), self.preconditioned_sides(d_in, d_out), strict=True)
        return math.prod(d / self.block_length(d) for d, on in on_sides if on)

    def check(self, d_in: int, d_out: int) -> None:
        """Refuses matrices that have no preconditioned side."""
        if not any(self.preconditioned_sides(d_in, d_out)):
            raise ValueError(
                f"a {d_in}x{d_out} matrix has no side to precondition with sides={self.sides!r} and"
                f" max_preconditioner_dim={self.max_preconditioner_dim}: raise the limit, or give "
                "this leaf to another transformation with optax.partition"
            )

    def pieces(
        self, d_in: int, d_out: int, on: PreconditionedSides
    ) -> list[tuple[Segment, Segment]]:
        """The pieces of matrices, or of parts of larger ones, that are cut on these sides."""
        rows, columns = (
            _segments(d, self.block_size if cut else None)
            for d, cut in zip((d_in, d_out), on, strict=True)
        )
        return [(row, column) for row in rows for column in columns]

    def split(self, x: jax.Array, on: PreconditionedSides) -> list[jax.Array]:
        """`(n, d_in, d_out)` -> for each piece `(n, rows, columns, b_in, b_out)`.

        `on` says which sides are cut, as `preconditioned_sides` does: x may be a part of larger
        matrices.
        """
        n, d_in, d_out = x.shape
        pieces = []
        for row, column in self.pieces(d_in, d_out, on):
            piece = x[
                ...,
                row.start : row.start + row.size * row.number,
                column.start : column.start + column.size * column.number,
            ]
            piece = piece.reshape(n, row.number, row.size, column.number, column.size)
            pieces.append(jnp.swapaxes(piece, -3, -2))
        return pieces

    def merge(
        self, pieces: list[jax.Array], shape: tuple[int, ...], on: PreconditionedSides
    ) -> jax.Array:
        """The inverse of `split`, for x of a shape."""
        merged = []
        for piece in pieces:
            n, rows, columns, b_in, b_out = piece.shape
            piece = jnp.swapaxes(piece, -3, -2)
            merged.append(piece.reshape(n, rows * b_in, columns * b_out))
        n_columns = len({column.start for _, column in self.pieces(shape[-2], shape[-1], on)})
        lines = [
            jnp.concatenate(merged[i : i + n_columns], axis=-1)
            for i in range(0, len(merged), n_columns)
        ]
        return jnp.concatenate(lines, axis=-2)
