"""What is in a folder of prepared tokens: manifest.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mup_jax.data.stream import (
    FORMATS,
    Format,
    Shard,
    TokenStream,
    file_system,
    is_url,
)
from mup_jax.data.tokens import token_dtype

NAME = "manifest.json"
TOKENIZER = "tokenizer.json"
VERSION = 1
SIDES = ("train", "validation")
_PLAIN_NAME = re.compile(r"\w[\w.-]*")


class Entry(NamedTuple):
    """A file of tokens: its name within the folder, and what it holds."""

    file: str
    tokens: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """The contents of manifest.json.

    Attributes:
      version: of the layout.
      arguments: of `prepare` that decide on the tokens.
      tokenizer: the name under which `make_tokenizer` makes it, or "bpe:SIZE", which is in the
        folder's tokenizer.json.
      tokenizer_sha256: of the folder's tokenizer.json; empty where there is none.
      vocab_size: every id is in `[0, vocab_size)`.
      format: of the files.
      train: its files in their order.
      validation: likewise.
      nulls: records that were left out, as their text is null.
    """

    version: int
    arguments: dict[str, Any]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    format: Format
    train: tuple[Entry, ...]
    validation: tuple[Entry, ...]
    nulls: int = 0

    @property
    def fingerprint(self) -> str:
        """Equal for equal files: the tokens, and where they are cut."""
        return "-".join(
            hashlib.sha256("".join(entry.sha256 for entry in side).encode()).hexdigest()[:16]
            for side in (self.train, self.validation)
        )

    def to_json(self) -> str:
        sides = {side: [entry._asdict() for entry in getattr(self, side)] for side in SIDES}
        return json.dumps(self._asdict() | sides, indent=1) + "\n"


def read_manifest(folder: str) -> Manifest:
    """Reads the manifest of a folder, or of the URL of one.

    Raises:
      ValueError: there is none, it is not one that can be read, or a file of it is missing, has
        another size or is not within the folder.
    """
    path = f"{folder.rstrip('/')}/{NAME}"
    try:
        text = file_system(path).cat_file(path) if is_url(path) else Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"no {NAME} in {folder}: give the --out folder of a finished mup_jax.data.prepare"
        ) from None
    try:
        fields = json.loads(text)
        version = fields["version"]
        if version == VERSION:
            sides = {side: tuple(Entry(**entry) for entry in fields[side]) for side in SIDES}
            manifest = Manifest(**(fields | sides))
            _check_numbers(manifest)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare the text again") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, and {VERSION} can be read: prepare again")
    if manifest.format not in FORMATS:
        raise ValueError(f"{path} has format {manifest.format!r}: choose of {FORMATS}")
    _check_files(folder, [*manifest.train, *manifest.validation])
    return manifest


def streams(folder: str, manifest: Manifest) -> tuple[TokenStream, TokenStream]:
    """The tokens of training and of validation."""

    def stream(entries: tuple[Entry, ...]) -> TokenStream:
        shards = [Shard(_join(folder, entry.file), entry.tokens) for entry in entries]
        return TokenStream(shards, manifest.vocab_size, storage=manifest.format)

    return stream(manifest.train), stream(manifest.validation)


def damaged_files(folder: str, manifest: Manifest) -> Iterator[str]:
    """The names of the files whose contents are not those of the manifest; reads all of them."""
    for entry in (*manifest.train, *manifest.validation):
        if _digest(_join(folder, entry.file)) != entry.sha256:
            yield entry.file
    if digest_of_tokenizer(folder) != manifest.tokenizer_sha256:
        yield TOKENIZER


def digest_of_tokenizer(folder: str) -> str:
    """The SHA-256 of a folder's tokenizer.json; empty where there is none."""
    try:
        return _digest(_join(folder, TOKENIZER))
    except FileNotFoundError:
        return ""


def _digest(path: str) -> str:
    with file_system(path).open(path) if is_url(path) else Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_numbers(manifest: Manifest) -> None:
    size = token_dtype(manifest.vocab_size).itemsize
    for entry in (*manifest.train, *manifest.validation):
        if type(entry.tokens) is not int or entry.tokens < 1:
            raise ValueError(f"{entry.file} with {entry.tokens!r} tokens")
        if manifest.format == "flat" and entry.bytes != entry.tokens * size:
            raise ValueError(f"{entry.file} with {entry.tokens} tokens in {entry.bytes} bytes")


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _check_files(folder: str, entries: list[Entry]) -> None:
    for entry in entries:
        if not _PLAIN_NAME.fullmatch(str(entry.file)):
            raise ValueError(
                f"{folder}/{NAME} names {entry.file!r}, which is not a file of its folder"
            )
    if is_url(folder):
        found = {
            info["name"].rpartition("/")[2]: info["size"]
            for info in file_system(folder).ls(folder, detail=True)
        }
    else:
        found = {}
        for file in os.scandir(folder):
            if file.is_symlink() and Path(file).resolve().parent != Path(folder).resolve():
                raise ValueError(f"{file.path} is a link out of its folder: copy the file there")
            if file.is_file():
                found[file.name] = file.stat().st_size
    for entry in entries:
        if found.get(entry.file) != entry.bytes:
            size = f"has {found[entry.file]} bytes" if entry.file in found else "is missing"
            raise ValueError(
                f"{_join(folder, entry.file)} {size}, and {entry.bytes} were written: copy the "
                "folder again"
            )
