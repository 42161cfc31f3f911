"""The lines of results.jsonl -> the contents of report.json."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mup_jax.analysis.multiplier import (
    compute_multiplier,
    is_extrapolated,
    multiplier_interval,
    pooled_noise,
)

BASELINE = "adamw"

# {optimizer: {rung: {base learning rate: lines}}}, rungs and learning rates ascending
Runs = dict[str, dict[str, dict[float, list[dict[str, Any]]]]]


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compares the optimizers of a ladder, finished or not.

    The smallest rung by parameters holds each optimizer's learning-rate grid, and the learning rate
    with the lowest mean validation loss there is the optimizer's. A larger rung's result is its
    cells of that same base learning rate; cells at others check whether it is still the best.
    A diverged run counts as an infinite loss.

    Args:
      results: one dict per cell, as the ladder writes them to results.jsonl. Losses are in nats per
        token, `flops` in FLOPs of the whole run, `seconds` in seconds.

    Returns:
      A dict that `json.dumps` takes. Everything measured is keyed by rung name, and a rung without
      a measurement is absent:

      - `rungs`: ascending; name, width, depth, parameters, tokens, steps, training flops.
      - `optimizers[name]`: `best_learning_rate` (tuned at the smallest rung, best of those tried at
        larger ones), `learning_rate_sweep` ([learning rate, mean loss or None], all that was
        tried), `final_loss`, `final_loss_by_seed` (None where diverged), `compute_multiplier`
        (value, low, high, extrapolated; low and high are absent where seeds cannot tell),
        `coordinate_check` (feature change relative to the smallest rung), `optimizer_flops_share`,
        `optimizer_seconds_share`, `steps_per_second`. The last five are of the transferred rate.
      - `baseline`, `seed_noise` (relative standard deviation of the loss, or None), `corpus`,
        `versions`, `device`, and `notes`: sentences that a reader of the numbers must know.

    Raises:
      ValueError: no results, or two cells that differ in nothing that a ladder varies.
    """
    if not results:
        raise ValueError("results has 0 cells: run the ladder before its report")
    rungs = _rungs(results)
    runs = _group(results, rungs)
    optimizers = {name: _optimizer(by_rung, rungs[0]["name"]) for name, by_rung in runs.items()}
    notes = [
        *_unequal(results),
        *_add_multipliers(optimizers, rungs),
    ]
    noise = _seed_noise(optimizers)
    for name, summary in optimizers.items():
        notes += _notes(name, summary, runs[name], rungs, noise)
    return {
        "rungs": rungs,
        "optimizers": optimizers,
        "baseline": BASELINE,
        "seed_noise": noise,
        "corpus": results[0]["corpus"],
        "versions": results[0]["versions"],
        "device": results[0]["device"],
        "notes": notes,
    }


def _rungs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rungs = {}
    for line in results:
        keys = ("width", "depth", "parameters", "tokens", "steps")
        rungs[line["rung"]] = {
            "name": line["rung"],
            **{key: line[key] for key in keys},
            "flops": line["flops"]["model"],
        }
    return sorted(rungs.values(), key=lambda rung: rung["parameters"])


def _group(results: Sequence[dict[str, Any]], rungs: list[dict[str, Any]]) -> Runs:
    names = dict.fromkeys(line["optimizer"] for line in results)
    runs: Runs = {}
    # The baseline comes first in every table.
    for name in sorted(names, key=lambda name: name != BASELINE):
        runs[name] = {}
        for rung in rungs:
            lines = [x for x in results if x["optimizer"] == name and x["rung"] == rung["name"]]
            lines.sort(key=lambda line: (line["learning_rate"], line["seed"]))
            for first, second in itertools.pairwise(lines):
                if _place(first) == _place(second):
                    raise ValueError(
                        f"cells {first['cell']} and {second['cell']} are both {name} at "
                        f"{rung['name']}, learning rate {first['learning_rate']:g}, seed "
                        f"{first['seed']}: keep one configuration of the ladder per folder"
                    )
            if lines:
                runs[name][rung["name"]] = {
                    rate: list(cells)
                    for rate, cells in itertools.groupby(lines, lambda x: x["learning_rate"])
                }
    return runs


def _place(line: dict[str, Any]) -> tuple[float, int]:
    return line["learning_rate"], line["seed"]


def _losses(lines: Iterable[dict[str, Any]]) -> np.ndarray:
    """Validation losses of shape (seeds,), inf where the run diverged."""
    losses = [line["validation_loss"] for line in lines]
    return np.array([np.inf if x is None or not np.isfinite(x) else x for x in losses])


def _mean_loss(lines: Iterable[dict[str, Any]]) -> float:
    return float(np.mean(_losses(lines)))


def _best(by_rate: dict[float, list[dict[str, Any]]]) -> float | None:
    best = min(by_rate, key=lambda rate: _mean_loss(by_rate[rate]))
    return best if np.isfinite(_mean_loss(by_rate[best])) else None


def _optimizer(by_rung: dict[str, Any], base_rung: str) -> dict[str, Any]:
    best = {rung: _best(by_rate) for rung, by_rate in by_rung.items()}
    tuned = best.get(base_rung)
    chosen = {rung: by_rate[tuned] for rung, by_rate in by_rung.items() if tuned in by_rate}
    losses = {rung: _losses(lines) for rung, lines in chosen.items()}
    changes = {
        rung: [x["coordinate_check"]["feature_change_rms"] for x in lines if x["coordinate_check"]]
        for rung, lines in chosen.items()
    }
    base_changes = changes.get(base_rung)
    # A run that diverged ended early: its time says nothing.
    timed = {
        rung: [x for x in lines if x["validation_loss"] is not None]
        for rung, lines in chosen.items()
    }
    return {
        "best_learning_rate": {rung: rate for rung, rate in best.items() if rate is not None},
        "final_loss": {
            rung: float(np.mean(x)) for rung, x in losses.items() if np.isfinite(x).all()
        },
        "final_loss_by_seed": {
            rung: [_finite_or_none(loss) for loss in x] for rung, x in losses.items()
        },
        "compute_multiplier": {},
        "learning_rate_sweep": {
            rung: [[rate, _finite_or_none(_mean_loss(lines))] for rate, lines in by_rate.items()]
            for rung, by_rate in by_rung.items()
        },
        "coordinate_check": {
            rung: float(np.mean(values) / np.mean(base_changes))
            for rung, values in changes.items()
            if values and base_changes
        },
        "optimizer_flops_share": {
            rung: _mean(
                x["flops"]["optimizer"] / (x["flops"]["model"] + x["flops"]["optimizer"])
                for x in lines
            )
            for rung, lines in chosen.items()
        },
        "optimizer_seconds_share": {
            rung: _mean(x["seconds"]["optimizer_share"] for x in lines)
            for rung, lines in timed.items()
            if lines
        },
        "steps_per_second": {
            rung: _mean(
                x["steps"] / (x["seconds"]["total"] - x["seconds"]["compile"]) for x in lines
            )
            for rung, lines in timed.items()
            if lines
        },
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _finite_or_none(loss: float) -> float | None:
    return float(loss) if np.isfinite(loss) else None


def _seed_noise(optimizers: dict[str, Any]) -> float | None:
    cells = [
        summary["final_loss_by_seed"][rung]
        for summary in optimizers.values()
        for rung in summary["final_loss"]
    ]
    return pooled_noise(cells)[0] if any(len(cell) > 1 for cell in cells) else None


def _add_multipliers(optimizers: dict[str, Any], rungs: list[dict[str, Any]]) -> list[str]:
    """Fills in every `compute_multiplier` that can be computed; returns notes on the others."""
    if BASELINE not in optimizers:
        return [f"There are no compute multipliers, because no {BASELINE} run has finished."]
    compute = {rung["name"]: rung["flops"] for rung in rungs}
    baseline = optimizers[BASELINE]["final_loss"]
    curve = {
        "baseline_compute": [compute[rung] for rung in baseline],
        "baseline_loss": list(baseline.values()),
    }
    baseline_losses = [optimizers[BASELINE]["final_loss_by_seed"][rung] for rung in baseline]
    try:
        compute_multiplier(curve["baseline_compute"], curve["baseline_loss"], **curve)
    except ValueError as error:
        return [f"There are no compute multipliers: {error}."]

    for name, summary in optimizers.items():
        losses = summary["final_loss"]
        for rung, loss in losses.items():
            value = compute_multiplier(compute[rung], loss, **curve)
            outside = is_extrapolated(loss, baseline_loss=curve["baseline_loss"])
            summary["compute_multiplier"][rung] = {
                "value": float(value),
                "extrapolated": bool(outside),
            }
        by_seed = {rung: summary["final_loss_by_seed"][rung] for rung in losses}
        repeated = {rung: cell for rung, cell in by_seed.items() if len(cell) > 1}
        if name == BASELINE:
            for entry in summary["compute_multiplier"].values():
                entry |= {"value": 1.0, "low": 1.0, "high": 1.0}
        elif repeated and all(len(cell) > 1 for cell in baseline_losses):
            interval = multiplier_interval(
                [compute[rung] for rung in repeated],
                list(repeated.values()),
                baseline_compute=curve["baseline_compute"],
                baseline_losses=baseline_losses,
            )
            for rung, low, high in zip(repeated, interval.low, interval.high, strict=True):
                # JSON has no infinity: an unbounded interval is left out, and a note says so.
                if np.isfinite(high):
                    summary["compute_multiplier"][rung] |= {"low": float(low), "high": float(high)}
    return []


def _unequal(results: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"Cells differ in their {key}, and the report names the first only; their "
        f"{'losses' if key == 'corpus' else 'times'} may not compare."
        for key in ("corpus", "versions", "device")
        if len({json.dumps(line[key], sort_keys=True) for line in results}) > 1
    ]


def _notes(
    name: str,
    summary: dict[str, Any],
    by_rung: dict[str, Any],
    rungs: list[dict[str, Any]],
    noise: float | None,
) -> list[str]:
    base_rung = rungs[0]["name"]
    tuned = summary["best_learning_rate"].get(base_rung)
    if tuned is None:
        return [
            f"{name} has no finished learning rate at {base_rung}, so none could be transferred."
        ]
    notes = []
    grid = list(by_rung[base_rung])
    if len(grid) == 1:
        notes.append(f"{name} was not tuned: {base_rung} has one learning rate, {tuned:g}.")
    elif tuned in (grid[0], grid[-1]):
        edge = "lower" if tuned == grid[0] else "upper"
        notes.append(
            f"{name}: the best learning rate at {base_rung}, {tuned:g}, is the {edge} end of its "
            "grid; a better one may lie beyond."
        )
    missing = [rung["name"] for rung in rungs if tuned not in by_rung.get(rung["name"], {})]
    if missing:
        notes.append(f"{name} has no result yet at {_join(missing)}.")
    for rung, by_rate in by_rung.items():
        notes += [
            f"{name} at {rung}: {_diverged(lines)} of {len(lines)} runs diverged at learning rate "
            f"{rate:g}."
            for rate, lines in by_rate.items()
            if _diverged(lines)
        ]
        if tuned in by_rate:
            notes += _transfer_note(name, rung, by_rate, tuned, noise)
    if name != BASELINE:
        multipliers = summary["compute_multiplier"]
        outside = [rung for rung, entry in multipliers.items() if entry["extrapolated"]]
        undecided = [
            rung
            for rung, entry in multipliers.items()
            if "low" in entry and entry["low"] <= 1 <= entry["high"]
        ]
        unbounded = [rung for rung, entry in multipliers.items() if "low" not in entry]
        if outside:
            notes.append(
                f"{name}: the multiplier at {_join(outside)} extrapolates {BASELINE}'s curve."
            )
        if undecided:
            notes.append(
                f"{name}: the multiplier's 90% interval at {_join(undecided)} includes 1, so these "
                f"seeds do not tell it from {BASELINE}."
            )
        if unbounded:
            notes.append(
                f"{name}: the multiplier at {_join(unbounded)} has no interval, because it or "
                f"{BASELINE} has a rung of one seed, or the seed noise hides what {BASELINE} gains "
                "from rung to rung."
            )
    return notes


def _diverged(lines: list[dict[str, Any]]) -> int:
    return int(np.sum(np.isinf(_losses(lines))))


def _transfer_note(
    name: str, rung: str, by_rate: dict[float, Any], tuned: float, noise: float | None
) -> list[str]:
    """Says so when another learning rate was better by more than two standard errors."""
    best = _best(by_rate)
    if best is None or best == tuned:
        return []
    loss, best_loss = _mean_loss(by_rate[tuned]), _mean_loss(by_rate[best])
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


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
