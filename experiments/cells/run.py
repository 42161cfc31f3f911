"""Runs cells on worker processes of this machine."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax

from experiments.cells.cell import Cell, FinishedCells, Results, Task, Work
from experiments.cells.progress import Progress
from mup_jax.training import train

# In a worker process: where it reports to.
_reports: Any = None


def run_cells(work: Work, workdir: Path) -> Results:
    """Runs all cells that have not finished, each task on the next free worker.

    Returns:
      The results of all cells in `workdir`.

    Raises:
      ValueError: as `mup_jax.training.train`, or as the schedule of `work`.
    """
    finished = FinishedCells(workdir)
    if not work.missing_tasks(finished()):
        return finished()
    context = multiprocessing.get_context("spawn")
    cores, reports = context.Queue(), context.Queue()
    for i in range(work.workers):
        cores.put(i)
    initial = (work.platform, str(workdir), cores, reports, os.getpid())
    with (
        Progress(work, reports, finished),
        ProcessPoolExecutor(work.workers, context, _start_worker, initial) as pool,
    ):
        active: dict[Future[None], Task] = {}
        try:
            while True:
                running = {(task.size, task.name) for task in active.values()}
                for task in work.missing_tasks(finished()):
                    free = len(active) < work.workers
                    if free and (task.size, task.name) not in running:
                        active[pool.submit(_run_task, task, workdir)] = task
                if not active:
                    return finished()
                done, _ = wait(active, return_when=FIRST_COMPLETED)
                for future in done:
                    del active[future]
                    future.result()
        except BaseException:
            # Cells in progress go on from their checkpoints the next time.
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def _start_worker(platform: str, workdir: str, cores: Any, reports: Any, parent: int) -> None:
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Another worker, or the next start, need not compile the same program again.
    jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if platform:
        jax.config.update("jax_platforms", platform)
    if platform == "cpu" and hasattr(os, "sched_setaffinity"):
        # One core each: two small cells side by side beat one cell on two threads.
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {available[cores.get() % len(available)]})


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, so that no two train the same cell."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_task(task: Task, workdir: Path) -> None:
    for cell in task.cells:
        _run_cell(cell, workdir)


def _run_cell(cell: Cell, workdir: Path) -> None:
    report = lambda step, steps, loss: _reports.put((cell, step, steps, loss, None))
    result = train(cell.config, workdir / "cells" / cell.name, report)
    _reports.put((cell, result["steps"], result["steps"], None, result))
