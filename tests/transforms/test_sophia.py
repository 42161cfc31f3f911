"""Sophia-G on linear softmax models, whose Gauss-Newton diagonal is known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from mup_jax import scale_by_sophia_g
from tests import reference

RNG = np.random.default_rng(0)
B, D, V = 12, 3, 5
X = RNG.normal(size=(B, D))
W = RNG.normal(size=(D, V))
X32, W32 = np.float32(X), np.float32(W)


def linear(params, x=X32):
    return x @ params


def run(transformation, gradients, params=W32, **extra_args):
    extra_args = {"logits_fn": linear} | extra_args
    state = transformation.init(params)
    update = jax.jit(lambda g, state, params: transformation.update(g, state, params, **extra_args))
    updates, states = [], []
    for gradient in gradients:
        u, state = update(gradient, state, params)
        updates.append(u)
        states.append(state)
    return updates, states


def estimates(n, logits_fn=linear, params=W32, **options):
    """h of `n` steps that forget what was before."""
    transformation = scale_by_sophia_g(b2=0.0, update_interval=1)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(state, _):
        _, state = transformation.update(zeros, state, params, logits_fn=logits_fn, **options)
        return state, state.h

    return jax.jit(lambda: jax.lax.scan(step, transformation.init(params), length=n)[1])()


def assert_mean(samples, want):
    samples = np.float64(samples)
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(axis=0) - want) < 5 * error).all()
    assert (error < 0.05 * want).all()


def test_estimates_are_the_gauss_newton_diagonal_on_average():
    assert_mean(estimates(4000), reference.gauss_newton_diagonal(X, W))


def test_masked_positions_do_not_count():
    mask = np.arange(B) % 3 != 0
    want = reference.gauss_newton_diagonal(X[mask], W)
    assert_mean(estimates(4000, mask=mask), want)
    # Axes before the vocabulary are positions, and 0 and 1 will do for a mask.
    sequences = X32.reshape(3, 4, D)
    samples = estimates(
        4000, functools.partial(linear, x=sequences), mask=np.float32(mask).reshape(3, 4)
    )
    assert_mean(samples, want)


@pytest.mark.parametrize("options", [{}, {"gamma": 20.0, "b1": 0.8, "b2": 0.5}])
def test_agrees_with_float64_reference(options):
    interval, seed = 3, 7
    transformation = scale_by_sophia_g(**options, update_interval=interval, seed=seed)
    textbook = reference.SophiaG(**options)
    state = transformation.init(W32)
    update = jax.jit(functools.partial(transformation.update, logits_fn=linear))
    for step in range(10):
        gradient, w = 0.1 * RNG.normal(size=(D, V)), W + 0.1 * step
        estimate = None
        if step % interval == 0:
            key = jax.random.fold_in(jax.random.key(seed), step)
            labels = jax.random.categorical(key, linear(np.float32(w)))
            estimate = reference.bartlett_estimate(X, w, np.asarray(labels))
        want = textbook.update(gradient, estimate)
        got, state = update(np.float32(gradient), state, np.float32(w))
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(state.h, textbook.h, rtol=1e-4)
    # The paper's γ clips nearly everything here, the larger one only some.
    assert ("gamma" in options) == (np.mean(np.abs(want) < 1) > 0.3)


def test_the_logits_are_asked_for_at_every_kth_step_only():
    calls = []

    def logits_fn(params):
        jax.debug.callback(lambda: calls.append(None))
        return linear(params)

    transformation = scale_by_sophia_g(update_interval=4)
    _, states = run(transformation, np.ones((10, D, V), np.float32), logits_fn=logits_fn)
    jax.effects_barrier()
    assert len(calls) == 3
    moved = [np.any(a.h != b.h) for a, b in itertools.pairwise(states)]
    assert moved == [(step + 1) % 4 == 0 for step in range(9)]


def test_seeds_and_steps_draw_different_labels():
    draws = [estimates(2)] + [
        run(scale_by_sophia_g(b2=0.0, seed=s), [np.ones((D, V), np.float32)])[1][0].h[None]
        for s in (0, 1)
    ]
    # Of two programs, which round differently; another draw differs by far more.
    alike = functools.partial(np.allclose, rtol=1e-5, atol=0)
    assert alike(draws[0][0], draws[1][0])
    assert not alike(draws[0][0], draws[0][1])
    assert not alike(draws[1], draws[2])


# Gradients and estimates at the edge


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_gradients_are_counted_and_skipped_leaf_by_leaf(bad):
    params = {"w": np.float32(W), "bias": np.zeros(V, np.float32)}
    logits_fn = lambda p: linear(p["w"]) + p["bias"]
    gradients = [jax.tree.map(np.ones_like, params) for _ in range(3)]
    gradients[1]["w"][0, 0] = bad
    updates, states = run(scale_by_sophia_g(), gradients, params, logits_fn=logits_fn)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    np.testing.assert_array_equal(states[1].mu["w"], states[0].mu["w"])
    assert np.all(states[1].mu["bias"] != states[0].mu["bias"])
    assert [int(s.nonfinite) for s in states] == [0, 1, 1]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e20, 3e38])
def test_updates_are_finite_whatever_the_gradient(scale):
    gradient = np.float32(scale * np.sign(W))
    updates, _ = run(scale_by_sophia_g(), [gradient] * 2)
    assert np.isfinite(updates).all()
    assert np.abs(updates).max() <= 1
    assert np.any(updates[0]) == (scale > 0)


@pytest.mark.parametrize(
    "logits_fn",
    [
        lambda p: np.nan * p,
        # Of no size, but with gradients whose squares are out of range.
        lambda p: 1e25 * (p - jax.lax.stop_gradient(p)),
    ],
)
def test_bad_estimates_are_counted_and_skipped(logits_fn):
    gradients = np.ones((2, D, V), np.float32)
    updates, states = run(scale_by_sophia_g(update_interval=1), gradients, logits_fn=logits_fn)
    assert np.isfinite(updates).all()
    np.testing.assert_array_equal(states[1].h, 0)
    assert [int(s.nonfinite) for s in states] == [1, 2]


def test_a_batch_of_padding_leaves_the_average_as_it_is():
    gradient = np.ones((D, V), np.float32)
    _, states = run(scale_by_sophia_g(), [gradient], mask=np.zeros(B))
    np.testing.assert_array_equal(states[0].h, 0)
    assert int(states[0].nonfinite) == 1


def test_bfloat16_parameters_have_a_float32_state():
    params = jnp.asarray(W, jnp.bfloat16)
    logits_fn = lambda p: jnp.asarray(X, jnp.bfloat16) @ p
    gradient = jnp.full((D, V), 0.1, jnp.bfloat16)
    updates, states = run(
        scale_by_sophia_g(gamma=20.0), [gradient] * 3, params, logits_fn=logits_fn
    )
    assert updates[0].dtype == jnp.bfloat16
    assert states[-1].mu.dtype == states[-1].h.dtype == jnp.float32
    assert (np.asarray(states[-1].h) > 0).all()


# Use


@pytest.mark.parametrize("missing", [{"logits_fn": None}, {"params": None}])
def test_what_is_missing_is_said(missing):
    arguments = {"params": W32, "logits_fn": linear} | missing
    transformation = scale_by_sophia_g()
    state = transformation.init(W32)
    with pytest.raises(ValueError, match="logits_fn=lambda params"):
        transformation.update(W32, state, **arguments)
    with pytest.raises(ValueError, match="update_interval=0"):
        scale_by_sophia_g(update_interval=0)


def test_in_a_chain_it_trains():
    """Also where every step takes over the buffers of the last."""
    optimizer = optax.chain(scale_by_sophia_g(b1=0.9), optax.scale(-0.02))
    labels = np.argmax(X @ W, axis=-1)

    def loss(params):
        logits = linear(params)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        u, state = optimizer.update(gradient, state, params, logits_fn=linear, value=value)
        return optax.apply_updates(params, u), state

    params = jnp.zeros((D, V))
    before, state = loss(params), optimizer.init(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 0.5 * before


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_sharded_logits(kind):
    rng = np.random.default_rng(1)
    x, w = np.float32(rng.normal(size=(16, 4))), np.float32(rng.normal(size=(4, 6)))
    gradients = [np.float32(rng.normal(size=(4, 6))) for _ in range(3)]
    transformation = scale_by_sophia_g(gamma=20.0, update_interval=2)
    want, want_states = run(transformation, gradients, w, logits_fn=lambda p: x @ p)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
        sharded = [put(g, None, "model") for g in gradients]
        logits_fn = lambda p: put(x, "data", None) @ p
        got, states = run(transformation, sharded, put(w, None, "model"), logits_fn=logits_fn)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(states[-1].h, want_states[-1].h, rtol=1e-4)
    assert states[-1].h.sharding.spec == jax.P(None, "model")
