import json
from itertools import islice

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mup_jax.data import (
    Document,
    fingerprint,
    load,
    make_tokenizer,
    tokenize,
    training_batches,
    validation_batches,
)

CONTEXT = 8
WINDOWS = 21
# The real text ends three tokens after the last window; every token tells its own position.
TOKENS = np.arange(WINDOWS * CONTEXT + 1 + 3, dtype=np.uint16)


def batches(count=None, *, tokens=TOKENS, batch_size=4, seed=0, **processes):
    dataset = training_batches(
        tokens, context=CONTEXT, batch_size=batch_size, seed=seed, **processes
    )
    return iter(dataset) if count is None else list(islice(dataset, count))


def starts(taken):
    return [int(row[0]) for batch in taken for row in batch["inputs"]]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        np.testing.assert_array_equal(a["targets"], b["targets"])


def test_load():
    tokens = load("stdlib", "char")
    assert tokens.vocab_size == 96
    assert tokens.train.dtype == tokens.validation.dtype == np.uint16
    assert len(tokens.train) > 10 * len(tokens.validation) > 10 * 50_000
    assert max(tokens.train.max(), tokens.validation.max()) < 96
    assert tokens.fingerprint == load("stdlib", "char").fingerprint


def test_unknown_source():
    with pytest.raises(ValueError, match="unknown text source 'web': choose 'stdlib', 'files:"):
        load("web", "char")


def test_text_files(tmp_path):
    (tmp_path / "deep").mkdir()
    texts = {f"{folder}{i}.txt": f"text {i} of {folder}\tæ\n" for folder in ("", "deep/")
             for i in range(40)}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "other.md").write_text("not this")
    tokens = load(f"files:{tmp_path}/**/*.txt", "char")
    decoded = [make_tokenizer("char").decode(side) for side in (tokens.train, tokens.validation)]
    expected = sorted(text.replace("æ", "").expandtabs(8) for text in texts.values())
    assert sorted(line + "\n" for side in decoded for line in side.split("\n") if line) == expected
    assert len(tokens.validation) < len(tokens.train)


@pytest.mark.parametrize("source", ["files:", "files", "stdlib:x", "prepared:", "bin:one"])
def test_incomplete_sources(source):
    with pytest.raises(ValueError, match="choose 'stdlib', 'files:PATTERN'"):
        load(source, "char")


def test_no_such_files(tmp_path):
    with pytest.raises(ValueError, match=r"no file matches .*nothing\*': give the path"):
        load(f"files:{tmp_path}/nothing*", "char")


def test_tokenize_joins_documents_by_newlines():
    tokenizer = make_tokenizer("char")
    ids = tokenize([Document("a", "one"), Document("b", "two")], tokenizer)
    assert tokenizer.decode(ids) == "one\ntwo"


def test_fingerprint():
    # printf '\001\000\002\000' | sha256sum
    assert fingerprint(np.array([1, 2], np.uint16)) == "7b11c1133330cd16"
    assert fingerprint(TOKENS) == fingerprint(TOKENS.copy()) != fingerprint(TOKENS[1:])


def test_windows_are_contiguous_text_with_the_next_token_as_target():
    for batch in batches(WINDOWS):
        inputs, targets = batch["inputs"], batch["targets"]
        assert inputs.dtype == targets.dtype == np.int32
        assert inputs.shape == targets.shape == (4, CONTEXT)
        assert not (inputs[:, 0] % CONTEXT).any()
        np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(CONTEXT))
        # This includes the last target, which is the real next token.
        np.testing.assert_array_equal(targets, inputs + 1)


def test_each_epoch_sees_each_window_once_in_another_order():
    # 21 batches of 4 are four epochs of 21 windows, and batches straddle the epochs' ends.
    epochs = np.reshape(starts(batches(WINDOWS)), (4, WINDOWS))
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(WINDOWS) * CONTEXT, (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_only():
    assert_same(batches(30, seed=7), batches(30, seed=7))
    orders = {tuple(starts(batches(30, seed=seed))) for seed in range(10)}
    assert len(orders) == 10
    other_text = starts(batches(30, tokens=TOKENS + 1000))
    assert other_text == [start + 1000 for start in starts(batches(30))]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_divide_the_global_batch_by_contiguous_rows(process_count):
    parts = [
        batches(WINDOWS, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in row]) for name in ("inputs", "targets")}
        for row in zip(*parts, strict=True)
    ]
    assert_same(joined, batches(WINDOWS))


def test_resumes_exactly_in_mid_epoch():
    whole = batches(40)
    iterator = batches()
    assert_same(list(islice(iterator, 8)), whole[:8])
    state = iterator.get_state()
    assert len(json.dumps(state)) < 100
    resumed = batches()
    resumed.set_state(state)
    assert_same(list(islice(resumed, 32)), whole[8:])


def test_state_does_not_depend_on_the_number_of_processes():
    alone = batches()
    shared = batches(process_index=1, process_count=2)
    for iterator in (alone, shared):
        list(islice(iterator, 5))
    assert alone.get_state() == shared.get_state()


def test_resumes_exactly_from_an_orbax_checkpoint(tmp_path):
    whole = batches(20)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        iterator = batches()
        list(islice(iterator, 7))
        checkpointer.save_checkpointables(7, {"data": iterator})
        assert_same([next(iterator)], whole[7:8])
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.load_checkpointables(7, {"data": batches()})["data"]
        assert_same(list(islice(restored, 13)), whole[7:])


def test_validation_batches_are_all_the_full_ones():
    stacked = validation_batches(TOKENS, context=CONTEXT, batch_size=4)
    assert stacked["inputs"].shape == stacked["targets"].shape == (5, 4, CONTEXT)
    assert stacked["inputs"].dtype == np.int32
    np.testing.assert_array_equal(stacked["targets"], stacked["inputs"] + 1)
    first = stacked["inputs"][..., 0].ravel()
    assert len(set(first)) == 20
    assert not (first % CONTEXT).any()


def test_fewer_validation_batches_still_spread_over_all_tokens():
    stacked = validation_batches(TOKENS, context=CONTEXT, batch_size=2, max_batches=3)
    gaps = np.diff(stacked["inputs"][..., 0].ravel()) // CONTEXT
    assert stacked["inputs"].shape == (3, 2, CONTEXT)
    assert set(gaps) == {3, 4}


@pytest.mark.parametrize(("batch_size", "max_batches"), [(22, None), (4, 0), (0, None)])
def test_no_validation_batch(batch_size, max_batches):
    with pytest.raises(ValueError, match="no validation batch: 21 windows of 8 tokens"):
        validation_batches(TOKENS, context=CONTEXT, batch_size=batch_size, max_batches=max_batches)


@pytest.mark.parametrize(
    "make", [batches, lambda **kw: validation_batches(kw["tokens"], context=CONTEXT, batch_size=1)]
)
def test_text_shorter_than_a_window(make):
    with pytest.raises(ValueError, match=r"8 tokens are fewer than one window of .* = 9"):
        make(tokens=TOKENS[:8])
    make(tokens=TOKENS[:9])


def test_context_must_be_positive():
    with pytest.raises(ValueError, match="context=0"):
        training_batches(TOKENS, context=0, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 is not a positive multiple"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2 is not in \[0, 2\)"),
    ],
)
def test_batches_that_cannot_be_divided(arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(1, **arguments)
