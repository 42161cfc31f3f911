"""Sentences that a reader of a ladder's numbers must know."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mup_jax.analysis.runs import Line, Series, best_rate, losses, mean_loss, paired


def notes_on_lines(results: Sequence[Line]) -> list[str]:
    """On what should be one for all cells and is not, and on rules that were measured."""
    rules = {line["optimizer"]: line["rule"] for line in results if line.get("rule")}
    notes = [f"{optimizer} is {rule}." for optimizer, rule in rules.items()]
    return notes + [
        f"Cells differ in their {key}, and the report names the first only; their "
        f"{'losses' if key == 'corpus' else 'times'} may not compare."
        for key in ("corpus", "versions", "device")
        if len({json.dumps(line[key], sort_keys=True) for line in results}) > 1
    ]


def notes_on_series(series: Series, report: Mapping[str, Any]) -> list[str]:
    """On what is missing, at the edge of its grid, diverged, extrapolated or undecided."""
    name, base_rung = series.name, report["rungs"][0]["name"]
    summary = report["optimizers"][name]
    tuned = summary["best_learning_rate"].get(base_rung)
    if tuned is None:
        return [
            f"{name} has no finished learning rate at {base_rung}, so none could be transferred."
        ]
    notes = []
    shares_base = series.parametrization != "mup" and any(
        line.get("parametrization", "mup") == "mup" for line in series.lines
    )
    if not shares_base:
        tuning = summary["tuning"]
        grid = tuning["grid"] if tuning else summary["learning_rate_sweep"][base_rung]
        notes += _on_grid(base_rung, name, grid, tuned)
    rungs = [rung["name"] for rung in report["rungs"]]
    missing = [rung for rung in rungs if tuned not in series.by_rung.get(rung, {})]
    if missing:
        notes.append(f"{name} has no result yet at {_join(missing)}.")
    for rung, by_rate in series.by_rung.items():
        if rung == base_rung and shares_base:
            continue
        notes += [
            f"{name} at {rung}: {_diverged(lines)} of {len(lines)} runs diverged at learning rate "
            f"{rate:g}."
            for rate, lines in by_rate.items()
            if _diverged(lines)
        ]
        if tuned in by_rate:
            notes += _on_transfer(name, rung, by_rate, tuned, report["seed_noise"])
    if name != report["baseline"]:
        notes += _on_multipliers(name, summary["compute_multiplier"], report["baseline"])
    return notes


def _on_grid(base_rung: str, name: str, grid: list[Any], tuned: float) -> list[str]:
    """Says so where nothing was tuned, or where the best stands at an end of what was tried."""
    if len(grid) == 1:
        return [f"{name} was not tuned: {base_rung} has one learning rate, {tuned:g}."]
    *best, _ = min(grid, key=lambda point: np.inf if point[-1] is None else point[-1])
    notes = []
    for axis, what in enumerate(("learning rate", "factor of embedding and readout")[: len(best)]):
        tried = sorted({point[axis] for point in grid})
        if len(tried) > 1 and best[axis] in (tried[0], tried[-1]):
            edge = "lower" if best[axis] == tried[0] else "upper"
            notes.append(
                f"{name}: the best {what} at {base_rung}, {best[axis]:g}, is the {edge} end of its "
                "grid; a better one may lie beyond."
            )
    return notes


def _on_transfer(
    name: str,
    rung: str,
    by_rate: Mapping[float, Sequence[Line]],
    tuned: float,
    noise: float | None,
) -> list[str]:
    """Says so when another learning rate was better by more than two standard errors."""
    best, by_rate = best_rate(by_rate), paired(by_rate)
    if best is None or best == tuned:
        return []
    loss, best_loss = mean_loss(by_rate[tuned]), mean_loss(by_rate[best])
    if noise is None:
        gap = "the seed noise is unknown"
    else:
        error = noise * best_loss * np.sqrt(1 / len(by_rate[tuned]) + 1 / len(by_rate[best]))
        if loss - best_loss < 2 * error:
            return []
        gap = f"the seed noise of that difference is {error:.4f}"
    return [
        f"{name} at {rung}: the transferred learning rate {tuned:g} was not the best tried; "
        f"{best / tuned:.3g} times it reached a loss of {best_loss:.4f} against {loss:.4f}, and "
        f"{gap}."
    ]


def _on_multipliers(name: str, multipliers: Mapping[str, Any], baseline: str) -> list[str]:
    notes = []
    outside = [rung for rung, entry in multipliers.items() if entry["extrapolated"]]
    undecided = [
        rung
        for rung, entry in multipliers.items()
        if "low" in entry and entry["low"] <= 1 <= entry["high"] and entry["low"] < entry["high"]
    ]
    unbounded = [rung for rung, entry in multipliers.items() if "low" not in entry]
    if outside:
        notes.append(f"{name}: the multiplier at {_join(outside)} extrapolates {baseline}'s curve.")
    if undecided:
        notes.append(
            f"{name}: the multiplier's 90% interval at {_join(undecided)} includes 1, so these "
            f"seeds do not tell it from {baseline}."
        )
    if unbounded:
        notes.append(
            f"{name}: the multiplier at {_join(unbounded)} has no interval, because it or "
            f"{baseline} has a rung of one seed, or the seed noise hides what {baseline} gains "
            "from rung to rung."
        )
    return notes


def _diverged(lines: Sequence[Line]) -> int:
    return int(np.sum(np.isinf(losses(lines))))


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
