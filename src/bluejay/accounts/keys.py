"""API keys: random, shown once, kept as a digest, compared in constant time.

A key is "bj-" and 43 characters: 256 random bits, base64 as URLs take it. With that many bits one pass of SHA-256 is
enough: there is no dictionary to try. The first 11 characters are kept readable, so that people can tell their keys
apart; 208 bits stay unknown.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

START = "bj-"
NUM_PREFIX_CHARS = 11
# Stands in where no key has the digest asked for, so that unknown and wrong keys are compared like right ones.
_NOBODY = hashlib.sha256(b"nobody").hexdigest()


@dataclass(frozen=True)
class NewKey:
    """A key's text, how it begins, and its digest; only the latter two are kept."""

    text: str
    prefix: str
    digest: str


def new_key() -> NewKey:
    """Draw a key."""
    text = START + secrets.token_urlsafe(32)
    return NewKey(text, text[:NUM_PREFIX_CHARS], digest_of(text))


def digest_of(text: str) -> str:
    """SHA-256 of a key's text, hexadecimal. Any text has one, half characters included."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_same(digest: str, kept: str | None) -> bool:
    """Whether two digests are equal, in a time that does not tell where they differ, nor whether there is a second."""
    return hmac.compare_digest(digest.encode(), (kept or _NOBODY).encode()) and kept is not None
