"""The best tokens per parameter of a budget of training compute, with an interval.

At each budget a parabola of the loss in log tokens per parameter, through the lowest mean loss and
at most two neighbours to either side; its lowest point is the best. The estimator without interval
is that of Hoffmann et al. (arXiv 2203.15556), approach 2.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mup_jax.analysis.multiplier import pooled_noise

# Neighbours of the lowest to either side: further away a loss is no parabola any more.
_REACH = 2


class Curve(NamedTuple):
    """The models of one optimizer that were trained with one budget.

    Attributes:
      tokens_per_parameter: of each model, any order.
      losses: per model, the final loss of each seed; None where a run diverged.
    """

    tokens_per_parameter: Sequence[float]
    losses: Sequence[Sequence[float | None]]


class Vertex(NamedTuple):
    """The lowest point of a curve.

    Attributes:
      value: its tokens per parameter; None where `problem` says why there is none.
      low, high: the interval of `value`; 0 and None where noise could have turned the parabola
        over, both None where there is no value, or nothing to estimate the noise from.
      loss: the parabola's there.
      problem: empty, or why nothing is claimed.
      parabola: its coefficients in log tokens per parameter, highest first; None where fewer than
        three models trained.
      fitted: the least and greatest tokens per parameter that it was fitted to.
    """

    value: float | None
    low: float | None
    high: float | None
    loss: float | None
    problem: str
    parabola: list[float] | None
    fitted: tuple[float, float] | None


class Combined(NamedTuple):
    """Geometric mean over the budgets of one optimizer, with its interval; None as in `Vertex`."""

    value: float | None
    low: float | None
    high: float | None


class _Fit(NamedTuple):
    x: np.ndarray  # log tokens per parameter
    y: np.ndarray  # mean losses
    seeds: np.ndarray
    coefficients: np.ndarray
    problem: str

    @property
    def relative_residuals(self) -> np.ndarray:
        return (self.y - np.polyval(self.coefficients, self.x)) / self.y.mean()


def optima(
    curves: Sequence[Sequence[Curve]],
    *,
    confidence: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> list[tuple[list[Vertex], Combined]]:
    """The best tokens per parameter of each optimizer at each budget, and over all budgets.

    The mean losses are drawn around the measured ones and parabolas fitted to the draws. One
    relative noise is assumed of all curves, for which there are two estimates: the spread between
    seeds (`pooled_noise`), and the residuals of the parabolas, which also show where the loss is
    none. The larger counts, with its degrees of freedom (a t-distribution). What the interval does
    not cover: learning rates that are not the best of their model, and budgets beyond those tried.

    Args:
      curves: of each optimizer one for each budget.
      confidence: probability that the interval is meant to cover, between 0 and 1.
      draws: number of draws.
      seed: of the draws.

    Raises:
      ValueError: a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: choose one between 0 and 1")
    fits = [[_fit(curve) for curve in of_optimizer] for of_optimizer in curves]
    scale = _Scale([curve for of_optimizer in curves for curve in of_optimizer],
                   [fit for of_optimizer in fits for fit in of_optimizer if fit])  # fmt: skip
    random = np.random.default_rng(seed)
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    summaries = []
    for of_optimizer in fits:
        common = scale.draw(random, draws)
        drawn = [_drawn_vertices(fit, common, scale, random) for fit in of_optimizer]
        vertices = [_vertex(fit, d, tails) for fit, d in zip(of_optimizer, drawn, strict=True)]
        summaries.append((vertices, _combined(vertices, drawn, tails)))
    return summaries


class _Scale:
    """The standard deviation of a mean loss around its parabola, relative to the loss."""

    def __init__(self, curves: Sequence[Curve], fits: Sequence[_Fit]):
        squares = sum(float(np.sum(fit.relative_residuals**2)) for fit in fits)
        dof = sum(fit.x.size - 3 for fit in fits)
        residual = math.sqrt(squares / dof) if dof else 0.0
        cells = [[x for x in losses if x is not None] for c in curves for losses in c.losses]
        cells = [cell for cell in cells if len(cell) > 1]
        noise, seeds_dof = pooled_noise(cells) if cells else (0.0, 0)
        most = max((int(fit.seeds.max()) for fit in fits), default=1)
        # Residuals are of means: those of several seeds have less noise.
        self.of_means = dof > 0 and residual >= noise / math.sqrt(most)
        self.value, self.dof = (residual, dof) if self.of_means else (noise, seeds_dof)

    def draw(self, random: np.random.Generator, draws: int) -> np.ndarray | None:
        """Draws of the scale, shape (draws, 1); None where nothing shows any noise."""
        if not self.dof:
            return None
        return self.value * np.sqrt(self.dof / random.chisquare(self.dof, size=(draws, 1)))

    def of(self, fit: _Fit) -> np.ndarray:
        """The factor of each model."""
        return fit.y.mean() / (1.0 if self.of_means else np.sqrt(fit.seeds))


def _fit(curve: Curve) -> _Fit | None:
    """None where fewer than three models trained with every seed."""
    points = sorted(
        (math.log(ratio), losses)
        for ratio, losses in zip(curve.tokens_per_parameter, curve.losses, strict=True)
        if losses and None not in losses
    )
    if len(points) < 3:
        return None
    y = np.array([np.mean(np.asarray(losses, dtype=float)) for _, losses in points])
    x = np.array([ratio for ratio, _ in points])
    lowest = int(np.argmin(y))
    # At least three points, where the lowest is the last of them too.
    first = min(max(lowest - _REACH, 0), len(points) - 3)
    near = slice(first, max(lowest + _REACH + 1, 3))
    seeds = np.array([len(losses) for _, losses in points])[near]
    x, y = x[near], y[near]
    coefficients = np.polyfit(x, y, 2)
    if coefficients[0] <= 0:
        problem = "the parabola opens downward"
    elif lowest == 0 or _lowest_point(coefficients) < x[0]:
        problem = f"the best is at the edge of what was tried, {math.exp(x[0]):.2g} or below"
    elif lowest == len(points) - 1 or _lowest_point(coefficients) > x[-1]:
        problem = f"the best is at the edge of what was tried, {math.exp(x[-1]):.2g} or above"
    else:
        problem = ""
    return _Fit(x, y, seeds, coefficients, problem)


def _lowest_point(coefficients: np.ndarray) -> float:
    return float(-coefficients[1] / (2 * coefficients[0]))


def _drawn_vertices(
    fit: _Fit | None, common: np.ndarray | None, scale: _Scale, random: np.random.Generator
) -> np.ndarray | None:
    """Log tokens per parameter, shape (draws,); nan where a drawn parabola opens downward."""
    if fit is None or common is None:
        return None
    losses = fit.y + common * scale.of(fit) * random.normal(size=(len(common), fit.x.size))
    a, b, _ = np.polyfit(fit.x, losses.T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, -b / (2 * a), np.nan)


def _vertex(fit: _Fit | None, drawn: np.ndarray | None, tails: tuple[float, float]) -> Vertex:
    if fit is None:
        return Vertex(None, None, None, None, "fewer than three models trained", None, None)
    shape = fit.coefficients.tolist(), (math.exp(fit.x[0]), math.exp(fit.x[-1]))
    if fit.problem:
        return Vertex(None, None, None, None, fit.problem, *shape)
    best = _lowest_point(fit.coefficients)
    loss = float(np.polyval(fit.coefficients, best))
    return Vertex(math.exp(best), *_interval(drawn, tails), loss, "", *shape)


def _interval(
    drawn: np.ndarray | None, tails: tuple[float, float]
) -> tuple[float | None, float | None]:
    if drawn is None:
        return None, None
    # A parabola that opens downward could mean any minimum: it counts against both ends.
    lowest = np.where(np.isnan(drawn), -np.inf, drawn)
    highest = np.where(np.isnan(drawn), np.inf, drawn)
    low = np.quantile(lowest, tails[0], method="lower")
    high = np.quantile(highest, tails[1], method="higher")
    if np.isinf(low) or np.isinf(high):
        return 0.0, None
    return float(np.exp(low)), float(np.exp(high))


def _combined(
    vertices: Sequence[Vertex], drawn: Sequence[np.ndarray | None], tails: tuple[float, float]
) -> Combined:
    values = [vertex.value for vertex in vertices if vertex.value is not None]
    if not values or len(values) < len(vertices):
        return Combined(None, None, None)
    of_all = [of_budget for of_budget in drawn if of_budget is not None]
    mean = np.mean(of_all, axis=0) if of_all else None
    return Combined(float(np.exp(np.mean(np.log(values)))), *_interval(mean, tails))
