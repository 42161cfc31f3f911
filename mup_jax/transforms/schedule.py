"""When which block is refreshed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mup_jax.transforms.sharding_plan import IN, OUT, STACK, ShardingPlan


class Positions(NamedTuple):
    """Where the blocks `(n, rows, columns)` of a device's part stand in the order of all blocks.

    A block's turn is its position modulo the frequency: equal on every mesh, and even for the
    blocks of any device.
    """

    local: np.ndarray  # (blocks of a device,): position of each, but for `start`
    start: Any  # position of the device's first block
    number: int  # of the blocks on all devices

    @classmethod
    def of(cls, grid: tuple[int, ...], plan: ShardingPlan, first: int = 0) -> "Positions":
        """Of a part `grid` of blocks that come after `first` others."""
        # Matrix by matrix, then row by row: the stack is what every device has most of.
        n = plan.shape[STACK]
        parts = [plan.number_of_parts(axis) if plan.on[axis - 1] else 1 for axis in (IN, OUT)]
        whole = (n, grid[1] * parts[0], grid[2] * parts[1])
        strides = (1, n, n * whole[1])
        local = sum(
            stride * np.arange(length).reshape([-1 if a == axis else 1 for a in range(3)])
            for axis, (stride, length) in enumerate(zip(strides, grid, strict=True))
        )
        start: Any = first + plan.offset(STACK, n)
        for axis in (IN, OUT):
            if plan.on[axis - 1]:
                start = start + strides[axis] * plan.offset(axis, whole[axis])
        return cls(np.asarray(local).ravel(), start, int(np.prod(whole)))


@dataclass(frozen=True)
class RefreshSchedule:
    """Refreshes each block once in `frequency` steps.

    Staggered, the blocks take turns, so that no step costs more than another; otherwise all are
    refreshed at once. The first gradients say little of those that follow, so all are refreshed at
    each of the first `first_steps` steps, and then at intervals that grow by a step every
    `first_steps` steps until they are `frequency`.
    """

    frequency: int = 1
    first_steps: int = 1
    stagger: bool = True

    def is_early(self, steps_before: jax.Array) -> jax.Array:
        """Whether this is one of the early steps, at which all blocks are refreshed."""
        interval = 1 + steps_before // self.first_steps
        return (interval <= self.frequency) & (steps_before % interval == 0)

    def in_turn(self, positions: Positions, steps_before: jax.Array) -> jax.Array:
        """Which blocks have their turn: bool `(blocks,)`."""
        ahead = positions.local + positions.start if self.stagger else 0 * positions.local
        return (ahead - steps_before) % self.frequency == 0

    def most_in_turn(self, several: Sequence[Positions]) -> int:
        """How many blocks of a device may have their turn at one step."""
        if not self.stagger:
            return sum(len(positions.local) for positions in several)
        starts = [positions.start for positions in several]
        # Where the first block stands is known on one device alone.
        known = all(isinstance(start, int) for start in starts)
        turns = [
            np.bincount(
                (positions.local + (positions.start if known else 0)) % self.frequency,
                minlength=self.frequency,
            )
            for positions in several
        ]
        return int(np.sum(turns, axis=0).max() if known else np.max(turns, axis=1).sum())
