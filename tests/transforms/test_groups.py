"""Leaves of one matrix shape as one array, and where the work on it goes on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from mup_jax.transforms.groups import MatrixGroups
from mup_jax.transforms.sharding_plan import StateArray

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mixed_tree():
    return {
        "plain": normal(3, 5),
        "transposed": normal(5, 3),
        "layers": normal(2, 3, 5),
        "half": normal(3, 5).astype(jnp.bfloat16),
        "masked": optax.MaskedNode(),
    }


MIXED_NUMBERS = {
    "plain": MuonDimensionNumbers(),
    "transposed": MuonDimensionNumbers(1, 0),
    "layers": MuonDimensionNumbers(-2, -1),
    "half": MuonDimensionNumbers(),
    "masked": None,
}


def run_step(tree, numbers, step):
    """One step of an optimizer whose only state is the last gradient."""
    groups = MatrixGroups(tree, numbers)
    arrays = {k: StateArray(p.shape, jnp.float32, (0, 1, 2)) for k, p in groups.plans.items()}
    state = groups.init(lambda plan: jnp.zeros(plan.part), arrays)
    return groups.run(step, tree, state, arrays)


def identity(gradients, healthy, state):
    return gradients, gradients


def test_leaves_of_one_matrix_shape_share_an_array():
    _, state, _ = run_step(mixed_tree(), MIXED_NUMBERS, identity)
    assert {k: x.shape for k, x in state.items()} == {"3x5": (3, 3, 5), "2x3x5": (2, 3, 5)}
    assert all(x.dtype == jnp.float32 for x in state.values())


def test_directions_have_the_places_and_dtypes_of_the_gradients():
    tree = mixed_tree()
    directions, _, skipped = run_step(tree, lambda params: MIXED_NUMBERS, identity)
    assert skipped == 0
    assert jax.tree.structure(directions) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(directions), jax.tree.leaves(tree), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_layers_of_several_leaves_alternate():
    """So that a mesh axis along the layers cuts the group in contiguous parts."""
    tree = [normal(2, 3, 5), normal(2, 3, 5)]
    _, state, _ = run_step(tree, MuonDimensionNumbers(-2, -1), identity)
    np.testing.assert_array_equal(state["2x3x5"], [tree[0][0], tree[1][0], tree[0][1], tree[1][1]])


def test_the_message_names_the_leaf_of_the_tree():
    with pytest.raises(ValueError, match=r"\['block'\]\['gain'\] of shape \(7,\)"):
        MatrixGroups({"block": {"gain": normal(7), "w": normal(3, 5)}}, None)
