"""When which block is refreshed, and the loop that refreshes those that are due."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mup_jax.transforms.accounting import counted
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


def check_alike(new: Any, old: Any) -> None:
    """Refuses what a rule returns for a state of another structure, or of arrays of other shapes.

    Raises:
      ValueError: that says both.
    """
    structures = [jax.tree.structure(tree) for tree in (new, old)]
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (new, old)]
    for got, want in (structures, shapes):
        if got != want:
            raise ValueError(f"a rule returned {got} for {want}: return what `init` does")


@dataclass(frozen=True)
class PassedOn:
    """Which leaves of a state a function returns as they are."""

    treedef: Any
    flags: list[bool]

    def split(self, state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        """The leaves that change, and those that do not."""
        pairs = list(zip(jax.tree.leaves(state), self.flags, strict=True))
        return [x for x, kept in pairs if not kept], [x for x, kept in pairs if kept]

    def join(self, changing: list[jax.Array], rest: list[jax.Array]) -> Any:
        """The inverse of `split`."""
        of = {False: iter(changing), True: iter(rest)}
        return jax.tree.unflatten(self.treedef, [next(of[kept]) for kept in self.flags])


def passed_on(
    function: Callable[[Any, Any], tuple[Any, Any]], state: Any, inputs: Any
) -> tuple[PassedOn, Any]:
    """What `function(state, inputs) -> (outputs, state)` returns as it is, and abstract outputs."""
    treedef = jax.tree.structure(state)
    flags: list[bool] = []

    def probe(state: Any, inputs: Any) -> Any:
        outputs, new = function(state, inputs)
        check_alike(new, state)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
        flags.extend(old is new for old, new in pairs)
        return outputs

    outputs = jax.eval_shape(probe, state, inputs)
    return PassedOn(treedef, flags), outputs


def refresh_where(
    refresh: Callable[[Any], Any],
    states: list[Any],
    due: list[jax.Array],
    *,
    at_once: int,
    share: float,
    rounds_before: jax.Array | int = 0,
) -> tuple[list[Any], jax.Array]:
    """Refreshes the blocks that are due, in place and a few at a time.

    Args:
      refresh: of a state of one block.
      states: trees of arrays `(blocks, ...)`, alike but for the number of blocks.
      due: for each of them bool `(blocks,)`.
      at_once: how many blocks make one round of the loop.
      share: of the blocks refreshed in a usual step, for counts of operations.
      rounds_before: of another such loop, which has to end before this one begins; see
        `platforms.after`.

    Returns:
      The new states, and the number of rounds so far.
    """
    sizes = [len(flags) for flags in due]
    starts = np.cumsum([0, *sizes[:-1]])
    total = sum(sizes)
    at_once = min(at_once, total)
    flags = jnp.concatenate(due)
    # Longer than one round takes: of a loop that takes all of them at once, the compiler would see
    # that it does not depend on the round, and do the work before it, due or not.
    order = jnp.flatnonzero(flags, size=total + at_once, fill_value=total)

    # What the rule passes on unchanged stays out of the loop.
    part = lambda tree: jax.tree.map(lambda x: x[:1], tree)
    kept, _ = passed_on(lambda state, _: ((), jax.vmap(refresh)(state)), part(states[0]), ())
    changing, rest = zip(*(kept.split(state) for state in states), strict=True)

    def one_round(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        changing, rounds = carry
        chosen = jax.lax.dynamic_slice_in_dim(order, i * at_once, at_once)
        # The places in each tree of those that lie in it; others are out of its range.
        places = [
            jnp.where((chosen >= start) & (chosen < start + size), chosen - start, size)
            for start, size in zip(starts, sizes, strict=True)
        ]

        def gather(*stacks: jax.Array) -> jax.Array:
            taken = stacks[0].at[places[0]].get(mode="clip")
            for stack, place in zip(stacks[1:], places[1:], strict=True):
                inside = (place < len(stack)).reshape(-1, *[1] * (stack.ndim - 1))
                taken = jnp.where(inside, stack.at[place].get(mode="clip"), taken)
            return taken

        blocks = jax.tree.map(gather, *map(kept.join, changing, rest))
        fresh, _ = kept.split(jax.vmap(refresh)(blocks))
        changing = [
            [
                x.at[place].set(new.astype(x.dtype), mode="drop")
                for x, new in zip(xs, fresh, strict=True)
            ]
            for place, xs in zip(places, changing, strict=True)
        ]
        return changing, rounds + 1

    rounds = (jnp.sum(flags, dtype=jnp.int32) + at_once - 1) // at_once
    rounds = jnp.minimum(rounds, rounds + rounds_before)
    body = counted(share * total / at_once, one_round)
    before = jnp.asarray(rounds_before, jnp.int32)
    changing, done = jax.lax.fori_loop(0, rounds, body, (list(changing), before))
    return list(map(kept.join, changing, rest)), done
