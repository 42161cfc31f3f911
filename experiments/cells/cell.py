"""What is to be run, in plain data."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mup_jax.training import identity

# Cell name -> its result.
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
      size: name of its model size.
      label: what it is, for people.
      config: of `mup_jax.training.train`.
    """

    size: str
    label: str
    config: ConfigDict

    @cached_property
    def name(self) -> str:
        """The name of its folder: equal for equal configurations."""
        return identity(self.config)


class Task(NamedTuple):
    """Cells that share a size and a program, to be run by one process so that it compiles once."""

    size: str
    name: str
    cells: list[Cell]
    flops: float


@dataclass(frozen=True)
class Work:
    """What there is to do, given what has finished.

    Attributes:
      missing_tasks: those that can run now, the most urgent first.
      remaining_cells: how many cells of each size have not finished, those included that cannot
        run yet.
      flops: of one cell of each size.
      workers: processes side by side, each with one core where `platform` is "cpu".
      platform: of JAX; empty for its own choice.
    """

    missing_tasks: Callable[[Results], list[Task]]
    remaining_cells: Callable[[Results], dict[str, int]]
    flops: Mapping[str, float]
    workers: int
    platform: str


def check_workers(workers: int, platform: str) -> None:
    """Raises ValueError where processes would fight over an accelerator."""
    if workers < 1 or (workers > 1 and platform != "cpu"):
        raise ValueError(
            f"config.workers={workers} with platform={platform!r}: several workers share a machine "
            "on platform 'cpu' only"
        )


class FinishedCells:
    """Reads the results in a folder, each once.

    Args:
      workdir: the folder of all cells.
    """

    def __init__(self, workdir: Path):
        self._folder = workdir / "cells"
        self._results: Results = {}

    def __call__(self) -> Results:
        """The results of all finished cells, by cell name."""
        for path in sorted(self._folder.glob("*/result.json")):
            if path.parent.name not in self._results:
                self._results[path.parent.name] = json.loads(path.read_text())
        return dict(self._results)
