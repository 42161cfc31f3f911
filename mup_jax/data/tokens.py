"""Token ids, and what the pipeline asks of a tokenizer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.unsignedinteger]

GPT2_VOCABULARY = 50257


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer, of characters or of byte pairs alike."""

    @property
    def name(self) -> str:
        """The name under which `make_tokenizer` makes it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in `[0, vocab_size)`."""

    @property
    def end_of_text(self) -> int:
        """The id that ends a document; that of a newline where there is none of its own."""

    def encode(self, text: str) -> Ids:
        """Ids of the text, shape `(tokens,)`, of dtype `token_dtype(vocab_size)`."""

    def decode(self, ids: NDArray[np.integer]) -> str:
        """The text of ids of shape `(tokens,)`; inverts `encode`."""


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The unsigned integers, of 16 or 32 bits, that hold the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def check_ids(ids: NDArray[np.integer], vocab_size: int) -> None:
    """Raises ValueError where an id is outside `[0, vocab_size)`."""
    outside = (np.asarray(ids) < 0) | (np.asarray(ids) >= vocab_size)
    if outside.any():
        raise ValueError(f"token id {np.asarray(ids)[outside][0]} is not in [0, {vocab_size})")
