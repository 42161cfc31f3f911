"""The health of preconditioners, against float64 eigenvalues of what the state keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax.transforms import health
from mup_jax.transforms.health import preconditioner_health
from mup_jax.transforms.statistics import pack, unpack

RNG = np.random.default_rng(0)
STACKED = {"w": MuonDimensionNumbers(-2, -1)}
GROUP = "2x8x12"
STEPS = 6

MAKERS = {"shampoo": mup_jax.scale_by_shampoo, "soap": mup_jax.scale_by_soap}
OPTIONS = {
    "shampoo, fresh": {"precondition_frequency": 1},
    "shampoo, stale": {"precondition_frequency": STEPS - 1, "exact_steps": 1, "stagger": False},
    "shampoo, blocks": {"precondition_frequency": 3, "block_size": 5, "exponent": 0.25},
    "soap, fresh": {"precondition_frequency": 1, "exact_steps": STEPS},
    "soap, stale": {"precondition_frequency": STEPS - 1, "exact_steps": 1, "stagger": False},
    "soap, blocks": {"precondition_frequency": 3, "block_size": 5, "sides": "out"},
}
measure = jax.jit(preconditioner_health)


@functools.cache
def transformation(name):
    maker = MAKERS[name.partition(",")[0]]
    made = maker(**OPTIONS[name], weight_dimension_numbers=STACKED)
    return made._replace(update=jax.jit(made.update))


@functools.cache
def drifting():
    """Gradients with an ill-conditioned covariance that turns."""
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(2, d, d)) for d in (8, 12))
    gradients = []
    for _ in range(STEPS):
        gradients.append((left @ rng.normal(size=(2, 8, 12)) @ right).astype(np.float32))
        left, right = (x + 0.1 * rng.normal(size=x.shape) for x in (left, right))
    return gradients


def states_of(name, gradients):
    """The state at the beginning and after each step."""
    state = transformation(name).init({"w": gradients[0]})
    yield state
    for gradient in gradients:
        _, state = transformation(name).update({"w": gradient}, state)
        yield state


def numbers(state):
    return {key: float(x) for key, x in measure(state).items()}


def measured_after(name, gradients):
    return [numbers(state) for state in states_of(name, gradients)]


def frobenius(x):
    return np.linalg.norm(x, axis=(-2, -1))


def condition_and_turn_of_root(statistic, root):
    root = np.asarray(unpack(root), np.float64)
    values = np.linalg.eigvalsh(root)
    commutator = root @ statistic - statistic @ root
    turned = frobenius(commutator) / (frobenius(root) * frobenius(statistic))
    return values[..., -1] / values[..., 0], turned


def condition_and_turn_of_basis(statistic, basis):
    basis = np.asarray(basis, np.float64)
    rotated = np.swapaxes(basis, -2, -1) @ statistic @ basis
    diagonal = np.diagonal(rotated, axis1=-2, axis2=-1)
    off = rotated - diagonal[..., None] * np.eye(rotated.shape[-1])
    least = np.maximum(diagonal.min(-1), 1e-6 * diagonal.max(-1))
    return diagonal.max(-1) / least, frobenius(off) / frobenius(rotated)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "blocks" in name else []) for name in OPTIONS],
)
def test_like_eigenvalues(name):
    *_, state = states_of(name, drifting())
    if name.startswith("shampoo"):
        function, field = condition_and_turn_of_root, "roots"
    else:
        function, field = condition_and_turn_of_basis, "bases"
    states = [blocks.state for blocks in state.blocks[GROUP]]
    factors = [getattr(x, field) for x in states]
    statistics = [x.statistics for x in states]
    pairs = zip(*map(jax.tree.leaves, (statistics, factors)), strict=True)
    sides = [function(np.asarray(unpack(s), np.float64), factor) for s, factor in pairs]
    conditions, turned = zip(*sides, strict=True)
    measured = numbers(state)
    assert measured.keys() == {f"condition/{GROUP}", f"staleness/{GROUP}", "nonfinite"}
    np.testing.assert_allclose(
        measured[f"condition/{GROUP}"], max(map(np.max, conditions)), rtol=0.02
    )
    np.testing.assert_allclose(
        measured[f"staleness/{GROUP}"], np.mean([x.mean() for x in turned]), rtol=1e-4, atol=1e-6
    )


# Between a single small eigenvalue and many close to the smallest.
@pytest.mark.parametrize("power", [0.1, 0.5, 2, 10])
def test_condition_of_any_spectrum(power):
    conditions = np.array([1, 30, 1000])
    least = 1 / conditions[:, None]
    values = least + (1 - least) * np.linspace(0, 1, 64) ** power
    basis = np.linalg.qr(RNG.normal(size=(64, 64)))[0]
    roots = pack(jnp.asarray(basis * values[:, None] @ basis.T, jnp.float32))
    measured, _ = health._of_root(pack(jnp.eye(64)), roots)
    np.testing.assert_allclose(measured, conditions, rtol=0.1)


def test_condition_has_a_bound():
    # In bfloat16 the smallest eigenvalues may even be negative.
    for least in (0.0, -1e-2):
        root = pack(jnp.diag(jnp.array([1.0, 1.0, least])))
        condition, _ = health._of_root(pack(jnp.eye(3)), root)
        np.testing.assert_allclose(condition, 1e6, rtol=1e-3)


@pytest.mark.parametrize("name", ["shampoo, stale", "soap, stale"])
def test_staleness_grows_while_gradients_drift_until_the_refresh(name):
    _, *measured = measured_after(name, drifting())
    first, second, *_, before, after = (x[f"staleness/{GROUP}"] for x in measured)
    assert first < 1e-5
    assert 0.01 < second < before < 1
    assert after < 0.6 * before


@pytest.mark.parametrize("name", ["shampoo, fresh", "soap, fresh"])
def test_staleness_is_none_when_all_is_fresh(name):
    assert max(x[f"staleness/{GROUP}"] for x in measured_after(name, drifting())) < 1e-5


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "blocks" in name else []) for name in OPTIONS],
)
def test_without_statistics_there_are_zeros(name):
    zeros = [np.zeros_like(x) for x in drifting()[:2]]
    assert all(set(x.values()) == {0} for x in measured_after(name, zeros))


@pytest.mark.parametrize("name", ["shampoo, fresh", "soap, fresh"])
def test_a_matrix_without_gradient_does_not_hide_another(name):
    gradient = drifting()[0].copy()
    gradient[0] = 0
    measured = measured_after(name, [gradient])[-1]
    assert measured[f"condition/{GROUP}"] > 2
    assert measured[f"staleness/{GROUP}"] < 1e-5


@pytest.mark.parametrize("name", ["shampoo, stale", "soap, fresh"])
@pytest.mark.parametrize("scale", [1e-11, 1e14])
def test_scale_of_gradients_does_not_matter(name, scale):
    *_, right = measured_after(name, drifting())
    *_, measured = measured_after(name, [x * np.float32(scale) for x in drifting()])
    for key, value in right.items():
        np.testing.assert_allclose(measured[key], value, rtol=1e-2, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["shampoo, stale", "soap, stale"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_skipped_gradients_are_counted_by_matrix(name, bad):
    good, *_ = drifting()
    one, both = good.copy(), good.copy()
    one[1, 3, 4] = both[0, 0, 0] = both[1, 1, 1] = bad
    measured = measured_after(name, [good, one, good, both, good])
    assert [x["nonfinite"] for x in measured] == [0, 0, 1, 1, 3, 3]
    assert np.isfinite(list(measured[-1].values())).all()


def test_optimizers_that_share_a_group():
    names = ("shampoo, stale", "soap, stale")
    states = [list(states_of(name, drifting()))[-1] for name in names]
    alone = [numbers(state) for state in states]
    together = numbers({"one": states[0], "other": (states[1],)})
    assert together[f"condition/{GROUP}"] == max(x[f"condition/{GROUP}"] for x in alone)
    mean = np.mean([x[f"staleness/{GROUP}"] for x in alone])
    np.testing.assert_allclose(together[f"staleness/{GROUP}"], mean, rtol=1e-5)


PARAMS = {"matrix": jnp.ones((6, 4)), "bias": jnp.ones(4)}
OPTIMIZERS = {
    "shampoo": mup_jax.shampoo(1e-3),
    "soap": mup_jax.soap(1e-3),
    "graft": mup_jax.graft(optax.identity(), mup_jax.scale_by_shampoo()),
    "chain": optax.chain(optax.clip(1.0), mup_jax.scale_by_soap(), optax.scale(0.1)),
    "several steps": optax.MultiSteps(mup_jax.soap(1e-3), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preconditioners_are_found_wherever_they_are(name):
    params = {"matrix": PARAMS["matrix"]} if name in ("graft", "chain") else PARAMS
    state = jax.eval_shape(OPTIMIZERS[name].init, params)
    found = jax.eval_shape(preconditioner_health, state)
    assert found.keys() == {"condition/6x4", "staleness/6x4", "nonfinite"}
    assert all(x.shape == () for x in found.values())


@pytest.mark.parametrize(
    "optimizer", [mup_jax.adamw(1e-3), mup_jax.muon(1e-3), optax.sgd(1e-3), optax.identity()]
)
def test_optimizers_without_preconditioners(optimizer):
    assert measure(optimizer.init(PARAMS)) == {}


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MAKERS)
def test_on_a_mesh(name, kind):
    # Two matrices on four devices: the factors of the state are divided as well.
    made = MAKERS[name](weight_dimension_numbers=STACKED)
    gradient = drifting()[0]
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        divided = jax.device_put(gradient, jax.NamedSharding(mesh, jax.P(None, "a", "b")))
        _, state = jax.jit(made.update)({"w": divided}, made.init({"w": divided}))
        measured = numbers(state)
    right = numbers(jax.device_put(jax.device_get(state), jax.devices()[0]))
    assert measured.keys() == right.keys()
    for key, value in right.items():
        np.testing.assert_allclose(measured[key], value, rtol=1e-3, atol=1e-6, err_msg=key)
