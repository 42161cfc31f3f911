"""The optimizer of docs/design.md, as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import mup_jax

DOCS = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL)[1]


@pytest.fixture(scope="module")
def make():
    names = {}
    exec(compile(EXAMPLE, "one_sided.py", "exec"), names)
    return names["make"]


def test_it_whitens(make):
    """The update of one gradient is its polar factor, on the side of the rows."""
    gradient = np.random.default_rng(0).normal(size=(3, 8, 20)).astype(np.float32)
    transformation = make(MuonDimensionNumbers(-2, -1))
    updates, _ = transformation.update(gradient, transformation.init(gradient))
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    np.testing.assert_allclose(updates, 0.1 * u @ v, atol=1e-2 * np.abs(updates).max())


def test_its_rule_can_be_measured(make):
    derived = mup_jax.derive_rule(make(precondition_frequency=1), widths=(32, 48, 64), steps=2)
    assert np.isfinite(list(derived.exponents.values())).all()


def test_it_minimizes(make):
    target = jnp.asarray(np.random.default_rng(0).normal(size=(12, 10)), jnp.float32)
    loss = lambda w: jnp.mean(jnp.square(w - target))
    optimizer = mup_jax.matrix_optimizer(0.3, make(), mup_jax.rules.muon(), hidden_only=False)
    w, state = jnp.zeros_like(target), optimizer.init(jnp.zeros_like(target))

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return w + updates, state

    first = loss(w)
    for _ in range(30):
        w, state = step(w, state)
    assert loss(w) < 0.1 * first
