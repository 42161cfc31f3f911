"""Every multiplier of a ladder: by three costs, by two estimators, and how far to trust them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mup_jax.analysis.law import fit_scaling_law
from mup_jax.analysis.multiplier import (
    Estimator,
    compute_multiplier,
    is_extrapolated,
    leave_one_rung_out,
    multiplier_interval,
    noise_band,
)
from mup_jax.analysis.power import seeds_for_multiplier

COSTS = ("tokens", "flops", "seconds")
# Relative noise of a loss whose effect on a multiplier is shown: what is left of it in large runs.
LOSS_NOISE = 1e-3
# Ratios of two multipliers for which the power analysis says how many seeds tell them apart.
RATIOS = (1.05, 1.1, 1.25, 1.5)


def add_multipliers(report: dict[str, Any]) -> list[str]:
    """Adds what can be computed of multipliers to a report; returns notes on the rest.

    Each summary of `report["optimizers"]` gets

    - `multipliers`: cost -> rung -> value, extrapolated, and low and high of the 90% interval where
      the seeds give one. The costs of a run are its training "tokens", the training "flops" of the
      model, and the "seconds" of its steps, the optimizer's included.
    - `compute_multiplier`: those by "flops", as published, with `noise_band` (what a change of the
      loss by 0.1% does) and `without_a_rung` (the range when one of the baseline's inner rungs is
      left out), where there are inner rungs.
    - `law_multiplier`: likewise, of the law fitted to the baseline in place of interpolation.

    The report gets `law` (E, A, α, points and doubt; or the doubt alone, where there is no law) and
    `power` (slope of the baseline's curve at its end, seeds needed by ratio of multipliers, and
    seeds that were run), or None.
    """
    optimizers, baseline = report["optimizers"], report["baseline"]
    report |= {"law": None, "power": None}
    for summary in optimizers.values():
        summary |= {
            "multipliers": {cost: {} for cost in COSTS},
            "compute_multiplier": {},
            "law_multiplier": {},
        }
    if baseline not in optimizers:
        return [f"There are no compute multipliers, because no {baseline} run has finished."]
    rungs = list(optimizers[baseline]["final_loss"])
    flops = _costs(report, "flops", optimizers[baseline])
    loss = [optimizers[baseline]["final_loss"][rung] for rung in rungs]
    try:
        compute_multiplier(
            flops[rungs[0]] if rungs else 1.0,
            loss[:1],
            baseline_compute=list(flops.values()),
            baseline_loss=loss,
        )
    except ValueError as error:
        return [f"There are no compute multipliers: {error}."]

    notes = []
    for cost in COSTS:
        try:
            for name, summary in optimizers.items():
                summary["multipliers"][cost] = _multipliers(report, name, cost)
        except ValueError as error:  # seconds, of rungs that ran on different machines
            notes.append(f"There are no multipliers by {cost}: {error}.")
    for name, summary in optimizers.items():
        summary["compute_multiplier"] = {
            rung: dict(entry) for rung, entry in summary["multipliers"]["flops"].items()
        }
        if name != baseline:
            _add_sensitivity(report, summary)
    _add_law(report)
    _add_power(report)
    return notes


def _costs(report: Mapping[str, Any], cost: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """Of a run at each rung that has a loss and this cost."""
    if cost == "seconds":
        of_rung = summary["seconds_per_run"]
    else:
        of_rung = {rung["name"]: rung[cost] for rung in report["rungs"]}
    return {rung: of_rung[rung] for rung in summary["final_loss"] if rung in of_rung}


def _curve(report: Mapping[str, Any], cost: str) -> tuple[list[float], list[list[float]]]:
    """Cost and losses by seed of the baseline."""
    baseline = report["optimizers"][report["baseline"]]
    costs = _costs(report, cost, baseline)
    return list(costs.values()), [baseline["final_loss_by_seed"][rung] for rung in costs]


def _multipliers(
    report: Mapping[str, Any], name: str, cost: str, estimator: Estimator = "interpolation"
) -> dict[str, Any]:
    summary = report["optimizers"][name]
    costs = _costs(report, cost, summary)
    parity = {
        rung: {"value": 1.0, "extrapolated": False, "low": 1.0, "high": 1.0}
        for rung in costs
        if _is_baseline(report, summary, rung)
    }
    costs = {rung: value for rung, value in costs.items() if rung not in parity}
    curve_cost, curve_losses = _curve(report, cost)
    curve_loss = [float(np.mean(cell)) for cell in curve_losses]
    if len(curve_cost) < 2 or not costs:
        return parity
    loss = np.array([summary["final_loss"][rung] for rung in costs])
    outside = is_extrapolated(loss, baseline_loss=curve_loss)
    values = compute_multiplier(
        list(costs.values()),
        loss,
        baseline_compute=curve_cost,
        baseline_loss=curve_loss,
        estimator=estimator,
    )
    entries = {
        rung: {"value": float(values[i]), "extrapolated": bool(outside[i])}
        for i, rung in enumerate(costs)
        if np.isfinite(values[i])  # a law may never reach a loss
    }
    cells = {rung: summary["final_loss_by_seed"][rung] for rung in entries}
    repeated = {rung: cell for rung, cell in cells.items() if len(cell) > 1}
    if repeated and all(len(cell) > 1 for cell in curve_losses):
        interval = multiplier_interval(
            [costs[rung] for rung in repeated],
            list(repeated.values()),
            baseline_compute=curve_cost,
            baseline_losses=curve_losses,
            estimator=estimator,
        )
        for rung, low, high in zip(repeated, interval.low, interval.high, strict=True):
            # JSON has no infinity: an unbounded interval is left out, and a note says so.
            if np.isfinite(high):
                entries[rung] |= {"low": float(low), "high": float(high)}
    return parity | entries


def _is_baseline(report: Mapping[str, Any], summary: Mapping[str, Any], rung: str) -> bool:
    """Whether these are the baseline's own runs, as at the base in all parametrizations."""
    of_baseline = report["optimizers"][report["baseline"]]["final_loss_by_seed"].get(rung)
    is_optimizer = summary["optimizer"] == report["baseline"]
    return is_optimizer and summary["final_loss_by_seed"][rung] == of_baseline


def _add_sensitivity(report: Mapping[str, Any], summary: dict[str, Any]) -> None:
    entries = summary["compute_multiplier"]
    costs = {r: cost for r, cost in _costs(report, "flops", summary).items() if r in entries}
    if not costs:
        return
    curve_cost, curve_losses = _curve(report, "flops")
    given = list(costs.values()), [summary["final_loss"][rung] for rung in costs]
    curve_loss = [float(np.mean(cell)) for cell in curve_losses]
    low, high = noise_band(
        *given, baseline_compute=curve_cost, baseline_loss=curve_loss, noise=LOSS_NOISE
    )
    for i, rung in enumerate(costs):
        entries[rung]["noise_band"] = [float(low[i]), float(high[i])]
    if len(curve_cost) > 2:
        low, high = leave_one_rung_out(
            *given, baseline_compute=curve_cost, baseline_loss=curve_loss
        )
        for i, rung in enumerate(costs):
            entries[rung]["without_a_rung"] = [float(low[i]), float(high[i])]


def _add_law(report: dict[str, Any]) -> None:
    curve_cost, curve_losses = _curve(report, "flops")
    optimizers = report["optimizers"]
    seeds = min(len(cell) for cell in curve_losses)
    # An outlier is what noise does not do; without one this is the least squares that the
    # multipliers read.
    delta = max(LOSS_NOISE, 4 * (report["seed_noise"] or 0.0) / np.sqrt(seeds))
    try:
        law = fit_scaling_law(
            curve_cost, [float(np.mean(cell)) for cell in curve_losses], delta=delta
        )
        by_law = {name: _multipliers(report, name, "flops", "law") for name in optimizers}
    except ValueError as error:
        report["law"] = {"doubt": f"There is no law: {error}."}
        return
    report["law"] = {
        "irreducible": law.irreducible,
        "coefficient": law.coefficient,
        "exponent": law.exponent,
        "points": law.points,
        "doubt": law.doubt,
    }
    for name, summary in optimizers.items():
        summary["law_multiplier"] = by_law[name]


def _add_power(report: dict[str, Any]) -> None:
    if not report["seed_noise"]:
        return
    curve_cost, curve_losses = _curve(report, "flops")
    cost, loss = np.log(curve_cost[-2:]), np.log([np.mean(cell) for cell in curve_losses[-2:]])
    slope = float((loss[1] - loss[0]) / (cost[1] - cost[0]))
    # Parametrizations share the cells of the base.
    cells = {
        tuple(summary["final_loss_by_seed"][rung])
        for summary in report["optimizers"].values()
        for rung in summary["final_loss"]
    }
    try:
        seeds = [
            [ratio, seeds_for_multiplier(ratio, slope, report["seed_noise"], cells=len(cells))]
            for ratio in RATIOS
        ]
    except ValueError:  # a curve so flat that no number of seeds is enough
        return
    run = min(len(cell) for cell in curve_losses)
    report["power"] = {"slope": slope, "seeds": seeds, "seeds_run": run}
