"""What is read from two trees of parameters, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax import ParamShape, infer_shapes, rules
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


# What real models have


def inferred(shapes_of, base=16, target=64, **options):
    """From `shapes_of(width)`, a dict of shapes."""
    trees = (
        jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes_of(width),
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for width in (base, target)
    )
    return infer_shapes(*trees, **options)


LAYERS = MuonDimensionNumbers(-2, -1)


def test_stacked_layers_of_grouped_query_attention():
    def shapes_of(width):
        return {
            "qkv": (2, width, 3 * width),
            "kv of two heads": (2, width, 2 * 8),
            "kv of more heads": (2, width, width // 2),
            "router": (2, width, 4),
            "experts": (2, 4, width, 3 * width),
        }

    got = inferred(shapes_of, weight_dimension_numbers=LAYERS, depth_ratio=2.0)
    assert got == {
        "qkv": ParamShape("hidden", 64, 192, 16, 48, 2.0),
        "kv of two heads": ParamShape("hidden", 64, 16, 16, 16, 2.0),
        "kv of more heads": ParamShape("hidden", 64, 32, 16, 8, 2.0),
        "router": ParamShape("hidden", 64, 4, 16, 4, 2.0),
        "experts": ParamShape("hidden", 64, 192, 16, 48, 2.0),
    }


def test_roles_by_the_names_of_parameters():
    def shapes_of(width):
        layer = {"kv": (width, 8), "up": (width, 3 * width)}
        return {"embed": (100, width), "layers": [layer] * 2, "head": (width, 100)}

    def roles(params):
        role = lambda path, _: "hidden" if "kv" in jax.tree_util.keystr(path) else None
        return jax.tree.map_with_path(role, params)

    assert inferred(shapes_of)["layers"][0]["kv"].role == "readout"
    got = inferred(shapes_of, roles=roles, depth_ratio=3.0, residual_exponent=0.5)
    layer = {
        "kv": ParamShape("hidden", 64, 8, 16, 8, 3.0, 0.5),
        "up": ParamShape("hidden", 64, 192, 16, 48, 3.0, 0.5),
    }
    assert got == {
        "embed": ParamShape("embedding", 100, 64, 100, 16),
        "layers": [layer] * 2,
        "head": ParamShape("readout", 64, 100, 16, 100),
    }
    with pytest.raises(ValueError, match="roles="):
        inferred(shapes_of, target=16, roles=roles)


def test_convolutions():
    shapes = lambda width: {"first": (3, 3, 3, width), "next": (3, 3, width, 2 * width)}
    got = inferred(shapes, weight_dimension_numbers=MuonDimensionNumbers((0, 1, 2), 3))
    assert got == {
        "first": ParamShape("embedding", 27, 64, 27, 16),
        "next": ParamShape("hidden", 9 * 64, 128, 9 * 16, 32),
    }


@pytest.mark.parametrize("rule", ["sgd", "adam", "muon"])
def test_tied_embeddings_transfer_when_logits_are_divided_by_the_width_ratio(rule):
    inner = {
        "sgd": optax.identity(),
        "adam": optax.scale_by_adam(),
        "muon": mup_jax.scale_by_muon(orthogonalizer="svd"),
    }[rule]
    base, widths, vocabulary = 64, (64, 8192), 32
    rng = np.random.default_rng(0)
    x, y = rng.integers(vocabulary, size=(2, 16))

    def changes(width):
        """RMS of those of features and logits, in the first step."""
        table = np.float32(rng.normal(size=(vocabulary, width)))
        shape = infer_shapes(jnp.zeros((vocabulary, base)), table, roles="embedding")
        transformation = mup_jax.mup(inner, getattr(rules, rule)(), shape)
        logits = lambda table: table[x] @ table.T / shape.width_ratio / base
        loss = lambda t: optax.softmax_cross_entropy_with_integer_labels(logits(t), y).mean()
        u, _ = transformation.update(jax.grad(loss)(table), transformation.init(table))
        moved = table - 1e-2 * u
        differences = (moved[x] - table[x], logits(moved) - logits(table))
        return [float(jnp.sqrt(jnp.mean(jnp.square(d)))) for d in differences]

    narrow, wide = (changes(width) for width in widths)
    slopes = np.log(np.divide(wide, narrow)) / np.log(widths[1] / widths[0])
    assert np.abs(slopes).max() < 0.1, slopes


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
        ({"a": (2, 4)}, {"b": (2, 8)}, {}, r"different parameters.*\['b'\], only for a"),
        ({"a": (2, 4), "b": (2, 4)}, {"a": (2, 8)}, {}, r"params has nothing for \['b'\]"),
        ({}, {"a": (2, 8)}, {}, "different parameters.*no leaf"),
        ({"a": (2, 4)}, {"a": (2, 8, 8)}, {}, r"\['a'\] has shape"),
        ({"a": (2, 2, 4)}, {"a": (2, 2, 8)}, {}, "weight_dimension_numbers"),
        ({"a": (2, 4)}, {"a": (2, 8)}, {"roles": {"a": "output"}}, "role 'output' of .*readout"),
        ({"a": (2, 4)}, {"a": (2, 8)}, {"depth_ratio": 0}, "depth_ratio=0"),
        ({"a": (2, 4)}, {"a": (2, 8)}, {"residual_exponent": 0}, "residual_exponent=0.*0.5 to 1"),
        ({"a": (4,)}, {"a": (4,)}, {}, "no dimension of params differs"),
        # A vocabulary of its own makes an embedding look like a hidden matrix.
        ({"a": (100, 16)}, {"a": (104, 64)}, {}, r"\['a'\] is 100×16 .*same vocabulary.*roles="),
        ({"a": (8, 3)}, {"a": (16, 4)}, {"roles": {"a": "vector"}}, "which axis is its width"),
        ({"a": (4, 4)}, {"a": (4, 4)}, {"roles": {"a": None}}, "no dimension of params differs"),
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
    cut = {**jax.tree.map(lambda s: 1.0, shapes), "more": 1.0}
    with pytest.raises(ValueError, match=r"infer_shapes.*\['more'\]"):
        map_shapes(lambda s, x: x, shapes, cut)
    del cut["more"]
    cut["blocks"] = {key: optax.MaskedNode() for key in shapes["blocks"]}
    roles = map_shapes(lambda s, x: s.role, shapes, cut)
    assert roles == {**ROLES, "blocks": cut["blocks"]}
    assert hash(shapes["embed"]) == hash(ParamShape("embedding", 100, 32, 100, 16))


@pytest.mark.parametrize(
    ("base", "here", "depth_ratio", "sizes"),
    [
        ((3, 16), (3, 64), 1.0, (64, 16)),
        ((16, 3), (64, 3), 1.0, (64, 16)),
        ((2, 16), (6, 64), 3.0, (64, 16)),  # deeper, too
        ((16, 2), (64, 6), 3.0, (64, 16)),
        ((2, 16), (8, 64), 4.0, (64, 16)),  # by as much as wider
        ((16,), (64,), 1.0, (64, 16)),
        ((), (), 1.0, (1, 1)),
    ],
)
def test_the_width_of_stacked_vectors_is_the_axis_that_differs(base, here, depth_ratio, sizes):
    roles = {"gain": "vector", "w": "hidden"}
    base, here = ({"gain": jnp.ones(s), "w": jnp.ones((n, n))} for s, n in ((base, 16), (here, 64)))
    shape = infer_shapes(base, here, roles=roles, depth_ratio=depth_ratio)["gain"]
    assert shape == ParamShape("vector", 1, sizes[0], 1, sizes[1], depth_ratio)
    if depth_ratio == 1:
        assert rules.sgd().learning_rate(shape) == shape.width_ratio
        assert rules.adam().epsilon(shape) == 1 / shape.width_ratio


# The table of a model

DESCRIBED = """\
| parameter | role | base | here | η | ε | λ |
| --- | --- | --- | --- | --- | --- | --- |
| blocks/gain | vector | 1×16 | 1×64 | 1 | 0.08333 | – |
| blocks/qkv | hidden | 16×48 | 64×192 | 1 | 0.3333 | 0.25 |
| blocks/up | hidden | 16×64 | 64×256 | 1 | 0.3333 | 0.25 |
| embed | embedding | 100×16 | 100×64 | 1 | 0.25 | 0.25 |
| head | readout | 16×100 | 64×100 | 0.25 | 1 | 0.25 |
| temperature | vector | 1×1 | 1×1 | 1 | 0.3333 | – |
"""


def test_describe():
    shapes = infer(model(16), model(64), depth_ratio=3.0, roles=ROLES)
    del shapes["bias"]
    by_role = dict.fromkeys(["embedding", "readout", "vector"], rules.adam())
    by_role["hidden"] = rules.muon()
    assert mup_jax.describe(shapes, by_role) == DESCRIBED

    del by_role["vector"]
    with pytest.raises(ValueError, match="no rule for the role 'vector', only for embedding"):
        mup_jax.describe(shapes, by_role)


@pytest.mark.parametrize(
    ("rule", "scaling", "factors"),
    [
        (rules.adam(), "constant", ["0.25", "0.08333", "1"]),
        (rules.sgd(), "1/width", ["3", "–", "0.25"]),
        # relative
        (rules.shampoo(block_size=None), "1/width", ["0.3333", "–", "0.25"]),
        # not compared with the gradient
        (rules.adamuon(), "1/width", ["0.25", "–", "0.25"]),
    ],
)
def test_factors_described(rule, scaling, factors):
    shapes = {"up": ParamShape("hidden", 64, 256, 16, 64, 3.0)}
    line = mup_jax.describe(shapes, rule, weight_decay_scaling=scaling).splitlines()[-1]
    assert line == f"| up | hidden | 16×64 | 64×256 | {' | '.join(factors)} |"
