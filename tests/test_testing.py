"""What `check_transformation` lets pass, and what it catches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mup_jax
from mup_jax.testing import PROPERTIES, check_transformation

SYMMETRIES = ("rotation", "transposition")


def of(scale_by, **options):
    return lambda numbers: scale_by(weight_dimension_numbers=numbers, **options)


def whitened(numbers=None):
    """The momentum of a rule of ours, whitened on one side."""

    def init(shape):
        return {"mu": jnp.zeros(shape), "gram": jnp.zeros((shape[0],) * 2)}

    def direction(g, state, step):
        mu = 0.9 * state["mu"] + 0.1 * g
        gram = 0.9 * state["gram"] + 0.1 * g @ g.T
        ridge = (1e-8 + 1e-3 * jnp.trace(gram)) * jnp.eye(len(g))
        return jnp.linalg.solve(gram + ridge, mu), {"mu": mu, "gram": gram}

    rule = mup_jax.BlockRule(init, direction)
    return mup_jax.scale_by_blocks(rule, weight_dimension_numbers=numbers)


# Options, and those that hold beside the default.
GOOD = {
    "adam": (optax.scale_by_adam(), {"skip": ["nonfinite"], "also": ["transposition"]}),
    "momentum": (lambda numbers: optax.trace(0.9), {"skip": ["nonfinite"], "also": SYMMETRIES}),
    "a rule": (whitened, {"also": ["rotation"]}),
    "muon": (of(mup_jax.scale_by_muon), {"also": SYMMETRIES}),
    "adamuon": (of(mup_jax.scale_by_adamuon), {"also": ["transposition"]}),
    "shampoo": (of(mup_jax.scale_by_shampoo), {"also": SYMMETRIES}),
    "shampoo in blocks": (of(mup_jax.scale_by_shampoo, block_size=4), {"also": ["transposition"]}),
    "soap": (of(mup_jax.scale_by_soap), {"also": SYMMETRIES}),
}
QUICK = ("adam", "a rule")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in GOOD]
)
def test_good_ones_pass(name):
    transformation, options = GOOD[name]
    checked = check_transformation(transformation, **options)
    left_out = {*SYMMETRIES} - {*options["also"]} | {*options.get("skip", ())}
    left_out |= set() if callable(transformation) else {"stack"}
    assert set(checked) == set(PROPERTIES) - left_out


@pytest.mark.parametrize("name", ["muon", "soap", "adamuon"])
def test_good_ones_pass_on_the_program_that_most_checks_share(name):
    transformation, options = GOOD[name]
    shared = {"types", "abstract_init", "extra_args", "checkpoint", "independence"}
    shared |= {"zero", "first_zero", "rank_one", "nonfinite"} | {"rotation"} & {*options["also"]}
    assert set(check_transformation(transformation, only=shared)) == shared


# One for each property that does not have it. Most are a momentum with something wrong.


def momentum(update, init=jnp.zeros_like):
    """Of `update(g, mu) -> (update, mu)` for each leaf."""

    def update_all(updates, state, params=None):
        pairs = {name: update(g, state[name]) for name, g in updates.items()}
        return {n: u for n, (u, _) in pairs.items()}, {n: mu for n, (_, mu) in pairs.items()}

    return optax.GradientTransformation(lambda params: jax.tree.map(init, params), update_all)


def of_leaves(update):
    """Of `update(leaf) -> leaf`, without a state."""
    return optax.stateless(lambda updates, params: jax.tree.map(update, updates))


def of_tree(update):
    return optax.stateless(lambda updates, params: update(updates))


def average(g, mu):
    mu = 0.9 * mu + 0.1 * g
    return mu, mu


def traced_often():
    """Counts its steps in Python, where they are counted once for a program."""
    calls = []

    def update_all(updates, params):
        calls.append(None)
        return jax.tree.map(lambda g: g / len(calls), updates)

    return optax.stateless(update_all)


def rounded(g):
    """Whose sum is taken in the dtype of the gradient."""
    return g * (1 + 3 * (jnp.sum(g + jnp.asarray(256, g.dtype)) - 256 * g.size))


def state_in_the_structure():
    """Counts steps where no array is."""

    @jax.tree_util.register_static
    class Count(int):
        pass

    def update(updates, count, params=None):
        count = Count(count + 1)
        return jax.tree.map(lambda g: g / count, updates), count

    return optax.GradientTransformation(lambda params: Count(0), update)


def count_in_float(updates, count, params=None):
    return updates, count + 1.0


def with_values_of_parameters(params):
    return {name: jnp.zeros(len(np.unique(x)) % 7) for name, x in params.items()}


def on_each_device(g):
    """Divides by the norm of what the device has."""
    normalize = lambda g: g / jnp.linalg.norm(g)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return normalize(g)
    spec = jax.P("data", None)
    g = jax.sharding.reshard(g, spec) if mesh.are_all_axes_explicit else g
    return jax.shard_map(normalize, in_specs=spec, out_specs=spec)(g)


def global_norm(updates):
    return jax.tree.map(lambda g: g / (1 + optax.tree.norm(updates)), updates)


def by_position(updates):
    leaves, treedef = jax.tree.flatten(updates)
    return jax.tree.unflatten(treedef, [i * g for i, g in enumerate(leaves, start=1)])


def first_gradient(g, first):
    """Divides by the size of the first gradient for ever, unless it is the first state."""
    first = jnp.where(jnp.isnan(first), jnp.linalg.norm(g), first)
    return g / jnp.where(first > 0, first, jnp.inf), first


def every_leaf(updates):
    """Takes what a mask leaves for a matrix."""
    no_tree = lambda x: not isinstance(x, dict)
    return jax.tree.map(lambda g: 2.0 * g, updates, is_leaf=no_tree)


def called_back(g):
    return jax.pure_callback(lambda g: g, jax.ShapeDtypeStruct(g.shape, g.dtype), g)


def no_extra_args():
    identity = optax.identity()
    return optax.GradientTransformationExtraArgs(
        identity.init, lambda updates, state, params=None: (updates, state)
    )


BAD = {
    "types": of_leaves(lambda g: g.astype(jnp.float32)),
    "bfloat16": of_leaves(rounded),
    "jit": traced_often(),
    "abstract_init": optax.GradientTransformation(
        with_values_of_parameters, optax.identity().update
    ),
    "extra_args": no_extra_args(),
    "checkpoint": state_in_the_structure(),
    "stack": lambda numbers: of_leaves(lambda g: g / jnp.linalg.norm(g)),
    "independence": of_tree(global_norm),
    "order": of_tree(by_position),
    "zero": of_leaves(lambda g: g / jnp.linalg.norm(g)),
    "first_zero": momentum(first_gradient, init=lambda x: jnp.full((), jnp.nan)),
    "rank_one": of_leaves(lambda g: jnp.linalg.inv(g @ g.T) @ g),
    "nonfinite": momentum(average),
    "chain": traced_often(),
    "masked": of_tree(every_leaf),
    "partition": of_tree(every_leaf),
    "multi_steps": state_in_the_structure(),
    "inject_hyperparams": traced_often(),
    "scan": optax.GradientTransformation(lambda params: jnp.int32(0), count_in_float),
    "vmap": of_leaves(called_back),
    "sharding": of_leaves(on_each_device),
    "rotation": of_leaves(jnp.sign),
    "transposition": of_leaves(lambda g: g / jnp.linalg.norm(g, axis=0, keepdims=True)),
    "donation": momentum(average, init=lambda x: x),
}


def test_each_property_has_one_that_is_caught():
    assert list(BAD) == list(PROPERTIES)


@pytest.mark.parametrize("name", BAD)
def test_bad_ones_are_caught(name):
    with pytest.raises(AssertionError, match=rf"1 of 1 .*\n{name}: .*\n  Found: .*\n  Usually: "):
        check_transformation(BAD[name], only=[name])


def test_what_first_states_have_in_common_cannot_be_donated():
    zeros = functools.cache(jnp.zeros)
    shared = momentum(average, init=lambda x: zeros(x.shape))
    with pytest.raises(AssertionError, match=r"donation: .*\n  Found: .*donate"):
        check_transformation(shared, only=["donation"])
    shared = optax.GradientTransformation(lambda params: zeros(()), count_in_float)
    with pytest.raises(AssertionError, match=r"donation: .*\n  Found: .*deleted"):
        check_transformation(shared, only=["donation"])


def test_all_that_fails_is_in_one_message():
    with pytest.raises(AssertionError, match=r"2 of 3 .*\nzero: [^$]*\nnonfinite: "):
        check_transformation(BAD["zero"], only=["zero", "nonfinite", "rotation"])


def test_what_fails_on_ordinary_gradients_is_said_once():
    by_value = of_leaves(lambda g: g if g.sum() > 0 else -g)
    with pytest.raises(AssertionError, match=r"nothing can be checked.*TracerBoolConversionError"):
        check_transformation(by_value)


@pytest.mark.parametrize("argument", ["skip", "also", "only"])
def test_unknown_properties_are_refused(argument):
    with pytest.raises(ValueError, match=r"no property 'rotations': choose from types, "):
        check_transformation(optax.identity(), **{argument: ["rotations"]})


def test_a_stack_is_checked_where_its_axes_can_be_said():
    stack = {"only": ["stack"]}
    assert check_transformation(optax.scale_by_adam(), **stack) == ()
    assert check_transformation(lambda numbers: optax.scale_by_adam(), **stack) == ("stack",)
