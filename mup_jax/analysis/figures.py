"""The four figures of a ladder's report."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from mup_jax.analysis.runs import series_name
from mup_jax.analysis.style import COLOURS, new_figure, plain_log_scale, style_axes, styles

_DASHES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def write_figures(
    report: Mapping[str, Any], results: Sequence[Mapping[str, Any]], directory: str | Path
) -> list[Path]:
    """Writes loss_vs_compute, multiplier_vs_compute, learning_rate_sweeps and coordinate_check.

    A figure without anything to show is left out.

    Args:
      report: what `summarize` returns.
      results: what it was given, for the runs behind the means.
      directory: an existing folder for the PNG files.

    Returns:
      The paths written.
    """
    figures = {
        "loss_vs_compute.png": _loss_vs_compute(report),
        "multiplier_vs_compute.png": _multiplier_vs_compute(report),
        "learning_rate_sweeps.png": _learning_rate_sweeps(report, results),
        "coordinate_check.png": _coordinate_check(report),
    }
    paths = []
    for name, figure in figures.items():
        if any(axes.has_data() for axes in figure.axes):
            paths.append(Path(directory) / name)
            FigureCanvasAgg(figure).print_png(paths[-1])
    return paths


def _loss_vs_compute(report: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure("training FLOPs", "validation loss, nats per token")
    compute = _of_rungs(report, "flops")
    for name, summary, style in _series(report):
        for rung, seeds in summary["final_loss_by_seed"].items():
            finite = [loss for loss in seeds if loss is not None]
            at = [compute[rung]] * len(finite)
            axes.plot(at, finite, **style | {"linestyle": "", "markersize": 4, "alpha": 0.4})
        losses = summary["final_loss"]
        if losses:
            at = [compute[rung] for rung in losses]
            # The dots are the runs; the line alone is their mean.
            axes.plot(at, list(losses.values()), **style | {"marker": ""})
            axes.plot([], [], label=name, **style)
    _log_axes(axes, report)
    axes.legend()
    return figure


def _multiplier_vs_compute(report: Mapping[str, Any]) -> Figure:
    baseline = report["baseline"]
    figure, axes = new_figure("training FLOPs", f"compute multiplier over {baseline}")
    compute = _of_rungs(report, "flops")
    others = [x for x in _series(report) if x[0] != baseline and x[1]["compute_multiplier"]]
    if not others:
        return figure
    axes.axhline(1, color=COLOURS[0], linewidth=1, linestyle="--")
    # Intervals of one rung stand side by side, within a fifth of the distance to the next.
    step = min(np.diff(np.log(list(compute.values()))), default=1.0) / 5 / len(others)
    for i, (name, summary, style) in enumerate(others):
        entries = summary["compute_multiplier"]
        shift = np.exp(step * (i - (len(others) - 1) / 2))
        at = {rung: compute[rung] * shift for rung in entries}
        values = [entry["value"] for entry in entries.values()]
        axes.plot(list(at.values()), values, **style | {"marker": ""})
        bands = {r: x["noise_band"] for r, x in entries.items() if "noise_band" in x}
        axes.fill_between(
            [at[rung] for rung in bands],
            *np.array(list(bands.values())).reshape(-1, 2).T,
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
        for rung, entry in entries.items():
            if "low" in entry:
                axes.vlines(at[rung], entry["low"], entry["high"], color=style["color"], alpha=0.6)
            fill = "white" if entry["extrapolated"] else style["color"]
            axes.plot(at[rung], entry["value"], markerfacecolor=fill, **style)
        axes.plot([], [], label=name, **style)
    hollow: dict[str, Any] = {
        "marker": "o",
        "linestyle": "",
        "color": "0.4",
        "markerfacecolor": "white",
    }
    axes.plot([], [], label="extrapolated", **hollow)
    _log_axes(axes, report)
    figure.legend(loc="outside lower center", ncols=min(len(others) + 1, 4))
    return figure


def _learning_rate_sweeps(
    report: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> Figure:
    rungs = [rung["name"] for rung in report["rungs"]]
    optimizers = {
        name: summary
        for name, summary in report["optimizers"].items()
        if _is_tuned(report, name, rungs[0])
    }
    columns = min(len(optimizers), 2)
    rows = -(-len(optimizers) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained", dpi=150)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(optimizers) :]:
        axes.remove()
    for axes, (name, summary) in zip(panels, optimizers.items(), strict=False):
        style_axes(axes, "base learning rate", "validation loss")
        axes.set_title(name)
        for rung, style in zip(rungs, styles(), strict=False):
            sweep = summary["learning_rate_sweep"].get(rung, [])
            diverged = [rate for rate, loss in sweep if loss is None]
            at_top = axes.get_xaxis_transform()
            axes.plot(diverged, [0.97] * len(diverged), "x", color=style["color"], transform=at_top)
            runs = [
                (line["learning_rate"], line["validation_loss"])
                for line in results
                if (series_name(line["optimizer"], line.get("parametrization", "mup"))) == name
                and line["rung"] == rung
                and not line.get("is_tuning")
                and line["weight_decay"] == summary["weight_decay"]
                and line["validation_loss"] is not None
            ]
            means = [(rate, loss) for rate, loss in sweep if loss is not None]
            if not means:
                continue
            dots: dict[str, Any] = {"linestyle": "", "markersize": 3, "alpha": 0.4}
            axes.plot(*zip(*runs, strict=True), **style | dots)
            axes.plot(*zip(*means, strict=True), label=rung, **style)
            best = min(means, key=lambda mean: mean[1])
            axes.plot(*best, "o", markersize=13, markerfacecolor="none", color=style["color"])
        tuned = summary["best_learning_rate"].get(rungs[0])
        if tuned is not None:
            axes.axvline(tuned, color="0.4", linestyle="--", linewidth=1, zorder=0)
        axes.set_xscale("log", base=2)
        tried = {rate for rate, _ in summary["learning_rate_sweep"].get(rungs[0], [])}
        axes.set_xticks(sorted(tried), [f"{rate:.3g}" for rate in sorted(tried)])
        plain_log_scale(axes)
    entries = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=len(entries),
        title="dashed: the transferred rate; ring: best tried; cross at the top: diverged",
    )
    return figure


def _is_tuned(report: Mapping[str, Any], name: str, base_rung: str) -> bool:
    """Whether a series has a sweep at the base that is its own."""
    summary = report["optimizers"][name]
    in_mup = report["optimizers"].get(summary["optimizer"], {})
    if summary["parametrization"] == "mup" or summary["tuning"] or not in_mup:
        return True
    shared = in_mup["learning_rate_sweep"].get(base_rung)
    return not in_mup["tuning"] and summary["learning_rate_sweep"].get(base_rung) != shared


def _coordinate_check(report: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure("width", "feature change of one step,\nrelative to the smallest rung")
    width = _of_rungs(report, "width")
    for name, summary, style in _series(report):
        changes = summary["coordinate_check"]
        if changes:
            at = [width[rung] for rung in changes]
            axes.plot(at, list(changes.values()), label=name, **style)
    if axes.has_data():
        axes.axhline(1, color="0.4", linewidth=1, linestyle="--", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        # A scale of its own would make noise look like a failed transfer.
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.25), max(high, 4))
        axes.set_xticks(sorted(set(width.values())))
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.legend()
    return figure


def _series(report: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each series with its summary and its style in every figure.

    Optimizers have colours and markers, parametrizations dashes, which µP has none of.
    """
    optimizers = dict.fromkeys(x["optimizer"] for x in report["optimizers"].values())
    names = dict.fromkeys(x["parametrization"] for x in report["optimizers"].values())
    style_of = dict(zip(optimizers, styles(), strict=False))
    others = [name for name in names if name != "mup"]
    dashes = {"mup": "-"} | dict(zip(others, itertools.cycle(_DASHES), strict=False))
    for name, summary in report["optimizers"].items():
        yield (
            name,
            summary,
            style_of[summary["optimizer"]] | {"linestyle": dashes[summary["parametrization"]]},
        )


def _of_rungs(report: Mapping[str, Any], key: str) -> dict[str, float]:
    return {rung["name"]: rung[key] for rung in report["rungs"]}


def _log_axes(axes: Axes, report: Mapping[str, Any]) -> None:
    """FLOPs below, the sizes of the models above."""
    axes.set_xscale("log")
    plain_log_scale(axes)
    sizes = axes.secondary_xaxis("top")
    names = [f"{rung['name']}\n{_short(rung['parameters'])}" for rung in report["rungs"]]
    sizes.set_xticks([rung["flops"] for rung in report["rungs"]], names)
    sizes.xaxis.set_minor_locator(NullLocator())
    sizes.spines["top"].set_visible(False)
    sizes.tick_params(length=0)
    sizes.set_xlabel("parameters")


def _short(number: float) -> str:
    """Three digits and a letter, like 23.0K."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
