"""Runs cells on the workers of a launcher."""

import importlib
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from pathlib import Path

from experiments.cells.cell import FinishedCells, Results, Task, Work, folder_of
from experiments.cells.claims import Claims

_POLL_SECONDS = 5.0

# Begins a task on a worker that is free; the future ends as the task does.
Submit = Callable[[Task], Future[None]]
# A context in which there are workers, and progress is shown. An error that leaves it ends them.
Launcher = Callable[[Work, Path, FinishedCells], AbstractContextManager[Submit]]

# Their modules, each with a `launch`; Ray need not be installed where it is not asked for.
LAUNCHERS = {"local": "experiments.cells.local", "ray": "experiments.cells.ray_cluster"}


def run_cells(
    work: Work,
    workdir: Path,
    launcher: str = "local",
    on_finished: Callable[[Results], None] | None = None,
) -> Results:
    """Runs all cells that have not finished, each task on the next free worker.

    Others may do the same in the same folder at the same time: each cell is trained by whoever
    claims it first, and all return when all have finished.

    Args:
      work: what there is to do.
      workdir: the folder of all cells.
      launcher: one of `LAUNCHERS`.
      on_finished: called with the results so far whenever a task has finished.

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
        claims = Claims()
        while (missing := work.missing_tasks(finished())) or active:
            running = {(task.size, task.name) for task in active.values()}
            for task in missing:
                free = len(active) < work.workers and (task.size, task.name) not in running
                if free and (task := _claimable(task, claims, workdir)).cells:
                    active[submit(task)] = task
            if not active:
                time.sleep(_POLL_SECONDS)  # all that is left is in the hands of others
            # What others finish, or leave, may be more to do for workers that are free.
            done, _ = wait(active, _POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                del active[future]
                future.result()
                if on_finished:
                    on_finished(finished())
        return finished()


def _claimable(task: Task, claims: Claims, workdir: Path) -> Task:
    """The task without the cells on which other workers of the folder are at work."""
    numbers = {cell.name: claims.next_number(folder_of(cell, workdir)) for cell in task.cells}
    free = {name: number for name, number in numbers.items() if number is not None}
    return task._replace(cells=[cell for cell in task.cells if cell.name in free], claims=free)


def _find(launcher: str) -> Launcher:
    try:
        return importlib.import_module(LAUNCHERS[launcher]).launch
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--launcher={launcher} needs the package {error.name}: "
            f"pip install 'mup_jax[{launcher}]'"
        ) from error
