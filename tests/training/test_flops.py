import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax.models.llama import Llama, LlamaConfig, forward_flops_per_token
from mup_jax.training.flops import count_flops, count_flops_by_precision
from tests.training.tiny import STEPS, program_of


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


A, B = abstract(3, 5), abstract(5, 7)
PRODUCT = 2 * 3 * 5 * 7


def scanned(a, b):
    return jax.lax.scan(lambda carry, _: (carry, a @ b), 0.0, length=11)[1]


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (jnp.matmul, (A, B), PRODUCT),
        (lambda a, b: (a + 1) * 2, (A, B), 0),
        (jnp.matmul, (abstract(4, 2, 3, 5), abstract(4, 2, 5, 7)), 8 * PRODUCT),
        (jnp.matmul, (abstract(4, 3, 5), B), 4 * PRODUCT),
        (scanned, (A, B), 11 * PRODUCT),
        (jax.jit(lambda a, b: jax.jit(jnp.matmul)(a, b) + a @ b), (A, B), 2 * PRODUCT),
        (jax.checkpoint(jnp.matmul), (A, B), PRODUCT),
        # Two products for the gradient of both factors, and none for the value of a sum.
        (jax.grad(lambda a, b: jnp.sum(a @ b), argnums=(0, 1)), (A, B), 3 * PRODUCT),
        (jax.grad(lambda a, b: jnp.sum(jnp.square(a @ b))), (A, B), 2 * PRODUCT),
        (jax.vmap(jnp.matmul, in_axes=(0, None)), (abstract(6, 3, 5), B), 6 * PRODUCT),
    ],
)
def test_products(function, arguments, flops):
    assert count_flops(function, *arguments) == flops


def test_operations_by_precision():
    def function(a, b):
        half = a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)
        exact = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return half + 2 * (a @ b) + exact + jnp.linalg.qr(exact)[0] @ jnp.eye(3, 7)

    counted = count_flops_by_precision(function, A, B)
    assert counted["16 bit"] == PRODUCT
    assert counted["default"] == PRODUCT + 2 * 3 * 3 * 7
    assert counted["float32"] > PRODUCT
    assert sum(counted.values()) == count_flops(function, A, B)


def test_a_loop_of_unknown_length_counts_once():
    def function(a):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ a, a)

    assert count_flops(function, abstract(5, 5)) == 2 * 5**3


def test_conditionals_count_the_cheapest_branch_that_computes():
    def function(choice, a, b):
        nothing = lambda a, b: jnp.zeros((3, 7))
        once = lambda a, b: a @ b
        twice = lambda a, b: (a @ b) + (2 * a @ b)
        return jax.lax.switch(choice, [nothing, twice, once], a, b)

    assert count_flops(function, abstract(dtype=jnp.int32), A, B) == PRODUCT
    empty = lambda choice, a: jax.lax.cond(choice, jnp.sin, jnp.cos, a)
    assert count_flops(empty, abstract(dtype=jnp.bool), A) == 0


@pytest.mark.parametrize(
    ("function", "shape", "flops"),
    [
        (jnp.linalg.eigh, (10, 10), 11 * 10**3),
        (jnp.linalg.eigh, (4, 10, 10), 4 * 11 * 10**3),
        (jnp.linalg.cholesky, (9, 9), 9**3 / 3),
        (functools.partial(jnp.linalg.svd, full_matrices=False), (12, 5), 22 * 12 * 25),
        # R, and Q from its reflections.
        (jnp.linalg.qr, (2, 12, 6), 2 * (4 / 3 + 4 / 3) * 12 * 36),
    ],
)
def test_factorizations(function, shape, flops):
    # Around a factorization JAX may add products, none of them larger than d³.
    assert flops <= count_flops(function, abstract(*shape)) < 1.3 * flops


@pytest.mark.parametrize("context", [64, 256])
def test_model_formula_agrees_with_its_program(context):
    config = LlamaConfig(vocab_size=96, width=64, depth=3, head_dim=16)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    tokens = abstract(2, context, dtype=jnp.int32)
    forward = lambda params, tokens: nnx.merge(graphdef, params)(tokens)
    counted = count_flops(forward, nnx.to_pure_dict(params), tokens) / (2 * context)
    softmax = config.depth * 3 * context * config.heads
    assert counted == pytest.approx(forward_flops_per_token(config, context) - softmax, rel=0.01)


def muon_flops(m, n, steps=5):
    """A Gram matrix, its square, and the polynomial times the matrix, on the shorter side."""
    m, n = min(m, n), max(m, n)
    return steps * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_of_one_matrix(shape):
    optimizer = mup_jax.scale_by_muon(orthogonalizer="newton_schulz", ns_steps=5, gram_form=False)
    matrix = {"w": abstract(*shape)}
    state = jax.eval_shape(optimizer.init, matrix)
    assert count_flops(optimizer.update, matrix, state) == muon_flops(*shape)


def gram_form_flops(m, n, steps=5):
    """The Gram matrix and the last product; between them products of square matrices alone."""
    m, n = min(m, n), max(m, n)
    # The square at each step; from the second on the next Gram matrix, and the product so far.
    return 2 * m * m * n * 2 + 2 * m**3 * (steps + 3 * (steps - 1))


def test_muon_of_stacked_layers_in_gram_form():
    numbers = MuonDimensionNumbers(-2, -1)
    optimizer = mup_jax.scale_by_muon(
        weight_dimension_numbers=numbers, orthogonalizer="polar_express", ns_steps=3
    )
    matrix = {"w": abstract(7, 8, 24)}
    state = jax.eval_shape(optimizer.init, matrix)
    assert count_flops(optimizer.update, matrix, state) == 7 * gram_form_flops(8, 24, steps=3)


def test_optimizer_flops_of_a_program():
    per_layer = 4 * muon_flops(16, 16) + 3 * gram_form_flops(16, 64)
    options = {"orthogonalizer": "tuned", "ns_steps": 5}
    program = program_of(1, optimizer__name="muon", optimizer__options=options)
    assert program.optimizer_flops == per_layer
    assert program_of(1).optimizer_flops == 0
    assert program_of(1).steps == STEPS


@pytest.mark.parametrize("n", [1, 4, 12])
@pytest.mark.parametrize("stagger", [True, False])
def test_refreshes_count_for_their_share_of_the_steps(n, stagger):
    d, frequency = 8, 4

    def flops(**options):
        shampoo = mup_jax.scale_by_shampoo(
            weight_dimension_numbers=MuonDimensionNumbers(-2, -1), stagger=stagger, **options
        )
        gradient = abstract(n, d, d)
        state = jax.eval_shape(shampoo.init, gradient)
        return count_flops(shampoo.update, gradient, state, platform="cpu")

    # Two Gram matrices and two sides of the update.
    products = n * 4 * 2 * d**3
    of_refresh = flops(precondition_frequency=1) - products
    assert of_refresh > 2 * n * 11 * d**3
    expected = products + of_refresh / frequency
    assert flops(precondition_frequency=frequency) == pytest.approx(expected)
