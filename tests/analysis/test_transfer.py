"""Optima, drifts and losses of sweeps whose answers are known."""

import math

import numpy as np
import pytest

from mup_jax.analysis.transfer import (
    drift_per_doubling,
    largest_harmless,
    loss_of,
    optimum,
    parabola_minimum,
    summarize_sweep,
)

GRID = [2.0**i for i in range(-6, 4)]


def parabola(best, *, depth=2.0, noise=(0.0, 0.0), grid=GRID):
    """Loss depth + log2(value / best)²: seeds have their optimum noise octaves beside."""
    return [(v, [depth + (math.log2(v / best) - shift) ** 2 for shift in noise]) for v in grid]


@pytest.mark.parametrize("best", [0.1, 0.25, 1.3])
def test_a_parabola_has_its_own_minimum(best):
    found = optimum(parabola(best))
    assert found.value == pytest.approx(best)
    assert found.low == pytest.approx(best)
    assert not found.at_edge


def test_the_range_over_seeds():
    found = optimum(parabola(0.25, noise=(-0.25, 0.25)))
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((0.25 * 2**-0.25, 0.25 * 2**0.25))


def test_order_and_zero_do_not_matter():
    curve = parabola(0.25)
    assert optimum([*curve[::-1], (0.0, [1.0, 1.0])]) == optimum(curve)


def test_an_optimum_at_the_edge_says_so():
    found = optimum(parabola(100.0))
    assert found.at_edge
    assert found.value == GRID[-1]


def test_diverged_seeds_rule_a_value_out():
    curve = parabola(0.25)
    lowest = min(range(len(curve)), key=lambda i: curve[i][1][0])
    curve[lowest] = (curve[lowest][0], [2.0, None])
    assert optimum(curve).loss == pytest.approx(3.0)
    assert optimum([(v, [None, None]) for v in GRID]) is None


def test_drift_is_the_exponent():
    sizes = (16, 32, 64, 128)
    assert drift_per_doubling(sizes, [3 * s**-0.5 for s in sizes]) == pytest.approx(-0.5)


def test_summary_of_an_optimum_that_moves():
    curves = {s: parabola(0.5 * (16 / s)) for s in (16, 32, 64, 128)}
    summary = summarize_sweep(curves)
    assert summary["drift"] == pytest.approx(-1.0)
    assert summary["drift_factor"] == pytest.approx(1 / 8)
    assert summary["lost"] == pytest.approx({16: 0, 32: 1, 64: 4, 128: 9})
    carried = summarize_sweep(curves, carried=-1.0)
    assert carried["drift"] == pytest.approx(0.0)
    assert carried["lost"] == pytest.approx(dict.fromkeys(curves, 0.0))


def test_a_curve_that_never_trains_has_no_summary():
    curves = {16: parabola(0.5), 32: [(v, [None]) for v in GRID]}
    assert summarize_sweep(curves) is None


def test_loss_of_what_was_not_tried():
    with pytest.raises(ValueError, match="value 64 was not tried: nearest is 8"):
        loss_of(parabola(0.25), 64.0)
    diverged = [(1.0, [None]), (2.0, [1.0])]
    assert loss_of(diverged, 1.1) is None


def test_the_largest_harmless_value():
    """Loss 2 + ε: the margin of 0.05 is used up at ε = 0.05 + the smallest."""
    grid = np.geomspace(1e-6, 1.0, 400)
    curve = [(e, [2 + e]) for e in grid]
    assert largest_harmless(curve).value == pytest.approx(0.05, rel=0.05)
    noisy = [(e, [2 + e + (0.02 if i % 3 else 0)]) for i, (e, _) in enumerate(curve)]
    assert 0.02 < largest_harmless(noisy).value <= 0.06
    flat = largest_harmless([(e, [2.0]) for e in grid])
    assert flat.at_edge
    assert flat.value == 1.0
    falls = [(1.0, [2.0]), (2.0, [2.0]), (4.0, [None])]
    assert largest_harmless(falls).value == 2.0


def test_harmless_values_are_what_transfers():
    """Loss 2 + ε·size: what costs 0.05 moves as 1/size."""
    curves = {s: [(2.0**i, [2 + 2.0**i * s]) for i in range(-24, 0)] for s in (16, 64)}
    summary = summarize_sweep(curves, harmless=True)
    assert summary["drift"] == pytest.approx(-1.0, abs=0.01)
    assert summary["lost"][16] < 0.05
    assert summary["lost"][64] == pytest.approx(4 * summary["lost"][16], rel=0.01)


PAIRS = [(x, y) for x in (1.0, 2.0, 4.0, 8.0) for y in (1.0, 3.0, 9.0)]


def bowl(x, y, at=(2.6, 4.0)):
    """A parabola in log2 whose axes are not those of the grid."""
    u, v = math.log2(x / at[0]), math.log2(y / at[1])
    return 2 + u**2 + 0.4 * v**2 + 0.5 * u * v


def test_a_parabola_of_two_hyperparameters_is_found_again():
    assert parabola_minimum({p: bowl(*p) for p in PAIRS}) == pytest.approx((2.6, 4.0))


def test_noise_is_averaged_over_the_neighbours():
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(200):
        noisy = {p: bowl(*p) + 0.05 * rng.normal() for p in PAIRS}
        errors.append(np.log2(np.array(parabola_minimum(noisy)) / (2.6, 4.0)))
    # The best pair of the grid alone is off by up to half a step, 0.5 and 0.8, or more.
    assert np.sqrt(np.mean(np.square(errors), axis=0)) == pytest.approx([0, 0], abs=0.4)


def test_one_hyperparameter_and_an_edge():
    losses = {(x, 2.0): bowl(x, 4.0) for x in (1.0, 2.0, 4.0)}
    assert parabola_minimum(losses) == pytest.approx((2.6, 2.0))
    # At an edge there is nothing to interpolate.
    assert parabola_minimum({p: p[0] + bowl(2.6, p[1]) for p in PAIRS})[0] == 1.0


def test_a_diverged_neighbour_is_left_out():
    losses = {p: math.inf if p == (4.0, 9.0) else bowl(*p) for p in PAIRS}
    assert parabola_minimum(losses) == pytest.approx((2.6, 4.0))
    assert parabola_minimum({(1.0, 1.0): math.inf, (2.0, 1.0): math.inf}) == (1.0, 1.0)
