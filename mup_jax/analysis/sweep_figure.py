"""The figure of a sweep over model sizes: curves of all sizes, a panel for each optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from mup_jax.analysis.style import plain_log_scale, style_axes
from mup_jax.analysis.sweeps import NAMES, SIZES, base_of, points_of, wants_harmless
from mup_jax.analysis.transfer import mean_losses

# Beyond this above the lowest loss of a column, curves leave the panel.
_SHOWN = 0.5


def write_sweep_figure(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws validation loss against the base model's hyperparameter.

    A row for each variant, a column for each optimizer, a line for each size. Curves line up where
    the best value transfers.

    Args:
      results: with the summaries of `add_summaries`.
      path: of the PNG file.
    """
    summaries = results["summaries"]
    columns = list(dict.fromkeys(summary["optimizer"] for summary in summaries))
    rows = list(dict.fromkeys(summary["variant"] for summary in summaries))
    figure = Figure(
        figsize=(1.2 + 2.5 * len(columns), 0.9 + 2.3 * len(rows)), layout="constrained", dpi=120
    )
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharey="col")
    for axes in panels.flat:
        axes.set_visible(False)
    for summary in summaries:
        column = columns.index(summary["optimizer"])
        axes = panels[rows.index(summary["variant"]), column]
        axes.set_visible(True)
        style_axes(axes, "", "")
        axes.set_title(f"{summary['optimizer']}\n{summary['variant']}", fontsize=10)
        _draw(axes, summary, results["sizes"], ring=not wants_harmless(results))
    for column, name in enumerate(columns):
        of_column = [summary for summary in summaries if summary["optimizer"] == name]
        lowest, highest = _range(of_column)
        panels[0, column].set_ylim(lowest, highest)
    figure.supxlabel(f"{NAMES[results['swept']]} of {base_of(results)}", fontsize=11)
    figure.supylabel("validation loss (nats per token)", fontsize=11)
    handles, labels = next(a for a in panels.flat if a.get_visible()).get_legend_handles_labels()
    figure.legend(
        handles, labels, title=SIZES[results["vary"]], loc="outside upper center", ncols=len(labels)
    )
    FigureCanvasAgg(figure).print_png(path)


def _draw(axes: Axes, summary: Mapping[str, Any], sizes: list[float], *, ring: bool) -> None:
    colours = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.0, len(sizes)))
    curves = points_of(summary)
    for colour, (size, curve) in zip(colours, curves.items(), strict=True):
        values, losses = mean_losses(curve)
        at = values * (size / sizes[0]) ** -summary["carried"]
        finite = np.isfinite(losses)
        axes.plot(at[finite], losses[finite], "o-", color=colour, markersize=3, label=f"{size:g}")
        top = axes.get_xaxis_transform()
        axes.plot(at[~finite], np.full((~finite).sum(), 0.97), "x", color=colour, transform=top)
        if ring and finite.any():
            best = int(np.argmin(losses))
            axes.plot(
                at[best], losses[best], "o", color=colour, markersize=9, markerfacecolor="none"
            )
    if summary["best"]:
        at_base = next(iter(summary["best"].values()))["value"]
        axes.axvline(at_base, color="0.4", linestyle="--", linewidth=1, zorder=0)
    plain_log_scale(axes)
    axes.set_xscale("log", base=2)
    tried = sorted({v for curve in curves.values() for v in mean_losses(curve)[0]})
    every = -(-len(tried) // 4)
    axes.xaxis.set_major_locator(FixedLocator(tried[::every]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.2g}")
    axes.tick_params(labelsize=8)


def _range(summaries: list[Mapping[str, Any]]) -> tuple[float, float]:
    """Of losses worth seeing: those of the largest size are the lowest, of the smallest highest."""
    bests, ends = [], []
    for summary in summaries:
        for curve in points_of(summary).values():
            losses = mean_losses(curve)[1]
            finite = losses[np.isfinite(losses)]
            if finite.size:
                bests.append(finite.min())
                ends.append(finite.max())
    if not bests:
        return 0.9, 1.1
    return min(bests) - 0.03, min(max(ends), max(bests) + _SHOWN) + 0.03
