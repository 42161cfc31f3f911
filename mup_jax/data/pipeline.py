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

from mup_jax.data.corpus import Document, split_documents, standard_library, text_files
from mup_jax.data.tokenizer import Tokenizer, make_tokenizer

Batch = dict[str, NDArray[np.int32]]

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
      fingerprint: equal exactly where `train` and `validation` are.
    """

    train: NDArray[np.uint16]
    validation: NDArray[np.uint16]
    vocab_size: int
    fingerprint: str


def load(source: str, tokenizer: str) -> Tokens:
    """Reads a corpus, splits it by document, and tokenizes both sides.

    Args:
      source: "stdlib", the standard library's source files (see `standard_library`), or "files:"
        and a pattern of paths (see `text_files`).
      tokenizer: a name that `make_tokenizer` knows.

    Raises:
      ValueError: the source or the tokenizer is unknown, or the corpus is empty.
    """
    kind, _, pattern = source.partition(":")
    if kind not in _SOURCES or (kind == "files") != bool(pattern):
        raise ValueError(f"unknown text source {source!r}: choose 'stdlib' or 'files:PATTERN'")
    encoder = make_tokenizer(tokenizer)
    documents = _SOURCES[kind](pattern)
    train, validation = (tokenize(side, encoder) for side in split_documents(documents))
    return Tokens(
        train, validation, encoder.vocab_size, f"{fingerprint(train)}-{fingerprint(validation)}"
    )


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """Ids of the documents joined by a newline, shape `(tokens,)`."""
    return tokenizer.encode("\n".join(document.text for document in documents))


def fingerprint(tokens: NDArray[np.uint16]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the tokens' bytes."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def training_batches(
    tokens: NDArray[np.uint16],
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
        # The tokens are in memory: reading ahead in threads only contends for the interpreter.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def validation_batches(
    tokens: NDArray[np.uint16], *, context: int, batch_size: int, max_batches: int | None = None
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


def _windows(tokens: NDArray[np.uint16], context: int) -> NDArray[np.uint16]:
    """A view of windows of `context + 1` tokens at stride `context`: neighbours share a token."""
    if context < 1:
        raise ValueError(f"context={context}: choose at least 1 token")
    if len(tokens) < context + 1:
        raise ValueError(
            f"{len(tokens)} tokens are fewer than one window of context + 1 = {context + 1}: "
            "add text or choose a shorter context"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]


def _inputs_and_targets(windows: NDArray[np.uint16]) -> Batch:
    return {
        "inputs": windows[..., :-1].astype(np.int32),
        "targets": windows[..., 1:].astype(np.int32),
    }
