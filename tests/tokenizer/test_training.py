import pytest

from bluejay.errors import ConfigError
from bluejay.tokenizer import train_bpe


def test_the_vocabulary_does_not_depend_on_the_order_of_texts(corpus: list[str]) -> None:
    forward, backward = train_bpe(corpus, 280), train_bpe(iter(corpus[::-1]), 280)
    assert [forward.token_text(i) for i in range(280)] == [backward.token_text(i) for i in range(280)]
    text = "The little bird sang in the tall tree."
    assert forward.encode(text) == backward.encode(text)


def test_ids_are_special_tokens_then_bytes_then_merges(corpus: list[str]) -> None:
    tokenizer = train_bpe(corpus, 280, special_tokens=("<|end|>", "<|pad|>"))
    assert [tokenizer.token_text(i) for i in range(2)] == ["<|end|>", "<|pad|>"]
    assert sorted(tokenizer.token_bytes(i)[0] for i in range(2, 258)) == list(range(256))
    assert all(len(tokenizer.token_bytes(i)) > 1 for i in range(258, 280))
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.vocab_size == 280
    assert tokenizer.known_ids == tuple(range(280))


def test_frequent_words_become_one_token(corpus: list[str]) -> None:
    assert len(train_bpe(corpus, 400).encode(" bird")) == 1


def test_text_never_seen_can_be_encoded() -> None:
    tokenizer = train_bpe(["a"], 257)
    assert tokenizer.decode(tokenizer.encode("Ωmega 🎉\x00")) == "Ωmega 🎉\x00"


def test_a_small_corpus_gives_fewer_tokens() -> None:
    assert train_bpe(["ab ab"], 1000).vocab_size == 258


def test_without_special_tokens(corpus: list[str]) -> None:
    tokenizer = train_bpe(corpus, 256, special_tokens=())
    assert tokenizer.eos_token_id is None
    assert tokenizer.vocab_size == 256


def test_a_vocabulary_without_room_for_the_bytes_is_refused(corpus: list[str]) -> None:
    with pytest.raises(ConfigError, match="vocab_size is 256; 256 bytes and 1 special tokens need 257"):
        train_bpe(corpus, 256)
