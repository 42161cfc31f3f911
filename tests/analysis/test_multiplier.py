"""The estimator against the published table, and its interval against simulated ladders."""

import numpy as np
import pytest

from mup_jax.analysis import (
    compute_multiplier,
    is_extrapolated,
    multiplier_interval,
    pooled_noise,
)

# arXiv 2512.05620, tables 3 and 4: Llama on FineWeb, 190M to 1.4B parameters.
COMPUTE = np.array([4.3204e18, 1.7814e19, 5.0382e19, 2.2675e20])
ADAMW = np.array([3.2367, 3.0094, 2.8629, 2.6807])
PUBLISHED = {
    "muon": ([3.1779, 2.9595, 2.8188, 2.6405], [1.429, 1.417, 1.427, 1.413]),
    "shampoo": ([3.1794, 2.9629, 2.8296, 2.6504], [1.416, 1.383, 1.307, 1.298]),
    "soap": ([3.1751, 2.9608, 2.8272], [1.453, 1.403, 1.333]),
    "muon_sp": ([3.1779, 2.9741, 2.8529, 2.7111], [1.429, 1.278, 1.084, 0.773]),
}


@pytest.mark.parametrize("optimizer", PUBLISHED)
def test_published_multipliers(optimizer):
    losses, published = PUBLISHED[optimizer]
    measured = compute_multiplier(
        COMPUTE[: len(losses)], losses, baseline_compute=COMPUTE, baseline_loss=ADAMW
    )
    np.testing.assert_allclose(measured, published, atol=0.004)


def test_a_power_law_gives_its_multiplier_everywhere():
    compute = np.geomspace(1e15, 1e18, 4)
    np.testing.assert_allclose(
        compute_multiplier(
            compute,
            7 * (1.5 * compute) ** -0.05,
            baseline_compute=compute[::-1],
            baseline_loss=7 * compute[::-1] ** -0.05,
        ),
        1.5,
    )


def test_shapes_follow_the_loss():
    baseline = {"baseline_compute": COMPUTE, "baseline_loss": ADAMW}
    scalar = compute_multiplier(COMPUTE[1], ADAMW[1], **baseline)
    assert np.shape(scalar) == ()
    assert float(scalar) == pytest.approx(1.0)
    grid = compute_multiplier(COMPUTE[0], ADAMW.reshape(2, 2), **baseline)
    np.testing.assert_allclose(grid, (COMPUTE / COMPUTE[0]).reshape(2, 2))
    assert is_extrapolated(2.5, baseline_loss=ADAMW) == np.True_
    np.testing.assert_array_equal(
        is_extrapolated([3.3, 3.2367, 3.0, 2.6807, 2.68], baseline_loss=ADAMW),
        [True, False, False, False, True],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline_compute": [1.0], "baseline_loss": [2.0]}, "1 point .* run another rung"),
        ({"loss": [-1.0, 2.0]}, r"loss has -1\.0"),
        ({"loss": [float("inf"), 2.0]}, "loss has inf"),
        ({"baseline_loss": [3.0, 3.5]}, r"from 3 at 1 FLOPs to 3\.5 at 10"),
        ({"baseline_compute": [5.0, 5.0]}, "must decrease"),
        ({"baseline_loss": [3.0, 2.0, 1.0]}, r"shape \(2,\) and baseline_loss \(3,\)"),
        ({"compute": [1.0, 2.0, 3.0]}, r"compute has shape \(3,\) and loss \(2,\)"),
    ],
)
def test_errors_name_the_value(change, message):
    arguments = {
        "compute": [1.0, 10.0],
        "loss": [2.9, 2.4],
        "baseline_compute": [1.0, 10.0],
        "baseline_loss": [3.0, 2.5],
    }
    with pytest.raises(ValueError, match=message):
        compute_multiplier(**(arguments | change))


def test_pooled_noise_by_hand():
    noise, dof = pooled_noise([np.exp([1.0, 1.2]), np.exp([2.0, 2.1, 2.2]), [5.0]])
    assert dof == 3
    assert noise == pytest.approx(np.sqrt((0.02 + 0.02) / 3))


def test_no_noise_gives_a_point():
    losses = [[loss, loss] for loss in ADAMW * 0.98]
    interval = multiplier_interval(
        COMPUTE, losses, baseline_compute=COMPUTE, baseline_losses=[[x, x] for x in ADAMW]
    )
    np.testing.assert_allclose(interval.low, interval.value)
    np.testing.assert_allclose(interval.high, interval.value)
    np.testing.assert_array_equal(interval.extrapolated, [False, False, False, True])


def test_noise_that_hides_the_baseline_leaves_the_interval_unbounded():
    noisy = [[3.0, 3.6], [2.9, 3.5]]
    interval = multiplier_interval(
        [1.0, 10.0], noisy, baseline_compute=[1.0, 10.0], baseline_losses=noisy
    )
    np.testing.assert_array_equal(interval.low, 0)
    np.testing.assert_array_equal(interval.high, np.inf)


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="baseline_losses has 1 seed at rung 1"):
        multiplier_interval(
            [1.0, 2.0],
            [[3.0, 3.1]] * 2,
            baseline_compute=[1.0, 2.0],
            baseline_losses=[[3.0, 3.1], [2.5]],
        )


@pytest.mark.parametrize("seeds", [2, 3])
def test_interval_covers_as_often_as_it_says(seeds):
    # Four rungs of a power law with a true multiplier of 1.4 and 0.2% noise of the loss.
    compute = np.geomspace(1e15, 1e17, 4)
    curve, better = 7 * compute**-0.05, 7 * (1.4 * compute) ** -0.05
    random = np.random.default_rng(1)
    noise = np.exp(0.002 * random.normal(size=(500, 2, 4, seeds)))
    covered = np.zeros(4)
    for trial in noise:
        interval = multiplier_interval(
            compute,
            list(better[:, None] * trial[0]),
            baseline_compute=compute,
            baseline_losses=list(curve[:, None] * trial[1]),
            draws=1000,
        )
        covered += (interval.low <= 1.4) & (interval.high >= 1.4)
    coverage = covered / len(noise)
    assert np.all((coverage >= 0.85) & (coverage <= 0.95)), coverage
