"""The lines of results.jsonl, sorted by what they are runs of."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BASELINE = "adamw"

Line = Mapping[str, Any]


def series_name(optimizer: str, parametrization: str) -> str:
    """One optimizer in one parametrization: "muon" in µP, "muon, sp" otherwise."""
    return optimizer if parametrization == "mup" else f"{optimizer}, {parametrization}"


@dataclass
class Series:
    """The runs of one optimizer in one parametrization.

    Attributes:
      optimizer, parametrization: by name.
      weight_decay: λ of the base, of all runs but those of `by_decay`.
      by_rung: rung -> base learning rate -> lines, both ascending.
      by_decay: rung -> weight decay of the base -> lines, of those that differ in it.
      tuning: lines of the grid at the smallest rung, where its rates were tuned on runs of their
        own.
    """

    optimizer: str
    parametrization: str
    weight_decay: float
    by_rung: dict[str, dict[float, list[Line]]] = field(default_factory=dict)
    by_decay: dict[str, dict[float, list[Line]]] = field(default_factory=dict)
    tuning: list[Line] = field(default_factory=list)

    @property
    def name(self) -> str:
        return series_name(self.optimizer, self.parametrization)

    @property
    def lines(self) -> list[Line]:
        grids = [*self.by_rung.values(), *self.by_decay.values()]
        return [line for grid in grids for lines in grid.values() for line in lines]


def rungs_of(results: Sequence[Line]) -> list[dict[str, Any]]:
    """Name, width, depth, parameters, tokens, steps, batch and FLOPs of each rung, ascending."""
    keys = ("width", "depth", "parameters", "tokens", "steps", "batch_size")
    rungs = {
        line["rung"]: {
            "name": line["rung"],
            **{key: line[key] for key in keys},
            "flops": line["flops"]["model"],
        }
        for line in results
    }
    return sorted(rungs.values(), key=lambda rung: rung["parameters"])


def series_of(results: Sequence[Line], rungs: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """The series by name, the baseline first and µP before other parametrizations.

    At the base all parametrizations that have no runs of their own share those of µP. The weight
    decay of a series is that of its base; runs with another one are checks of it. A series of which
    only tuning runs have finished is left out.

    Raises:
      ValueError: two lines that differ in nothing that a ladder varies.
    """
    _check_places(results)
    base = rungs[0]["name"]
    tuning = [line for line in results if line.get("is_tuning")]
    results = [line for line in results if not line.get("is_tuning")]
    keys = {(line["optimizer"], _parametrization(line)): None for line in results}
    order = lambda key: (key[0] != BASELINE, key[1] != "mup")
    found: dict[str, Series] = {}
    for optimizer, parametrization in sorted(keys, key=order):
        of_optimizer = [line for line in results if line["optimizer"] == optimizer]
        own = [line for line in of_optimizer if _parametrization(line) == parametrization]
        at_base = [line for line in own if line["rung"] == base] or [
            line
            for line in of_optimizer
            if line["rung"] == base and _parametrization(line) == "mup"
        ]
        decay = (at_base or own)[0]["weight_decay"]
        series = Series(optimizer, parametrization, decay)
        for rung in rungs:
            of_rung = [line for line in own if line["rung"] == rung["name"]]
            lines = at_base if rung["name"] == base else of_rung
            usual = [line for line in lines if line["weight_decay"] == decay]
            other = [line for line in lines if line["weight_decay"] != decay]
            if usual:
                series.by_rung[rung["name"]] = _grouped(usual, "learning_rate")
            if other:
                series.by_decay[rung["name"]] = _grouped(other, "weight_decay")
        series.tuning = [
            line
            for line in tuning
            if line["optimizer"] == optimizer and _parametrization(line) == parametrization
        ]
        found[series.name] = series
    return found


def losses(lines: Iterable[Line]) -> np.ndarray:
    """Validation losses of shape (seeds,), inf where the run diverged."""
    found = [line["validation_loss"] for line in lines]
    return np.array([np.inf if x is None or not np.isfinite(x) else x for x in found])


def mean_loss(lines: Iterable[Line]) -> float:
    return float(np.mean(losses(lines)))


def paired(by_rate: Mapping[float, Sequence[Line]]) -> Mapping[float, Sequence[Line]]:
    """The runs of those seeds that every learning rate has; all runs where there is none."""
    common = set.intersection(*({line["seed"] for line in of} for of in by_rate.values()))
    if not common:
        return by_rate
    return {rate: [line for line in of if line["seed"] in common] for rate, of in by_rate.items()}


def best_rate(by_rate: Mapping[float, Sequence[Line]]) -> float | None:
    """The learning rate of the lowest mean loss, of equal seeds; None where all diverged."""
    by_rate = paired(by_rate)
    best = min(by_rate, key=lambda rate: mean_loss(by_rate[rate]))
    return best if np.isfinite(mean_loss(by_rate[best])) else None


def _parametrization(line: Line) -> str:
    return line.get("parametrization", "mup")


def _grouped(lines: Iterable[Line], key: str) -> dict[float, list[Line]]:
    lines = sorted(lines, key=lambda line: (line[key], line["seed"]))
    return {value: list(of) for value, of in itertools.groupby(lines, lambda line: line[key])}


def _check_places(results: Sequence[Line]) -> None:
    seen: dict[tuple[Any, ...], Line] = {}
    for line in results:
        keys = ("rung", "optimizer", "learning_rate", "weight_decay", "seed")
        others = (line.get("embedding_readout_factor"), line.get("is_tuning"))
        place = (_parametrization(line), *others, *(line[key] for key in keys))
        if place in seen:
            name = series_name(line["optimizer"], _parametrization(line))
            raise ValueError(
                f"cells {seen[place]['cell']} and {line['cell']} are both {name} at "
                f"{line['rung']}, learning rate {line['learning_rate']:g}, seed {line['seed']}: "
                "keep one configuration of the ladder per folder"
            )
        seen[place] = line
