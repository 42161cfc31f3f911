"""Where the axes of a mesh go, and that what goes in comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mup_jax.transforms.blocking import Blocking
from mup_jax.transforms.division import divide

SIZES = {"a": 4, "b": 2}
WHOLE = Blocking(None, 10_000)
BLOCKS = Blocking(4, 10_000)

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
        ((), ("b", "a"), ()),
        2,
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
    division = divide(shape, given, SIZES, blocking)
    assert division.work == work
    assert len(division.moves) == moves


@pytest.mark.parametrize("name", CASES)
def test_a_group_goes_in_and_comes_back(name):
    shape, given, blocking, work, _ = CASES[name]
    division = divide(shape, given, SIZES, blocking)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    spec = lambda layout: jax.P(*(names or None for names in layout))

    def there_and_back(x):
        part = division.enter(x)
        return part, division.leave(part)

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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["matrices", "factors"])
def test_state_is_stored_in_equal_shares_and_comes_back(name, kind):
    shape, given, blocking, _, _ = CASES[name]
    division = divide(shape, given, SIZES, blocking)
    if kind == "factors":
        grid = [
            d // blocking.block_length(d) if cut and d % blocking.block_length(d) == 0 else 1
            for d, cut in zip(shape[1:], division.cut, strict=True)
        ]
        shape = (shape[0], *grid, 8, 8)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    spec = division.spec(shape)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    def there_and_back(x):
        assert x.shape == division.stored_shape(shape)
        whole = jax.ShapeDtypeStruct(shape, x.dtype)
        return division.leave_state(division.enter_state(x, whole), whole)

    run = jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with jax.set_mesh(mesh):
        back = jax.jit(run)(jax.device_put(jnp.asarray(x), spec))
    np.testing.assert_array_equal(back, x)
    unused = [name for name in SIZES if not any(name in names for names in division.work)]
    if not unused and not (kind == "factors" and not all(division.cut)):
        assert np.prod(division.stored_shape(shape)) * 8 == np.prod(shape)
