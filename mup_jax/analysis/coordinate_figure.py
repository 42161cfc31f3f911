"""The figure of coordinate checks: level lines in µP, beside those of SP."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from mup_jax.analysis.coordinates import PARAMETRIZATIONS, feature_changes
from mup_jax.analysis.style import style_axes, styles


def write_coordinates(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws the change of the last block's output in one step against the size.

    A panel for each parametrization, a line for each optimizer, dashed and hollow where µP is
    expected to fail. Exponents within the tolerance stay in the shaded wedge.

    Args:
      results: see `mup_jax.analysis.coordinates`.
      path: of the PNG file.
    """
    labels = dict.fromkeys(check["optimizer"] for check in results["checks"])
    style_of = dict(zip(labels, styles(), strict=False))
    figure = Figure(figsize=(9, 4.8), layout="constrained", dpi=120)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, name) in zip(panels, PARAMETRIZATIONS.items(), strict=True):
        style_axes(axes, results["vary"], "")
        axes.set_title(name)
        _draw_tolerance(axes, results)
        for check in results["checks"]:
            if check["parametrization"] == key:
                changes = feature_changes(check)
                style = style_of[check["optimizer"]] | _fill(check)
                axes.plot(results["sizes"], changes, label=check["optimizer"], **style)
        _log2_axes(axes, results["sizes"])
    # A scale of its own would make noise look like a failure.
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, 0.25), max(high, 4))
    panels[0].set_ylabel(
        f"change of features in step {results['steps']},\nrelative to the smallest"
    )
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4)
    FigureCanvasAgg(figure).print_png(path)


def _fill(check: Mapping[str, Any]) -> dict[str, Any]:
    known_to_fail = check["parametrization"] == "mup" and not check["expected_to_pass"]
    return {"linestyle": "--", "markerfacecolor": "white"} if known_to_fail else {}


def _draw_tolerance(axes: Axes, results: Mapping[str, Any]) -> None:
    growth = (np.array(results["sizes"]) / results["sizes"][0]) ** results["tolerance"]
    axes.fill_between(results["sizes"], 1 / growth, growth, color="0.88", linewidth=0)


def _log2_axes(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
