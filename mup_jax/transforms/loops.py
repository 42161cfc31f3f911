"""Loops that change the state of many blocks in place, a part of them at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mup_jax.transforms.accounting import counted

# Work on many entries is done an eighth at a time, so that what it needs beside gradients and state
# is small; but not on fewer at once than the first of these, 4 MiB an array, nor on more than the
# second.
_AT_ONCE = (2**20, 2**23)
_PARTS = 8


def at_once_of(entries: int) -> int:
    """How many of so many entries of matrices to work on at once."""
    return max(_AT_ONCE[0], min(_AT_ONCE[1], entries // _PARTS))


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


def in_parts(
    function: Callable[[Any, Any], tuple[Any, Any]], entries: int, state: Any, inputs: Any
) -> tuple[Any, Any]:
    """`function(state, inputs) -> (outputs, state)` on parts of the first axis, if there is much.

    The state is changed in place, so that a part at a time is in memory beside it.
    """
    n = len(jax.tree.leaves(inputs)[0])
    sizes = (size for size in range(n, 0, -1) if n % size == 0)
    size = next((size for size in sizes if size * entries <= n * at_once_of(entries)), 1)
    if size == n:
        return function(state, inputs)
    kept, abstract = passed_on(function, state, inputs)
    changing, rest = kept.split(state)

    def one_part(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        take = lambda tree: jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), tree
        )
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i * size, 0)
        outputs, changing = carry
        part, new = function(take(kept.join(changing, rest)), take(inputs))
        new, _ = kept.split(new)
        return jax.tree.map(put, outputs, part), jax.tree.map(put, changing, new)

    outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    outputs, changing = jax.lax.fori_loop(0, n // size, one_part, (outputs, changing))
    return outputs, kept.join(changing, rest)


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
