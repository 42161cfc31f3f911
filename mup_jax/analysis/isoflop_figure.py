"""The figure of compute-optimal training: a panel for each optimizer, a curve for each budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from mup_jax.analysis.style import style_axes

# Beyond this above the highest of the curves' best losses, models leave the panel.
_SHOWN = 0.4


def write_isoflop_figure(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws validation loss against tokens per parameter.

    Args:
      results: with the summaries of `add_summaries`.
      path: of the PNG file.
    """
    summaries = results["summaries"]
    figure = Figure(figsize=(1 + 3.6 * len(summaries), 4.4), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(summaries), squeeze=False, sharey=True, sharex=True)[0]
    budgets = results["budgets"]
    colours = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.0, len(budgets)))
    for axes, summary, one in zip(panels, summaries, results["optimizers"], strict=True):
        style_axes(axes, "", "")
        axes.set_title(summary["optimizer"], fontsize=11)
        axes.set_xscale("log")
        for budget, colour, models, vertex in zip(
            budgets, colours, one["budgets"], summary["budgets"], strict=True
        ):
            _draw(axes, models, vertex, colour, f"{budget:.2g}")
    panels[0].set_ylim(*_range(results))
    for axes in panels:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    figure.supxlabel("tokens per parameter", fontsize=11)
    figure.supylabel("validation loss (nats per token)", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="training FLOPs", loc="outside upper center", ncols=len(labels)
    )
    FigureCanvasAgg(figure).print_png(path)


def _draw(
    axes: Axes, models: list[dict[str, Any]], vertex: Mapping[str, Any], colour: Any, label: str
) -> None:
    finished = [m for m in models if m["losses"] and None not in m["losses"]]
    at = [m["tokens_per_parameter"] for m in finished]
    axes.plot(at, [np.mean(m["losses"]) for m in finished], "o", color=colour, markersize=4,
              label=label)  # fmt: skip
    if vertex["parabola"] is not None:
        first, last = np.log(vertex["fitted"])
        x = np.linspace(first, last, 100)
        axes.plot(np.exp(x), np.polyval(vertex["parabola"], x), color=colour, linewidth=1.2)
    if vertex["value"] is None:
        return
    axes.plot(vertex["value"], vertex["loss"], "D", color=colour, markersize=7,
              markeredgecolor="white", zorder=3)  # fmt: skip
    if vertex["low"]:
        axes.hlines(vertex["loss"], vertex["low"], vertex["high"], color=colour, linewidth=3,
                    alpha=0.45)  # fmt: skip


def _range(results: Mapping[str, Any]) -> tuple[float, float]:
    means = [
        [np.mean(m["losses"]) for m in models if m["losses"] and None not in m["losses"]]
        for one in results["optimizers"]
        for models in one["budgets"]
    ]
    means = [of_budget for of_budget in means if of_budget]
    if not means:
        return 0.9, 1.1
    lowest, highest = min(map(min, means)), max(map(min, means))
    margin = 0.05 * (highest - lowest) + 0.01
    return lowest - margin, min(max(map(max, means)), highest + _SHOWN) + margin
