from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from bluejay import ops
from bluejay.bench import machine
from bluejay.bench.weights import weight_bytes
from bluejay.checkpoints import save
from bluejay.cli.bench import bench
from bluejay.errors import BluejayError, ConfigError, ContextLengthExceeded, InvalidRequest, KernelError
from bluejay.model import PRESETS
from bluejay.model.gptj import GPTJ
from bluejay.model.quantized import Quantization
from bluejay.tokenizer.training import train_bpe

from ..conftest import TINY_GPT_NEO, TINY_GPTJ

SHORT = ("--prompt-tokens", "5", "--max-new-tokens", "4", "--repeats", "2")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiny shapes and a tiny buffer."""
    monkeypatch.setitem(PRESETS, "tiny-gptj", TINY_GPTJ)
    monkeypatch.setitem(PRESETS, "tiny-gpt-neo", TINY_GPT_NEO)
    monkeypatch.setattr(machine, "LEAST_BUFFER_BYTES", 2**20)
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**20)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave threads as they were."""
    before = torch.get_num_threads()
    yield
    ops.set_num_threads(0)
    torch.set_num_threads(before)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(bench, ["engine", *arguments])


def figures(*arguments: str) -> dict[str, object]:
    result = run(*arguments, *SHORT, "--json")
    assert result.exception is None, result.output
    return dict(json.loads(result.stdout))  # nothing but JSON is there


@pytest.mark.parametrize("shape", ["tiny-gptj", "tiny-gpt-neo"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_shape_is_measured(shape: str, quantize: str) -> None:
    found = figures("--shape", shape, "--quantize", quantize, "--batch-size", "3", "--seed", "5")
    assert (found["shape"], found["model"], found["layers"], found["quantize"]) == (shape, None, 2, quantize)
    assert (found["batch_size"], found["prompt_tokens"], found["max_new_tokens"], found["seed"]) == (3, 5, 4, 5)
    assert found["group_size"] == (None if quantize == "none" else 32)
    assert found["kernels"] == ("pytorch" if quantize == "none" else ops.voice())
    positive = ["decode_tokens_per_s", "decode_ms_per_step", "prefill_tokens_per_s", "weight_bytes_per_step"]
    positive += ["achieved_gb_per_s", "read_bandwidth_gb_per_s", "bandwidth_ratio", "peak_memory_bytes", "load_s"]
    assert all(float(str(found[name])) > 0 for name in positive)


def test_options_reach_the_network() -> None:
    plain = figures("--shape", "tiny-gptj")
    assert (plain["quantize"], plain["dtype"], plain["layers"]) == ("none", "float32", 2)
    cut = figures("--shape", "tiny-gptj", "--layers", "1")
    assert cut["layers"] == 1
    assert int(str(cut["weight_bytes_per_step"])) < int(str(plain["weight_bytes_per_step"]))
    narrow = figures("--shape", "tiny-gptj", "--dtype", "bfloat16")
    assert narrow["dtype"] == "bfloat16"
    assert 2 * int(str(narrow["weight_bytes_per_step"])) == plain["weight_bytes_per_step"]
    assert figures("--shape", "tiny-gptj", "--quantize", "int8", "--group-size", "64")["group_size"] == 64
    assert figures("--shape", "tiny-gptj", "--quantize", "int8", "--threads", "3")["threads"] == 3


def test_keys_and_values_are_a_mean_over_the_steps() -> None:
    # Steps see 6, 7 and 8 tokens: 7 in the mean, of 2 layers, keys and values, 32 wide.
    numbers = 3 * 7 * 2 * 2 * 32
    found = figures("--shape", "tiny-gptj", "--batch-size", "3")
    assert found["kv_bytes_per_step"] == numbers * 4
    found = figures("--shape", "tiny-gptj", "--batch-size", "3", "--quantize", "int8")
    assert found["kv_bytes_per_step"] == numbers * 2  # the kernels keep them in 16 bits


@pytest.fixture
def model_dir(tmp_path: Path, tiny_gptj: GPTJ) -> Path:
    save(tiny_gptj, tiny_gptj.config, tmp_path / "tiny")
    train_bpe(["the fox and the jay sang in the wood"] * 4, 280).save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_model_is_measured(model_dir: Path) -> None:
    found = figures("--model", str(model_dir))
    assert (found["model"], found["shape"], found["quantize"], found["dtype"]) == (
        str(model_dir),
        None,
        "none",
        "float32",
    )
    assert figures("--model", str(model_dir), "--quantize", "none", "--dtype", "bfloat16")["dtype"] == "bfloat16"
    assert figures("--model", str(model_dir), "--quantize", "int4")["quantize"] == "int4"


def test_people_get_a_table_and_two_sentences() -> None:
    result = run("--shape", "tiny-gptj", "--quantize", "int8", *SHORT)
    assert result.exit_code == 0
    assert "weight_bytes_per_step" in result.stdout
    *_, speed, memory = result.stdout.splitlines()
    assert speed.startswith("Decodes ")
    assert memory.startswith("A step reads ")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), InvalidRequest, "give one of --shape and --model"),
        (("--shape", "tiny-gptj", "--model", "default"), InvalidRequest, "give one of --shape and --model"),
        (("--shape", "gpt-3"), InvalidRequest, "shape is 'gpt-3', expected one of gpt-j-6b, gpt-neo-125m"),
        (("--shape", "tiny-gptj", "--layers", "3"), InvalidRequest, "layers is 3, tiny-gptj has 1 to 2"),
        (("--model", "default", "--layers", "1"), InvalidRequest, "--layers belongs to --shape"),
        (("--model", "default", "--group-size", "32"), InvalidRequest, "--group-size belongs to --shape"),
        (("--shape", "tiny-gptj", "--group-size", "32"), InvalidRequest, "belongs to --quantize int8 or int4"),
        (("--shape", "tiny-gptj", "--group-size", "48", "--quantize", "int4", *SHORT), ConfigError, "group_size is 48"),
        (("--shape", "tiny-gptj", "--quantize", "int4", "--dtype", "float32"), InvalidRequest, "--dtype belongs to"),
        (("--shape", "tiny-gptj", "--prompt-tokens", "125"), ContextLengthExceeded, "holds 128"),
        (("--model", "default", "--prompt-tokens", "1025"), ContextLengthExceeded, "holds 1024"),
        (("--shape", "tiny-gptj", "--max-new-tokens", "1"), InvalidRequest, "max_new_tokens is 1"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], error: type[BluejayError], message: str) -> None:
    result = run(*arguments, "--json")
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert result.stdout == ""


def test_too_little_memory_is_told_before_weights_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 10_000_000_000)
    result = run("--shape", "gpt-j-6b")
    assert isinstance(result.exception, ConfigError)
    assert "weights take 24.2 GB" in str(result.exception)
    assert "10.0 GB of memory are free; ask for fewer layers of a shape (--layers)" in str(result.exception)


def test_too_little_memory_for_a_model_too(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 50_000)
    for quantize in ("none", "int8"):
        assert "0.0 GB of memory are free" in str(
            run("--model", str(model_dir), "--quantize", quantize, *SHORT).exception
        )


def test_wrong_kernels_are_named_before_a_model_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLUEJAY_KERNELS", "avx1024")
    monkeypatch.setattr(ops, "_voice", None)
    result = run("--shape", "gpt-j-6b", "--quantize", "int4")
    assert isinstance(result.exception, KernelError)
    assert "avx1024" in str(result.exception)


def test_help_has_examples() -> None:
    assert "bluejay bench engine --shape gpt-j-6b --quantize int4" in run("--help").stdout


@pytest.mark.slow
@pytest.mark.skipif(machine.free_memory_bytes() < 6e9, reason="takes 5 GB of memory")
def test_gpt_j_6b_in_int4_takes_its_weights_and_a_gibibyte() -> None:
    arguments = (
        "bench engine --shape gpt-j-6b --quantize int4 --prompt-tokens 496 --max-new-tokens 16 --repeats 1 --json"
    )
    done = subprocess.run(
        [sys.executable, "-m", "bluejay", *arguments.split()], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    weights = weight_bytes(PRESETS["gpt-j-6b"], Quantization(4), torch.float32)
    assert weights < found["peak_memory_bytes"] <= weights + 2**30
