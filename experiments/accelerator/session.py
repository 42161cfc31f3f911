"""Runs parts case by case within minutes, keeps every result at once, and goes on where it stopped.

`results.jsonl` begins with a line that says on what the results were measured. Then every case has
a line when it begins and one when it ends, so that neither a kill nor a compiler that hangs takes
anything that was measured. The last line of a case counts.
"""

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mup_jax.training.files import read_lines, write_atomically

Row = dict[str, Any]
Rows = Mapping[str, Row]

# What XLA's errors say that are about a device's memory: it is small, nothing has failed.
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
# How long a case may go on after the minutes are over.
_GRACE_SECONDS = 30.0


class Unavailable(Exception):
    """What a case needs is not here: the message says what, and the remedy."""


class Cut(Exception):
    """A case stopped before its end, with the `row` of what it has so far."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row


class Column(NamedTuple):
    """A column of a part's table: `text(row, rows of the part)`."""

    title: str
    text: Callable[[Row, Rows], str]


class Case(NamedTuple):
    """One measurement.

    Attributes:
      name: unique in its part.
      seconds: a guess of what it takes, which those before it in the part correct; zero where it
        is known that something is not here.
      measure: from the seconds that it may take to its row; what of a row must hold and does not is
        its "violations", a list of strings.
    """

    name: str
    seconds: float
    measure: Callable[[float], Row]


class Part(NamedTuple):
    """Cases for one table, those first that tell most.

    Attributes:
      name: for --parts.
      title: of the table.
      share: of the minutes, relative to those of the other parts.
      cases: in order.
      columns: of the table, after the case's name.
    """

    name: str
    title: str
    share: float
    cases: list[Case]
    columns: list[Column]


class Entry(NamedTuple):
    """What is known of a case.

    Attributes:
      status: "measured"; "cut", with a row and more to do; "failed"; "skipped", as something is not
        here; "begun", as it is running or was killed; or "not run".
      seconds: that it took.
      row: what was measured.
      reason: for any other status than "measured", in one line.
      traceback: of a failure.
    """

    status: str
    seconds: float = 0.0
    row: Row | None = None
    reason: str = ""
    traceback: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "failed" or bool(self.row and self.row.get("violations"))


class Session:
    """The results of a folder, and the time that is left.

    Args:
      output: the folder.
      identity: what must be the same for all results of a folder.
      parts: of which its report tells.
      minutes: of this invocation.
      report: writes the report; called whenever there is something new.
      pace: what the guesses of a part are multiplied by until one of its cases is measured.
      clock: seconds.

    Attributes:
      entries: by the names of part and case; those that were never begun are absent.

    Raises:
      ValueError: the folder has results of something else.
    """

    def __init__(
        self,
        output: Path,
        identity: Mapping[str, str],
        parts: list[Part],
        minutes: float,
        report: Callable[["Session"], None],
        pace: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.output, self.identity, self.parts = output, dict(identity), parts
        self.entries: dict[tuple[str, str], Entry] = {}
        self._report, self._first_pace, self._clock = report, pace, clock
        self._deadline = clock() + 60 * minutes
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / "results.jsonl"
        before, *lines = read_lines(self._path) or [self.identity]
        if before != self.identity:
            told = [", ".join(identity.values()) for identity in (before, self.identity)]
            raise ValueError(
                f"{output} has results of {told[0]}, and this is {told[1]}: give another folder "
                "with --output"
            )
        # Without a line that a kill cut short.
        write_atomically(self._path, "".join(json.dumps(x) + "\n" for x in (before, *lines)))
        for line in lines:
            key = line.pop("part"), line.pop("case")
            self.entries[key] = Entry(**line)

    @property
    def seconds_left(self) -> float:
        """Of this invocation."""
        return self._deadline - self._clock()

    @property
    def failed(self) -> list[str]:
        """The cases that failed, or in which something does not hold."""
        return [" / ".join(key) for key, entry in self.entries.items() if entry.failed]

    def run(self, names: Collection[str]) -> None:
        """Measures what of these parts is not measured yet: every part in its share of the minutes,
        and then, in the minutes that parts have left over, what others had none for.

        Where a case is still running half a minute after the minutes are over, the process ends.
        """
        parts = [part for part in self.parts if part.name in names]
        watch = threading.Timer(self.seconds_left + _GRACE_SECONDS, self._give_up)
        watch.daemon = True
        watch.start()
        tried: set[tuple[str, str]] = set()
        for within_share in (True, False):
            for i, part in enumerate(parts):
                seconds = self.seconds_left
                if within_share:
                    seconds *= part.share / sum(later.share for later in parts[i:])
                self._run_part(part, self._clock() + seconds, tried)
        watch.cancel()

    def _run_part(self, part: Part, end: float, tried: set[tuple[str, str]]) -> None:
        cases = [case for case in part.cases if not self._is_done(part, case)]
        # What was begun and never ended may do the same again.
        cases.sort(key=lambda case: self._status(part, case) == "begun")
        for case in cases:
            key = part.name, case.name
            left = end - self._clock()
            if key in tried:
                continue
            needed = case.seconds * self._pace(part)
            if needed and left < needed:
                reason = f"{max(0, left):.0f} s left, about {needed:.0f} needed"
                if self._status(part, case) in ("not run", "begun"):
                    self.entries[key] = Entry("not run", reason=reason)
                self._report(self)
                continue
            tried.add(key)
            self._measure(part, case, left)

    def _status(self, part: Part, case: Case) -> str:
        return self.entries.get((part.name, case.name), Entry("not run")).status

    def _is_done(self, part: Part, case: Case) -> bool:
        return self._status(part, case) == "measured"

    def _pace(self, part: Part) -> float:
        """Seconds that measured cases of the part took, over those that were guessed."""
        pairs = [
            (self.entries[part.name, case.name].seconds, case.seconds)
            for case in part.cases
            if self._is_done(part, case)
        ]
        if not pairs:
            return self._first_pace
        taken, guessed = map(sum, zip(*pairs, strict=True))
        return taken / guessed

    def _measure(self, part: Part, case: Case, seconds: float) -> None:
        self._keep(part, case, Entry("begun"))
        print(f"[{self.seconds_left:4.0f} s left] {part.name}: {case.name} ...", flush=True)
        start = self._clock()
        took = lambda: self._clock() - start
        try:
            entry = Entry("measured", row=case.measure(seconds), seconds=took())
        except Cut as cut:
            entry = Entry("cut", took(), cut.row, f"cut after {took():.0f} s")
        except Unavailable as error:
            entry = Entry("skipped", took(), reason=str(error))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if OUT_OF_MEMORY in str(error):
                entry = Entry("skipped", took(), reason=f"too large for this device, {reason}")
            else:
                entry = Entry("failed", took(), reason=reason, traceback=traceback.format_exc())
        gc.collect()  # the arrays of a traceback
        self._keep(part, case, entry)
        told = entry.reason or ", ".join(
            f"{column.title} {text}"
            for column in part.columns
            if (text := column.text(entry.row or {}, {}))
        )
        print(f"             {entry.status} in {entry.seconds:.1f} s: {told}", flush=True)

    def _keep(self, part: Part, case: Case, entry: Entry) -> None:
        self.entries[part.name, case.name] = entry
        with self._path.open("a") as file:
            line = {"part": part.name, "case": case.name, **entry._asdict()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._report(self)

    def _give_up(self) -> None:
        running = [
            " / ".join(key) for key, entry in self.entries.items() if entry.status == "begun"
        ]
        print(f"the minutes are over, and {', '.join(running)} did not end: giving up", flush=True)
        os._exit(1)
