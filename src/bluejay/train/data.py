"""Texts to rows of tokens: read documents, pack them into memory-mapped token files, draw batches.

    text files ──documents()──> texts ──pack()──> TokenFile (ids, <|endoftext|> after each document)
                                                     │ cut into rows of seq + 1: input = row[:-1], target = row[1:]
    Rows.batch(step) <── permutation of all rows, by seed and epoch ──┘

A batch is a function of the step alone, so the data cursor of a checkpoint is its step.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from bluejay.errors import ConfigError
from bluejay.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# Texts tokenised in one call: enough to keep every core busy, small enough to stay in memory.
_DOCUMENTS_PER_CALL = 256


def documents(path: Path) -> Iterator[str]:
    """The documents of a file, one at a time: text split at `<|endoftext|>`, or "text" of each line of .jsonl.

    Raises: ConfigError for a file that cannot be read, with its line where that is known.
    """
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    is_jsonl = ".jsonl" in path.suffixes[-2:]
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for text in _jsonl(file, path) if is_jsonl else _split(file):
                if stripped := text.strip():
                    yield stripped
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{path}: not readable as text: {error}") from None


def _split(file: IO[str]) -> Iterator[str]:
    pending: list[str] = []
    for line in file:
        first, *rest = line.split(END_OF_TEXT)
        pending.append(first)
        for piece in rest:
            yield "".join(pending)
            pending = [piece]
    yield "".join(pending)


def _jsonl(file: IO[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ConfigError(f'{path}: line {number} is not a JSON object with a string "text"')
        yield text


@dataclass(frozen=True)
class TokenFile:
    """Token ids of one text file on disk, memory-mapped: [num_tokens] uint16 or uint32, little endian."""

    path: Path
    ids: np.ndarray[Any, np.dtype[Any]]

    def rows(self, seq: int) -> int:
        """Rows of seq + 1 tokens that start seq apart; what is left over at the end is not seen."""
        return max(0, (len(self.ids) - 1) // seq)

    def row(self, index: int, seq: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        ids: np.ndarray[Any, np.dtype[np.int64]] = self.ids[index * seq : index * seq + seq + 1].astype(np.int64)
        return ids


def pack(
    source: Path, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int], None] | None = None
) -> TokenFile:
    """Tokenise a file, or open what an earlier run made of the same file with the same tokenizer.

    Args:
        folder: takes `<name>-<hash>.bin`; written under another name and renamed, so that a half file is never used.
        on_progress: called with the number of tokens written so far.
    Raises: ConfigError for an unreadable file, or one without a single document.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer has no {END_OF_TEXT} token, which separates documents")
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    target = folder / f"{source.name}-{_fingerprint(source, tokenizer)}.bin"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        written = 0
        with unfinished.open("wb") as out:
            for batch in _batched(documents(source), _DOCUMENTS_PER_CALL):
                for ids in tokenizer.encode_batch(batch):
                    np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype).tofile(out)
                    written += len(ids) + 1
                if on_progress is not None:
                    on_progress(written)
        if written == 0:
            unfinished.unlink()
            raise ConfigError(f"{source}: holds no text")
        unfinished.replace(target)
    return TokenFile(target, np.memmap(target, dtype=dtype, mode="r"))


def _fingerprint(source: Path, tokenizer: Tokenizer) -> str:
    """Names a token file by the text's content and the tokenizer's: another of either makes another file."""
    with source.open("rb") as file:
        text = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{text}:{tokenizer.fingerprint()}".encode()).hexdigest()[:16]


def _batched(items: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class Rows:
    """Batches of rows, each a function of the step alone.

    Args:
        files: token files with how often each is seen in an epoch.
        seq: tokens of context in a row.
        batch: rows in a batch.
        seed: of the order; each epoch has an order of its own.
    Raises: ConfigError if the files together hold less than one row.
    """

    def __init__(self, files: Sequence[tuple[TokenFile, int]], *, seq: int, batch: int, seed: int) -> None:
        self.seq, self.batch_rows, self.seed = seq, batch, seed
        self._files = [file for file, _ in files]
        index = [
            (number, row)
            for number, (file, repeat) in enumerate(files)
            for _ in range(repeat)
            for row in range(file.rows(seq))
        ]
        if not index:
            raise ConfigError(f"the training texts hold less than one row of {seq} tokens; lower recipe.seq")
        self._index = np.asarray(index, dtype=np.int64)

    @property
    def rows_per_epoch(self) -> int:
        return len(self._index)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch `number`, counted from 0: two of [batch, seq] int64."""
        first = number * self.batch_rows
        rows = np.stack([self._row(first + i) for i in range(self.batch_rows)])
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def _row(self, position: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        epoch, offset = divmod(position, self.rows_per_epoch)
        number, row = self._index[_order(self.seed, epoch, self.rows_per_epoch)[offset]]
        return self._files[int(number)].row(int(row), self.seq)


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _order(seed: int, epoch: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    order: np.ndarray[Any, np.dtype[np.int64]] = np.random.default_rng([seed, epoch]).permutation(length)
    return order
