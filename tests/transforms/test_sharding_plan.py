"""Where the axes of a mesh go, and that what goes in comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.blocking import Blocking
from mup_jax.transforms.sharding_plan import StateArray, plan_sharding

SIZES = {"a": 4, "b": 2}
WHOLE = Blocking(None, 10_000)
BLOCKS = Blocking(4, 10_000)

# By at most 1%, on every mesh.
FILLED_UP = {1001: 1008, 1002: 1008}

CASES = {
    # Shards hold whole blocks, so nothing moves.
    "blocks": ((3, 16, 8), ((), ("a",), ("b",)), BLOCKS, ((), ("a",), ("b",)), 0),
    "blocks of layers": ((4, 16, 8), (("a",), (), ("b",)), BLOCKS, (("a",), (), ("b",)), 0),
    # They do not: the minor axis moves first, and what fits stays.
    "both on one side": ((4, 16, 8), ((), ("a", "b"), ()), BLOCKS, (("b",), ("a",), ()), 1),
    "blocks too large": ((8, 8, 8), ((), ("a",), ("b",)), BLOCKS, (("a",), (), ("b",)), 1),
    "edge blocks": ((8, 16, 18), ((), ("a",), ("b",)), BLOCKS, (("b",), ("a",), ()), 1),
    "whole": ((8, 16, 8), ((), ("a",), ("b",)), WHOLE, (("b", "a"), (), ()), 2),
    "whole, uneven": ((5, 16, 8), ((), ("a",), ("b",)), WHOLE, (("b", "a"), (), ()), 2),
    # Axes without a place divide the stack, or else the blocks, or else the stack unevenly.
    "replicated stack": ((8, 16, 8), ((), (), ()), WHOLE, (("a", "b"), (), ()), 2),
    "replicated blocks": ((1, 16, 8), ((), (), ()), BLOCKS, ((), ("a",), ("b",)), 2),
    "replicated, uneven": ((3, 8, 8), ((), (), ()), WHOLE, (("a",), (), ()), 1),
    "replicated matrix": ((1, 8, 8), ((), (), ()), WHOLE, ((), (), ()), 0),
    # A side without preconditioner may be divided at any place.
    "one side, uneven": (
        (1, 13, 8),
        ((), (), ("a", "b")),
        Blocking(4, 10_000, "out"),
        ((), ("a", "b"), ()),
        1,
    ),
    "one side, filled up": (
        (1, 1001, 8),
        ((), (), ("a", "b")),
        Blocking(4, 10_000, "out"),
        ((), ("a", "b"), ()),
        1,
    ),
    "one side, divided, and filled up where it is not": (
        (1, 1002, 8),
        ((), ("b",), ("a",)),
        Blocking(None, 10_000, "out"),
        ((), ("b", "a"), ()),
        1,
    ),
    "one side, a few": (
        (2, 13, 8),
        ((), (), ("a",)),
        Blocking(None, 10_000, "out"),
        (("b",), ("a",), ()),
        2,
    ),
    "one side, replicated": (
        (1, 13, 8),
        ((), (), ()),
        Blocking(None, 10_000, "out"),
        ((), ("a", "b"), ()),
        2,
    ),
    "one side": ((1, 12, 8), ((), ("a",), ()), Blocking(4, 10_000, "out"), ((), ("a",), ("b",)), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_places_of_the_axes(name):
    shape, given, blocking, work, moves = CASES[name]
    plan = plan_sharding(shape, given, SIZES, blocking)
    assert plan.compute_layout == work
    assert len(plan.moves) == moves


@pytest.mark.parametrize("name", CASES)
def test_a_group_goes_in_and_comes_back(name):
    shape, given, blocking, work, _ = CASES[name]
    plan = plan_sharding(shape, given, SIZES, blocking)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    spec = lambda layout: jax.P(*(names or None for names in layout))

    def there_and_back(x):
        part = plan.to_compute(x)
        return part, plan.from_compute(part)

    run = jax.shard_map(
        there_and_back,
        mesh=mesh,
        in_specs=spec(given),
        out_specs=(spec(work), spec(given)),
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        worked, back = jax.jit(run)(jax.device_put(x, spec(given)))
    np.testing.assert_array_equal(back, x)
    worked = np.asarray(worked)
    # An axis that the devices do not divide is filled with zeros at its end.
    np.testing.assert_array_equal(np.sort(worked.ravel()[worked.ravel() > 0]), x.ravel()[1:])
    if worked.shape == shape:
        np.testing.assert_array_equal(worked, x)


def state_array(shape, blocking, plan, kind):
    """Of the blocks themselves, or of a factor of each."""
    lengths = [
        (blocking.block_length(d) if d % blocking.block_length(d) == 0 else d) if on else d
        for d, on in zip(shape[1:], plan.on, strict=True)
    ]
    grid = [d // b for d, b in zip(shape[1:], lengths, strict=True)]
    lengths = [FILLED_UP.get(length, length) for length in lengths]
    # A side that is not preconditioned is one of the axes of a block.
    inside = (3, 4) if kind == "blocks" else (None, None)
    axes = [axis if on else along for axis, along, on in zip((1, 2), inside, plan.on, strict=True)]
    block = lengths if kind == "blocks" else (8, 8)
    return StateArray((shape[0], *grid, *block), np.float32, (0, *axes))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["blocks", "factors"])
def test_state_is_stored_in_equal_shares_and_comes_back(name, kind):
    shape, given, blocking, _, _ = CASES[name]
    plan = plan_sharding(shape, given, SIZES, blocking)
    array = state_array(shape, blocking, plan, kind)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    spec = plan.spec(array)
    x = 1 + np.arange(np.prod(array.shape), dtype=np.float32).reshape(array.shape)
    if kind == "blocks":
        x[..., shape[1] :, :] = 0.0  # what is filled up

    def there_and_back(x):
        assert x.shape == plan.stored_shape(array)
        used = plan.from_storage(x, array)
        return used, plan.to_storage(used, array)

    names = [None] * len(array.shape)
    for axis, along in enumerate(array.axes):
        if along is not None:
            names[along] = plan.compute_layout[axis] or None
    run = jax.shard_map(
        there_and_back,
        mesh=mesh,
        in_specs=spec,
        out_specs=(jax.P(*names), spec),
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        used, back = jax.jit(run)(jax.device_put(jnp.asarray(x), spec))
    np.testing.assert_array_equal(back, x)
    # What is used is what was stored, with zeros where the devices do not divide an axis.
    used = np.asarray(used)
    np.testing.assert_array_equal(used[used > 0], x[x > 0])
    unused = [name for name in SIZES if not any(name in names for names in plan.compute_layout)]
    if not unused and None not in array.axes:
        assert np.prod(plan.stored_shape(array)) * 8 == np.prod(array.shape)


def test_a_vocabulary_that_nothing_divides_is_stored_as_it_is_used():
    """That of GPT-2; otherwise the whole state would move there and back at every step."""
    blocking, sizes = Blocking(512, 10_000, "out"), {"data": 4, "model": 4}
    plan = plan_sharding((1, 50257, 1024), ((), (), ("data", "model")), sizes, blocking)
    assert plan.compute_layout == ((), ("data", "model"), ())
    array = StateArray((1, 1, 2, 50304, 512), np.float32, (0, 3, None))
    assert plan.spec(array) == jax.P(None, None, None, ("data", "model"), None)
    assert plan.part == (1, 50304 // 16, 1024)
    assert plan.stored_shape(array) == (1, 1, 2, 50304 // 16, 512)
