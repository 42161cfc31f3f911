import numpy as np
import pytest

from mup_jax.data import make_tokenizer

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
    with pytest.raises(ValueError, match=r"unknown tokenizer 'bpe': choose one of \['char'\]"):
        make_tokenizer("bpe")
