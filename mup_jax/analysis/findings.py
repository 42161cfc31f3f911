"""What a ladder says, in sentences: its finding, the two claims, and what would change them."""

from collections.abc import Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]

# A difference of multipliers that nobody would want to miss, for the power analysis.
_RATIO = 1.1


def finding(report: Report) -> str:
    """Says who needs less compute than the baseline for the same loss, and at which rungs.

    An optimizer counts as better at a rung if its whole interval lies above 1, or, where the seeds
    give no interval, its point estimate; then a second sentence says so.
    """
    multipliers = {name: x["compute_multiplier"] for name, x in _in(report, "mup")}
    multipliers = {name: entries for name, entries in multipliers.items() if entries}
    if not multipliers:
        return "No compute multiplier can be computed yet; the notes say what is missing."
    clauses = [f"{name} {_where(entries, report)}" for name, entries in multipliers.items()]
    sentence = f"For the same loss as {report['baseline']}: {'; '.join(clauses)}."
    if any("low" not in x for entries in multipliers.values() for x in entries.values()):
        sentence += " Where the table shows no interval, this may be noise between seeds."
    return sentence


def claims(report: Report) -> list[str]:
    """The two claims of Qiu et al., and what this ladder says of them."""
    lines = []
    saving = {
        name: sum(x.get("low", 0) > 1 for x in summary["compute_multiplier"].values())
        for name, summary in _in(report, "mup")
        if summary["compute_multiplier"]
    }
    if saving:
        all_rungs = len(report["rungs"])
        holds = sum(rungs == all_rungs for rungs in saving.values())
        verdict = {len(saving): "holds", 0: "is not shown"}.get(holds, "holds in part")
        counts = ", ".join(f"{name} at {n} of {all_rungs} rungs" for name, n in saving.items())
        lines.append(
            "*Carried by the rules, matrix optimizers save compute at every rung*: "
            f"**{verdict}**: {counts} (90% interval above 1)."
        )
    top = report["rungs"][-1]["name"]
    losing = {
        summary["optimizer"]: _loses(report, summary, top)
        for _, summary in _in(report, "sp")
        if top in summary["compute_multiplier"]
    }
    if losing:
        lines.append(
            f"*Without rules (sp) they lose the gain*, at {top}: "
            + "; ".join(f"{name} {verdict}" for name, verdict in losing.items())
            + "."
        )
    return lines


def _loses(report: Report, summary: Mapping[str, Any], rung: str) -> str:
    """Whether an optimizer loses by another parametrization what it gains in µP."""
    there = summary["compute_multiplier"][rung]
    here = report["optimizers"][summary["optimizer"]]["compute_multiplier"].get(rung)
    if here is None:
        return "has no result in µP to compare with"
    numbers = f"({_short(there)} against {_short(here)} in µP)"
    if not {"low", "high"} <= there.keys() & here.keys():
        return f"cannot be told without intervals {numbers}"
    if there["high"] < here["low"]:
        verdict = "**keeps a part**" if there["low"] > 1 else "**loses it**"
    elif there["low"] > here["high"]:
        verdict = "**gains**"
    else:
        verdict = "is **undecided**, the intervals overlap"
    return f"{verdict} {numbers}"


def _short(entry: Mapping[str, Any]) -> str:
    interval = f" [{entry['low']:.2f}, {entry['high']:.2f}]" if "low" in entry else ""
    return f"{entry['value']:.2f}{interval}"


def extrapolated(report: Report) -> list[str]:
    """The multipliers that lie beyond the baseline's losses, one sentence a series."""
    baseline = report["baseline"]
    sentences = []
    for name, summary in report["optimizers"].items():
        outside = [r for r, x in summary["compute_multiplier"].items() if x["extrapolated"]]
        if outside:
            sentences.append(
                f"{name} at {', '.join(outside)}: its loss is beyond those of {baseline}, whose "
                "curve is prolonged from its outermost two points."
            )
    return sentences


def doubts(report: Report) -> list[str]:
    """What would change the conclusion: sentences, the gravest first."""
    return [
        *_better_checks(report),
        *_close_to_parity(report),
        *_sensitive(report),
        *_of_law(report),
        *_of_power(report),
    ]


def _better_checks(report: Report) -> Iterator[str]:
    """Where half or twice a transferred value was better."""
    for name, summary in report["optimizers"].items():
        for rung, checks in summary["checks"].items():
            for key, tried in checks.items():
                better = [(x, gap) for x, gap in tried if gap is not None and gap < 0]
                if better:
                    factor, gap = min(better, key=lambda pair: pair[1])
                    kind = key.replace("_", " ")
                    yield (
                        f"{name} at {rung} is better by {-gap:.4f} nats with {factor:g} times the "
                        f"transferred {kind}: tuned there, its multiplier would be higher."
                    )


def _close_to_parity(report: Report) -> Iterator[str]:
    for name, summary in report["optimizers"].items():
        if name == report["baseline"]:
            continue
        close = [
            rung
            for rung, x in summary["compute_multiplier"].items()
            if "low" in x and x["low"] <= 1 <= x["high"] and x["low"] < x["high"]
        ]
        if close:
            yield f"{name} at {', '.join(close)}: more seeds could put it on either side of 1."


def _sensitive(report: Report) -> Iterator[str]:
    """Where one rung of the baseline decides whether the multiplier is above 1."""
    for name, summary in report["optimizers"].items():
        for rung, x in summary["compute_multiplier"].items():
            low, high = x.get("without_a_rung", (x["value"], x["value"]))
            if (low - 1) * (high - 1) < 0:
                yield (
                    f"{name} at {rung}: without one of {report['baseline']}'s inner rungs the "
                    f"multiplier would be between {low:.2f} and {high:.2f}."
                )


def _of_law(report: Report) -> Iterator[str]:
    if report["law"] and report["law"]["doubt"]:
        yield f"The fitted law is in doubt. {report['law']['doubt']}"


def _of_power(report: Report) -> Iterator[str]:
    if report["power"]:
        needed = dict(map(tuple, report["power"]["seeds"]))
        yield (
            f"Multipliers that differ by less than {_RATIO - 1:.0%} are out of reach: to tell them "
            f"apart takes {needed[_RATIO]} seeds a cell with this noise (power 80%)."
        )


def _in(report: Report, parametrization: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The matrix optimizers, or rather all but the baseline, in one parametrization."""
    for name, summary in report["optimizers"].items():
        is_baseline = summary["optimizer"] == report["baseline"]
        if summary["parametrization"] == parametrization and not is_baseline:
            yield name, summary


def _where(entries: Mapping[str, Any], report: Report) -> str:
    less = {rung: x["value"] for rung, x in entries.items() if x.get("low", x["value"]) > 1}
    more = [rung for rung, x in entries.items() if x.get("high", x["value"]) < 1]
    if len(less) == len(entries):
        rungs = "every rung" if len(entries) == len(report["rungs"]) else "every finished rung"
        low, high = min(less.values()), max(less.values())
        return f"needs less compute at {rungs} (multiplier {low:.2f} to {high:.2f})"
    where = "needs no less compute at any rung"
    if less:
        where = f"needs less compute at {len(less)} of {len(entries)} rungs ({', '.join(less)})"
    return f"{where}, and more at {', '.join(more)}" if more else where
