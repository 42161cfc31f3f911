"""What a process that runs cells does, whoever started it."""

from pathlib import Path
from typing import Any

import jax

from experiments.cells.cell import Cell, Task
from mup_jax.training import train


def configure(platform: str, compiled: Path) -> None:
    """Sets JAX up, before its first use.

    Args:
      platform: of JAX; empty for its own choice.
      compiled: a folder for compiled programs: another worker, or the next start, need not compile
        the same program again.
    """
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if platform:
        jax.config.update("jax_platforms", platform)


def run_task(task: Task, workdir: Path, reports: Any) -> None:
    """Trains the cells of a task, each in its folder in `workdir`; `reports` is for `Progress`."""
    for cell in task.cells:
        _run_cell(cell, workdir, reports)


def _run_cell(cell: Cell, workdir: Path, reports: Any) -> None:
    report = lambda now: reports.put((cell, now.step, now.steps, now.loss, None))
    result = train(cell.config, workdir / "cells" / cell.name, report)
    reports.put((cell, result["steps"], result["steps"], None, result))
