"""Rules as Markdown: for the parameters of a model, and of all optimizers (docs/rules.md)."""

import math
from collections.abc import Iterable, Mapping

import jax

from mup_jax.transfer import rules
from mup_jax.transfer.mup import IndependentScaling, weight_decay_factor
from mup_jax.transfer.rules import PowerLaw, Rule
from mup_jax.transfer.shapes import ParamShape, is_shape
from mup_jax.transforms.matrices import PyTree

# One rule for all parameters, or one for each role.
RuleByRole = Rule | Mapping[str, Rule]


def describe(
    shapes: PyTree, rule: RuleByRole, *, weight_decay_scaling: IndependentScaling = "1/width"
) -> str:
    """A table of what a rule does to each parameter, to read before a run.

        print(mup_jax.describe(shapes, mup_jax.rules.adam()))

    Args:
      shapes: from `infer_shapes`.
      rule: that of all parameters, or one for each role, as the optimizers that route parameters
        have it: `{"hidden": rules.muon(), "embedding": rules.adam(), ...}`.
      weight_decay_scaling: as in `add_independent_weight_decay`; decay that is scaled by the
        learning rate has the factor of η.

    Returns:
      Markdown, a line for each parameter: path, role, fans `d_in×d_out` in the base and here, and
      the factors of η, ε and λ. "–" stands for an ε that `mup` leaves alone, as the rule has none
      or it is not compared with the gradient, and for the λ of vectors, which do not decay.

    Raises:
      ValueError: `rule` is a mapping without one of the roles, or a rule does not fit a parameter.

    Example:
      >>> small, large = ({"w": jnp.ones((d, d)), "out": jnp.ones((d, 10))} for d in (32, 128))
      >>> shapes = mup_jax.infer_shapes(small, large)
      >>> page = mup_jax.describe(shapes, mup_jax.rules.muon())
      >>> "w" in page
      True
    """
    lines = []
    for path, shape in jax.tree.leaves_with_path(shapes, is_leaf=is_shape):
        its_rule = _rule_of(rule, shape)
        decay = weight_decay_factor(shape, weight_decay_scaling)
        line = (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            shape.role,
            f"{shape.base_d_in}×{shape.base_d_out}",
            f"{shape.d_in}×{shape.d_out}",
            f"{its_rule.learning_rate(shape):.4g}",
            f"{its_rule.epsilon(shape):.4g}" if its_rule.epsilon_degree else "–",
            "–" if shape.role == "vector" else f"{decay:.4g}",
        )
        lines.append(line)
    return _table(("parameter", "role", "base", "here", "η", "ε", "λ"), lines)


def _rule_of(rule: RuleByRole, shape: ParamShape) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if shape.role not in rule:
        raise ValueError(f"no rule for the role {shape.role!r}, only for {', '.join(rule)}")
    return rule[shape.role]


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    rows = [tuple(head), *map(tuple, lines)]
    rows.insert(1, ("---",) * len(rows[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# The page of all rules

_FORMULAS: dict[str, Rule] = {
    "SGD": rules.sgd(),
    "Adam(W)": rules.adam(),
    "ADOPT": rules.adopt(),
    "Lion": rules.lion(),
    "Sophia": rules.sophia(),
    "Sophia, variant gupta": rules.sophia(variant="gupta"),
    "LAMB": rules.lamb(),
    "LAMB, variant gupta": rules.lamb(variant="gupta"),
    "Muon": rules.muon(),
    "Muon, hidden matrices, variant rms_matching": rules.muon(variant="rms_matching"),
    "AdaMuon": rules.adamuon(),
    "Shampoo(¼, ¼)": rules.shampoo(exponent=0.25, relative_eps=False),
    "Shampoo(¼, ¼), variant gupta": rules.shampoo(
        exponent=0.25, relative_eps=False, block_size=None, variant="gupta"
    ),
    "Shampoo(½, ½) = Shampoo²": rules.shampoo(relative_eps=False),
    "Shampoo(½), one side": rules.shampoo(relative_eps=False, sides="in"),
    "SOAP": rules.soap(),
    "SOAP, in side only": rules.soap(sides="in"),
    "SOAP, out side only": rules.soap(sides="out"),
    "KL-Shampoo": rules.kl_shampoo(),
    "KL-SOAP": rules.kl_soap(),
    "NorMuon": rules.normuon(),
    "Adam#Q, of any direction Q": rules.grafted(rules.adam()),
    "Muon, spectrally normalized": rules.spectrally_normalized(rules.muon()),
    "Hyperball": rules.hyperball(),
    "Hyperball, variant measured": rules.hyperball(variant="measured"),
}

_WIDTH, _VOCABULARY, _BLOCK = 64, 96, 16
_HIDDEN = (_WIDTH, _WIDTH)
_WORKED_OUT: dict[str, RuleByRole] = {
    "SGD": rules.sgd(),
    "Adam": rules.adam(),
    "ADOPT": rules.adopt(),
    "Lion": rules.lion(),
    "Sophia": rules.sophia(),
    "AdaMuon": rules.adamuon(),
    "grafted Shampoo": rules.grafted(rules.adam()),
    "Shampoo(¼) with a fixed block size": rules.shampoo(exponent=0.25, block_size=_BLOCK),
    "SOAP with a fixed block size": rules.soap(block_size=_BLOCK),
    "Muon": rules.muon(),
    "Shampoo(¼) without blocks": rules.shampoo(exponent=0.25, block_size=None),
    "SOAP without blocks": rules.soap(block_size=None),
    "Muon-Adam": {
        "embedding": rules.adam(),
        "hidden": rules.muon(),
        "readout": rules.adam(),
    },
    "Shampoo² without blocks": rules.shampoo(block_size=None),
    "Shampoo² with a fixed block size": rules.shampoo(block_size=_BLOCK),
    "LAMB": rules.lamb(),
    "LAMB, variant gupta": rules.lamb(variant="gupta"),
    "spectral normalization": rules.spectrally_normalized(),
    "hyperball": rules.hyperball(),
}

_PAGE = """\
# The scaling rules

Written by `python -m mup_jax.transfer > docs/rules.md` from the objects of `mup_jax.rules`.

Tune the learning rate η and ε of an optimizer on a small base model; on a larger one multiply them
by these factors. Every quantity is a ratio to the base: `d_in` and `d_out` fan-in and fan-out
(those of an embedding are the vocabulary and the width), `L` the number of layers, 1 outside the
residual blocks, `n` the number of blocks of a matrix, and `b_in`, `b_out` their sides. A block at
the edge counts by its size, so that `n` is d/b and not rounded up. Vectors are matrices with a
fan-in of 1.

{formulas}
Without an optimizer's ε, gradients c·G give c^h times the updates of G. Shampoo's ε is the
absolute one; relative to the largest eigenvalue (`relative_eps`) it needs no rule. AdaMuon's is
added to the size of orthogonalized matrices, which no gradient changes: `mup` leaves it alone.
Sophia's γ is ∝ `d_out·L`, so that the same fraction of entries is clipped. An ε of grafting itself,
added to the norm of an update of Q, is ∝ √(d_out/d_in) over the η of Q. Hyperball's η is relative
to the norm of a matrix that begins at N(0, 1/d_in) or at zero, whatever the direction.

η for width k, depth N and a fixed vocabulary:

{worked_out}
## Depth

Residual branches are multiplied by L^(-α), with α = 1 in the tables ([CompleteP][C]). With another
`residual_exponent` of `infer_shapes`, `L` in them stands for L^α, and η has the factor L^(α-1)
besides: α = ½ is for branches of one matrix only ([Z]).

## Batch size and duration

`rules.budget_factor` is √(batch/duration), both in tokens and as ratios: η grows as the root of the
batch at a given number of tokens, and falls as the root of the tokens at a given batch ([M]).

## Without rules

`learning_rate_scaling` of a `mup_jax.Transfer` is `mup`, these rules. For comparison it can be
`constant`, which is standard parametrization, or `1/width`, Adam's rule for every optimizer; ε
follows `scale_epsilon`. Neither transfers.

## Weight decay

Decay is λ·W beside η·u, independent of η, with λ ∝ 1/width by default, which [Q] find best for
every optimizer; `weight_decay_scaling` of a `mup_jax.Transfer` can be `constant` as well ([G]).
The optimizers call it `independent_weight_decay`, and decay that η multiplies, as in `optax.adamw`,
`weight_decay`.

[Q]: https://arxiv.org/abs/2512.05620
[G]: https://arxiv.org/abs/2602.20937
[Y]: https://arxiv.org/abs/2310.17813
[C]: https://arxiv.org/abs/2505.01618
[Z]: https://arxiv.org/abs/2603.00541
[M]: https://arxiv.org/abs/2512.22382
"""


def rules_page() -> str:
    """docs/rules.md: the formulas of all rules, and what they come to, from the rules as data."""
    formulas = [_formulas(name, rule) for name, rule in _FORMULAS.items()]
    names: dict[tuple[str, ...], list[str]] = {}
    for name, rule in _WORKED_OUT.items():
        names.setdefault(_worked_out(rule), []).append(name)
    return _PAGE.format(
        formulas=_table(("optimizer", "η", "ε", "h", "source"), formulas),
        worked_out=_table(
            ("optimizer", "embedding", "hidden", "readout"),
            [("; ".join(group), *cells) for cells, group in names.items()],
        ),
    )


def _formulas(name: str, rule: Rule) -> tuple[str, ...]:
    learning_rate = _formula(rule, rule.learning_rate_law, rule.learning_rate_per_side)
    if rule.readout_learning_rate_law is not None:
        learning_rate += f"; readout {_formula(rule, rule.readout_learning_rate_law, PowerLaw())}"
    no_epsilon = rule.epsilon_degree == 0 and rule.epsilon_law == PowerLaw()
    epsilon = "–" if no_epsilon else _formula(rule, rule.epsilon_law, rule.epsilon_per_side)
    return name, learning_rate, epsilon, f"{rule.degree(*_HIDDEN):g}", rule.source


def _formula(rule: Rule, law: PowerLaw, per_side: PowerLaw) -> str:
    exponents = {"d_in": 0.0, "d_out": 0.0, "b_in": 0.0, "b_out": 0.0, "L": 0.0, "n": 0.0}
    sides = [
        side
        for side, on in zip(
            ("in", "out"), rule.blocking.preconditioned_sides(*_HIDDEN), strict=True
        )
        if on
    ]
    in_blocks = rule.blocking.block_size is not None
    for side, term in [(None, law), *((side, per_side) for side in sides)]:
        exponents["d_in"] += term.d_in
        exponents["d_out"] += term.d_out
        exponents["L"] += term.depth
        exponents["n"] += term.blocks if in_blocks else 0.0
        if side is not None:
            exponents[f"{'b' if in_blocks else 'd'}_{side}"] += term.block
    return f"`{_product(exponents)}`"


def _worked_out(rule: RuleByRole) -> tuple[str, ...]:
    """The factors of η of embedding, hidden matrix and readout, as formulas of k and N."""
    wide, deep = _shapes(4, 1), _shapes(1, 2)
    cells = []
    for role in wide:
        factor = lambda shape: _rule_of(rule, shape).learning_rate(shape)
        exponents = {"k": math.log(factor(wide[role]), 4), "N": math.log2(factor(deep[role]))}
        cells.append(f"`{_product(exponents)}`")
    return tuple(cells)


def _shapes(k: int, n: int) -> dict[str, ParamShape]:
    width = k * _WIDTH
    return {
        "embedding": ParamShape("embedding", _VOCABULARY, width, _VOCABULARY, _WIDTH),
        "hidden": ParamShape("hidden", width, width, _WIDTH, _WIDTH, n),
        "readout": ParamShape("readout", width, _VOCABULARY, _WIDTH, _VOCABULARY),
    }


def _product(exponents: Mapping[str, float]) -> str:
    """`{"L": 1, "d_out": 1, "d_in": -0.5}` -> "L·d_out/√d_in"."""

    def factors(sign: int) -> list[str]:
        rounded = {symbol: sign * round(power, 6) for symbol, power in exponents.items()}
        return [_power(symbol, power) for symbol, power in rounded.items() if power > 0]

    above, below = factors(1), factors(-1)
    numerator, denominator = "·".join(above) or "1", "·".join(below)
    if not below:
        return numerator
    return f"{numerator}/({denominator})" if len(below) > 1 else f"{numerator}/{denominator}"


def _power(symbol: str, exponent: float) -> str:
    return {0.5: f"√{symbol}", 1: symbol, 2: f"{symbol}²"}.get(exponent, f"{symbol}^{exponent:g}")
