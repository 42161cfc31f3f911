"""Claims on cells, so that any number of workers on any machines share a folder.

A claim is a file `claims/0`, `claims/1` … in the folder of a cell; the highest number counts. It is
created where it did not exist, which only one process can do on any file system, and touched by its
owner as long as he works. One that has not been touched for `STALE_SECONDS`, or whose process is
known to be gone, is stale, and the next number may be claimed; an owner who finds a higher number
has lost the cell and leaves it.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BEAT_SECONDS = 10.0
# Some network file systems show the time of a file up to a minute late.
STALE_SECONDS = 150.0


class ClaimLost(Exception):
    """Another worker took a cell over, because this one did not touch its claim in time."""


class Claim:
    """A claim that this process holds.

    Args:
      path: of its file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ClaimLost where another worker has taken over."""
        successor = self._path.with_name(str(int(self._path.name) + 1))
        if successor.exists() or not self._path.exists():
            raise ClaimLost(
                f"{self._path.parent.parent} was taken over by another worker, because this one "
                f"stood still for {STALE_SECONDS:g} s"
            )

    def release(self) -> None:
        """Lets others have the cell at once."""
        self._ended.set()
        self._thread.join()
        self._path.write_text(json.dumps({"released": True}))

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError:  # a file system that is away for a moment, or a folder that is gone
                continue


class Claims:
    """What this process sees of the claims of others.

    Clocks of machines differ: how long a claim stands still is measured from when it was first seen
    so, on this machine's own clock.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, float]] = {}

    def next_number(self, cell: Path) -> int | None:
        """The number with which to `take` the cell of this folder; None while somebody has it."""
        path = _latest(cell)
        if path is None:
            return 0
        return None if self._is_held(path) else int(path.name) + 1

    def _is_held(self, path: Path) -> bool:
        try:
            owner, modified = json.loads(path.read_text() or "{}"), path.stat().st_mtime_ns
        except (OSError, ValueError):  # it is being written
            return True
        if owner.get("released") or (
            owner.get("machine") == _this_machine() and not _is_alive(owner["process"])
        ):
            return False
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if before != modified:
            self._seen[path] = (modified, now)
            return True
        return now - since < STALE_SECONDS


def take(cell: Path, number: int) -> Claim | None:
    """Claims the cell of this folder with a number of `Claims.next_number`; None if others did."""
    path = cell / "claims" / str(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            json.dump({"machine": _this_machine(), "process": os.getpid()}, file)
    except FileExistsError:
        return None
    return Claim(path)


@contextmanager
def held(cell: Path, number: int) -> Iterator[Claim | None]:
    """As `take`, for as long as the context lasts."""
    claim = take(cell, number)
    try:
        yield claim
    finally:
        if claim:
            claim.release()


def _latest(cell: Path) -> Path | None:
    numbers = [int(path.name) for path in (cell / "claims").glob("*") if path.name.isdigit()]
    return cell / "claims" / str(max(numbers)) if numbers else None


def _this_machine() -> str:
    """Where a number means one process: containers of one host count on their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return f"{platform.node()} {boot} {space}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
