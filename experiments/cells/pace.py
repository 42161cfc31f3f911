"""How long what is left will take."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

# Of a cell: what takes less says little of how long a whole one takes.
_LEAST_DONE = 0.5
# An unknown optimizer's seconds, in those of the slowest.
_UNKNOWN = 1.3


@dataclass
class _Seen:
    """What has been seen of one task: seconds of the clock, and cells done, begun ones in part."""

    begun: float
    trains: float | None = None  # when the first part of a cell had been done,
    first: float = 0.0  # and which part that was
    last: float = 0.0
    done: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since cells began to train."""
        return 0.0 if self.trains is None else self.last - self.trains

    @property
    def cells(self) -> float:
        """Trained in these seconds."""
        return sum(self.done.values()) - self.first

    @property
    def seconds_per_cell(self) -> float | None:
        return self.seconds / self.cells if self.cells >= _LEAST_DONE else None


class Pace:
    """How long the tasks of some work take, from what has been seen of them.

    A task prepares, which is mostly compilation, and then trains its cells one after another.
    Seconds of a cell are those of its size times those of what the task's name begins with, up to
    a comma: an optimizer. An unknown size is extrapolated from the nearest known one, and an
    unknown optimizer is as slow as the slowest.

    Args:
      flops: of a cell of each size.
      workers: side by side, each at one task.
    """

    # Of seconds in FLOPs: products of small matrices take longer than in proportion.
    _EXPONENT = 0.9

    def __init__(self, flops: Mapping[str, float], workers: int):
        self._flops, self._workers = flops, workers
        self._now = 0.0
        self._seen: dict[tuple[str, str], _Seen] = {}

    def add(self, task: tuple[str, str], cell: str, part: float, now: float) -> None:
        """Part of a cell of this task, 0 where it begins and 1 where it ends, is done now."""
        seen = self._seen.setdefault(task, _Seen(now))
        if part > 0 and seen.trains is None:
            seen.trains, seen.first = now, part
        seen.last = self._now = now
        seen.done[cell] = max(part, seen.done.get(cell, 0.0))

    def seconds_left(self, remaining: Mapping[tuple[str, str], int]) -> float | None:
        """For so many cells of each task; None while nothing has been trained."""
        if not any(seen.seconds_per_cell for seen in self._seen.values()):
            return None
        of_size, of_optimizer = self._fit()
        prepared: dict[str, list[float]] = {}
        for (_, name), of_task in self._seen.items():
            if of_task.trains is not None:
                prepared.setdefault(_optimizer(name), []).append(of_task.trains - of_task.begun)
        slowest = max(of_optimizer.values()) + math.log(_UNKNOWN)
        longest = max(map(statistics.fmean, prepared.values())) * _UNKNOWN
        left = []
        for (size, name), count in remaining.items():
            seen, optimizer = self._seen.get((size, name)), _optimizer(name)
            done = 0.0 if seen is None else sum(x for x in seen.done.values() if x < 1)
            each = seen.seconds_per_cell if seen is not None else None
            if each is None:
                each = math.exp(self._of(size, of_size) + of_optimizer.get(optimizer, slowest))
            left.append(max(count - done, 0.0) * each)
            if count and (seen is None or seen.trains is None):
                known = prepared.get(optimizer)
                since = 0.0 if seen is None else self._now - seen.begun
                left[-1] += max((statistics.fmean(known) if known else longest) - since, 0.0)
        # At the end most workers have nothing more to do.
        return max(sum(left) / self._workers, *left, 0.0)

    def _fit(self) -> tuple[dict[str, float], dict[str, float]]:
        """Logarithms of the seconds of a cell: by size, and what each optimizer adds."""
        trained: dict[tuple[str, str], list[_Seen]] = {}
        for (size, name), seen in self._seen.items():
            if seen.seconds_per_cell:
                trained.setdefault((size, _optimizer(name)), []).append(seen)
        logs = {
            key: math.log(sum(x.seconds for x in of_key) / sum(x.cells for x in of_key))
            for key, of_key in trained.items()
        }
        of_size: dict[str, float] = {}
        of_optimizer = {optimizer: 0.0 for _, optimizer in logs}
        for _ in range(10):  # least squares, one half after the other
            for size in {size for size, _ in logs}:
                of_size[size] = statistics.fmean(
                    log - of_optimizer[name] for (at, name), log in logs.items() if at == size
                )
            for optimizer in of_optimizer:
                of_optimizer[optimizer] = statistics.fmean(
                    log - of_size[at] for (at, name), log in logs.items() if name == optimizer
                )
        return of_size, of_optimizer

    def _of(self, size: str, known: Mapping[str, float]) -> float:
        ratio = lambda other: math.log(self._flops[size] / self._flops[other])
        nearest = min(known, key=lambda other: abs(ratio(other)))
        return known[nearest] + self._EXPONENT * ratio(nearest)


def _optimizer(name: str) -> str:
    return name.split(",")[0]
