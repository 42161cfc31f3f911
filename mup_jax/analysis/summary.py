"""The lines of results.jsonl -> the contents of report.json."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mup_jax.analysis.comparison import add_multipliers
from mup_jax.analysis.multiplier import pooled_noise
from mup_jax.analysis.notes import notes_on_lines, notes_on_series
from mup_jax.analysis.runs import (
    BASELINE,
    Line,
    Series,
    best_rate,
    losses,
    mean_loss,
    paired,
    rungs_of,
    series_of,
)


def summarize(results: Sequence[Line]) -> dict[str, Any]:
    """Compares the optimizers of a ladder, finished or not.

    The smallest rung by parameters says at which learning rate an optimizer was tuned, in every
    parametrization that has no runs of its own there: the one of its cells that do not tune, or, of
    several, that with the lowest mean validation loss. A larger rung's result is its cells of that
    same base learning rate; cells at others, or at another weight decay, check whether it is still
    the best. A diverged run counts as an infinite loss.

    Args:
      results: one dict per cell, as the ladder writes them to results.jsonl. Losses are in nats per
        token, `flops` in FLOPs of the whole run, `seconds` in seconds.

    Returns:
      A dict that `json.dumps` takes. Everything measured is keyed by rung name, and a rung without
      a measurement is absent:

      - `rungs`: ascending; name, width, depth, parameters, tokens, steps, batch_size, training
        flops.
      - `optimizers[name]`, where the name is that of the optimizer in µP, and "optimizer,
        parametrization" otherwise: `optimizer`, `parametrization`, `weight_decay` (λ of the base),
        `best_learning_rate` (tuned at the smallest rung, best of those tried at larger ones),
        `embedding_readout_factor` (tuned; None in results that have none), `tuning` (see
        `_tuning`; None where the cells that tune are the result), `learning_rate_sweep`
        ([learning rate, mean loss of equal seeds or None], where it was tuned with the best factor
        of each), `checks`
        (see `_checks`), `final_loss`,
        `final_loss_by_seed` (None where diverged), `multipliers` and `compute_multiplier` and
        `law_multiplier` (see `add_multipliers`), `coordinate_check` (feature change relative to the
        smallest rung), `optimizer_flops_share`, `optimizer_seconds_share`, `seconds_per_run` (of
        steps alone, on their own). The last four are of the transferred rate.
      - `baseline`, `law` and `power` (see `add_multipliers`), `seed_noise` (relative standard
        deviation of the loss, or None), `corpus`, `versions`, `device`, and `notes`: sentences that
        a reader of the numbers must know.

    Raises:
      ValueError: no results but those of tuning, or two cells that differ in nothing that a
        ladder varies.
    """
    if all(line.get("is_tuning") for line in results):
        raise ValueError(
            f"results has {len(results)} cells, none of them beyond tuning: let the ladder run on "
            "before its report"
        )
    rungs = rungs_of(results)
    series = series_of(results, rungs)
    gradient_seconds = _gradient_seconds(results)
    optimizers = {name: _optimizer(of, rungs, gradient_seconds) for name, of in series.items()}
    noise = _seed_noise(optimizers)
    report = {
        "rungs": rungs,
        "optimizers": optimizers,
        "baseline": BASELINE,
        "seed_noise": noise,
        "corpus": results[0]["corpus"],
        "versions": results[0]["versions"],
        "device": results[0]["device"],
    }
    notes = [*notes_on_lines(results), *add_multipliers(report)]
    for of in series.values():
        notes += notes_on_series(of, report)
    return report | {"notes": notes}


def _optimizer(
    series: Series, rungs: Sequence[Mapping[str, Any]], gradient_seconds: Mapping[str, float]
) -> dict[str, Any]:
    base_rung = rungs[0]["name"]
    steps = {rung["name"]: rung["steps"] for rung in rungs}
    best = {rung: best_rate(by_rate) for rung, by_rate in series.by_rung.items()}
    tuned = best.get(base_rung)
    chosen = {rung: by_rate[tuned] for rung, by_rate in series.by_rung.items() if tuned in by_rate}
    by_seed = {rung: losses(lines) for rung, lines in chosen.items()}
    sweep = {
        rung: [[rate, _finite_or_none(mean_loss(lines))] for rate, lines in paired(by_rate).items()]
        for rung, by_rate in series.by_rung.items()
    }
    tuning = _tuning(series.tuning)
    if tuning is not None:
        sweep[base_rung] = _best_factors(tuning["grid"])
    changes = {
        rung: [
            check["feature_change_rms"]
            for check in (line["coordinate_check"] for line in lines)
            if check and check["feature_change_rms"] is not None
        ]
        for rung, lines in chosen.items()
    }
    base_changes = changes.get(base_rung)
    shares = {
        rung: [x["seconds"]["optimizer_share"] for x in lines] for rung, lines in chosen.items()
    }
    seconds_share = {  # what else the machine did in one run's moment of measuring is left out
        rung: float(np.median([x for x in of if x is not None]))
        for rung, of in shares.items()
        if any(x is not None for x in of)
    }
    return {
        "optimizer": series.optimizer,
        "parametrization": series.parametrization,
        "weight_decay": series.weight_decay,
        "best_learning_rate": {rung: rate for rung, rate in best.items() if rate is not None},
        "embedding_readout_factor": series.lines[0].get("embedding_readout_factor"),
        "tuning": tuning,
        "learning_rate_sweep": sweep,
        "checks": {} if tuned is None else _checks(series, chosen, base_rung, tuned),
        "final_loss": {
            rung: float(np.mean(x)) for rung, x in by_seed.items() if np.isfinite(x).all()
        },
        "final_loss_by_seed": {
            rung: [_finite_or_none(loss) for loss in x] for rung, x in by_seed.items()
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
            if all(x["flops"]["optimizer"] is not None for x in lines)
        },
        "optimizer_seconds_share": seconds_share,
        "seconds_per_run": {
            rung: steps[rung] * gradient_seconds[rung] / (1 - share)
            for rung, share in seconds_share.items()
            if rung in gradient_seconds
        },
    }


def _tuning(lines: Sequence[Line]) -> dict[str, Any] | None:
    """The number of `cells`, and the `grid`: [learning rate, factor, mean loss or None], ascending.

    None where there is no line.
    """
    if not lines:
        return None
    keys = ("learning_rate", "embedding_readout_factor")
    points: dict[tuple[float, ...], list[Line]] = {}
    for line in lines:
        points.setdefault(tuple(line[key] for key in keys), []).append(line)
    grid = [[*point, _finite_or_none(mean_loss(of))] for point, of in sorted(points.items())]
    return {"cells": len(lines), "grid": grid}


def _best_factors(grid: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Of each learning rate of a grid the lowest loss."""
    losses: dict[float, list[float]] = {}
    for rate, _, loss in grid:
        losses.setdefault(rate, []).append(np.inf if loss is None else loss)
    return [[rate, _finite_or_none(min(of))] for rate, of in losses.items()]


def _checks(
    series: Series, chosen: Mapping[str, Sequence[Line]], base_rung: str, tuned: float
) -> dict[str, Any]:
    """{rung: {"learning_rate" or "weight_decay": [[factor, by how much the loss is higher]]}}.

    The difference, in nats and to runs of the same seeds at the transferred values, is None where a
    run diverged.
    """
    checks: dict[str, Any] = {}
    for rung, transferred in chosen.items():
        if rung == base_rung:
            continue
        of_seed = {line["seed"]: losses([line])[0] for line in transferred}
        tried = {
            "learning_rate": {
                rate / tuned: lines for rate, lines in series.by_rung[rung].items() if rate != tuned
            },
            "weight_decay": {
                value / series.weight_decay: lines
                for value, lines in series.by_decay.get(rung, {}).items()
            },
        }
        checks[rung] = {
            key: [
                [factor, _difference(lines, of_seed)]
                for factor, lines in by_factor.items()
                if any(line["seed"] in of_seed for line in lines)
            ]
            for key, by_factor in tried.items()
            if by_factor
        }
    return {rung: found for rung, found in checks.items() if found}


def _difference(lines: Sequence[Line], of_seed: Mapping[int, float]) -> float | None:
    paired = [line for line in lines if line["seed"] in of_seed]
    there = np.array([of_seed[line["seed"]] for line in paired])
    with np.errstate(invalid="ignore"):
        return _finite_or_none(float(np.mean(losses(paired) - there)))


def _gradient_seconds(results: Iterable[Line]) -> dict[str, float]:
    """Seconds for loss and gradient of a step: the median of all runs of a rung, which share it."""
    found: dict[str, list[float]] = {}
    for line in results:
        seconds = line["seconds"].get("gradient")
        if seconds is not None:
            found.setdefault(line["rung"], []).append(seconds)
    return {rung: float(np.median(seconds)) for rung, seconds in found.items()}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _finite_or_none(loss: float) -> float | None:
    return float(loss) if np.isfinite(loss) else None


def _seed_noise(optimizers: Mapping[str, Any]) -> float | None:
    # Once, where parametrizations share the runs of the base.
    cells = {
        tuple(summary["final_loss_by_seed"][rung])
        for summary in optimizers.values()
        for rung in summary["final_loss"]
    }
    return pooled_noise(sorted(cells))[0] if any(len(cell) > 1 for cell in cells) else None
