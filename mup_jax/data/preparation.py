"""Text to files of tokens, part by part: what the command `mup_jax.data.prepare` does."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mup_jax.data import manifest as manifest_lib
from mup_jax.data.bpe import FileTokenizer, check_bpe_size, train_bpe
from mup_jax.data.corpus import clean, is_held_out
from mup_jax.data.manifest import SIDES, Entry, Manifest
from mup_jax.data.shard_writer import ShardWriter
from mup_jax.data.sources import Part, Source, parse_source
from mup_jax.data.stream import FORMATS, Format
from mup_jax.data.tokenizer import make_tokenizer, vocab_size_of
from mup_jax.data.tokens import Tokenizer, token_dtype

_PLAN = "prepare.json"
_PARTS = "parts"
_BPE_SAMPLE_CHARACTERS = 100_000_000
_REPORTED_TOKENS = 1_000_000


class Arguments(NamedTuple):
    """What decides on the tokens of a folder.

    Attributes:
      source: of the text.
      tokenizer: its name.
      column: of JSON objects or tables: the text.
      validation_fraction: expected fraction of documents in validation, within (0, 1).
      shard_tokens: most tokens in a file.
      format: of the files.
      end_of_document: the token that ends each document, for a tokenizer "file:PATH"; by default
        one that is known for it.
      strict: whether a null in place of a text is an error; by default it is left out and counted.
    """

    source: str
    tokenizer: str
    column: str = "text"
    validation_fraction: float = 0.05
    shard_tokens: int = 100_000_000
    format: Format = "flat"
    end_of_document: str | None = None
    strict: bool = False

    def check(self) -> Source:
        """The source.

        Raises:
          ValueError: an argument is bad; the message names it.
        """
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}: choose one within (0, 1)"
            )
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens}: give a positive number")
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r}: choose of {', '.join(FORMATS)}")
        if self.end_of_document is not None and not self.tokenizer.startswith("file:"):
            raise ValueError(
                f"end_of_document={self.end_of_document!r}: only a tokenizer 'file:PATH' takes one"
            )
        if self.tokenizer.startswith("bpe:"):
            check_bpe_size(vocab_size_of(self.tokenizer))
        else:
            _end_id(self, make_tokenizer(self.tokenizer))
        return self.text()

    def text(self) -> Source:
        return parse_source(self.source, self.column, self.strict)


def prepare(
    arguments: Arguments,
    out: str | Path,
    workers: int = 1,
    progress: Callable[[int, int, int], None] = lambda tokens, parts, of: None,
) -> Manifest:
    """Writes the tokens of a text to a folder; the manifest last.

    The tokens of a side are its documents in the order of the source, each with an end of text,
    whatever the number of workers is. An interrupted folder is gone on with, a finished one is left
    as it is.

    Args:
      arguments: what decides on the tokens.
      out: the folder.
      workers: processes.
      progress: called with the tokens since the last call, the parts that are done, and all.

    Returns:
      The manifest.

    Raises:
      ValueError: bad arguments, a folder of others, or text that cannot be read.
    """
    source, out = arguments.check(), Path(out)
    if workers < 1:
        raise ValueError(f"workers={workers}: give at least one")
    if (out / manifest_lib.NAME).exists():
        finished = manifest_lib.read_manifest(str(out))
        _check_same(arguments, finished.arguments, out)
        _clean_up(out)
        return finished
    parts = _claim(arguments, source, out)
    _make_tokenizer_file(arguments, source, parts, out)
    todo = [i for i in range(len(parts)) if not _record_of(out, i).exists()]
    done = len(parts) - len(todo)
    job = functools.partial(_prepare_part, arguments, str(out))
    for tokens, finished_parts in _run(job, [(i, parts[i]) for i in todo], workers):
        done += finished_parts
        progress(tokens, done, len(parts))
    sides: dict[str, list[Entry]] = {side: [] for side in SIDES}
    nulls = 0
    for i in range(len(parts)):
        record = json.loads(_record_of(out, i).read_text())
        nulls += record.get("nulls", 0)
        for side in SIDES:
            sides[side] += (Entry(*entry) for entry in record[side])
    if nulls and not any(sides.values()):
        raise ValueError(
            f"no text in {arguments.source!r}, where {arguments.column!r} of {nulls:,} records is "
            "null: choose another --column"
        )
    for side, entries in sides.items():
        if not entries:
            raise ValueError(
                f"no {side} text in {arguments.source!r} at validation_fraction="
                f"{arguments.validation_fraction}: add documents or change the fraction"
            )
    manifest = Manifest(
        version=manifest_lib.VERSION,
        arguments=arguments._asdict(),
        tokenizer=arguments.tokenizer,
        tokenizer_sha256=manifest_lib.digest_of_tokenizer(str(out)),
        vocab_size=vocab_size_of(arguments.tokenizer),
        format=arguments.format,
        train=tuple(sides["train"]),
        validation=tuple(sides["validation"]),
        nulls=nulls,
    )
    _write(out / manifest_lib.NAME, manifest.to_json())
    _clean_up(out)
    return manifest


def _claim(arguments: Arguments, source: Source, out: Path) -> list[Part]:
    """The parts of the text, as they were when the folder was begun."""
    plan = out / _PLAN
    if not plan.exists():
        if out.exists() and any(path.name != _partial(plan).name for path in out.iterdir()):
            raise ValueError(f"{out} is not empty: choose another --out")
        parts = source.parts()
        out.mkdir(parents=True, exist_ok=True)
        _write(plan, json.dumps({"arguments": arguments._asdict(), "parts": parts}))
    (out / _PARTS).mkdir(exist_ok=True)
    saved = json.loads(plan.read_text())
    _check_same(arguments, saved["arguments"], out)
    return [tuple(part) for part in saved["parts"]]


def _clean_up(out: Path) -> None:
    """Of a folder with a manifest."""
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    (out / _PLAN).unlink(missing_ok=True)


def _check_same(arguments: Arguments, before: dict[str, Any], out: Path) -> None:
    before = Arguments._field_defaults | before
    for name, value in arguments._asdict().items():
        if before.get(name) != value:
            raise ValueError(
                f"{out} was begun with {name}={before.get(name)!r}, not {value!r}: choose another "
                "--out"
            )


def _make_tokenizer_file(
    arguments: Arguments, source: Source, parts: list[Part], out: Path
) -> None:
    """Trains the encoding, or keeps a copy of the one given, beside the tokens."""
    kind, _, rest = arguments.tokenizer.partition(":")
    path = out / manifest_lib.TOKENIZER
    if path.exists():
        return
    if kind == "bpe":
        train_bpe(_sample(arguments, source, parts), int(rest), path)
    elif kind == "file":
        _write(path, Path(rest).read_text())


def _sample(arguments: Arguments, source: Source, parts: list[Part]) -> Iterator[str]:
    """Training documents from all over the text, always the same ones."""
    for part in parts:
        characters = 0
        for document in source.read(part):
            if document and not is_held_out(document.name, arguments.validation_fraction):
                characters += len(document.text)
                yield document.text
            if characters > _BPE_SAMPLE_CHARACTERS / len(parts):
                break


@functools.cache
def _tokenizer(name: str, out: str) -> Tokenizer:
    path = Path(out, manifest_lib.TOKENIZER)
    return FileTokenizer(path) if path.exists() else make_tokenizer(name)


def _end_id(arguments: Arguments, tokenizer: Tokenizer) -> int:
    if arguments.end_of_document is not None and isinstance(tokenizer, FileTokenizer):
        return tokenizer.id_of(arguments.end_of_document)
    return tokenizer.end_of_text


def end_of_document(arguments: Arguments, out: str) -> str:
    """The token that ends each document of a prepared folder."""
    tokenizer = _tokenizer(arguments.tokenizer, out)
    return tokenizer.decode(np.asarray([_end_id(arguments, tokenizer)]))


def _prepare_part(
    arguments: Arguments, out: str, index: int, part: Part, report: Callable[[int], None]
) -> None:
    """Writes the files of a part, and a record of them when they are complete."""
    tokenizer = _tokenizer(arguments.tokenizer, out)
    dtype = token_dtype(vocab_size_of(arguments.tokenizer))
    writer = lambda side: ShardWriter(
        Path(out), f"{side}-{index:05d}", arguments.format, dtype, arguments.shard_tokens
    )
    writers = {side: writer(side) for side in SIDES}
    end, unreported = np.asarray([_end_id(arguments, tokenizer)], dtype), 0
    nulls = 0
    for document in arguments.text().read(part):
        if document is None:
            nulls += 1
            continue
        text = clean(document.text) if tokenizer.name == "char" else document.text
        if not text:
            continue
        ids = np.concatenate([tokenizer.encode(text).astype(dtype), end])
        side = SIDES[is_held_out(document.name, arguments.validation_fraction)]
        writers[side].add(ids)
        unreported += len(ids)
        if unreported > _REPORTED_TOKENS:
            report(unreported)
            unreported = 0
    report(unreported)
    record = {side: writer.close() for side, writer in writers.items()} | {"nulls": nulls}
    _write(_record_of(Path(out), index), json.dumps(record))


def _record_of(out: Path, index: int) -> Path:
    return out / _PARTS / f"{index:05d}.json"


def _write(path: Path, text: str) -> None:
    """A file that is complete or absent."""
    partial = _partial(path)
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


# In a worker process: the tokens that all workers have made.
_counter: Any = None


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    # So that no two write the same part when the first command is killed and started again.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _count(tokens: int) -> None:
    with _counter.get_lock():
        _counter.value += tokens


def _run(
    job: Callable[..., None], todo: list[tuple[int, Part]], workers: int
) -> Iterator[tuple[int, int]]:
    """Calls the job for all parts; yields the tokens and parts that were done since."""
    if workers == 1 or len(todo) < 2:
        for index, part in todo:
            tokens: list[int] = []
            job(index, part, tokens.append)
            yield sum(tokens), 1
        return
    context = multiprocessing.get_context("spawn")
    counter, seen = context.Value("q", 0), 0
    with ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (counter,)) as pool:
        pending = {pool.submit(job, index, part, _count) for index, part in todo}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                total = counter.value
                yield total - seen, len(done)
                seen = total
        except BrokenProcessPool as error:
            raise OSError(
                "a worker was killed, perhaps for its memory: the same command goes on from here, "
                "with fewer --workers if need be"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
