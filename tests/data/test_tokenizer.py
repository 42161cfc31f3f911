import subprocess
import sys
import types

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mup_jax.data import make_tokenizer
from mup_jax.data.tokenizer import vocab_size_of
from mup_jax.data.tokens import token_dtype

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))


@pytest.fixture
def tokenizer():
    return make_tokenizer("char")


def test_vocabulary_is_newline_and_printable_ascii(tokenizer):
    assert tokenizer.name == "char"
    assert tokenizer.vocab_size == 96
    ids = tokenizer.encode(PRINTABLE)
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, np.arange(96))


@pytest.mark.parametrize("seed", range(20))
def test_round_trip(tokenizer, seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list(PRINTABLE), size=rng.integers(0, 500)))
    ids = tokenizer.encode(text)
    assert ids.shape == (len(text),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.astype(np.int32)) == text


@pytest.mark.parametrize("character", ["\t", "\r", "\x00", "\x7f", "é", "\u2028", "🙂"])
def test_unknown_character_is_named(tokenizer, character):
    with pytest.raises(ValueError, match="at position 2") as error:
        tokenizer.encode("ab" + character + "cd")
    assert repr(character) in str(error.value)


@pytest.mark.parametrize("token_id", [-1, 96])
def test_unknown_id_is_named(tokenizer, token_id):
    with pytest.raises(ValueError, match=f"token id {token_id} is not in"):
        tokenizer.decode(np.array([0, token_id]))


def test_unknown_tokenizer_is_named():
    with pytest.raises(ValueError, match="unknown tokenizer 'bpe': choose one of 'char'"):
        make_tokenizer("bpe")


def test_bytes():
    tokenizer = make_tokenizer("bytes")
    text = "a\næ🙂\0"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == list(text.encode())
    with pytest.raises(ValueError, match=r"token id 256 is not in \[0, 256\)"):
        tokenizer.decode(np.array([256]))


@pytest.mark.parametrize(
    ("name", "size"), [("char", 96), ("bytes", 256), ("gpt2", 50257), ("bpe:4000", 4000)]
)
def test_sizes_are_known_without_loading(name, size, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert vocab_size_of(name) == size


@pytest.mark.parametrize("size", [1, 2**16, 2**16 + 1])
def test_dtypes_hold_the_largest_id(size):
    dtype = token_dtype(size)
    assert np.iinfo(dtype).max >= size - 1
    assert dtype.itemsize == (2 if size <= 2**16 else 4)


def fake_tiktoken(get_encoding):
    return types.SimpleNamespace(get_encoding=get_encoding)


def test_gpt2(monkeypatch):
    letters = types.SimpleNamespace(
        encode_ordinary=lambda text: [ord(c) for c in text],
        decode=lambda ids: "".join(map(chr, ids)),
    )
    monkeypatch.setitem(sys.modules, "tiktoken", fake_tiktoken({"gpt2": letters}.get))
    tokenizer = make_tokenizer("gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    ids = tokenizer.encode("abc")
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == "abc"


def test_gpt2_without_a_network(monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "tiktoken", fake_tiktoken(get_encoding))
    with pytest.raises(ValueError, match=r"set TIKTOKEN_CACHE_DIR .* or use the tokenizer 'file:"):
        make_tokenizer("gpt2")


@pytest.mark.parametrize(("name", "package"), [("gpt2", "tiktoken"), ("file:x", "tokenizers")])
def test_missing_packages(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'mup_jax\[da"):
        make_tokenizer(name)


def test_a_file_that_is_not_a_tokenizer(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a tokenizer\.json"):
        make_tokenizer(f"file:{tmp_path}/x.json")


def write_tokenizer(path, special_tokens=(), model=None, tokens=(), change=lambda tokenizer: None):
    """A tokenizer.json of the letters a and b and a newline, unless another model is given."""
    tokenizer = Tokenizer(model or models.BPE({"a": 0, "b": 1, "\n": 2, "ab": 3}, [("a", "b")]))
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(list(special_tokens))
    change(tokenizer)
    tokenizer.save(str(path))
    return make_tokenizer(f"file:{path}")


def enable_truncation(tokenizer):
    tokenizer.enable_truncation(8)


def enable_padding(tokenizer):
    tokenizer.enable_padding(pad_id=2, length=5000)


def enable_dropout(tokenizer):
    tokenizer.model.dropout = 0.5


@pytest.mark.parametrize("change", [enable_truncation, enable_padding, enable_dropout])
def test_a_file_encodes_every_text_whole(tmp_path, change):
    tokenizer = write_tokenizer(tmp_path / "x.json", change=change)
    assert tokenizer.encode("ab" * 1000).tolist() == [3] * 1000


@pytest.mark.parametrize(
    ("special_tokens", "end"),
    [
        (["<|endoftext|>"], "<|endoftext|>"),
        (["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"], "<|end_of_text|>"),  # Llama 3
        (["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<eos>"),  # Gemma
        (["<unk>", "<s>", "</s>"], "</s>"),
        (["[BOS]", "[EOS]", "[SEP]"], "[EOS]"),
        (["[CLS]", "[SEP]", "[MASK]"], "[SEP]"),  # BERT
        (["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], "<｜end▁of▁sentence｜>"),  # DeepSeek
        (["<|im_start|>", "<|im_end|>"], "<|im_end|>"),  # ChatML
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|endoftext|>"),  # Qwen
        (["<|im_start|>", "<|im_end|>", "</s>"], "</s>"),
        (["[PAD]"], "\n"),
    ],
)
def test_a_document_ends_with_the_own_token_of_a_file(tmp_path, special_tokens, end):
    tokenizer = write_tokenizer(tmp_path / "x.json", special_tokens)
    assert tokenizer.end_of_text == tokenizer.id_of(end)


def test_a_tag_of_html_ends_no_document(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "x.json", ["<eos>"], tokens=["<s>", "</s>"])
    assert tokenizer.end_of_text == tokenizer.id_of("<eos>")


def unknown_characters_have_an_id():
    return models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")


def newline_is_two_tokens():
    return models.BPE({"a": 0, "▁": 1, "<0x0A>": 2}, [], byte_fallback=True)


def whitespace_is_left_out(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def begins_with_a_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (None, whitespace_is_left_out),
        (unknown_characters_have_an_id, lambda tokenizer: None),
        (newline_is_two_tokens, begins_with_a_space),
    ],
)
def test_a_file_without_an_end_of_document(tmp_path, model, change):
    tokenizer = write_tokenizer(tmp_path / "x.json", model=model and model(), change=change)
    with pytest.raises(
        ValueError, match=r"x\.json' has no .* name one with --end-of-document=TOKEN"
    ):
        _ = tokenizer.end_of_text
    assert tokenizer.encode("a").tolist()[-1] == 0
    assert tokenizer.id_of("a") == 0
    with pytest.raises(ValueError, match=r"x\.json' has no token 'c': name another"):
        tokenizer.id_of("c")


def test_importing_loads_no_library_of_tokens():
    code = (
        "import sys, mup_jax.data; "
        "print({'tokenizers', 'tiktoken', 'pyarrow', 'datasets'} & {*sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout == "set()\n"
