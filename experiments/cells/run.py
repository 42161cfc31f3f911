"""Runs cells on the workers of a launcher."""

import importlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from pathlib import Path

from experiments.cells.cell import FinishedCells, Results, Task, Work

# Begins a task on a worker that is free; the future ends as the task does.
Submit = Callable[[Task], Future[None]]
# A context in which there are workers, and progress is shown. An error that leaves it ends them.
Launcher = Callable[[Work, Path, FinishedCells], AbstractContextManager[Submit]]

# Their modules, each with a `launch`; Ray need not be installed where it is not asked for.
LAUNCHERS = {"local": "experiments.cells.local", "ray": "experiments.cells.ray_cluster"}


def run_cells(work: Work, workdir: Path, launcher: str = "local") -> Results:
    """Runs all cells that have not finished, each task on the next free worker.

    Args:
      work: what there is to do.
      workdir: the folder of all cells.
      launcher: one of `LAUNCHERS`.

    Returns:
      The results of all cells in `workdir`.

    Raises:
      ValueError: as `mup_jax.training.train`, the schedule of `work`, or the launcher.
      OSError: the launcher found no workers, or lost one.
    """
    finished = FinishedCells(workdir)
    if not work.missing_tasks(finished()):
        return finished()
    with _find(launcher)(work, workdir, finished) as submit:
        active: dict[Future[None], Task] = {}
        while True:
            running = {(task.size, task.name) for task in active.values()}
            for task in work.missing_tasks(finished()):
                free = len(active) < work.workers
                if free and (task.size, task.name) not in running:
                    active[submit(task)] = task
            if not active:
                return finished()
            done, _ = wait(active, return_when=FIRST_COMPLETED)
            for future in done:
                del active[future]
                future.result()


def _find(launcher: str) -> Launcher:
    try:
        return importlib.import_module(LAUNCHERS[launcher]).launch
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--launcher={launcher} needs the package {error.name}: "
            f"pip install 'mup_jax[{launcher}]'"
        ) from error
