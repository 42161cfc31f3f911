"""Measured rules against published ones, and what has no rule."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mup_jax
from experiments import derived_rules
from mup_jax import ParamShape, derive_rule, rules
from mup_jax.transfer import derive

LAYERS = ("embedding", "hidden", "readout")
# Compiling takes the time, except where matrices are factorized.
WIDE, WIDTHS = (64, 256, 1024), (64, 128, 256)
BLOCK = 8
EXAMPLES = 16

shampoo = functools.partial(mup_jax.scale_by_shampoo, precondition_frequency=1)
soap = functools.partial(mup_jax.scale_by_soap, precondition_frequency=1)
measured = functools.cache(derive_rule)

SGD, ADAM, MUON = (1, 0, -1), (0, -1, -1), (0.5, 0, -0.5)
# Exponents of η in the width, and the degree of homogeneity.
OF_OPTAX = {
    "sgd": (optax.sgd(0.1, momentum=0.9), SGD, 1),
    "adam": (optax.scale_by_adam(), ADAM, 0),
    "adopt": (optax.contrib.scale_by_adopt(), ADAM, 0),
    "lion": (optax.lion(1e-3), ADAM, 0),
    "lamb": (optax.lamb(1e-3), (0, -0.5, 0), 0),
    "clipped adam": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
        ADAM,
        0,
    ),
}
MORE_OF_OPTAX = {
    "madgrad": (optax.contrib.madgrad(1e-3), (1 / 3, -2 / 3, -1), 1 / 3),
    "novograd": (optax.novograd(1e-3), MUON, 0),
    "adadelta": (optax.adadelta(1e-3), ADAM, 0),
    "adafactor": (optax.adafactor(1e-3), (0, -0.5, 0), 0),
    "adagrad": (optax.adagrad(1e-3), ADAM, 0),
    "ademamix": (optax.contrib.ademamix(1e-3), ADAM, 0),
    "lars": (optax.lars(1e-3), (0, -0.5, 0), 0),
    "rprop": (optax.rprop(1e-3), ADAM, 0),
    "sm3": (optax.sm3(1e-3), ADAM, 0),
    "yogi": (optax.yogi(1e-3), ADAM, 0),
}


def and_slow(fast, slow):
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("name", and_slow(OF_OPTAX, MORE_OF_OPTAX))
def test_measures_the_rules_of_optax(name):
    inner, exponents, homogeneity = (OF_OPTAX | MORE_OF_OPTAX)[name]
    derived = measured(inner, widths=WIDE)
    assert [derived.exponents[role] for role in LAYERS] == pytest.approx(exponents, abs=0.1)
    assert derived.homogeneity == pytest.approx(homogeneity, abs=0.01)
    assert max(derived.residuals.values()) < 0.1
    assert exponents_of(derived.rule.learning_rate) == pytest.approx(exponents)


OURS = {
    "muon": (mup_jax.scale_by_muon(), rules.muon()),
    "shampoo ½, blocks": (shampoo(block_size=BLOCK), rules.shampoo(block_size=BLOCK)),
}
SLOW = {
    "muon of optax": (optax.contrib.scale_by_muon(), rules.muon()),
    "adamuon": (mup_jax.scale_by_adamuon(), rules.adamuon()),
    "spectrally normalized muon": (
        optax.chain(mup_jax.scale_by_muon(), mup_jax.normalize_spectral_norm()),
        rules.spectrally_normalized(),
    ),
    "shampoo ¼, blocks, absolute ε": (
        shampoo(exponent=0.25, block_size=BLOCK, relative_eps=False, eps=1e-8),
        rules.shampoo(exponent=0.25, block_size=BLOCK, relative_eps=False),
    ),
    "soap, blocks": (soap(block_size=BLOCK), rules.soap(block_size=BLOCK)),
    "shampoo # adam": (
        mup_jax.graft(optax.scale_by_adam(), shampoo(block_size=BLOCK)),
        rules.grafted(rules.adam()),
    ),
    "shampoo ½": (shampoo(block_size=None), rules.shampoo(block_size=None)),
    "shampoo ½, absolute ε": (
        shampoo(block_size=None, relative_eps=False, eps=1e-8),
        rules.shampoo(block_size=None, relative_eps=False),
    ),
    "shampoo ¼": (
        shampoo(exponent=0.25, block_size=None),
        rules.shampoo(exponent=0.25, block_size=None),
    ),
    "soap": (soap(block_size=None), rules.soap(block_size=None)),
}


def exponents_of(factor, width=64, ratio=16):
    """Of a factor of a rule, at each layer."""
    here, base = derive._sides(ratio * width), derive._sides(width)
    shapes = {role: ParamShape(role, *here[role], *base[role]) for role in LAYERS}
    return [math.log(factor(shapes[role]), ratio) for role in LAYERS]


@pytest.mark.parametrize("name", and_slow(OURS, SLOW))
def test_published_rules_are_measured(name):
    inner, rule = (OURS | SLOW)[name]
    derived = measured(inner, widths=WIDTHS)
    got = [derived.exponents[role] for role in LAYERS]
    assert got == pytest.approx(exponents_of(rule.learning_rate), abs=0.1)
    assert derived.homogeneity == pytest.approx(rule.homogeneity, abs=0.01)
    for factor in ("learning_rate", "gradient_scale", "update_scale"):
        assert exponents_of(getattr(derived.rule, factor)) == pytest.approx(
            exponents_of(getattr(rule, factor))
        ), factor


def test_epsilon_scales_as_published():
    adam, adopt = (measured(OF_OPTAX[name][0], widths=WIDE) for name in ("adam", "adopt"))
    for derived in (adam, adopt):
        got = [derived.epsilon_exponents[role] for role in LAYERS]
        assert got == pytest.approx(exponents_of(rules.adam().epsilon), abs=0.1)
    # Noise is compared with the gradient, too; a sign is not.
    assert derive_rule(optax.noisy_sgd(0.1, key=0), widths=WIDTHS).epsilon_exponents
    assert measured(OF_OPTAX["lion"][0], widths=WIDE).epsilon_exponents is None


def test_readouts_of_lamb_follow_their_initialisation():
    # A trust ratio sees the norm of the parameters.
    wide = derive_rule(
        optax.lamb(1e-3), widths=WIDTHS, initial_std={"readout": lambda d_in: d_in**-0.5}
    )
    assert wide.exponents["readout"] == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize(
    ("direction", "examples", "variant"),
    [
        (optax.scale_by_adam, EXAMPLES, "measured"),
        (mup_jax.scale_by_muon, EXAMPLES, "measured"),
        # Of full rank; Adam's updates still have most in what all inputs have in common.
        pytest.param(optax.scale_by_adam, 512, "measured", marks=pytest.mark.slow),
        (mup_jax.scale_by_muon, 512, "published"),
    ],
)
def test_hyperball_follows_the_rank_of_updates(direction, examples, variant):
    inner = mup_jax.hyperball(direction(), optax.scale_by_learning_rate(1e-3))
    zero = {"readout": lambda d_in: 0.0}
    derived = derive_rule(inner, widths=WIDTHS, examples=examples, initial_std=zero)
    got = [derived.exponents[role] for role in LAYERS]
    rule = rules.hyperball(variant=variant)
    assert got == pytest.approx(exponents_of(rule.learning_rate), abs=0.1)
    assert derived.homogeneity == pytest.approx(rule.homogeneity, abs=0.01)
    assert derived.epsilon_exponents is None


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [8, None])
@pytest.mark.parametrize("name", ["kl_shampoo", "kl_soap"])
def test_measured_rules_of_kl_factors(name, block_size):
    """Of blocks at all roles; of whole matrices at hidden ones, for which alone they are."""
    options = {"block_size": block_size}
    make, rule = getattr(mup_jax, f"scale_by_{name}"), getattr(rules, name)(**options)
    derived = derive_rule(make(**options, precondition_frequency=1), widths=(64, 128, 256))
    want = dict(zip(LAYERS, exponents_of(rule.learning_rate), strict=True))
    for role in LAYERS if block_size else ["hidden"]:
        assert derived.exponents[role] == pytest.approx(want[role], abs=0.1)
    assert derived.homogeneity == pytest.approx(0, abs=0.01)


def test_normuon_has_the_rule_of_muon():
    derived = derive_rule(mup_jax.scale_by_normuon(), widths=(32, 64, 128))
    got = [derived.exponents[role] for role in LAYERS]
    assert got == pytest.approx(exponents_of(rules.normuon().learning_rate), abs=0.05)


def with_rule(inner, rule, base_width=WIDTHS[0]):
    """`mup`, for whatever width the parameters have."""
    base = {r: jax.ShapeDtypeStruct(s, jnp.float32) for r, s in derive._sides(base_width).items()}

    def at(tree):
        shapes = mup_jax.infer_shapes(base, tree, roles={role: role for role in LAYERS})
        return mup_jax.mup(inner, rule, shapes)

    return optax.GradientTransformation(
        lambda params: at(params).init(params),
        lambda updates, state, params: at(updates).update(updates, state, params),
    )


@pytest.mark.parametrize("name", and_slow(["sgd", "adam", "lamb"], ["shampoo ½, blocks"]))
def test_after_mup_with_the_measured_rule_nothing_is_left_to_scale(name):
    inner = (OF_OPTAX | OURS)[name][0]
    rule = measured(inner, widths=WIDTHS if name in OURS else WIDE).rule
    again = derive_rule(with_rule(inner, rule), widths=WIDTHS)
    assert list(again.exponents.values()) == pytest.approx([0, 0, 0], abs=0.1)
    if again.epsilon_exponents:
        assert list(again.epsilon_exponents.values()) == pytest.approx([0, 0, 0], abs=0.1)


@pytest.mark.parametrize("exponent", and_slow([], [0.5, 0.25]))
def test_blocks_that_do_not_divide_the_width_count_as_fractions(exponent):
    # Widths of 4.5, 8.5 and 16.5 blocks.
    widths = (36, 68, 132)
    inner = shampoo(exponent=exponent, block_size=BLOCK)
    probe = derive._probe(inner, 8, EXAMPLES, derive.INITIAL_STD)
    slopes, _ = derive._fit(widths, [probe(width, derive.LARGE) for width in widths])
    rule = rules.shampoo(exponent=exponent, block_size=BLOCK)
    want = exponents_of(rule.learning_rate, width=widths[0], ratio=widths[-1] / widths[0])
    assert [-slopes[role] for role in LAYERS] == pytest.approx(want, abs=0.1)


def has_no_rule(derived):
    assert derived.residuals["hidden"] > 0.1
    with pytest.raises(ValueError, match=r"hidden miss .* widths above the block size"):
        derived.rule  # noqa: B018
    assert "No rule: " in str(derived)


def test_what_begins_at_some_width_has_no_rule():
    kink = optax.stateless_with_tree_map(lambda g, _: (2 if g.shape[0] > 200 else 1) * g)
    has_no_rule(derive_rule(kink, widths=WIDTHS))


@pytest.mark.slow
def test_blocks_larger_than_some_widths_have_no_rule():
    has_no_rule(derive_rule(shampoo(block_size=64), widths=(32, 64, 128), examples=80))


def test_a_scale_shared_by_all_layers_is_noted():
    derived = derive_rule(optax.contrib.normalize(), widths=WIDTHS)
    assert "layers share a scale" in str(derived)
    assert "No rule" not in str(derived)
    # What the layers have in common says nothing of the differences between them.
    a, b, c = (derived.exponents[role] for role in LAYERS)
    assert (a - b, b - c) == pytest.approx((1, 1), abs=0.1)
    assert derived.epsilon_exponents is None
    assert not measured(OF_OPTAX["clipped adam"][0], widths=WIDE).notes


def test_layers_of_different_degrees_have_no_rule():
    mixed = optax.partition(
        {"adam": optax.scale_by_adam(), "sgd": optax.identity()},
        {"embedding": "adam", "hidden": "sgd", "readout": "adam"},
    )
    derived = derive_rule(mixed, widths=WIDTHS)
    assert list(derived.exponents.values()) == pytest.approx([0, 0, -1], abs=0.1)
    with pytest.raises(ValueError, match=r"degrees of homogeneity: embedding -?0.00, hidden 1.00"):
        derived.rule  # noqa: B018


def test_silence_has_no_rule():
    derived = derive_rule(optax.set_to_zero(), widths=WIDTHS)
    with pytest.raises(ValueError, match="zero or not finite after 8 steps"):
        derived.rule  # noqa: B018


def test_late_first_steps_are_waited_for():
    late = optax.MultiSteps(optax.scale_by_adam(), 4).gradient_transformation()
    assert list(derive_rule(late, widths=WIDTHS, steps=8).exponents.values()) == pytest.approx(
        ADAM, abs=0.1
    )


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.polyak_sgd(), "'value'"),
        (optax.contrib.sophia(1e-3), "obj_fn"),
        (mup_jax.scale_by_sophia_g(), "logits_fn"),
    ],
)
def test_what_needs_more_than_gradients_is_refused(inner, message):
    with pytest.raises(ValueError, match=f"gradients and parameters alone.*{message}.*bind it"):
        derive_rule(inner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (64, 128)}, "at least three"),
        ({"widths": (16, 64, 128)}, "all above 24"),
        ({"steps": 0}, "steps=0"),
        ({"examples": 0}, "examples=0"),
        ({"initial_std": {"head": lambda d_in: 1.0}}, "initial_std of head"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        derive_rule(optax.identity(), **options)


def test_examples_have_the_same_products_at_all_widths():
    def products(width):
        _, inputs, errors = derive._draw(width, 2, EXAMPLES, derive.INITIAL_STD)
        of_inputs = {
            role: x @ x.T / x.shape[1] for role, x in inputs.items() if role != "embedding"
        }
        of_errors = {role: e @ e.mT * e.shape[-1] for role, e in errors.items()}
        return of_inputs | {f"errors of {role}": e for role, e in of_errors.items()}

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-4), products(32), products(80)
    )


def test_the_default_is_precise_and_reads_well():
    derived = derive_rule(optax.scale_by_adam())
    assert list(derived.exponents.values()) == pytest.approx(ADAM, abs=0.05)
    assert re.search(r"\| embedding \| [+-]0.00 \| 0.0% \| -1.0\d \|", str(derived))
    assert "η ∝ depth^+0.00" in str(derived)


def test_the_committed_table_has_all_transformations():
    results = json.loads(pathlib.Path("results/derived_rules/results.json").read_text())["results"]
    tables = derived_rules.sections()
    assert {title: set(rows) for title, rows in results.items()} == {
        title: set(cases) for title, cases in tables.items()
    }
    assert {"scale_by_adam", "adopt", "dog"} <= set(tables["Optax"]) | set(tables["optax.contrib"])
    differing = [
        name
        for rows in results.values()
        for name, row in rows.items()
        if not row.get("agrees", True)
    ]
    # What the report explains.
    assert all(name.startswith("soap, whole, ") for name in differing), differing
