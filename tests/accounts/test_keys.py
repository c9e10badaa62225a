import re

from hypothesis import given
from hypothesis import strategies as st

from bluejay.accounts import keys


def test_a_key_is_256_random_bits() -> None:
    drawn = [keys.new_key() for _ in range(100)]
    assert len({key.text for key in drawn}) == len({key.digest for key in drawn}) == 100
    for key in drawn:
        assert re.fullmatch(r"bj-[A-Za-z0-9_-]{43}", key.text)
        assert key.text.startswith(key.prefix)
        assert len(key.prefix) == 11
        assert key.digest == keys.digest_of(key.text)


@given(st.text())
def test_any_text_has_a_digest(text: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", keys.digest_of(text))


def test_half_characters_have_a_digest() -> None:
    assert keys.digest_of("\ud800") != keys.digest_of("\ud801")


def test_keys_are_case_sensitive() -> None:
    assert keys.digest_of("bj-a") != keys.digest_of("bj-A")


def test_only_equal_digests_are_the_same() -> None:
    key, other = keys.new_key(), keys.new_key()
    assert keys.is_same(key.digest, key.digest)
    assert not keys.is_same(key.digest, other.digest)
    assert not keys.is_same(key.digest, None)
    assert not keys.is_same(keys.digest_of("nobody"), None)
