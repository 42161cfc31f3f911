"""An optimizer written for one block, on everything that leaves and meshes can be."""

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax.transforms import loops

STACKED = MuonDimensionNumbers(-2, -1)
B1, B2, EPS = 0.9, 0.95, 0.1


class State(NamedTuple):
    momentum: jax.Array
    gram: jax.Array
    root: jax.Array


def init(shape):
    m, _ = shape
    return State(jnp.zeros(shape), jnp.zeros((m, m)), jnp.eye(m))


def accumulate(g, s, step):
    return s._replace(gram=B2 * s.gram + (1 - B2) * g @ g.T)


def refresh(s, step):
    values, vectors = jnp.linalg.eigh(s.gram / (1 - B2**step))
    return s._replace(root=vectors * (jnp.maximum(values, 0) + EPS) ** -0.5 @ vectors.T)


def direction(g, s, step):
    momentum = B1 * s.momentum + (1 - B1) * g
    return s.root @ momentum, s._replace(momentum=momentum)


RULE = mup_jax.BlockRule(init, direction, accumulate, refresh)
by_rule = functools.partial(mup_jax.scale_by_blocks, RULE)


class Textbook:
    """The rule in float64, on one matrix that is one block."""

    def __init__(self, is_due):
        self.step, self.momentum, self.gram, self.root = 0, 0.0, 0.0, None
        self.is_due = is_due

    def update(self, g):
        self.gram = B2 * self.gram + (1 - B2) * g @ g.T
        if self.root is None or self.is_due(self.step):
            values, vectors = np.linalg.eigh(self.gram / (1 - B2 ** (self.step + 1)))
            self.root = vectors * (np.maximum(values, 0) + EPS) ** -0.5 @ vectors.T
        self.momentum = B1 * self.momentum + (1 - B1) * g
        self.step += 1
        return self.root @ self.momentum


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(transformation, gradients, params=None):
    state = transformation.init(gradients[0])
    update = jax.jit(transformation.update)
    updates = []
    for gradient in gradients:
        u, state = update(gradient, state, params)
        updates.append(u)
    return updates, state


def assert_close(got, want, tolerance=1e-3):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_agrees_with_float64_reference():
    gradients = normal(8, 6, 10)
    got, _ = run(by_rule(precondition_frequency=3, stagger=False), list(gradients))
    textbook = Textbook(lambda step: step % 3 == 0)
    for u, gradient in zip(got, gradients.astype(np.float64), strict=True):
        assert_close(u, textbook.update(gradient))


def test_blocks_are_matrices_of_their_own():
    gradients = normal(5, 9, 11)
    got, _ = run(by_rule(block_size=4), list(gradients))
    cuts = lambda d: [(start, min(start + 4, d)) for start in range(0, d, 4)]
    for top, bottom in cuts(9):
        for left, right in cuts(11):
            textbook = Textbook(lambda step: True)
            for u, gradient in zip(got, gradients.astype(np.float64), strict=True):
                want = textbook.update(gradient[top:bottom, left:right])
                assert_close(u[top:bottom, left:right], want)


def test_stacks_convolutions_and_separate_leaves_are_the_same_matrices():
    gradients = normal(4, 3, 2, 6, 5)
    options = {"precondition_frequency": 2, "stagger": False, "block_size": 4}
    leaves, _ = run(by_rule(**options), [list(g.reshape(-1, 6, 5)) for g in gradients])
    stacked, _ = run(by_rule(**options, weight_dimension_numbers=STACKED), list(gradients))
    assert_close(np.reshape(stacked, (4, 6, 6, 5)), np.asarray(leaves))
    numbers = MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3)
    kernels = gradients.reshape(4, 6, 2, 3, 5)
    convolved, _ = run(by_rule(**options, weight_dimension_numbers=numbers), list(kernels))
    assert_close(np.reshape(convolved, (4, 6, 6, 5)), np.asarray(leaves))


@pytest.mark.parametrize("stagger", [True, False])
def test_work_in_parts_is_the_same_work(stagger, monkeypatch):
    gradients = [
        {"a": normal(8, 12, 8, seed=2 * i), "b": normal(8, 9, seed=2 * i + 1)} for i in range(6)
    ]
    numbers = {"a": STACKED, "b": MuonDimensionNumbers()}
    options = {"precondition_frequency": 3, "block_size": 4, "weight_dimension_numbers": numbers}
    make = lambda: by_rule(stagger=stagger, **options)
    want, want_state = run(make(), gradients)
    monkeypatch.setattr(loops, "_AT_ONCE", (1, 200))
    text = jax.jit(make().update).lower(gradients[0], want_state).as_text()
    assert "f32[8,12,8]" not in text
    got, state = run(make(), gradients)
    for a, b in zip(
        jax.tree.leaves((got, state)), jax.tree.leaves((want, want_state)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_first_refresh_is_for_early_steps_and_late_first_gradients():
    class Counts(NamedTuple):
        first: jax.Array
        later: jax.Array

    rule = mup_jax.BlockRule(
        init=lambda shape: Counts(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
        direction=lambda g, s, step: (g, s),
        refresh=lambda s, step: s._replace(later=s.later + 1),
        first_refresh=lambda s, step: s._replace(first=s.first + 1),
    )
    transformation = mup_jax.scale_by_blocks(rule, precondition_frequency=4, first_steps=2)
    gradients = normal(12, 5, 3, 3)
    gradients[:6, 1] = 0  # a first gradient between the early steps
    _, state = run(transformation, [list(g) for g in gradients])
    counts = state.blocks["3x3"][0].state
    early = {0, 1, 2}
    np.testing.assert_array_equal(counts.first.ravel(), [3, 1, 3, 3, 3])
    # The turn of block i comes at the steps i, i + 4, ...
    steps = [{0, 4, 8}, {9}, {2, 6, 10}, {3, 7, 11}, {0, 4, 8}]
    np.testing.assert_array_equal(counts.later.ravel(), [len(x - early) for x in steps])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_gradient_leaves_all_state_of_its_matrix_alone(bad):
    gradients = normal(3, 2, 6, 4)
    gradients[2, 1, 3, 3] = bad
    transformation = by_rule(weight_dimension_numbers=STACKED, block_size=3)
    _, before = run(transformation, list(gradients[:2]))
    updates, state = jax.jit(transformation.update)(gradients[2], before)
    np.testing.assert_array_equal(updates[1], 0)
    assert np.abs(updates[0]).min() > 0
    for old, new in zip(jax.tree.leaves(before.blocks), jax.tree.leaves(state.blocks), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert old.dtype == bool or (np.asarray(new[0]) != old[0]).any()
    assert state.nonfinite == 1
    assert state.count == 3


LEAVES = {
    "stacked": ((8, 32, 16), jax.P(None, "data", "model")),
    "layers": ((4, 16, 16), jax.P("data", "model", None)),
    "uneven": ((5, 24, 24), jax.P(None, "data", None)),
    "replicated": ((16, 16), jax.P()),
}


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("block_size", [8, None])
def test_on_a_mesh_as_on_one_device(axis_type, block_size):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    gradients = [
        {name: normal(*shape, seed=i) for name, (shape, _) in LEAVES.items()} for i in range(3)
    ]
    numbers = dict.fromkeys(LEAVES, STACKED)
    make = lambda: by_rule(
        block_size=block_size, precondition_frequency=2, weight_dimension_numbers=numbers
    )
    want, _ = run(make(), gradients)
    with jax.set_mesh(mesh):
        put = lambda name, x: jax.device_put(x, jax.NamedSharding(mesh, LEAVES[name][1]))
        placed = [{name: put(name, x) for name, x in tree.items()} for tree in gradients]
        got, state = run(make(), placed)
    for name in LEAVES:
        assert_close([u[name] for u in got], [u[name] for u in want])
    # Each device has an eighth of what is kept of the matrices, but for the single one.
    for name in LEAVES.keys() - {"replicated"}:
        shape, _ = LEAVES[name]
        kept = state.blocks["x".join(map(str, shape))][0].state.momentum
        assert kept.addressable_shards[0].data.size == kept.size // 8, name


def test_a_state_goes_on_on_another_mesh():
    """Also where matrices are stored along another axis, as the devices do not divide them."""
    gradients = normal(4, 5, 24, 16)
    transformation = by_rule(weight_dimension_numbers=STACKED)
    want, _ = run(transformation, list(gradients))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spread = jax.NamedSharding(mesh, jax.P(None, "data", "model"))
        _, state = run(transformation, [jax.device_put(g, spread) for g in gradients[:3]])
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
    got, _ = jax.jit(transformation.update)(gradients[3], alone)
    assert_close(got, want[3])


def test_a_rule_may_ask_of_its_block():
    def make(block):
        def direction(g, s, step):
            del step
            if block.sides == (True, False):  # the out side is in parts
                return g / jnp.sqrt(block.sum_over_parts(jnp.sum(g**2, 1, keepdims=True))), s
            return g / block.max_over_parts(jnp.max(jnp.abs(g))), s

        return mup_jax.BlockRule(lambda shape: (), direction)

    g = normal(8, 37)
    transformation = mup_jax.scale_by_blocks(make, sides="in")
    want = g / np.linalg.norm(g, axis=1, keepdims=True)
    got, _ = run(transformation, [g])
    assert_close(got[0], want, 1e-6)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(g, jax.NamedSharding(mesh, jax.P("data", None)))
        got, _ = run(transformation, [placed])
    assert_close(got[0], want, 1e-6)
    got, _ = run(mup_jax.scale_by_blocks(make), [g])
    assert_close(got[0], g / np.abs(g).max(), 1e-6)


def test_states_can_be_donated_from_the_first():
    for transformation in (by_rule(), mup_jax.scale_by_shampoo(), mup_jax.scale_by_soap()):
        params = {"w": jnp.ones((6, 4))}
        update = jax.jit(transformation.update, donate_argnums=1)
        _, state = update(params, transformation.init(params))
        updates, _ = update(params, state)
        assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"refresh": lambda s, step: (s.momentum, s.root)},
        {"accumulate": lambda g, s, step: s._replace(gram=g @ g.T[:, :2])},
        {"direction": lambda g, s, step: (g.T, s)},
        {"direction": lambda g, s, step: (g, s.momentum)},
    ],
)
def test_a_rule_that_returns_something_else_is_refused(wrong):
    transformation = mup_jax.scale_by_blocks(RULE._replace(**wrong))
    params = jnp.ones((3, 4))
    with pytest.raises(ValueError, match="return what `init` does"):
        transformation.update(params, transformation.init(params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precondition_frequency": 0}, "precondition_frequency=0"),
        ({"first_steps": 0}, "first_steps=0"),
        ({"block_size": 0}, "block_size=0"),
        ({"sides": "left"}, "sides='left'"),
        ({"block_size": jnp.int32(3)}, "static_args"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        by_rule(**options)


MAKERS = {"shampoo": mup_jax.scale_by_shampoo, "soap": mup_jax.scale_by_soap}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", MAKERS)
def test_little_memory_beside_the_state(name):
    """Bytes of temporary memory per parameter, of 50 million."""
    shapes = {"qkvo": (4, 4, 1024, 1024), "up": (4, 2, 1024, 2048), "down": (4, 2048, 1024)}
    tree = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}
    transformation = MAKERS[name](block_size=256, weight_dimension_numbers=STACKED)
    state = jax.eval_shape(transformation.init, tree)
    program = jax.jit(transformation.update, donate_argnums=1).lower(tree, state).compile()
    parameters = sum(np.prod(shape) for shape in shapes.values())
    assert program.memory_analysis().temp_size_in_bytes <= 15 * parameters


STEPS_OF_ONE_DEVICE = """
import jax, jax.numpy as jnp, mup_jax
shapes = [(64, 64), (64, 96), (96, 64), (32, 64), (128, 64)]
params = [jnp.ones(shape) + jnp.eye(*shape) for shape in shapes]
for make in (mup_jax.scale_by_shampoo, mup_jax.scale_by_soap):
    transformation = make(precondition_frequency=2)
    state, update = transformation.init(params), jax.jit(transformation.update)
    for _ in range(30):
        _, state = jax.block_until_ready(update(params, state))
"""


@pytest.mark.slow
def test_factorizations_of_several_shapes_do_not_wait_for_each_other():
    """On one device, whose threads jaxlib's batches share; tests have several, which differ."""
    ours = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "OPENBLAS_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", STEPS_OF_ONE_DEVICE], env=ours, timeout=300, check=True)


def test_chains_with_optax():
    params = {"w": normal(6, 4), "b": normal(4)}
    labels = {"w": "matrix", "b": "other"}
    transformation = optax.partition(
        {"matrix": optax.chain(by_rule(), optax.scale(-0.1)), "other": optax.sgd(0.1)}, labels
    )
    updates, _ = transformation.update(params, transformation.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
