"""Documents to batches of token windows.

Dimensions: N batches, B rows (windows) of a batch, T tokens of context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import grain
import numpy as np
from numpy.typing import NDArray

from mup_jax.data.corpus import (
    Document,
    clean,
    split_documents,
    standard_library,
    text_files,
)
from mup_jax.data.manifest import Manifest, read_manifest, streams
from mup_jax.data.stream import TokenStream, binary_files
from mup_jax.data.tokenizer import make_tokenizer, vocab_size_of
from mup_jax.data.tokens import Ids, Tokenizer

Batch = dict[str, NDArray[np.int32]]

# As a tokenizer's name: that of the prepared tokens.
_OF_PREPARED = "prepared"

# In memory, reading ahead in threads only contends for the interpreter.
_READ_AT_ONCE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)

_SOURCES: dict[str, Callable[[str], list[Document]]] = {
    "stdlib": lambda _: standard_library(),
    "files": text_files,
}


class Tokens(NamedTuple):
    """A tokenized corpus.

    Attributes:
      train: ids of shape `(training tokens,)`.
      validation: ids of shape `(validation tokens,)`, from other documents.
      vocab_size: every id is in `[0, vocab_size)`.
      fingerprint: equal where `train` and `validation` are, in all likelihood nowhere else.
    """

    train: Ids | TokenStream
    validation: Ids | TokenStream
    vocab_size: int
    fingerprint: str


def load(source: str, tokenizer: str) -> Tokens:
    """A corpus, split by document and tokenized.

    Args:
      source: "stdlib", the standard library's source files (see `standard_library`); "files:" and
        a pattern of paths (see `text_files`); "prepared:" and a folder that
        `mup_jax.data.prepare` wrote, or its URL in a bucket; or "bin:TRAIN,VALIDATION", two
        patterns of token files of llm.c or nanoGPT.
      tokenizer: a name that `make_tokenizer` knows; for prepared tokens theirs, or "prepared".

    Raises:
      ValueError: the source or the tokenizer is unknown, or not that of the tokens, or the corpus
        is empty.
    """
    kind, _, where = source.partition(":")
    if kind == "prepared" and where:
        return _prepared(where, tokenizer)
    if kind == "bin" and where.count(",") == 1:
        return _binary(where.split(","), vocab_size_of(tokenizer))
    if kind not in _SOURCES or (kind == "files") != bool(where):
        raise ValueError(
            f"unknown text source {source!r}: choose 'stdlib', 'files:PATTERN', 'prepared:FOLDER' "
            "or 'bin:TRAIN,VALIDATION'"
        )
    encoder = make_tokenizer(tokenizer)
    documents = _SOURCES[kind](where)
    train, validation = (tokenize(side, encoder) for side in split_documents(documents))
    return Tokens(
        train, validation, encoder.vocab_size, f"{fingerprint(train)}-{fingerprint(validation)}"
    )


def vocab_size(source: str, tokenizer: str) -> int:
    """The vocabulary size of what `load` returns for the same arguments, without loading it.

    Raises:
      ValueError: as `load`.
    """
    kind, _, where = source.partition(":")
    if kind == "prepared" and (tokenizer == _OF_PREPARED or tokenizer.startswith("file:")):
        return _manifest_of(where, tokenizer).vocab_size
    return vocab_size_of(tokenizer)


def _manifest_of(folder: str, tokenizer: str) -> Manifest:
    manifest = read_manifest(folder)
    if tokenizer not in (manifest.tokenizer, _OF_PREPARED):
        raise ValueError(
            f"the tokens in {folder} are not those of the tokenizer {tokenizer!r}: it is "
            f"{manifest.tokenizer!r}"
        )
    return manifest


def _prepared(folder: str, tokenizer: str) -> Tokens:
    manifest = _manifest_of(folder, tokenizer)
    return Tokens(*streams(folder, manifest), manifest.vocab_size, manifest.fingerprint)


def _binary(patterns: list[str], vocab_size: int) -> Tokens:
    train, validation = (binary_files(pattern, vocab_size) for pattern in patterns)
    fingerprints = map(_fingerprint_of_sample, (train, validation))
    return Tokens(train, validation, vocab_size, "-".join(fingerprints))


def _fingerprint_of_sample(stream: TokenStream) -> str:
    """For files without a manifest, which are too large to be read for it."""
    starts = np.linspace(0, len(stream) - 1, min(len(stream), 1024)).astype(int)
    sample = np.append(stream.gather(starts, 1), len(stream))
    return hashlib.sha256(sample.tobytes()).hexdigest()[:16]


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Ids:
    """Ids of the documents joined by a newline, shape `(tokens,)`."""
    text = "\n".join(document.text for document in documents)
    return tokenizer.encode(clean(text) if tokenizer.name == "char" else text)


def fingerprint(tokens: Ids) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the tokens' bytes."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def training_batches(
    tokens: Ids | TokenStream,
    *,
    context: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """An endless stream of shuffled training batches, without padding.

    The tokens are cut into windows at stride `context`. Every epoch visits each window once, in an
    order of its own that depends on the seed alone. The rows of one global batch are divided over
    the processes: concatenated by process they are the batch that a single process would see. The
    iterator's state is the number of batches taken, the same in every process, so `get_state` and
    `set_state` (or an Orbax checkpoint of the iterator) resume exactly.

    Args:
      tokens: ids of shape `(tokens,)`.
      context: tokens per row, T.
      batch_size: rows of the global batch.
      seed: seed of the order, in `[0, 2**32)`.
      process_index: which process this is, in `[0, process_count)`.
      process_count: number of processes that share a global batch.

    Returns:
      A dataset of `{"inputs", "targets"}`, int32 of shape `(B, T)` with
      `B = batch_size / process_count`. `targets` are the tokens that follow `inputs`; the last one
      is the first input of the text's next window.

    Raises:
      ValueError: there are too few tokens for one window, or the batch cannot be divided.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in [0, {process_count})")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is not a positive multiple of process_count={process_count}: "
            "change the batch size"
        )
    windows = _windows(tokens, context)
    return (
        # Shuffling row numbers and gathering a batch at once costs a quarter of reading row by row.
        grain.MapDataset.range(len(windows))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(
            batch_size // process_count,
            # Rounding the endless length up, the default, overflows at a batch of one row.
            drop_remainder=True,
            batch_fn=lambda rows: _inputs_and_targets(windows[np.asarray(rows)]),
        )
        # Successive small batches are the contiguous parts of one global batch.
        .slice(slice(process_index, None, process_count))
        .to_iter_dataset(_READ_AHEAD if isinstance(tokens, TokenStream) else _READ_AT_ONCE)
    )


def validation_batches(
    tokens: Ids | TokenStream, *, context: int, batch_size: int, max_batches: int | None = None
) -> Batch:
    """Full batches whose windows spread evenly over the tokens, always the same ones.

    Args:
      tokens: ids of shape `(tokens,)`.
      context: tokens per row, T.
      batch_size: rows per batch, B.
      max_batches: upper bound of N; by default as many batches as the tokens fill.

    Returns:
      `{"inputs", "targets"}`, int32 of shape `(N, B, T)`, windows as in `training_batches`.

    Raises:
      ValueError: the tokens do not fill one batch.
    """
    windows = _windows(tokens, context)
    fillable = len(windows) // batch_size if batch_size > 0 else 0
    batches = fillable if max_batches is None else min(fillable, max_batches)
    if batches < 1:
        raise ValueError(
            f"no validation batch: {len(windows)} windows of {context} tokens, batch_size="
            f"{batch_size}, max_batches={max_batches}: add text or choose a smaller batch"
        )
    rows = batches * batch_size
    chosen = windows[np.arange(rows) * len(windows) // rows]
    return _inputs_and_targets(chosen.reshape(batches, batch_size, context + 1))


class _StreamWindows:
    """`_windows` of a stream, read when they are asked for."""

    def __init__(self, stream: TokenStream, context: int):
        self._stream, self._context = stream, context

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._context

    def __getitem__(self, rows: NDArray[np.integer]) -> Ids:
        return self._stream.gather(rows * self._context, self._context + 1)


def _windows(tokens: Ids | TokenStream, context: int) -> Ids | _StreamWindows:
    """Windows of `context + 1` tokens at stride `context`: neighbours share a token."""
    if context < 1:
        raise ValueError(f"context={context}: choose at least 1 token")
    if len(tokens) < context + 1:
        raise ValueError(
            f"{len(tokens)} tokens are fewer than one window of context + 1 = {context + 1}: "
            "add text or choose a shorter context"
        )
    if isinstance(tokens, TokenStream):
        return _StreamWindows(tokens, context)
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]


def _inputs_and_targets(windows: Ids) -> Batch:
    return {
        "inputs": windows[..., :-1].astype(np.int32),
        "targets": windows[..., 1:].astype(np.int32),
    }
