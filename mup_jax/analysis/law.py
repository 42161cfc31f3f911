"""Scaling laws: the loss as an irreducible part and a power of the compute, L(C) = E + A·C^(−α)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares  # type: ignore[import-untyped]

LEAST_EXPONENT = 1e-3
LARGEST_EXPONENT = 2.0

# Three parameters, and one point more so that the fit can be wrong.
LEAST_POINTS = 4

# Seeds and imperfect tuning move a loss by a few tenths of a percent; a law that misses its points
# by more than 1% is not the law of these points.
_PLAUSIBLE_MISS = 0.01


class ScalingLaw(NamedTuple):
    """L(C) = irreducible + coefficient · C^(−exponent).

    Attributes:
      irreducible: E, in units of the loss, not negative.
      coefficient: A, in units of the loss times compute^exponent.
      exponent: α.
      points: number of points that were fitted.
      doubt: empty, or sentences on why the fit should not be trusted.
    """

    irreducible: float
    coefficient: float
    exponent: float
    points: int
    doubt: str

    def loss(self, compute: ArrayLike) -> np.ndarray:
        """Returns the loss at `compute`, in the unit of the fit and of any shape."""
        compute = np.asarray(compute, dtype=np.float64)
        return np.asarray(self.irreducible + self.coefficient * compute**-self.exponent)

    def compute(self, loss: ArrayLike) -> np.ndarray:
        """Returns the compute at which the law reaches `loss`; inf where it never does."""
        return np.exp(log_compute_for(loss, self.irreducible, self.coefficient, self.exponent))


def fit_scaling_law(compute: ArrayLike, loss: ArrayLike, *, delta: float = 1e-3) -> ScalingLaw:
    """Fits L(C) = E + A·C^(−α) with E ≥ 0 and 0.001 ≤ α ≤ 2.

    The sum over points of Huber's loss of log L − log L(C) is minimised from a grid of starts. With
    the default `delta`, points that miss the law by more than 0.1% pull with a constant force, so
    one bad point bends the law little. `delta` of inf is least squares, the law that
    `multiplier_interval` reads.

    Args:
      compute: FLOPs (or any unit of cost) of each run, shape (points,), any order.
      loss: their final losses, shape (points,).
      delta: relative miss of the loss from which a point counts as an outlier.

    Raises:
      ValueError: fewer than four different computes, values that are not positive and finite, or
        shapes that do not match.

    References:
      Hoffmann et al., arXiv 2203.15556, appendix D.2.
    """
    compute, loss = checked_points(compute, loss)
    if not delta > 0:
        raise ValueError(f"delta is {delta}: choose a positive one, inf for least squares")
    middle = np.exp(np.mean(np.log(compute)))
    log_compute, log_loss = np.log(compute / middle), np.log(loss)

    def miss(parameters: np.ndarray) -> np.ndarray:
        irreducible, log_coefficient, exponent = parameters
        return np.log(irreducible + np.exp(log_coefficient - exponent * log_compute)) - log_loss

    def slopes(parameters: np.ndarray) -> np.ndarray:
        irreducible, log_coefficient, exponent = parameters
        power = np.exp(log_coefficient - exponent * log_compute)
        columns = [np.ones_like(power), power, -power * log_compute]
        return np.stack(columns, axis=-1) / (irreducible + power)[:, None]

    lowest, typical = loss.min(), np.exp(log_loss.mean())
    bounds = (
        [0, np.log(lowest) - 30, LEAST_EXPONENT],
        [np.inf, np.log(loss.max()) + 1, LARGEST_EXPONENT],
    )
    starts = [
        (share * lowest, np.log(typical - share * lowest), exponent)
        for share in (0.0, 0.4, 0.8)
        for exponent in (0.05, 0.2, 0.8)
    ]
    first = [float(x) for x in least_squares_laws(compute, loss)]
    starts.append((first[0], np.log(abs(first[1])) - first[2] * np.log(middle), first[2]))
    fits = [
        least_squares(
            miss,
            np.clip(start, bounds[0], bounds[1]),
            slopes,
            bounds,
            loss="linear" if np.isinf(delta) else "huber",
            f_scale=1.0 if np.isinf(delta) else delta,
            x_scale="jac",
            ftol=1e-12,
            xtol=1e-12,
            gtol=1e-14,
        )
        for start in starts
    ]
    best = min(fits, key=lambda fit: fit.cost)
    irreducible, log_coefficient, exponent = (float(x) for x in best.x)
    return ScalingLaw(
        irreducible=irreducible,
        coefficient=float(np.exp(log_coefficient + exponent * np.log(middle))),
        exponent=exponent,
        points=loss.size,
        doubt=_doubt(compute, loss, irreducible, exponent, miss(best.x)),
    )


def least_squares_laws(
    compute: ArrayLike, loss: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits many laws at once by least squares of the relative miss: E, A and α, each (...).

    For a given α the law is linear in E and A, so only α is searched, on a grid that narrows.

    Args:
      compute: shape (points,).
      loss: shape (..., points).
    """
    log_compute = np.log(np.asarray(compute, dtype=np.float64))
    middle = log_compute.mean()
    # Points go first: numpy sums over a short last axis slowly.
    loss = np.moveaxis(np.asarray(loss, dtype=np.float64), -1, 0)[..., None]
    log_compute = (log_compute - middle).reshape(-1, *(1,) * (loss.ndim - 1))
    grid = np.linspace(np.log(LEAST_EXPONENT), np.log(LARGEST_EXPONENT), 24)
    step = grid[1] - grid[0]
    grid = np.broadcast_to(grid, (*loss.shape[1:-1], grid.size))
    for _ in range(7):
        exponent = np.exp(grid)
        irreducible, coefficient, misses = _linear_fit(np.exp(-exponent * log_compute), loss)
        best = np.argmin(misses, axis=-1)[..., None]
        center = np.take_along_axis(grid, best, axis=-1)
        fit = [np.take_along_axis(x, best, axis=-1) for x in (irreducible, coefficient, exponent)]
        grid = center + step * np.linspace(-1, 1, 9)
        grid = np.clip(grid, np.log(LEAST_EXPONENT), np.log(LARGEST_EXPONENT))
        step = step / 4
    irreducible, coefficient, exponent = (x[..., 0] for x in fit)
    return irreducible, coefficient * np.exp(exponent * middle), exponent


def log_compute_for(
    loss: ArrayLike, irreducible: ArrayLike, coefficient: ArrayLike, exponent: ArrayLike
) -> np.ndarray:
    """Returns the log of the compute at which a law reaches `loss`; inf where it never does."""
    above = np.maximum(np.asarray(loss) - irreducible, 0)
    with np.errstate(divide="ignore"):
        return np.asarray((np.log(np.abs(coefficient)) - np.log(above)) / exponent)


def checked_points(
    compute: ArrayLike, loss: ArrayLike, *, prefix: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float arrays of shape (points,), or raises what `fit_scaling_law` raises."""
    compute = positive(f"{prefix}compute", compute)
    loss = positive(f"{prefix}loss", loss)
    if compute.ndim != 1 or compute.shape != loss.shape:
        raise ValueError(
            f"{prefix}compute has shape {compute.shape} and {prefix}loss {loss.shape}: "
            "pass two lists of one length"
        )
    different = np.unique(compute).size
    if different < LEAST_POINTS:
        raise ValueError(
            f"{prefix}compute has {different} different values, and a law of three parameters "
            f"needs {LEAST_POINTS}: run another rung, or interpolate"
        )
    return compute, loss


def positive(name: str, values: ArrayLike) -> np.ndarray:
    """Returns a float array, or raises a ValueError that names the first value not positive."""
    array = np.asarray(values, dtype=np.float64)
    bad = array[~(np.isfinite(array) & (array > 0))]
    if bad.size:
        raise ValueError(
            f"{name} has {bad[0]}, and logarithms need positive finite values: leave that run out"
        )
    return array


def _linear_fit(power: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E ≥ 0, A and the sum of squared relative misses, summed over the first axis."""
    weight = loss**-2.0
    total = weight.sum(0)
    mean_power = (weight * power).sum(0) / total
    mean_loss = (weight * loss).sum(0) / total
    weighted = weight * (power - mean_power)
    coefficient = (weighted * loss).sum(0) / (weighted * power).sum(0)
    irreducible = mean_loss - coefficient * mean_power
    relative = power / loss
    alone = relative.sum(0) / (relative**2).sum(0)
    coefficient = np.where(irreducible < 0, alone, coefficient)
    irreducible = np.maximum(irreducible, 0)
    return (
        irreducible,
        coefficient,
        np.sum((irreducible / loss + coefficient * relative - 1) ** 2, 0),
    )


def _doubt(
    compute: np.ndarray, loss: np.ndarray, irreducible: float, exponent: float, miss: np.ndarray
) -> str:
    different = np.unique(compute).size
    doubts = []
    if different < LEAST_POINTS + 1:
        doubts.append(
            f"{different} different computes leave one degree of freedom to see a misfit with: "
            "intervals of multipliers read off the law are wider than they need be where rungs "
            "miss it by seed noise alone, and too narrow where they miss it by much more."
        )
    if irreducible < 1e-6 * loss.min():
        doubts.append("The irreducible loss is at its bound, 0: the points show no bend.")
    if irreducible > 0.99 * loss.min():
        doubts.append(
            f"The irreducible loss, {irreducible:.4g}, is within 1% of the lowest loss, "
            f"{loss.min():.4g}: more compute would gain nothing."
        )
    if exponent < 1.01 * LEAST_EXPONENT or exponent > 0.99 * LARGEST_EXPONENT:
        doubts.append(f"The exponent, {exponent:.4g}, is at a bound.")
    typical_miss = np.sqrt(np.sum(miss**2) / (miss.size - 3))
    if typical_miss > _PLAUSIBLE_MISS:
        doubts.append(
            f"The points miss the law by {100 * typical_miss:.2g}%, more than noise is likely to."
        )
    return " ".join(doubts)
