"""What is read from two trees of parameters, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from mup_jax import ParamShape, infer_shapes
from mup_jax.transfer.shapes import map_shapes


def model(width, layers=2, vocabulary=100):
    return jax.eval_shape(
        lambda: {
            "embed": jnp.zeros((vocabulary, width)),
            "blocks": {
                "up": jnp.zeros((layers, width, 4 * width)),
                "qkv": jnp.zeros((layers, width, 3, width // 8, 8)),
                "gain": jnp.zeros((layers, width)),
            },
            "head": jnp.zeros((width, vocabulary)),
            "bias": jnp.zeros((vocabulary,)),
            "temperature": jnp.zeros(()),
        }
    )


NUMBERS = {
    "embed": None,
    "blocks": {
        "up": MuonDimensionNumbers(-2, -1),
        "qkv": MuonDimensionNumbers(1, (2, 3, 4)),
        "gain": None,
    },
    "head": None,
    "bias": None,
    "temperature": None,
}
ROLES = {
    "embed": "embedding",
    "blocks": {"up": "hidden", "qkv": "hidden", "gain": "vector"},
    "head": "readout",
    "bias": "vector",
    "temperature": "vector",
}


def infer(base, target, **options):
    return infer_shapes(base, target, weight_dimension_numbers=NUMBERS, **options)


def test_a_whole_model():
    # The gains are stacked vectors: two axes, so only their role tells them from matrices.
    base, target = model(16), model(64, layers=6)
    got = infer(base, target, depth_ratio=3.0, roles=lambda _: ROLES)
    assert got == {
        "embed": ParamShape("embedding", 100, 64, 100, 16),
        "blocks": {
            "up": ParamShape("hidden", 64, 256, 16, 64, 3.0),
            "qkv": ParamShape("hidden", 64, 192, 16, 48, 3.0),
            "gain": ParamShape("vector", 1, 64, 1, 16, 3.0),
        },
        "head": ParamShape("readout", 64, 100, 16, 100),
        "bias": ParamShape("vector", 1, 100, 1, 100, 3.0),
        "temperature": ParamShape("vector", 1, 1, 1, 1, 3.0),
    }
    assert infer(base, target, depth_ratio=3.0, roles=ROLES) == got


def test_roles_follow_from_which_sides_grow():
    tree = lambda w: {
        "embed": jnp.zeros((10, w)),
        "hidden": jnp.zeros((w, 2 * w)),
        "head": jnp.zeros((w, 10)),
        "fixed": jnp.zeros((3, 5)),
        "bias": jnp.zeros(w),
    }
    shapes = infer_shapes(tree(4), tree(8))
    assert {key: s.role for key, s in shapes.items()} == {
        "embed": "embedding",
        "hidden": "hidden",
        "head": "readout",
        "fixed": "hidden",
        "bias": "vector",
    }
    assert {key: s.width_ratio for key, s in shapes.items()} == {
        "embed": 2,
        "hidden": 2,
        "head": 2,
        "fixed": 1,
        "bias": 2,
    }


def test_dimension_numbers_turn_the_matrix_around():
    base, target = {"head": jnp.zeros((10, 4))}, {"head": jnp.zeros((10, 8))}
    numbers = MuonDimensionNumbers(1, 0)
    shapes = infer_shapes(base, target, weight_dimension_numbers=numbers)
    assert shapes == {"head": ParamShape("readout", 8, 10, 4, 10)}


def test_a_smaller_model_has_a_width_ratio_below_one():
    shapes = infer_shapes({"embed": jnp.zeros((9, 8))}, {"embed": jnp.zeros((9, 4))})
    assert shapes["embed"].role == "embedding"
    assert shapes["embed"].width_ratio == 0.5


def test_the_base_model_itself_needs_roles():
    base = model(16)
    with pytest.raises(ValueError, match="roles="):
        infer(base, base)
    shapes = infer(base, base, roles=ROLES)
    assert jax.tree.map(lambda s: s.role, shapes) == ROLES
    assert {s.width_ratio for s in jax.tree.leaves(shapes)} == {1}


@pytest.mark.parametrize("layers", [2, 8])
def test_depth_alone_does_not_tell_roles(layers):
    numbers = {"embed": None, "up": MuonDimensionNumbers(-2, -1)}
    tree = lambda n: {"embed": jnp.zeros((10, 4)), "up": jnp.zeros((n, 4, 8))}
    infer = functools.partial(
        infer_shapes, tree(2), tree(layers), depth_ratio=4.0, weight_dimension_numbers=numbers
    )
    with pytest.raises(ValueError, match="roles="):
        infer()
    shapes = infer(roles={"embed": "embedding", "up": "hidden"})
    assert [shapes[key].depth_ratio for key in ("embed", "up")] == [1, 4]


@pytest.mark.parametrize(
    ("base", "target", "options", "message"),
    [
        ({"a": (2, 4)}, {"b": (2, 8)}, {}, "different structures"),
        ({}, {"a": (2, 8)}, {}, "different structures"),
        ({"a": (2, 4)}, {"a": (2, 8, 8)}, {}, r"\['a'\] has shape"),
        ({"a": (2, 2, 4)}, {"a": (2, 2, 8)}, {}, "weight_dimension_numbers"),
        ({"a": (2, 4)}, {"a": (2, 8)}, {"roles": {"a": "output"}}, "role 'output' of .*readout"),
        ({"a": (2, 4)}, {"a": (2, 8)}, {"depth_ratio": 0}, "depth_ratio=0"),
    ],
)
def test_what_is_refused(base, target, options, message):
    base, target = (
        {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in tree.items()}
        for tree in (base, target)
    )
    with pytest.raises(ValueError, match=message):
        infer_shapes(base, target, **options)


def test_shapes_are_no_arrays():
    # As leaves of their own, they pass where a mask has cut the tree, and compare by value.
    shapes = infer(model(16), model(32), roles=ROLES)
    cut = {**jax.tree.map(lambda s: 1.0, shapes), "blocks": optax.MaskedNode()}
    with pytest.raises(ValueError, match="infer_shapes"):
        map_shapes(lambda s, x: x, shapes, cut)
    cut["blocks"] = {key: optax.MaskedNode() for key in shapes["blocks"]}
    roles = map_shapes(lambda s, x: s.role, shapes, cut)
    assert roles == {**ROLES, "blocks": cut["blocks"]}
    assert hash(shapes["embed"]) == hash(ParamShape("embedding", 100, 32, 100, 16))
