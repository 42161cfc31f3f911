"""The examples run as they stand, and learn."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_loss_falls(path):
    first, last = runpy.run_path(str(path))["main"]()
    assert last < 0.5 * first


def test_there_is_one_for_each_way_to_write_a_model():
    names = {path.stem for path in EXAMPLES}
    assert names == {"plain_jax", "flax_nnx", "flax_linen", "equinox_mlp"}
