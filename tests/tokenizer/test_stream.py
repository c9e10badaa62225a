import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bluejay.tokenizer import TextStream, Tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = False) -> list[str]:
    stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*(stream.push(i) for i in ids), stream.finish()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte, as a model that spells a character out emits them."""
    of_byte = {tokenizer.token_bytes(i): i for i in tokenizer.known_ids}
    return [of_byte[bytes([byte])] for byte in data]


@given(ids=st.lists(st.integers(0, 290), max_size=60))
def test_pieces_of_any_ids_join_to_decode(small: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(small, ids)) == small.decode(ids)
    assert "".join(pieces_of(small, ids, skip_special_tokens=True)) == small.decode(ids, skip_special_tokens=True)


@given(data=st.one_of(st.binary(max_size=40), st.text("é日😀👍🏽a\u200d", max_size=12).map(str.encode)))
@example(data=b"\xf0\x9f\x98")  # half an emoji
@example(data=b"\xe6\x97A\xe6\x97\xa5")  # a character broken off, then a whole one
@example(data=b"\xed\xa0\x80\xc0\xaf\xf5\xff")  # a surrogate, an over-long form, bytes that UTF-8 never has
def test_pieces_of_any_bytes_join_to_decode(small: Tokenizer, data: bytes) -> None:
    assert "".join(pieces_of(small, byte_ids(small, data))) == data.decode("utf-8", errors="replace")


@given(text=st.text("é日本😀👍🏽ab", max_size=20))
def test_valid_text_never_shows_half_a_character(small: Tokenizer, text: str) -> None:
    pieces = pieces_of(small, byte_ids(small, text.encode()))
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)


@pytest.mark.parametrize("text", ["naïve 日本語 😀👍🏽", "The end<|endoftext|>"])
def test_gpt2_pieces(gpt2: Tokenizer, text: str) -> None:
    pieces = pieces_of(gpt2, gpt2.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_character_is_held_back_until_it_is_whole(small: Tokenizer) -> None:
    stream = TextStream(small)
    assert [stream.push(i) for i in byte_ids(small, "😀!".encode())] == ["", "", "", "😀", "!"]


def test_finish_ends_a_broken_character_and_begins_anew(small: Tokenizer) -> None:
    stream = TextStream(small)
    first, *_ = byte_ids(small, "😀".encode())
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.push(byte_ids(small, b"a")[0]) == "a"
