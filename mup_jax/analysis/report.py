"""report.json for people: a markdown page, and a table for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mup_jax.analysis.findings import claims, doubts, extrapolated, finding

# What a reader of each figure must know.
CAPTIONS = {
    "loss_vs_compute": "Dots are runs, lines their means. Dashed: other parametrizations than µP.",
    "multiplier_vs_compute": "Bars: 90% intervals for noise between seeds. Shaded: a change of the "
    "loss by 0.1%. Hollow: extrapolated beyond the baseline's losses.",
    "learning_rate_sweeps": "Dashed: the transferred rate. Ring: the best tried. Cross at the top: "
    "diverged.",
    "coordinate_check": "How far the last layer's features move in one step, relative to the "
    "smallest rung: level where the parametrization works.",
}


def markdown(
    report: Mapping[str, Any], figures: Sequence[str] = (), commands: Sequence[str] = ()
) -> str:
    """Returns the page report.md: the claim, tables, figures, doubts, and where it comes from.

    Args:
      report: what `summarize` returns.
      figures: paths of images relative to the page, shown in this order.
      commands: that give these results.
    """
    sections = [
        "# Optimizers on a ladder of model sizes",
        f"**{finding(report)}**",
        _items(claims(report)),
        *_tables(report),
        *(f"![{_caption(path)}]({path})\n\n*{CAPTIONS[_stem(path)]}*" for path in figures),
        "## What was extrapolated",
        _items(extrapolated(report)) or "Nothing.",
        "## What would change the conclusion",
        _items(doubts(report)) or "Nothing that this ladder can tell.",
        "## Is the transferred optimum one?",
        "By how much the loss is higher, in nats and to the run of the same seed, with another "
        "learning rate or weight decay than the transferred one.",
        _check_table(report),
        "## Other multipliers",
        "By cost: training tokens, training FLOPs of the model (as above), and seconds of the "
        "steps, the optimizer's included. By estimator: interpolation, and the law "
        f"{_law(report)} fitted to {report['baseline']}.",
        _multiplier_table(report),
        "## How it was measured",
        _tuning(report),
        _rung_table(report),
        "Base learning rate, before the factors of the parametrization: at the smallest rung the "
        "tuned one; at larger ones the best of those tried, with their number.",
        _by_rung(report, _learning_rate),
        "Seconds of a run's steps, and in brackets the optimizer's share of the time of a step and "
        "of all FLOPs.",
        _by_rung(report, _cost),
    ]
    if report["notes"]:
        sections += ["## Notes", _items(report["notes"])]
    if commands:
        sections += ["## Commands", "\n".join(f"    {command}" for command in commands)]
    sections += [
        "## Where this comes from",
        table(
            ["", ""],
            [["device", report["device"]]]
            + [["corpus: " + key, value] for key, value in report["corpus"].items()]
            + [[key, value] for key, value in report["versions"].items()],
        ),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _tables(report: Mapping[str, Any]) -> list[str]:
    baseline, noise = report["baseline"], report["seed_noise"]
    spread = "unknown, with one seed" if noise is None else f"{noise:.2%} of the loss"
    return [
        f"## Compute multiplier over {baseline}",
        f"{baseline}'s training FLOPs for the same loss, divided by the optimizer's; the "
        "optimizer's own FLOPs are not counted. In brackets the 90% interval for noise between "
        f"seeds; *e*: extrapolated beyond {baseline}'s losses.",
        _by_rung(report, _multiplier, skip=baseline),
        "## Validation loss",
        "Nats per token: mean over seeds, ± standard deviation over seeds (number of seeds). "
        f"Pooled over all runs, one seed's standard deviation is {spread}.",
        _by_rung(report, _loss),
    ]


def _rung_table(report: Mapping[str, Any]) -> str:
    header = ["rung", "width", "depth", "parameters", "tokens", "steps", "batch", "training FLOPs"]
    return table(
        header,
        [
            [
                *(rung[key] for key in ("name", "width", "depth")),
                *(f"{rung[key]:,}" for key in ("parameters", "tokens", "steps", "batch_size")),
                f"{rung['flops']:.3g}",
            ]
            for rung in report["rungs"]
        ],
    )


def _check_table(report: Mapping[str, Any]) -> str:
    rows = [
        [name, rung, key.replace("_", " "), ", ".join(_check(*pair) for pair in tried)]
        for name, summary in report["optimizers"].items()
        for rung, checks in summary["checks"].items()
        for key, tried in checks.items()
    ]
    return table(["", "rung", "of", "factor: difference"], rows) if rows else "No checks yet."


def _check(factor: float, difference: float | None) -> str:
    return f"×{factor:g}: " + ("diverged" if difference is None else f"{difference:+.4f}")


def _tuning(report: Mapping[str, Any]) -> str:
    """How the rates were found, with a table of what was tried where that is known."""
    carried = "at the smallest rung and carried to the others by its parametrization."
    rows = []
    for name, summary in report["optimizers"].items():
        if summary["tuning"]:
            rates, factors = (
                sorted({point[axis] for point in summary["tuning"]["grid"]}) for axis in (0, 1)
            )
            tuned = next(iter(summary["best_learning_rate"].values()), None)
            rows.append(
                [
                    name,
                    ", ".join(f"{x:g}" for x in rates),
                    ", ".join(f"×{x:g}" for x in factors),
                    summary["tuning"]["cells"],
                    "–" if tuned is None else f"{tuned:g}",
                    f"×{summary['embedding_readout_factor']:g}",
                ]
            )
    if not rows:
        return (
            f"Each optimizer's learning rate was tuned {carried} The smallest rung's losses are "
            "the ones that chose the learning rate, so they are slightly optimistic, for all "
            "optimizers alike."
        )
    header = ["", "learning rates tried", "times, for all but hidden matrices"]
    return (
        "Each optimizer's learning rate, and the factor by which that of embedding and readout "
        f"differs, were tuned {carried} Tuned is the minimum of a parabola in log2 through the "
        "best pair tried and its neighbours; the runs that tuned are no results.\n\n"
        + table([*header, "runs", "tuned rate", "tuned factor"], rows)
    )


def _law(report: Mapping[str, Any]) -> str:
    law = report["law"] or {}
    if "exponent" not in law:
        return "E + A·C^(−α)"
    return (
        f"{law['irreducible']:.3f} + {law['coefficient']:.3g}·C^(−{law['exponent']:.3f}) "
        f"({law['points']} points)"
    )


def _multiplier_table(report: Mapping[str, Any]) -> str:
    rungs = [rung["name"] for rung in report["rungs"]]
    rows = []
    for name, summary in report["optimizers"].items():
        kinds = {**summary["multipliers"], "FLOPs, by the law": summary["law_multiplier"]}
        kinds["FLOPs"] = kinds.pop("flops")
        for kind in ("tokens", "FLOPs", "seconds", "FLOPs, by the law"):
            if name != report["baseline"] and kinds[kind]:
                cells = [_interval(kinds[kind], rung) for rung in rungs]
                rows.append([name, kind, *cells])
    return table(["", "cost", *rungs], rows) if rows else "None yet."


def terminal_table(report: Mapping[str, Any]) -> str:
    """Returns the losses and multipliers as aligned plain text, one line per optimizer."""
    rungs = [rung["name"] for rung in report["rungs"]]
    lines = [["optimizer", "rate", *rungs]]
    for name, summary in report["optimizers"].items():
        rate = summary["best_learning_rate"].get(rungs[0])
        factor = summary["embedding_readout_factor"] or 1.0
        cells = []
        for rung in rungs:
            entry = summary["compute_multiplier"].get(rung)
            loss = summary["final_loss"].get(rung)
            cell = "-" if loss is None else f"{loss:.4f}"
            if entry and name != report["baseline"]:
                cell += f" {entry['value']:.2f}x{'e' if entry['extrapolated'] else ' '}"
            cells.append(cell)
        times = f" x{factor:.3g}" if factor != 1 else ""
        lines.append([name, "-" if rate is None else f"{rate:g}{times}", *cells])
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
    return _interval(summary["compute_multiplier"], rung)


def _interval(entries: Mapping[str, Any], rung: str) -> str:
    if rung not in entries:
        return "–"
    entry = entries[rung]
    interval = f" [{entry['low']:.2f}, {entry['high']:.2f}]" if "low" in entry else ""
    return f"{entry['value']:.3f}{interval}{' *e*' if entry['extrapolated'] else ''}"


def _learning_rate(summary: Mapping[str, Any], rung: str) -> str:
    if rung not in summary["best_learning_rate"]:
        return "–"
    tried = len(summary["learning_rate_sweep"][rung])
    return f"{summary['best_learning_rate'][rung]:g} (of {tried})"


def _cost(summary: Mapping[str, Any], rung: str) -> str:
    if rung not in summary["seconds_per_run"]:
        return "–"
    share = summary["optimizer_flops_share"].get(rung)
    flops = "" if share is None else f", {share:.1%}"
    seconds = summary["optimizer_seconds_share"][rung]
    return f"{summary['seconds_per_run'][rung]:.3g} ({seconds:.0%}{flops})"


def _items(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".png")


def _caption(path: str) -> str:
    return _stem(path).replace("_", " ").capitalize()
