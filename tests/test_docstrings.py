"""The examples in the docstrings of the public names run, and every function has one."""

import doctest
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import mup_jax

FUNCTIONS = [n for n in mup_jax.__all__ if inspect.isfunction(getattr(mup_jax, n))]
# Their subject is a model and its loss; README, and `sophia`, have examples.
WITHOUT = ["coord_check", "scale_by_sophia_g"]


@pytest.mark.parametrize("name", [*(n for n in FUNCTIONS if n not in WITHOUT), "BlockRule"])
def test_example(name):
    value = getattr(mup_jax, name)
    names = {"jax": jax, "jnp": jnp, "optax": optax, "mup_jax": mup_jax}
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert sum(len(test.examples) for test in found) > 0
    for test in found:
        runner.run(test)
    assert runner.failures == 0
