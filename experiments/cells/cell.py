"""What is to be run, in plain data."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mup_jax.training import config as config_lib

# Of JAX; empty for its own choice.
PLATFORMS = ("", "cpu", "gpu", "cuda", "rocm", "tpu")

# Cell name -> its result.
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
      size: name of its model size.
      label: what it is, for people.
      config: of `mup_jax.training.train`; with the text of a file that the optimizer is from, which
        a worker need not have.
    """

    size: str
    label: str
    config: ConfigDict

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", config_lib.with_source(self.config))

    @cached_property
    def name(self) -> str:
        """The name of its folder: equal for equal configurations."""
        return config_lib.identity(self.config)


class Task(NamedTuple):
    """Cells that share a size and a program, to be run by one process so that it compiles once.

    Where they are small, one program trains all of them (`vectorized`). `claims` has the number to
    claim each cell with, by name.
    """

    size: str
    name: str
    cells: list[Cell]
    vectorized: bool = False
    claims: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Work:
    """What there is to do, given what has finished.

    Attributes:
      missing_tasks: those that can run now, the most urgent first.
      remaining_cells: how many cells have not finished, by size and name of their task, those
        included that cannot run yet.
      flops: of one cell of each size.
      workers: processes side by side, each with one core where `platform` is "cpu".
      platform: one of `PLATFORMS`.
    """

    missing_tasks: Callable[[Results], list[Task]]
    remaining_cells: Callable[[Results], dict[tuple[str, str], int]]
    flops: Mapping[str, float]
    workers: int
    platform: str


def without_machine(config: ConfigDict) -> ConfigDict:
    """A copy of what is to be run, without what says where and how: that is not in its results."""
    same = copy.deepcopy(config)
    same.update(workers=1, platform="", train=config_lib.without_machine(config.train))
    if "vectorized" in same:
        same.vectorized = False
    return same


def check_workers(workers: int, platform: str) -> None:
    """Raises ValueError where no launcher could start these workers."""
    if workers < 1:
        raise ValueError(f"config.workers={workers}: give at least one")
    if platform not in PLATFORMS:
        raise ValueError(f"config.platform={platform!r}: choose of {PLATFORMS}")


def check_warmup(tokens: Any, path: str) -> None:
    """Raises ValueError where an optimizer's own warm-up is neither a number of tokens nor None."""
    if tokens is not None and not (isinstance(tokens, int) and tokens >= 0):
        raise ValueError(
            f"{path}.warmup_tokens={tokens!r}: give a whole number of tokens, or None for that of "
            "config.train"
        )


def folder_of(cell: Cell, workdir: Path) -> Path:
    """The folder of a cell in that of all cells."""
    return workdir / "cells" / cell.name


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
