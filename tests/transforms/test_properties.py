"""What must hold for every transformation of matrices, from one registry.

Most properties compare leaves within one call: the leaves of `run_leaves` are K square matrices,
so that a transformation is compiled once for all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax.transforms.engine import Blocks
from mup_jax.transforms.linalg import use_paths_of
from tests import reference

STACKED = MuonDimensionNumbers(-2, -1)
# Leaves, their side, and that of their blocks.
K, N, BLOCK = 4, 12, 6
RNG = np.random.default_rng(0)


# GPUs take one function from each of the other two.
OPTIMIZED = [
    pytest.param(path, id=f"{path} optimized", marks=[pytest.mark.slow, pytest.mark.optimized])
    for path in ("cpu", "gpu", "tpu")
]
on_cpu_and_tpu = pytest.mark.parametrize("path", ["cpu", "tpu", *OPTIMIZED], indirect=True)


@pytest.fixture(autouse=True, params=["cpu", *OPTIMIZED])
def path(request):
    """Every property holds for the algorithms of every platform."""
    with use_paths_of(request.param):
        yield


def grafted(weight_dimension_numbers=None, **options):
    numbers = {"weight_dimension_numbers": weight_dimension_numbers}
    direction = mup_jax.scale_by_shampoo(**numbers, **options)
    return mup_jax.graft(optax.scale_by_adam(0.9, 0.98), direction, **numbers)


def normalized(weight_dimension_numbers=None, **options):
    numbers = {"weight_dimension_numbers": weight_dimension_numbers}
    direction = mup_jax.scale_by_soap(**numbers, **options)
    return optax.chain(direction, mup_jax.normalize_spectral_norm(**numbers))


def orthogonalized(weight_dimension_numbers=None, **options):
    numbers = {"weight_dimension_numbers": weight_dimension_numbers}
    direction = mup_jax.scale_by_soap(**numbers, **options)
    return optax.chain(direction, mup_jax.orthogonalize_updates(**numbers))


muon = mup_jax.scale_by_muon
# A new transformation of matrices is tested by an entry here. Sophia-G, to which a matrix is an
# array as any other, has tests of its own.
TRANSFORMATIONS = {
    "muon": muon,
    "muon_newton_schulz": functools.partial(muon, orthogonalizer="newton_schulz"),
    "muon_polar_express": functools.partial(muon, orthogonalizer="polar_express"),
    "muon_svd": functools.partial(muon, orthogonalizer="svd"),
    "adamuon": mup_jax.scale_by_adamuon,
    "shampoo": mup_jax.scale_by_shampoo,
    "soap": mup_jax.scale_by_soap,
    "graft_adam_shampoo": grafted,
    "normalized_soap": normalized,
    "normuon": mup_jax.scale_by_normuon,
    "kl_shampoo": mup_jax.scale_by_kl_shampoo,
    "kl_soap": mup_jax.scale_by_kl_soap,
    "orthogonalized_soap": orthogonalized,
}
# One of each kind, where the orthogonalizer makes no difference.
KINDS = [name for name in TRANSFORMATIONS if not name.startswith("muon_")]
# Those that divide entry by entry do not rotate with the gradient, and a power iteration begins
# somewhere.
ENTRYWISE = ("adamuon", "graft_adam_shampoo", "normuon")
NOT_SYMMETRIC = ("normalized_soap",)
# The in side is not to NorMuon what the out side is.
NOT_TRANSPOSED = ("normuon",)
# Those that make of one direction several, by entries or out of rounding noise.
NOT_OF_RANK_ONE = ("adamuon", "normuon", "orthogonalized_soap")


def make(name, staggered=False, **options):
    """Whole matrices that refresh all at once, or blocks that take turns."""
    if "muon" not in name:
        options |= {"precondition_frequency": 2, "exact_steps": 1, "stagger": staggered}
        options |= {"block_size": BLOCK} if staggered else {}
    return TRANSFORMATIONS[name](**options)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def well_conditioned(number, n):
    """Of which rounding leaves six digits, whatever divides by their smallest directions."""
    values = np.linspace(1, 3, n, dtype=np.float32)
    return np.stack([orthogonal(n) * values @ orthogonal(n) for _ in range(number)])


def orthogonal(n):
    return np.linalg.qr(RNG.normal(size=(n, n)))[0].astype(np.float32)


def run(transformation, gradients):
    """The updates of all steps, and the last state. The first gradients are the parameters."""
    state = transformation.init(gradients[0])
    update = jax.jit(transformation.update)
    updates = []
    for gradient in gradients:
        u, state = update(gradient, state, gradients[0])
        updates.append(u)
    return updates, state


@functools.cache
def compiled(name, staggered):
    transformation = make(name, staggered)
    return transformation.init, jax.jit(transformation.update)


def run_leaves(name, gradients, staggered=False):
    """Updates `(steps, K, N, N)` and the states after each step, for K separate leaves."""
    init, update = compiled(name, staggered)
    state = init(list(jnp.zeros((K, N, N))))
    updates, states = [], []
    for gradient in gradients:
        u, state = update(list(jnp.asarray(gradient, jnp.float32)), state)
        updates.append(np.stack(u))
        states.append(state)
    return np.stack(updates), states


def own_states(state):
    """The states of this project's transformations in a larger one."""
    is_own = lambda x: hasattr(x, "nonfinite")
    return [s for s in jax.tree.leaves(state, is_leaf=is_own) if is_own(s)]


def counted(state):
    """Every `nonfinite` counter of a state, summed."""
    return sum(int(x) for _, x in optax.tree.get_all_with_path(state, "nonfinite"))


def assert_close(got, want, tolerance=2e-3):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(want).all()
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


# Stacks and layouts


@pytest.mark.parametrize("name", KINDS)
def test_a_stack_is_its_matrices_one_by_one(name):
    gradients = normal(4, K, N, N)
    leaves, _ = run_leaves(name, gradients)
    stack, _ = run(make(name, weight_dimension_numbers=STACKED), list(gradients))
    assert_close(stack, leaves)
    alone, _ = run(make(name), list(gradients[:, 1]))
    assert_close(alone, leaves[:, 1])


@pytest.mark.parametrize("name", KINDS)
def test_vmap_over_init_and_update(name):
    gradients = normal(4, K, N, N)
    want, _ = run_leaves(name, gradients)
    transformation = make(name)
    state = jax.vmap(transformation.init)(gradients[0])
    update = jax.jit(jax.vmap(transformation.update))
    for gradient, expected in zip(gradients, want, strict=True):
        got, state = update(gradient, state)
        assert_close(got, expected, 5e-3)


def test_convolutions_are_the_matrices_that_they_reshape_to():
    kernels = normal(3, 2, 3, 4, 5)
    numbers = MuonDimensionNumbers((0, 1, 2), 3)
    want, _ = run(make("muon"), list(kernels.reshape(3, 24, 5)))
    trees = [{"kernel": x} for x in kernels]
    for given in ({"kernel": numbers}, lambda params: numbers):
        got, _ = run(make("muon", weight_dimension_numbers=given), trees)
        got = np.stack([u["kernel"] for u in got])
        np.testing.assert_allclose(got.reshape(3, 24, 5), np.stack(want), atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (2, 3, 4)])
def test_what_is_not_a_matrix_is_refused(name, shape):
    with pytest.raises(ValueError, match=r"\['leaf'\].*optax\.partition"):
        make(name).init({"leaf": jnp.zeros(shape), "matrix": jnp.zeros((3, 4))})


# Symmetries


@on_cpu_and_tpu
@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name not in NOT_SYMMETRIC])
def test_symmetries_of_whole_matrices(name):
    gradients = well_conditioned(6, N)
    u, v = orthogonal(N), orthogonal(N)
    p, q = RNG.permutation(N), RNG.permutation(N)
    variants = np.stack(
        [gradients, u @ gradients @ v, gradients.swapaxes(1, 2), gradients[:, p][:, :, q]], axis=1
    )
    got, _ = run_leaves(name, variants)
    plain = got[:, 0]
    if name not in ENTRYWISE:
        assert_close(got[:, 1], u @ plain @ v)
    if name not in NOT_TRANSPOSED:
        assert_close(got[:, 2], plain.swapaxes(1, 2))
    assert_close(got[:, 3], plain[:, p][:, :, q])


def test_blocks_may_be_permuted():
    gradients = normal(4, 2, 2, BLOCK, BLOCK)
    merge = lambda g: g.swapaxes(-3, -2).reshape(-1, N, N)
    variants = [gradients, gradients[:, ::-1], gradients[:, :, ::-1], gradients[:, ::-1, ::-1]]
    options = {"block_size": BLOCK, "precondition_frequency": 2, "stagger": False}
    leaves = [list(g) for g in np.stack([merge(v) for v in variants], axis=1)]
    got, _ = run(mup_jax.scale_by_shampoo(**options), leaves)
    got = np.asarray(got).reshape(4, 4, 2, BLOCK, 2, BLOCK).swapaxes(-3, -2)
    assert_close(got[:, 1], got[:, 0, ::-1])
    assert_close(got[:, 2], got[:, 0, :, ::-1])
    assert_close(got[:, 3], got[:, 0, ::-1, ::-1])


# Gradients that are zero, out of range, or not numbers


def of_blocks(state):
    """The states of all rules in a state."""
    is_blocks = lambda x: isinstance(x, Blocks)
    return [x.state for x in jax.tree.leaves(state, is_leaf=is_blocks) if is_blocks(x)]


def averages(state):
    """Momentum and statistics: what a gradient that says nothing must leave as it was."""
    return jax.tree.leaves(
        [getattr(s, f, None) for s in of_blocks(state) for f in ("mu", "statistics")]
    )


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_a_bad_gradient_is_counted_and_skipped_for_its_own_matrix(name, bad):
    gradients = normal(6, K, N, N)
    gradients[2, 1, 3, 4] = bad
    updates, states = run_leaves(name, gradients, staggered=True)
    assert np.isfinite(updates).all()
    assert [counted(state) for state in states] == [0, 0, 1, 1, 1, 1]
    for old, new in zip(averages(states[1]), averages(states[2]), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
        assert np.abs(new[0] - old[0]).max() > 0

    # The matrix goes on as if that step had not been, and the others know nothing of it.
    _, without = run_leaves(name, np.delete(gradients, 2, axis=0), staggered=True)
    gradients[2, 1] = 0
    _, fine = run_leaves(name, gradients, staggered=True)
    triples = zip(*(averages(run[-1]) for run in (states, without, fine)), strict=True)
    for got, of_matrix, of_others in triples:
        np.testing.assert_allclose(got[1], of_matrix[1], rtol=1e-6)
        np.testing.assert_array_equal(got[0], of_others[0])


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("first", [0.0, np.nan, 1e20, 1e-20])
def test_training_may_begin_with_a_gradient_that_says_nothing(name, first):
    """Zero is what most hidden matrices get at the first step, as readouts begin at zero."""
    gradients = normal(6, K, N, N)
    fine, fine_states = run_leaves(name, gradients[1:], staggered=True)
    gradients[0] = first
    late, states = run_leaves(name, gradients, staggered=True)
    assert np.isfinite(late).all()
    assert counted(states[-1]) == (0 if abs(first) < 1 else K)
    for got, want in zip(averages(states[-1]), averages(fine_states[-1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-12)
    # The first good update differs in the bias corrections only, which count all steps.
    sizes = [np.linalg.norm(u, axis=(-2, -1)) for u in (late[1], fine[0])]
    assert (sizes[0] < 2.5 * sizes[1]).all()
    assert (sizes[0] > sizes[1] / 2.5).all()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_zero_gradients_give_zero_updates(name):
    updates, states = run_leaves(name, np.zeros((3, K, N, N)), staggered=True)
    np.testing.assert_array_equal(updates, 0)
    assert counted(states[-1]) == 0


@on_cpu_and_tpu
@pytest.mark.parametrize("name", [x for x in TRANSFORMATIONS if x not in NOT_OF_RANK_ONE])
def test_rank_one_gradients(name):
    gradients = np.repeat(normal(1, K, N, 1) * normal(1, K, 1, N), 4, axis=0)
    updates, _ = run_leaves(name, gradients)
    cosine = np.sum(updates * gradients, axis=(-2, -1)) / (
        np.linalg.norm(updates, axis=(-2, -1)) * np.linalg.norm(gradients, axis=(-2, -1))
    )
    # SOAP divides rounding noise by its own size, but for a floor.
    np.testing.assert_allclose(cosine, 1, atol=0.1 if "soap" in name else 1e-3)


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_first_updates_are_those_of_refreshing_at_every_step(name, rank):
    """Preconditioners of a few gradients of low rank know little of the gradients that follow."""
    factors = normal(2, 45, rank, 32)
    gradients = list(np.einsum("sri,srj->sij", *factors) / rank)
    got, want = (
        run(TRANSFORMATIONS[name](**options), gradients)[0]
        for options in ({}, {"exact_steps": len(gradients)})
    )
    got, want = np.asarray(got), np.asarray(want)
    sizes = np.linalg.norm(got, axis=(1, 2)) / np.linalg.norm(want, axis=(1, 2))
    assert np.abs(np.log2(sizes)).max() < 1


def test_soap_divides_by_no_rounding_noise():
    """One row a block, moving: most entries of the second moment are noise or exactly zero."""
    gradients = 1e-3 * normal(4, 8, 64)
    gradients[:, np.arange(8) % 4 != 1] = 0
    transformation = mup_jax.scale_by_soap(block_size=4, precondition_frequency=1, eps=1e-30)
    updates, _ = run(transformation, list(gradients))
    assert np.abs(updates).max() < 4
    assert np.linalg.norm(np.delete(updates, [1, 5], axis=1)) < 0.1 * np.linalg.norm(updates)


# Inside jit, vmap, bfloat16 and Optax's wrappers


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_gradients(name):
    gradients = [list(g.astype(jnp.bfloat16)) for g in normal(4, K, N, N)]
    updates, state = run(make(name, staggered=True), gradients)
    rounded = np.asarray(gradients, np.float32)
    want, _ = run_leaves(name, rounded, staggered=True)
    assert {u.dtype for step in updates for u in step} == {jnp.dtype(jnp.bfloat16)}
    kept = {x.dtype for x in jax.tree.leaves(own_states(state)) if x.ndim and x.dtype != bool}
    assert kept == {jnp.dtype(jnp.float32)}
    # Only Adam, inside graft, keeps its own state in the dtype of the gradients.
    assert_close(np.asarray(updates, np.float32), want, 0.02)


def labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "other", params)


@pytest.mark.parametrize("name", KINDS)
def test_inside_wrappers_of_optax(name):
    """partition masks what is not a matrix, MultiSteps joins two steps, bad ones are dropped."""
    gradients = normal(3, K, N, N)
    want, _ = run_leaves(name, gradients)
    gain = np.float32([2.0, -3.0])
    routed = optax.partition({"matrix": make(name), "other": optax.identity()}, labels)
    wrapped = optax.apply_if_finite(optax.MultiSteps(routed, 2), max_consecutive_errors=3)
    nan = {"w": [np.full((N, N), np.nan, np.float32)] * K, "gain": gain}
    trees = []
    for g in gradients:
        # A mean of two that is g.
        noise = normal(K, N, N)
        trees += [{"w": list(g + noise), "gain": gain}, nan, {"w": list(g - noise), "gain": gain}]
    got, _ = run(wrapped, trees)
    for joined, expected in zip(got[2::3], want, strict=True):
        np.testing.assert_array_equal(joined["gain"], gain)
        assert_close(joined["w"], expected)
    assert all(not np.any(u["w"]) for i, u in enumerate(got) if i % 3 != 2)


def test_masked_leaves_pass():
    gradients = normal(2, N, N)
    is_matrix = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
    for name in KINDS:
        transformation = optax.masked(make(name), is_matrix)
        tree = {"w": gradients[0], "gain": gradients[0, 0]}
        out, _ = jax.eval_shape(lambda t, tx=transformation: tx.update(t, tx.init(t)), tree)
        assert jax.tree.map(lambda x: x.shape, out) == {"w": (N, N), "gain": (N,)}


@pytest.mark.parametrize("name", KINDS)
def test_update_takes_extra_arguments(name):
    transformation = make(name)
    step = lambda g: transformation.update(g, transformation.init(g), g, value=1.0)[0]
    assert jax.eval_shape(step, normal(3, 4)).shape == (3, 4)


# Options


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: muon(orthogonalizer="qr"), "orthogonalizer='qr'"),
        (lambda: muon(ns_steps=0), "ns_steps=0"),
        (lambda: muon(orthogonalizer="polar_express", ns_steps=0), "ns_steps=0"),
        (lambda: muon(shape_factor="kimi"), "shape_factor='kimi'"),
        (lambda: mup_jax.scale_by_shampoo(sides="left"), "sides='left'"),
        (lambda: mup_jax.scale_by_shampoo(block_size=0), "block_size=0"),
        (lambda: mup_jax.scale_by_shampoo(precondition_frequency=0), "precondition_frequency=0"),
        (lambda: mup_jax.scale_by_soap(exact_steps=0), "exact_steps=0"),
        (lambda: mup_jax.scale_by_soap(max_preconditioner_dim=2), "optax.partition"),
        (lambda: muon(weight_dimension_numbers=MuonDimensionNumbers(0, 0)), "twice"),
    ],
)
def test_impossible_options_are_refused(call, message):
    gradient = normal(3, 3)
    with pytest.raises(ValueError, match=message):
        run(call(), [gradient])


@pytest.mark.parametrize(
    ("name", "factor"), [("none", 1), ("spectral", 2), ("jordan", 2), ("rms", 0.2 * 32**0.5)]
)
def test_shape_factors_of_muon(name, factor):
    gradient = normal(8, 32)
    (update,), _ = run(muon(orthogonalizer="svd", shape_factor=name), [gradient])
    assert np.linalg.norm(update, 2) == pytest.approx(factor, rel=1e-5)
    (update,), _ = run(muon(orthogonalizer="svd", shape_factor=name), [gradient.T])
    tall = {"none": 1, "spectral": 0.5, "jordan": 1, "rms": factor}
    assert np.linalg.norm(update, 2) == pytest.approx(tall[name], rel=1e-5)


@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_preconditioners_in_bfloat16(name):
    """Eight bits of mantissa in the factors: their rounding, about 0.4% each, and little more."""
    gradients = normal(5, K, N, N)
    options = {"precondition_frequency": 2, "eps": 1e-2}
    want, kept = run(TRANSFORMATIONS[name](**options), [list(g) for g in gradients])
    low = TRANSFORMATIONS[name](**options, preconditioner_dtype=jnp.bfloat16)
    got, state = run(low, [list(g) for g in gradients])
    assert_close(got, want, 0.02)
    field = {"shampoo": "roots", "soap": "bases"}[name]
    bytes_of = lambda state: sum(
        x.nbytes for x in jax.tree.leaves([getattr(s, field) for s in of_blocks(state)])
    )
    assert bytes_of(state) == bytes_of(kept) / 2


# The schedule of refreshes, and SOAP's second moment


def turn_of(shape, leaves, leaf, block_size, frequency):
    """`refresh(step, block)` of one leaf among equals, as `schedule.Positions` numbers the blocks.

    Blocks of one size are a piece; in it the leaf counts fastest, then the row, then the column.
    """
    lengths = [[min(block_size, d - start) for start in range(0, d, block_size)] for d in shape]
    grid = [(row, column) for row in range(len(lengths[0])) for column in range(len(lengths[1]))]

    def refresh(step, block):
        row, column = grid[block]
        n_rows = lengths[0].count(lengths[0][row])
        # Edge blocks are pieces of their own.
        row = row if lengths[0][row] == block_size else 0
        column = column if lengths[1][column] == block_size else 0
        position = leaf + leaves * (row + n_rows * column)
        return (step - position) % frequency == 0

    return refresh


@on_cpu_and_tpu
@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_staggered_blocks_agree_with_float64_reference(name):
    # Edge blocks have rectangular covariances without a textbook basis: SOAP gets none.
    shape = {"shampoo": (9, 13), "soap": (8, 12)}[name]
    leaves, block_size, frequency, steps = 3, 4, 5, 13
    textbook = {"shampoo": reference.Shampoo, "soap": reference.Soap}[name]
    references = [
        textbook(
            block_size=block_size,
            refresh=turn_of(shape, leaves, leaf, block_size, frequency),
            eps=1e-3,
        )
        for leaf in range(leaves)
    ]
    transformation = TRANSFORMATIONS[name](
        block_size=block_size, precondition_frequency=frequency, exact_steps=1, eps=1e-3
    )
    gradients = normal(steps, leaves, *shape)
    got, _ = run(transformation, [list(g) for g in gradients])
    for step in range(steps):
        for leaf in range(leaves):
            want = references[leaf].update(gradients[step, leaf].astype(np.float64))
            assert_close(got[step][leaf], want, 5e-3)


def test_soap_second_moment_stays_with_its_directions_when_eigenvalues_swap():
    """Gradients along two axes whose sizes change places: SOAP on them is Adam on the axes."""
    sizes = np.concatenate([np.tile([[3.0, 1.0]], (4, 1)), np.tile([[1.0, 9.0]], (8, 1))])
    signs = RNG.choice([-1.0, 1.0], size=sizes.shape)
    u, v = orthogonal(2), orthogonal(2)
    entries = (sizes * signs)[:, :, None] * np.eye(2)
    options = {"precondition_frequency": 1, "eps": 1e-4}
    got, state = run(mup_jax.scale_by_soap(**options), list(np.float32(u @ entries @ v)))
    want, _ = run(optax.scale_by_adam(0.9, 0.98, eps=1e-4), list(np.float32(entries)))
    assert_close(u.T @ np.stack(got) @ v.T, np.stack(want), 1e-2)
    # And they did swap: the last basis begins with what was the second axis.
    basis_in, _ = state.blocks["2x2"][0].state.bases
    np.testing.assert_allclose(
        np.abs(u.T @ np.asarray(basis_in)[0, 0, 0]), np.eye(2)[::-1], atol=0.05
    )
