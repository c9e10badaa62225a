import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bluejay.checkpoints import save
from bluejay.cli import app
from bluejay.errors import ConfigError, EngineError, InvalidRequest
from bluejay.model.gptj import GPTJ
from bluejay.tokenizer.training import train_bpe

GREEDY = ["--greedy", "--max-new-tokens", "8", "--ignore-eos"]


@pytest.fixture
def model_dir(tmp_path: Path, tiny_gptj: GPTJ) -> Path:
    target = tmp_path / "tiny"
    save(tiny_gptj, tiny_gptj.config, target)
    train_bpe(["the fox and the jay sang in the wood. "] * 4, 280).save(target)
    return target


def _run(model_dir: Path, *arguments: str, stdin: str | None = None) -> tuple[str, str]:
    done = CliRunner().invoke(
        app, ["generate", "--model", str(model_dir), *arguments], input=stdin, catch_exceptions=False, color=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def _json(model_dir: Path, *arguments: str, stdin: str | None = None) -> list[dict[str, object]]:
    return [json.loads(line) for line in _run(model_dir, "--json", *arguments, stdin=stdin)[0].split("\n") if line]


def test_a_prompt_streams_with_its_text_behind_it(model_dir: Path) -> None:
    out, err = _run(model_dir, "the fox", *GREEDY)
    [row] = _json(model_dir, "the fox", *GREEDY)
    text = row["sequences"][0]["text"]  # type: ignore[index]
    assert out == f"the fox{text}\n"
    assert "8 tokens in" in err and "tokens/s" in err
    assert _run(model_dir, "the fox", *GREEDY, "--no-echo")[0] == f"{text}\n"


def test_prompts_come_from_stdin_and_files(model_dir: Path, tmp_path: Path) -> None:
    expected = _json(model_dir, "the fox", *GREEDY)
    (tmp_path / "prompt.txt").write_text("the fox\n")
    assert _json(model_dir, "-", *GREEDY, stdin="the fox\n") == expected
    assert _json(model_dir, *GREEDY, stdin="the fox") == expected
    assert _json(model_dir, "--file", str(tmp_path / "prompt.txt"), *GREEDY) == expected


def test_jsonl_rows_have_options_of_their_own(model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "the fox", "max_new_tokens": 3},
        {"prompt": "the jay", "num_beams": 2, "num_return_sequences": 2},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = _json(model_dir, "--file", str(file), *GREEDY)
    assert len(first["sequences"][0]["token_ids"]) == 3  # type: ignore[index]
    assert [len(s["token_ids"]) for s in second["sequences"]] == [8, 8]  # type: ignore[attr-defined]


def test_a_bias_is_the_same_in_a_row_and_in_a_flag(model_dir: Path, tmp_path: Path) -> None:
    [row] = _json(model_dir, "the fox", *GREEDY)
    banned = row["sequences"][0]["token_ids"][0]  # type: ignore[index]
    bias = {str(banned): -100}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "the fox", "logit_bias": bias}))
    by_row, by_flag = (
        _json(model_dir, *arguments, *GREEDY)[0]["sequences"][0]["token_ids"]  # type: ignore[index]
        for arguments in (["--file", str(file)], ["the fox", "--logit-bias", json.dumps(bias)])
    )
    assert by_row == by_flag
    assert banned not in by_row


def test_bad_rows_are_all_named(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": 3}\nnot json\n{"prompt": "x", "temprature": 1}\n')
    with pytest.raises(InvalidRequest) as caught:
        _run(model_dir, "--file", str(file))
    for part in ("line 1", "line 2", "line 3", "temprature"):
        assert part in str(caught.value)


def test_a_bad_value_in_a_row_names_its_line(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": "y", "top_p": 7}\n')
    with pytest.raises(InvalidRequest, match=r"line 2: top_p is 7"):
        _run(model_dir, "--file", str(file))


def test_the_models_generation_config_is_heard_and_flags_go_first(model_dir: Path) -> None:
    config = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 4, "transformers_version": "4.56.2"}
    (model_dir / "generation_config.json").write_text(json.dumps(config))
    [row] = _json(model_dir, "the fox", "--ignore-eos")
    assert len(row["sequences"][0]["token_ids"]) == 4  # type: ignore[index]
    [row] = _json(model_dir, "the fox", "--max-length", "5", "--ignore-eos")
    assert len(row["sequences"][0]["token_ids"]) + len(row["prompt_token_ids"]) == 5  # type: ignore[index, arg-type]
    [row] = _json(model_dir, "the fox", "--num-beams", "2")
    assert "beam_score" in row["sequences"][0]  # type: ignore[index]


def test_a_broken_generation_config_is_named(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: temperature"):
        _run(model_dir, "the fox")


def test_every_sampling_option_is_a_flag() -> None:
    import dataclasses

    from bluejay import SamplingParams

    help_text = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    names = [field.name.replace("_", "-") for field in dataclasses.fields(SamplingParams)]
    assert [name for name in names if f"--{name}" not in help_text] == []


@pytest.mark.parametrize("how", ["--json", "--output=answers.jsonl"])
def test_only_text_can_do_without_its_prompt(model_dir: Path, how: str) -> None:
    with pytest.raises(InvalidRequest, match="--no-echo is for text"):
        _run(model_dir, "the fox", "--no-echo", how)


def test_logprobs_need_json(model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="--json"):
        _run(model_dir, "the fox", "--logprobs", "1")
    [row] = _json(model_dir, "the fox", "--logprobs", "1", *GREEDY)
    assert len(row["sequences"][0]["logprobs"]) == 8  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "--model", "./nowhere"], 2, "error: './nowhere': no such file or directory"),
        (["generate", "x", "--top-p", "2", "--num-beams", "0"], 2, "num_beams is 0"),
        (["generate", "x", "--bad-words-ids", "[["], 2, "bad_words_ids is no JSON"),
        (["generate", "x", "--no-such-option"], 2, "No such option"),
        (["--version"], 0, "bluejay "),
    ],
)
def test_errors_are_one_line_and_have_exit_codes(arguments: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-c", "from bluejay.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def _nan_model(model_dir: Path, model: GPTJ) -> None:
    with torch.no_grad():
        model.lm_head.bias.fill_(float("nan"))
    save(model, model.config, model_dir)


@pytest.mark.parametrize("arguments", [["the fox"], ["the fox", "owl"]])
def test_a_failed_answer_is_an_error(model_dir: Path, tiny_gptj: GPTJ, arguments: list[str]) -> None:
    _nan_model(model_dir, tiny_gptj)
    with pytest.raises(EngineError, match=r"prompt 1 \('the fox'\).*--dtype float32"):
        _run(model_dir, *arguments, "--do-sample")


@pytest.mark.parametrize("arguments", [["the fox"], ["the fox", "owl"]])
def test_what_the_engine_failed_of_is_said(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr("bluejay.engine.runner.Runner.forward", fail)
    with pytest.raises(EngineError, match=r"^RuntimeError: the disk is gone$"):
        _run(model_dir, *arguments)


def test_lines_of_jsonl_end_at_newlines_only(model_dir: Path, tmp_path: Path) -> None:
    prompt = "the\u2028fox\u0085and"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert _json(model_dir, "--file", str(file), *GREEDY)[0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('"num_beams": "4"', "line 1: num_beams is '4'"),
        ('"num_beams": null', "line 1: num_beams is None"),
        ('"logprobs": 1', "line 1: logprobs are printed with --json only"),
    ],
)
def test_wrong_rows_name_their_line(model_dir: Path, tmp_path: Path, options: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x", ' + options + "}\n")
    with pytest.raises(InvalidRequest, match=message):
        _run(model_dir, "--file", str(file))


def test_a_models_max_length_counts(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"max_length": 9}')
    [row] = _json(model_dir, "the fox", "--ignore-eos")
    assert len(row["sequences"][0]["token_ids"]) + len(row["prompt_token_ids"]) == 9  # type: ignore[index, arg-type]


def test_several_answers_of_a_model_that_draws(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"do_sample": true, "max_new_tokens": 2}')
    [row] = _json(model_dir, "the fox", "-n", "2")
    assert len(row["sequences"]) == 2  # type: ignore[arg-type]


def test_stdin_is_read_once(model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="more than once"):
        _run(model_dir, "-", "-", stdin="x")
    with pytest.raises(InvalidRequest, match="more than once"):
        _run(model_dir, "-", "--file", "-", stdin="x")
    assert _json(model_dir, "--file", "-", *GREEDY, stdin="x")[0]["prompt"] == "x"


def test_a_closed_stdin_is_no_prompt(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bluejay.cli.generate import _rows

    monkeypatch.setattr(sys, "stdin", None)
    for prompts in ([], ["-"]):
        with pytest.raises(InvalidRequest, match="prompt"):
            list(_rows(prompts, None))


def test_a_name_is_not_markup(model_dir: Path) -> None:
    with pytest.raises(InvalidRequest, match="model name"):
        _run(model_dir, "x", "--model", "[/x]")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), "out of memory"),
        (PermissionError(13, "Permission denied", "there"), "Permission denied: 'there'; see"),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bluejay import cli

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_perplexity_checks_before_it_loads(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bluejay.cli import loading

    monkeypatch.setattr(loading, "open_llm", lambda *_, **__: pytest.fail("the model was read"))
    text = tmp_path / "text.txt"
    text.write_text("the fox")
    command = ["perplexity", "--model", str(model_dir)]
    with pytest.raises(ConfigError, match=r"none\.txt"):
        CliRunner().invoke(app, [*command, str(tmp_path / "none.txt")], catch_exceptions=False)
    with pytest.raises(InvalidRequest, match="stride is 129"):
        CliRunner().invoke(app, [*command, str(text), "--stride", "129"], catch_exceptions=False)


def test_a_small_model_generates_with_one_thread_unless_told(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("bluejay.ops.set_num_threads", asked.append)  # PyTorch has one beside the kernels' anyway
    _run(model_dir, "the fox", *GREEDY)
    assert asked == [1]
    _run(model_dir, "the fox", *GREEDY, "--threads", "2")
    assert asked == [1, 2]
