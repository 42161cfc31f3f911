"""Parametrizations: all one at the base, and each what its name says above it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mup_jax
from experiments.ladder.parametrizations import PARAMETRIZATIONS
from mup_jax.optimizers import OPTIMIZERS
from mup_jax.training.config import make_optimizer

BASE, WIDTH, VOCABULARY = 8, 32, 6
K = WIDTH // BASE
MATRIX_OPTIMIZERS = ("muon", "shampoo", "soap", "adamuon")


def params_of(width):
    return {
        "embedding": jnp.ones((VOCABULARY, width)),
        "hidden": jnp.ones((width, width)),
        "readout": jnp.ones((width, VOCABULARY)),
    }


def updates(optimizer, parametrization, width, *, decay=0.0, gradient=1.0):
    """RMS of one step at learning rate 1, by role."""
    options = PARAMETRIZATIONS[parametrization].options_of(optimizer)
    params = params_of(width)
    shapes = mup_jax.infer_shapes(params_of(BASE), params, roles={role: role for role in params})
    make = make_optimizer(
        OPTIMIZERS[optimizer], 1.0, weight_decay=decay, shapes=shapes, options=options
    )
    keys = jax.random.split(jax.random.key(0), len(params))
    gradients = {
        role: gradient * jax.random.normal(key, w.shape)
        for key, (role, w) in zip(keys, params.items(), strict=True)
    }
    step = jax.jit(lambda g, p: make.update(g, make.init(p), p)[0])
    return {role: float(jnp.sqrt(jnp.mean(u**2))) for role, u in step(gradients, params).items()}


def factors(optimizer, parametrization):
    """η of each role, over that of standard parametrization."""
    here, constant = (updates(optimizer, p, WIDTH) for p in (parametrization, "sp"))
    return [here[role] / constant[role] for role in here]


SHARED = [
    (optimizer, name)
    for optimizer in ("adamw", "muon")
    for name, parametrization in PARAMETRIZATIONS.items()
    if parametrization.options_of(optimizer) is not None and not parametrization.tuned_alone
]


@pytest.mark.parametrize(("optimizer", "parametrization"), SHARED)
def test_all_are_one_at_the_base(optimizer, parametrization):
    here, in_mup = (updates(optimizer, p, BASE, decay=0.1) for p in (parametrization, "mup"))
    assert here == pytest.approx(in_mup)


@pytest.mark.parametrize(
    ("optimizer", "parametrization", "want"),
    [
        ("adamw", "mup", [1, 1 / K, 1 / K]),
        ("adamw", "wd_only", [1, 1, 1]),
        ("adamw", "mup_lr_only", [1, 1 / K, 1 / K]),
        ("muon", "mup", [1, 1, 1 / K]),
        ("muon", "lr_and_wd_1/width", [1, 1 / K, 1 / K]),
        ("muon", "muon_rms_matching", [1, K**0.5, 1 / K]),
        ("muon", "wd_only", [1, 1, 1]),
        ("shampoo", "lr_and_wd_1/width", [1, 1 / K, 1 / K]),
        ("soap", "wd_only", [1, 1, 1]),
    ],
)
def test_learning_rates(optimizer, parametrization, want):
    assert factors(optimizer, parametrization) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    ("parametrization", "factor"),
    [("mup", 1 / K), ("sp", 1), ("mup_lr_only", 1), ("wd_only", 1 / K), ("spectral_norm", 1 / K)],
)
def test_weight_decay(parametrization, factor):
    """Of parameters without a gradient, decay is all that is left."""
    options = PARAMETRIZATIONS[parametrization].options_of("muon")
    params = params_of(WIDTH)
    shapes = mup_jax.infer_shapes(params_of(BASE), params, roles={role: role for role in params})
    make = OPTIMIZERS["muon"]
    optimizer = make_optimizer(make, 1.0, weight_decay=0.1, shapes=shapes, options=options)
    zero = jax.tree.map(jnp.zeros_like, params)
    got, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(got["hidden"], -0.1 * factor, rtol=1e-5)


def test_spectral_norms_are_fixed():
    params = params_of(WIDTH)
    shapes = mup_jax.infer_shapes(params_of(BASE), params, roles={role: role for role in params})
    options = PARAMETRIZATIONS["spectral_norm"].options_of("muon")
    optimizer = OPTIMIZERS["muon"](1.0, shapes=shapes, **options)
    state = optimizer.init(params)
    step = jax.jit(lambda g, s: optimizer.update(g, s, params))
    for key in jax.random.split(jax.random.key(0), 8):  # the power iteration needs some steps
        draw = lambda w, key=key: jax.random.normal(key, w.shape)
        got, state = step(jax.tree.map(draw, params), state)
    assert jnp.linalg.norm(got["hidden"], 2) == pytest.approx(1.0, rel=0.1)


def test_who_has_which():
    of = lambda name: {o for o in OPTIMIZERS if PARAMETRIZATIONS[name].options_of(o) is not None}
    assert of("sp") == of("mup") == set(OPTIMIZERS)
    assert of("spectral_norm") == set(MATRIX_OPTIMIZERS)
    assert of("muon_rms_matching") == {"muon"}
    assert of("lr_and_wd_1/width") == set(OPTIMIZERS) - {"adamw", "adopt", "lion"}
