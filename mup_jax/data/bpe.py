"""Byte-pair encodings: GPT-2's, those of a file, and new ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mup_jax.data.packages import missing_package
from mup_jax.data.tokens import GPT2_VOCABULARY, Ids, token_dtype

END_OF_TEXT = "<|endoftext|>"
# The first that a tokenizer has ends its documents. Gemma has "</s>" too, for HTML, and chat models
# have "<|im_end|>", which ends a turn, beside the token of their base model.
_ENDS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<eos>",
    "</s>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "[SEP]",
)
_BYTES = 256


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken.

    Raises:
      ValueError: tiktoken is not installed, or could not get the encoding's file.
    """

    name = "gpt2"
    vocab_size = GPT2_VOCABULARY
    end_of_text = GPT2_VOCABULARY - 1

    def __init__(self) -> None:
        try:
            import tiktoken
        except ImportError:
            raise missing_package("tiktoken", "the tokenizer 'gpt2'") from None
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # of requests, or of the file system
            raise ValueError(
                f"tiktoken could not download GPT-2's encoding ({type(error).__name__}): set "
                "TIKTOKEN_CACHE_DIR to a folder that has it, or use the tokenizer 'file:PATH' with "
                "GPT-2's tokenizer.json"
            ) from error

    def encode(self, text: str) -> NDArray[np.uint16]:
        """Ids of the text, shape `(tokens,)`; what looks like a special token is plain text."""
        return np.asarray(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, ids: NDArray[np.integer]) -> str:
        """The text of ids of shape `(tokens,)`."""
        return self._encoding.decode(np.asarray(ids).tolist())


class FileTokenizer:
    """A tokenizer of the Hugging Face library, from its tokenizer.json.

    Every text is encoded whole and always the same way: the file's truncation, padding and dropout
    are switched off.

    Args:
      path: of the file.

    Raises:
      ValueError: the library is not installed, or the file is missing or not a tokenizer.
    """

    def __init__(self, path: str | Path):
        library = _library(f"the tokenizer 'file:{path}'")
        if not os.path.isfile(path):
            raise ValueError(f"no tokenizer file {path}: give the path of a tokenizer.json")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
        # What looks like a special token in a text is text.
        self._tokenizer.encode_special_tokens = True
        self.name = f"file:{path}"
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

    @property
    def end_of_text(self) -> int:
        """The id that ends a document: of the tokenizer's own end token, or else of a newline.

        Raises:
          ValueError: it has neither.
        """
        for token in _ENDS:
            if (end := self._tokenizer.token_to_id(token)) is not None:
                return end
        newline = self.encode("\n")
        # A single id may also stand for any unknown character.
        if len(newline) != 1 or self.decode(newline) != "\n":
            raise ValueError(
                f"the tokenizer {self.name!r} has no known token for the end of a document, nor "
                "one for a newline: name one with --end-of-document=TOKEN"
            )
        return int(newline[0])

    def id_of(self, token: str) -> int:
        """The id of a token.

        Raises:
          ValueError: the tokenizer does not have it.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer {self.name!r} has no token {token!r}: name another")
        return found

    def encode(self, text: str) -> Ids:
        """Ids of the text, shape `(tokens,)`, without special tokens around it."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, token_dtype(self.vocab_size))

    def decode(self, ids: NDArray[np.integer]) -> str:
        """The text of ids of shape `(tokens,)`."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level encoding like GPT-2's and writes its tokenizer.json.

    Args:
      texts: what to learn from.
      vocab_size: number of ids, `<|endoftext|>` and the 256 bytes included. There are fewer in
        the file where the text is too short for so many.
      path: of the file.

    Raises:
      ValueError: the size is too small, or the library `tokenizers` is not installed.
    """
    check_bpe_size(vocab_size)
    library = _library("a tokenizer 'bpe:SIZE'")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    partial = path.with_name(f"{path.name}.partial")
    tokenizer.save(str(partial))
    partial.replace(path)


def check_bpe_size(vocab_size: int) -> None:
    """Raises ValueError where the size leaves no room for the bytes and the end of text."""
    if vocab_size <= _BYTES:
        raise ValueError(f"tokenizer 'bpe:{vocab_size}': give a size of at least {_BYTES + 1}")


def _library(purpose: str) -> Any:
    # Its threads would only compete with the processes that encode.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError:
        raise missing_package("tokenizers", purpose) from None
    return tokenizers
