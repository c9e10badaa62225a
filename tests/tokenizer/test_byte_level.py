import json
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from bluejay.errors import CheckpointError, InvalidRequest
from bluejay.tokenizer import Tokenizer, load_tokenizer, train_bpe
from bluejay.tokenizer.byte_level import BYTE_OF_SYMBOL, byte_level_backend

# By transformers 4.56.2: GPT2TokenizerFast and GPT2Tokenizer agree on them.
GPT2_IDS = {
    "": [],
    "Hello world": [15496, 995],
    "When I visit Bath I will": [2215, 314, 3187, 24967, 314, 481],
    " the  two   spaces\n\n\ttab ": [262, 220, 734, 220, 220, 9029, 628, 197, 8658, 220],
    "it's we'll I'D": [270, 338, 356, 1183, 314, 6, 35],
    "naïve café 日本語 😀👍🏽": [
        *[2616, 38776, 40304, 10545, 245, 98, 17312, 105, 45739],
        *[252, 30325, 222, 41840, 235, 8582, 237, 121],
    ],
    "a<|endoftext|>b <|endoftext|> c": [64, 50256, 65, 220, 50256, 269],
    "2021-10-05 3.14 ½": [1238, 2481, 12, 940, 12, 2713, 513, 13, 1415, 25208],
    "\x00\x7f\u00a0\u3000x": [188, 221, 1849, 5099, 222, 87],
}
# One of each kind that the word split tells apart, and several that share bytes.
LETTERS, NUMBERS, SPACES, OTHERS = (
    "abcdehilorstvIDéßŁжאع日本語",
    "0123456789٣½²",
    " \t\n\u00a0\u3000",
    ".,!?'-_’“\x00😀👍🏽",
)
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def split_words(text: str) -> list[str]:
    """GPT-2's pattern by hand: 's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"""

    def kind(place: int) -> str:
        symbol = text[place]
        return "L" if symbol in LETTERS else "N" if symbol in NUMBERS else "S" if symbol in SPACES else "O"

    words, start = [], 0
    while start < len(text):
        contraction = next((end for end in CONTRACTIONS if text.startswith(end, start)), None)
        first = start + (text[start] == " " and start + 1 < len(text) and kind(start + 1) != "S")
        stop = first
        while stop < len(text) and kind(stop) == kind(first):
            stop += 1
        if contraction:
            stop = start + len(contraction)
        elif kind(first) == "S" and stop < len(text) and stop - start > 1:
            stop -= 1  # the last space belongs to the word that follows
        words.append(text[start:stop])
        start = stop
    return words


def slow_bpe(word: str, ids: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Merge the pair of the lowest rank, all its places from left to right, until no pair has a rank."""
    symbol_of_byte = {byte: symbol for symbol, byte in BYTE_OF_SYMBOL.items()}
    parts = [symbol_of_byte[byte] for byte in word.encode()]
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        merged: list[str] = []
        place = 0
        while place < len(parts):
            if tuple(parts[place : place + 2]) == best:
                merged.append("".join(best))
                place += 2
            else:
                merged.append(parts[place])
                place += 1
        parts = merged
    return [ids[part] for part in parts]


@pytest.fixture(scope="module")
def gpt2_tables(gpt2_files: Path) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    lines = (gpt2_files / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    ranks = {(line.split(" ")[0], line.split(" ")[1]): rank for rank, line in enumerate(lines)}
    return json.loads((gpt2_files / "encoder.json").read_text(encoding="utf-8")), ranks


@pytest.mark.parametrize("text", GPT2_IDS)
def test_gpt2_ids(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.encode(text) == GPT2_IDS[text]
    assert gpt2.decode(GPT2_IDS[text]) == text


@given(text=st.text(st.sampled_from(LETTERS + NUMBERS + SPACES + OTHERS + " '" * 5), max_size=60))
def test_encode_equals_the_definition(
    gpt2: Tokenizer, gpt2_tables: tuple[dict[str, int], dict[tuple[str, str], int]], text: str
) -> None:
    ids, ranks = gpt2_tables
    assert gpt2.encode(text) == [i for word in split_words(text) for i in slow_bpe(word, ids, ranks)]


@given(text=st.text())
def test_decode_of_encode_is_the_text(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert b"".join(map(small.token_bytes, ids)) == text.encode()


@given(ids=st.lists(st.integers(0, 290), max_size=40))
def test_decode_equals_the_library(small: Tokenizer, ids: list[int]) -> None:
    assert small.decode(ids) == small._backend.decode(ids, skip_special_tokens=False)
    assert small.decode(ids, skip_special_tokens=True) == small._backend.decode(ids, skip_special_tokens=True)


def test_encode_batch_equals_one_by_one(small: Tokenizer) -> None:
    texts = ["The bird sang.", "", "a tree", "木"]
    assert small.encode_batch(texts) == [small.encode(text) for text in texts]
    assert small.encode_batch([]) == []


def test_every_byte_has_one_symbol() -> None:
    assert sorted(BYTE_OF_SYMBOL.values()) == list(range(256))
    assert BYTE_OF_SYMBOL["Ġ"] == ord(" ")
    assert BYTE_OF_SYMBOL["Ċ"] == ord("\n")


def test_tokens_of_gpt2(gpt2: Tokenizer) -> None:
    assert gpt2.token_text(995) == "Ġworld"
    assert gpt2.token_bytes(995) == b" world"
    assert gpt2.token_bytes(222) == b"\x80"
    assert gpt2.vocab_size == 50257
    assert gpt2.known_ids == tuple(range(50257))
    assert (gpt2.eos_token, gpt2.eos_token_id) == ("<|endoftext|>", 50256)
    assert gpt2.is_special(50256)
    assert not gpt2.is_special(995)


@pytest.mark.parametrize("token_id", [-1, 280, 2**32, 2**70])
def test_an_id_without_a_token_decodes_to_nothing(small: Tokenizer, token_id: int) -> None:
    assert small.token_text(token_id) is None
    assert small.token_bytes(token_id) == b""
    assert small.decode([token_id]) == ""


def test_a_lone_surrogate_is_refused_with_its_place(small: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"U\+D83D at character 2"):
        small.encode("ab\ud83d")


def test_one_mebibyte_of_one_letter_is_encoded(gpt2: Tokenizer) -> None:
    # The worst case of a naive BPE, which takes time squared: hours. Here about 0.7 s on one core.
    ids = gpt2.encode("a" * 2**20)
    assert gpt2.decode(ids) == "a" * 2**20


def test_save_and_load_give_the_same_tokenizer(small: Tokenizer, tmp_path: Path) -> None:
    names = {path.name for path in small.save(tmp_path / "new" / "place")}
    assert names == {p.name for p in (tmp_path / "new" / "place").iterdir()}
    assert names >= {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    again = load_tokenizer(tmp_path / "new" / "place")
    text = "The bird sang 木<|endoftext|> the tree"
    assert again.encode(text) == small.encode(text)
    assert again.known_ids == small.known_ids
    assert again.eos_token_id == small.eos_token_id


def test_the_fingerprint_tells_tokenizers_apart(small: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    small.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == small.fingerprint()
    assert train_bpe(corpus, 279).fingerprint() != small.fingerprint()


def test_saved_vocabulary_and_merges_suffice(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    text = "The bird sang 木<|endoftext|> the tree"
    assert load_tokenizer(tmp_path).encode(text) == small.encode(text)


def test_saved_added_tokens_keep_their_ids(small: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(small._backend.to_str())
    backend.add_tokens(["<|one|>", "<|two|>"])
    Tokenizer(backend).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again = load_tokenizer(tmp_path)
    assert again.encode("bird<|two|>") == [*small.encode("bird"), 281]
    assert again.token_bytes(280) == b"<|one|>"


def test_an_added_token_stands_for_its_own_text(small: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(small._backend.to_str())
    backend.add_tokens(["two words", "木 "])
    assert Tokenizer(backend).decode([280, 281]) == backend.decode([280, 281]) == "two words木 "


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(CheckpointError, match="WordLevel with decoder NoneType"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    backend = byte_level_backend(models.BPE())
    backend.decoder = decoders.Metaspace()
    with pytest.raises(CheckpointError, match="decoder Metaspace"):
        Tokenizer(backend)


def test_an_unknown_end_of_text_token_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'<\|end\|>' is not in"):
        Tokenizer(byte_level_backend(models.BPE()), eos_token="<|end|>")
    assert Tokenizer(byte_level_backend(models.BPE()), eos_token=None).vocab_size == 0
