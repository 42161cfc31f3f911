"""Arrays of any rank as stacks of matrices."""

import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from mup_jax.transforms.matrices import matrix_layout

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "numbers", "matrix_shape"),
    [
        ((3, 5), None, (3, 5)),
        ((3, 5), MuonDimensionNumbers(1, 0), (5, 3)),
        ((2, 3, 5), MuonDimensionNumbers(-2, -1), (2, 3, 5)),
        ((2, 3, 5), MuonDimensionNumbers(2, 0), (3, 5, 2)),
        ((2, 3, 5), MuonDimensionNumbers(0, (1, 2)), (2, 15)),
        ((2, 3, 5), MuonDimensionNumbers((1, -3), 2), (6, 5)),
        ((2, 3, 5, 7), MuonDimensionNumbers((0, 1, 2), 3), (30, 7)),
        ((2, 3, 5, 7), MuonDimensionNumbers(1, 3), (2, 5, 3, 7)),
    ],
)
def test_matrices_and_back(shape, numbers, matrix_shape):
    x = normal(*shape)
    layout = matrix_layout(shape, numbers)
    matrices = layout.to_matrices(x)
    assert layout.matrix_shape == matrix_shape
    assert matrices.shape == layout.group_shape == (np.prod(matrix_shape[:-2]), *matrix_shape[-2:])
    np.testing.assert_array_equal(layout.from_matrices(matrices), x)


def test_entries_go_where_the_axes_say():
    x = normal(2, 3, 5, 7)
    matrices = matrix_layout(x.shape, MuonDimensionNumbers((2, 0), 3)).to_matrices(x)
    # One stack axis is left, and fan-in counts through the first axis named slowest.
    np.testing.assert_array_equal(matrices[1, 4 * 2 + 1], x[1, 1, 4])


@pytest.mark.parametrize(
    ("shape", "numbers", "message"),
    [
        ((), None, "optax.partition"),
        ((4,), None, "optax.partition"),
        ((0, 4), None, "optax.partition"),
        ((2, 3, 4), None, "weight_dimension_numbers"),
        ((4,), MuonDimensionNumbers(0, 1), "optax.partition"),
        ((3, 4), MuonDimensionNumbers(0, 2), "out of range"),
        ((3, 4), MuonDimensionNumbers(-3, 1), "out of range"),
        ((3, 4), MuonDimensionNumbers((), 1), "out of range"),
        ((3, 4), MuonDimensionNumbers(0, -2), "twice"),
        ((2, 3, 4), MuonDimensionNumbers((0, 1), (1, 2)), "twice"),
    ],
)
def test_what_is_not_a_matrix_is_refused_by_name(shape, numbers, message):
    with pytest.raises(ValueError, match=message) as error:
        matrix_layout(shape, numbers, "['head']")
    assert "['head']" in str(error.value)
