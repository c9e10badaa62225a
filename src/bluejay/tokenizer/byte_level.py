"""`Tokenizer`: byte-level BPE over the `tokenizers` library.

Every byte has a printable symbol (a space is `Ġ`), a token is a string of symbols, and so any text has ids and any ids
have bytes. One character may span several tokens, so the bytes of a single token need not be valid UTF-8.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from bluejay.errors import CheckpointError, InvalidRequest

# GPT-J's embedding is padded to 50,400 rows with names like <|extratoken_1|>; no text ever trained them.
_PADDING_TOKEN = re.compile(r"<\|extratoken_\d+\|>")


def _byte_symbols() -> dict[str, int]:
    """Each byte's printable symbol: itself where Latin-1 prints it, else the next free one from U+0100.

    Source: OpenAI GPT-2, `encoder.py`, bytes_to_unicode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return symbols


BYTE_OF_SYMBOL = _byte_symbols()


class Tokenizer:
    """Encodes text to ids and decodes ids to bytes or text.

    Args:
        backend: a byte-level BPE of the `tokenizers` library.
        eos_token: the token that ends a text, None where there is none.
    Raises: CheckpointError if the backend is no byte-level BPE, or does not know `eos_token`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_token: str | None = "<|endoftext|>") -> None:
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise CheckpointError(
                f"the tokenizer is a {type(backend.model).__name__} with decoder {type(backend.decoder).__name__}; "
                "GPT-J and GPT-Neo use BPE with decoder ByteLevel"
            )
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self.eos_token = eos_token
        self.eos_token_id: int | None = None if eos_token is None else backend.token_to_id(eos_token)
        if eos_token is not None and self.eos_token_id is None:
            raise CheckpointError(f"the end-of-text token {eos_token!r} is not in the tokenizer's vocabulary")

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; special tokens written in the text, such as <|endoftext|>, become their one id.

        Nothing is added before or after. Raises: InvalidRequest if the text holds a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode several texts, on several threads; InvalidRequest as for `encode`."""
        for text in texts:
            _check_unicode(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD, ids that have no token become nothing."""
        pieces = (self.token_bytes(i) for i in ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, b"" for an id that has no token."""
        text = self.token_text(token_id)
        if text is None:
            return b""
        try:
            return bytes([BYTE_OF_SYMBOL[symbol] for symbol in text])
        except KeyError:  # an added token that no merge made, "two words", is spelled as it is
            return text.encode("utf-8")

    def token_text(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it ("Ġworld"), None for an id that has no token."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure, as <|endoftext|> does, and is no part of the text."""
        added = self._added.get(token_id)
        return added is not None and added.special

    @cached_property
    def known_ids(self) -> tuple[int, ...]:
        """All ids that may be sampled, in order: those with a token, GPT-J's padding tokens left out."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return tuple(sorted(i for text, i in vocab.items() if not _PADDING_TOKEN.fullmatch(text)))

    @cached_property
    def longest_token_bytes(self) -> int:
        """The bytes of the longest token."""
        return max((len(self.token_bytes(i)) for i in self.known_ids), default=0)

    @property
    def vocab_size(self) -> int:
        """The largest known id + 1; a model's embedding may have more rows."""
        return self.known_ids[-1] + 1 if self.known_ids else 0

    def fingerprint(self) -> str:
        """A sha256 of everything that decides how text becomes ids."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def save(self, directory: Path) -> list[Path]:
        """Write the files that transformers' GPT2Tokenizer and GPT2TokenizerFast open; return their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        self._backend.model.save(str(directory))
        written = [directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt")]
        marks = {} if self.eos_token is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.eos_token)
        texts: dict[str, dict[str, Any]] = {
            "special_tokens_map.json": marks,
            "tokenizer_config.json": {**marks, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
        }
        words = self._backend.get_vocab(with_added_tokens=False)
        if outside := {token.content: i for i, token in self._added.items() if token.content not in words}:
            texts["added_tokens.json"] = outside
        for name, content in texts.items():
            path = directory / name
            path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            written.append(path)
        return written


def byte_level_backend(model: models.BPE, *, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """Put GPT-2's word split, byte symbols and decoder around a BPE model."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is no valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None
