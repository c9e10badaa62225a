"""Text as tokens arrive: whole characters only."""

from __future__ import annotations

import codecs

from bluejay.tokenizer.byte_level import Tokenizer


class TextStream:
    """Turns one token after another into text, and holds back bytes that do not yet make a character.

    The pieces joined, `finish()` included, equal `tokenizer.decode` of all the ids. A step costs its token's bytes,
    not the length of the text so far.

    Args:
        tokenizer: whose ids come in.
        skip_special_tokens: leave out <|endoftext|> and its like.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take a token; return the characters that are now whole, which may be none."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """End the text: bytes still held back become U+FFFD. The stream can then begin another text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
