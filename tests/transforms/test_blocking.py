"""Blocks cover a matrix exactly once; refreshes cover the blocks exactly once in a round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.blocking import Blocking, refresh

FAR = 10_000


@pytest.mark.parametrize(
    ("shape", "blocking", "pieces"),
    [
        ((8, 12), Blocking(None, FAR), [(1, 1, 8, 12)]),
        ((8, 12), Blocking(16, FAR), [(1, 1, 8, 12)]),
        ((8, 12), Blocking(4, FAR), [(2, 3, 4, 4)]),
        ((3, 8, 12), Blocking(8, FAR), [(3, 1, 1, 8, 8), (3, 1, 1, 8, 4)]),
        ((9, 8), Blocking(4, FAR), [(2, 2, 4, 4), (1, 2, 1, 4)]),
        (
            (2, 7, 11),
            Blocking(3, FAR),
            [(2, 2, 3, 3, 3), (2, 2, 1, 3, 2), (2, 1, 3, 1, 3), (2, 1, 1, 1, 2)],
        ),
        ((7, 11), Blocking(3, FAR, "in"), [(2, 1, 3, 11), (1, 1, 1, 11)]),
        ((7, 11), Blocking(3, FAR, "out"), [(1, 3, 7, 3), (1, 1, 7, 2)]),
        ((7, 11), Blocking(3, max_preconditioner_dim=10), [(2, 1, 3, 11), (1, 1, 1, 11)]),
        ((2, 2), Blocking(1, FAR), [(2, 2, 1, 1)]),
    ],
)
def test_split_cuts_equal_blocks_and_merge_undoes_it(shape, blocking, pieces):
    x = np.arange(np.prod(shape)).reshape(shape)
    split = blocking.split(x)
    assert [piece.shape for piece in split] == pieces
    np.testing.assert_array_equal(blocking.merge(split, *shape[-2:]), x)
    *_, d_in, d_out = shape
    first = split[0][..., 0, 0, :, :]
    np.testing.assert_array_equal(first, x[..., : first.shape[-2], : first.shape[-1]])
    # One block of the count stands for a full block: fractions count the smaller ones by size.
    on_sides = blocking.of(d_in, d_out)
    full = [
        blocking.block_length(d) if on else d for d, on in zip((d_in, d_out), on_sides, strict=True)
    ]
    assert blocking.count(d_in, d_out) == pytest.approx(d_in * d_out / np.prod(full))


def test_block_count_is_a_fraction_where_blocks_do_not_divide():
    assert Blocking(8, FAR).count(12, 20) == pytest.approx(1.5 * 2.5)
    assert Blocking(8, 15).count(12, 20) == pytest.approx(1.5)
    assert Blocking(None, FAR).count(12, 20) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blocking(0, FAR), "block_size=0"),
        (lambda: Blocking(4, FAR, "left"), "sides='left'"),
        (lambda: Blocking(4, 10).pieces(11, 12), "optax.partition"),
        (lambda: Blocking(4, 10, "in").pieces(11, 3), "sides='in'"),
    ],
)
def test_impossible_blockings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@functools.cache
def refresh_counts(grid, frequency, stagger, steps=14, **options):
    """How often each block of a `grid` was refreshed by the end of each step: `(steps, blocks)`."""
    exact = lambda counts: counts + 1
    first = (lambda counts: counts + 1000) if options.pop("exact", False) else None
    options = {"overdue": False} | options

    @jax.jit
    def body(counts, step):
        counts = refresh(step, frequency, exact, counts, stagger=stagger, first=first, **options)
        return counts, counts.reshape(-1)

    # Blocks of two by three, to see that what is refreshed is whole.
    blocks = jnp.zeros((*grid, 2, 3), jnp.int32)
    history = np.asarray(jax.lax.scan(body, blocks, jnp.arange(steps))[1])
    history = history.reshape(steps, -1, 6)
    assert (history == history[:, :, :1]).all()
    return history[:, :, 0]


# The number of blocks below, at, and above the frequency without being a multiple of it.
@pytest.mark.parametrize(("grid", "frequency"), [((3, 1), 5), ((2, 1, 2), 4), ((7, 1), 3)])
def test_staggered_refresh_takes_each_block_once_in_every_round(grid, frequency):
    counts = refresh_counts(grid, frequency, stagger=True)
    np.testing.assert_array_equal(counts[0], 1)
    for begin in range(len(counts) - frequency):
        np.testing.assert_array_equal(counts[begin + frequency] - counts[begin], 1)
    # No step has more than its share.
    per_step = np.diff(counts, axis=0).sum(axis=1)
    assert per_step.max() == -(-counts.shape[1] // frequency)


def test_refresh_without_stagger_takes_all_blocks_at_once():
    counts = refresh_counts((7, 1), 3, stagger=False)
    np.testing.assert_array_equal(counts, (1 + np.arange(14) // 3)[:, None] * np.ones(7))


def test_stagger_at_frequency_one_is_no_stagger():
    np.testing.assert_array_equal(
        refresh_counts((2, 3), 1, stagger=True), refresh_counts((2, 3), 1, stagger=False)
    )


def test_the_first_steps_have_their_own_function():
    counts = refresh_counts((3, 1), 3, stagger=True, exact=True, first_steps=2)
    np.testing.assert_array_equal(counts[:2], [[1000] * 3, [2000] * 3])
    np.testing.assert_array_equal(counts[4] - counts[1], 1)


def test_overdue_blocks_do_not_wait_for_their_turn():
    counts = refresh_counts((2, 1), 7, stagger=True, overdue=True)
    np.testing.assert_array_equal(counts, np.arange(1, 15)[:, None] * np.ones(2))


def test_frequency_is_positive():
    with pytest.raises(ValueError, match="precondition_frequency=0"):
        refresh_counts((1, 1), 0, stagger=True)
