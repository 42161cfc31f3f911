import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from mup_jax.training.config import epsilons_of
from mup_jax.training.mesh import data_parallel_mesh
from mup_jax.training.program import (
    Hyperparameters,
    cross_entropy,
    make_program,
    make_schedule,
)
from tests.training.tiny import (
    LEARNING_RATE,
    STEPS,
    VOCABULARY,
    mesh_of,
    program_of,
    run_steps,
    some_tokens,
    tiny_config,
    trained,
)

OPTIMIZERS = ["adamw", "muon", "shampoo", "soap"]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("warmup", [0, 4, 39])
def test_schedule(warmup):
    schedule = make_schedule(tiny_config(warmup_tokens=warmup * 128))
    values = np.array([schedule(step) for step in range(STEPS + 1)])
    rise = np.arange(warmup) / max(warmup, 1)
    fall = 1 - np.arange(STEPS + 1 - warmup) / (STEPS - warmup)
    np.testing.assert_allclose(values, [*rise, *fall], atol=1e-6)
    assert values[warmup] == 1
    assert values[-1] == 0


def test_schedule_of_part_of_a_step():
    # 1.4 steps of warm-up are one; less than one step of decay is left alone.
    assert make_schedule(tiny_config(warmup_tokens=180))(1) == 1
    last = make_schedule(tiny_config(warmup_tokens=STEPS * 128 - 1))
    assert last(STEPS - 1) == 1
    assert last(STEPS) == 0


def test_cross_entropy():
    rng = np.random.default_rng(0)
    logits = 5 * rng.standard_normal((2, 3, 7), np.float32)
    targets = rng.integers(0, 7, (2, 3))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, targets[..., None], -1)).mean()
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "sophia"])
def test_training_reduces_the_loss(name):
    state, metrics = trained(name)
    losses = [values["loss"] for values in metrics]
    # The first logits are zero.
    assert losses[0] == pytest.approx(np.log(VOCABULARY), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 20
    for leaf in jax.tree.leaves(state):
        assert jnp.isfinite(leaf).all()


def test_metrics():
    _, metrics = trained("adamw")
    program = program_of(1)
    state, first = run_steps(program, 1, 1, optimizer__learning_rate=LEARNING_RATE)
    with jax.set_mesh(mesh_of(1)):
        loss, gradient = program.loss_and_gradient(program.init(0).params, some_tokens(0))
    norms = {"gradient_norm", "update_norm", "parameter_norm"}
    assert first[0].keys() == {"loss", "nonfinite"} | norms
    np.testing.assert_allclose(first[0]["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(first[0]["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(first[0]["parameter_norm"], optax.tree.norm(state.params), rtol=1e-5)
    # The schedule starts at zero.
    assert first[0]["update_norm"] == 0
    assert metrics[1]["update_norm"] > 0


def test_gradients_that_the_optimizer_skips_are_reported():
    program = program_of(1, optimizer__name="muon")
    with jax.set_mesh(mesh_of(1)):
        state = program.init(0)
        state = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
        hyperparameters = jax.device_put(Hyperparameters(0.1, 0.0), program.replicated)
        batch = jax.device_put(some_tokens(0), program.batch_sharding)
        for step in (1, 2):
            state, metrics = program.step(state, batch, hyperparameters)
            # Four matrices of attention and three of the feed-forward network.
            assert metrics["nonfinite"] == 7 * step
    assert trained("muon")[1][-1]["nonfinite"] == 0


def test_evaluation_is_the_mean_loss():
    program = program_of(1)
    params = trained("adamw")[0].params
    batches = [some_tokens(step) for step in (100, 101, 102)]
    stacked = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    with jax.set_mesh(mesh_of(1)):
        expected = [program.loss_and_gradient(params, batch)[0] for batch in batches]
        np.testing.assert_allclose(program.evaluate(params, stacked), np.mean(expected), rtol=1e-6)
    assert len(set(map(float, expected))) == 3


def test_tuned_numbers_and_seed_share_one_program():
    program = program_of(1)
    for change in (
        {"optimizer__learning_rate": 1.0},
        {"optimizer__weight_decay": 0.5},
        {"seed": 9},
    ):
        assert program_of(1, **change) is program
    assert program_of(1, clip_norm=2.0) is not program
    with jax.set_mesh(mesh_of(8)):
        assert make_program(tiny_config(), VOCABULARY) is not program
    assert program.step is program_of(1, seed=9).step
    before = program.init._cache_size()
    with jax.set_mesh(mesh_of(1)):
        first, second = program.init(0), program.init(1)
    assert program.init._cache_size() == max(before, 1)
    assert jnp.abs(first.params["embedding"] - second.params["embedding"]).max() > 0.1


def test_learning_rate_zero_leaves_only_weight_decay():
    program = program_of(1)
    with jax.set_mesh(mesh_of(1)):
        start = jax.device_get(program.init(0).params)
    still, _ = run_steps(program, 1, 5, optimizer__learning_rate=0.0)
    assert_equal(still.params, start)
    decayed, _ = run_steps(program, 1, 5, optimizer__learning_rate=0.0, optimizer__weight_decay=0.1)
    schedule = make_schedule(tiny_config())
    factor = np.prod([1 - 0.1 * schedule(step) for step in range(5)])
    assert factor < 0.9
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, factor * b, rtol=1e-5), decayed.params, start
    )


def test_learning_rate_scales_the_update():
    # The readout starts at zero, and its second update is the first one that is not zero.
    slow, fast = (
        run_steps(program_of(1), 1, 2, optimizer__learning_rate=rate)[0].params["readout"]
        for rate in (1e-3, 2e-3)
    )
    assert jnp.abs(slow).max() > 1e-4
    np.testing.assert_allclose(fast, 2 * slow, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo", "soap"])
def test_epsilon_is_an_argument_of_the_program(name):
    """The same ε as an option of the optimizer gives the same parameters."""
    epsilon, steps = 1e-2, 3
    as_argument = {"optimizer__name": name, "optimizer__epsilon": epsilon}
    options = ConfigDict(dict.fromkeys(epsilons_of(name, {}), epsilon))
    as_option = {"optimizer__name": name, "optimizer__options": options}
    states = [
        run_steps(program_of(1, **changes), 1, steps, **changes)[0]
        for changes in (as_argument, as_option)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        *(state.params for state in states),
    )
    default, _ = run_steps(program_of(1, optimizer__name=name), 1, steps, optimizer__name=name)
    assert jnp.abs(default.params["readout"] - states[0].params["readout"]).max() > 1e-3
    assert program_of(1, **as_argument | {"optimizer__epsilon": 1e-4}) is program_of(
        1, **as_argument
    )


def test_gradients_are_clipped_where_the_configuration_says_so():
    """Of SGD-like updates, which AdamW with a huge ε has, the norm is that of the gradient."""
    huge = {"optimizer__epsilon": 1e6, "optimizer__learning_rate": 1e6, "warmup_tokens": 0}
    norms = {}
    for clip_norm in (0.0, 1e-3):
        changes = huge | {"clip_norm": clip_norm}
        (_, [metrics]) = run_steps(program_of(1, **changes), 1, 1, **changes)
        norms[clip_norm] = metrics["update_norm"], metrics["gradient_norm"]
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-3)
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[0.0][1] > 1e-2


def test_base_model_is_standard_parametrization():
    """At the base shapes every factor is 1: the trainer's AdamW is Optax's."""
    program = program_of(1)
    schedule = make_schedule(tiny_config())
    adamw = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.98, 1e-8),
        optax.scale_by_learning_rate(lambda count: LEARNING_RATE * schedule(count)),
    )
    update = jax.jit(adamw.update)
    with jax.set_mesh(mesh_of(1)):
        params = program.init(0).params
        state = adamw.init(params)
        for step in range(4):
            _, gradient = program.loss_and_gradient(params, some_tokens(step))
            updates, state = update(gradient, state)
            params = optax.apply_updates(params, updates)
    trained_params = run_steps(program, 1, 4, optimizer__learning_rate=LEARNING_RATE)[0].params
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), trained_params, params
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rules_scale_the_updates_of_wider_models(name):
    """Of a gradient of ones, Adam's first update is η/d_in and Muon's has norm η·√(d_out/d_in)."""
    program = program_of(1, optimizer__name=name, base__width=8, warmup_tokens=0)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), program.abstract_state.params)
    optimizer = program.optimizer(Hyperparameters(1.0, 0.0))
    updates = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[0])(ones)
    np.testing.assert_allclose(updates["embedding"], -1.0, rtol=1e-3)
    np.testing.assert_allclose(updates["readout"], -0.5, rtol=1e-3)
    mlp = updates["layers"]["mlp"]
    if name == "adamw":
        np.testing.assert_allclose(mlp["gate"], -0.5, rtol=1e-3)
        np.testing.assert_allclose(mlp["down"], -0.5, rtol=1e-3)
    else:
        # Both d_in and d_out have doubled.
        for matrix in (mlp["gate"], mlp["down"]):
            assert jnp.linalg.norm(matrix[0], 2) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("name", "devices", "steps"), [("muon", 8, 20), ("soap", 8, 5)])
def test_data_parallel_training_equals_one_device(name, devices, steps):
    actual, expected = (
        np.array([values["loss"] for values in trained(name, n)[1]]) for n in (devices, 1)
    )
    # Devices add the rows of a batch in another order, and training amplifies that: the first
    # update that is not zero shows in the third loss.
    np.testing.assert_allclose(actual[:3], expected[:3], rtol=1e-5)
    np.testing.assert_allclose(actual[:steps], expected[:steps], rtol=2e-2)


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_the_state_is_donated(name):
    program = program_of(1, optimizer__name=name)
    with jax.set_mesh(mesh_of(1)):
        header = program.step.as_text().splitlines()[0]
        state = program.init(0)
        hyperparameters = jax.device_put(Hyperparameters.of(tiny_config()), program.replicated)
        program.step(state, jax.device_put(some_tokens(), program.batch_sharding), hyperparameters)
    leaves = jax.tree.leaves(state)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert header.count("may-alias") + header.count("must-alias") == len(leaves)


def test_devices_must_divide_the_batch():
    assert data_parallel_mesh(16).size == 8
    with pytest.raises(ValueError, match=r"config\.batch_size=12 .* 8 devices: choose a multiple"):
        data_parallel_mesh(12)
