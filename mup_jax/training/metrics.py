"""Metrics as lines of JSON, one per step, kept consistent with the checkpoints."""

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

# How many steps the device may run ahead of the file.
_LAG = 32


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; one that a kill cut short is left out."""
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is complete or absent, whenever the process is killed."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def finite_or_none(value: Any) -> float | None:
    """JSON has no NaN and no infinity: null stands for both."""
    value = float(value)
    return value if math.isfinite(value) else None


class MetricsWriter:
    """Appends a line per step to a JSONL file, without waiting for the device at every step.

    Args:
      path: the file. Lines of steps after `last_step`, written by an interrupted run beyond the
        checkpoint from which this one goes on, are dropped.
      last_step: the step of that checkpoint, 0 for a new run.

    Raises:
      ValueError: steps before the checkpoint are missing from the file.
    """

    def __init__(self, path: Path, last_step: int):
        self.lines = [line for line in read_lines(path) if line["step"] <= last_step]
        if len(self.lines) != last_step:
            raise ValueError(
                f"{path} has {len(self.lines)} of the {last_step} steps before the checkpoint: put "
                "the file back, or delete the run's folder to begin again"
            )
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = path.open("a")
        self._pending: deque[dict[str, Any]] = deque()

    def add(self, step: int, **values: Any) -> None:
        """Queues scalars (on the device, or plain) of a step, counted from 1."""
        self._pending.append({"step": step, **values})
        while len(self._pending) > _LAG:
            self._write()

    def flush(self) -> None:
        """Writes all that is queued; afterwards `lines` is up to date."""
        while self._pending:
            self._write()
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _write(self) -> None:
        line = self._pending.popleft()
        line = {k: v if isinstance(v, int) else finite_or_none(v) for k, v in line.items()}
        self._file.write(json.dumps(line) + "\n")
        self.lines.append(line)
