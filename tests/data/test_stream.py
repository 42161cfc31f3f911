import os
import resource
from itertools import islice, pairwise
from pathlib import Path

import fsspec
import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mup_jax.data import TokenStream, load, training_batches, validation_batches
from mup_jax.data.stream import Shard

CONTEXT = 8
TOKENS = np.arange(21 * CONTEXT + 4, dtype=np.uint16)
CUTS = [0, 5, 5, 60, 61, 150, len(TOKENS)]


def stream_of(folder, tokens=TOKENS, vocab_size=1000):
    """The tokens in files that are shorter and longer than a window, and empty."""
    shards = []
    for i, (first, last) in enumerate(pairwise(CUTS)):
        path = Path(str(folder), f"{i}.bin")
        path.write_bytes(tokens[first:last].astype("<u2").tobytes())
        shards.append(Shard(str(path), last - first))
    return TokenStream(shards, vocab_size)


def in_bucket(folder):
    bucket = fsspec.filesystem("memory")
    bucket.put(f"{folder}/", "/streams/", recursive=True)
    shards = [Shard(f"memory://streams/{i}.bin", b - a) for i, (a, b) in enumerate(pairwise(CUTS))]
    return TokenStream(shards, 1000)


@pytest.fixture(params=["local", "bucket"])
def stream(request, tmp_path):
    local = stream_of(tmp_path)
    return local if request.param == "local" else in_bucket(tmp_path)


def assert_same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        for key in ("inputs", "targets"):
            assert a[key].dtype == b[key].dtype == np.int32
            np.testing.assert_array_equal(a[key], b[key])


def test_windows_across_files(stream):
    assert len(stream) == len(TOKENS)
    assert stream.dtype == np.uint16
    starts = np.arange(len(TOKENS) - 99)
    expected = np.stack([TOKENS[start : start + 99] for start in starts])
    np.testing.assert_array_equal(stream.gather(starts, 99), expected)
    np.testing.assert_array_equal(stream.gather([3], 1), [[3]])


@pytest.mark.parametrize("processes", [{}, {"process_index": 1, "process_count": 2}])
def test_batches_are_those_of_an_array(stream, processes):
    options = {"context": CONTEXT, "batch_size": 4, "seed": 3, **processes}
    batches = [islice(training_batches(tokens, **options), 12) for tokens in (stream, TOKENS)]
    assert_same(*batches)
    one, other = (validation_batches(t, context=CONTEXT, batch_size=4) for t in (stream, TOKENS))
    assert_same([one], [other])


def test_resuming_on_another_number_of_processes(stream, tmp_path):
    options = {"context": CONTEXT, "batch_size": 4, "seed": 3}
    expected = list(islice(training_batches(TOKENS, **options), 12))
    batches = iter(training_batches(stream, **options))
    assert_same(islice(batches, 5), expected[:5])
    state = batches.get_state()
    assert state == {"next_index": 5}
    parts = [
        iter(training_batches(stream, **options, process_index=i, process_count=2)) for i in (0, 1)
    ]
    for part in parts:
        part.set_state(state)
    for batch in expected[5:]:
        halves = [next(part) for part in parts]
        assert_same(
            [{key: np.concatenate([half[key] for half in halves]) for key in batch}], [batch]
        )
    # Orbax and Grain agree on it.
    ocp.save(tmp_path / "position", parts[0].get_state())
    assert ocp.load(tmp_path / "position") == {"next_index": 12}
    assert isinstance(batches, grain.DatasetIterator)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    stream = stream_of(tmp_path, vocab_size=100)
    stream.gather([0], 100)
    with pytest.raises(ValueError, match=r"token id 100 is not in \[0, 100\)"):
        stream.gather([0], 101)


@pytest.mark.parametrize("starts", [[-1], [len(TOKENS) - 7]])
def test_windows_outside_are_refused(stream, starts):
    with pytest.raises(IndexError, match="windows of 8 tokens at"):
        stream.gather(starts, 8)


def test_many_files_are_not_open_at_once(tmp_path):
    shards = []
    for i in range(40):
        (tmp_path / f"{i}.bin").write_bytes(np.array([i, i], "<u2").tobytes())
        shards.append(Shard(str(tmp_path / f"{i}.bin"), 2))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mup_jax.data.stream._OPEN_FILES", 8)
            stream = TokenStream(shards, 1000)
            np.testing.assert_array_equal(stream.gather([0], 80)[0], np.arange(40).repeat(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def header(magic, version, tokens):
    return np.array([magic, version, tokens, *[0] * 253], "<i4").tobytes()


def write_llm_c(path, tokens, magic=20240520, version=1, dtype="<u2"):
    path.write_bytes(header(magic, version, len(tokens)) + tokens.astype(dtype).tobytes())


@pytest.mark.parametrize("kind", ["llm.c", "llm.c of 32 bits", "nanoGPT"])
def test_files_of_others(tmp_path, kind):
    for name, tokens in {
        "train_0": TOKENS[:70], "train_1": TOKENS[70:], "val_0": TOKENS[:30]
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.bin"
        if kind == "nanoGPT":
            path.write_bytes(tokens.astype("<u2").tobytes())
        elif kind == "llm.c":
            write_llm_c(path, tokens)
        else:
            write_llm_c(path, tokens, 20240801, 7, "<u4")
    tokens = load(f"bin:{tmp_path}/train*.bin,{tmp_path}/val*.bin", "gpt2")
    assert tokens.vocab_size == 50257
    assert (len(tokens.train), len(tokens.validation)) == (len(TOKENS), 30)
    assert tokens.train.dtype == (np.uint32 if "32" in kind else np.uint16)
    np.testing.assert_array_equal(tokens.train.gather([0], len(TOKENS))[0], TOKENS)
    np.testing.assert_array_equal(tokens.validation.gather([0], 30)[0], TOKENS[:30])
    assert tokens.fingerprint == load(
        f"bin:{tmp_path}/train*.bin,{tmp_path}/val*.bin", "gpt2"
    ).fingerprint  # fmt: skip


def test_files_that_were_not_copied_whole(tmp_path):
    write_llm_c(tmp_path / "a.bin", TOKENS)
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"by its header \d+: it was not copied whole"):
        load(f"bin:{tmp_path}/a.bin,{tmp_path}/a.bin", "gpt2")
    (tmp_path / "b.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="has 3 bytes, an odd number"):
        load(f"bin:{tmp_path}/b.bin,{tmp_path}/b.bin", "gpt2")
    write_llm_c(tmp_path / "a.bin", TOKENS)
    write_llm_c(tmp_path / "d.bin", TOKENS, version=2)
    with pytest.raises(ValueError, match=r"d\.bin is a file of llm\.c of version 2"):
        load(f"bin:{tmp_path}/d.bin,{tmp_path}/d.bin", "gpt2")
    write_llm_c(tmp_path / "c.bin", TOKENS, 20240801, 7, "<u4")
    with pytest.raises(ValueError, match="matches files of 16 and of 32 bits"):
        load(f"bin:{tmp_path}/[ac].bin,{tmp_path}/a.bin", "gpt2")
