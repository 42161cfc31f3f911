"""How many seeds a comparison needs, before it is run.

Two cells of runs are compared by their mean log loss, with a two-sided t-test that knows the noise
between seeds only as well as the seeds show it. Differences of log loss are relative differences of
the loss: 0.001 is 0.1%.
"""

import numpy as np
from scipy import optimize, stats  # type: ignore[import-untyped]


def power_of(
    difference: float, noise: float, seeds: int, *, confidence: float = 0.9, cells: float = 2
) -> float:
    """Returns the probability that the test finds a true difference.

    Args:
      difference: of the two mean log losses, of either sign.
      noise: standard deviation of log loss between seeds (`multiplier.pooled_noise`).
      seeds: per cell, two or more; one is enough where `cells` is inf.
      confidence: one less the probability that the test finds a difference where there is none.
      cells: number of cells of as many seeds that the noise is pooled over, so that it has
        cells · (seeds − 1) degrees of freedom; inf where the noise is known, a normal test.

    Raises:
      ValueError: too few seeds, a noise that is not positive, a confidence outside (0, 1), or
        fewer than two cells.
    """
    _check(noise, confidence, cells)
    least = _least_seeds(cells)
    if seeds < least:
        raise ValueError(f"seeds is {seeds}, and this test needs {least}: run more")
    return float(_power(abs(difference) / (noise * np.sqrt(2 / seeds)), seeds, confidence, cells))


def seeds_needed(
    difference: float,
    noise: float,
    *,
    confidence: float = 0.9,
    power: float = 0.8,
    cells: float = 2,
) -> int:
    """Returns the seeds per cell that find a true difference with probability `power`.

    Args:
      difference: of the two mean log losses, of either sign.
      noise: as of `power_of`, like the others not named here.
      power: the probability to find the difference, above 1 − confidence and below 1.

    Raises:
      ValueError: a difference of 0, a power outside (1 − confidence, 1), more than a million seeds
        needed, and all that `power_of` raises.
    """
    _check(noise, confidence, cells)
    _check_power(power, confidence)
    if not (np.isfinite(difference) and difference != 0):
        raise ValueError(f"difference is {difference}: choose one that is finite and not 0")

    def enough(seeds: int) -> bool:
        return power_of(difference, noise, seeds, confidence=confidence, cells=cells) >= power

    seeds = _least_seeds(cells)
    too_few = seeds - 1
    while not enough(seeds):
        too_few, seeds = seeds, 2 * seeds
        if seeds > 2**20:
            raise ValueError(
                f"a difference of {difference:.3g} under noise of {noise:.3g} needs more than a "
                "million seeds: look for a larger difference"
            )
    while seeds - too_few > 1:
        middle = (too_few + seeds) // 2
        too_few, seeds = (too_few, middle) if enough(middle) else (middle, seeds)
    return seeds


def detectable_difference(
    seeds: int, noise: float, *, confidence: float = 0.9, power: float = 0.8, cells: float = 2
) -> float:
    """Returns the least difference of mean log loss that is found with probability `power`.

    The inverse of `seeds_needed`, with the same arguments and errors.
    """
    power_of(0, noise, seeds, confidence=confidence, cells=cells)
    _check_power(power, confidence)
    lacking = lambda ratio: _power(ratio, seeds, confidence, cells) - power
    largest = 1.0
    while lacking(largest) < 0:
        largest *= 2
    return float(optimize.brentq(lacking, 0, largest) * noise * np.sqrt(2 / seeds))


def log_loss_difference(multiplier_ratio: float, slope: float) -> float:
    """Returns how far log losses of one compute differ if their multipliers do by this ratio.

    Args:
      multiplier_ratio: of the two compute multipliers; against the baseline, the multiplier.
      slope: d log L / d log C of the baseline there, negative; −0.05 is usual of language models.

    Raises:
      ValueError: a ratio that is not positive, or a slope that is not negative.
    """
    if not (np.isfinite(multiplier_ratio) and multiplier_ratio > 0):
        raise ValueError(f"multiplier_ratio is {multiplier_ratio}: choose a positive one")
    if not (np.isfinite(slope) and slope < 0):
        raise ValueError(
            f"slope is {slope}, and a baseline's loss must fall with compute: pass "
            "d log L / d log C, a negative number"
        )
    return float(slope * np.log(multiplier_ratio))


def seeds_for_multiplier(
    multiplier_ratio: float,
    slope: float,
    noise: float,
    *,
    confidence: float = 0.9,
    power: float = 0.8,
    cells: float = 2,
) -> int:
    """Returns the seeds per cell that tell two compute multipliers of this ratio apart.

    The baseline's curve is taken as known: its noise moves both multipliers alike.

    Args:
      multiplier_ratio: as of `log_loss_difference`, like `slope`.
      noise: as of `seeds_needed`, like the others.

    Raises:
      ValueError: all that `log_loss_difference` and `seeds_needed` raise.
    """
    difference = log_loss_difference(multiplier_ratio, slope)
    return seeds_needed(difference, noise, confidence=confidence, power=power, cells=cells)


def _power(ratio: float, seeds: int, confidence: float, cells: float) -> float:
    """The power at `ratio`, the difference in units of its standard error."""
    upper = (1 + confidence) / 2
    if np.isinf(cells):
        critical = stats.norm.ppf(upper)
        return stats.norm.sf(critical - ratio) + stats.norm.cdf(-critical - ratio)
    dof = cells * (seeds - 1)
    critical = stats.t.ppf(upper, dof)
    if ratio == 0:
        return 1 - confidence
    # Both sides of the noncentral t at once, whose own far tail scipy does not have.
    return stats.ncf.sf(critical**2, 1, dof, ratio**2)


def _least_seeds(cells: float) -> int:
    return 1 if np.isinf(cells) else 2


def _check(noise: float, confidence: float, cells: float) -> None:
    if not (np.isfinite(noise) and noise > 0):
        raise ValueError(f"noise is {noise}: pass a positive standard deviation of log loss")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: choose one between 0 and 1")
    if not cells >= 2:
        raise ValueError(f"cells is {cells}: a comparison has two or more")


def _check_power(power: float, confidence: float) -> None:
    if not 1 - confidence < power < 1:
        raise ValueError(
            f"power is {power}: choose one above {1 - confidence:.3g}, what the test finds where "
            "there is nothing, and below 1"
        )
