"""What a sweep of the learning rate over batch sizes says of the batch size itself.

All batches train on as many tokens, so that a larger one takes fewer steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mup_jax.analysis.multiplier import pooled_noise
from mup_jax.analysis.transfer import (
    MARGIN,
    Curve,
    Losses,
    drift_per_doubling,
    largest_harmless,
    mean_losses,
    optimum,
)


def summarize_batches(
    curves: Mapping[float, Curve],
    *,
    margin: float = MARGIN,
    confidence: float = 0.9,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """The best batch size, what larger ones cost, and the exponent of the learning rate in it.

    Args:
      curves: by batch size, ascending: losses of each learning rate.
      margin: the loss, in nats, that the critical batch may cost.
      confidence: probability that the interval of the exponent is meant to cover.
      draws: of the mean losses, for the interval.
      seed: of the draws.

    Returns:
      None where a batch size trained with no learning rate. Else by batch size "loss", that of the
      best rate tried, "cost", how much more than the lowest of these, and "best_rate" (of
      `Optimum`); "best", the batch size with the lowest; "critical", the largest batch,
      interpolated in log2, that costs no more than `margin` (of `Optimum`); "exponent", a of best
      rate ∝ batch^a, with "exponent_low" and "exponent_high" for the noise between seeds (None with
      one seed); all three None where "problem" says why.
    """
    found = {size: optimum(curve) for size, curve in curves.items()}
    best_rates = {size: one for size, one in found.items() if one is not None}
    if len(best_rates) < len(curves):
        return None
    losses = {size: one.loss for size, one in best_rates.items()}
    critical = largest_harmless([(s, _best_losses(c)) for s, c in curves.items()], margin)
    assert critical is not None
    edges = [size for size, one in best_rates.items() if one.at_edge]
    problem, exponent = "", None
    low = high = None
    if edges:
        at = ", ".join(f"{size:g}" for size in edges)
        problem = f"the best rate is at the edge of what was tried at batch {at}"
    else:
        sizes = list(curves)
        exponent = drift_per_doubling(sizes, [one.value for one in best_rates.values()])
        low, high = _exponent_interval(curves, confidence, draws, seed)
    return {
        "best": min(losses, key=losses.__getitem__),
        "loss": losses,
        "cost": {size: loss - min(losses.values()) for size, loss in losses.items()},
        "best_rate": {size: one._asdict() for size, one in best_rates.items()},
        "critical": critical._asdict(),
        "exponent": exponent,
        "exponent_low": low,
        "exponent_high": high,
        "problem": problem,
    }


def _best_losses(curve: Curve) -> Losses:
    """Of each seed, at the learning rate with the lowest mean."""
    values, losses = mean_losses(curve)
    best = values[np.argmin(losses)]
    return next(of_seeds for value, of_seeds in curve if value == best)


def _exponent_interval(
    curves: Mapping[float, Curve], confidence: float, draws: int, seed: int
) -> tuple[float | None, float | None]:
    """Draws all mean losses around the measured ones, by a t-distribution with pooled noise."""
    near = [of_seeds for curve in curves.values() for of_seeds in _around_best(curve)]
    if max(map(len, near)) < 2:
        return None, None
    noise, dof = pooled_noise([cell for cell in near if len(cell) > 1])
    random = np.random.default_rng(seed)
    scale = noise * np.sqrt(dof / random.chisquare(dof, size=(draws, 1)))
    best = np.array([_drawn_best(curve, scale, random) for curve in curves.values()])
    log_sizes = np.log2(list(curves))
    exponents = np.polyfit(log_sizes, best, 1)[0]
    low, high = np.quantile(exponents, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _drawn_best(curve: Curve, scale: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """log2 of the best value of each draw, as `optimum` has it, shape (draws,)."""
    values, losses = mean_losses(curve)
    x = np.log2(values)
    seeds = np.array([len(of_seeds) for _, of_seeds in sorted(curve)])
    # A rate that diverged does so in every draw.
    drawn = losses * np.exp(scale / np.sqrt(seeds) * random.normal(size=(len(scale), x.size)))
    lowest = np.argmin(drawn, axis=1)
    middle = np.clip(lowest, 1, x.size - 2)
    around = middle[:, None] + np.arange(-1, 2)
    y = np.take_along_axis(drawn, around, axis=1)
    left, right = np.diff(x)[middle - 1], np.diff(x)[middle]
    with np.errstate(invalid="ignore"):
        falls, rises = (y[:, 1] - y[:, 0]) / left, (y[:, 2] - y[:, 1]) / right
        share = -falls / (rises - falls)
    vertex = (x[middle - 1] + x[middle]) / 2 + share * (left + right) / 2
    return np.where((middle == lowest) & np.isfinite(vertex), vertex, x[lowest])


def _around_best(curve: Curve) -> list[list[float]]:
    """The losses of the best rate and its neighbours: far from it, noise is larger."""
    ascending = sorted(curve)
    _, means = mean_losses(ascending)
    best = int(np.argmin(means))
    return [
        [x for x in losses if x is not None]
        for _, losses in ascending[max(best - 1, 0) : best + 2]
        if None not in losses
    ]
