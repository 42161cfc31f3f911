"""report.json for people: a markdown page, and a table for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def markdown(report: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """Returns the page report.md: a finding, tables, figures and notes.

    Args:
      report: what `summarize` returns.
      figures: paths of images relative to the page, shown in this order.
    """
    baseline = report["baseline"]
    noise = report["seed_noise"]
    spread = "unknown, with one seed" if noise is None else f"{noise:.2%} of the loss"
    sections = [
        "# Optimizers on a ladder of model sizes",
        f"**{finding(report)}**",
        "Each optimizer's learning rate was tuned at the smallest rung and carried to the others "
        "by its µP rule. The smallest rung's losses are the ones that chose the learning rate, so "
        "they are slightly optimistic, for all optimizers alike.",
        "## Rungs",
        table(
            ["rung", "width", "depth", "parameters", "tokens", "steps", "training FLOPs"],
            [
                [
                    rung["name"],
                    rung["width"],
                    rung["depth"],
                    f"{rung['parameters']:,}",
                    f"{rung['tokens']:,}",
                    f"{rung['steps']:,}",
                    f"{rung['flops']:.3g}",
                ]
                for rung in report["rungs"]
            ],
        ),
        "## Validation loss",
        "Mean over seeds, ± standard deviation over seeds (number of seeds). Pooled over all runs, "
        f"one seed's standard deviation is {spread}.",
        _by_rung(report, _loss),
        f"## Compute multiplier over {baseline}",
        f"{baseline}'s training FLOPs for the same loss, divided by the optimizer's; the "
        "optimizer's own FLOPs are not counted. In brackets the 90% interval for noise between "
        "seeds.",
        _by_rung(report, _multiplier, skip=baseline),
        f"*e*: extrapolated beyond {baseline}'s losses.",
        "## Learning rates",
        "Base learning rate, before the µP factors. At the smallest rung the tuned one; at larger "
        "ones the best of those tried, with their number.",
        _by_rung(report, _learning_rate),
        "## Cost",
        "Steps per second, and in brackets the optimizer's share of the time of a step and of all "
        "FLOPs.",
        _by_rung(report, _cost),
    ]
    if figures:
        sections += ["## Figures", *(f"![{_caption(path)}]({path})" for path in figures)]
    if report["notes"]:
        sections += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    sections += [
        "## Where this comes from",
        table(
            ["", ""],
            [["device", report["device"]]]
            + [["corpus: " + key, value] for key, value in report["corpus"].items()]
            + [[key, value] for key, value in report["versions"].items()],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def finding(report: Mapping[str, Any]) -> str:
    """Says who needs less compute than the baseline for the same loss, and at which rungs.

    An optimizer counts as better at a rung if its whole interval lies above 1, or, where the seeds
    give no interval, its point estimate; then a second sentence says so.
    """
    baseline = report["baseline"]
    multipliers = {
        name: summary["compute_multiplier"]
        for name, summary in report["optimizers"].items()
        if name != baseline and summary["compute_multiplier"]
    }
    if not multipliers:
        return "No compute multiplier can be computed yet; the notes say what is missing."
    clauses = [f"{name} {_where(entries, report)}" for name, entries in multipliers.items()]
    sentence = f"For the same loss as {baseline}: {'; '.join(clauses)}."
    if any("low" not in x for entries in multipliers.values() for x in entries.values()):
        sentence += " Where the table shows no interval, this may be noise between seeds."
    return sentence


def _where(entries: Mapping[str, Any], report: Mapping[str, Any]) -> str:
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


def terminal_table(report: Mapping[str, Any]) -> str:
    """Returns the losses and multipliers as aligned plain text, one line per optimizer."""
    rungs = [rung["name"] for rung in report["rungs"]]
    lines = [["optimizer", "rate", *rungs]]
    for name, summary in report["optimizers"].items():
        rate = summary["best_learning_rate"].get(rungs[0])
        cells = []
        for rung in rungs:
            entry = summary["compute_multiplier"].get(rung)
            loss = summary["final_loss"].get(rung)
            cell = "-" if loss is None else f"{loss:.4f}"
            if entry and name != report["baseline"]:
                cell += f" {entry['value']:.2f}x{'e' if entry['extrapolated'] else ' '}"
            cells.append(cell)
        lines.append([name, "-" if rate is None else f"{rate:g}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return f"{table}\n\nx: compute multiplier over {report['baseline']}; e: extrapolated\n"


def _by_rung(
    report: Mapping[str, Any],
    cell: Callable[[Mapping[str, Any], str], str],
    skip: str | None = None,
) -> str:
    """One row per optimizer, one column per rung."""
    rungs = [rung["name"] for rung in report["rungs"]]
    return table(
        ["", *rungs],
        [
            [name, *(cell(summary, rung) for rung in rungs)]
            for name, summary in report["optimizers"].items()
            if name != skip
        ],
    )


def _loss(summary: Mapping[str, Any], rung: str) -> str:
    if rung not in summary["final_loss_by_seed"]:
        return "–"
    seeds = summary["final_loss_by_seed"][rung]
    if rung not in summary["final_loss"]:
        return f"diverged in {seeds.count(None)} of {len(seeds)}"
    spread = f" ± {np.std(seeds, ddof=1):.4f}" if len(seeds) > 1 else ""
    return f"{summary['final_loss'][rung]:.4f}{spread} ({len(seeds)})"


def _multiplier(summary: Mapping[str, Any], rung: str) -> str:
    if rung not in summary["compute_multiplier"]:
        return "–"
    entry = summary["compute_multiplier"][rung]
    interval = f" [{entry['low']:.2f}, {entry['high']:.2f}]" if "low" in entry else ""
    return f"{entry['value']:.3f}{interval}{' *e*' if entry['extrapolated'] else ''}"


def _learning_rate(summary: Mapping[str, Any], rung: str) -> str:
    if rung not in summary["best_learning_rate"]:
        return "–"
    tried = len(summary["learning_rate_sweep"][rung])
    return f"{summary['best_learning_rate'][rung]:g} (of {tried})"


def _cost(summary: Mapping[str, Any], rung: str) -> str:
    if rung not in summary["steps_per_second"]:
        return "–"
    seconds = summary["optimizer_seconds_share"][rung]
    flops = summary["optimizer_flops_share"][rung]
    return f"{summary['steps_per_second'][rung]:.3g} ({seconds:.0%}, {flops:.1%})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _caption(path: str) -> str:
    name = path.rsplit("/", 1)[-1].removesuffix(".png")
    return name.replace("_", " ").capitalize()
