"""A sharding that only the compiler knows is passed on, under every transformation of JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax.transforms.shard_alike import shard_alike

X, LIKE = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def put(x, mesh, *spec):
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))


def test_values_of_one_and_sharding_of_the_other(mesh):
    like = put(LIKE, mesh, "model", "data")
    got = jax.jit(lambda x, like: shard_alike(-x, like))(put(X, mesh), like)
    np.testing.assert_array_equal(got, -X)
    assert got.sharding.is_equivalent_to(like.sharding, 2)


def test_gradients_and_batches():
    gradients = jax.grad(lambda x, y: (shard_alike(3 * x, y) * LIKE).sum(), (0, 1))(X, LIKE)
    np.testing.assert_allclose(gradients[0], 3 * LIKE, rtol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0 * LIKE)
    np.testing.assert_array_equal(shard_alike(X, LIKE), X)
    for axes in ((0, 0), (0, None), (None, 0)):
        given = zip((X, LIKE), axes, strict=True)
        x, like = (a if axis is None else np.stack([a, -a]) for a, axis in given)
        got = jax.vmap(shard_alike, axes)(x, like)
        np.testing.assert_array_equal(got, x if axes[0] == 0 else np.stack([X, X]))


LAYOUTS = [
    (None, "data", "model"),
    (None, "model", "data"),
    (None, None, ("data", "model")),
    ("data", None, "model"),
    # What leaves some devices with copies, as in data-parallel training.
    (),
    (None, "data"),
    (None, None, "model"),
]
MAKES = {
    "muon": mup_jax.scale_by_muon,
    "shampoo": functools.partial(mup_jax.scale_by_shampoo, block_size=8),
    "soap": functools.partial(mup_jax.scale_by_soap, block_size=8),
    "whole muon": lambda **numbers: mup_jax.muon(0.1, hidden_only=False, **numbers),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("shampoo", "soap") else []) for n in MAKES],
)
def test_parameters_stay_where_they_are(name, mesh):
    """Otherwise the next step would be compiled again, and buffers could not be given back.

    All of one shape, so that they are worked on as one, and each is put back into its place.
    """
    optimizer = MAKES[name](weight_dimension_numbers=MuonDimensionNumbers(-2, -1))
    values = np.random.default_rng(0).normal(size=(8, 16, 8)).astype(np.float32)
    params = {str(spec): put(values, mesh, *spec) for spec in LAYOUTS}
    loss_fn = lambda params: sum(jnp.sum(jnp.sin(x) * x) for x in params.values())

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), updates

    for got in step(params, jax.jit(optimizer.init)(params)):
        for key, x in got.items():
            assert x.sharding.is_equivalent_to(params[key].sharding, 3), key
