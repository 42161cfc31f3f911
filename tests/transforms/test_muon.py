"""Muon in bfloat16, and orthogonalization as a link of a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mup_jax
from mup_jax.transforms.linalg import orthogonalize


def run(transformation, gradients):
    state, update = transformation.init(gradients[0]), jax.jit(transformation.update)
    for gradient in gradients:
        u, state = update(gradient, state)
    return u, state


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("shape", [(64, 64), (48, 192), (192, 48)])
def test_iterations_in_bfloat16_come_near_the_polar_factor(shape, condition):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(d, min(shape))))[0] for d in shape)
    values = np.logspace(0, -np.log10(condition), min(shape))
    x = jnp.asarray(left * values @ right.T, jnp.float32)
    got = orthogonalize(x, compute_dtype=jnp.bfloat16)
    assert got.dtype == jnp.float32
    # Rounding is there: this is bfloat16. Half of the bound is what was measured.
    assert 5e-3 < error(got, left @ right.T) < 0.08


def test_momentum_in_bfloat16():
    gradients = list(np.random.default_rng(0).normal(size=(60, 24, 32)).astype(np.float32))
    want, _ = run(mup_jax.scale_by_muon(), gradients)
    got, state = run(mup_jax.scale_by_muon(mu_dtype=jnp.bfloat16), gradients)
    assert state.blocks["24x32"][0].state.mu.dtype == jnp.bfloat16
    assert 1e-4 < error(got, want) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orthogonalizer": "svd"}, "orthogonalizer='svd' needs float32"),
        ({"gram_form": True}, "gram_form=True needs float32"),
    ],
)
def test_what_needs_float32_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        mup_jax.scale_by_muon(compute_dtype=jnp.bfloat16, **options)


def test_muon_is_momentum_and_orthogonalization():
    gradients = list(np.random.default_rng(0).normal(size=(5, 6, 9)).astype(np.float32))
    muon, _ = run(mup_jax.scale_by_muon(nesterov=False), gradients)
    chain = optax.chain(optax.ema(0.95, debias=False), mup_jax.orthogonalize_updates())
    got, _ = run(chain, gradients)
    assert error(got, muon) < 1e-4
