"""Find and read a tokenizer's files, by Hugging Face's names or OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from bluejay.errors import CheckpointError
from bluejay.tokenizer.byte_level import Tokenizer, byte_level_backend

# Names of a vocabulary and its merges: Hugging Face's, then those of OpenAI's GPT-2 release.
_VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(directory: Path) -> Tokenizer:
    """Open the tokenizer of a model directory.

    Looks for tokenizer.json, then for vocab.json with merges.txt, then for encoder.json with vocab.bpe. The end-of-text
    token is the one that tokenizer_config.json, special_tokens_map.json or config.json names, in this order, else
    <|endoftext|> if there is one.

    Raises: CheckpointError if no tokenizer is there, or a file of it is broken; the message names the files.
    """
    settings = _read_object(directory / "tokenizer_config.json")
    if (path := directory / "tokenizer.json").is_file():
        backend = _read_tokenizer_json(path)
    else:
        backend = _from_vocab_and_merges(directory, settings)
    try:
        return Tokenizer(backend, eos_token=_eos_token(directory, settings, backend))
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    try:
        backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer that can be read: {error}") from None
    # A file may carry these from training; text must be neither cut nor filled up unseen.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_vocab_and_merges(directory: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    for vocab_name, merges_name in _VOCAB_AND_MERGES:
        vocab_path, merges_path = directory / vocab_name, directory / merges_name
        if vocab_path.is_file() and merges_path.is_file():
            break
    else:
        wanted = " or ".join(" with ".join(pair) for pair in _VOCAB_AND_MERGES)
        raise CheckpointError(f"{directory}: no tokenizer: expected tokenizer.json, or {wanted}")
    vocab = _read_ids(vocab_path)
    try:
        model = models.BPE(vocab, _read_merges(merges_path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{vocab_path} and {merges_path.name} do not fit together: {error}") from None
    backend = byte_level_backend(model, add_prefix_space=settings.get("add_prefix_space") is True)
    added = {i: AddedToken(text, normalized=False) for text, i in _read_ids(directory / "added_tokens.json").items()}
    added.update(_added_tokens_decoder(settings, directory / "tokenizer_config.json"))
    if _END_OF_TEXT in vocab:
        added[vocab[_END_OF_TEXT]] = AddedToken(_END_OF_TEXT, normalized=False, special=True)
    for i, token in sorted(added.items(), key=lambda item: item[0]):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if (got := backend.token_to_id(token.content)) != i:
            raise CheckpointError(
                f"{directory}: added token {token.content!r} asks for id {i}, the next free id is {got}"
            )
    return backend


def _added_tokens_decoder(settings: Mapping[str, Any], path: Path) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json adds: {"50257": {"content": …, "special": …}, …}."""
    listed = settings.get("added_tokens_decoder", {})
    try:
        return {
            int(i): AddedToken(
                row["content"],
                special=bool(row.get("special")),
                lstrip=bool(row.get("lstrip")),
                rstrip=bool(row.get("rstrip")),
                single_word=bool(row.get("single_word")),
                normalized=bool(row.get("normalized")),
            )
            for i, row in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: added_tokens_decoder is not a table of ids and tokens") from None


def _eos_token(directory: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> str | None:
    for source in (settings, _read_object(directory / "special_tokens_map.json")):
        eos_token = source.get("eos_token")
        if isinstance(eos_token, dict):
            eos_token = eos_token.get("content")
        if isinstance(eos_token, str):
            return eos_token
    eos_token_id = _read_object(directory / "config.json").get("eos_token_id")
    if isinstance(eos_token_id, int) and 0 <= eos_token_id < 2**32 and (text := backend.id_to_token(eos_token_id)):
        return text
    return _END_OF_TEXT if backend.token_to_id(_END_OF_TEXT) is not None else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as UTF-8 text: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object, empty where the file is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


def _read_ids(path: Path) -> dict[str, int]:
    """A file's table of tokens and ids, empty where the file is not there."""
    ids = _read_object(path)
    wrong = [text for text, i in ids.items() if type(i) is not int or not 0 <= i < 2**32]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]!r} has id {ids[wrong[0]]!r}, expected a whole number from 0")
    if len(set(ids.values())) != len(ids):
        raise CheckpointError(f"{path}: two tokens have the same id")
    return ids


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(
                f"{path}: line {number} is {line[:80]!r}, expected two tokens and a space between them"
            )
        merges.append((left, right))
    return merges
