"""A Flax NNX network, with a learning rate tuned at width 32 and carried to width 128 by rule."""

import jax
import optax
from flax import nnx

import mup_jax


class MLP(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(8, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.hidden(nnx.relu(self.first(x)))))


def main():
    x = jax.random.normal(jax.random.key(0), (256, 8))
    y = x[:, :1] * x[:, 1:2]
    (_, base), (graph, params) = (nnx.split(MLP(width, nnx.Rngs(0))) for width in (32, 128))
    shapes = mup_jax.infer_shapes(base, params)
    optimizer = mup_jax.muon(0.03, shapes=shapes, embedding_readout_learning_rate=0.01)

    def step(carry, _):
        params, state = carry
        loss_fn = lambda p: ((nnx.merge(graph, p)(x) - y) ** 2).mean()
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=40)
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("loss {:.3f} -> {:.3f}".format(*main()))
