"""The estimators against the published table, and their intervals against simulated ladders."""

import numpy as np
import pytest

from mup_jax.analysis.multiplier import (
    compute_multiplier,
    is_extrapolated,
    leave_one_rung_out,
    multiplier_interval,
    noise_band,
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


def coverage(curve, better, *, multiplier, seeds, noise, deviation=0.0, **options):
    """Per rung, the share of 500 noisy ladders whose interval holds the true multiplier."""
    compute = np.geomspace(1e17, 1e20, curve.size)
    random = np.random.default_rng(1)
    covered = np.zeros(curve.size)
    for _ in range(500):
        rungs = noise / np.sqrt(seeds) * deviation * random.normal(size=(2, curve.size, 1))
        trial = np.exp(rungs + noise * random.normal(size=(2, curve.size, seeds)))
        interval = multiplier_interval(
            compute,
            list(better[:, None] * trial[0]),
            baseline_compute=compute,
            baseline_losses=list(curve[:, None] * trial[1]),
            **options,
        )
        covered += (interval.low <= multiplier) & (interval.high >= multiplier)
    return covered / 500


@pytest.mark.parametrize(
    ("rungs", "seeds", "noise"),
    [(4, 2, 0.003), (4, 3, 0.003), (4, 2, 0.01), (6, 3, 0.003), (6, 2, 0.01)],
)
def test_interpolation_covers_as_often_as_it_says(rungs, seeds, noise):
    # Of a power law, lines in log-log are exact.
    compute = np.geomspace(1e17, 1e20, rungs)
    covered = coverage(
        7 * compute**-0.05,
        7 * (1.4 * compute) ** -0.05,
        multiplier=1.4,
        seeds=seeds,
        noise=noise,
        draws=400,
    )
    assert np.all((covered >= 0.85) & (covered <= 0.95)), covered


def law_coverage(rungs, **options):
    compute = np.geomspace(1e17, 1e20, rungs)
    return coverage(
        1.7 + 400 * compute**-0.13,
        1.7 + 400 * (1.4 * compute) ** -0.13,
        multiplier=1.4,
        estimator="law",
        draws=200,
        **options,
    ).mean()


@pytest.mark.parametrize(
    ("rungs", "seeds", "noise", "deviation"),
    [
        (6, 3, 0.003, 3),
        pytest.param(6, 2, 0.003, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, 0.01, 1, marks=pytest.mark.slow),
    ],
)
def test_the_law_covers_as_often_as_it_says(rungs, seeds, noise, deviation):
    covered = law_coverage(rungs, seeds=seeds, noise=noise, deviation=deviation)
    assert 0.85 <= covered <= 0.95, covered


@pytest.mark.slow
def test_the_law_covers_more_where_no_rung_deviates():
    # Few rungs cannot show that none deviates, so the interval allows for it: not above 97%.
    covered = law_coverage(6, seeds=3, noise=0.01)
    assert 0.9 <= covered <= 0.97, covered


def test_the_law_gives_its_multiplier_where_lines_do_not():
    compute = np.geomspace(1e17, 1e20, 5)
    law = lambda compute: 1.7 + 400 * compute**-0.13
    arguments = (compute, law(1.4 * compute))
    baseline = {"baseline_compute": compute[::-1], "baseline_loss": law(compute[::-1])}
    by_law = compute_multiplier(*arguments, **baseline, estimator="law")
    np.testing.assert_allclose(by_law, 1.4, rtol=1e-4)
    assert np.max(np.abs(compute_multiplier(*arguments, **baseline) - 1.4)) > 0.01
    assert compute_multiplier(1e20, 1.6, **baseline, estimator="law") == np.inf


def test_the_law_of_the_published_baseline_agrees_with_lines():
    baseline = {"baseline_compute": COMPUTE, "baseline_loss": ADAMW}
    losses, published = PUBLISHED["muon"]
    by_law = compute_multiplier(COMPUTE, losses, **baseline, estimator="law")
    np.testing.assert_allclose(by_law, published, rtol=0.05)


def test_a_law_without_noise_gives_a_point():
    losses = 1.7 + 400 * COMPUTE**-0.13
    interval = multiplier_interval(
        COMPUTE,
        [[x, x] for x in 0.98 * losses],
        baseline_compute=COMPUTE,
        baseline_losses=[[x, x] for x in losses],
        estimator="law",
        draws=200,
    )
    np.testing.assert_allclose(interval.low, interval.value, rtol=0.02)
    np.testing.assert_allclose(interval.high, interval.value, rtol=0.02)
    np.testing.assert_array_equal(interval.extrapolated, [False, False, False, True])


def test_rungs_that_miss_the_law_widen_its_interval():
    compute = np.geomspace(1e17, 1e20, 6)
    law = 1.7 + 400 * compute**-0.13
    misses = 1 + 0.02 * np.array([1, -1, 1, 1, -1, 1])
    widths = []
    for loss in (law, law * misses):
        cells = [[x * 0.999, x * 1.001] for x in loss]
        given = {"baseline_compute": compute, "baseline_losses": cells, "estimator": "law"}
        interval = multiplier_interval(compute, cells, **given)
        assert np.all((interval.low < 1) & (interval.high > 1))
        widths.append(np.log(interval.high / interval.low))
    assert np.all(widths[1] > 5 * widths[0])


def test_noise_band_of_a_power_law():
    compute = np.geomspace(1e15, 1e18, 4)
    loss = 7 * compute**-0.05
    low, high = noise_band(compute, loss, baseline_compute=compute, baseline_loss=loss)
    # 0.1% of the loss is 2% of the compute, at a slope of -0.05.
    np.testing.assert_allclose(low, 1.001**-20)
    np.testing.assert_allclose(high, 0.999**-20)


def test_leaving_one_rung_out():
    low, high = leave_one_rung_out(
        [1.0, 1.0, 1.0],
        np.exp([-0.5, -1.5, -3.5]),
        baseline_compute=np.exp([0.0, 1.0, 2.0, 3.0]),
        baseline_loss=np.exp([0.0, -1.0, -3.0, -4.0]),
    )
    # By hand, in logs: without the second rung the line falls 3 in 2, without the third 3 in 2.
    np.testing.assert_allclose(np.log(low), [1 / 3, 1, 2.5])
    np.testing.assert_allclose(np.log(high), [1 / 2, 4 / 3, 8 / 3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: compute_multiplier(1.0, 2.0, **x, estimator="spline"), "'spline': choose one"),
        (lambda x: compute_multiplier(1.0, 2.0, **x, estimator="law"), "2 different values"),
        (lambda x: noise_band(1.0, 2.0, **x, noise=1.0), r"noise is 1\.0"),
        (lambda x: leave_one_rung_out(1.0, 2.0, **x), "2 points and no inner one"),
    ],
)
def test_errors_of_the_others_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call({"baseline_compute": [1.0, 10.0], "baseline_loss": [3.0, 2.5]})


def test_a_law_that_rises_is_refused():
    with pytest.raises(ValueError, match="does not decrease"):
        compute_multiplier(
            1.0,
            2.0,
            baseline_compute=[1.0, 2.0, 4.0, 8.0],
            baseline_loss=[2.0, 2.2, 2.4, 2.6],
            estimator="law",
        )
