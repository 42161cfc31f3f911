"""Compute multipliers: how much less compute an optimizer needs than the baseline for one loss.

The estimator is that of arXiv 2512.05620, section 5: the baseline's loss-compute points are joined
by straight lines in log-log and prolonged from the outermost two. The interval is ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class MultiplierInterval(NamedTuple):
    """Arrays of shape (rungs,): point estimate, interval, and whether the estimate extrapolates.

    Where the seed noise is so large that the baseline's losses may not decrease with compute at
    all, the interval is unbounded: `low` is 0 and `high` is inf.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    extrapolated: np.ndarray


def compute_multiplier(
    compute: ArrayLike, loss: ArrayLike, *, baseline_compute: ArrayLike, baseline_loss: ArrayLike
) -> np.ndarray:
    """Returns (the baseline's compute for the same loss) / (the compute spent).

    Losses between two baseline points are interpolated linearly in log loss and log compute, losses
    beyond them are extrapolated from the nearest two points.

    Args:
      compute: FLOPs (or any unit of cost) of each run, of the shape of `loss` or one number.
      loss: final losses, of any shape.
      baseline_compute: FLOPs of the baseline's runs in the same unit, shape (points,), any order.
      baseline_loss: their final losses, shape (points,).

    Returns:
      Multipliers of the shape of `loss`; 1 is parity, 2 is half of the baseline's compute.

    Raises:
      ValueError: fewer than two baseline points, values that are not positive, a baseline whose
        loss does not decrease strictly with compute, or shapes that do not match.

    References:
      Qiu et al., arXiv 2512.05620, section 5 and tables 3 and 4.
    """
    compute = _positive("compute", compute)
    loss = _positive("loss", loss)
    if compute.shape not in ((), loss.shape):
        raise ValueError(
            f"compute has shape {compute.shape} and loss {loss.shape}: pass one compute per loss"
        )
    curve_compute, curve_loss = _baseline_curve(baseline_compute, baseline_loss)
    log_needed = _log_baseline_compute(
        np.log(loss).ravel(), np.log(curve_compute), np.log(curve_loss)
    )
    return np.exp(log_needed).reshape(loss.shape) / compute


def is_extrapolated(loss: ArrayLike, *, baseline_loss: ArrayLike) -> np.ndarray:
    """Returns a bool of the shape of `loss`: True outside the range of the baseline's losses."""
    loss = _positive("loss", loss)
    baseline_loss = _positive("baseline_loss", baseline_loss)
    return np.asarray((loss < baseline_loss.min()) | (loss > baseline_loss.max()))


def pooled_noise(losses: Sequence[ArrayLike]) -> tuple[float, int]:
    """Returns the standard deviation of log loss over seeds, and its degrees of freedom.

    One noise level is assumed for all cells, because two or three seeds say next to nothing about
    the spread of a single one. Cells of one seed are allowed and count nothing.

    Args:
      losses: one array of per-seed final losses per cell.

    Raises:
      ValueError: values that are not positive, or no cell of two seeds.
    """
    logs = [np.log(_positive("losses", cell)) for cell in losses]
    dof = sum(cell.size - 1 for cell in logs)
    if dof < 1:
        raise ValueError(f"{len(logs)} cells of one seed show no noise: run a second seed")
    squares = sum(float(np.sum((cell - cell.mean()) ** 2)) for cell in logs)
    return float(np.sqrt(squares / dof)), dof


def multiplier_interval(
    compute: ArrayLike,
    losses: Sequence[ArrayLike],
    *,
    baseline_compute: ArrayLike,
    baseline_losses: Sequence[ArrayLike],
    confidence: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
) -> MultiplierInterval:
    """Compute multipliers with an interval for the noise between seeds.

    A bootstrap of two or three seeds is degenerate. Instead all cells, of the optimizer and of the
    baseline, are assumed to share one standard deviation of log loss (`pooled_noise`, with Σ(n−1)
    degrees of freedom); the mean log losses of both curves are drawn around the measured ones from
    a multivariate t-distribution (normal draws times one draw of the common scale), and the
    interval holds the central draws of the multiplier. It covers noise between seeds and nothing
    else: neither how well learning rates were tuned, nor how far a power law can be prolonged.

    Args:
      compute: FLOPs of each rung, shape (rungs,).
      losses: per rung, the final losses of its seeds.
      baseline_compute: FLOPs of each rung of the baseline, shape (points,).
      baseline_losses: per rung of the baseline, the final losses of its seeds.
      confidence: probability that the interval is meant to cover, between 0 and 1.
      draws: number of draws.
      seed: of the draws.

    Raises:
      ValueError: fewer than two seeds in any cell, a confidence outside (0, 1), and all that
        `compute_multiplier` raises.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: choose one between 0 and 1")
    seeds = np.array([np.size(cell) for cell in losses])
    baseline_seeds = np.array([np.size(cell) for cell in baseline_losses])
    for name, counts in (("losses", seeds), ("baseline_losses", baseline_seeds)):
        if np.any(counts < 2):
            raise ValueError(
                f"{name} has {counts.min()} seed at rung {counts.argmin()}: run two or more"
            )
    noise, dof = pooled_noise([*losses, *baseline_losses])

    loss = np.array([np.mean(np.asarray(cell)) for cell in losses])
    baseline_loss = np.array([np.mean(np.asarray(cell)) for cell in baseline_losses])
    value = compute_multiplier(
        compute, loss, baseline_compute=baseline_compute, baseline_loss=baseline_loss
    )

    order = np.argsort(baseline_compute)
    log_curve_compute = np.log(np.asarray(baseline_compute, dtype=np.float64)[order])
    random = np.random.default_rng(seed)
    scale = noise * np.sqrt(dof / random.chisquare(dof, size=(draws, 1)))
    log_loss = np.log(loss) + scale / np.sqrt(seeds) * random.normal(size=(draws, loss.size))
    log_curve_loss = np.log(baseline_loss[order]) + scale / np.sqrt(
        baseline_seeds[order]
    ) * random.normal(size=(draws, order.size))
    decreasing = np.all(np.diff(log_curve_loss) < 0, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_needed = _log_baseline_compute(log_loss, log_curve_compute, log_curve_loss)
    log_multiplier = log_needed - np.log(np.asarray(compute, dtype=np.float64))

    # A draw of a baseline that does not improve with compute could mean any multiplier, so it
    # counts against both ends.
    tail = (1 - confidence) / 2
    lowest = np.where(decreasing[:, None], log_multiplier, -np.inf)
    highest = np.where(decreasing[:, None], log_multiplier, np.inf)
    return MultiplierInterval(
        value=value,
        low=np.exp(np.quantile(lowest, tail, axis=0, method="lower")),
        high=np.exp(np.quantile(highest, 1 - tail, axis=0, method="higher")),
        extrapolated=is_extrapolated(loss, baseline_loss=baseline_loss),
    )


def _log_baseline_compute(
    log_loss: np.ndarray, log_curve_compute: np.ndarray, log_curve_loss: np.ndarray
) -> np.ndarray:
    """Reads the curve at `log_loss` (..., rungs); the curve's losses are (..., points)."""
    below = log_curve_loss[..., None, 1:-1] > log_loss[..., None]
    segment = np.sum(below, axis=-1)
    points = np.broadcast_to(log_curve_loss, (*segment.shape[:-1], log_curve_loss.shape[-1]))
    left = np.take_along_axis(points, segment, axis=-1)
    right = np.take_along_axis(points, segment + 1, axis=-1)
    step = log_curve_compute[segment + 1] - log_curve_compute[segment]
    return log_curve_compute[segment] + (log_loss - left) / (right - left) * step


def _baseline_curve(compute: ArrayLike, loss: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    compute = _positive("baseline_compute", compute)
    loss = _positive("baseline_loss", loss)
    if compute.ndim != 1 or compute.shape != loss.shape:
        raise ValueError(
            f"baseline_compute has shape {compute.shape} and baseline_loss {loss.shape}: "
            "pass two lists of one length"
        )
    if compute.size < 2:
        raise ValueError(
            f"the baseline has {compute.size} point and a line needs two: run another rung"
        )
    order = np.argsort(compute)
    compute, loss = compute[order], loss[order]
    for i in range(compute.size - 1):
        if not (compute[i] < compute[i + 1] and loss[i] > loss[i + 1]):
            raise ValueError(
                f"the baseline's loss goes from {loss[i]:.6g} at {compute[i]:.4g} FLOPs to "
                f"{loss[i + 1]:.6g} at {compute[i + 1]:.4g}, and must decrease: tune the larger "
                "run, average more seeds, or leave one of the two out"
            )
    return compute, loss


def _positive(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    bad = array[~(np.isfinite(array) & (array > 0))]
    if bad.size:
        raise ValueError(
            f"{name} has {bad[0]}, and logarithms need positive finite values: leave that run out"
        )
    return array
