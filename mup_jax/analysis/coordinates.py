"""The results of coordinate checks, for people: a page, a sentence, and rows of a table.

Results have "vary" ("width" or "depth"), "sizes", "steps", "tolerance", "checks", and "device",
"versions" and "corpus" as in a run's record. Each check has "optimizer", "parametrization" ("mup"
or "sp"), "passed", "expected_to_pass", "activation_slopes" (name -> quantity -> exponent) and
"activations" (name -> quantity -> values `(sizes, seeds)`); None is a number that is not finite.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mup_jax.analysis.report import table

PARAMETRIZATIONS = {"mup": "µP", "sp": "SP"}
# What the first paper's check looks at, and the logits; all other activations count as well.
FEATURES, LOGITS = "last block", "logits"


def title(check: Mapping[str, Any]) -> str:
    """Optimizer and parametrization."""
    return f"{check['optimizer']}, {PARAMETRIZATIONS[check['parametrization']]}"


def verdict(check: Mapping[str, Any]) -> str:
    """Passes or fails, and in µP whether that surprises."""
    result = "passes" if check["passed"] else "fails"
    if check["parametrization"] == "sp":
        return result
    if check["passed"] != check["expected_to_pass"]:
        return f"{result} unexpectedly"
    return result if check["passed"] else f"{result} as expected"


def step_slope(check: Mapping[str, Any], name: str) -> float:
    """The exponent of the size in an activation's change in one step; NaN where it has none."""
    return float(np.float64(check["activation_slopes"][name]["step_change"]))


def steepest(check: Mapping[str, Any]) -> tuple[str, float]:
    """The activation whose change in one step has the largest |exponent|, and the exponent."""
    slopes = {name: step_slope(check, name) for name in check["activation_slopes"]}
    # NaN is worse than any number.
    name = max(slopes, key=lambda name: np.nan_to_num(abs(slopes[name]), nan=np.inf))
    return name, slopes[name]


def feature_changes(check: Mapping[str, Any]) -> np.ndarray:
    """Change of the last block's output in one step at each size, over that at the smallest.

    Geometric mean over seeds; NaN where it is not finite or zero.
    """
    values = np.array(check["activations"][FEATURES]["step_change"], np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values).mean(axis=1)
        changes = np.exp(logs - logs[0])
    return np.where(np.isfinite(logs), changes, np.nan)


def finding(results: Mapping[str, Any]) -> str:
    """Says whose layers move equally far at every size, and whose do not."""
    sizes = results["sizes"]
    span = f"{sizes[-1] / sizes[0]:g}x {results['vary']}"
    in_mup, in_sp = (
        [check for check in results["checks"] if check["parametrization"] == name]
        for name in PARAMETRIZATIONS
    )
    passing = [check for check in in_mup if check["passed"]]
    clauses = []
    if passing:
        most = max(abs(steepest(check)[1]) for check in passing)
        clauses.append(
            f"{_names(passing)} {'moves' if len(passing) == 1 else 'move'} every layer equally far "
            f"in a step (|exponent| at most {most:.2f})"
        )
    for check in in_mup:
        if not check["passed"]:
            name, slope = steepest(check)
            clauses.append(f"{check['optimizer']} {verdict(check)} ({slope:+.2f}, {name})")
    failing = sum(not check["passed"] for check in in_sp)
    return (
        f"Over {span}, in µP {'; '.join(clauses)}. In SP {failing} of {len(in_sp)} optimizers fail."
    )


def _names(checks: Sequence[Mapping[str, Any]]) -> str:
    *others, last = (check["optimizer"] for check in checks)
    return f"{', '.join(others)} and {last}" if others else last


def markdown(results: Mapping[str, Any], figure: str, details: Sequence[str], command: str) -> str:
    """The page report.md.

    Args:
      results: see above.
      figure: path of the image relative to the page.
      details: sections that follow the table.
      command: what gives these results.
    """
    vary, sizes = results["vary"], results["sizes"]
    sections = [
        f"# Does every layer move equally far in a step, whatever the {vary}?",
        f"**{finding(results)}**",
        f"![Coordinate check]({figure})",
        f"*Change of the last block's output in step {results['steps']}, relative to the smallest "
        f"{vary}. Shaded: exponents within ±{results['tolerance']:g}. Dashed: expected to fail.*",
        f"Exponent of the {vary} in the change of an activation in one step: of the last block's "
        f"output, of the logits, and of the one with the steepest. The ratio is that of the last "
        f"block's change at {vary} {sizes[-1]} to that at {sizes[0]}.",
        table(
            ["optimizer", "", "last block", "logits", "steepest", "ratio", "verdict"],
            [_row(check) for check in results["checks"]],
        ),
        f"    {command}",
        f"{results['device']}, jax {results['versions']['jax']}; text "
        f"{results['corpus']['source']} ({results['corpus']['fingerprint']}); settings and the "
        "values at every size are in results.json.",
        "## Every quantity",
        *details,
    ]
    return "\n\n".join(sections) + "\n"


def _row(check: Mapping[str, Any]) -> list[str]:
    name, slope = steepest(check)
    return [
        check["optimizer"],
        PARAMETRIZATIONS[check["parametrization"]],
        f"{step_slope(check, FEATURES):+.2f}",
        f"{step_slope(check, LOGITS):+.2f}",
        f"{slope:+.2f} ({name})",
        f"{feature_changes(check)[-1]:.2f}",
        verdict(check),
    ]
