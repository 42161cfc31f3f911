"""The part of a sweep's page that is about batch sizes: sentences and a table."""

from collections.abc import Iterator, Mapping
from typing import Any

from mup_jax.analysis.batches import summarize_batches
from mup_jax.analysis.report import table
from mup_jax.analysis.transfer import MARGIN, Curve


def batch_summaries(results: Mapping[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
    """Of each optimizer its label and `summarize_batches`."""
    return [(curve["optimizer"], summarize_batches(_points(curve))) for curve in results["curves"]]


def batch_sections(results: Mapping[str, Any], figure: str) -> list[str]:
    """A finding, a figure and a table, in Markdown.

    Args:
      results: of a sweep of the learning rate over batch sizes.
      figure: path of the image relative to the page.
    """
    summaries = batch_summaries(results)
    sizes = results["sizes"]
    return [
        f"**{' '.join(_sentences(summaries, sizes))}**",
        f"![The best loss and the best learning rate of each batch size]({figure})",
        "*Left: the loss of the best rate tried at each batch size; the dashed line is "
        f"{MARGIN:g} nats above the lowest. Right: the best rate, with its range over seeds; the "
        "dashed line is the smallest batch's times √κ.*",
        "Lost: how much more each batch size loses, at the best rate tried for it, than the best "
        f"of them. Critical: the largest batch that loses less than {MARGIN:g} nats, interpolated "
        "in log2, in brackets the range over seeds (*: the largest tried). Exponent: a of best "
        "rate ∝ batch^a, in brackets the 90% interval for the noise between seeds; the rule has "
        "0.5.",
        table(
            ["optimizer", *(f"lost at {size}" for size in sizes), "critical", "exponent"],
            [_row(name, summary, sizes) for name, summary in summaries],
        ),
    ]


def _sentences(
    summaries: list[tuple[str, dict[str, Any] | None]], sizes: list[int]
) -> Iterator[str]:
    for name, summary in summaries:
        if summary is None:
            yield f"{name}: a batch size trained with no learning rate."
            continue
        critical = summary["critical"]
        cost = f"the best batch is {summary['best']:g}, one of {critical['value']:.2g} loses"
        if critical["at_edge"]:
            cost = f"the best batch is {summary['best']:g}, and the largest, {sizes[-1]}, loses"
        cost += f" {'less than ' * critical['at_edge']}{MARGIN:g} nats more"
        yield f"{name}: {cost}; {_law(summary)}."


def _law(summary: Mapping[str, Any]) -> str:
    if summary["exponent"] is None:
        return f"the exponent of the rate is not known ({summary['problem']})"
    law = f"the best rate goes as batch^{_exponent(summary)}"
    if summary["exponent_low"] is None:
        return law
    holds = summary["exponent_low"] <= 0.5 <= summary["exponent_high"]
    return f"{law}, {'as the root would' if holds else 'not as its root'}"


def _row(name: str, summary: dict[str, Any] | None, sizes: list[int]) -> list[str]:
    if summary is None:
        return [name, *("diverged" for _ in sizes), "", ""]
    critical = summary["critical"]
    return [
        name,
        *(f"{cost:.3f}" for cost in summary["cost"].values()),
        f"{critical['value']:.2g}{'*' * critical['at_edge']} "
        f"[{critical['low']:.2g}, {critical['high']:.2g}]",
        summary["problem"] or _exponent(summary),
    ]


def _exponent(summary: Mapping[str, Any]) -> str:
    if summary["exponent_low"] is None:
        return f"{summary['exponent']:.2f}"
    return (
        f"{summary['exponent']:.2f} [{summary['exponent_low']:.2f}, {summary['exponent_high']:.2f}]"
    )


def _points(curve: Mapping[str, Any]) -> dict[float, Curve]:
    return {float(size): points for size, points in curve["points"].items()}
