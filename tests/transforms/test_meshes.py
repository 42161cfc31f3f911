"""On a mesh: the updates of one device, equal shares of state and work, and little on the wire."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers
from orbax.checkpoint import v1 as ocp

import mup_jax

AXIS_TYPES = (AxisType.Explicit, AxisType.Auto)
STACKED = MuonDimensionNumbers(-2, -1)
BLOCK = 8
# Large, so that the smallest directions of a gradient do not show the order of sums.
EPS = 1e-2

# Blocks that fit in the shards below, and matrices that have to be made whole.
# Blocks have their turns from the second step on.
SCHEDULE = {"eps": EPS, "exact_steps": 1}
TRANSFORMATIONS = {
    "muon": mup_jax.scale_by_muon,
    "shampoo_blocks": functools.partial(mup_jax.scale_by_shampoo, block_size=BLOCK, **SCHEDULE),
    "shampoo": functools.partial(mup_jax.scale_by_shampoo, block_size=None, **SCHEDULE),
    "soap_blocks": functools.partial(mup_jax.scale_by_soap, block_size=BLOCK, **SCHEDULE),
    "soap": functools.partial(mup_jax.scale_by_soap, block_size=None, **SCHEDULE),
    "soap_one_side": functools.partial(
        mup_jax.scale_by_soap, block_size=BLOCK, sides="out", **SCHEDULE
    ),
    "adamuon": mup_jax.scale_by_adamuon,
    "kl_soap_one_side": functools.partial(
        mup_jax.scale_by_kl_soap, block_size=BLOCK, sides="out", **SCHEDULE
    ),
    "kl_shampoo_one_side": functools.partial(
        mup_jax.scale_by_kl_shampoo, block_size=BLOCK, sides="in", **SCHEDULE
    ),
    "graft": lambda weight_dimension_numbers: mup_jax.graft(
        optax.scale_by_adam(),
        mup_jax.scale_by_shampoo(
            block_size=BLOCK, weight_dimension_numbers=weight_dimension_numbers, **SCHEDULE
        ),
        weight_dimension_numbers=weight_dimension_numbers,
    ),
}
IN_BLOCKS = ("shampoo_blocks", "soap_blocks", "graft")

# On a mesh (4, 2): stacked and single matrices, sharded on both sides, on one, by both axes, or
# not at all; two of one shape in different ways.
LEAVES = {
    "stacked": ((8, 32, 16), jax.P(None, "data", "model")),
    "other way round": ((8, 32, 16), jax.P(None, None, ("data", "model"))),
    "layers": ((4, 16, 16), jax.P("data", "model", None)),
    "bfloat16": ((32, 16), jax.P("data", "model")),
    "uneven": ((3, 24, 24), jax.P(None, "data", None)),
    "replicated": ((16, 16), jax.P()),
}
NUMBERS = dict.fromkeys(LEAVES, STACKED)


def make_mesh(axis_type, shape=(4, 2)):
    names = ("data", "model", "other")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def gradients(leaves, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            name: rng.normal(size=shape).astype(jnp.bfloat16 if name == "bfloat16" else np.float32)
            for name, (shape, _) in leaves.items()
        }
        for _ in range(steps)
    ]


def run(transformation, trees):
    state = jax.jit(transformation.init)(trees[0])
    update = jax.jit(transformation.update)
    updates = []
    for tree in trees:
        u, state = update(tree, state, trees[0])
        updates.append(u)
    return updates, state


def put(tree, leaves, mesh):
    return {
        name: jax.device_put(x, jax.NamedSharding(mesh, leaves[name][1]))
        for name, x in tree.items()
    }


SLOW = [
    ("shampoo", "Explicit"), ("soap", "Explicit"), ("soap_blocks", "Explicit"),
    ("soap_one_side", "Explicit"), ("graft", "Explicit"), ("adamuon", "Explicit"),
    ("kl_soap_one_side", "Explicit"),
    *((name, "Auto") for name in TRANSFORMATIONS if name != "muon"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        pytest.param(
            name, kind, marks=[] if quick else [pytest.mark.slow], id=f"{name}-{kind.name}"
        )
        for name in TRANSFORMATIONS
        for kind in AXIS_TYPES
        for quick in [(name, kind.name) not in SLOW]
    ],
)
def test_updates_are_those_of_one_device(name, axis_type):
    make = lambda: TRANSFORMATIONS[name](weight_dimension_numbers=NUMBERS)
    trees = gradients(LEAVES, steps=3)
    # A bad gradient is skipped and counted on whichever device it is.
    trees[1]["uneven"][1, 3, 20] = np.nan
    want, want_state = run(make(), trees)
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        sharded = [put(tree, LEAVES, mesh) for tree in trees]
        got, state = run(make(), sharded)
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for leaf in LEAVES:
            difference, whole = (np.asarray(x, np.float64) for x in (a[leaf], b[leaf]))
            error = np.linalg.norm(difference - whole) / np.linalg.norm(whole)
            assert error < (2e-2 if leaf == "bfloat16" else 2e-4), (step, leaf, error)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state) == shapes(want_state)
    counts = [x for x in jax.tree.leaves(want_state) if x.shape == () and x.dtype == jnp.int32]
    got_counts = [x for x in jax.tree.leaves(state) if x.shape == () and x.dtype == jnp.int32]
    assert counts == got_counts
    if axis_type == AxisType.Explicit:
        for leaf, x in sharded[0].items():
            assert got[0][leaf].sharding.is_equivalent_to(x.sharding, x.ndim)


OUTSIDE = {"replicated": ((16, 16), jax.P()), "divided": ((16, 16), jax.P("data", None))}
QUICK_OUTSIDE = ["muon-Auto-eager", "muon-Explicit-eager", "shampoo_blocks-Auto-jit"]


@pytest.mark.parametrize(
    ("name", "axis_type", "how"),
    [
        pytest.param(
            name, kind, how, marks=[] if key in QUICK_OUTSIDE else pytest.mark.slow, id=key
        )
        for name in TRANSFORMATIONS
        for kind in AXIS_TYPES
        for how in ("eager", "jit", "out_shardings")
        for key in [f"{name}-{kind.name}-{how}"]
        # There JAX itself asks for `jax.set_mesh`, as for Optax's Adam.
        if not (kind == AxisType.Explicit and how == "jit" and name in ("adamuon", "graft"))
    ],
)
def test_parameters_on_a_mesh_outside_set_mesh(name, axis_type, how):
    """As data-parallel users have them: arrays with a sharding, and nothing said of the mesh."""
    trees = gradients(OUTSIDE, steps=2)
    want, _ = run(TRANSFORMATIONS[name](weight_dimension_numbers=None), trees)
    mesh = make_mesh(axis_type)
    sharded = [put(tree, OUTSIDE, mesh) for tree in trees]
    transformation = TRANSFORMATIONS[name](weight_dimension_numbers=None)
    init = transformation.init
    if how != "eager":
        abstract = jax.eval_shape(init, sharded[0])
        replicated = jax.NamedSharding(mesh, jax.P())
        shardings = jax.tree.map(lambda _: replicated, abstract)
        init = jax.jit(init, **({} if how == "jit" else {"out_shardings": shardings}))
    state = init(sharded[0])
    update = jax.jit(transformation.update)
    for tree, expected in zip(sharded, want, strict=True):
        updates, state = update(tree, state, sharded[0])
        for leaf in OUTSIDE:
            error = np.abs(np.asarray(updates[leaf]) - np.asarray(expected[leaf])).max()
            assert error <= 2e-2 * np.abs(expected[leaf]).max()
            assert updates[leaf].sharding.is_equivalent_to(tree[leaf].sharding, 2)


@pytest.mark.parametrize("manual", [("data",), ("data", "model")])
@pytest.mark.parametrize("name", ["muon", "soap_blocks"])
def test_each_device_takes_a_whole_step_inside_shard_map(name, manual):
    """As those have it who average gradients themselves; other axes stay automatic."""
    trees = gradients(OUTSIDE, steps=2)
    transformation = TRANSFORMATIONS[name](weight_dimension_numbers=None)
    want, _ = run(transformation, trees)
    update = jax.jit(
        jax.shard_map(
            transformation.update,
            mesh=make_mesh(AxisType.Auto),
            in_specs=jax.P(),
            out_specs=jax.P(),
            axis_names=set(manual),
            check_vma=False,
        )
    )
    state = transformation.init(trees[0])
    for tree, expected in zip(trees, want, strict=True):
        updates, state = update(tree, state, trees[0])
        for leaf in OUTSIDE:
            np.testing.assert_allclose(updates[leaf], expected[leaf], rtol=1e-3, atol=1e-3)


# A Llama's layers, as fully sharded and tensor-parallel training has them.
D, F, L = 64, 128, 16
FSDP = {
    "qkv": ((L, D, D), jax.P(None, "data", "model")),
    "up": ((L, D, F), jax.P(None, "data", "model")),
    "down": ((L, F, D), jax.P(None, "data", "model")),
}
TENSOR = FSDP | {
    "up": ((L, D, F), jax.P(None, None, ("data", "model"))),
    "down": ((L, F, D), jax.P(None, ("data", "model"), None)),
}


def compiled_update(name, leaves, mesh):
    """The compiled update of a device, and the bytes of state that it has, on a mesh or alone."""
    # With less to do at a step there may be a device that has nothing to do.
    options = {} if name == "muon" else {"precondition_frequency": 1}
    transformation = TRANSFORMATIONS[name](weight_dimension_numbers=STACKED, **options)
    tree = gradients(leaves, steps=1)[0]
    if mesh is None:
        state = jax.jit(transformation.init)(tree)
        program = jax.jit(transformation.update).lower(tree, state).compile()
    else:
        with jax.set_mesh(mesh):
            tree = put(tree, leaves, mesh)
            state = jax.jit(transformation.init)(tree)
            program = jax.jit(transformation.update).lower(tree, state).compile()
    parts = [x.addressable_shards[0].data for x in jax.tree.leaves(state)]
    return program, sum(x.nbytes for x in parts)


def collectives(text):
    """`{operation: [number of elements of each]}` of a compiled program."""
    found = collections.defaultdict(list)
    operations = "all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter"
    pattern = rf" = (\(?[^=]*?) ({operations})\("
    for shapes, operation in re.findall(pattern, re.sub(r"/\*.*?\*/", "", text)):
        sizes = [
            np.prod([int(d) for d in dims.split(",") if d] or [1])
            for dims in re.findall(r"\[([0-9,]*)\]", shapes)
        ]
        found[operation].append(int(sum(sizes)))
    return found


def products(program):
    """Operations of the matrix products of a program that have more rows than a block."""
    shapes = dict(re.findall(r"%([\w.-]+) = f32\[([\d,]*)\]", program.as_text()))
    total = 0
    pattern = r"= f32\[([\d,]*)\]\S* dot\(%([\w.-]+), .*?lhs_contracting_dims=\{(\d+)\}"
    for out, left, axis in re.findall(pattern, program.as_text()):
        sides = [int(d) for d in out.split(",")]
        depth = int(shapes[left].split(",")[int(axis)])
        if max(*sides, depth) > BLOCK:
            total += 2 * np.prod(sides) * depth
    assert total
    return total


def factorizations(text):
    """How many matrices a program factorizes: LAPACK calls, each in a loop over a batch."""
    return sum(int(n) for n in re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', text))


@pytest.mark.optimized
@pytest.mark.parametrize(
    "leaves",
    [pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow), pytest.param(TENSOR, id="tensor")],
)
@pytest.mark.parametrize(
    "name",
    [
        "muon",
        "shampoo_blocks",
        pytest.param("shampoo", marks=pytest.mark.slow),
        pytest.param("soap", marks=pytest.mark.slow),
    ],
)
def test_state_and_work_are_equal_shares_and_nothing_is_gathered(name, leaves):
    mesh = make_mesh(AxisType.Explicit)
    alone, state_alone = compiled_update(name, leaves, None)
    program, state = compiled_update(name, leaves, mesh)
    assert state <= 1.15 * state_alone / 8
    assert program.cost_analysis()["flops"] <= 1.15 * alone.cost_analysis()["flops"] / 8
    text = program.as_text()
    assert factorizations(text) <= 1.15 * factorizations(alone.as_text()) / 8
    if name != "muon":
        assert factorizations(text) > 0

    found = collectives(text)
    assert set(found) <= {"all-to-all", "all-reduce"}
    matrices = sum(shape[0] for shape, _ in leaves.values())
    # Whether a gradient is finite: a number for each matrix.
    assert sum(found["all-reduce"]) <= matrices + len(found["all-reduce"])
    if name in IN_BLOCKS:
        assert not found["all-to-all"]
    else:
        # Each divided side once on the way in and once on the way back, with a shard each.
        sides = [len([names for names in spec if names]) for _, spec in leaves.values()]
        shards = [np.prod(shape) // 8 for shape, _ in leaves.values()]
        assert len(found["all-to-all"]) <= 2 * sum(sides)
        assert sum(found["all-to-all"]) == 2 * np.dot(sides, shards)


@pytest.mark.optimized
def test_the_work_on_a_vocabulary_is_divided_though_it_is_one_matrix():
    # No number of devices divides it.
    leaves = {"embedding": ((1, 2011, 32), jax.P(None, None, ("data", "model")))}
    alone, state_alone = compiled_update("soap_one_side", leaves, None)
    program, state = compiled_update("soap_one_side", leaves, make_mesh(AxisType.Explicit))
    assert state <= 1.15 * state_alone / 8
    # Products, but for those of the factors. (The compiler's own count has elementwise work twice
    # where its result is sent in two parts.)
    assert products(program) <= 1.15 * products(alone) / 8
    found = collectives(program.as_text())
    assert set(found) <= {"all-to-all", "all-reduce"}
    # The gradient in and the direction out, over both axes at once; the moments stay.
    assert found["all-to-all"] == [2016 * 32 // 8] * 2
    # A factor, and what is asked of all parts of a matrix.
    assert sum(found["all-reduce"]) <= 32 * 32 + 10


def test_the_state_of_a_vocabulary_is_the_same_on_every_mesh():
    """It is filled up to 1008 rows, which begin elsewhere in the parts of 1002."""
    leaves = {
        "nothing divides it": ((1, 1001, 16), jax.P(None, None, ("data", "model"))),
        "parameters are divided": ((1, 1002, 16), jax.P(None, "model", "data")),
    }
    make = lambda: TRANSFORMATIONS["soap_one_side"](weight_dimension_numbers=STACKED)
    trees = gradients(leaves, steps=2)
    want, want_state = run(make(), trees)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        got, state = run(make(), [put(tree, leaves, mesh) for tree in trees])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    for blocks in want_state.blocks.values():
        assert blocks[0].state.mu.shape[-2:] == (1008, 8)
    # Bases are known but for the signs of their columns, and with them the moments.
    size = lambda x: np.abs(np.asarray(x, np.float32))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_allclose(size(a), size(b), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.optimized
def test_automatic_axes_gather_nothing_either():
    for name in ("muon", "shampoo_blocks"):
        program, _ = compiled_update(name, FSDP, make_mesh(AxisType.Auto))
        found = collectives(program.as_text())
        assert not found["all-gather"]
        assert bool(found["all-to-all"]) == (name == "muon")


@pytest.mark.parametrize(
    "name",
    [
        "shampoo_blocks",
        pytest.param("muon", marks=pytest.mark.slow),
        pytest.param("soap", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_restored_bit_for_bit_on_other_meshes(name, tmp_path):
    leaves = {"up": FSDP["up"], "uneven": ((3, 24, 24), jax.P(None, "data", None))}
    transformation = TRANSFORMATIONS[name](weight_dimension_numbers=STACKED)
    tree = gradients(leaves, steps=1)[0]
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        _, state = run(transformation, [put(tree, leaves, mesh)])
    ocp.save(tmp_path / "state", state)

    def restored(mesh, tree):
        abstract = jax.eval_shape(transformation.init, tree)
        # Scalars have no sharding of their own.
        everywhere = jax.NamedSharding(mesh, jax.P())
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or everywhere),
            abstract,
        )
        got = ocp.load(tmp_path / "state", abstract)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        return got

    for shape in ((2, 2, 2), (1,)):
        mesh = make_mesh(AxisType.Explicit, shape)
        with jax.set_mesh(mesh):
            layout = leaves if len(shape) > 1 else dict.fromkeys(leaves, (None, jax.P()))
            placed = put(tree, layout, mesh)
            # It goes on there.
            jax.jit(transformation.update)(placed, restored(mesh, placed))
