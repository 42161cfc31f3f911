"""Turns text into files of tokens, side by side and in a way that can be interrupted.

    python -m mup_jax.data.prepare --source=SOURCE --tokenizer=TOKENIZER --out=DIR

SOURCE is "stdlib", "files:PATTERN", "jsonl:PATTERN" (both also .gz, .bz2, .xz or .zst),
"parquet:PATTERN", or "hf:NAME[:CONFIGURATION[:SPLIT]]", a data set of Hugging Face, which is
streamed. TOKENIZER is "char", "bytes", "gpt2", "file:PATH" (a tokenizer.json), or "bpe:SIZE",
trained on the text itself. Interrupted at any moment, the same command goes on. `--verify` alone
reads the files of DIR and compares them with the manifest. Train on them with

    python -m experiments.train --config.data.source=prepared:DIR --config.data.tokenizer=TOKENIZER
"""

from __future__ import annotations

import argparse
import os
import sys

from mup_jax.data.manifest import SIDES, damaged_files, read_manifest
from mup_jax.data.packages import missing_package
from mup_jax.data.preparation import Arguments, end_of_document, prepare


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mup_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Arguments._field_defaults
    parser.add_argument("--source", help="of the text")
    parser.add_argument("--tokenizer", help="its name")
    parser.add_argument(
        "--end-of-document", metavar="TOKEN", help="for a tokenizer file:PATH, in place of its own"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--column", default=defaults["column"], help="with the text (%(default)s)")
    parser.add_argument("--format", default=defaults["format"], help="flat (default), arrayrecord")
    parser.add_argument(
        "--shard-tokens", type=int, default=defaults["shard_tokens"], help="most tokens of a file"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=defaults["validation_fraction"],
        help="of the documents (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse a null in place of a text")
    parser.add_argument("--verify", action="store_true", help="compare DIR with its manifest")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    flags = _parser().parse_args(argv)
    try:
        return _verify(flags.out) if flags.verify else _prepare(flags)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130


def _verify(out: str) -> int:
    manifest = read_manifest(out)
    damaged = list(damaged_files(out, manifest))
    for file in damaged:
        print(f"error: {out}/{file} is damaged: prepare the text again", file=sys.stderr)
    if not damaged:
        print(f"{len(manifest.train) + len(manifest.validation)} files are as they were written")
    return 1 if damaged else 0


def _prepare(flags: argparse.Namespace) -> int:
    for name in ("source", "tokenizer"):
        if not getattr(flags, name):
            raise ValueError(f"--{name} is missing: see --help")
    try:
        from tqdm import tqdm
    except ImportError:
        raise missing_package("tqdm", "the progress bar") from None
    arguments = Arguments(*(getattr(flags, name) for name in Arguments._fields))
    with tqdm(unit=" tokens", unit_scale=True) as bar:

        def progress(tokens: int, parts: int, of: int) -> None:
            bar.set_description(f"{parts}/{of} parts", refresh=False)
            bar.update(tokens)

        manifest = prepare(arguments, flags.out, flags.workers, progress)
    for side in SIDES:
        entries = getattr(manifest, side)
        tokens = sum(entry.tokens for entry in entries)
        print(f"{side}: {tokens:,} tokens in {len(entries)} files")
    if manifest.nulls:
        print(f"records left out, as their {arguments.column!r} is null: {manifest.nulls:,}")
    print(f"each document ends with {end_of_document(arguments, flags.out)!r}")
    print(
        f"train with --config.data.source=prepared:{flags.out} "
        f"--config.data.tokenizer={manifest.tokenizer}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
