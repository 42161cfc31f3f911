"""The examples in the docstrings of the public names run, and every one has one."""

import doctest
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import mup_jax

# But for modules, and for what is only ever made by others.
MADE_BY = {"CoordinateCheck": "coord_check", "Block": "scale_by_blocks"}
NAMES = [n for n in mup_jax.__all__ if callable(getattr(mup_jax, n)) and n not in MADE_BY]


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    value = getattr(mup_jax, name)
    names = {"jax": jax, "jnp": jnp, "optax": optax, "mup_jax": mup_jax}
    names["functools"] = functools
    found = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert sum(len(test.examples) for test in found) > 0
    for test in found:
        runner.run(test)
    assert runner.failures == 0
