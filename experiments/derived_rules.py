"""Measures the width rule of all transformations in Optax, optax.contrib and mup_jax.

    python -m experiments.derived_rules --output=results/derived_rules

writes report.md, a table of the measured rules beside the published ones, and results.json; about
five minutes on two CPU cores. Transformations of Optax are found by their signatures, so that none
is left out: those whose arguments are not among `ARGUMENTS`, or that need more than gradients and
parameters, are listed with the reason.
"""

import functools
import inspect
import json
import math
import pathlib
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import optax
from absl import app, flags

import mup_jax
from mup_jax import DerivedRule, ParamShape, Rule, rules
from mup_jax.transfer.derive import LAYERS, TOLERANCE, VOCABULARY

BLOCK = 8
EXAMPLES = 16
# Unblocked SOAP is measured at narrower widths, so that examples can be more than them.
NARROW, SOAP_EXAMPLES = [64, 128, 256], (4, 16, 64, 256, 1024)

# Where a transformation has no default.
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "clipping": 1e-2,
    "decay": 0.9,
    "eta": 1e-2,
    "gamma": 0.55,
    "max_delta": 1.0,
    "max_norm": 1.0,
    "threshold": 1.0,
    "step_size": 1.0,
    "step_size_fn": lambda count: 1.0,
    "max_backtracking_steps": 5,
    "max_linesearch_steps": 5,
    "l2_norm_clip": 1.0,
    "noise_multiplier": 0.0,
    "seed": 0,
    "max_consecutive_errors": 1,
    "sync_period": 2,
    "slow_step_size": 0.5,
    **dict.fromkeys(
        ("inner", "tx", "base_optimizer", "optimizer", "fast_optimizer"), optax.scale_by_adam()
    ),
    "adv_optimizer": optax.sgd(1e-2),
}
# Optax declares another return type for these, or none.
UNDECLARED = ("scale_by_factored_rms", "dog", "dowg", "hutchinson_estimator_diag_hessian")
# A key is asked for where noise is drawn; it has a default, with a warning.
KEYED = ("add_noise", "noisy_sgd")

PUBLISHED: dict[str, Rule] = {
    **dict.fromkeys(("sgd", "trace", "identity"), rules.sgd()),
    **dict.fromkeys(("adam", "adamw", "scale_by_adam"), rules.adam()),
    **dict.fromkeys(("adopt", "scale_by_adopt"), rules.adopt()),
    **dict.fromkeys(("lion", "scale_by_lion"), rules.lion()),
    "lamb": rules.lamb(),
    "scale_by_muon": rules.muon(),
}


@dataclass(frozen=True)
class Case:
    """What is measured: `make()`, with these options of `derive_rule`."""

    make: Callable[[], optax.GradientTransformation]
    published: Rule | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _is_transformation(name: str, member: Any) -> bool:
    if not inspect.isfunction(member) or name.startswith("_"):
        return False
    declared = str(inspect.signature(member).return_annotation)
    return "GradientTransformation" in declared or name in UNDECLARED


def _make(function: Callable[..., Any], name: str) -> optax.GradientTransformation:
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    missing = [argument for argument in needed if argument not in ARGUMENTS]
    if missing:
        raise ValueError(f"not called: what it does is up to its {' and '.join(missing)}")
    key = {"key": 0} if name in KEYED else {}
    return function(**{argument: ARGUMENTS[argument] for argument in needed}, **key)


def of_optax(module: types.ModuleType) -> dict[str, Case]:
    """All transformations of a module, by name."""
    return {
        name: Case(functools.partial(_make, member, name), PUBLISHED.get(name))
        for name, member in sorted(vars(module).items())
        if _is_transformation(name, member)
    }


def of_mup_jax() -> dict[str, Case]:
    """Our transformations, by what is special about them."""
    fresh: dict[str, Any] = {"precondition_frequency": 1}
    absolute = {"relative_eps": False}

    def shampoo(name: str, **options: Any) -> tuple[str, Case]:
        make = functools.partial(
            mup_jax.scale_by_shampoo,
            **fresh | options | ({"eps": 1e-8} if "relative_eps" in options else {}),
        )
        return f"shampoo {name}", Case(make, rules.shampoo(**options))

    def soap(block_size: int | None) -> optax.GradientTransformation:
        return mup_jax.scale_by_soap(block_size=block_size, **fresh)

    def normalized(
        direction: Callable[[], optax.GradientTransformation],
    ) -> Callable[[], optax.GradientTransformation]:
        return lambda: optax.chain(direction(), mup_jax.normalize_spectral_norm())

    blocked = functools.partial(mup_jax.scale_by_shampoo, block_size=BLOCK, **fresh)
    return dict(
        [
            ("muon", Case(mup_jax.scale_by_muon, rules.muon())),
            ("adamuon", Case(mup_jax.scale_by_adamuon, rules.adamuon())),
            shampoo("½, whole", block_size=None),
            shampoo("¼, whole", block_size=None, exponent=0.25),
            shampoo("½, whole, absolute ε", block_size=None, **absolute),
            shampoo(f"½, blocks of {BLOCK}", block_size=BLOCK),
            shampoo(f"¼, blocks of {BLOCK}", block_size=BLOCK, exponent=0.25),
            shampoo(f"½, blocks of {BLOCK}, absolute ε", block_size=BLOCK, **absolute),
            shampoo(
                f"¼, blocks of {BLOCK}, absolute ε", block_size=BLOCK, exponent=0.25, **absolute
            ),
            ("soap, whole", Case(lambda: soap(None), rules.soap(block_size=None))),
            (f"soap, blocks of {BLOCK}", Case(lambda: soap(BLOCK), rules.soap(block_size=BLOCK))),
            (
                "shampoo ½, blocks # adam",
                Case(
                    lambda: mup_jax.graft(optax.scale_by_adam(), blocked()),
                    rules.grafted(rules.adam()),
                ),
            ),
            (
                "muon, spectral norm",
                Case(normalized(mup_jax.scale_by_muon), rules.spectrally_normalized()),
            ),
            (
                "shampoo ½, blocks, spectral norm",
                Case(normalized(blocked), rules.spectrally_normalized()),
            ),
            ("sophia-g", Case(mup_jax.scale_by_sophia_g)),
        ]
    )


def of_soap() -> dict[str, Case]:
    """SOAP without blocks, by the rank of the gradients and the age of the bases."""

    def case(examples: int, frequency: int) -> tuple[str, Case]:
        make = functools.partial(
            mup_jax.scale_by_soap, block_size=None, precondition_frequency=frequency
        )
        options = {"widths": NARROW, "examples": examples}
        name = f"soap, whole, {examples} examples, basis every {frequency}"
        return name, Case(make, rules.soap(block_size=None), options)

    settings = [*((examples, 1) for examples in SOAP_EXAMPLES), (16, 10), (1024, 10)]
    return dict(case(*setting) for setting in settings)


def sections() -> dict[str, dict[str, Case]]:
    """All cases, by the heading of their table."""
    return {
        "Optax": of_optax(optax),
        "optax.contrib": of_optax(optax.contrib),
        "mup_jax": of_mup_jax(),
        "SOAP without blocks": of_soap(),
    }


def published_exponents(rule: Rule, widths: list[int]) -> dict[str, float]:
    """Of η between the smallest and the largest width."""
    first, last = widths[0], widths[-1]
    shapes = {
        "embedding": ParamShape("embedding", VOCABULARY, last, VOCABULARY, first),
        "hidden": ParamShape("hidden", last, last, first, first),
        "readout": ParamShape("readout", last, VOCABULARY, first, VOCABULARY),
    }
    factors = {role: rule.learning_rate(shape) for role, shape in shapes.items()}
    return {role: math.log(factor, last / first) for role, factor in factors.items()}


def measure(case: Case, widths: list[int]) -> dict[str, Any]:
    """A row of the table: what was measured, or why nothing was."""
    start = time.perf_counter()
    options: dict[str, Any] = {"widths": widths, "examples": EXAMPLES, **case.options}
    try:
        derived = mup_jax.derive_rule(case.make(), **options)
    except ValueError as error:
        return {"reason": str(error).split(". If it needs more")[0]}
    row: dict[str, Any] = {
        "exponents": derived.exponents,
        "homogeneity": derived.homogeneity,
        "epsilon_exponents": derived.epsilon_exponents,
        "residuals": derived.residuals,
        "problems": derived.problems,
        "notes": derived.notes,
        "seconds": time.perf_counter() - start,
    }
    if case.published:
        row["published"] = published_exponents(case.published, options["widths"])
        row["agrees"] = _agrees(derived, case.published, row["published"])
    return row


def _agrees(derived: DerivedRule, rule: Rule, published: dict[str, float]) -> bool:
    distances = [abs(derived.exponents[role] - published[role]) for role in LAYERS]
    return max(*distances, abs(derived.homogeneity - rule.homogeneity)) < TOLERANCE


def _numbers(exponents: dict[str, float] | None) -> str:
    if exponents is None:
        return "–"
    return ", ".join(f"{exponents[role]:+.2f}".replace("-0.00", "+0.00") for role in LAYERS)


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The rows that have a law, as Markdown."""
    lines = [
        "| | η ∝ width^ | h | ε ∝ width^ | off by | published | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "reason" in row or row["problems"]:
            continue
        verdict = {True: "agrees", False: "**differs**"}[row["agrees"]] if "agrees" in row else ""
        shared = " *" if any("share a scale" in note for note in row["notes"]) else ""
        cells = [
            f"{name}{shared}",
            _numbers(row["exponents"]),
            f"{row['homogeneity']:+.2f}".replace("-0.00", "+0.00"),
            _numbers(row["epsilon_exponents"]),
            f"{max(row['residuals'].values()):.1%}",
            _numbers(row.get("published")),
            verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def without_law(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The others, with the reasons."""
    reasons = {
        name: row.get("reason") or "; ".join(row["problems"])
        for name, row in rows.items()
        if "reason" in row or row["problems"]
    }
    return [f"- {name}: {' '.join(reason.split())}" for name, reason in reasons.items()]


NOTES = f"""\
Exponents are those of embedding, hidden and readout; a vocabulary of {VOCABULARY}, gradients of
{EXAMPLES} examples unless a name says otherwise. h is the degree of homogeneity: η ∝ depth^h in
residual blocks. ε is in units of the gradient; Shampoo's, in units of its square, has twice the
exponents. "Off by" is the worst residual of the three fits. Published rules are those of
`mup_jax.rules`; they agree where each exponent and h are within {TOLERANCE}.

\\* All layers share a scale: the rule holds for as long as the same layer dominates it.

Parameters stay where they are while a rule is measured. What grows as they move away from where
they began (prodigy, dog, dowg, dadapt_adamw, mechanize) is measured at its beginning, where that
scale is one constant; L-BFGS, which looks back on the way it went, divides by zero. Optax's
complete `muon` has Jordan's √max(1, d_out / d_in), here with a vocabulary below all widths."""

SOAP_NOTES = """\
Without blocks, SOAP's law depends on the rank of the gradients. The update is about ±1 wherever the
rotated gradient is not zero. Where the rank is far below the width and the bases are fresh, that is
a corner of the matrix which does not grow, and the published (½, 0, -½) holds. Otherwise the update
is dense, with signs that have nothing to do with each other: its spectral norm is ∝ √width, for
which the law would be (0, -½, -½). So it becomes where examples are several times the width, and,
with few examples, in an embedding whose basis is some steps old: the little of the gradient that
leaks out of the corner is divided by its own size. In between, where the rank is near some of the
widths, there is no power law. Neither is Adam's (0, -1, -1), which holds with a fixed block
size."""


def report(results: dict[str, dict[str, dict[str, Any]]], command: str) -> str:
    lines = ["# Measured rules", "", f"`{command}`", "", NOTES]
    for title, rows in results.items():
        if not rows:
            continue
        lines += ["", f"## {title}", ""]
        if title == "SOAP without blocks":
            lines += [SOAP_NOTES, ""]
        lines += table(rows)
        others = without_law(rows)
        if others:
            lines += ["", "No rule:", "", *others]
    return "\n".join(lines) + "\n"


def define_flags() -> None:
    """Not where the module is imported: tests import other commands with flags of these names."""
    flags.DEFINE_list("widths", ["128", "256", "512"], "Widths, at least three.")
    flags.DEFINE_list("only", [], "Names of transformations, as in the report; or all.")
    flags.DEFINE_string("output", "", "Folder for report.md and results.json.")


def main(_: list[str]) -> None:
    given = flags.FLAGS
    chosen = sections()
    names = {name for cases in chosen.values() for name in cases}
    unknown = set(given.only) - names
    if unknown:
        raise app.UsageError(f"--only={','.join(given.only)}: choose from {', '.join(names)}")
    widths = [int(width) for width in given.widths]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for title, cases in chosen.items():
        results[title] = {}
        for name, case in cases.items():
            if not given.only or name in given.only:
                results[title][name] = row = measure(case, widths)
                print(f"{name}: {row.get('reason') or _numbers(row['exponents'])}", flush=True)
    command = f"python -m experiments.derived_rules --widths={','.join(given.widths)}"
    text = report(results, command)
    print(text)
    if given.output:
        folder = pathlib.Path(given.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(text)
        result = {
            "command": command,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "results": results,
        }
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
