"""States parameter by parameter: back again bit for bit, and for other parameters."""

import doctest
import functools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers
from orbax.checkpoint import v1 as ocp

import mup_jax
from mup_jax.transforms import by_parameter

RNG = np.random.default_rng(0)
DOCUMENT = Path(__file__).parents[2] / "docs" / "state_by_parameter.md"
STACKED = MuonDimensionNumbers(-2, -1)
BLOCKS = {"block_size": 8, "precondition_frequency": 1}


class Sum(NamedTuple):
    """The state of a rule that takes no time to compile."""

    gradients: jax.Array


def scale_by_sum(**options):
    rule = mup_jax.BlockRule(
        init=lambda shape: Sum(jnp.zeros(shape)),
        direction=lambda g, state, step: (g, Sum(state.gradients + g)),
        refresh=lambda state, step: state,
    )
    return mup_jax.scale_by_blocks(rule, **options)


DIRECTIONS = {
    "muon": mup_jax.scale_by_muon,
    "shampoo": functools.partial(mup_jax.scale_by_shampoo, **BLOCKS),
    "soap": functools.partial(mup_jax.scale_by_soap, **BLOCKS),
}

QUICK_TO_COMPILE = [
    pytest.param(name, marks=pytest.mark.slow if name in ("shampoo", "soap") else [])
    for name in DIRECTIONS
]

# Edge blocks on both sides; leaves of one shape and of one shape of matrices; two stack axes.
SHAPES = {
    "a": (20, 12),
    "b": (20, 12),
    "conv": (2, 2, 5, 12),
    "experts": (2, 2, 8, 8),
    "layers": (3, 20, 12),
    "other layers": (20, 3, 12),
    "transposed": (12, 20),
}
NUMBERS = dict.fromkeys(SHAPES, STACKED) | {
    "conv": MuonDimensionNumbers((0, 1, 2), 3),
    "other layers": MuonDimensionNumbers(0, 2),
    "transposed": MuonDimensionNumbers(1, 0),
}
VECTORS = {"bias": (12,), "gain": (20,)}


def normal(shapes, extra=()):
    return {
        key: jnp.asarray(RNG.normal(size=(*extra, *shape)), jnp.float32)
        for key, shape in shapes.items()
    }


def filled(state):
    """With random numbers in place of zeros, in the dtypes and shardings of the state."""

    def fill(x):
        numbers = RNG.integers(0, 2 if x.dtype == bool else 100, size=x.shape).astype(x.dtype)
        return jax.device_put(numbers, x.sharding)

    return jax.tree.map(fill, state)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def there_and_back(optimizer):
    return (
        lambda state, params: mup_jax.state_by_parameter(state, params, optimizer),
        lambda kept, params: mup_jax.state_from_parameters(kept, params, optimizer),
    )


def labels(params):
    return {key: "matrix" if key in SHAPES else "other" for key in params}


def partition(direction):
    return optax.partition({"matrix": direction, "other": optax.scale_by_adam()}, labels)


def whole(make, **options):
    numbers = NUMBERS | dict.fromkeys(VECTORS)
    return make(0.1, weight_dimension_numbers=numbers, **options)


OPTIMIZERS = {
    **{
        name: functools.partial(make, weight_dimension_numbers=NUMBERS)
        for name, make in DIRECTIONS.items()
    },
    "partition": lambda: partition(mup_jax.scale_by_muon(weight_dimension_numbers=NUMBERS)),
    "masked": lambda: optax.masked(
        mup_jax.scale_by_muon(weight_dimension_numbers=NUMBERS), lambda p: {k: k == "b" for k in p}
    ),
    "chain": lambda: optax.chain(
        optax.clip(1.0),
        optax.inject_hyperparams(
            lambda beta: mup_jax.scale_by_muon(beta, weight_dimension_numbers=NUMBERS)
        )(0.9),
        mup_jax.normalize_spectral_norm(weight_dimension_numbers=NUMBERS),
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        mup_jax.scale_by_muon(weight_dimension_numbers=NUMBERS), 2
    ),
    "mup_jax.muon": lambda: whole(mup_jax.muon),
    "mup_jax.shampoo": lambda: whole(mup_jax.shampoo, block_size=8),
    "mup_jax.soap": lambda: whole(mup_jax.soap, block_size=8),
    "mup_jax.soap of hidden": lambda: whole(mup_jax.soap, block_size=8, hidden_only=True),
}
WITH_VECTORS = ("partition", *(name for name in OPTIMIZERS if name.startswith("mup_jax")))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_back_again_bit_for_bit(name):
    optimizer = OPTIMIZERS[name]()
    params = normal(SHAPES | (VECTORS if name in WITH_VECTORS else {}))
    state = filled(jax.jit(optimizer.init)(params))
    there, back = there_and_back(optimizer)
    kept = jax.jit(there)(state, params)
    assert_same(jax.jit(back)(kept, params), state)
    if name != "masked":
        numbers = NUMBERS | dict.fromkeys(VECTORS)
        find = functools.partial(mup_jax.state_by_parameter, weight_dimension_numbers=numbers)
        assert_same(jax.jit(find)(state, params), kept)


def test_what_a_parameter_has():
    optimizer = partition(scale_by_sum(block_size=8, weight_dimension_numbers=NUMBERS))
    params = normal(SHAPES | VECTORS)
    gradients = normal(SHAPES | VECTORS)
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params))
    kept = mup_jax.state_by_parameter(state, params, optimizer)
    assert_same(kept.inner_states["other"], state.inner_states["other"])
    blocks = kept.inner_states["matrix"].inner_state.blocks
    assert blocks["bias"] == optax.MaskedNode()
    grids = lambda key: [x.started.shape for x in blocks[key]]
    assert grids("a") == [(2, 1), (2, 1), (1, 1), (1, 1)]
    assert grids("experts") == [(2, 2, 1, 1)]
    second = {
        "a": gradients["a"][8:16, :8],
        "b": gradients["b"][8:16, :8],
        "conv": gradients["conv"].reshape(20, 12)[8:16, :8],
        "layers": gradients["layers"][:, 8:16, :8],
        "other layers": gradients["other layers"][8:16, :, :8].swapaxes(0, 1),
    }
    for key, want in second.items():
        got = blocks[key][0].state.gradients[..., 1, 0, :, :]
        np.testing.assert_array_equal(got, want, err_msg=key)
    experts = blocks["experts"][0].state.gradients[:, :, 0, 0]
    np.testing.assert_array_equal(experts, gradients["experts"])


def runner(optimizer):
    update = jax.jit(optimizer.update)

    def run(state, params, trees):
        updates = []
        for tree in trees:
            new, state = update({key: tree[key] for key in params}, state, params)
            updates.append(new)
        return updates, state

    return run


SMALL = {"a": (12, 8), "b": (12, 8), "layers": (4, 12, 8)}


def only(tree, *keys):
    return {key: tree[key] for key in keys}


@pytest.mark.parametrize("name", QUICK_TO_COMPILE)
def test_parameters_come_and_go(name):
    optimizer = DIRECTIONS[name](weight_dimension_numbers=STACKED)
    run = runner(optimizer)
    params = normal(SMALL)
    trees = [normal(SMALL) for _ in range(4)]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)

    without = only(params, "a", "layers")
    _, state = run(optimizer.init(without), without, trees[:2])
    want, _ = run(state, without, trees[2:])
    kept = mup_jax.state_by_parameter(state, without, optimizer)
    added = mup_jax.state_from_parameters(kept, params, optimizer)
    got, after = run(added, params, trees[2:])
    for a, b in zip(got, want, strict=True):
        close(a["a"], b["a"])
        close(a["layers"], b["layers"])
    alone = only(params, "b")
    (first, _), _ = run(optimizer.init(alone), alone, trees[2:])
    if name == "muon":
        close(got[0]["b"], first["b"])
    else:  # but for the correction for bias
        cosine = jnp.vdot(got[0]["b"], first["b"])
        cosine /= jnp.linalg.norm(got[0]["b"]) * jnp.linalg.norm(first["b"])
        assert cosine > 0.99

    kept = mup_jax.state_by_parameter(after, params, optimizer)
    removed = mup_jax.state_from_parameters(kept, without, optimizer)
    more = [normal(SMALL)]
    close(run(removed, without, more)[0][0]["a"], run(after, params, more)[0][0]["a"])


@pytest.mark.parametrize("name", QUICK_TO_COMPILE)
def test_layers_are_added(name):
    optimizer = DIRECTIONS[name](weight_dimension_numbers=STACKED)
    run = runner(optimizer)
    params = normal(SMALL)
    trees = [normal(SMALL) for _ in range(3)]
    _, state = run(optimizer.init(params), params, trees[:2])
    want, _ = run(state, params, trees[2:])

    deeper = lambda x: jnp.concatenate([x, x[-2:]])
    kept = mup_jax.state_by_parameter(state, params, optimizer)
    kept.blocks["layers"] = jax.tree.map(deeper, kept.blocks["layers"])
    params["layers"], trees[2]["layers"] = deeper(params["layers"]), deeper(trees[2]["layers"])
    got, _ = run(mup_jax.state_from_parameters(kept, params, optimizer), params, trees[2:])
    for key, x in want[0].items():
        want_x = deeper(x) if key == "layers" else x
        np.testing.assert_allclose(got[0][key], want_x, rtol=1e-3, atol=1e-4)


def test_a_frozen_parameter_of_the_shape_of_others():
    """Which leaves of a shape a partition has left out is known to the optimizer alone."""

    def make(*frozen):
        label = lambda params: {key: "frozen" if key in frozen else "train" for key in params}
        return optax.partition(
            {"train": mup_jax.scale_by_muon(), "frozen": optax.set_to_zero()}, label
        )

    params = normal({"a": (8, 4), "b": (8, 4), "c": (8, 4)})
    state = filled(make().init(params))
    kept = mup_jax.state_by_parameter(state, params, make())
    frozen = mup_jax.state_from_parameters(kept, params, make("a"))
    got = mup_jax.state_by_parameter(frozen, params, make("a"))
    before, after = (x.inner_states["train"].inner_state.blocks for x in (kept, got))
    assert after["a"] == optax.MaskedNode()
    assert_same(only(after, "b", "c"), only(before, "b", "c"))
    with pytest.raises(ValueError, match="2 matrices in its group 8x4, and the parameters have 3"):
        mup_jax.state_by_parameter(frozen, params)


def test_without_jit_and_in_the_abstract():
    optimizer = partition(mup_jax.scale_by_muon(weight_dimension_numbers=NUMBERS))
    params = normal(SHAPES | VECTORS)
    state = filled(optimizer.init(params))
    there, back = there_and_back(optimizer)
    kept = there(state, params)
    assert_same(kept, jax.jit(there)(state, params))
    assert_same(back(kept, params), state)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(jax.eval_shape(there, state, params)) == types(kept)
    assert types(jax.eval_shape(back, kept, params)) == types(state)


def test_an_init_of_the_users_own_jit_is_left_as_it_was():
    muon = mup_jax.scale_by_muon()
    optimizer = optax.GradientTransformationExtraArgs(jax.jit(muon.init), muon.update)
    params = normal({"a": (8, 4), "b": (8, 4)})
    for _ in range(2):
        kept = mup_jax.state_by_parameter(optimizer.init(params), params, optimizer)
        assert kept.blocks.keys() == params.keys()
        assert optimizer.init(params).blocks.keys() == {"8x4"}


KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(AxisType.Explicit, id="Explicit"),
        pytest.param(AxisType.Auto, id="Auto", marks=pytest.mark.slow),
    ],
)
ON_MESH = {
    "a": ((16, 32), jax.P("data", "model")),
    "b": ((16, 32), jax.P("data", "model")),
    "layers": ((8, 32, 16), jax.P(None, "data", "model")),
    "uneven": ((3, 24, 24), jax.P(None, "data", None)),
}


@KINDS
@pytest.mark.parametrize("name", ["muon", pytest.param("shampoo", marks=pytest.mark.slow)])
def test_through_a_checkpoint_to_another_mesh(name, kind, tmp_path):
    optimizer = optax.chain(
        DIRECTIONS[name](weight_dimension_numbers=STACKED), optax.scale_by_adam()
    )
    arrays = normal({key: shape for key, (shape, _) in ON_MESH.items()})

    def on(sizes):
        names = ("data", "model", "other")[: len(sizes)]
        mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))
        put = lambda key, x: jax.device_put(x, jax.NamedSharding(mesh, ON_MESH[key][1]))
        with jax.set_mesh(mesh):
            return mesh, {key: put(key, x) for key, x in arrays.items()}

    mesh, params = on((4, 2))
    with jax.set_mesh(mesh):
        state = filled(jax.jit(optimizer.init)(params))
        kept = mup_jax.state_by_parameter(state, params, optimizer)
    ocp.save(tmp_path / "state", kept)

    mesh, params = on((2, 2, 2))
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(
            lambda p: mup_jax.state_by_parameter(optimizer.init(p), p, optimizer), params
        )
        everywhere = jax.NamedSharding(mesh, jax.P())
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), abstract
        )
        loaded = ocp.load(tmp_path / "state", abstract)
        # Arrays of the first mesh move by themselves.
        for known in (loaded, kept):
            got = mup_jax.state_from_parameters(known, params, optimizer)
            assert_same(got, state)
            fresh = optimizer.init(params)
            for x, like in zip(jax.tree.leaves(got), jax.tree.leaves(fresh), strict=True):
                assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
        jax.jit(optimizer.update)(params, got, params)
    if kind == AxisType.Explicit:
        # Nor is more of the state on a device than before.
        mu = kept[0].blocks["layers"][0].state.mu
        assert mu.addressable_shards[0].data.size == mu.size // 8


@KINDS
def test_parameters_on_a_mesh_outside_set_mesh(kind):
    optimizer = mup_jax.scale_by_muon()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    params = jax.device_put(
        normal({"a": (16, 8), "b": (16, 8)}), jax.NamedSharding(mesh, jax.P("data"))
    )
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params))
    kept = mup_jax.state_by_parameter(state, params, optimizer)
    got = mup_jax.state_from_parameters(kept, params, optimizer)
    assert_same(got, state)
    jax.jit(optimizer.update)(params, got)


def test_clear_errors():
    optimizer = mup_jax.scale_by_muon(weight_dimension_numbers=STACKED)
    params = normal({"a": (8, 4), "layers": (3, 8, 4)})
    state = optimizer.init(params)
    kept = mup_jax.state_by_parameter(state, params, optimizer)

    other = normal({"a": (8, 4), "layers": (4, 8, 4)})
    with pytest.raises(
        ValueError, match=r"group 4x8x4, and the parameters have 4 \(\['layers'\]\)"
    ):
        mup_jax.state_by_parameter(state, other, optimizer)
    with pytest.raises(ValueError, match=r"3 matrices in its group 3x8x4, .* have 0 \(no leaf\)"):
        mup_jax.state_by_parameter(state, params)
    with pytest.raises(ValueError, match="by parameter already"):
        mup_jax.state_by_parameter(kept, params, optimizer)
    with pytest.raises(ValueError, match="optimizer=MuonDimensionNumbers"):
        mup_jax.state_by_parameter(state, params, STACKED)
    with pytest.raises(ValueError, match="not of this optimizer"):
        mup_jax.state_by_parameter(state, params, optax.chain(optimizer))
    with pytest.raises(ValueError, match="not of this optimizer"):
        mup_jax.state_by_parameter(state, params, optax.scale_by_adam())

    match = re.escape(
        "by_parameter has float32 of shape (3, 1, 1, 8, 4) at .blocks['layers'][0].state.mu, and "
        "the parameter needs float32 of shape (4, 1, 1, 8, 4)"
    )
    with pytest.raises(ValueError, match=match):
        mup_jax.state_from_parameters(kept, other, optimizer)
    with pytest.raises(ValueError, match="matrices by shape"):
        mup_jax.state_from_parameters(state, params, optimizer)
    with pytest.raises(ValueError, match=r"no \[0\].count: it is the state of another optimizer"):
        mup_jax.state_from_parameters(kept, params, optax.chain(optimizer))
    with pytest.raises(ValueError, match=r"nothing for any of \['model'\]\['A'\]"):
        mup_jax.state_from_parameters(kept, {"model": {"A": params["a"]}}, optimizer)
    nothing = mup_jax.state_from_parameters(optax.EmptyState(), params, optax.scale(-1.0))
    assert nothing == optax.EmptyState()
    soap = mup_jax.scale_by_soap(weight_dimension_numbers=STACKED)
    with pytest.raises(ValueError, match=r"nothing at \.blocks"):
        mup_jax.state_from_parameters(kept, params, soap)


def test_the_examples_run():
    assert doctest.testmod(by_parameter).failed == 0


def test_the_document_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    new = jax.eval_shape(names["optimizer"].update, names["params"], names["state"])
    assert new[0]["layers"]["w"].shape == (6, 8, 8)
