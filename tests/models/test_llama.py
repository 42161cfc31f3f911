import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mup_jax.models import (
    Llama,
    LlamaConfig,
    forward_flops_per_token,
    num_parameters,
    roles,
)
from mup_jax.models import llama as internals

CONFIG = LlamaConfig(vocab_size=96, width=64, depth=2, head_dim=16)
MATRICES = {
    "embedding": (96, 64),
    "layers": {
        "attention": dict.fromkeys(("query", "key", "value", "output"), (2, 64, 64)),
        "mlp": {"gate": (2, 64, 256), "up": (2, 64, 256), "down": (2, 256, 64)},
    },
    "readout": (64, 96),
}
LADDER = {  # width: heads, parameters, tokens, training FLOPs; arXiv 2512.05620, Table 3
    512: (8, 185_680_896, 3_713_617_920, 4.3204e18),
    768: (12, 379_184_640, 7_583_692_800, 1.7814e19),
    1024: (16, 639_797_248, 12_795_944_960, 5.0382e19),
    1536: (24, 1_362_349_056, 27_246_981_120, 2.2675e20),
}


@functools.cache
def abstract(config=CONFIG):
    """The model as a pure function, the shapes of its parameters, and what draws them."""

    def init():
        return nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)

    graphdef, shapes = jax.eval_shape(init)
    apply = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    return apply, nnx.to_pure_dict(shapes), lambda: nnx.to_pure_dict(init()[1])


@functools.cache
def initial(config=CONFIG):
    return jax.jit(abstract(config)[2])()


@functools.cache
def perturbed():
    """Parameters off the initialisation, where zero matrices hide everything behind them."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), initial()
    )


def random_tokens(batch=2, context=12, vocab_size=96):
    return jnp.asarray(np.random.default_rng(2).integers(0, vocab_size, (batch, context)))


def loss(apply, params, tokens):
    log_probabilities = jax.nn.log_softmax(apply(params, tokens)[:, :-1])
    targets = jax.nn.one_hot(tokens[:, 1:], log_probabilities.shape[-1])
    return -jnp.mean(jnp.sum(targets * log_probabilities, axis=-1))


def loss_gradients_and_logits(params, tokens):
    apply = abstract()[0]
    value, gradient = jax.value_and_grad(functools.partial(loss, apply))(params, tokens)
    return value, gradient, apply(params, tokens)


@functools.cache
def on_one_device():
    return jax.jit(loss_gradients_and_logits)(perturbed(), random_tokens(batch=8))


def test_parameter_tree():
    for params in (abstract()[1], initial()):
        assert jax.tree.map(jnp.shape, params) == MATRICES
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_roles():
    params = initial()
    expected = jax.tree.map(lambda _: "hidden", params)
    expected |= {"embedding": "embedding", "readout": "readout"}
    assert roles(params) == expected
    state = jax.eval_shape(lambda: nnx.state(Llama(CONFIG, rngs=nnx.Rngs(0)), nnx.Param))
    assert nnx.to_pure_dict(roles(state)) == expected


@pytest.mark.parametrize(
    "changes", [{"mlp_ratio": 1}, {"mlp_ratio": 4}, {"mlp": "gelu", "learned_positions": 24}]
)
def test_num_parameters_counts_the_tree(changes):
    config = dataclasses.replace(CONFIG, depth=3, **changes)
    shapes = jax.tree.leaves(abstract(config)[1])
    assert num_parameters(config) == sum(leaf.size for leaf in shapes)


@pytest.mark.parametrize("width", LADDER)
def test_published_ladder(width):
    heads, parameters, tokens, training_flops = LADDER[width]
    config = LlamaConfig(vocab_size=50257, width=width, depth=32)
    assert config.heads == heads
    assert num_parameters(config) == parameters
    assert 20 * parameters == tokens
    assert f"{3 * forward_flops_per_token(config, 1024) * tokens:.4e}" == f"{training_flops:.4e}"


def test_flops_follow_the_mlp_ratio():
    wide, narrow = (
        forward_flops_per_token(dataclasses.replace(CONFIG, mlp_ratio=ratio), 128)
        for ratio in (4, 1)
    )
    assert wide - narrow == 2 * 3 * 2 * 3 * 64 * 64


def test_initialisation():
    config = LlamaConfig(vocab_size=500, width=256, depth=3)
    params = initial(config)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    assert jnp.std(params["embedding"]) == pytest.approx(0.1, rel=0.02)
    for weight in (attention["query"], attention["key"], attention["value"], mlp["gate"]):
        np.testing.assert_allclose(jnp.std(weight, axis=(1, 2)), 1 / math.sqrt(256), rtol=0.02)
    for weight in (attention["output"], mlp["down"], params["readout"]):
        assert not weight.any()


def test_no_two_matrices_start_alike():
    layers = initial()["layers"]
    drawn = [layers["attention"][name] for name in ("query", "key", "value")]
    drawn += [layers["mlp"][name][..., :64] for name in ("gate", "up")]
    matrices = jnp.concatenate(drawn).reshape(10, -1)
    correlation = np.corrcoef(matrices) - np.eye(10)
    assert abs(correlation).max() < 0.1


def test_first_logits_are_zero():
    logits = abstract()[0](initial(), random_tokens())
    assert logits.shape == (2, 12, 96)
    assert logits.dtype == jnp.float32
    assert not logits.any()


def test_features_start_as_the_embedding():
    @nnx.jit
    def features_and_lookup(model, tokens):
        return model.features(tokens), model.embedding[...][tokens]

    np.testing.assert_array_equal(
        *features_and_lookup(Llama(CONFIG, rngs=nnx.Rngs(0)), random_tokens())
    )


def activations(params, tokens, config=CONFIG):
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    return jax.jit(lambda params: nnx.merge(graphdef, params).activations(tokens))(params)


@pytest.mark.parametrize(
    ("depth", "middle"),
    [
        (1, 1),
        (2, 1),
        (3, 2),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(5, 3, marks=pytest.mark.slow),
    ],
)
def test_activations_of_the_middle_block_are_those_of_a_shallower_model(depth, middle):
    config, shallow = (dataclasses.replace(CONFIG, depth=n) for n in (depth, middle))
    params = initial(config)
    params["layers"] = jax.tree.map(lambda x: x + 0.1, params["layers"])
    first_blocks = params | {"layers": jax.tree.map(lambda x: x[:middle], params["layers"])}
    tokens = random_tokens()
    actual, expected = (
        activations(*of) for of in ((params, tokens, config), (first_blocks, tokens, shallow))
    )
    np.testing.assert_allclose(actual["middle block"], expected["last block"], rtol=1e-5)
    if depth > middle:
        assert jnp.abs(actual["last block"] - expected["last block"]).max() > 0.1


def test_activations_are_what_the_model_computes():
    tokens = random_tokens()
    actual = activations(perturbed(), tokens)
    assert set(actual) == {"embedding", "middle block", "last block", "logits"}
    np.testing.assert_array_equal(actual["embedding"], perturbed()["embedding"][tokens])
    np.testing.assert_allclose(actual["logits"], abstract()[0](perturbed(), tokens), rtol=1e-5)
    for name in ("embedding", "middle block", "last block"):
        assert actual[name].shape == (2, 12, 64)
    readout = jnp.matmul(internals._rms_norm(actual["last block"]), perturbed()["readout"])
    np.testing.assert_allclose(readout, actual["logits"], rtol=1e-4, atol=1e-5)


def test_causality():
    apply = abstract()[0]
    # Each position has a token, hence a row of the embedding, of its own.
    tokens = jnp.arange(10)[None]

    def one_logit(params, position):
        return apply(params, tokens)[0, position].sum()

    gradient = jax.jit(jax.grad(one_logit))
    for position in range(10):
        rows = jnp.abs(gradient(perturbed(), position)["embedding"][:10]).max(axis=1)
        assert (rows[: position + 1] > 1e-6).all()
        assert not rows[position + 1 :].any()


def test_every_parameter_learns():
    _, gradient, _ = on_one_device()
    for leaf in jax.tree.leaves(gradient):
        assert jnp.isfinite(leaf).all()
        assert (jnp.abs(leaf).max(axis=(-2, -1)) > 0).all()


def test_program_does_not_grow_with_depth():
    def lines(depth):
        apply, params, _ = abstract(dataclasses.replace(CONFIG, depth=depth))
        gradient = jax.jit(jax.grad(lambda params: loss(apply, params, random_tokens())))
        return len(gradient.lower(params).as_text().splitlines())

    assert lines(2) == lines(4)


def test_residual_multiplier_scales_every_branch():
    assert dataclasses.replace(CONFIG, depth=8).residual_multiplier == 1
    halved = dataclasses.replace(CONFIG, base_depth=1)
    assert halved.residual_multiplier == 0.5
    apply, apply_halved = abstract()[0], abstract(halved)[0]
    params = perturbed()
    scaled = jax.tree.map(jnp.copy, params)
    for part, last in (("attention", "output"), ("mlp", "down")):
        scaled["layers"][part][last] *= 0.5
    tokens = random_tokens()
    np.testing.assert_allclose(
        apply_halved(params, tokens), apply(scaled, tokens), rtol=1e-4, atol=1e-5
    )
    assert jnp.abs(apply_halved(params, tokens) - apply(params, tokens)).max() > 1e-2


def test_bfloat16_activations():
    apply_bfloat16, shapes, _ = abstract(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    exact, rounded = (f(perturbed(), random_tokens()) for f in (abstract()[0], apply_bfloat16))
    assert rounded.dtype == jnp.float32
    assert jnp.linalg.norm(rounded - exact) < 0.02 * jnp.linalg.norm(exact)
    assert jnp.abs(rounded - exact).max() > 0


def test_rotary_scores_depend_on_the_distance_only():
    rotation = internals._rotation(20, CONFIG)
    query, key = np.random.default_rng(3).standard_normal((2, CONFIG.head_dim), np.float32)
    query, key = (
        internals._rotate(jnp.broadcast_to(x, (1, 20, 1, x.size)), rotation)[0, :, 0]
        for x in (query, key)
    )
    scores = query @ key.T
    for distance in range(-10, 11):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)
    assert jnp.std(scores[0]) > 0.1


def test_order_of_earlier_tokens_matters():
    forward, swapped = abstract()[0](perturbed(), jnp.array([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert jnp.abs(forward - swapped).max() > 1e-3


GPT2 = dataclasses.replace(CONFIG, mlp="gelu", mlp_ratio=1, learned_positions=24)


def test_the_gpt2_like_network():
    params = initial(GPT2)
    assert jax.tree.map(jnp.shape, params) == {
        "embedding": (96, 64),
        "positions": (24, 64),
        "layers": {
            "attention": MATRICES["layers"]["attention"],
            "mlp": {"up": (2, 64, 64), "down": (2, 64, 64)},
        },
        "readout": (64, 96),
    }
    assert roles(params)["positions"] == "embedding"
    assert jnp.std(params["positions"]) == pytest.approx(0.1, rel=0.1)
    swiglu = dataclasses.replace(GPT2, mlp="swiglu")
    difference = forward_flops_per_token(swiglu, 24) - forward_flops_per_token(GPT2, 24)
    assert difference == 2 * 2 * 64 * 64


def test_learned_positions_are_all_that_tells_positions():
    """Without them attention over one repeated token is the same everywhere."""
    apply = abstract(GPT2)[0]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32),
                          initial(GPT2))  # fmt: skip
    repeated = jnp.full((1, 12), 7)
    assert jnp.std(apply(params, repeated)[0], axis=0).max() > 1e-2
    params["positions"] *= 0
    logits = apply(params, repeated)[0]
    np.testing.assert_allclose(logits, jnp.broadcast_to(logits[0], logits.shape), atol=1e-5)


def test_a_context_beyond_the_learned_positions():
    with pytest.raises(ValueError, match="25 tokens, but learned_positions=24"):
        abstract(GPT2)[0](initial(GPT2), jnp.zeros((1, 25), jnp.int32))


def test_compiled_initialisation_equals_eager():
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        initial(),
        abstract()[2](),
    )


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_data_parallel_mesh_equals_one_device(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    replicated, by_rows = (jax.NamedSharding(mesh, P(*axes)) for axes in ((), ("data",)))
    with jax.set_mesh(mesh):
        actual = jax.jit(loss_gradients_and_logits)(
            jax.device_put(perturbed(), replicated),
            jax.device_put(random_tokens(batch=8), by_rows),
        )
    assert actual[-1].sharding.spec[0] == "data"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        actual,
        on_one_device(),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 72}, "width=72 is not a multiple of head_dim=16: choose width 64 or 80"),
        ({"width": 10}, "width=10 is not a multiple of head_dim=16: choose width 16"),
        ({"head_dim": 1}, "head_dim=1: choose an even one"),
        ({"vocab_size": 0}, "vocab_size=0: choose a positive value"),
        ({"depth": -1}, "depth=-1: choose a positive value"),
        ({"base_depth": 0}, "base_depth=0: choose a positive value"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"mlp": "relu"}, "mlp='relu': choose one of swiglu, gelu"),
        ({"learned_positions": -1}, "learned_positions=-1: give the context"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
