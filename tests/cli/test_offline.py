from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bluejay.cli import app
from bluejay.engine import LLM
from bluejay.errors import InvalidRequest

OPTIONS = ["--max-new-tokens", "6", "--greedy", "--ignore-eos"]


def answer(source: Path, output: Path, *options: str) -> list[dict]:
    done = CliRunner().invoke(app, ["generate", "--file", str(source), "--output", str(output), *OPTIONS, *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Once upon a time {number}"}) for number in range(12)]
    lines[3] = "no json"
    lines[5] = json.dumps({"prompt": "x", "temprature": 1})
    lines[7] = json.dumps({"prompt": "x", "top_p": 7})
    lines[8] = json.dumps({"prompt": "x " * 2000})
    lines.insert(10, "")  # counts as a line of the file, and asks for nothing
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_a_line_out_for_each_line_in(source: Path, tmp_path: Path) -> None:
    found = answer(source, tmp_path / "out.jsonl")
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13]
    errors = {line["line"]: line["error"] for line in found if "error" in line}
    assert {number: error["type"] for number, error in errors.items()} == {
        4: "InvalidRequest", 6: "InvalidRequest", 8: "InvalidRequest", 9: "ContextLengthExceeded",
    }  # fmt: skip
    assert errors[8]["param"] == "top_p"
    assert "temprature" in errors[6]["message"]
    llm = LLM()
    for line in found:
        if "error" not in line:
            assert line["sequences"][0]["text"] == llm.generate(line["prompt"], _params())[0].text


def _params():
    from bluejay.decoding import SamplingParams

    return SamplingParams(max_new_tokens=6, ignore_eos=True)


def test_an_interrupted_file_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    answer(source, output)
    whole = output.read_bytes()
    for kept in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:kept])
        answer(source, output)
        assert output.read_bytes() == whole


def test_another_files_answers_are_left_alone(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"line": 1, "prompt": "something else", "sequences": []}\n')
    with pytest.raises(InvalidRequest, match="line 1 does not answer"):
        answer(source, output)
    assert "something else" in output.read_text()


def test_errors_of_another_file_are_no_answers(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text('{"line": 7, "error": {"type": "InvalidRequest", "message": "x"}}\n')
    with pytest.raises(InvalidRequest, match="line 1 does not answer"):
        answer(source, output)


@pytest.mark.parametrize("own", [{"prompt": "x", "top_p": 7}, {"prompt": 3}])
def test_error_lines_of_other_prompts_are_left_alone(tmp_path: Path, own: dict) -> None:
    """Also where there is nothing but errors; the lines that they answer are still found."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(own) + "\n")
    found = answer(source, output)
    assert answer(source, output) == found
    assert [set(line) for line in found] == [{"line", "error", "prompt" if own["prompt"] == "x" else "line_sha256"}]
    for other in ({"prompt": "y", "top_p": 7}, {"prompt": 4}, {"prompt": "Once"}):
        source.write_text(json.dumps(other) + "\n")
        with pytest.raises(InvalidRequest, match="line 1 does not answer"):
            answer(source, output)


def test_error_lines_that_say_only_their_number_are_gone_on_behind(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    lines = [json.dumps({"line": 4, "error": {}})]
    whole = [json.dumps(line) for line in answer(source, output)]
    output.write_text("\n".join(whole[:3] + lines) + "\n")
    assert [line["line"] for line in answer(source, output)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13]
    output.write_text("\n".join([json.dumps({"line": 1, "prompt": "else", "error": {}}), *whole[1:3], *lines]) + "\n")
    with pytest.raises(InvalidRequest, match="line 1 does not answer"):
        answer(source, output)


def test_a_line_that_no_reader_or_writer_takes_is_an_error_line(tmp_path: Path) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [
        "[" * 200_000,
        '{"prompt": "Once", "\\ud800": 1}',
        '{"prompt": "\\ud800"}',
        '{"prompt": "Once", "stop": "\\ud800"}',
    ]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    first, second, third, fourth = found = answer(source, output)
    assert "line 1 is not a JSON object" in first["error"]["message"]
    assert r"line 2: unknown option '\ud800'" in second["error"]["message"]
    assert "lone surrogate" in third["error"]["message"]
    assert third["prompt"] == "\ud800"
    assert fourth["sequences"]
    assert answer(source, output) == found


def test_the_mark_that_some_editors_begin_a_file_with_is_no_text(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Once"}\n', encoding="utf-8-sig")
    [line] = answer(source, tmp_path / "out.jsonl")
    assert line["prompt"] == "Once"
    done = CliRunner().invoke(app, ["generate", "--file", str(source), "--json", *OPTIONS])
    assert json.loads(done.stdout)["prompt"] == "Once"


def test_an_output_longer_than_its_source_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    answer(source, output)
    source.write_text(source.read_text().splitlines()[0] + "\n")
    with pytest.raises(InvalidRequest, match="line 2 does not answer"):
        answer(source, output)


def test_where_nothing_can_be_written_no_model_is_read(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bluejay.cli.loading.open_llm", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(InvalidRequest, match="No such file"):
        answer(source, tmp_path / "nowhere" / "out.jsonl")


@pytest.mark.parametrize("source_name", ["prompts.txt", "absent.jsonl"])
def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path, source_name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"no \.jsonl file"):
        answer(tmp_path / source_name, tmp_path / "out.jsonl")


def test_prompts_are_not_overwritten(source: Path) -> None:
    before = source.read_text()
    with pytest.raises(InvalidRequest, match="itself"):
        answer(source, source)
    assert source.read_text() == before


def test_output_needs_a_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["generate", "a prompt", "--output", str(tmp_path / "o.jsonl")])
    assert isinstance(done.exception, InvalidRequest)


def test_wrong_options_of_the_command_stop_it_at_once(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="top_p is 3"):
        answer(source, tmp_path / "out.jsonl", "--do-sample", "--top-p", "3")
    assert not (tmp_path / "out.jsonl").exists()
