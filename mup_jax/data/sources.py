"""Sources of text that need not fit in memory, in parts that can be read side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mup_jax.data.compression import read_lines
from mup_jax.data.corpus import Document, matching_files, read_text, standard_library
from mup_jax.data.packages import missing_package

# Small files are read together: each part leaves a file or two.
_BYTES_OF_PART = 32 * 2**20

# Files, or the number of a data set's part and that of all.
Part = tuple[Any, ...]


class Source(NamedTuple):
    """A corpus of documents.

    Attributes:
      kind: of it.
      where: what of that kind.
      column: of JSON objects or tables: the text.
      strict: whether a null in place of a text is an error.
    """

    kind: str
    where: str
    column: str
    strict: bool

    def parts(self) -> list[Part]:
        """The parts, always the same ones, in their order."""
        return _KINDS[self.kind].parts(self)

    def read(self, part: Part) -> Iterator[Document | None]:
        """The documents of a part, in their order; None for a record whose text is null.

        Raises:
          ValueError: a document that is not text; the message says where it stands.
        """
        return _KINDS[self.kind].read(self, part)


class _Kind(NamedTuple):
    parts: Callable[[Source], list[Part]]
    read: Callable[[Source, Part], Iterator[Document | None]]


def parse_source(text: str, column: str = "text", strict: bool = False) -> Source:
    """The source of "stdlib", "files:", "jsonl:" or "parquet:" and a pattern of paths, or
    "hf:NAME[:CONFIGURATION[:SPLIT]]", a data set of Hugging Face or a folder in its layout.

    Raises:
      ValueError: another text.
    """
    kind, _, where = text.partition(":")
    if kind not in _KINDS or (kind == "stdlib") == bool(where):
        raise ValueError(
            f"unknown text source {text!r}: choose 'stdlib', 'files:PATTERN', 'jsonl:PATTERN', "
            "'parquet:PATTERN' or 'hf:NAME[:CONFIGURATION[:SPLIT]]'"
        )
    return Source(kind, where, column, strict)


def _groups_of_files(source: Source) -> list[Part]:
    parts: list[Part] = []
    size = _BYTES_OF_PART
    for path in matching_files(source.where):
        if size >= _BYTES_OF_PART:
            parts.append(())
            size = 0
        parts[-1] += (path,)
        size += os.path.getsize(path)
    return parts


def _read_files(source: Source, part: Part) -> Iterator[Document]:
    for path in part:
        yield read_text(path)


def _read_jsonl(source: Source, part: Part) -> Iterator[Document | None]:
    for path in part:
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _document(source, f"{path}#{number}", _parse(line, where), where)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error}): mend or delete it; a compressed file needs a name "
            "in .gz, .bz2, .xz or .zst"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): mend or delete it") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object: mend or delete it")
    return row


def _read_parquet(source: Source, part: Part) -> Iterator[Document | None]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package("pyarrow", "the source 'parquet:'") from None
    for path in part:
        try:
            file = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from error
        with file:
            if source.column not in file.schema_arrow.names:
                raise _no_column(path, source.column, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=[source.column], batch_size=1024):
                for value in batch.column(0).to_pylist():
                    number += 1
                    row = {source.column: value}
                    where = f"{path}, row {number}"
                    yield _document(source, f"{path}#{number}", row, where)


def _data_set(source: Source) -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", "the source 'hf:'") from None
    name, configuration, split = (*source.where.split(":"), "", "")[:3]
    try:
        return datasets.load_dataset(
            name, configuration or None, split=split or "train", streaming=True
        )
    except Exception as error:  # of the network, the hub or the data set
        raise ValueError(
            f"the data set {source.where!r} cannot be opened ({type(error).__name__}: {error}): "
            "give NAME[:CONFIGURATION[:SPLIT]]"
        ) from error


def _parts_of_data_set(source: Source) -> list[Part]:
    count = _data_set(source).num_shards
    return [(index, count) for index in range(count)]


def _read_data_set(source: Source, part: Part) -> Iterator[Document | None]:
    index, count = part
    for number, row in enumerate(_data_set(source).shard(count, index), 1):
        where = f"{source.where}, part {index}, row {number}"
        yield _document(source, f"{index}#{number}", row, where)


def _document(source: Source, name: str, row: dict[str, Any], where: str) -> Document | None:
    column = source.column
    if column not in row:
        raise _no_column(where, column, list(row))
    text = row[column]
    if text is None and not source.strict:
        return None
    if text is None:
        raise ValueError(
            f"{where}: {column!r} is null: mend or delete it, or choose another --out without "
            "--strict"
        )
    if not isinstance(text, str):
        raise ValueError(f"{where}: {column!r} is {text!r:.50}, not text: choose another --column")
    # JSON can say what is not Unicode: half of a pair of surrogates.
    return Document(name, text.encode(errors="replace").decode())


def _no_column(where: str, column: str, known: list[str]) -> ValueError:
    columns = ", ".join(known)
    return ValueError(f"{where} has no {column!r}: choose a --column of {columns}, or mend it")


_KINDS = {
    "stdlib": _Kind(lambda _: [("stdlib",)], lambda *_: iter(standard_library())),
    "files": _Kind(_groups_of_files, _read_files),
    "jsonl": _Kind(_groups_of_files, _read_jsonl),
    "parquet": _Kind(_groups_of_files, _read_parquet),
    "hf": _Kind(_parts_of_data_set, _read_data_set),
}
