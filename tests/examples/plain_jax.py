"""A network in plain JAX: Muon on its matrices, Adam on its biases."""

import jax
import jax.numpy as jnp
import optax

import mup_jax


def network(params, x):
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def main():
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = jnp.sin(x.sum(axis=1, keepdims=True))
    weights = [jax.random.normal(jax.random.key(d), (d, 64)) / d**0.5 for d in (8, 64)]
    params = [{"w": w, "b": jnp.zeros(w.shape[1])} for w in [*weights, jnp.zeros((64, 1))]]

    kinds = lambda params: jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "vector", params)
    directions = {"matrix": mup_jax.scale_by_muon(), "vector": optax.scale_by_adam()}
    optimizer = optax.chain(optax.partition(directions, kinds), optax.scale_by_learning_rate(0.03))

    def step(carry, _):
        params, state = carry
        loss_fn = lambda p: jnp.mean((network(p, x) - y) ** 2)
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=40)
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
