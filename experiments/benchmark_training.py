"""Times a training step beside that of a straightforward Flax model with Optax's AdamW.

    python -m experiments.benchmark_training --output=results/benchmark_training.json

The other model has the same matrices, written as one usually does: Flax Linen modules called in a
Python loop over the layers, softmax attention by einsum, `optax.adamw` behind a global clip. Both
are jitted, donate their state, take their batches from the same pipeline of text, and take turns in
one process, so that whatever else the machine does falls on both. Times are worth their ratio.
Ours runs with --config.remat=dots, which is the fastest on CPUs.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from flax import linen as nn
from ml_collections import ConfigDict

from mup_jax import data
from mup_jax.training import default_config
from mup_jax.training.feed import Feed
from mup_jax.training.mesh import make_mesh
from mup_jax.training.program import Hyperparameters, make_program

WIDTH = flags.DEFINE_integer("width", 256, "Width D of the models.", lower_bound=64)
LAYERS = flags.DEFINE_integer("layers", 8, "Their layers.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 30, "Measured steps of each.", lower_bound=2)
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")

HEAD_DIM = 64
WARM_UP = 3

Batch = dict[str, jax.Array]


class Block(nn.Module):
    """Attention with rotary positions and a SwiGLU network, each behind a norm."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = lambda features, name: nn.Dense(features, use_bias=False, name=name)
        y = nn.RMSNorm()(x)
        heads = (*x.shape[:2], self.width // HEAD_DIM, HEAD_DIM)
        query, key, value = (dense(self.width, n)(y).reshape(heads) for n in ("q", "k", "v"))
        query, key = rotate(nn.RMSNorm()(query)), rotate(nn.RMSNorm()(key))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / HEAD_DIM**0.5
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + dense(self.width, "o")(attended)
        y = nn.RMSNorm()(x)
        gated = nn.silu(dense(4 * self.width, "gate")(y)) * dense(4 * self.width, "up")(y)
        return x + dense(self.width, "down")(gated)


class PlainLlama(nn.Module):
    """Logits `(B, T, V)` of tokens `(B, T)`."""

    vocab_size: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab_size, self.width)(tokens)
        for _ in range(self.layers):
            x = Block(self.width)(x)
        return nn.Dense(self.vocab_size, use_bias=False)(nn.RMSNorm()(x))


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions on `(B, T, heads, head_dim)`."""
    frequency = 10_000.0 ** -(jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = jnp.arange(x.shape[1])[:, None, None] * frequency
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Contender(NamedTuple):
    """What takes steps: `advance(state, batch) -> state`, and how long it took to compile."""

    advance: Callable[[Any, Batch], Any]
    state: Any
    compile_seconds: float


def ours(config: ConfigDict, vocab_size: int) -> Contender:
    program = make_program(config, vocab_size)
    hyperparameters = jax.device_put(Hyperparameters.of(config), program.replicated)
    start = time.perf_counter()
    step = program.step
    seconds = time.perf_counter() - start
    advance = lambda state, batch: step(state, batch, hyperparameters)[0]
    return Contender(advance, program.init(0), seconds)


def gradient_only(config: ConfigDict, vocab_size: int) -> Contender:
    """Our step without the optimizer, and without anything that is measured of it."""
    program = make_program(config, vocab_size)
    params = program.init(0).params
    start = time.perf_counter()
    function = program.loss_and_gradient.lower(params, program.abstract_batch).compile()
    seconds = time.perf_counter() - start

    def advance(params: Any, batch: Batch) -> Any:
        jax.block_until_ready(function(params, batch))
        return params

    return Contender(advance, params, seconds)


def plain(config: ConfigDict, vocab_size: int) -> Contender:
    model = PlainLlama(vocab_size, config.model.width, config.model.depth)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay),
    )

    def loss(params: Any, batch: Batch) -> jax.Array:
        logits = model.apply(params, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    tokens = jnp.zeros((config.batch_size, config.context), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    state = params, optimizer.init(params)
    start = time.perf_counter()
    batch = {"inputs": tokens, "targets": tokens}
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    seconds = time.perf_counter() - start
    return Contender(lambda state, batch: compiled(state, batch)[0], state, seconds)


def take_turns(
    contenders: dict[str, Contender], batches: Iterator[Batch], steps: int
) -> dict[str, list[float]]:
    """Seconds of each step of each contender, the first ones left out."""
    states = {name: contender.state for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(WARM_UP + steps):
        for name, contender in contenders.items():
            batch = next(batches)
            start = time.perf_counter()
            states[name] = jax.block_until_ready(contender.advance(states[name], batch))
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def benchmark_config() -> ConfigDict:
    config = default_config()
    for size in (config.model, config.base):
        size.update(width=WIDTH.value, depth=LAYERS.value)
    config.model.head_dim = HEAD_DIM
    # Computing again what is elementwise is faster on CPUs than keeping it.
    config.update(context=256, batch_size=8, tokens=10**9, remat="dots")
    config.optimizer.update(name="adamw", learning_rate=1e-3, weight_decay=0.1)
    config.optimizer.options.weight_decay_scaling = "learning_rate"
    return config


def main(_: Any) -> None:
    config = benchmark_config()
    tokens = data.load(config.data.source, config.data.tokenizer)
    with jax.set_mesh(make_mesh(config)):
        feed = Feed(config, tokens)
        contenders = {
            "ours": ours(config, tokens.vocab_size),
            "gradient only": gradient_only(config, tokens.vocab_size),
            "plain Flax and Optax": plain(config, tokens.vocab_size),
        }
        batches = iter(lambda: next(feed), None)
        seconds = take_turns(contenders, batches, STEPS.value)
        waited = feed.seconds / (len(contenders) * (WARM_UP + STEPS.value))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    results = {
        "tokens_per_step": config.batch_size * config.context,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "median_seconds": medians,
        "compile_seconds": {name: c.compile_seconds for name, c in contenders.items()},
        "speedup": medians["plain Flax and Optax"] / medians["ours"],
        "share_of_gradient": medians["gradient only"] / medians["ours"],
        "share_of_input": waited / medians["ours"],
    }
    for name, median in medians.items():
        compiled = contenders[name].compile_seconds
        print(f"{name:>22}: {median * 1e3:7.1f} ms a step, compiled in {compiled:.1f} s")
    print(f"tokens per second, ours / plain: {results['speedup']:.2f}")
    print(f"of our step: gradient {results['share_of_gradient']:.0%}, waiting for batches "
          f"{results['share_of_input']:.2%}")  # fmt: skip
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
