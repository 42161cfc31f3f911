"""Progress in the terminal: cells, steps, losses, time left."""

import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from experiments.cells.cell import Cell, Results, Work

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
        self._pace = Pace(work.flops)
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
        estimate = "?" if seconds is None else f"~{_minutes(seconds / self._work.workers)}"
        cells = f"{len(results)}/{len(results) + sum(remaining.values())} cells"
        return (
            f"{sizes}/{len(of_size)} sizes, {cells}, {_minutes(elapsed)} elapsed, {estimate} left"
        )


@dataclass
class _Seen:
    """What has been seen of one task: seconds of the clock, and cells done, begun ones in part."""

    begun: float
    trains: float | None = None
    last: float = 0.0
    done: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_per_cell(self) -> float | None:
        done = sum(self.done.values())
        return (self.last - self.trains) / done if self.trains is not None and done else None


class Pace:
    """How long the tasks of some work take, from what has been seen of them.

    A task prepares, which is mostly compilation, and then trains its cells one after another. A
    size of which nothing has been seen yet is extrapolated from the nearest one below.

    Args:
      flops: of a cell of each size.
    """

    # Of seconds in FLOPs: products of small matrices take longer than in proportion.
    _EXPONENT = 0.8

    def __init__(self, flops: Mapping[str, float]):
        self._flops = flops
        self._seen: dict[tuple[str, str], _Seen] = {}

    def add(self, task: tuple[str, str], cell: str, part: float, now: float) -> None:
        """Part of a cell of this task, 0 where it begins and 1 where it ends, is done now."""
        seen = self._seen.setdefault(task, _Seen(now))
        if part > 0 and seen.trains is None:
            seen.trains = now
        seen.last = now
        seen.done[cell] = max(part, seen.done.get(cell, 0.0))

    def seconds_left(self, remaining: Mapping[tuple[str, str], int]) -> float | None:
        """Of one worker, for so many cells of each task; None while nothing has been trained."""
        prepared = [x.trains - x.begun for x in self._seen.values() if x.trains is not None]
        if not any(seen.seconds_per_cell for seen in self._seen.values()):
            return None
        preparation = statistics.fmean(prepared)
        total = 0.0
        for task, count in remaining.items():
            seen = self._seen.get(task)
            done = 0.0 if seen is None else sum(x for x in seen.done.values() if x < 1)
            total += max(count - done, 0.0) * self._seconds_per_cell(*task)
            if count and (seen is None or seen.trains is None):
                total += preparation
        return total

    def _seconds_per_cell(self, size: str, name: str) -> float:
        seen = self._seen.get((size, name))
        if seen is not None and seen.seconds_per_cell:
            return seen.seconds_per_cell
        known: dict[str, list[float]] = {}
        for (of, _), each in self._seen.items():
            if each.seconds_per_cell:
                known.setdefault(of, []).append(each.seconds_per_cell)
        nearest = min(known, key=lambda of: abs(math.log(self._flops[of] / self._flops[size])))
        ratio = self._flops[size] / self._flops[nearest]
        return statistics.fmean(known[nearest]) * ratio**self._EXPONENT
