"""What Optax asks of the optimizers that it takes in, asked of the ready-made ones."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mup_jax.optimizers import OPTIMIZERS
from mup_jax.testing import check_transformation

# Of which the program takes seconds to compile.
LONG = ("shampoo", "soap")
LONG_ARE_SLOW = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in OPTIMIZERS
]


def parabola(params):
    """Has its least value where every entry of the matrix is its column, and the vector 1."""
    columns = jnp.arange(3.0)
    return jnp.sum(jnp.square(params["w"] - columns)) + jnp.sum(jnp.square(params["b"] - 1))


def rosenbrock(params):
    """Of two rows of a matrix, and of two entries of a vector: least where all are 1."""
    valley = lambda x, y: jnp.sum(jnp.square(1 - x) + 100 * jnp.square(y - jnp.square(x)))
    return valley(*params["w"]) + valley(*params["b"])


STARTS = {
    parabola: {"w": jnp.full((4, 3), -1.0).at[1].set(4.0), "b": jnp.zeros(3)},
    rosenbrock: {"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)},
}
ENDS = {
    parabola: {"w": jnp.tile(jnp.arange(3.0), (4, 1)), "b": jnp.ones(3)},
    rosenbrock: {"w": jnp.ones((2, 3)), "b": jnp.ones(2)},
}


def make(name, learning_rate=0.05, **options):
    """An optimizer that needs nothing but gradients and parameters."""
    optimizer = OPTIMIZERS[name](learning_rate, **options)
    return with_loss(optimizer) if name == "sophia" else optimizer


def with_loss(optimizer):
    """Gives it the loss that Hutchinson's estimates are of."""
    loss = lambda params: sum(jnp.sum(x**4) for x in jax.tree.leaves(params))
    update = lambda *args, **extra: optimizer.update(*args, **({"obj_fn": loss} | extra))
    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def assert_alike(got, want):
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert np.linalg.norm(x - y) <= 1e-2 * np.linalg.norm(y)


@pytest.mark.parametrize("loss", [parabola, rosenbrock])
@pytest.mark.parametrize("name", LONG_ARE_SLOW)
def test_converges(name, loss):
    steps = 4000
    optimizer = make(name, schedule=optax.cosine_decay_schedule(1.0, steps))
    extra_args = {"obj_fn": loss} if name == "sophia" else {}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, **extra_args)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return params

    params = train(STARTS[loss])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=0.03), params, ENDS[loss])


RNG = np.random.default_rng(0)
PARAMS = {"w": np.float32(RNG.normal(size=(6, 6))), "b": np.float32(RNG.normal(size=3))}


def two_steps(optimizer):
    """The updates of the second step."""
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for scale in (1.0, 0.5):
        gradients = jax.tree.map(lambda x, scale=scale: scale * x + 0.3 * np.sin(9 * x), PARAMS)
        updates, state = update(gradients, state, PARAMS)
    return updates


@pytest.mark.parametrize("name", LONG_ARE_SLOW)
def test_every_number_can_be_injected(name):
    """But for those that say how large something is, or how often it is done."""
    given = {"learning_rate": 0.05, "embedding_readout_learning_rate": 0.02, "weight_decay": 0.1}
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    numbers = {key: p.default for key, p in parameters.items() if isinstance(p.default, float)}
    numbers |= given
    static = parameters.keys() - numbers.keys()
    injected = optax.inject_hyperparams(OPTIMIZERS[name], static_args=static)(**numbers)
    assert injected.init(PARAMS).hyperparams.keys() == numbers.keys()
    if name == "sophia":
        injected = with_loss(injected)
    assert_alike(two_steps(injected), two_steps(make(name, **given)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_are_asked_for(name):
    """For weight decay, which is there even where it is zero."""
    optimizer = make(name)
    with pytest.raises(ValueError, match=r"needs? the parameters|params"):
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p)), PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_map_over_what_is_like_the_parameters_keeps_the_rest_of_a_state(name):
    optimizer = make(name)
    state = optimizer.init(PARAMS)
    same = optax.tree.map_params(optimizer, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert all(map(lambda x, y: x is y, *map(jax.tree.leaves, (same, state))))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "adamw" else pytest.mark.slow) for n in OPTIMIZERS]
)
def test_matrices_alone(name):
    """An average of each entry never is a number again after a NaN."""
    elementwise = name in ("adamw", "adopt", "lamb", "lion", "sophia")
    check_transformation(make(name), skip=["nonfinite"] if elementwise else [])
