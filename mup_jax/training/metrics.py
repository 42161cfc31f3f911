"""Metrics as lines of JSON, one per step, kept consistent with the checkpoints."""

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mup_jax.training import distributed
from mup_jax.training.files import read_lines, write_atomically

Line = dict[str, Any]
Observer = Callable[[Line], None]


def finite_or_none(value: Any) -> float | None:
    """JSON has no NaN and no infinity: null stands for both."""
    value = float(value)
    return value if math.isfinite(value) else None


class MetricsWriter:
    """Appends a line per step to a JSONL file, without waiting for the device at every step.

    With several processes the first one writes; all of them have the lines.

    Args:
      path: the file. Lines of steps after `last_step`, written by an interrupted run beyond the
        checkpoint from which this one goes on, are dropped.
      last_step: the step of that checkpoint, 0 for a new run.
      observers: called with each line when it is written, by the process that writes.
      lag: how many steps the device may run ahead of the file.

    Raises:
      ValueError: steps before the checkpoint are missing from the file.
    """

    def __init__(
        self, path: Path, last_step: int, observers: Sequence[Observer] = (), lag: int = 32
    ):
        lines = [line for line in read_lines(path) if line["step"] <= last_step]
        if len(lines) != last_step:
            raise ValueError(
                f"{path} has {len(lines)} of the {last_step} steps before the checkpoint: put "
                "the file back, or delete the run's folder to begin again"
            )
        self.lines = [_in_short(line) for line in lines]
        self._before = lines[-1]["seconds"] if lines else 0.0
        self._start: float | None = None
        distributed.wait_for_all("metrics were read")
        self._file = None
        self._observers: list[Observer] = []
        if distributed.is_first():
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = path.open("a")
            self._observers = [*observers]
        self._pending: deque[dict[str, Any]] = deque()
        self._lag = lag

    @property
    def seconds(self) -> float:
        """Since `start`, and of the interrupted run before it."""
        return self._before + (time.perf_counter() - self._start if self._start else 0.0)

    def start(self) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def add(self, step: int, **values: Any) -> None:
        """Queues scalars (on the device, or plain) of a step, counted from 1.

        Their line gets the "seconds" at which the device had them.
        """
        self._pending.append({"step": step, **values})
        while len(self._pending) > self._lag:
            self._write()

    def flush(self) -> None:
        """Writes all that is queued; afterwards `lines` is up to date."""
        while self._pending:
            self._write()
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint counts on it

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()

    def _write(self) -> None:
        line = jax.device_get(self._pending.popleft())
        line = {key: _plain(value) for key, value in line.items()} | {"seconds": self.seconds}
        if self._file:
            self._file.write(json.dumps(line) + "\n")
        for observe in [*self._observers]:
            try:
                observe(line)
            except Exception:
                # The run is worth more than who looks on.
                self._observers.remove(observe)
                logging.getLogger(__name__).exception("an observer failed and is left out")
        self.lines.append(_in_short(line))


def _in_short(line: Line) -> Line:
    """Without what is measured of single groups, which nothing but the file has to hold."""
    return {key: value for key, value in line.items() if "/" not in key}


def _plain(value: Any) -> int | float | None:
    if isinstance(value, int) or np.issubdtype(np.asarray(value).dtype, np.integer):
        return int(value)
    return finite_or_none(value)
