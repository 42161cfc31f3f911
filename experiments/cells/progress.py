"""Progress in the terminal: cells, steps, losses, time left."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from experiments.cells.cell import Cell, Results, Work
from experiments.cells.pace import Pace

_STATUS_SECONDS = 1.0


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """A context in which reports from the workers are shown.

    A line per finished cell, and in a terminal a line of what is running, rewritten in place.

    Args:
      work: what is run.
      reports: a queue of (size and name of the task, cell, step, steps, training loss, result or
        None while it runs).
      finished: reads the results so far.
    """

    def __init__(self, work: Work, reports: Any, finished: Callable[[], Results]):
        self._work = work
        self._reports = reports
        self._finished = finished
        self._pace = Pace(work.flops, work.workers)
        self._running: dict[str, tuple[Cell, int, int, float | None]] = {}
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._reports.put(None)
        self._thread.join()

    def _show(self) -> None:
        shown = 0.0
        while (report := self._reports.get()) is not None:
            task, cell, step, steps, loss, result = report
            self._pace.add(task, cell.name, step / steps, time.perf_counter())
            if result is None:
                self._running[cell.name] = (cell, step, steps, loss)
            else:
                self._running.pop(cell.name, None)
                self._print_finished(cell, result)
            if sys.stdout.isatty() and time.perf_counter() - shown > _STATUS_SECONDS:
                shown = time.perf_counter()
                print(f"\r\033[K{self._status()}", end="", flush=True)

    def _print_finished(self, cell: Cell, result: dict[str, Any]) -> None:
        loss = result["validation_loss"]
        outcome = "diverged" if loss is None else f"validation loss {loss:.4f}"
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        print(
            f"{clear}[{self._times()}] {cell.label}: {outcome} "
            f"({result['steps']:,} steps, {result['seconds']['total']:.0f} s)",
            flush=True,
        )

    def _status(self) -> str:
        running = (
            f"{cell.label} step {step}/{steps} loss {loss:.3f}"
            for cell, step, steps, loss in self._running.values()
            if loss is not None
        )
        return f"[{self._times()}] " + " | ".join(running)

    def _times(self) -> str:
        """Sizes and cells that have finished, time so far, and an estimate of the time left."""
        results = self._finished()
        remaining = self._work.remaining_cells(results)
        of_size: dict[str, int] = {}
        for (size, _), count in remaining.items():
            of_size[size] = of_size.get(size, 0) + count
        sizes = sum(count == 0 for count in of_size.values())
        elapsed = time.perf_counter() - self._start
        seconds = self._pace.seconds_left(remaining)
        estimate = "?" if seconds is None else f"~{_minutes(seconds)}"
        cells = f"{len(results)}/{len(results) + sum(remaining.values())} cells"
        return (
            f"{sizes}/{len(of_size)} sizes, {cells}, {_minutes(elapsed)} elapsed, {estimate} left"
        )
