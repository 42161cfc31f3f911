"""The power analysis against simulated comparisons."""

import numpy as np
import pytest
from scipy import stats

from mup_jax.analysis.power import (
    detectable_difference,
    log_loss_difference,
    power_of,
    seeds_for_multiplier,
    seeds_needed,
)


@pytest.mark.parametrize(("difference", "confidence"), [(0.005, 0.9), (0.002, 0.9), (0.005, 0.95)])
def test_simulated_tests_find_the_difference_as_often_as_planned(difference, confidence):
    noise = 0.003
    seeds = seeds_needed(difference, noise, confidence=confidence)
    random = np.random.default_rng(0)

    def found(seeds):
        first, second = noise * random.normal(size=(2, 20_000, seeds))
        return np.mean(stats.ttest_ind(first + difference, second, axis=1).pvalue < 1 - confidence)

    power = power_of(difference, noise, seeds, confidence=confidence)
    assert found(seeds) == pytest.approx(power, abs=0.01)
    assert power >= 0.8
    assert found(seeds - 1) < 0.81


def test_known_noise_is_the_normal_test():
    # The textbook's 2·((z(0.95) + z(0.8))·noise/difference)².
    assert seeds_needed(0.001, 0.003, cells=np.inf) == np.ceil(2 * (2.48648 * 3) ** 2)
    assert power_of(0, 0.003, 4) == pytest.approx(0.1)


def test_noise_pooled_over_more_cells_needs_fewer_seeds():
    needed = [seeds_needed(0.01, 0.003, cells=cells) for cells in (2, 8, np.inf)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > needed[-1]


@pytest.mark.parametrize("seeds", [2, 3, 20])
def test_detectable_difference_is_the_inverse(seeds):
    difference = detectable_difference(seeds, 0.003)
    assert seeds_needed(difference * 1.001, 0.003) == seeds
    assert seeds_needed(-difference * 0.999, 0.003) == seeds + 1


def test_a_multiplier_is_a_difference_of_loss():
    assert log_loss_difference(1.4, -0.05) == pytest.approx(np.log(1.4**-0.05))
    # The published ladder's slope at its upper end; 0.1% of the loss is 2% of a multiplier there.
    assert log_loss_difference(1.02, -0.05) == pytest.approx(-0.001, rel=0.02)
    assert seeds_for_multiplier(1.4, -0.05, 0.005) == seeds_needed(np.log(1.4) * 0.05, 0.005)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seeds_needed(0.0, 0.003), r"difference is 0\.0"),
        (lambda: seeds_needed(0.1, 0.0), r"noise is 0\.0"),
        (lambda: seeds_needed(0.1, 0.1, power=0.05), r"power is 0\.05.* above 0\.1"),
        (lambda: seeds_needed(0.1, 0.1, confidence=1.0), r"confidence is 1\.0"),
        (lambda: seeds_needed(0.1, 0.1, cells=1), "cells is 1"),
        (lambda: seeds_needed(1e-9, 0.1), "more than a million"),
        (lambda: detectable_difference(1, 0.1), "seeds is 1"),
        (lambda: seeds_for_multiplier(0.0, -0.05, 0.1), r"multiplier_ratio is 0\.0"),
        (lambda: seeds_for_multiplier(1.4, 0.05, 0.1), r"slope is 0\.05"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("noise", [3e-4, 8e-4, 3e-3, 1e-2])
def test_larger_differences_need_no_more_seeds(noise):
    needed = [
        seeds_for_multiplier(ratio, -0.05, noise) for ratio in (1.02, 1.05, 1.1, 1.25, 1.5, 4)
    ]
    assert needed == sorted(needed, reverse=True)
    powers = [power_of(x * noise, noise, 3) for x in np.linspace(0, 60, 61)]
    assert np.all(np.diff(powers) >= -1e-9)
    assert powers[-1] == pytest.approx(1)
