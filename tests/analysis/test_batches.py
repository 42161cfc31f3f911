"""Sweeps over batch sizes whose exponent and critical batch are known."""

import math

import numpy as np
import pytest

from mup_jax.analysis.batches import summarize_batches

SIZES = (2, 8, 32, 128)


def sweep(exponent=0.5, *, critical=32, seeds=2, noise=0.0, random=None, grid=range(-4, 5)):
    """Loss 2 + 0.05·batch/critical + 0.05·(octaves from the best rate)²."""
    random = random or np.random.default_rng(0)
    curves = {}
    for size in SIZES:
        best = 1e-2 * (size / 2) ** exponent
        curves[size] = [
            (
                1e-2 * (size / 2) ** 0.5 * 2.0**i,
                [
                    (2 + 0.05 * size / critical
                     + 0.05 * (i + math.log2(1e-2 * (size / 2) ** 0.5 / best)) ** 2)
                    * (1 + noise * random.normal())
                    for _ in range(seeds)
                ],
            )
            for i in grid
        ]  # fmt: skip
    return curves


@pytest.mark.parametrize("exponent", [0.5, 0.2, 1.0])
def test_the_exponent(exponent):
    summary = summarize_batches(sweep(exponent), draws=20)
    assert summary["exponent"] == pytest.approx(exponent, abs=1e-6)
    assert summary["problem"] == ""
    assert summary["best"] == 2


def test_the_critical_batch():
    """The loss rises by 0.05 where batch/critical is one more than at the smallest."""
    summary = summarize_batches(sweep(critical=32), draws=20)
    assert summary["cost"] == pytest.approx({s: 0.05 * (s - 2) / 32 for s in SIZES})
    assert 32 < summary["critical"]["value"] < 40
    free = summarize_batches(sweep(critical=1e6), draws=20)
    assert free["critical"]["at_edge"]
    assert free["critical"]["value"] == 128


def test_intervals_of_the_exponent_cover():
    random = np.random.default_rng(1)
    covered = 0
    for i in range(300):
        curves = sweep(noise=0.002, random=random, grid=range(-2, 3))
        summary = summarize_batches(curves, draws=300, seed=i)
        covered += summary["exponent_low"] <= 0.5 <= summary["exponent_high"]
    assert 0.85 <= covered / 300 <= 0.95


def test_an_edge_is_not_claimed():
    summary = summarize_batches(sweep(exponent=3.0))
    assert summary["exponent"] is summary["exponent_low"] is None
    assert summary["problem"].startswith("the best rate is at the edge of what was tried at batch")


def test_one_seed_has_no_interval():
    summary = summarize_batches(sweep(seeds=1))
    assert summary["exponent"] == pytest.approx(0.5)
    assert summary["exponent_low"] is None


def test_a_batch_that_never_trains():
    assert summarize_batches({2: sweep()[2], 8: [(1e-2, [None])]}) is None
