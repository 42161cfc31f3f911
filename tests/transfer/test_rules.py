"""The rules against the table worked out by hand, and against measured updates."""

import functools
import math
import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import mup_jax
from mup_jax import ParamShape, rules
from mup_jax.transfer.tables import rules_page

V, D, BLOCK = 96, 64, 16
ROLES = ("embedding", "hidden", "readout")


def shapes_of(k, n=1, width=D, vocabulary=V):
    wide = round(width * k)
    return {
        "embedding": ParamShape("embedding", vocabulary, wide, vocabulary, width),
        "hidden": ParamShape("hidden", wide, wide, width, width, n),
        "readout": ParamShape("readout", wide, vocabulary, width, vocabulary),
        "vector": ParamShape("vector", 1, wide, 1, width, n),
    }


adam_table = lambda k, n: (1, 1 / k, 1 / k)
muon_table = lambda k, n: (math.sqrt(k), 1, 1 / math.sqrt(k))
SHAMPOO_4, SHAMPOO_2 = {"exponent": 0.25}, {"exponent": 0.5}
one_table = lambda k, n: (1, 1, 1)
LEARNING_RATES = {
    "sgd": (rules.sgd(), lambda k, n: (k, n, 1 / k)),
    "adam": (rules.adam(), adam_table),
    "adopt": (rules.adopt(), adam_table),
    "lion": (rules.lion(), adam_table),
    "sophia": (rules.sophia(), adam_table),
    "lamb": (rules.lamb(), lambda k, n: (1, 1 / math.sqrt(k), 1)),
    "lamb of [G]": (rules.lamb(variant="gupta"), one_table),
    "adamuon": (rules.adamuon(), adam_table),
    "spectral": (rules.spectrally_normalized(), one_table),
    "spectral shampoo ½, blocks": (
        rules.spectrally_normalized(rules.shampoo(block_size=BLOCK)),
        one_table,
    ),
    "spectral soap": (rules.spectrally_normalized(rules.soap(block_size=None)), one_table),
    "spectral lamb": (rules.spectrally_normalized(rules.lamb()), one_table),
    "grafted shampoo": (rules.grafted(rules.adam()), adam_table),
    "hyperball": (rules.hyperball(), lambda k, n: (1, 1, 1 / math.sqrt(k))),
    "hyperball, measured": (
        rules.hyperball(variant="measured"),
        lambda k, n: (1, 1 / math.sqrt(k), 1 / math.sqrt(k)),
    ),
    "muon": (rules.muon(), muon_table),
    "normuon": (rules.normuon(), muon_table),
    "kl_shampoo, blocks": (rules.kl_shampoo(block_size=BLOCK), adam_table),
    "kl_soap, blocks": (rules.kl_soap(block_size=BLOCK), adam_table),
    "shampoo ¼": (rules.shampoo(block_size=None, **SHAMPOO_4), muon_table),
    "shampoo ¼, blocks": (rules.shampoo(block_size=BLOCK, **SHAMPOO_4), adam_table),
    "shampoo ½": (rules.shampoo(block_size=None, **SHAMPOO_2), lambda k, n: (1, 1 / n, 1)),
    "shampoo ½, blocks": (
        rules.shampoo(block_size=BLOCK, **SHAMPOO_2),
        lambda k, n: (1 / k, 1 / (k * k * n), 1 / k),
    ),
    "soap": (rules.soap(block_size=None), muon_table),
    "soap, blocks": (rules.soap(block_size=BLOCK), adam_table),
}
# Of an absolute ε, from the same section: as functions of the role's (d_in, d_out) ratios and N.
EPSILONS = {
    "sgd": lambda i, o, n: 1,
    "adam": lambda i, o, n: 1 / (n * o),
    "adopt": lambda i, o, n: 1 / (n * o),
    "lion": lambda i, o, n: 1,
    "sophia": lambda i, o, n: 1 / (n * o),
    "lamb": lambda i, o, n: 1 / (n * o),
    "adamuon": lambda i, o, n: 1 / math.sqrt(i * o),
    "spectral": lambda i, o, n: 1,
    "hyperball": lambda i, o, n: 1,
    "spectral soap": lambda i, o, n: math.sqrt(i * o) / (n * o),
    "grafted shampoo": lambda i, o, n: 1 / (n * o),
    "muon": lambda i, o, n: math.sqrt(i / o) / n,
    "normuon": lambda i, o, n: math.sqrt(i / o) / n,
    "kl_shampoo, blocks": lambda i, o, n: 1,
    "kl_soap, blocks": lambda i, o, n: 1 / (n * o),
    "soap": lambda i, o, n: math.sqrt(i * o) / (n * o),
    "soap, blocks": lambda i, o, n: 1 / (n * o),
}


@pytest.mark.parametrize(("k", "n"), [(4, 2), (0.5, 1), (2.5, 3)])
@pytest.mark.parametrize("name", LEARNING_RATES)
def test_learning_rates_are_those_of_the_table(name, k, n):
    rule, table = LEARNING_RATES[name]
    shapes = shapes_of(k, n)
    got = [rule.learning_rate(shapes[role]) for role in ROLES]
    assert got == pytest.approx(table(k, n))


@pytest.mark.parametrize("name", EPSILONS)
def test_epsilons(name):
    rule, law = LEARNING_RATES[name][0], EPSILONS[name]
    shapes = shapes_of(4, 2)
    assert rule.epsilon(shapes["embedding"]) == pytest.approx(law(1, 4, 1))
    assert rule.epsilon(shapes["hidden"]) == pytest.approx(law(4, 4, 2))
    assert rule.epsilon(shapes["readout"]) == pytest.approx(law(4, 1, 1))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        # d_in / (L² d_out n_blk) for embedding, hidden and readout
        ({"block_size": None}, (1 / 4, 1 / 4, 4)),
        ({"block_size": BLOCK}, (1 / 16, 1 / 64, 1)),
        ({"block_size": BLOCK, "relative_eps": True}, (1, 1, 1)),
    ],
)
def test_epsilon_of_shampoo(options, want):
    rule = rules.shampoo(**{"relative_eps": False} | options)
    shapes = shapes_of(4, 2)
    assert [rule.epsilon(shapes[role]) for role in ROLES] == pytest.approx(want)


def test_one_sided_rules():
    # A vocabulary beyond the limit: the one side left has E = e, and blocks along it only.
    limits = {"max_preconditioner_dim": 1000}
    shapes = shapes_of(4, 2, vocabulary=5000)
    rule = rules.shampoo(block_size=BLOCK, **limits)
    # (d_out/d_in)^½ · n_blk^-½
    assert rule.learning_rate(shapes["embedding"]) == pytest.approx(math.sqrt(4) / math.sqrt(4))
    assert rule.learning_rate(shapes["readout"]) == pytest.approx(math.sqrt(1 / 4) / math.sqrt(4))
    whole = rules.shampoo(block_size=None, **limits)
    assert whole.learning_rate(shapes["embedding"]) == pytest.approx(2)
    assert whole.learning_rate(shapes["readout"]) == pytest.approx(1 / 2)
    # (d_out/d_in)^(1-e) · L^(1-2e) with e = ¼
    quarter = rules.shampoo(exponent=0.25, block_size=None, sides="in")
    assert quarter.learning_rate(shapes_of(4, 2)["hidden"]) == pytest.approx(math.sqrt(2))
    soap = rules.soap(block_size=None, **limits)
    assert soap.learning_rate(shapes["embedding"]) == pytest.approx(2)
    assert soap.learning_rate(shapes["readout"]) == pytest.approx(math.sqrt(4) / 4)
    out = rules.soap(block_size=None, sides="out")
    assert out.learning_rate(shapes_of(4)["embedding"]) == pytest.approx(2)
    assert out.learning_rate(shapes_of(4)["readout"]) == pytest.approx(1 / 4)


def test_blocks_count_as_fractions_where_they_do_not_divide():
    # 100 to 150 of width in blocks of 64: not two blocks to three, but 1.5 times as many.
    shape = ParamShape("hidden", 150, 150, 100, 100)
    assert rules.shampoo(block_size=64).learning_rate(shape) == pytest.approx(1.5**-2)
    # Up to the block size there are no blocks.
    below = ParamShape("hidden", 64, 64, 32, 32)
    assert rules.shampoo(block_size=64).learning_rate(below) == pytest.approx(1)
    across = ParamShape("hidden", 128, 128, 32, 32)
    assert rules.shampoo(block_size=64).learning_rate(across) == pytest.approx(1 / 4)
    # SOAP's blocks grow along with the matrix until they are full.
    assert rules.soap(block_size=64).learning_rate(below) == pytest.approx(1)
    assert rules.soap(block_size=64).learning_rate(across) == pytest.approx(2 / 4)


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_at_the_base_everything_is_one(name):
    rule = LEARNING_RATES[name][0]
    for shape in shapes_of(1).values():
        factors = (rule.learning_rate, rule.epsilon, rule.gradient_scale, rule.update_scale)
        assert [factor(shape) for factor in factors] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_factors_from_rung_to_rung_multiply(name):
    # What lies between base and target must not matter.
    rule = LEARNING_RATES[name][0]
    for role in ("embedding", "hidden", "readout"):
        through = rule.learning_rate(shapes_of(2)[role]) * rule.learning_rate(
            shapes_of(3, width=2 * D)[role]
        )
        assert rule.learning_rate(shapes_of(6)[role]) == pytest.approx(through)


@pytest.mark.parametrize("name", ["adam", "adopt", "sophia", "lamb"])
def test_vectors_of_the_adam_family_keep_their_learning_rate(name):
    vector, rule = shapes_of(4, 2)["vector"], LEARNING_RATES[name][0]
    assert rule.learning_rate(vector) == 1
    assert rule.epsilon(vector) == pytest.approx(1 / 8)


HOMOGENEITIES = {"sgd": 1, "shampoo ½": -1, "shampoo ½, blocks": -1}


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_homogeneity(name):
    rule = LEARNING_RATES[name][0]
    assert rule.homogeneity == HOMOGENEITIES.get(name, 0)
    for shape in shapes_of(4, 2).values():
        degree = rule.homogeneity
        c = rule.gradient_scale(shape)
        assert rule.update_scale(shape) == pytest.approx(rule.learning_rate(shape) * c**-degree)


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_exponents_of_depth_follow_from_the_homogeneity(name):
    # Within residual blocks gradients are ∝ 1/L.
    rule = LEARNING_RATES[name][0]
    depth = rule.learning_rate_law.depth + 2 * rule.learning_rate_per_side.depth
    assert depth == rule.homogeneity
    assert rule.learning_rate_per_side.depth == rule.homogeneity_per_side
    assert rule.epsilon_law.depth == -rule.epsilon_degree


def test_constant_epsilon():
    for rule, _ in LEARNING_RATES.values():
        constant = rule.with_constant_epsilon()
        for shape in shapes_of(4, 2).values():
            assert constant.learning_rate(shape) == rule.learning_rate(shape)
            assert constant.epsilon(shape) == constant.gradient_scale(shape) == 1


def test_variants_of_gupta_et_al():
    shapes = shapes_of(4, 2)
    shampoo = rules.shampoo(exponent=0.25, block_size=None, relative_eps=False, variant="gupta")
    assert [shampoo.epsilon(shape) for shape in shapes.values()] == [1] * 4
    assert [shampoo.learning_rate(shapes[role]) for role in ROLES] == pytest.approx([2, 1, 0.5])
    sophia = rules.sophia(variant="gupta")
    assert sophia.epsilon(shapes["hidden"]) == 1 / 4
    assert sophia.learning_rate(shapes["hidden"]) == 1 / 4


@pytest.mark.parametrize("rule", [rules.lamb, rules.sophia, rules.shampoo, rules.hyperball])
def test_unknown_variants_are_refused(rule):
    with pytest.raises(ValueError, match=r"variant='gutpa': choose .* or '(gupta|measured)'"):
        rule(variant="gutpa")


def test_a_limit_between_base_and_target_is_refused():
    shape = ParamShape("hidden", 200, 200, 100, 100)
    rule = rules.soap(max_preconditioner_dim=150)
    for factor in (rule.learning_rate, rule.epsilon, rule.update_scale):
        with pytest.raises(ValueError, match=r"max_preconditioner_dim=150 .*\(100, 100\)"):
            factor(shape)


def test_budget_factor():
    assert rules.budget_factor() == 1
    assert rules.budget_factor(batch_ratio=4) == 2
    assert rules.budget_factor(duration_ratio=4) == 1 / 2
    assert rules.budget_factor(batch_ratio=4, duration_ratio=4) == 1
    with pytest.raises(ValueError, match="duration_ratio=0"):
        rules.budget_factor(duration_ratio=0)


# The documentation

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
# η for width k and depth N; names are parts of a row's first cell.
WORKED_OUT = {
    ("Adam", "grafted Shampoo", "AdaMuon", "SOAP with a fixed block size"): ("1", "1/k", "1/k"),
    ("Shampoo(¼) with a fixed block size",): ("1", "1/k", "1/k"),
    ("Muon", "Shampoo(¼) without blocks", "SOAP without blocks"): ("√k", "1", "1/√k"),
    ("Muon-Adam",): ("1", "1", "1/k"),
    ("Shampoo² without blocks",): ("1", "1/N", "1"),
    ("Shampoo² with a fixed block size",): ("1/k", "1/(k²·N)", "1/k"),
    ("spectral normalization",): ("1", "1", "1"),
    ("hyperball",): ("1", "1", "1/√k"),
}


def test_the_documentation_is_up_to_date(capsys):
    runpy.run_module("mup_jax.transfer", run_name="__main__")
    assert capsys.readouterr().out == rules_page() == PAGE.read_text(encoding="utf-8"), (
        "write it anew: python -m mup_jax.transfer > docs/rules.md"
    )


def rows(columns):
    """Name -> other cells, from the table of so many columns."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells if len(row) == columns}


@pytest.mark.parametrize("names", WORKED_OUT)
def test_the_documentation_has_the_factors_worked_out_by_hand(names):
    found = {name: row for group, row in rows(columns=4).items() for name in group.split("; ")}
    want = [f"`{cell}`" for cell in WORKED_OUT[names]]
    assert {name: found[name] for name in names} == dict.fromkeys(names, want)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("SGD", "`d_out·L/d_in` – 1 [G], [Y]"),
        ("Adam(W)", "`1/d_in` `1/(d_out·L)` 0 [Q], [G]"),
        ("Muon", "`√d_out/√d_in` `√d_in/(√d_out·L)` 0 [Q], [G]"),
        ("Hyperball", "`1`; readout `1/√d_in` – 0 Wen et al., measured"),
        ("LAMB", "`1/√d_in`; readout `1` `1/(d_out·L)` 0 measured"),
        ("Shampoo(½, ½) = Shampoo²", "`1/(L·n)` `d_in/(d_out·L²·n)` -1 [Q]"),
        ("Shampoo(½), one side", "`√d_out/(√d_in·√n)` `d_in/(d_out·L²·n)` 0 [Q]"),
        ("SOAP", "`√b_in·√b_out/d_in` `√b_in·√b_out/(d_out·L)` 0 [Q]"),
        ("SOAP, out side only", "`√b_out/d_in` `√b_out/(d_out·L)` 0 [Q]"),
    ],
)
def test_formulas_of_the_documentation(name, row):
    assert " ".join(rows(columns=5)[name]) == row


def test_epsilon_of_adamuon_is_out_of_the_gradient_s_reach():
    assert {rules.adamuon().gradient_scale(shape) for shape in shapes_of(4, 2).values()} == {1}


@pytest.mark.parametrize(
    ("exponent", "sides", "want"), [(0.5, "both", -1), (0.25, "both", 0), (0.5, "in", 0)]
)
def test_update_scale_takes_the_homogeneity_out(exponent, sides, want):
    rule = rules.shampoo(exponent=exponent, sides=sides, block_size=None, relative_eps=False)
    shape = shapes_of(4, 2)["readout"]
    c = rule.gradient_scale(shape)
    assert c == pytest.approx(rule.epsilon(shape) ** -0.5)
    assert rule.update_scale(shape) == pytest.approx(rule.learning_rate(shape) * c**-want)


# The condition behind all rules, measured: an update changes a layer's output by as much at every
# width. Widths are no multiples of the block size, and there are more examples than block rows.

EXAMPLES, STEPS, SMALL_BLOCK = 16, 2, 8
# Of examples, whose chance is then less than half of what is allowed.
DRAWS = 4
shampoo = functools.partial(mup_jax.scale_by_shampoo, precondition_frequency=1)
soap = functools.partial(mup_jax.scale_by_soap, precondition_frequency=1)
muon = functools.partial(mup_jax.scale_by_muon, orthogonalizer="svd")
MEASURED = {
    "sgd": (optax.trace(0.9), rules.sgd()),
    "adam": (optax.scale_by_adam(0.9, 0.98, eps=1e-6), rules.adam()),
    "adopt": (optax.contrib.scale_by_adopt(), rules.adopt()),
    "lion": (optax.scale_by_lion(), rules.lion()),
    "lamb": (optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()), rules.lamb()),
    "muon": (muon(), rules.muon()),
    "adamuon": (mup_jax.scale_by_adamuon(orthogonalizer="svd"), rules.adamuon()),
    "spectral muon": (
        optax.chain(muon(), mup_jax.normalize_spectral_norm()),
        rules.spectrally_normalized(rules.muon()),
    ),
    "shampoo ½": (shampoo(block_size=None), rules.shampoo(block_size=None)),
    "shampoo ½, blocks": (shampoo(block_size=SMALL_BLOCK), rules.shampoo(block_size=SMALL_BLOCK)),
    "shampoo ¼, blocks": (
        shampoo(exponent=0.25, block_size=SMALL_BLOCK),
        rules.shampoo(exponent=0.25, block_size=SMALL_BLOCK),
    ),
    # Between what gradients say and what rounding leaves in directions that no example has, of
    # which a smaller ε would make ±1, and each processor others.
    "soap": (soap(eps=1e-6, block_size=None), rules.soap(block_size=None)),
    "soap, blocks": (
        soap(eps=1e-20, block_size=SMALL_BLOCK),
        rules.soap(block_size=SMALL_BLOCK),
    ),
}


def parameters_of(rng, shape):
    """At the size of the initialisation: trust ratios see it."""
    std = {"embedding": 0.1, "hidden": shape.d_in**-0.5, "readout": 1 / shape.d_in}
    return np.float32(std[shape.role] * rng.normal(size=(shape.d_in, shape.d_out)))


def examples_of(rng, shape):
    """Inputs x with entries Θ(1), and signals δ with entries Θ(1/d_out)."""
    if shape.role == "embedding":
        x = np.eye(shape.d_in)[rng.permutation(shape.d_in)[:EXAMPLES]]
    else:
        x = rng.normal(size=(EXAMPLES, shape.d_in))
    return x, rng.normal(size=(STEPS, EXAMPLES, shape.d_out)) / shape.d_out


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "blocks" in name else []) for name in MEASURED],
)
def test_measured_updates_are_flat_in_width(name):
    inner, rule = MEASURED[name]
    changes = {role: [] for role in ROLES}
    # Factorizations of whole matrices are slow.
    whole = ("muon", "adamuon", "spectral muon", "shampoo ½", "soap")
    widths = (64, 256) if name in whole else (100, 388) if "blocks" in name else (100, 900)
    for width in widths:
        rng = np.random.default_rng(width)
        shapes = shapes_of(width / widths[0], width=widths[0])
        shapes = {role: shapes[role] for role in ROLES}
        transformation = mup_jax.mup(inner, rule, shapes)
        update = jax.jit(transformation.update)
        squares = {role: [] for role in ROLES}
        for _ in range(DRAWS):
            examples = {role: examples_of(rng, shape) for role, shape in shapes.items()}
            params = {role: parameters_of(rng, shape) for role, shape in shapes.items()}
            gradients = [
                {
                    role: np.float32(x.T @ delta[step] / EXAMPLES)
                    for role, (x, delta) in examples.items()
                }
                for step in range(STEPS)
            ]
            state = transformation.init(gradients[0])
            for gradient in gradients:
                u, state = update(gradient, state, params)
            for role, (x, _) in examples.items():
                squares[role].append(np.mean(np.square(x @ np.asarray(u[role]))))
        for role in ROLES:
            changes[role].append(np.sqrt(np.mean(squares[role])))
    slopes = {role: np.polyfit(np.log(widths), np.log(c), 1)[0] for role, c in changes.items()}
    assert max(map(abs, slopes.values())) < 0.1, slopes
