"""The fit of a scaling law against laws that are known."""

import numpy as np
import pytest

from mup_jax.analysis.law import fit_scaling_law, least_squares_laws

COMPUTE = np.geomspace(1e17, 1e20, 6)
LAWS = [(1.7, 400.0, 0.13), (2.0, 1e5, 0.3), (0.5, 30.0, 0.06)]


def losses(law, compute=COMPUTE):
    irreducible, coefficient, exponent = law
    return irreducible + coefficient * compute**-exponent


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("points", [4, 6])
def test_a_law_without_noise_is_recovered(law, points):
    compute = np.geomspace(1e17, 1e20, points)[::-1]
    fit = fit_scaling_law(compute, losses(law, compute))
    np.testing.assert_allclose(fit[:3], law, rtol=1e-3)
    assert fit.points == points
    assert bool(fit.doubt) == (points == 4)


def test_many_laws_at_once():
    fits = least_squares_laws(COMPUTE, np.stack([losses(law) for law in LAWS]))
    np.testing.assert_allclose(np.stack(fits, axis=-1), LAWS, rtol=1e-3)


def test_the_search_over_exponents_finds_least_squares():
    noisy = losses(LAWS[0]) * np.exp(0.003 * np.random.default_rng(0).normal(size=6))
    fit = fit_scaling_law(COMPUTE, noisy, delta=np.inf)
    irreducible, coefficient, exponent = least_squares_laws(COMPUTE, noisy)
    searched = irreducible + coefficient * COMPUTE**-exponent
    np.testing.assert_allclose(searched, fit.loss(COMPUTE), rtol=1e-4)


def test_one_outlier_bends_the_law_little():
    compute = np.geomspace(1e17, 1e20, 8)
    loss = losses(LAWS[0], compute)
    loss[3] *= 1.03
    robust = fit_scaling_law(compute, loss)
    np.testing.assert_allclose(robust[:3], LAWS[0], rtol=0.1)
    squares = fit_scaling_law(compute, loss, delta=np.inf)
    assert abs(squares.irreducible - 1.7) > 5 * abs(robust.irreducible - 1.7)


def test_loss_and_compute_are_inverse():
    fit = fit_scaling_law(COMPUTE, losses(LAWS[0]))
    np.testing.assert_allclose(fit.compute(fit.loss(COMPUTE)), COMPUTE, rtol=1e-6)
    np.testing.assert_array_equal(fit.compute([1.7 - 1e-3, 1.0]), np.inf)
    assert np.shape(fit.loss(1e18)) == ()


@pytest.mark.parametrize(
    ("loss", "doubt"),
    [
        (7 * COMPUTE**-0.05, "at its bound, 0"),
        (losses((2.0, 1e30, 1.8)), "within 1% of the lowest loss"),
        (losses((2.0, 1e40, 2.5)), "exponent, 2, is at a bound"),
        (losses(LAWS[0]) * (1 + 0.03 * np.array([1, -1, 1, 1, -1, 1])), "more than noise"),
    ],
)
def test_doubts(loss, doubt):
    assert doubt in fit_scaling_law(COMPUTE, loss).doubt


@pytest.mark.parametrize(
    ("compute", "loss", "delta", "message"),
    [
        ([1, 2, 3, 3], [4, 3, 2, 2], 1, "3 different values.* run another rung"),
        ([1, 2, 3, 4], [4, 3, 2, 0], 1, r"loss has 0\.0"),
        ([1, 2, 3, 4], [4, 3, 2], 1, r"shape \(4,\) and loss \(3,\)"),
        ([1, 2, 3, 4], [4, 3, 2, 1], 0, "delta is 0"),
    ],
)
def test_errors_name_the_value(compute, loss, delta, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling_law(compute, loss, delta=delta)
