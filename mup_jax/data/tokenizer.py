"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer, of characters or of byte pairs alike."""

    @property
    def name(self) -> str:
        """The name under which `make_tokenizer` makes it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in `[0, vocab_size)`."""

    def encode(self, text: str) -> NDArray[np.uint16]:
        """Ids of the text, shape `(tokens,)`."""

    def decode(self, ids: NDArray[np.integer]) -> str:
        """The text of ids of shape `(tokens,)`; inverts `encode`."""


_CHARACTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
_UNKNOWN = np.uint16(len(_CHARACTERS))
_ID_OF_BYTE = np.full(128, _UNKNOWN, np.uint16)
_ID_OF_BYTE[[ord(character) for character in _CHARACTERS]] = np.arange(len(_CHARACTERS))
_BYTE_OF_ID = np.frombuffer(_CHARACTERS.encode("ascii"), np.uint8)


class CharTokenizer:
    """One token per character: newline and the 95 printable ASCII characters, 96 in all.

    The vocabulary size of the width and depth sweeps of Qiu et al. (arXiv 2512.05620).
    """

    name = "char"
    vocab_size = len(_CHARACTERS)

    def encode(self, text: str) -> NDArray[np.uint16]:
        """Ids of the characters, shape `(len(text),)`.

        Raises:
          ValueError: a character is outside the vocabulary.
        """
        try:
            ids = _ID_OF_BYTE[np.frombuffer(text.encode("ascii"), np.uint8)]
        except UnicodeEncodeError as error:
            raise _unknown_character(text, error.start) from None
        if (unknown := ids == _UNKNOWN).any():
            raise _unknown_character(text, int(unknown.argmax()))
        return ids

    def decode(self, ids: NDArray[np.integer]) -> str:
        """The text of ids of shape `(tokens,)`.

        Raises:
          ValueError: an id is outside `[0, 96)`.
        """
        ids = np.asarray(ids)
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            raise ValueError(f"token id {ids[outside][0]} is not in [0, {self.vocab_size})")
        return _BYTE_OF_ID[ids].tobytes().decode("ascii")


_TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {CharTokenizer.name: CharTokenizer}


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer registered under a name.

    Raises:
      ValueError: no tokenizer has this name.
    """
    if name not in _TOKENIZERS:
        raise ValueError(f"unknown tokenizer {name!r}: choose one of {sorted(_TOKENIZERS)}")
    return _TOKENIZERS[name]()


def _unknown_character(text: str, position: int) -> ValueError:
    return ValueError(
        f"character {text[position]!r} at position {position} is neither newline nor printable "
        "ASCII: clean the text first"
    )
