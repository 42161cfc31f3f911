"""Refreshes cover the blocks exactly once in a round, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.blocking import Blocking
from mup_jax.transforms.schedule import Positions, RefreshSchedule
from mup_jax.transforms.sharding_plan import UNDIVIDED, plan_sharding

STEPS = 14
SIDE = 2


def divided(grid, sizes=None, layout=UNDIVIDED):
    """The plan of matrices whose blocks are a `grid`."""
    n, rows, columns = grid
    return plan_sharding(
        (n, rows * SIDE, columns * SIDE), layout, sizes or {}, Blocking(SIDE, 10_000)
    )


def history(schedule, positions):
    """Whether each step is early, and which blocks have their turn: `(steps,)`, `(steps, n)`."""
    steps = jnp.arange(STEPS)
    return (
        np.asarray(jax.vmap(schedule.is_early)(steps)),
        np.asarray(jax.vmap(lambda step: schedule.in_turn(positions, step))(steps)),
    )


# The number of blocks below, at, and above the frequency without being a multiple of it.
@pytest.mark.parametrize(
    ("grid", "frequency"), [((3, 1, 1), 5), ((2, 1, 2), 4), ((7, 1, 1), 3), ((2, 3, 2), 5)]
)
def test_staggered_refresh_takes_each_block_once_in_every_round(grid, frequency):
    schedule = RefreshSchedule(frequency)
    positions = Positions.of(grid, divided(grid))
    _, turns = history(schedule, positions)
    for begin in range(STEPS - frequency):
        np.testing.assert_array_equal(turns[begin : begin + frequency].sum(axis=0), 1)
    # No step has more than its share.
    most = -(-np.prod(grid) // frequency)
    assert turns.sum(axis=1).max() == most == schedule.most_in_turn([positions])


def test_blocks_of_several_pieces_take_turns_together():
    schedule, grid = RefreshSchedule(4), (3, 1, 1)
    first = Positions.of(grid, divided(grid))
    second = Positions.of(grid, divided(grid), first.number)
    both = sum(history(schedule, positions)[1].sum(axis=1) for positions in (first, second))
    assert both.max() == schedule.most_in_turn([first, second]) == 2


def test_refresh_without_stagger_takes_all_blocks_at_once():
    grid = (7, 1, 1)
    positions = Positions.of(grid, divided(grid))
    schedule = RefreshSchedule(3, stagger=False)
    _, turns = history(schedule, positions)
    np.testing.assert_array_equal(turns, (np.arange(STEPS) % 3 == 0)[:, None] * np.ones(7, bool))
    assert schedule.most_in_turn([positions]) == 7


def test_early_steps_come_at_intervals_that_grow():
    positions = Positions.of((1, 1, 1), divided((1, 1, 1)))
    early = lambda *args: np.flatnonzero(history(RefreshSchedule(*args), positions)[0])
    np.testing.assert_array_equal(early(3, 4), [0, 1, 2, 3, 4, 6, 9])
    np.testing.assert_array_equal(early(3, 1), [0])
    # Without overflow.
    np.testing.assert_array_equal(early(3, 2**30), np.arange(STEPS))


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
    plan = divided(grid, {"a": 4, "b": 2}, spec)
    assert plan.moves == ()
    schedule = RefreshSchedule(frequency)

    def turns(local, plan):
        positions = Positions.of(local, plan)
        steps = jnp.arange(STEPS)
        return jax.vmap(lambda step: schedule.in_turn(positions, step).reshape(local))(steps)

    n, rows, columns = plan.part
    run = jax.shard_map(
        lambda: turns((n, rows // SIDE, columns // SIDE), plan),
        mesh=mesh,
        in_specs=(),
        out_specs=jax.P(None, *(names or None for names in spec)),
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        got = jax.jit(run)()
    np.testing.assert_array_equal(got, turns(grid, divided(grid)))
