"""Tokens in many files as one array of which only what is asked for is read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from numpy.typing import NDArray

from mup_jax.data.corpus import matching_files
from mup_jax.data.packages import missing_package
from mup_jax.data.tokens import Ids, check_ids, token_dtype

Format = Literal["flat", "arrayrecord"]
FORMATS: tuple[Format, ...] = ("flat", "arrayrecord")
SUFFIX: dict[Format, str] = {"flat": "bin", "arrayrecord": "arrayrecord"}

# A window of a thousand tokens touches one record or two.
TOKENS_OF_RECORD = 4096

# A process may have some 1,000 open; each map holds one.
_OPEN_FILES = 256

# Of llm.c's files: 256 integers of 32 bits, which begin with a magic number and a version.
_HEADER_BYTES = 1024
_DTYPE_OF_HEADER: dict[tuple[int, int], np.dtype] = {
    (20240520, 1): np.dtype(np.uint16),
    (20240801, 7): np.dtype(np.uint32),
}


class Shard(NamedTuple):
    """A file of tokens.

    Attributes:
      path: of the file, or its URL.
      tokens: in it.
      offset: bytes before the first token; 0 in ArrayRecord files.
    """

    path: str
    tokens: int
    offset: int = 0


# Tokens [first, last) of a shard.
Range = tuple[int, int, int]
Reader = Callable[[Sequence[Range]], list[Ids]]


class TokenStream:
    """The tokens of all shards, one after the other: a one-dimensional array in files.

    Local files are memory-mapped or read by record. Of files in a bucket, ranges are read side by
    side.

    Args:
      shards: in their order.
      vocab_size: every id is in `[0, vocab_size)`; checked when it is read.
      dtype: of the ids in the files, little-endian; by default the vocabulary's.
      storage: "flat", one id after the other, or "arrayrecord", in records of `TOKENS_OF_RECORD`.

    Raises:
      ValueError: ArrayRecord files that are not local.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        vocab_size: int,
        *,
        dtype: Any = None,
        storage: Format = "flat",
    ):
        self.dtype = np.dtype(token_dtype(vocab_size) if dtype is None else dtype)
        self._vocab_size = vocab_size
        self._ends = np.cumsum([shard.tokens for shard in shards])
        in_bucket = any(is_url(shard.path) for shard in shards)
        if storage == "arrayrecord" and in_bucket:
            raise ValueError(
                f"{shards[0].path}: ArrayRecord files are read from disks alone: copy them, or "
                "prepare the text with --format=flat"
            )
        make = _records if storage == "arrayrecord" else _ranges if in_bucket else _memory_maps
        self._read: Reader = make(shards, self.dtype)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def gather(self, starts: NDArray[np.integer], length: int) -> Ids:
        """Windows of tokens, `(len(starts), length)`, which may cross from file to file.

        Raises:
          IndexError: a window is not within the stream.
          ValueError: an id is outside the vocabulary.
        """
        if len(starts) and not 0 <= min(starts) <= max(starts) <= len(self) - length:
            raise IndexError(
                f"windows of {length} tokens at {min(starts)} to {max(starts)}, of {len(self)}"
            )
        ranges: list[Range] = []
        for start in map(int, starts):
            position, stop = start, start + length
            shard = int(np.searchsorted(self._ends, position, side="right"))
            while position < stop:
                before = int(self._ends[shard - 1]) if shard else 0
                end = min(stop, int(self._ends[shard]))
                if position < end:
                    ranges.append((shard, position - before, end - before))
                position, shard = end, shard + 1
        windows = np.concatenate(self._read(ranges)).reshape(len(starts), length)
        check_ids(windows, self._vocab_size)
        return windows


def is_url(path: str) -> bool:
    """Whether a path is in a bucket: "gs://...", "s3://..." and what else fsspec knows."""
    return "://" in path


def file_system(url: str) -> Any:
    """The fsspec file system of a URL.

    Raises:
      ValueError: fsspec, or its package for such a bucket, is not installed.
    """
    try:
        import fsspec
    except ImportError:
        raise missing_package("fsspec", f"reading {url}") from None
    try:
        return fsspec.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be read: {error}") from error


def binary_files(pattern: str, vocab_size: int) -> TokenStream:
    """Files of tokens as llm.c writes them, with a header, or nanoGPT, 16-bit ids alone.

    Args:
      pattern: of paths, as `glob.glob` takes it.
      vocab_size: of the tokenizer that they come from.

    Raises:
      ValueError: no file matches, a file is not as long as its header says, or dtypes differ.
    """
    shards, dtypes = [], set()
    for path in matching_files(pattern):
        shard, dtype = _inspect(path)
        shards.append(shard)
        dtypes.add(dtype)
    if len(dtypes) > 1:
        raise ValueError(f"{pattern!r} matches files of 16 and of 32 bits: give one kind")
    return TokenStream(shards, vocab_size, dtype=dtypes.pop())


def _inspect(path: str) -> tuple[Shard, np.dtype]:
    size = os.path.getsize(path)
    magic, version, tokens = (*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0)[:3]
    dtype = _DTYPE_OF_HEADER.get((magic, version))
    if dtype is None and magic in {known for known, _ in _DTYPE_OF_HEADER}:
        raise ValueError(
            f"{path} is a file of llm.c of version {version}: write it with a version of "
            f"{sorted(_DTYPE_OF_HEADER)} (magic number, version)"
        )
    if dtype is None:
        if size % 2:
            raise ValueError(f"{path} has {size} bytes, an odd number: it is not of 16-bit tokens")
        return Shard(path, size // 2), np.dtype(np.uint16)
    expected = _HEADER_BYTES + tokens * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, and by its header {expected}: it was not copied whole"
        )
    return Shard(path, tokens, _HEADER_BYTES), dtype


def _memory_maps(shards: Sequence[Shard], dtype: np.dtype) -> Reader:
    @functools.lru_cache(maxsize=_OPEN_FILES)
    def memory_map(shard: int) -> np.memmap:
        path, tokens, offset = shards[shard]
        return np.memmap(path, dtype.newbyteorder("<"), "r", offset, (tokens,))

    # Copies, because a view would keep its file open.
    return lambda ranges: [np.array(memory_map(shard)[a:b]) for shard, a, b in ranges]


def _ranges(shards: Sequence[Shard], dtype: np.dtype) -> Reader:
    files, size = file_system(shards[0].path), dtype.itemsize

    def read(ranges: Sequence[Range]) -> list[Ids]:
        paths = [shards[shard].path for shard, _, _ in ranges]
        first = [shards[shard].offset + size * first for shard, first, _ in ranges]
        last = [shards[shard].offset + size * last for shard, _, last in ranges]
        contents = files.cat_ranges(paths, first, last, on_error="raise")
        return [np.frombuffer(content, dtype.newbyteorder("<")) for content in contents]

    return read


def _records(shards: Sequence[Shard], dtype: np.dtype) -> Reader:
    records = grain.sources.ArrayRecordDataSource([shard.path for shard in shards])
    counts = [-(-shard.tokens // TOKENS_OF_RECORD) for shard in shards]
    first_record = np.cumsum([0, *counts])

    def read(ranges: Sequence[Range]) -> list[Ids]:
        spans = [
            range(
                int(first_record[shard]) + first // TOKENS_OF_RECORD,
                int(first_record[shard]) + (last - 1) // TOKENS_OF_RECORD + 1,
            )
            for shard, first, last in ranges
        ]
        contents = iter(records.__getitems__([record for span in spans for record in span]))
        found = []
        for span, (_, first, last) in zip(spans, ranges, strict=True):
            tokens = np.frombuffer(b"".join(next(contents) for _ in span), dtype.newbyteorder("<"))
            begin = first % TOKENS_OF_RECORD
            found.append(tokens[begin : begin + last - first])
        return found

    return read
