"""Does the best value of a hyperparameter stay where it is when the model grows?

A curve is a list of `(value, losses)`: a value of the hyperparameter and the validation loss of
each seed, None where a run diverged.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Losses = Sequence[float | None]
Curve = Sequence[tuple[float, Losses]]

# The loss, in nats, that a larger ε may cost before it counts as too large: above the noise of the
# seeds of small models.
MARGIN = 0.05


class Optimum(NamedTuple):
    """The best value of one curve.

    Attributes:
      value: where a parabola through the lowest mean loss and its two neighbours, in log2 of the
        value, has its minimum.
      low, high: the least and greatest of the same for each seed alone.
      loss: the lowest mean loss of those tried.
      at_edge: whether it had no neighbour on one side; `value` is then the one tried.
    """

    value: float
    low: float
    high: float
    loss: float
    at_edge: bool


def mean_losses(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Ascending positive values and the mean loss of each, infinite where a seed diverged."""
    points = sorted((v, [math.inf if x is None else x for x in xs]) for v, xs in curve if v > 0)
    return np.array([v for v, _ in points]), np.array([np.mean(xs) for _, xs in points])


def optimum(curve: Curve) -> Optimum | None:
    """The best value; None where no value trains on every seed.

    Args:
      curve: values spaced by a constant factor near the best.
    """
    values, losses = mean_losses(curve)
    if not np.isfinite(losses).any():
        return None
    value, at_edge = _vertex(values, losses)
    seeds = range(min(len(xs) for _, xs in curve))
    alone = [_vertex(*mean_losses([(v, [xs[i]]) for v, xs in curve]))[0] for i in seeds]
    return Optimum(value, min(alone), max(alone), float(losses.min()), at_edge)


def largest_harmless(curve: Curve, margin: float = MARGIN) -> Optimum | None:
    """The value, interpolated in its log2, from which on the loss exceeds the lowest by `margin`.

    Of a hyperparameter that costs nothing while it is small, such as ε.

    Args:
      curve: from values too small to matter to values that cost more than `margin`.
      margin: in nats.

    Returns:
      As `optimum`; `at_edge` where no value tried costs as much, and `value` is then the last.
    """
    values, losses = mean_losses(curve)
    if not np.isfinite(losses).any():
        return None
    value, at_edge = _crossing(values, losses, margin)
    seeds = range(min(len(xs) for _, xs in curve))
    alone = [_crossing(*mean_losses([(v, [xs[i]]) for v, xs in curve]), margin)[0] for i in seeds]
    return Optimum(value, min(alone), max(alone), float(losses.min()), at_edge)


def parabola_minimum(losses: Mapping[Any, float]) -> tuple[float, ...]:
    """The hyperparameters at the minimum of a parabola in log2 through the best and its neighbours.

    The parabola has products of the hyperparameters too, and goes by least squares through all
    points that are at most one step of the grid from the best. Where that has no minimum, each
    hyperparameter has a parabola of its own, through the best and its two neighbours.

    Args:
      losses: mean loss (inf: diverged) by point, a tuple, of a grid whose axes are positive and
        spaced by constant factors.

    Returns:
      A point that is at most one step from the best; along an axis at whose edge the best stands,
      or that has one value, the best.

    Example:
      >>> grid = [(x, y) for x in (1.0, 2.0, 4.0) for y in (1.0, 2.0, 4.0)]
      >>> bowl = lambda x, y: (math.log2(x) - 1.2) ** 2 + (math.log2(y) - 0.9) ** 2
      >>> [round(math.log2(v), 3) for v in parabola_minimum({p: bowl(*p) for p in grid})]
      [1.2, 0.9]
    """
    best = min(losses, key=losses.__getitem__)
    alone = tuple(
        _vertex(*_line(losses, best, axis))[0] if math.isfinite(losses[best]) else best[axis]
        for axis in range(len(best))
    )
    at = np.log2(np.array([*losses]) / np.array(best))
    inside = [i for i in range(len(best)) if at[:, i].min() < -1e-9 and at[:, i].max() > 1e-9]
    if len(inside) < 2:
        return alone
    step = np.array([np.abs(at[:, i])[np.abs(at[:, i]) > 1e-9].min() for i in inside])
    x, y = at[:, inside] / step, np.array([*losses.values()])
    # Along the other axes only what the best has.
    others = np.delete(at, inside, axis=1)
    near = (np.abs(x) < 1.5).all(1) & np.isfinite(y) & (np.abs(others) < 1e-9).all(1)
    x, y, n = x[near], y[near], len(inside)
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    design = np.stack([np.ones(len(x)), *x.T, *(x[:, i] * x[:, j] for i, j in pairs)], axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return alone
    coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    hessian = np.zeros((n, n))
    for (i, j), c in zip(pairs, coefficients[1 + n :], strict=True):
        hessian[i, j] += c
        hessian[j, i] += c
    if np.linalg.eigvalsh(hessian).min() <= 0:
        return alone
    minimum = np.clip(np.linalg.solve(hessian, -coefficients[1 : 1 + n]), -1, 1)
    found = list(alone)
    for i, shift in zip(inside, minimum * step, strict=True):
        found[i] = float(best[i] * 2**shift)
    return tuple(found)


def _line(
    losses: Mapping[Any, float], best: tuple[float, ...], axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values along one axis through the best point, ascending, and their losses."""
    same = lambda point: all(i == axis or x == best[i] for i, x in enumerate(point))
    pairs = sorted((point[axis], loss) for point, loss in losses.items() if same(point))
    values, found = np.array(pairs).T
    return values, found


def drift_per_doubling(sizes: ArrayLike, best: ArrayLike) -> float:
    """a of best ∝ size^a, by least squares in logarithms: 0 where the best value transfers."""
    return float(np.polyfit(np.log2(sizes), np.log2(best), 1)[0])


def loss_of(curve: Curve, value: float) -> float | None:
    """The mean loss at the tried value nearest to `value`, by ratio; None where it diverged.

    Raises:
      ValueError: no tried value is within a factor of √2.
    """
    values, losses = mean_losses(curve)
    nearest = int(np.argmin(np.abs(np.log(values / value))))
    if abs(math.log2(values[nearest] / value)) > 0.5:
        raise ValueError(f"value {value:g} was not tried: nearest is {values[nearest]:g}")
    return float(losses[nearest]) if np.isfinite(losses[nearest]) else None


def summarize_sweep(
    curves: Mapping[float, Curve], *, carried: float = 0.0, harmless: bool = False
) -> dict[str, Any] | None:
    """What a curve at each of several sizes says of the transfer.

    Args:
      curves: by size, ascending; the first is the base.
      carried: exponent of the size by which the base's value is carried to another size.
      harmless: whether the best is the largest value that costs nothing, rather than the one with
        the least loss.

    Returns:
      None where a size has no best value. Else "best" by size (of `Optimum`); "drift", the exponent
      of the best value in the size beyond `carried`, with "drift_low" and "drift_high" the least
      and greatest over seeds; "drift_factor", the same over all sizes as a factor; "lost", in nats
      and by size: how much more the base's best tried value loses, carried to that size, than the
      best tried there (None: diverged).
    """
    find = largest_harmless if harmless else optimum
    best = {size: find(curve) for size, curve in curves.items()}
    if any(one is None for one in best.values()):
        return None
    found = {size: one for size, one in best.items() if one is not None}
    sizes = np.array(list(found))
    slopes = {
        name: drift_per_doubling(sizes, [getattr(one, name) for one in found.values()]) - carried
        for name in ("value", "low", "high")
    }
    base = sizes[0]
    tuned = _tried_best(curves[base], found[base], harmless)
    lost = {}
    for size, curve in curves.items():
        loss = loss_of(curve, tuned * (size / base) ** carried)
        lost[size] = None if loss is None else loss - float(np.min(mean_losses(curve)[1]))
    return {
        "best": {size: one._asdict() for size, one in found.items()},
        "drift": slopes["value"],
        "drift_low": min(slopes.values()),
        "drift_high": max(slopes.values()),
        "drift_factor": float((sizes[-1] / base) ** slopes["value"]),
        "lost": lost,
    }


def _tried_best(curve: Curve, best: Optimum, harmless: bool) -> float:
    """The tried value that someone who tuned at this size would have taken."""
    values, losses = mean_losses(curve)
    if harmless:
        return float(values[values <= best.value * (1 + 1e-9)][-1])
    return float(values[np.argmin(losses)])


def _vertex(values: np.ndarray, losses: np.ndarray) -> tuple[float, bool]:
    i = int(np.argmin(losses))
    around = slice(i - 1, i + 2)
    if not (0 < i < len(values) - 1 and np.isfinite(losses[around]).all()):
        return float(values[i]), not 0 < i < len(values) - 1
    a, b, _ = np.polyfit(np.log2(values[around] / values[i]), losses[around], 2)
    # Flat to rounding: the middle.
    return float(values[i] * 2 ** (-b / (2 * a) if a > 0 else 0.0)), False


def _crossing(values: np.ndarray, losses: np.ndarray, margin: float) -> tuple[float, bool]:
    excess = losses - losses.min() - margin
    i = int(np.flatnonzero(excess <= 0)[-1])
    if i == len(values) - 1:
        return float(values[i]), True
    if not math.isfinite(excess[i + 1]):
        return float(values[i]), False
    share = -excess[i] / (excess[i + 1] - excess[i])
    return float(values[i] * (values[i + 1] / values[i]) ** share), False
