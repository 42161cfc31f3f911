"""The best tokens per parameter of curves whose vertex is known."""

import math

import numpy as np
import pytest

from mup_jax.analysis.isoflop import Curve, optima

RATIOS = tuple(np.geomspace(1.0, 100.0, 6))
BEST = 9.6


def curve(best=BEST, *, curvature=0.1, noise=0.0, seeds=2, misfit=0.0, random=None, ratios=RATIOS):
    """Loss 3 + curvature · log(ratio / best)², with noise of the seeds and of the model."""
    random = random or np.random.default_rng(0)
    losses = []
    for ratio in ratios:
        loss = 3 + curvature * math.log(ratio / best) ** 2 + misfit * random.normal()
        losses.append([loss * (1 + noise * random.normal()) for _ in range(seeds)])
    return Curve(ratios, losses)


def only(curves, **settings):
    [(vertices, combined)] = optima([curves], **settings)
    return vertices, combined


@pytest.mark.parametrize("best", [2.0, 9.6, 60.0])
def test_a_parabola_has_its_own_vertex(best):
    [vertex], combined = only([curve(best)])
    assert vertex.problem == ""
    assert vertex.value == pytest.approx(best)
    assert vertex.loss == pytest.approx(3.0)
    assert combined.value == pytest.approx(best)


def test_order_does_not_matter():
    ascending = curve()
    descending = Curve(ascending.tokens_per_parameter[::-1], ascending.losses[::-1])
    assert only([ascending])[0][0].value == pytest.approx(only([descending])[0][0].value)


def test_only_the_neighbourhood_of_the_lowest_is_fitted():
    kinked = curve(3.0, ratios=tuple(np.geomspace(1, 1000, 8)))
    kinked.losses[-1][:] = [50.0, 50.0]
    [vertex], _ = only([kinked])
    assert vertex.value == pytest.approx(3.0)
    assert vertex.fitted[1] < 100


@pytest.mark.parametrize("curvature", [0.05, 0.2])
@pytest.mark.parametrize(("noise", "misfit"), [(0.004, 0.0), (0.001, 0.01)])
def test_intervals_cover(curvature, noise, misfit):
    """Of 300 experiments 85 to 95% of the 90% intervals hold the truth."""
    random = np.random.default_rng(1)
    covered = np.zeros(2)
    for i in range(300):
        make = lambda best: curve(
            best, curvature=curvature, noise=noise, misfit=misfit, random=random
        )
        experiment = [[make(BEST) for _ in range(3)], [make(7.4) for _ in range(3)]]
        vertices, combined = optima(experiment, draws=200, seed=i)[0]
        covered += [one.low <= BEST <= one.high for one in (vertices[0], combined)]
    # At a budget the larger of two noises counts, by chance sometimes the wrong one.
    assert np.all(covered / 300 >= 0.85)
    assert np.all(covered / 300 <= (0.97, 0.95))


def test_a_best_at_the_edge_is_not_claimed():
    for best, side in ((0.2, "1 or below"), (1.2, "1 or below"), (1000.0, "1e+02 or above")):
        [vertex, _], combined = only([curve(best), curve()])
        assert vertex.value is vertex.low is vertex.loss is None
        assert vertex.problem == f"the best is at the edge of what was tried, {side}"
        assert combined == (None, None, None)


def test_a_parabola_that_opens_downward_is_not_claimed():
    [vertex], _ = only([curve(curvature=-0.1)])
    assert vertex.problem == "the parabola opens downward"
    assert vertex.value is None


def test_much_noise_is_unbounded():
    noisy = Curve(RATIOS, [[loss - 0.3, loss + 0.3] for loss, _ in curve().losses])
    [vertex], combined = only([noisy])
    assert vertex.value == pytest.approx(BEST)
    assert (vertex.low, vertex.high) == (0, None)
    assert (combined.low, combined.high) == (0, None)


def test_diverged_models_are_left_out():
    diverged = curve()
    diverged.losses[-1][0] = None
    assert only([diverged])[0][0].value == pytest.approx(BEST)
    few = Curve(RATIOS[:3], [[3.0], [None], [3.0]])
    assert only([few])[0][0].problem == "fewer than three models trained"


def test_one_seed_has_the_residuals_for_its_interval():
    random = np.random.default_rng(0)
    [vertex], _ = only([curve(seeds=1, noise=0.002, random=random)])
    assert vertex.low < vertex.value < vertex.high
    [vertex], _ = only([curve(seeds=1, ratios=(3.0, 9.0, 27.0))])
    assert (vertex.low, vertex.high) == (None, None)


def test_confidence_is_checked():
    with pytest.raises(ValueError, match=r"confidence is 1\.5: choose one between 0 and 1"):
        optima([[curve()]], confidence=1.5)
