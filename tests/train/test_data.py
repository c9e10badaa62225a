import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bluejay.errors import ConfigError
from bluejay.tokenizer import Tokenizer
from bluejay.tokenizer.training import train_bpe
from bluejay.train.data import Rows, TokenFile, documents, pack


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the fox and the jay sang in the wood"] * 4, 280)


def _file(length: int) -> TokenFile:
    return TokenFile(Path("memory"), np.arange(length, dtype="<u2"))


@pytest.mark.parametrize("compress", [None, gzip.compress, lzma.compress])
def test_documents_are_split_at_the_separator(tmp_path: Path, compress: object) -> None:
    text = b"one\ntwo\n<|endoftext|>\n\n<|endoftext|>three <|endoftext|> four"
    suffix = {None: ".txt", gzip.compress: ".txt.gz", lzma.compress: ".txt.xz"}[compress]  # type: ignore[index]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(text) if callable(compress) else text)
    assert list(documents(path)) == ["one\ntwo", "three", "four"]


def test_documents_of_jsonl_are_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\ntwo"}) + "\n" + json.dumps({"text": "three", "n": 1}) + "\n")
    assert list(documents(path)) == ["one\ntwo", "three"]


def test_a_broken_line_of_jsonl_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 2"):
        list(documents(path))


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    whole = compress(b"text" * 1000)
    for damaged in (whole[:-20], whole[:12] + b"\xff\xff\xff\xff" + whole[16:]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a\.txt"):
            list(documents(path))


def test_pack_ends_each_document_and_is_made_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.txt"
    source.write_text("the fox<|endoftext|>the jay")
    packed = pack(source, tokenizer, tmp_path / "tokens")
    eos = tokenizer.eos_token_id
    assert packed.ids.tolist() == [*tokenizer.encode("the fox"), eos, *tokenizer.encode("the jay"), eos]
    written = packed.path.stat().st_mtime_ns
    assert pack(source, tokenizer, tmp_path / "tokens").path.stat().st_mtime_ns == written


def test_pack_notices_another_text_or_tokenizer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.txt"
    source.write_text("the fox")
    first = pack(source, tokenizer, tmp_path / "tokens").path
    other = pack(source, train_bpe(["another text altogether"] * 3, 270), tmp_path / "tokens").path
    source.write_text("the jay")
    assert len({first, other, pack(source, tokenizer, tmp_path / "tokens").path}) == 3


def test_an_empty_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.txt"
    source.write_text(" \n<|endoftext|>\n")
    with pytest.raises(ConfigError, match="holds no text"):
        pack(source, tokenizer, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_an_epoch_shows_every_row_once_and_repeats_as_asked() -> None:
    rows = Rows([(_file(33), 1), (_file(17), 3)], seq=8, batch=5, seed=1)
    assert rows.rows_per_epoch == 4 + 3 * 2
    seen = [tuple(row) for number in range(2) for row in rows.batch(number)[0].tolist()]
    expected = [tuple(range(8 * i, 8 * i + 8)) for i in range(4)] + [
        tuple(range(8 * i, 8 * i + 8)) for i in range(2)
    ] * 3
    assert sorted(seen) == sorted(expected)


def test_targets_are_the_inputs_one_further() -> None:
    inputs, targets = Rows([(_file(100), 1)], seq=8, batch=3, seed=1).batch(0)
    assert torch.equal(inputs + 1, targets)


def test_a_batch_is_a_function_of_its_number_and_epochs_differ() -> None:
    rows = Rows([(_file(81), 1)], seq=8, batch=10, seed=1)
    again = Rows([(_file(81), 1)], seq=8, batch=10, seed=1)
    assert torch.equal(rows.batch(1)[0], again.batch(1)[0])
    assert not torch.equal(rows.batch(0)[0], rows.batch(1)[0])
    assert sorted(rows.batch(0)[0][:, 0].tolist()) == sorted(rows.batch(1)[0][:, 0].tolist())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="less than one row of 64"):
        Rows([(_file(60), 1)], seq=64, batch=1, seed=1)
