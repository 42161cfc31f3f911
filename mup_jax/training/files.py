"""Files that are read and written whole, whatever happens to the process."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; one that a kill cut short is left out."""
    if not path.exists():
        return []
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is complete or absent, whenever the process is killed."""
    # Processes on several hosts may have the same number.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
