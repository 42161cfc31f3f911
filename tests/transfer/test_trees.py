"""Trees of parameters as frameworks build them: modules, boxes, frozen dictionaries."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax import infer_shapes, mup, rules


def mlp(width):
    return eqx.filter(eqx.nn.MLP(8, 1, width, 2, key=jax.random.key(0)), eqx.is_array)


def test_models_that_keep_their_sizes_in_their_structure():
    shapes = infer_shapes(mlp(8), mlp(16), weight_dimension_numbers=MuonDimensionNumbers(1, 0))
    roles = [layer.weight.role for layer in shapes.layers]
    assert roles == ["embedding", "hidden", "readout"]
    assert shapes.layers[1].bias.role == "vector"


def test_a_module_that_can_be_called_may_be_a_tree_of_values():
    weights = lambda m: [layer.weight for layer in m.layers]
    biases = lambda m: [layer.bias for layer in m.layers]
    arrays = mlp(16)
    numbers = eqx.tree_at(weights, arrays, [MuonDimensionNumbers(1, 0)] * 3)
    numbers = eqx.tree_at(biases, numbers, [None] * 3)
    roles = eqx.tree_at(weights, arrays, ["embedding", "hidden", "readout"])
    roles = eqx.tree_at(biases, roles, ["vector"] * 3)
    assert callable(numbers)
    assert callable(roles)
    given = infer_shapes(mlp(8), arrays, weight_dimension_numbers=numbers, roles=roles)
    number = MuonDimensionNumbers(1, 0)
    inferred = infer_shapes(mlp(8), arrays, weight_dimension_numbers=number)
    assert jax.tree.leaves(given) == jax.tree.leaves(inferred)


def test_what_is_no_array_is_refused():
    model = eqx.nn.MLP(8, 1, 16, 2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"activation is .* and no array.*eqx\.filter"):
        infer_shapes(model, model)
    with pytest.raises(ValueError, match=r"\['w'\] is complex"):
        infer_shapes({"w": jnp.ones((2, 2), complex)}, {"w": jnp.ones((4, 4), complex)})


def train_nnx(optimizer):
    """The losses of some steps with `nnx.Optimizer`, which boxes parameters at `init` only."""
    model = nnx_mlp(32)
    state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (16, 8))
    loss_fn = lambda model: jnp.mean((model(x) - x[:, :3]) ** 2)
    losses = []
    for _ in range(3):
        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        state.update(model, gradients)
        losses.append(float(loss))
    return losses


def nnx_mlp(width):
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(n, m, rngs=rngs) for n, m in ((8, width), (width, width), (width, 3))]
    return nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu, layers[2])


NNX_OPTIMIZERS = {
    **{name: getattr(mup_jax, name) for name in ("adamw", "muon", "shampoo", "soap", "lamb")},
    "chain": lambda rate, shapes: optax.chain(
        mup(optax.scale_by_adam(), rules.adam(), shapes),
        optax.scale(rate),
        mup_jax.add_independent_weight_decay(1e-3, shapes),
        optax.scale(-1.0),
    ),
}


@pytest.mark.parametrize("name", NNX_OPTIMIZERS)
def test_leaves_boxed_at_init_and_bare_at_update(name):
    boxed = infer_shapes(*(nnx.state(nnx_mlp(width), nnx.Param) for width in (16, 32)))
    losses = train_nnx(NNX_OPTIMIZERS[name](0.01, shapes=boxed))
    assert losses[-1] < losses[0]
    bare = nnx.to_pure_dict(boxed)
    assert train_nnx(NNX_OPTIMIZERS[name](0.01, shapes=bare)) == losses


def test_a_frozen_dict_beside_a_dict():
    base, params = (
        {"embed": jnp.ones((9, n)), "layer": {"w": jnp.ones((n, n)), "b": jnp.ones(n)}}
        for n in (4, 8)
    )
    optimizer = mup_jax.adamw(0.1, shapes=infer_shapes(base, params), weight_decay=0.1)
    frozen = FrozenDict(params)
    updates, _ = optimizer.update(frozen, optimizer.init(frozen), frozen)
    want, _ = optimizer.update(params, optimizer.init(params), params)
    assert isinstance(updates, FrozenDict)
    for got, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)
