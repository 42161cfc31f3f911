"""Files that may be compressed."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Iterator
from typing import IO

from mup_jax.data.packages import missing_package

# Imported when they are needed: not every Python was built with all of them.
_MODULES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, decompressed if its name ends in .gz, .bz2, .xz or .zst.

    Raises:
      ValueError: the file is damaged or cut short, or what decompresses it is missing.
    """
    with _open(path) as lines:
        try:
            yield from lines
        except Exception as error:  # of any of the decompressors
            raise ValueError(f"{path} cannot be read to its end: {error}") from error


def _open(path: str) -> IO[bytes]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise missing_package("pyarrow", f"decompressing {path}") from None
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    if suffix not in _MODULES:
        return open(path, "rb")
    module = _MODULES[suffix]
    try:
        return importlib.import_module(module).open(path)
    except ImportError:
        raise ValueError(
            f"decompressing {path} needs the module {module}, and this Python was built without "
            "it: use another Python, or decompress the file"
        ) from None
