import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from mup_jax.training.config import epsilons_of
from mup_jax.training.mesh import AXES
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


def slow(*parameters):
    return pytest.param(*parameters, marks=pytest.mark.slow)


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


@pytest.mark.parametrize("name", ["adamw", *map(slow, [*OPTIMIZERS[1:], "sophia"])])
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
    groups = ("embedding", "attention", "mlp", "readout")
    of_groups = {f"{norm}/{group}" for norm in norms for group in groups}
    assert first[0].keys() == {"loss", "skipped", "learning_rate"} | norms | of_groups
    for norm in norms:
        together = np.linalg.norm([metrics[5][f"{norm}/{group}"] for group in groups])
        np.testing.assert_allclose(metrics[5][norm], together, rtol=1e-5)
    assert metrics[3]["learning_rate"] == pytest.approx(LEARNING_RATE * 3 / 4)
    np.testing.assert_allclose(first[0]["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(first[0]["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(first[0]["parameter_norm"], optax.tree.norm(state.params), rtol=1e-5)
    # The schedule starts at zero.
    assert first[0]["update_norm"] == 0
    assert metrics[1]["update_norm"] > 0


@pytest.mark.parametrize("name", ["adamw", "shampoo"])
def test_a_bad_gradient_changes_nothing(name):
    program = program_of(1, optimizer__name=name)
    state, _ = run_steps(program, 1, 2, optimizer__learning_rate=LEARNING_RATE)
    with jax.set_mesh(mesh_of(1)):
        hyperparameters = jax.device_put(Hyperparameters(0.1, 0.0), program.replicated)
        batch = jax.device_put(some_tokens(0), program.batch_sharding)
        before = jax.device_get(state)
        # The learning rate is not finite where the loss is: no update, and it is counted.
        bad = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
        after, metrics = program.step(bad, batch, hyperparameters)
        assert_equal(after.opt_state, before.opt_state)
        assert int(after.step) == int(before.step) + 1
        assert int(metrics["skipped"]) == int(after.skipped) == 1
        good = jax.device_put(before, jax.tree.map(lambda x: x.sharding, program.abstract_state))
        _, metrics = program.step(good, batch, hyperparameters)
        assert int(metrics["skipped"]) == 0


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


@pytest.mark.parametrize("name", ["adamw", *map(slow, OPTIMIZERS[1:])])
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


@pytest.mark.parametrize("name", ["adamw", slow("soap")])
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


SHAPES = [
    (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (2, 4, 1), (1, 4, 2), (2, 1, 4),
    (1, 2, 4), (2, 2, 2),
]  # fmt: skip
# Every axis of every parameter is divided, and matrices have several blocks.
SHARDED = {
    "model__width": 32,
    "model__head_dim": 4,
    "base__width": 32,
    "model__depth": 2,
    "base__depth": 2,
}
# SOAP's smallest ε makes ±1 of rounding errors, which devices add up in another order.
OPTIONS = {"shampoo": {"block_size": 16}, "soap": {"block_size": 16, "eps": 1e-3}}


@functools.cache
def losses_on(name, shape, steps=6, **changes):
    mesh = jax.make_mesh(shape, AXES, devices=jax.devices()[: math.prod(shape)])
    options = ConfigDict(OPTIONS.get(name, {}))
    config = tiny_config(
        **SHARDED, **changes, optimizer__name=name, optimizer__options=options, warmup_tokens=0
    )
    with jax.set_mesh(mesh):
        program = make_program(config, VOCABULARY)
        hyperparameters = jax.device_put(Hyperparameters(3e-3, 0.0), program.replicated)
        state, losses = program.init(0), []
        for step in range(steps):
            batch = jax.device_put(some_tokens(step), program.batch_sharding)
            state, metrics = program.step(state, batch, hyperparameters)
            losses.append(float(metrics["loss"]))
        return losses, float(program.evaluate(state.params, stacked(program)))


def stacked(program):
    batches = [some_tokens(step) for step in (100, 101)]
    return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


QUICK = [("muon", (2, 2, 2))]


def on_meshes():
    """Every optimizer on every mesh, most of them in the slow tests."""
    for name, shape in itertools.product(OPTIMIZERS, SHAPES):
        marks = [] if (name, shape) in QUICK else [pytest.mark.slow]
        yield pytest.param(name, shape, marks=marks, id=f"{name}-{shape}")


@pytest.mark.parametrize(("name", "shape"), [*on_meshes()])
def test_every_mesh_gives_the_losses_of_one_device(name, shape):
    (losses, validation), (expected, expected_validation) = (
        losses_on(name, s) for s in (shape, (1, 1, 1))
    )
    assert expected[-1] < expected[0] - 0.05
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(validation, expected_validation, rtol=1e-4)


def test_parameters_and_state_are_divided():
    mesh = jax.make_mesh((2, 2, 2), AXES)
    with jax.set_mesh(mesh):
        program = make_program(tiny_config(**SHARDED, optimizer__name="adamw"), VOCABULARY)
        state = program.abstract_state
        share = lambda x: math.prod(x.sharding.shard_shape(x.shape)) / x.size
        # Over fsdp and tensor; the moments too.
        matrices = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim >= 2]
        assert len(matrices) == 3 * 9
        assert {share(x) for x in matrices} == {1 / 4}


@pytest.mark.parametrize(
    "changes", [{"microbatches": 8}, slow({"remat": "full"}), slow({"remat": "dots"})]
)
def test_memory_is_saved_without_a_change(changes):
    expected, _ = losses_on("muon", (1, 1, 1))
    np.testing.assert_allclose(losses_on("muon", (1, 1, 1), **changes)[0], expected, rtol=1e-5)


@pytest.mark.slow
def test_microbatches_on_a_mesh():
    expected, _ = losses_on("muon", (1, 1, 1))
    losses, _ = losses_on("muon", (2, 2, 2), microbatches=2, remat="full")
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_bf16_activations_keep_float32_weights():
    mesh = mesh_of(1)
    with jax.set_mesh(mesh):
        state = make_program(tiny_config(dtype="bfloat16"), VOCABULARY).abstract_state
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    expected, _ = losses_on("muon", (1, 1, 1))
    losses, _ = losses_on("muon", (1, 1, 1), dtype="bfloat16")
    np.testing.assert_allclose(losses, expected, rtol=2e-2)
    assert losses != expected
