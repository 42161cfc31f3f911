"""report.json and report.md of a session: complete files, whenever it is killed."""

import json
from collections.abc import Callable
from typing import Any

from experiments.accelerator.session import Column, Entry, Part, Row, Rows, Session
from mup_jax.training.files import write_atomically


def number(title: str, key: str, text: str = "{:.1f}", scale: float = 1.0) -> Column:
    """A column of `row[key]`, empty where that is not known."""

    def cell(row: Row, _: Rows) -> str:
        value = row.get(key)
        return "" if value is None else text.format(scale * value)

    return Column(title, cell)


def ratio(title: str, key: str, of: str, text: str = "{:.2f}") -> Column:
    """A column of `row[key]` over that of the case `of`."""

    def cell(row: Row, rows: Rows) -> str:
        ours, theirs = row.get(key), rows.get(of, {}).get(key)
        return text.format(ours / theirs) if ours is not None and theirs else ""

    return Column(title, cell)


def words(title: str, key: str) -> Column:
    """A column of `row[key]` as it is."""
    return Column(title, lambda row, _: str(row.get(key, "")))


COMPILER = [
    number("lower, s", "lower_seconds"),
    number("compile, s", "compile_seconds"),
    number("HLO lines", "program_lines", "{:.0f}"),
]


def writer(command: str) -> Callable[[Session], None]:
    """A function that writes the report of a session that `command` began."""

    def write(session: Session) -> None:
        found = to_json(command, session)
        write_atomically(session.output / "report.json", json.dumps(found, indent=1) + "\n")
        write_atomically(session.output / "report.md", to_markdown(command, session))

    return write


def to_json(command: str, session: Session) -> dict[str, Any]:
    """Everything that is known, by part and case."""
    return {
        "command": command,
        **session.identity,
        "minutes_used": _minutes_used(session),
        "failed": session.failed,
        "parts": {
            part.name: {
                "title": part.title,
                "cases": {name: entry._asdict() for name, entry in _entries(session, part).items()},
            }
            for part in session.parts
        },
    }


def to_markdown(command: str, session: Session) -> str:
    """The same for people: a table per part, and why a case has no row in it."""
    told = "; ".join(f"{key}: {value}" for key, value in session.identity.items())
    lines = [
        "# What this device does",
        "",
        f"    {command}",
        "",
        f"{told}. Measured in {_minutes_used(session):.1f} minutes. The same command, given the "
        "same folder, goes on with what is missing.",
    ]
    for part in session.parts:
        entries = _entries(session, part)
        rows = {name: entry.row for name, entry in entries.items() if entry.row is not None}
        lines += ["", f"## {part.title}", ""]
        if rows:
            titles = [column.title for column in part.columns]
            lines += ["| " + " | ".join(["", *titles]) + " |", "|---" * (len(titles) + 1) + "|"]
            for name, row in rows.items():
                cells = [name, *(column.text(row, rows) for column in part.columns)]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        for name, entry in entries.items():
            violations = (entry.row or {}).get("violations", [])
            lines += [f"- **{name} does not hold**: {violation}" for violation in violations]
            if entry.status != "measured":
                begun = "killed, or still running"
                lines.append(f"- {name}: {entry.status}, {entry.reason or begun}")
    return "\n".join(lines) + "\n"


def _entries(session: Session, part: Part) -> dict[str, Entry]:
    missing = Entry("not run", reason="its turn has not come")
    keys = {case.name: (part.name, case.name) for case in part.cases}
    return {name: session.entries.get(key, missing) for name, key in keys.items()}


def _minutes_used(session: Session) -> float:
    return sum(entry.seconds for entry in session.entries.values()) / 60
