"""Part (a): the properties of `checks`, on this platform's own paths."""

import functools
from collections.abc import Callable
from typing import Any

from experiments.accelerator import checks
from experiments.accelerator.report import number, words
from experiments.accelerator.session import Case, Part, Row
from mup_jax.training.metrics import finite_or_none

# Sides of matrices: of functions, and of optimizers.
_SIZES = {"full": (256, 64), "tiny": (24, 12)}
_BFLOAT16 = ("muon", "shampoo", "soap")


def part(scale: str) -> Part:
    """The part at the scale "full" or "tiny"."""
    large, small = _SIZES[scale]
    subjects = checks.subjects()
    found: dict[str, tuple[float, Callable[[], list[checks.Finding]]]] = {
        "products": (3, functools.partial(checks.check_products, large)),
        "orthogonalize, tuned": (5, functools.partial(checks.check_orthogonalize, "tuned", large)),
        "inverse_root": (8, functools.partial(checks.check_inverse_root, large)),
        "eigenbasis": (8, functools.partial(checks.check_eigenbasis, large)),
    }
    for name, subject in subjects.items():
        found[name] = 12, functools.partial(checks.check_transformation, subject, small)
    for name in _BFLOAT16:
        check = functools.partial(checks.check_bfloat16, subjects[name], small)
        found[f"{name}, bfloat16"] = 8, check
    for method in ("polar_express", "newton_schulz", "svd"):
        check = functools.partial(checks.check_orthogonalize, method, large)
        found[f"orthogonalize, {method}"] = 5, check
    return Part(
        "properties",
        "Properties on this platform's paths",
        share=0.15,
        cases=[
            Case(name, seconds, functools.partial(_row, check))
            for name, (seconds, check) in found.items()
        ],
        columns=[
            number("checks", "checks", "{:.0f}"),
            words("closest to its bound", "closest"),
            number("measured", "measured", "{:.1e}"),
            number("bound", "bound", "{:.1e}"),
        ],
    )


def _row(check: Callable[[], list[checks.Finding]], _: float) -> Row:
    findings = check()
    used: Callable[[checks.Finding], float] = lambda f: f.measured / f.bound if f.bound else 0.0
    closest = max(findings, key=used)
    row: dict[str, Any] = {
        "checks": len(findings),
        "closest": closest.name,
        "measured": finite_or_none(closest.measured),
        "bound": closest.bound,
        "findings": [
            finding._asdict() | {"measured": finite_or_none(finding.measured)}
            for finding in findings
        ],
    }
    broken = [f for f in findings if not f.passed]
    if broken:
        row["violations"] = [f"{f.name} {f.measured:.2e}, at most {f.bound:.2e}" for f in broken]
    return row
