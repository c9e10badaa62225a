import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bluejay.errors import CheckpointError
from bluejay.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def directory(small: Tokenizer, tmp_path: Path) -> Path:
    """Vocabulary and merges alone, by Hugging Face's names."""
    small.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_openai_and_hugging_face_names_are_the_same(gpt2: Tokenizer, gpt2_files: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2_files / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(gpt2_files / "vocab.bpe", tmp_path / "merges.txt")
    text = "Tokenizers' names don't matter: 123 日本<|endoftext|>"
    assert load_tokenizer(tmp_path).encode(text) == gpt2.encode(text)


def test_gpt_j_padding_tokens_are_no_tokens(gpt2_files: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2_files / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(gpt2_files / "vocab.bpe", tmp_path / "merges.txt")
    write(tmp_path / "added_tokens.json", {f"<|extratoken_{n}|>": 50256 + n for n in range(143, 0, -1)})
    gpt_j = load_tokenizer(tmp_path)
    assert gpt_j.vocab_size == 50257
    assert gpt_j.known_ids == tuple(range(50257))
    # As transformers does, text that spells one out still gets its id.
    assert gpt_j.encode("<|extratoken_143|>") == [50399]
    assert gpt_j.token_text(50399) == "<|extratoken_143|>"
    gpt_j.save(tmp_path)  # now with a tokenizer.json, as GPT-J comes
    assert load_tokenizer(tmp_path).known_ids == gpt_j.known_ids
    assert load_tokenizer(tmp_path).encode("<|extratoken_143|>") == [50399]


def test_tokenizer_json_comes_first(small: Tokenizer, directory: Path) -> None:
    small.save(directory)
    (directory / "vocab.json").write_text("broken")
    assert load_tokenizer(directory).encode("the bird") == small.encode("the bird")


def test_limits_left_in_tokenizer_json_do_not_cut_the_text(small: Tokenizer, directory: Path) -> None:
    small.save(directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    write(directory / "tokenizer.json", content)
    assert load_tokenizer(directory).encode("the bird sang in the tree") == small.encode("the bird sang in the tree")


def test_add_prefix_space_is_honoured(small: Tokenizer, directory: Path) -> None:
    write(directory / "tokenizer_config.json", {"add_prefix_space": True})
    assert load_tokenizer(directory).encode("the bird") == small.encode(" the bird")


def test_added_tokens_decoder_is_honoured(directory: Path) -> None:
    row = {"content": "<|user|>", "special": True}
    write(directory / "tokenizer_config.json", {"added_tokens_decoder": {"280": row}, "eos_token": row})
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("<|user|>") == [280]
    assert tokenizer.eos_token_id == 280
    assert tokenizer.decode([280], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("files", "eos_token"),
    [
        ({}, "<|endoftext|>"),
        ({"config.json": {"eos_token_id": 5}}, "%"),
        ({"config.json": {"eos_token_id": 50256}}, "<|endoftext|>"),
        ({"config.json": {"eos_token_id": 5}, "special_tokens_map.json": {"eos_token": "a"}}, "a"),
        ({"special_tokens_map.json": {"eos_token": {"content": "a"}}}, "a"),
        ({"special_tokens_map.json": {"eos_token": "a"}, "tokenizer_config.json": {"eos_token": "b"}}, "b"),
    ],
)
def test_end_of_text_token(directory: Path, files: dict[str, Any], eos_token: str) -> None:
    for name, content in files.items():
        write(directory / name, content)
    assert load_tokenizer(directory).eos_token == eos_token


def test_no_end_of_text_token(directory: Path) -> None:
    write(directory / "vocab.json", {"a": 0, "b": 1, "ab": 2})
    (directory / "merges.txt").write_text("a b\n")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token_id is None
    assert tokenizer.encode("abb") == [2, 1]


def test_windows_line_ends_in_merges(small: Tokenizer, directory: Path) -> None:
    merges = (directory / "merges.txt").read_bytes()
    (directory / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert load_tokenizer(directory).encode("the bird sang") == small.encode("the bird sang")


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json, or vocab\.json with merges\.txt or encoder\.json with"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: holds list"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json: not readable as JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder is not a table"),
        ("tokenizer_config.json", '{"eos_token": "<|no|>"}', r"'<\|no\|>' is not in"),
        ("vocab.json", "{", r"vocab\.json: not readable as JSON"),
        ("vocab.json", '{"a": -1}', r"vocab\.json: 'a' has id -1"),
        ("vocab.json", '{"a": true}', r"vocab\.json: 'a' has id True"),
        ("vocab.json", '{"a": 0, "b": 0}', r"vocab\.json: two tokens"),
        ("vocab.json", '{"a": 0}', r"vocab\.json and merges\.txt do not fit"),
        ("merges.txt", "#version: 0.2\na b\nabc\n", r"merges\.txt: line 3 is 'abc'"),
        ("merges.txt", "a b c\n", r"merges\.txt: line 1"),
        ("added_tokens.json", '{"<|x|>": 999}', r"'<\|x\|>' asks for id 999, the next free id is 280"),
    ],
)
def test_a_broken_file_is_named(directory: Path, name: str, content: str, message: str) -> None:
    (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(directory)


def test_a_file_that_is_not_utf8_is_named(directory: Path) -> None:
    (directory / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"merges\.txt: not readable as UTF-8"):
        load_tokenizer(directory)
