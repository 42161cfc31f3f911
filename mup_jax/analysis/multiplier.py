"""Compute multipliers: how much less compute an optimizer needs than the baseline for one loss.

There are two estimators of the baseline's compute for a loss. "interpolation" is that of arXiv
2512.05620, section 5: the baseline's loss-compute points are joined by straight lines in log-log
and prolonged from the outermost two. "law" reads the scaling law E + A·C^(−α) that fits the
baseline's points best. The intervals are ours.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from mup_jax.analysis.law import (
    LEAST_POINTS,
    checked_points,
    least_squares_laws,
    log_compute_for,
    positive,
)

Estimator = Literal["interpolation", "law"]


class MultiplierInterval(NamedTuple):
    """Arrays of shape (rungs,): point estimate, interval, and whether the estimate extrapolates.

    Where the seed noise is so large that the baseline's losses may not decrease with compute at
    all, the interval is unbounded: `low` is 0 and `high` is inf. A law never reaches losses below
    its irreducible one: `high`, and perhaps `value`, is then inf as well.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    extrapolated: np.ndarray


def compute_multiplier(
    compute: ArrayLike,
    loss: ArrayLike,
    *,
    baseline_compute: ArrayLike,
    baseline_loss: ArrayLike,
    estimator: Estimator = "interpolation",
) -> np.ndarray:
    """Returns (the baseline's compute for the same loss) / (the compute spent).

    By interpolation, losses between two baseline points are read linearly in log loss and log
    compute, losses beyond them from the nearest two points. By law, all are read from the least
    squares fit of `law.fit_scaling_law`, which need not pass through any point: the baseline's own
    multipliers are then near 1, not 1.

    Args:
      compute: FLOPs (or any unit of cost) of each run, of the shape of `loss` or one number.
      loss: final losses, of any shape.
      baseline_compute: FLOPs of the baseline's runs in the same unit, shape (points,), any order.
      baseline_loss: their final losses, shape (points,).
      estimator: "interpolation" or "law".

    Returns:
      Multipliers of the shape of `loss`; 1 is parity, 2 is half of the baseline's compute, and inf
      a loss that the law never reaches.

    Raises:
      ValueError: fewer than two baseline points, or four different ones for a law; values that are
        not positive; a baseline whose loss does not decrease strictly with compute, for a law on
        the whole; shapes that do not match, or an unknown estimator.

    References:
      Qiu et al., arXiv 2512.05620, section 5 and tables 3 and 4.
    """
    _check_estimator(estimator)
    compute = positive("compute", compute)
    loss = positive("loss", loss)
    if compute.shape not in ((), loss.shape):
        raise ValueError(
            f"compute has shape {compute.shape} and loss {loss.shape}: pass one compute per loss"
        )
    if estimator == "law":
        curve_compute, curve_loss = checked_points(
            baseline_compute, baseline_loss, prefix="baseline_"
        )
        log_needed, decreasing = _log_law_compute(
            np.log(loss).ravel(), np.log(curve_compute), np.log(curve_loss)
        )
        if not decreasing:
            raise ValueError(
                f"the law through the baseline's losses {curve_loss.tolist()} does not decrease "
                "with compute: tune the larger runs, or average more seeds"
            )
    else:
        curve_compute, curve_loss = _baseline_curve(baseline_compute, baseline_loss)
        log_needed = _log_baseline_compute(
            np.log(loss).ravel(), np.log(curve_compute), np.log(curve_loss)
        )
    with np.errstate(over="ignore"):  # of a nearly flat curve
        return np.exp(log_needed).reshape(loss.shape) / compute


def is_extrapolated(loss: ArrayLike, *, baseline_loss: ArrayLike) -> np.ndarray:
    """Returns a bool of the shape of `loss`: True outside the range of the baseline's losses."""
    loss = positive("loss", loss)
    baseline_loss = positive("baseline_loss", baseline_loss)
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
    logs = [np.log(positive("losses", cell)) for cell in losses]
    dof = sum(cell.size - 1 for cell in logs)
    if dof < 1:
        raise ValueError(f"{len(logs)} cells of one seed show no noise: run a second seed")
    squares = sum(float(np.sum((cell - cell.mean()) ** 2)) for cell in logs)
    return float(np.sqrt(squares / dof)), dof


def noise_band(
    compute: ArrayLike,
    loss: ArrayLike,
    *,
    baseline_compute: ArrayLike,
    baseline_loss: ArrayLike,
    noise: float = 1e-3,
    estimator: Estimator = "interpolation",
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the multipliers if each loss were higher, and if it were lower, by `noise`.

    It shows what a loss error of that size does to a multiplier, where there are too few seeds to
    measure the error itself. It is no interval: the baseline is taken as it is.

    Args:
      compute: as of `compute_multiplier`, like the others not named here.
      loss: final losses, of any shape.
      noise: relative error of the loss, between 0 and 1.

    Returns:
      (low, high) of the shape of `loss`.

    Raises:
      ValueError: a noise outside [0, 1), and all that `compute_multiplier` raises.
    """
    if not 0 <= noise < 1:
        raise ValueError(f"noise is {noise}: choose a part of the loss, between 0 and 1")
    loss = positive("loss", loss)
    low, high = (
        compute_multiplier(
            compute,
            loss * factor,
            baseline_compute=baseline_compute,
            baseline_loss=baseline_loss,
            estimator=estimator,
        )
        for factor in (1 + noise, 1 - noise)
    )
    return low, high


def leave_one_rung_out(
    compute: ArrayLike, loss: ArrayLike, *, baseline_compute: ArrayLike, baseline_loss: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the range of each interpolated multiplier over baselines that lack one inner rung.

    A curve that passes through its points cannot tell a badly tuned rung from a bend, so no
    interval holds that error; this shows how much a multiplier rests on a single rung. It is a
    sensitivity, not an interval: it has no confidence, and does not shrink with more seeds. The
    range holds the multiplier over the whole baseline, and is that alone where no inner rung
    matters. Outermost rungs are kept, because without them the estimate would be of another kind.

    Args:
      compute: as of `compute_multiplier`, like the others.
      loss: final losses, of any shape.

    Returns:
      (low, high) of the shape of `loss`.

    Raises:
      ValueError: fewer than three baseline points, and all that `compute_multiplier` raises.
    """
    curve_compute, curve_loss = _baseline_curve(baseline_compute, baseline_loss)
    if curve_loss.size < 3:
        raise ValueError(
            f"the baseline has {curve_loss.size} points and no inner one to leave out: run another "
            "rung"
        )
    kept = [np.arange(curve_loss.size) != left_out for left_out in range(1, curve_loss.size - 1)]
    multipliers = [
        compute_multiplier(
            compute, loss, baseline_compute=curve_compute[keep], baseline_loss=curve_loss[keep]
        )
        for keep in (np.full(curve_loss.size, True), *kept)
    ]
    return np.min(multipliers, axis=0), np.max(multipliers, axis=0)


def multiplier_interval(
    compute: ArrayLike,
    losses: Sequence[ArrayLike],
    *,
    baseline_compute: ArrayLike,
    baseline_losses: Sequence[ArrayLike],
    confidence: float = 0.9,
    draws: int = 2000,
    seed: int = 0,
    estimator: Estimator = "interpolation",
) -> MultiplierInterval:
    """Compute multipliers with an interval for the noise between seeds, by law also between rungs.

    A bootstrap of two or three seeds is degenerate. Instead all cells, of the optimizer and of the
    baseline, are assumed to share one standard deviation of log loss (`pooled_noise`, with Σ(n−1)
    degrees of freedom); the mean log losses of both curves are drawn around the measured ones from
    a multivariate t-distribution (normal draws times one draw of the common scale), and the
    interval holds the central draws of the multiplier.

    By interpolation it covers noise between seeds and nothing else: neither how well learning rates
    were tuned, nor how far a power law can be prolonged (see `leave_one_rung_out`).

    By law every draw is fitted anew, and every rung of both curves is drawn a deviation from its
    law, as imperfect tuning makes one. The size of the deviations is known only from how far the
    rungs miss their laws beyond seed noise, with points − 3 degrees of freedom for each curve of
    four rungs or more. So it is drawn as well, from its posterior under DuMouchel's prior:
    (seed noise)/(seed noise + deviation) uniform between 0 and 1. On
    simulated ladders of six rungs, 90% intervals held the truth in 94-96% of cases where rungs did
    not deviate, 91% where they did by as much as seed noise, and 88-89% by three times as much; of
    four rungs, in 97%, 92-94% and 83-89%. Losses that no rung has reached are covered only as far
    as the law holds there.

    Args:
      compute: FLOPs of each rung, shape (rungs,).
      losses: per rung, the final losses of its seeds.
      baseline_compute: FLOPs of each rung of the baseline, shape (points,).
      baseline_losses: per rung of the baseline, the final losses of its seeds.
      confidence: probability that the interval is meant to cover, between 0 and 1.
      draws: number of draws.
      seed: of the draws.
      estimator: "interpolation" or "law".

    Raises:
      ValueError: fewer than two seeds in any cell, a confidence outside (0, 1), and all that
        `compute_multiplier` raises.

    References:
      DuMouchel and Normand, "Computer-modeling and graphical strategies for meta-analysis", 2000.
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
        compute,
        loss,
        baseline_compute=baseline_compute,
        baseline_loss=baseline_loss,
        estimator=estimator,
    )

    order = np.argsort(baseline_compute)
    curve_compute = np.asarray(baseline_compute, dtype=np.float64)[order]
    curve_loss, curve_seeds = baseline_loss[order], baseline_seeds[order]
    random = np.random.default_rng(seed)
    if estimator == "law":
        rungs = np.broadcast_to(np.asarray(compute, dtype=np.float64), loss.shape)
        misses = [_misses(rungs, loss), _misses(curve_compute, curve_loss)]
        typical_seeds = float(1 / np.mean(1 / np.concatenate([seeds, curve_seeds])))
        scale, deviation = _draw_scales(noise, dof, misses, typical_seeds, draws, random)
    else:
        scale = noise * np.sqrt(dof / random.chisquare(dof, size=(draws, 1)))
        deviation = np.zeros_like(scale)
    log_loss = np.log(loss) + np.hypot(scale / np.sqrt(seeds), deviation) * random.normal(
        size=(draws, loss.size)
    )
    log_curve_loss = np.log(curve_loss) + np.hypot(
        scale / np.sqrt(curve_seeds), deviation
    ) * random.normal(size=(draws, curve_loss.size))
    with np.errstate(divide="ignore", invalid="ignore"):
        if estimator == "law":
            log_needed, decreasing = _log_law_compute(
                log_loss, np.log(curve_compute), log_curve_loss
            )
        else:
            decreasing = np.all(np.diff(log_curve_loss) < 0, axis=1)
            log_needed = _log_baseline_compute(log_loss, np.log(curve_compute), log_curve_loss)
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


def _misses(compute: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Log loss less that of its law, of shape (rungs,); of shape (0,) where no law can miss."""
    if np.unique(compute).size < LEAST_POINTS:
        return np.zeros(0)
    irreducible, coefficient, exponent = least_squares_laws(compute, loss)
    return np.log(loss) - np.log(irreducible + coefficient * compute**-exponent)


def _draw_scales(
    noise: float,
    dof: int,
    misses: Sequence[np.ndarray],
    seeds: float,
    draws: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws standard deviations of log loss between seeds and between rungs, each (draws, 1).

    `noise` is that between seeds with its degrees of freedom, and `misses` are what a law misses
    the rungs of each curve by, each a mean over `seeds` seeds.
    """
    free = sum(curve.size - 3 for curve in misses if curve.size)
    squares = sum(float(np.sum(curve**2)) for curve in misses)
    # Seeds that agree to the last digit would let the prior have all of the misses explained by
    # noise of size 0; 1% of the misses is as good as none.
    noise = max(noise, 0.01 * np.sqrt(seeds * squares / free), np.finfo(np.float64).tiny ** 0.25)

    # `share` is the part of a miss's variance that is noise. Given it, the variance of the noise
    # is a scaled inverse chi-square, of both sums of squares; integrated over that, its posterior
    # is `weight`.
    shrinkage = (np.arange(1000) + 0.5) / 1000
    share = 1 / (1 + (1 / shrinkage - 1) ** 2)
    total = dof * noise**2 + seeds * squares * share
    log_weight = free / 2 * np.log(share) - (dof + free) / 2 * np.log(total)
    weight = np.exp(log_weight - log_weight.max())
    drawn = random.choice(share.size, p=weight / weight.sum(), size=(draws, 1))
    scale = np.sqrt(total[drawn] / random.chisquare(dof + free, size=(draws, 1)))
    return scale, scale / np.sqrt(seeds) * (1 / shrinkage[drawn] - 1)


def _log_law_compute(
    log_loss: np.ndarray, log_curve_compute: np.ndarray, log_curve_loss: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads laws at `log_loss` (..., rungs); the curves they fit are (..., points).

    Also returns whether each law decreases, of shape (...).
    """
    laws = least_squares_laws(np.exp(log_curve_compute), np.exp(log_curve_loss))
    irreducible, coefficient, exponent = (x[..., None] for x in laws)
    log_needed = log_compute_for(np.exp(log_loss), irreducible, coefficient, exponent)
    return log_needed, laws[1] > 0


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
    compute = positive("baseline_compute", compute)
    loss = positive("baseline_loss", loss)
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


def _check_estimator(estimator: str) -> None:
    if estimator not in get_args(Estimator):
        raise ValueError(
            f"estimator is {estimator!r}: choose one of {', '.join(get_args(Estimator))}"
        )
