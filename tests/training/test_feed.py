"""The batches of a run, whatever the mesh and the processes."""

import jax
import numpy as np
import pytest

from mup_jax import data
from mup_jax.training import feed
from mup_jax.training.feed import Feed, part_of_process
from mup_jax.training.mesh import AXES, batch_sharding
from tests.training.tiny import tiny_config

ROWS, CONTEXT = 8, 16
TOKENS = data.Tokens(
    *(np.random.default_rng(i).integers(0, 96, 3000).astype(np.uint16) for i in range(2)), 96, "x"
)
MESHES = ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 1), (1, 1, 8))


def mesh_of(shape):
    return jax.make_mesh(shape, AXES, devices=jax.devices()[: int(np.prod(shape))])


def expected_batches(number):
    options = {"context": CONTEXT, "batch_size": ROWS, "seed": 0}
    batches = iter(data.training_batches(TOKENS.train, **options))
    return [next(batches) for _ in range(number)]


class PartOf:
    """A sharding of which a process has some devices."""

    def __init__(self, spans):
        self._spans = spans

    def addressable_devices_indices_map(self, shape):
        assert shape == (ROWS, CONTEXT)
        return {i: (slice(*span), slice(None)) for i, span in enumerate(self._spans)}


@pytest.mark.parametrize(
    ("spans", "part"),
    [
        ([(0, 8)], (0, 1)),
        ([(None,)], (0, 1)),
        # Copies of the same rows, on an axis that does not divide them.
        ([(0, 8)] * 4, (0, 1)),
        ([(0, 4), (4, 8)], (0, 1)),
        ([(0, 2), (2, 4)], (0, 2)),
        ([(6, 8), (4, 6)], (1, 2)),
        ([(4, 8), (4, 8)], (1, 2)),
        ([(4, 5), (5, 6)], (2, 4)),
        ([(7, 8)], (7, 8)),
        # Apart from each other.
        ([(0, 2), (4, 6)], (0, 1)),
        ([(0, 1), (7, 8)], (0, 1)),
        # Together, but no part of an even division.
        ([(2, 4), (4, 6)], (0, 1)),
        ([(0, 1), (1, 2), (2, 3)], (0, 1)),
    ],
)
def test_part_of_process(spans, part):
    assert part_of_process(PartOf(spans), ROWS, CONTEXT) == part


@pytest.mark.parametrize("shape", MESHES)
def test_one_process_has_all_rows(shape):
    with jax.set_mesh(mesh_of(shape)):
        assert part_of_process(batch_sharding(tiny_config()), ROWS, CONTEXT) == (0, 1)


@pytest.mark.parametrize("shape", MESHES)
def test_batches_are_the_same_on_any_mesh(shape):
    with jax.set_mesh(mesh_of(shape)):
        batches = Feed(tiny_config(), TOKENS)
        sharding = batch_sharding(tiny_config())
    for expected in expected_batches(3):
        batch = next(batches)
        assert batch.keys() == expected.keys()
        for key, x in batch.items():
            np.testing.assert_array_equal(x, expected[key])
            assert x.dtype == np.int32
            assert x.sharding == sharding
    assert batches.seconds > 0


@pytest.mark.parametrize("shape", MESHES)
def test_validation_is_the_same_on_any_mesh(shape):
    with jax.set_mesh(mesh_of(shape)):
        validation = Feed(tiny_config(), TOKENS).validation
        rows = batch_sharding(tiny_config()).shard_shape((ROWS, CONTEXT))
    expected = data.validation_batches(
        TOKENS.validation, context=CONTEXT, batch_size=ROWS, max_batches=2
    )
    assert validation.keys() == expected.keys()
    for key, x in validation.items():
        np.testing.assert_array_equal(x, expected[key])
        assert x.sharding.shard_shape(x.shape) == (2, *rows)


@pytest.mark.parametrize("part", [(0, 2), (1, 2), (3, 4), (0, 1)])
def test_a_process_reads_its_part(monkeypatch, part):
    index, parts = part
    size = ROWS // parts
    mine = slice(index * size, (index + 1) * size)

    def rows_of_devices(shape, sharding, callback):
        """What the devices of this process, of a row each, ask for."""
        assert shape == (ROWS, CONTEXT)
        rows = range(ROWS)[mine]
        return np.concatenate([callback((slice(i, i + 1), slice(None))) for i in rows])

    with jax.set_mesh(mesh_of((8, 1, 1))):
        monkeypatch.setattr(feed, "part_of_process", lambda *_: part)
        batches = Feed(tiny_config(), TOKENS)
    monkeypatch.setattr(jax, "make_array_from_callback", rows_of_devices)
    for expected in expected_batches(2):
        for key, x in next(batches).items():
            np.testing.assert_array_equal(x, expected[key][mine])


def test_position():
    with jax.set_mesh(mesh_of((8, 1, 1))):
        first = Feed(tiny_config(), TOKENS)
    with jax.set_mesh(mesh_of((1, 1, 1))):
        second = Feed(tiny_config(), TOKENS)
    for _ in range(2):
        next(first)
    second.set_state(first.get_state())
    np.testing.assert_array_equal(next(second)["inputs"], expected_batches(3)[2]["inputs"])


def test_too_few_tokens():
    short = TOKENS._replace(validation=TOKENS.validation[:50])
    with jax.set_mesh(mesh_of((1, 1, 1))), pytest.raises(ValueError, match="no validation batch"):
        Feed(tiny_config(), short)
