"""A whole optimizer of any direction, and of a direction from a file."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import mup_jax
from mup_jax import infer_shapes, rules
from mup_jax.optimizers import find_optimizer, from_file, matrix
from mup_jax.optimizers.from_file import each_matrix, from_source, is_file, label_of, read_file
from mup_jax.training.config import check_optimizer, epsilons_of
from mup_jax.transfer.derive import DerivedRule

RNG = np.random.default_rng(0)
STACKED = MuonDimensionNumbers(-2, -1)


def params_of(width):
    draw = lambda *shape: jnp.float32(RNG.normal(size=shape))
    return {
        "embed": draw(7, width),
        "layers": draw(2, width, width),
        "head": draw(width, 7),
        "gain": draw(width),
    }


PARAMS = params_of(16)
SHAPES = infer_shapes(params_of(8), PARAMS, weight_dimension_numbers=STACKED)


def steps(optimizer, count=2):
    state, updates = optimizer.init(PARAMS), []
    for i in range(count):
        gradient = jax.tree.map(lambda w, i=i: jnp.sin(w + i), PARAMS)
        u, state = optimizer.update(gradient, state, PARAMS)
        updates.append(u)
    return updates


def assert_equal(got, want):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), got, want)


def test_muon_is_one_of_them():
    options = {"shapes": SHAPES, "weight_decay": 0.1, "weight_dimension_numbers": STACKED}
    direction = mup_jax.scale_by_muon(0.9, weight_dimension_numbers=STACKED)
    got = mup_jax.matrix_optimizer(0.1, direction, rules.muon(), **options)
    assert_equal(steps(got), steps(mup_jax.muon(0.1, beta=0.9, **options)))


def test_a_rule_is_measured_where_there_is_something_to_scale(monkeypatch):
    want = steps(mup_jax.matrix_optimizer(0.1, optax.scale_by_lion(), rules.lion(), shapes=SHAPES))
    got = mup_jax.matrix_optimizer(0.1, optax.scale_by_lion(), shapes=SHAPES)
    assert_equal(steps(got), want)
    monkeypatch.setattr(matrix, "derive_rule", None)
    mup_jax.matrix_optimizer(0.1, optax.scale_by_lion(), hidden_only=False)


def test_what_has_no_rule_says_what_to_do():
    kink = optax.stateless_with_tree_map(lambda g, _: (2 if g.shape[0] > 100 else 1) * g)
    with pytest.raises(ValueError, match=r"no rule was derived: .*mup_jax\.rules, and give it"):
        mup_jax.matrix_optimizer(0.1, kink, shapes=SHAPES)


SIGN = """
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mup_jax


class State(NamedTuple):
    momentum: jax.Array


def make(beta: float = 0.9, kind: Literal["sign", "none"] = "sign", eps: float = 1e-8):
    def init(w):
        return State(jnp.zeros_like(w))

    def update(g, state, w=None):
        rows, columns = g.shape  # one matrix
        momentum = beta * state.momentum + (1 - beta) * g
        return momentum / (jnp.abs(momentum) + eps), State(momentum)

    return optax.GradientTransformation(init, update)


def with_rule(**options):
    return make(**options), mup_jax.rules.lion()


def told(weight_dimension_numbers, beta=0.9):
    return mup_jax.scale_by_muon(beta, weight_dimension_numbers=weight_dimension_numbers)
"""


def test_names():
    assert is_file("a/my_optimizer.py:make")
    assert not is_file("muon")
    assert label_of("muon") == "muon"
    assert label_of("a/my_optimizer.py:make") == "my_optimizer"
    assert label_of("my-optimizer.v2.py:other") == "my_optimizer_v2_other"


def test_a_file_is_read_from_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SIGN)
    assert read_file(f"{tmp_path}/mine.py:make") == ("mine.py:make", SIGN)
    monkeypatch.chdir(tmp_path)
    assert find_optimizer("mine.py:make") is from_source("mine.py:make", SIGN)
    (tmp_path / "mine.py").write_text(SIGN + "# changed\n")
    assert find_optimizer("mine.py:make") is not from_source("mine.py:make", SIGN)
    assert find_optimizer("mine.py:make", SIGN) is from_source("mine.py:make", SIGN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py", r"optimizer 'mine.py': give FILE.py:FUNCTION, for example"),
        ("mine.py:2", r"optimizer 'mine.py:2': give FILE.py:FUNCTION"),
        ("nowhere.py:make", r"'nowhere.py:make': there is no file .*/nowhere.py, give its path"),
        ("mine", r"unknown optimizer 'mine': choose one of adamw, .* or one of your own as FILE"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_optimizer(name)


def test_signature_is_that_of_the_function_and_of_the_whole():
    parameters = inspect.signature(from_source("mine.py:make", SIGN)).parameters
    assert list(parameters)[:5] == ["learning_rate", "beta", "kind", "eps", "schedule"]
    assert parameters["beta"].default == 0.9
    assert {"shapes", "hidden_only", "adam_b1"} < set(parameters)
    assert list(inspect.signature(from_source("mine.py:with_rule", SIGN)).parameters)[-1] == (
        "options"
    )


def test_one_matrix_after_the_other_by_the_rule_of_the_file():
    make = from_source("mine.py:with_rule", SIGN)
    got = steps(make(0.1, beta=0.5, shapes=SHAPES, weight_dimension_numbers=STACKED))
    sign = optax.chain(optax.ema(0.5, debias=False), optax.stateless_with_tree_map(_sign))
    whole = mup_jax.matrix_optimizer(0.1, sign, rules.lion(), shapes=SHAPES)
    assert_equal(got, steps(whole))
    assert "with the rule 'lion' that it gives" in make.describe_rule({})


def test_options_are_checked_as_those_of_others_are():
    check_optimizer("mine.py:make", {"beta": 0.5, "kind": "none", "adam_b1": 0.9}, SIGN)
    check_optimizer("mine.py:with_rule", {"beta": 0.5}, SIGN)
    for name, options, message in (
        ("make", {"betta": 0.5}, r"unknown key mine.py:make.options.betta: did you mean 'beta'"),
        ("make", {"beta": "big"}, r"mine.py:make.options.beta='big': give float"),
        ("make", {"kind": "cube"}, r"mine.py:make.options.kind='cube': choose one of sign, none"),
        ("make", {"adam_b1": 2.0}, r"mine.py:make.options: .*b1=2.0: choose one in"),
        ("make", {"shapes": None}, r"unknown key mine.py:make.options.shapes"),
        ("with_rule", {"betta": 0.5}, r"mine.py, line 28: TypeError: .*argument 'betta'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_optimizer(f"mine.py:{name}", options, SIGN)


def test_an_epsilon_is_found_among_the_options():
    assert epsilons_of("mine.py:make", {}, SIGN) == ["eps", "adam_eps"]
    assert epsilons_of("mine.py:told", {}, SIGN) == ["adam_eps"]


def _sign(u, _):
    return u / (jnp.abs(u) + 1e-8)


def test_stacks_for_those_that_ask():
    make = from_source("mine.py:told", SIGN)
    got = steps(make(0.1, beta=0.9, shapes=SHAPES, weight_dimension_numbers=STACKED))
    want = mup_jax.muon(0.1, beta=0.9, shapes=SHAPES, weight_dimension_numbers=STACKED)
    assert_equal(got, steps(want))


def test_a_rule_is_measured_once_for_given_options(monkeypatch):
    calls = []
    measure = from_file.measure_rule
    monkeypatch.setattr(from_file, "measure_rule", lambda d: calls.append(d) or measure(d))
    make = from_source("mine.py:make", SIGN + "# measured once\n")
    for options in ({}, {}, {"eps": 1.0}, {"beta": 0.5}, {"beta": 0.5}):
        # In a program, too, where ε is an argument of it.
        jax.jit(lambda w, o=options: make(0.1, shapes=SHAPES, **o).init(w))(PARAMS)
    assert len(calls) == 2
    assert isinstance(make.rule({}), DerivedRule)
    shape = SHAPES["layers"]
    assert make.rule({}).rule.learning_rate(shape) == pytest.approx(0.5)
    text = make.describe_rule({})
    assert text.startswith("mine.py:make, whose rule was measured: η ∝ width to the power of ")
    assert "-0.9" in text


def test_each_matrix_is_by_itself():
    normalized = optax.stateless_with_tree_map(lambda u, _: u / jnp.linalg.norm(u))
    tree = {"a": PARAMS["layers"], "b": {"c": PARAMS["head"]}}
    tx = each_matrix(optax.chain(optax.trace(0.9), normalized), STACKED)
    updates, state = tx.update(tree, tx.init(tree), tree)
    np.testing.assert_allclose(jnp.linalg.norm(updates["a"], axis=(1, 2)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(updates["b"]["c"]), 1.0, rtol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(tree))
    with pytest.raises(ValueError, match="is not a matrix"):
        tx.init(PARAMS)


@pytest.mark.parametrize("spec", [(None, "fsdp", "tensor"), ("fsdp", None, None)])
def test_each_matrix_on_a_mesh(spec):
    """Products of divided matrices, which would have to say how on explicit axes."""
    product = optax.stateless_with_tree_map(lambda g, _: g @ g.T @ g)
    tx = each_matrix(optax.chain(optax.trace(0.9), product), STACKED)
    update = jax.jit(lambda g, s: tx.update(g, s, g))
    gradient = PARAMS["layers"]
    want, _ = update(gradient, tx.init(gradient))
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(gradient, jax.NamedSharding(mesh, jax.P(*spec)))
        got, state = update(placed, jax.jit(tx.init)(placed))
        leaves = [got, *jax.tree.leaves(state)]
    assert {x.sharding.spec for x in leaves} == {jax.P(*spec)}
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(", r"^mine.py, line 1: SyntaxError"),
        ("x = 1\nimport nonesuch", r"^mine.py, line 2: ModuleNotFoundError: No module named"),
        ("def other():\n  pass", r"mine.py has no function 'make': it has other"),
        ("def make(shapes): pass", r"mine.py:make has the argument shapes, which is one of the w"),
        ("def make():\n  return 1 / 0", r"mine.py, line 2: ZeroDivisionError"),
        ("def make(): return 3", r"mine.py:make returns 3: return an optax.GradientTr.*Rule"),
        (
            "import optax\ndef make(): return optax.scale_by_lion(), 3",
            r"mine.py:make returns \(Grad.*…: return an optax.GradientTransformation, or a pair",
        ),
        (
            "import optax\ndef make(): return optax.lion(1e-3)",
            r"its updates point down the gradient: return the positive direction",
        ),
        (
            "import optax, jax\n"
            "def make(): return optax.stateless_with_tree_map(lambda u, _: u / abs(u).max())",
            r"mine.py:make: the update of a gradient of zeros is not finite",
        ),
        (
            "import optax, jax\n"
            "def make(weight_dimension_numbers):\n"
            "  return optax.stateless_with_tree_map(lambda u, _: u @ u.T @ u)",
            r"fails on a stack of two 4 x 3 matrices; without an argument weight_dimension_numbers",
        ),
        (
            "import optax\n"
            "def make(): return optax.stateless_with_tree_map(lambda u, _: u.sum(axis=0))",
            r"mine.py:make fails on a stack of two 4 x 3 matrices: ",
        ),
        (
            "import optax\n"
            "def make():\n"
            "  return optax.stateless_with_tree_map(lambda g, _: (1 + (len(g) > 100)) * g)",
            r"mine.py:make: no rule was derived: .* give it beside the direction",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_at_once(text, message):
    with pytest.raises(ValueError, match=message):
        from_source("mine.py:make", text)(0.1, shapes=SHAPES)
