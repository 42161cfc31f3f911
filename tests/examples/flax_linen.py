"""A Flax Linen network: Shampoo at Adam's step size on kernels, a convolution's among them."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from optax.contrib import MuonDimensionNumbers

import mup_jax


def main():
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
    y = jnp.max(x[:, 1:] - x[:, :-1], axis=(1, 2))
    pool = lambda x: x.max(axis=(1, 2))
    model = nn.Sequential([nn.Conv(16, (3, 3)), pool, nn.relu, nn.Dense(1)])
    params = model.init(jax.random.key(1), x)

    # A kernel (height, width, in, out) is a matrix from all of its window to `out`.
    window_to_out = lambda p: MuonDimensionNumbers(tuple(range(p.ndim - 1)), -1)
    numbers = {"weight_dimension_numbers": lambda params: jax.tree.map(window_to_out, params)}
    shampoo = mup_jax.graft(optax.scale_by_adam(), mup_jax.scale_by_shampoo(**numbers), **numbers)
    names = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key, params)
    directions = optax.partition({"kernel": shampoo, "bias": optax.scale_by_adam()}, names)
    optimizer = optax.chain(directions, optax.scale_by_learning_rate(0.01))

    def step(carry, _):
        params, state = carry
        loss_fn = lambda p: jnp.mean((model.apply(p, x) - y) ** 2)
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=30)
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
