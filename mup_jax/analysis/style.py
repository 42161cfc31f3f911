"""What all figures share: colours, axes, and no pyplot with its global state."""

import itertools
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, NullLocator, StrMethodFormatter

# Okabe and Ito's palette, told apart by colour-blind eyes; its yellow is too pale for lines.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure = Figure(figsize=(7, 4.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    style_axes(axes, x_label, y_label)
    return figure, axes


def style_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, and a grid behind the data."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def styles() -> Iterator[dict[str, Any]]:
    """Colour and marker of one line after another."""
    # Cycles of different lengths: pairs repeat only after 42.
    for colour, marker in zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False):
        yield {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.5}


def plain_log_scale(axes: Axes) -> None:
    """A log scale that spans less than a decade, with round numbers on it."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(AutoLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
