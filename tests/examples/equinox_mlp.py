"""An Equinox network, whose weights are (out, in): SOAP on them, Adam on the biases."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

import mup_jax


def main():
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x.sum(axis=1, keepdims=True))
    model = eqx.nn.MLP(8, 1, 64, 2, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_array)

    out_in = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    soap = mup_jax.scale_by_soap(weight_dimension_numbers=out_in)
    by_rank = lambda params: jax.tree.map(jnp.ndim, params)
    directions = optax.partition({2: soap, 1: optax.scale_by_adam()}, by_rank)
    optimizer = optax.chain(directions, optax.scale_by_learning_rate(0.01))

    def step(carry, _):
        params, state = carry
        loss_fn = lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(x) - y) ** 2)
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=40)
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
