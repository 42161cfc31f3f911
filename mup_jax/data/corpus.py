"""Text as documents: what is on every machine already, or any files; and its split by document."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mup_jax.data.compression import read_lines

# Tests, other people's packages, and files that are tables rather than text.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
_SKIPPED_FILES = frozenset({"html/entities.py", "locale.py", "stringprep.py"})
_GENERATED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")

_NOT_PLAIN = re.compile(r"[^\n -~]+")


class Document(NamedTuple):
    """A named text, the unit that goes whole to training or to validation."""

    name: str
    text: str


def standard_library() -> list[Document]:
    """The Python source files of the running interpreter's standard library.

    About ten million characters of English and code, without a download. Left out are tests,
    installed packages, generated files, and data tables. The text is cleaned to newline and
    printable ASCII, tabs expanded, so that it needs 96 characters. It differs a little between
    Python versions: compare runs by `fingerprint`.

    Returns:
      Documents sorted by name, which is the path relative to the library's root.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in _python_files(root))
    return [
        Document(name, clean((root / name).read_bytes().decode("ascii", errors="ignore")))
        for name in names
        if name not in _SKIPPED_FILES
    ]


def text_files(pattern: str) -> list[Document]:
    """Files of UTF-8 text, each a document.

    Args:
      pattern: of paths, as `glob.glob` takes it; `**` stands for any folders.

    Returns:
      Documents sorted by name, which is the path.

    Raises:
      ValueError: no file matches.
    """
    return [read_text(path) for path in matching_files(pattern)]


def read_text(path: str) -> Document:
    """A file of UTF-8 text, perhaps compressed; bytes that are not UTF-8 become U+FFFD."""
    text = b"".join(read_lines(path)).decode("utf-8-sig", errors="replace")
    return Document(Path(path).as_posix(), text)


def matching_files(pattern: str) -> list[str]:
    """The files of a pattern that `glob.glob` takes, sorted.

    Raises:
      ValueError: there is none.
    """
    paths = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    if not paths:
        raise ValueError(f"no file matches {pattern!r}: give the path of files, or a pattern")
    return paths


def split_documents(
    documents: Sequence[Document], *, validation_fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and validation, each document by a hash of its own name.

    A document stays on its side whatever the order and the other documents are, so a corpus may
    grow and its validation documents are still never trained on.

    Args:
      documents: the corpus.
      validation_fraction: expected fraction of documents in validation, strictly within (0, 1).

    Returns:
      `(train, validation)`, both in the order given.

    Raises:
      ValueError: the corpus has no text, or one side is left without text.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}: choose one within (0, 1)")
    if not any(document.text for document in documents):
        raise ValueError(f"the corpus of {len(documents)} documents has no text: add documents")
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        held_out = is_held_out(document.name, validation_fraction)
        (validation if held_out else train).append(document)
    for name, side in (("training", train), ("validation", validation)):
        if not any(document.text for document in side):
            raise ValueError(
                f"no {name} text in {len(documents)} documents at validation_fraction="
                f"{validation_fraction}: add documents or change the fraction"
            )
    return train, validation


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(_GENERATED_PREFIXES):
                yield Path(folder, name)


def clean(text: str) -> str:
    """Text of newline and printable ASCII; tabs are expanded, all else is left out."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _NOT_PLAIN.sub("", text.expandtabs(8))


def is_held_out(name: str, validation_fraction: float) -> bool:
    """Whether a document goes to validation, by a hash of its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < validation_fraction
