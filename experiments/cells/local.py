"""The launcher "local": worker processes of this machine."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.cells import worker
from experiments.cells.cell import FinishedCells, Task, Work
from experiments.cells.progress import Progress
from experiments.cells.run import Submit
from mup_jax.training import Preempted

# In a worker process: where it reports to.
_reports: Any = None


@contextmanager
def launch(work: Work, workdir: Path, finished: FinishedCells) -> Iterator[Submit]:
    """See `run.Launcher`.

    Raises:
      ValueError: processes would fight over an accelerator.
      OSError: a worker was lost.
    """
    if work.workers > 1 and work.platform != "cpu":
        raise ValueError(
            f"config.workers={work.workers} with config.platform={work.platform!r}: several "
            "workers share a machine on platform 'cpu' only; on accelerators, use --launcher=ray"
        )
    context = multiprocessing.get_context("spawn")
    cores, reports = context.Queue(), context.Queue()
    for i in range(work.workers):
        cores.put(i)
    initial = (work.platform, workdir, cores, reports, os.getpid())
    with (
        Progress(work, reports, finished),
        ProcessPoolExecutor(work.workers, context, _start_worker, initial) as pool,
    ):
        try:
            yield lambda task: pool.submit(_run_task, task, workdir)
        except BaseException as error:
            # Cells in progress go on from their checkpoints the next time.
            for process in multiprocessing.active_children():
                process.kill()
            if isinstance(error, (BrokenProcessPool, Preempted)):
                raise OSError(
                    "a worker was ended by somebody else, perhaps for its memory: the same command "
                    "goes on from here"
                ) from error
            raise


def _start_worker(platform: str, workdir: Path, cores: Any, reports: Any, parent: int) -> None:
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    worker.configure(platform, workdir / "compiled")
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
    worker.run_task(task, workdir, _reports)
