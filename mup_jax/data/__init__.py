"""Real text in, token windows out."""

from mup_jax.data.corpus import Document, split_documents, standard_library
from mup_jax.data.pipeline import (
    Batch,
    Tokens,
    fingerprint,
    load,
    tokenize,
    training_batches,
    validation_batches,
    vocab_size,
)
from mup_jax.data.stream import TokenStream
from mup_jax.data.tokenizer import CharTokenizer, make_tokenizer
from mup_jax.data.tokens import Tokenizer

__all__ = [
    "Batch",
    "CharTokenizer",
    "Document",
    "TokenStream",
    "Tokenizer",
    "Tokens",
    "fingerprint",
    "load",
    "make_tokenizer",
    "split_documents",
    "standard_library",
    "tokenize",
    "training_batches",
    "validation_batches",
    "vocab_size",
]
