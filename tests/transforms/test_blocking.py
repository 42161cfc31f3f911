"""Blocks cover a matrix exactly once."""

import numpy as np
import pytest

from mup_jax.transforms.blocking import Blocking

FAR = 10_000


@pytest.mark.parametrize(
    ("shape", "blocking", "pieces"),
    [
        ((1, 8, 12), Blocking(None, FAR), [(1, 1, 1, 8, 12)]),
        ((1, 8, 12), Blocking(16, FAR), [(1, 1, 1, 8, 12)]),
        ((1, 8, 12), Blocking(4, FAR), [(1, 2, 3, 4, 4)]),
        ((3, 8, 12), Blocking(8, FAR), [(3, 1, 1, 8, 8), (3, 1, 1, 8, 4)]),
        ((1, 9, 8), Blocking(4, FAR), [(1, 2, 2, 4, 4), (1, 1, 2, 1, 4)]),
        (
            (2, 7, 11),
            Blocking(3, FAR),
            [(2, 2, 3, 3, 3), (2, 2, 1, 3, 2), (2, 1, 3, 1, 3), (2, 1, 1, 1, 2)],
        ),
        ((2, 7, 11), Blocking(3, FAR, "in"), [(2, 2, 1, 3, 11), (2, 1, 1, 1, 11)]),
        ((1, 7, 11), Blocking(3, FAR, "out"), [(1, 1, 3, 7, 3), (1, 1, 1, 7, 2)]),
        ((1, 7, 11), Blocking(3, 10), [(1, 2, 1, 3, 11), (1, 1, 1, 1, 11)]),
        ((1, 2, 2), Blocking(1, FAR), [(1, 2, 2, 1, 1)]),
    ],
)
def test_split_cuts_equal_blocks_and_merge_undoes_it(shape, blocking, pieces):
    x = np.arange(np.prod(shape)).reshape(shape)
    *_, d_in, d_out = shape
    cut = blocking.preconditioned_sides(d_in, d_out)
    split = blocking.split(x, cut)
    assert [piece.shape for piece in split] == pieces
    np.testing.assert_array_equal(blocking.merge(split, shape, cut), x)
    first = split[0][..., 0, 0, :, :]
    np.testing.assert_array_equal(first, x[..., : first.shape[-2], : first.shape[-1]])
    # One block of the count stands for a full block: fractions count the smaller ones by size.
    on_sides = blocking.preconditioned_sides(d_in, d_out)
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
        (lambda: Blocking(4, 10).check(11, 12), "optax.partition"),
        (lambda: Blocking(4, 10, "in").check(11, 3), "sides='in'"),
    ],
)
def test_impossible_blockings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
