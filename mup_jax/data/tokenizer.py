"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mup_jax.data.tokens import GPT2_VOCABULARY, Tokenizer, check_ids

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
    end_of_text = _CHARACTERS.index("\n")

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
        check_ids(ids, self.vocab_size)
        return _BYTE_OF_ID[ids].tobytes().decode("ascii")


class ByteTokenizer:
    """One token per byte of UTF-8."""

    name = "bytes"
    vocab_size = 256
    end_of_text = ord("\n")

    def encode(self, text: str) -> NDArray[np.uint16]:
        """The bytes of the text, shape `(bytes,)`."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, ids: NDArray[np.integer]) -> str:
        """The text of ids of shape `(tokens,)`; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is outside `[0, 256)`.
        """
        check_ids(ids, self.vocab_size)
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")


def _gpt2() -> Tokenizer:
    from mup_jax.data.bpe import Gpt2Tokenizer

    return Gpt2Tokenizer()


# Sizes stand here, so that a plan need not load what has to be downloaded.
_TOKENIZERS: dict[str, tuple[int, Callable[[], Tokenizer]]] = {
    "char": (CharTokenizer.vocab_size, CharTokenizer),
    "bytes": (ByteTokenizer.vocab_size, ByteTokenizer),
    "gpt2": (GPT2_VOCABULARY, _gpt2),
}


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name: "char", "bytes", "gpt2", or "file:" and a tokenizer.json's path.

    Raises:
      ValueError: no tokenizer has this name, or it cannot be loaded.
    """
    kind, _, path = name.partition(":")
    if kind == "file" and path:
        from mup_jax.data.bpe import FileTokenizer

        return FileTokenizer(path)
    if name not in _TOKENIZERS:
        raise _unknown(name)
    return _TOKENIZERS[name][1]()


def vocab_size_of(name: str) -> int:
    """The vocabulary size of a tokenizer, without loading more than it takes.

    Args:
      name: as for `make_tokenizer`, or "bpe:" and the size.

    Raises:
      ValueError: as `make_tokenizer`.
    """
    kind, _, rest = name.partition(":")
    if kind == "bpe" and rest.isdecimal():
        return int(rest)
    if kind == "file" and rest:
        return make_tokenizer(name).vocab_size
    if name not in _TOKENIZERS:
        raise _unknown(name)
    return _TOKENIZERS[name][0]


def _unknown(name: str) -> ValueError:
    known = ", ".join(map(repr, _TOKENIZERS))
    return ValueError(f"unknown tokenizer {name!r}: choose one of {known} or 'file:PATH'")


def _unknown_character(text: str, position: int) -> ValueError:
    return ValueError(
        f"character {text[position]!r} at position {position} is neither newline nor printable "
        "ASCII: clean the text first"
    )
