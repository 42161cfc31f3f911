"""Files of tokens, written one after the other."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from mup_jax.data.manifest import Entry
from mup_jax.data.packages import missing_package
from mup_jax.data.stream import SUFFIX, TOKENS_OF_RECORD, Format
from mup_jax.data.tokens import Ids


class ShardWriter:
    """Writes tokens to files of at most so many.

    Args:
      folder: where.
      stem: how the names of the files begin.
      storage: of the files.
      dtype: of the tokens.
      most: tokens in a file.
    """

    def __init__(self, folder: Path, stem: str, storage: Format, dtype: np.dtype, most: int):
        self._folder, self._stem, self._storage, self._most = folder, stem, storage, most
        self._dtype = dtype.newbyteorder("<")
        self._entries: list[Entry] = []
        self._tokens = 0
        self._sink: Any = None
        self._rest = np.empty(0, self._dtype)

    def add(self, ids: Ids) -> None:
        """Writes more tokens, of shape `(tokens,)`."""
        while len(ids):
            if self._sink is None:
                self._sink = self._open()
            taken = ids[: self._most - self._tokens]
            self._write(taken)
            self._tokens += len(taken)
            if self._tokens == self._most:
                self._close_file()
            ids = ids[len(taken) :]

    def close(self) -> list[Entry]:
        """The files written."""
        if self._sink is not None:
            self._close_file()
        return self._entries

    def _path(self) -> Path:
        suffix = SUFFIX[self._storage]
        return self._folder / f"{self._stem}-{len(self._entries):05d}.{suffix}"

    def _open(self) -> Any:
        if self._storage == "flat":
            return self._path().open("wb")
        try:
            from array_record.python.array_record_module import ArrayRecordWriter
        except ImportError:
            raise missing_package("array_record", "--format=arrayrecord") from None
        return ArrayRecordWriter(str(self._path()), "group_size:1")

    def _write(self, ids: Ids) -> None:
        if self._storage == "flat":
            self._sink.write(ids.astype(self._dtype).tobytes())
            return
        ids = np.concatenate([self._rest, ids])
        whole = len(ids) - len(ids) % TOKENS_OF_RECORD
        for record in ids[:whole].reshape(-1, TOKENS_OF_RECORD):
            self._sink.write(record.tobytes())
        self._rest = ids[whole:]

    def _close_file(self) -> None:
        if len(self._rest):
            self._sink.write(self._rest.tobytes())
            self._rest = self._rest[:0]
        self._sink.close()
        path = self._path()
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._entries.append(Entry(path.name, self._tokens, path.stat().st_size, digest))
        self._sink, self._tokens = None, 0
