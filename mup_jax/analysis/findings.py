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
    counts = {
        name: (sum(x.get("low", 0) > 1 for x in entries.values()), len(entries))
        for name, summary in _in(report, "mup")
        if (entries := summary["compute_multiplier"])
    }
    if counts:
        saving = [n for n, _ in counts.values()]
        measured = [n for _, n in counts.values()]
        known = any(
            "low" in x for _, s in _in(report, "mup") for x in s["compute_multiplier"].values()
        )
        if not known:
            verdict = "cannot be told without intervals"
        elif saving == measured:
            all_rungs = all(n == len(report["rungs"]) for n in measured)
            verdict = "holds" if all_rungs else "holds so far"
        else:
            verdict = "holds in part" if any(saving) else "is not shown"
        evidence = ", ".join(f"{name} at {n} of {of} rungs" for name, (n, of) in counts.items())
        lines.append(
            "*Carried by the rules, matrix optimizers save compute at every rung*: "
            f"**{verdict}**: {evidence} (90% interval above 1)."
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
    if here["low"] <= 1:
        verdict = "has **no gain** to lose"
    elif there["high"] <= 1:
        verdict = "**loses all of it**"
    elif there["high"] >= here["low"]:
        verdict = "is **undecided**, the intervals overlap"
    elif there["low"] > 1:
        verdict = "**loses a part**"
    else:
        verdict = "**loses a part or all**"
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
    """Where half or twice a transferred value was better, by more than the noise of one pair."""
    for name, summary in report["optimizers"].items():
        whose = "all others'" if name == report["baseline"] else "its"
        for rung, checks in summary["checks"].items():
            noise = (report["seed_noise"] or 0.0) * 2**0.5 * summary["final_loss"].get(rung, 0.0)
            for key, tried in checks.items():
                factor, gap = min(
                    ((x, gap) for x, gap in tried if gap is not None),
                    key=lambda pair: pair[1],
                    default=(1.0, 0.0),
                )
                if gap < -noise:
                    direction = "lower" if name == report["baseline"] else "higher"
                    yield (
                        f"{name} at {rung} is better by {-gap:.4f} nats with {factor:g} times the "
                        f"transferred {key.replace('_', ' ')}: tuned there, {whose} multiplier "
                        f"would be {direction}."
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
        needed = dict(map(tuple, report["power"]["seeds"]))[_RATIO]
        if needed > report["power"]["seeds_run"]:
            yield (
                f"Multipliers that differ by less than {_RATIO - 1:.0%} are out of reach: to tell "
                f"them apart takes {needed} seeds a cell with this noise (power 80%)."
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
