"""The figure of batch sizes: what they cost, and their best learning rates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mup_jax.analysis.batch_report import batch_summaries
from mup_jax.analysis.style import plain_log_scale, style_axes, styles
from mup_jax.analysis.transfer import MARGIN


def write_batch_figure(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws the loss, and the best learning rate, against the batch size.

    Args:
      results: of a sweep of the learning rate over batch sizes.
      path: of the PNG file.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    style_axes(left, "batch size", "validation loss (nats per token)")
    style_axes(right, "batch size", "best learning rate")
    for (name, summary), style in zip(batch_summaries(results), styles(), strict=False):
        if summary is not None:
            _draw(left, right, name, summary, style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(results["sizes"], [f"{size:g}" for size in results["sizes"]])
        axes.xaxis.set_minor_locator(NullLocator())
    plain_log_scale(left)
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(lambda y, _: f"{y:.2g}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(len(labels), 1))
    FigureCanvasAgg(figure).print_png(path)


def _draw(
    left: Axes, right: Axes, name: str, summary: Mapping[str, Any], style: dict[str, Any]
) -> None:
    sizes = np.array(list(summary["loss"]))
    losses = list(summary["loss"].values())
    guide: dict[str, Any] = {"color": style["color"], "linestyle": "--", "linewidth": 1}
    left.plot(sizes, losses, label=name, **style)
    left.axhline(min(losses) + MARGIN, alpha=0.6, **guide)
    best = list(summary["best_rate"].values())
    rates = np.array([one["value"] for one in best])
    right.vlines(sizes, [o["low"] for o in best], [o["high"] for o in best], color=style["color"],
                 alpha=0.5, linewidth=3)  # fmt: skip
    right.plot(sizes, rates, **style)
    right.plot(sizes, rates[0] * np.sqrt(sizes / sizes[0]), alpha=0.6, **guide)
