import bz2
import gzip
import itertools
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers

from mup_jax.data import (
    load,
    make_tokenizer,
    preparation,
    split_documents,
    standard_library,
    vocab_size,
)
from mup_jax.data import manifest as manifest_lib
from mup_jax.data.preparation import Arguments, prepare
from mup_jax.data.prepare import main

TEXTS = [f"document {i}: " + "lorem ipsum dolor sit amet " * (i % 7) for i in range(60)]
# Of the sixty, by the hashes of their names.
FRACTION = 0.2


def compress_zst(contents):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(contents)
    return sink.getvalue().to_pybytes()


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": compress_zst,
}


def write_jsonl(path, texts, column="text"):
    lines = "".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts).encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(lines))


def write_parquet(path, texts):
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Documents are named, and with that divided, by relative paths: the same every time."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus(tmp_path):
    """Three JSONL files, one of them compressed."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl.gz")):
        write_jsonl(folder / name, TEXTS[20 * i : 20 * (i + 1)])
    return "jsonl:corpus/*"


@pytest.fixture
def many_parts(monkeypatch):
    monkeypatch.setattr("mup_jax.data.sources._BYTES_OF_PART", 1)


def run(source, out, tokenizer="bytes", workers=1, **options):
    arguments = Arguments(source, tokenizer, validation_fraction=FRACTION, **options)
    return prepare(arguments, out, workers)


def sides(folder, tokenizer):
    tokens = load(f"prepared:{folder}", tokenizer)
    return [side.gather([0], len(side))[0] for side in (tokens.train, tokens.validation)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def texts_of(folder, tokenizer="bytes"):
    encoder = make_tokenizer(tokenizer)
    return [
        encoder.decode(side).removesuffix("\n").split("\n") for side in sides(folder, tokenizer)
    ]


def test_every_document_is_on_one_side_in_its_order(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out")
    train, validation = texts_of(tmp_path / "out")
    assert sorted(train + validation) == sorted(TEXTS)
    assert len(train) > len(validation) > 3
    order = {text: i for i, text in enumerate(TEXTS)}
    for side in (train, validation):
        assert side == sorted(side, key=order.get)
    assert sum(entry.tokens for entry in manifest.train) == sum(len(text) + 1 for text in train)
    assert sorted(files_of(tmp_path / "out")) == [
        "manifest.json", "train-00000-00000.bin", "validation-00000-00000.bin",
    ]  # fmt: skip


@pytest.mark.parametrize("storage", ["flat", "arrayrecord"])
def test_tokens_do_not_depend_on_shards_and_workers(corpus, tmp_path, many_parts, storage):
    expected = run(corpus, tmp_path / "one")
    sharded = run(corpus, tmp_path / "sharded", shard_tokens=100, format=storage)
    assert len(expected.train) == 3
    assert len(sharded.train) > 20
    for one, other in zip(
        sides(tmp_path / "one", "bytes"), sides(tmp_path / "sharded", "bytes"), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert expected.fingerprint != sharded.fingerprint


def test_workers_write_the_same_files(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(2):  # the large ones are a part each
        (folder / f"{i}.txt").write_text("x" * 2**25)
        (folder / f"{i}0.txt").write_text("y" * 1000)
    arguments = Arguments("files:corpus/*", "bytes", validation_fraction=0.9)
    progress = []
    one = prepare(arguments, tmp_path / "one", 1)
    two = prepare(arguments, tmp_path / "two", 2, lambda *now: progress.append(now))
    assert one == two
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert sum(tokens for tokens, _, _ in progress) == 2 * (2**25 + 1002)
    assert progress[-1][1:] == (3, 3)


def test_sources_give_the_same_documents(tmp_path):
    names = ["jsonl", "parquet", "hf"]
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(tmp_path / "x.jsonl", TEXTS)
    write_parquet(tmp_path / "x.parquet", TEXTS)
    for i in range(2):
        write_parquet(folder / f"train-{i}.parquet", TEXTS[30 * i : 30 * (i + 1)])
    sources = [f"jsonl:{tmp_path}/*.jsonl", f"parquet:{tmp_path}/*.parquet", f"hf:{folder}"]
    for name, source in zip(names, sources, strict=True):
        run(source, tmp_path / name)
        train, validation = texts_of(tmp_path / name)
        assert sorted(train + validation) == sorted(TEXTS)
        assert validation


def test_the_standard_library_is_what_load_loads(tmp_path):
    arguments = Arguments("stdlib", "char")
    prepare(arguments, tmp_path / "out")
    documents = split_documents(standard_library())
    for side, expected in zip(sides(tmp_path / "out", "char"), documents, strict=True):
        text = "".join(f"{document.text}\n" for document in expected if document.text)
        np.testing.assert_array_equal(side, make_tokenizer("char").encode(text))


def test_a_bpe_is_trained_on_the_text(corpus, tmp_path):
    manifest = run(corpus, tmp_path / "out", tokenizer="bpe:300")
    assert manifest.vocab_size == vocab_size(f"prepared:{tmp_path}/out", "prepared") == 300
    encoder = make_tokenizer(f"file:{tmp_path}/out/tokenizer.json")
    train, validation = sides(tmp_path / "out", "bpe:300")
    texts = encoder.decode(train).split("<|endoftext|>") + encoder.decode(validation).split(
        "<|endoftext|>"
    )
    assert sorted(filter(None, texts)) == sorted(TEXTS)
    assert len(train) < len("".join(TEXTS)) / 3
    again = run(corpus, tmp_path / "again", tokenizer="bpe:300")
    assert again == manifest


def test_a_tokenizer_file_stays_with_the_tokens(corpus, tmp_path):
    run(corpus, tmp_path / "bpe", tokenizer="bpe:300")
    name = f"file:{tmp_path}/bpe/tokenizer.json"
    manifest = run(corpus, tmp_path / "out", tokenizer=name)
    assert manifest.train == run(corpus, tmp_path / "bpe", tokenizer="bpe:300").train
    assert (tmp_path / "out/tokenizer.json").exists()
    assert vocab_size("stdlib", name) == 300
    # The manifest knows it where the file is not.
    (tmp_path / "bpe/tokenizer.json").unlink()
    assert vocab_size(f"prepared:{tmp_path}/out", name) == 300
    (tmp_path / "out/tokenizer.json").write_text("{}")
    assert main(["--verify", f"--out={tmp_path}/out"]) == 1


@pytest.fixture
def words(tmp_path):
    """The name of a tokenizer of words that knows no newline and no end of a document."""
    tokenizer = Tokenizer(models.WordLevel({"lorem": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[STOP]", "[PAD]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "words.json"))
    return "file:words.json"


def test_the_end_of_a_document_is_asked_for(corpus, tmp_path, words, capsys):
    flags = [f"--source={corpus}", f"--tokenizer={words}", "--out=out"]
    assert main(flags) == 2
    assert "name one with --end-of-document=TOKEN" in capsys.readouterr().err
    assert main([*flags, "--end-of-document=[EOS]"]) == 2
    assert "has no token '[EOS]': name another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--end-of-document=[STOP]"]) == 0
    assert "each document ends with '[STOP]'" in capsys.readouterr().out
    ids = np.concatenate(sides("out", words))
    assert sum(ids == 2) == len(TEXTS)
    assert sum(ids == 0) == sum(text.count("lorem") for text in TEXTS)
    # Truncated at 8 there would be fewer.
    assert len(ids) == sum(len(text.replace(":", " :").split()) + 1 for text in TEXTS)
    assert main([*flags, "--end-of-document=[PAD]"]) == 2
    assert "was begun with end_of_document='[STOP]', not '[PAD]'" in capsys.readouterr().err


def test_a_folder_from_before_an_argument_was_known_is_the_same(corpus, tmp_path):
    expected = run(corpus, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    fields = json.loads(path.read_text())
    for name in ("end_of_document", "strict"):
        del fields["arguments"][name]
    del fields["nulls"]
    path.write_text(json.dumps(fields))
    assert run(corpus, tmp_path / "out").train == expected.train


def test_interrupted_work_goes_on(corpus, tmp_path, many_parts, monkeypatch):
    expected = run(corpus, tmp_path / "whole")
    real, calls = preparation._prepare_part, []

    def failing(arguments, out, index, part, report):
        calls.append(index)
        if len(calls) == 2:
            (Path(out) / "train-00001-00000.bin").write_bytes(b"half")
            raise RuntimeError("killed")
        real(arguments, out, index, part, report)

    monkeypatch.setattr(preparation, "_prepare_part", failing)
    with pytest.raises(RuntimeError):
        run(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no manifest\.json in .*: give the --out folder of a"):
        load(f"prepared:{tmp_path}/out", "bytes")
    assert run(corpus, tmp_path / "out") == expected
    assert calls == [0, 1, 1, 2]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    # And what is finished is not done again.
    assert run(corpus, tmp_path / "out") == expected
    assert calls == [0, 1, 1, 2]


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * 2**22)
    arguments = Arguments("files:*.txt", "bytes", validation_fraction=0.5)
    command = [
        sys.executable, "-m", "mup_jax.data.prepare", "--source=files:*.txt", "--tokenizer=bytes",
        "--validation-fraction=0.5", "--workers=2", "--out=killed",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    while process.poll() is None and not list((tmp_path / "killed/parts").glob("*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/manifest.json").exists()
    process = subprocess.run(command, check=True, **pipes)
    assert "train with --config.data.source=prepared:killed" in process.stdout
    prepare(arguments, tmp_path / "whole")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_work_that_was_killed_at_its_beginning_or_end_goes_on(corpus, tmp_path):
    expected = run(corpus, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    (out / "prepare.json.partial").write_text("{")
    assert run(corpus, out) == expected
    (out / "parts").mkdir()
    (out / "prepare.json").write_text("{}")
    assert run(corpus, out) == expected
    assert files_of(out) == files_of(tmp_path / "whole")


def test_what_looks_like_a_special_token_is_text(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ["a<|endoftext|>b", *TEXTS])
    run("jsonl:x.jsonl", tmp_path / "out", tokenizer="bpe:300")
    ends = [int((side == 0).sum()) for side in sides(tmp_path / "out", "bpe:300")]
    assert sum(ends) == 1 + len(TEXTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "char"}, "was begun with tokenizer='bytes', not 'char': choose another"),
        ({"strict": True}, "was begun with strict=False, not True"),
        ({"shard_tokens": 7}, "was begun with shard_tokens=100000000, not 7"),
    ],
)
def test_another_text_in_the_same_folder_is_refused(corpus, tmp_path, changes, message):
    run(corpus, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(corpus, tmp_path / "out", **changes)


def test_a_folder_of_something_else_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="corpus is not empty: choose another --out"):
        run(corpus, tmp_path / "corpus")
    assert sorted(os.listdir(tmp_path / "corpus")) == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]


BAD_LINES = {
    "no.jsonl": ('{"text": "a"}\nx', r"no\.jsonl, line 2 is not JSON"),
    "list.jsonl": ("[]", r"list\.jsonl, line 1 is not a JSON object"),
    "column.jsonl": ('{"body": 1}', r"column\.jsonl, line 1 has no 'text': .* of body, or mend it"),
    "number.jsonl": ('{"text": 5}', r"number\.jsonl, line 1: 'text' is 5, not text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named(tmp_path, name):
    contents, message = BAD_LINES[name]
    (tmp_path / name).write_text(contents)
    with pytest.raises(ValueError, match=message):
        run(f"jsonl:{tmp_path}/*.jsonl", tmp_path / "out")


def test_blank_lines_are_none_and_half_surrogates_are_replaced(tmp_path):
    lines = ['{"text": "a\\ud800b"}', "", *(json.dumps({"text": text}) for text in TEXTS)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    run("jsonl:x.jsonl", tmp_path / "out")
    assert sorted(itertools.chain(*texts_of(tmp_path / "out"))) == sorted(["a?b", *TEXTS])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_lines_are_lines(tmp_path, suffix):
    # Written in two goes, as parallel compressors do.
    halves = []
    for texts in (TEXTS[:30], TEXTS[30:]):
        write_jsonl(tmp_path / f"half.jsonl{suffix}", texts)
        halves.append((tmp_path / f"half.jsonl{suffix}").read_bytes())
    (tmp_path / f"x.jsonl{suffix.upper()}").write_bytes(b"".join(halves))
    run("jsonl:x.*", tmp_path / "out")
    assert sorted(itertools.chain(*texts_of(tmp_path / "out"))) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_files_are_text(tmp_path, suffix):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    run(f"files:*{suffix}", tmp_path / "out")
    assert sorted(itertools.chain(*texts_of(tmp_path / "out"))) == sorted(TEXTS)


def write_nulls(folder):
    """Sources of the texts with five nulls among them, by the place of the first null."""
    texts = [None, *TEXTS[:30], None, None, *TEXTS[30:], None, None]
    write_jsonl(folder / "x.jsonl", texts)
    write_parquet(folder / "x.parquet", texts)
    (folder / "hub").mkdir()
    write_parquet(folder / "hub/train-0.parquet", texts)
    return {
        "x.jsonl, line 1": "jsonl:x.jsonl",
        "x.parquet, row 1": "parquet:x.parquet",
        f"{folder}/hub, part 0, row 1": f"hf:{folder}/hub",
    }


def test_nulls_are_left_out_and_counted(tmp_path, capsys):
    for i, source in enumerate(write_nulls(tmp_path).values()):
        flags = [f"--source={source}", "--tokenizer=bytes", f"--out={i}"]
        assert main([*flags, f"--validation-fraction={FRACTION}"]) == 0
        assert "records left out, as their 'text' is null: 5\n" in capsys.readouterr().out
        assert sorted(itertools.chain(*texts_of(i))) == sorted(TEXTS)
        assert manifest_lib.read_manifest(str(i)).nulls == 5


def test_nulls_are_counted_over_all_parts_and_train_no_encoding(tmp_path, many_parts):
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", [None, *TEXTS[20 * i : 20 * (i + 1)]])
    assert run("jsonl:*.jsonl", tmp_path / "out", tokenizer="bpe:300").nulls == 3


def test_strict_refuses_nulls(tmp_path, capsys):
    for i, (where, source) in enumerate(write_nulls(tmp_path).items()):
        flags = [f"--source={source}", "--tokenizer=bytes", f"--out={i}"]
        assert main([*flags, "--strict"]) == 2
        message = f"error: {where}: 'text' is null: mend or delete it, or choose another --out"
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_a_column_of_nulls_is_refused(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [None] * 9)
    with pytest.raises(ValueError, match=r"'text' of 9 records is null: choose another --column"):
        run("jsonl:x.jsonl", tmp_path / "out")


def test_empty_texts_are_no_documents(corpus, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ["", *TEXTS, ""])
    run("jsonl:x.jsonl", tmp_path / "out", strict=True)
    assert sorted(itertools.chain(*texts_of(tmp_path / "out"))) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda contents: contents[:-9], lambda contents: b"no" * 99])
def test_a_file_that_was_not_copied_whole_is_named(tmp_path, suffix, damage):
    name = f"x.jsonl{suffix}"
    write_jsonl(tmp_path / name, TEXTS)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    for kind in ("jsonl", "files"):
        with pytest.raises(ValueError, match=rf"x\.jsonl\{suffix} cannot be read to its end: \w"):
            run(f"{kind}:{name}", tmp_path / kind)


def test_damage_amid_compressed_lines_is_named(tmp_path):
    write_jsonl(tmp_path / "x.jsonl.gz", TEXTS)
    contents = bytearray((tmp_path / "x.jsonl.gz").read_bytes())
    contents[30:60] = bytes(30)
    (tmp_path / "x.jsonl.gz").write_bytes(contents)
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz cannot be read to its end: Error -3"):
        run("jsonl:x.jsonl.gz", tmp_path / "out")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_without_its_suffix_is_named(tmp_path, suffix):
    write_jsonl(tmp_path / f"x{suffix}", TEXTS)
    (tmp_path / f"x{suffix}").rename(tmp_path / "x.jsonl")
    message = r"x\.jsonl, line 1 is not UTF-8 .*; a compressed file needs a name in \.gz, \.bz2"
    with pytest.raises(ValueError, match=message):
        run("jsonl:x.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    ("suffix", "module", "message"),
    [
        (".zst", "pyarrow", r"the package pyarrow: pip install 'mup_jax\[data\]'"),
        (".xz", "lzma", "the module lzma, and this Python was built without it: use another"),
    ],
)
def test_what_decompresses_is_named(tmp_path, monkeypatch, suffix, module, message):
    write_jsonl(tmp_path / f"x.jsonl{suffix}", TEXTS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"decompressing x\.jsonl\{suffix} needs {message}"):
        run(f"jsonl:x.jsonl{suffix}", tmp_path / "out")


def test_byte_order_marks_and_carriage_returns_are_no_text(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\r\n" for text in TEXTS)
    (tmp_path / "x.jsonl").write_bytes(lines.encode("utf-8-sig"))
    run("jsonl:x.jsonl", tmp_path / "jsonl")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode("utf-8-sig"))
    run("files:*.txt", tmp_path / "files")
    for folder in ("jsonl", "files"):
        assert sorted(itertools.chain(*texts_of(tmp_path / folder))) == sorted(TEXTS)


@pytest.mark.parametrize("tokens", ["3", 10**9, 0, 1.5])
def test_numbers_of_a_manifest_are_checked(corpus, tmp_path, tokens):
    run(corpus, tmp_path / "out")
    entries = json.loads((tmp_path / "out/manifest.json").read_text())["train"]
    change_manifest(tmp_path / "out", train=[entries[0] | {"tokens": tokens}])
    with pytest.raises(ValueError, match=r"json is damaged \(train-00000-00000\.bin with"):
        load(f"prepared:{tmp_path}/out", "bytes")


def test_bad_tables_are_named(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no 'text': choose a --column of body"):
        run(f"parquet:{tmp_path}/a*", tmp_path / "out")
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        run(f"parquet:{tmp_path}/b*", tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=stdlib", "--tokenizer=words"], "unknown tokenizer 'words': choose one of"),
        (["--source=stdlib", "--tokenizer=bpe:10"], "'bpe:10': give a size of at least 257"),
        (["--source=web:x", "--tokenizer=char"], "unknown text source 'web:x': choose 'stdlib'"),
        (["--source=files:/nothing/*", "--tokenizer=char"], "no file matches '/nothing/*'"),
        (["--source=stdlib", "--tokenizer=file:/no"], "no tokenizer file /no"),
        (["--source=stdlib"], "--tokenizer is missing"),
        (
            ["--source=stdlib", "--tokenizer=bytes", "--end-of-document=x"],
            "end_of_document='x': only a tokenizer 'file:PATH' takes one",
        ),
        (["--source=stdlib", "--tokenizer=char", "--workers=0"], "workers=0: give at least one"),
        (["--source=stdlib", "--tokenizer=char", "--format=zip"], "format='zip': choose of flat"),
        (
            ["--source=stdlib", "--tokenizer=char", "--validation-fraction=1"],
            "validation_fraction=1.0: choose one within",
        ),
        (["--verify"], "no manifest.json in"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, capsys, flags, message):
    assert main([*flags, f"--out={tmp_path}/out"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert message in errors[-1]
    assert errors[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_verify(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    run(corpus, out)
    assert main(["--verify", f"--out={out}"]) == 0
    assert "2 files are as they were written" in capsys.readouterr().out
    contents = bytearray((out / "train-00000-00000.bin").read_bytes())
    contents[17] ^= 1
    (out / "train-00000-00000.bin").write_bytes(contents)
    assert main(["--verify", f"--out={out}"]) == 1
    assert "train-00000-00000.bin is damaged" in capsys.readouterr().err


def change_manifest(out, **changes):
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b.bin", ".hidden", ""])
def test_a_manifest_stays_within_its_folder(corpus, tmp_path, name):
    run(corpus, tmp_path / "out")
    change_manifest(tmp_path / "out", train=[{"file": name, "tokens": 1, "bytes": 2, "sha256": ""}])
    with pytest.raises(ValueError, match="which is not a file of its folder"):
        load(f"prepared:{tmp_path}/out", "bytes")


def test_links_out_of_the_folder_are_refused(corpus, tmp_path):
    run(corpus, tmp_path / "out")
    path = tmp_path / "out/train-00000-00000.bin"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load(f"prepared:{tmp_path}/out", "bytes")


def test_folders_that_cannot_be_read(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out)
    with pytest.raises(ValueError, match=r"not those of the tokenizer 'char': it is 'bytes'"):
        load(f"prepared:{out}", "char")
    assert load(f"prepared:{out}", "prepared").vocab_size == 256
    with (out / "train-00000-00000.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"has \d+ bytes, and \d+ were written: copy the folder"):
        load(f"prepared:{out}", "bytes")
    (out / "train-00000-00000.bin").unlink()
    with pytest.raises(ValueError, match="is missing"):
        load(f"prepared:{out}", "bytes")
    change_manifest(out, version=2)
    with pytest.raises(ValueError, match="has version 2, and 1 can be read"):
        load(f"prepared:{out}", "bytes")
    (out / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        load(f"prepared:{out}", "bytes")


def test_from_a_bucket(corpus, tmp_path):
    run(corpus, tmp_path / "out", shard_tokens=100)
    bucket = fsspec.filesystem("memory")
    bucket.put(f"{tmp_path}/out", "/bucket/tokens", recursive=True)
    local, remote = (
        load(source, "bytes") for source in (f"prepared:{tmp_path}/out", "prepared:memory://bucket/tokens")
    )  # fmt: skip
    assert remote.fingerprint == local.fingerprint
    starts = np.arange(0, len(local.train) - 250, 30)
    np.testing.assert_array_equal(remote.train.gather(starts, 250), local.train.gather(starts, 250))
    assert main(["--verify", "--out=memory://bucket/tokens"]) == 0
    run(corpus, tmp_path / "records", format="arrayrecord")
    bucket.put(f"{tmp_path}/records", "/bucket/records", recursive=True)
    with pytest.raises(ValueError, match="ArrayRecord files are read from disks alone"):
        load("prepared:memory://bucket/records", "bytes")
