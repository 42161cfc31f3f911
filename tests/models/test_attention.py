"""Kernels of causal attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pallas_tpu

from mup_jax.models.attention import ATTENTION, attention_of

# What a kernel that runs on a CPU can be compared with.
SHAPES = {"xla": (2, 24, 3, 8), "splash": (1, 256, 2, 64)}


def draw(name, dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=SHAPES[name]).astype(dtype) for _ in range(4))


def causal_softmax(query, key, value):
    """In float64, head by head."""
    result = np.zeros(query.shape)
    batch, context, heads, head_dim = query.shape
    future = np.triu(np.ones((context, context), bool), 1)
    for b, h in np.ndindex(batch, heads):
        scores = query[b, :, h].astype(float) @ key[b, :, h].T / np.sqrt(head_dim)
        weights = np.exp(np.where(future, -np.inf, scores))
        result[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ value[b, :, h]
    return result


@functools.cache
def value_and_gradients(name, shape_of):
    """A kernel's output, and the gradients of its product with a random array."""
    *inputs, direction = draw(shape_of)

    def product(*inputs):
        output = ATTENTION[name](*inputs)
        return jnp.sum(output * direction), output

    differentiate = jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True)
    # Kernels for TPUs run on a CPU, slowly.
    with pallas_tpu.force_tpu_interpret_mode():
        (_, output), gradients = jax.jit(differentiate)(*inputs)
    return output, gradients


@pytest.mark.parametrize("name", SHAPES)
def test_value(name):
    output, _ = value_and_gradients(name, name)
    np.testing.assert_allclose(output, causal_softmax(*draw(name)[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_differences(name):
    *inputs, direction = (x.astype(np.float64) for x in draw(name))
    _, gradients = value_and_gradients(name, name)
    towards = np.random.default_rng(1).normal(size=SHAPES[name])
    for i, gradient in enumerate(gradients):
        ahead, behind = ([*inputs] for _ in range(2))
        ahead[i], behind[i] = inputs[i] + 1e-5 * towards, inputs[i] - 1e-5 * towards
        difference = (causal_softmax(*ahead) - causal_softmax(*behind)) / 2e-5
        slope = np.sum(np.asarray(gradient, np.float64) * towards)
        np.testing.assert_allclose(slope, np.sum(difference * direction), rtol=1e-3)


def test_splash_is_like_xla():
    expected, measured = (value_and_gradients(name, "splash") for name in ("xla", "splash"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), measured, expected)


def test_nothing_is_seen_of_the_future():
    query, key, value, _ = draw("xla")
    changed = [x.copy() for x in (query, key, value)]
    for x in changed:
        x[:, 10:] += 1
    before = ATTENTION["xla"](query, key, value)[:, :10]
    np.testing.assert_array_equal(ATTENTION["xla"](*changed)[:, :10], before)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("context", "head_dim"), [(128, 128), (384, 64), (2048, 32)])
def test_splash_is_compiled_for_tpus(context, head_dim, dtype):
    x = jax.ShapeDtypeStruct((1, context, 2, head_dim), dtype)
    gradient = jax.grad(lambda *xs: ATTENTION["splash"](*xs).astype(jnp.float32).sum(), (0, 1, 2))
    program = jax.jit(gradient).trace(x, x, x).lower(lowering_platforms=("tpu",))
    assert program.as_text().count("tpu_custom_call") == 3


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("context", [100, 256])
def test_cudnn_is_like_xla(context):
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(2, context, 3, 64)), jnp.bfloat16) for _ in range(3)]

    def gradients(name):
        total = lambda *xs: ATTENTION[name](*xs).astype(jnp.float32).sum()
        return [np.asarray(x, np.float32) for x in jax.jit(jax.grad(total, (0, 1, 2)))(*inputs)]

    compare = functools.partial(np.testing.assert_allclose, rtol=0.05, atol=0.05)
    jax.tree.map(compare, gradients("cudnn"), gradients("xla"))


@pytest.mark.parametrize(
    ("platform", "dtype", "context", "head_dim", "name"),
    [
        ("gpu", jnp.bfloat16, 100, 64, "cudnn"),
        ("gpu", jnp.bfloat16, 100, 128, "cudnn"),
        ("gpu", jnp.bfloat16, 100, 256, "xla"),
        ("gpu", jnp.bfloat16, 100, 12, "xla"),
        ("cuda", jnp.float16, 1024, 64, "cudnn"),
        ("gpu", jnp.float32, 1024, 64, "xla"),
        ("tpu", jnp.bfloat16, 1024, 64, "splash"),
        ("tpu", jnp.float32, 128, 64, "splash"),
        ("tpu", jnp.bfloat16, 64, 64, "xla"),
        ("tpu", jnp.bfloat16, 1000, 64, "xla"),
        ("cpu", jnp.bfloat16, 1024, 64, "xla"),
        ("cpu", jnp.float32, 16, 64, "xla"),
    ],
)
def test_choice(platform, dtype, context, head_dim, name):
    assert attention_of(platform, dtype, context, head_dim) == name
