"""Refreshes cover the blocks exactly once in a round, on any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.blocking import Blocking
from mup_jax.transforms.division import UNDIVIDED, divide
from mup_jax.transforms.refresh import Turns, refresh

STEPS = 14
SIDE = 2


def divided(grid, sizes=None, layout=UNDIVIDED):
    """The division of matrices whose blocks are a `grid`."""
    n, rows, columns = grid
    return divide((n, rows * SIDE, columns * SIDE), layout, sizes or {}, Blocking(SIDE, 10_000))


def count_refreshes(blocks, division, frequency, stagger, late=False, exact=False, **options):
    """How often each block of a device was refreshed by the end of each step."""
    add = lambda number: lambda counts: jax.tree.map(lambda x: x + number, counts)
    first = add(1000) if exact else None
    turns = {"group": [Turns.of(blocks.shape[:3], division)]}

    def body(counts, step):
        overdue = {"group": [jnp.full(blocks.shape[:3], late)]}
        counts = refresh(
            step,
            frequency,
            add(1),
            counts,
            turns=turns,
            overdue=overdue,
            stagger=stagger,
            first=first,
            **options,
        )
        return counts, counts["group"][0]

    return jax.lax.scan(body, {"group": [blocks]}, jnp.arange(STEPS))[1]


@functools.cache
def refresh_counts(grid, frequency, stagger, **options):
    """`(steps, blocks)`, on one device."""
    # Blocks of two by three, to see that what is refreshed is whole.
    blocks = jnp.zeros((*grid, 2, 3), jnp.int32)
    count = jax.jit(lambda x: count_refreshes(x, divided(grid), frequency, stagger, **options))
    history = np.asarray(count(blocks)).reshape(STEPS, -1, 6)
    assert (history == history[:, :, :1]).all()
    return history[:, :, 0]


# The number of blocks below, at, and above the frequency without being a multiple of it.
@pytest.mark.parametrize(
    ("grid", "frequency"), [((3, 1, 1), 5), ((2, 1, 2), 4), ((7, 1, 1), 3), ((2, 3, 2), 5)]
)
def test_staggered_refresh_takes_each_block_once_in_every_round(grid, frequency):
    counts = refresh_counts(grid, frequency, stagger=True)
    np.testing.assert_array_equal(counts[0], 1)
    for begin in range(len(counts) - frequency):
        np.testing.assert_array_equal(counts[begin + frequency] - counts[begin], 1)
    # No step has more than its share.
    per_step = np.diff(counts, axis=0).sum(axis=1)
    assert per_step.max() == -(-counts.shape[1] // frequency)


def test_refresh_without_stagger_takes_all_blocks_at_once():
    counts = refresh_counts((7, 1, 1), 3, stagger=False)
    np.testing.assert_array_equal(counts, (1 + np.arange(STEPS) // 3)[:, None] * np.ones(7))


def test_stagger_at_frequency_one_is_no_stagger():
    np.testing.assert_array_equal(
        refresh_counts((2, 3, 1), 1, stagger=True), refresh_counts((2, 3, 1), 1, stagger=False)
    )


@pytest.mark.parametrize("stagger", [True, False])
def test_early_steps_have_their_own_function_at_intervals_that_grow(stagger):
    counts = refresh_counts((4, 1, 1), 3, stagger=stagger, exact=True, first_steps=4)
    early = np.isin(np.arange(STEPS), [0, 1, 2, 3, 4, 6, 9])
    np.testing.assert_array_equal(counts // 1000, np.cumsum(early)[:, None] * np.ones(4))
    np.testing.assert_array_equal(counts[13] - counts[10], 1)


def test_early_steps_are_counted_without_overflow():
    counts = refresh_counts((2, 1, 1), 3, stagger=True, first_steps=2**30)
    np.testing.assert_array_equal(counts, np.arange(1, STEPS + 1)[:, None] * np.ones(2))


def test_overdue_blocks_do_not_wait_for_their_turn():
    counts = refresh_counts((2, 1, 1), 7, stagger=True, late=True)
    np.testing.assert_array_equal(counts, np.arange(1, STEPS + 1)[:, None] * np.ones(2))


# The stack, the blocks of each side, or all of them over the devices.
@pytest.mark.parametrize("frequency", [3, 4])
@pytest.mark.parametrize(
    ("grid", "spec"),
    [
        ((8, 1, 2), (("a", "b"), (), ())),
        ((2, 4, 4), ((), ("a",), ("b",))),
        ((4, 8, 1), ((), ("a", "b"), ())),
        ((4, 2, 4), (("b",), (), ("a",))),
    ],
)
def test_turns_do_not_depend_on_the_devices(grid, spec, frequency):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    division = divided(grid, {"a": 4, "b": 2}, spec)
    assert division.moves == ()
    partition = jax.P(*(names or None for names in spec))
    run = jax.shard_map(
        lambda x: count_refreshes(x, division, frequency, True),
        mesh=mesh,
        in_specs=partition,
        out_specs=jax.P(None, *partition),
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        blocks = jax.device_put(jnp.zeros((*grid, 1, 1), jnp.int32), partition)
        counts = np.asarray(jax.jit(run)(blocks)).reshape(STEPS, -1)
    np.testing.assert_array_equal(counts, refresh_counts(grid, frequency, stagger=True))
