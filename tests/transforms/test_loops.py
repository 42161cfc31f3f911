"""Loops in place change what they should, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.loops import refresh_where


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_due_is_refreshed_and_nothing_else(at_once, share):
    rng = np.random.default_rng(0)
    sizes = (5, 1, 3)
    due = [rng.random(size) < share for size in sizes]
    states = [
        {"kept": rng.normal(size=size), "matrix": rng.normal(size=(size, 2, 3))} for size in sizes
    ]
    doubled = lambda state: state | {"matrix": 2 * state["matrix"] + state["kept"]}
    run = jax.jit(lambda *args: refresh_where(doubled, *args, at_once=at_once, share=1))
    got, rounds = run(states, [jnp.asarray(x) for x in due])
    assert rounds == -(-sum(x.sum() for x in due) // min(at_once, sum(sizes)))
    for state, flags, new in zip(states, due, got, strict=True):
        want = 2 * state["matrix"] + state["kept"][:, None, None]
        want = np.where(flags[:, None, None], want, state["matrix"])
        np.testing.assert_allclose(new["matrix"], want, rtol=1e-6)
        np.testing.assert_allclose(new["kept"], state["kept"], rtol=1e-6)
