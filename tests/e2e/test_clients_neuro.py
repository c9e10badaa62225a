"""Neuro's `npu` 0.3.900 against a server."""

import re

import pytest

from .answers import Answers, raised, returned

PROMPT = "When I visit Bath I will"


@pytest.fixture(scope="module")
def answers(run_driver, server, model_name) -> Answers:
    return run_driver("neuro", "neuro", server.url, "any-key", model_name)


def _texts(result) -> list[str]:
    assert all(set(item) == {"generated_text"} for item in result), result
    return [item["generated_text"] for item in result]


@pytest.mark.parametrize("model", ["gpt-j", "gpt-neo"])
def test_the_documented_script_returns_one_text_and_prints_what_the_document_shows(
    answers: Answers, model: str
) -> None:
    (text,) = _texts(returned(answers, model))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", answers[model]["printed"])
    logged = re.findall(r"^\[Neuro Ai\] \d\d:\d\d:\d\d - \[INFO\]: (.*)$", plain, re.M)
    assert logged == ["DEPLOYMENT MODE", "Token successfully authenticated", "Using project: Default"]
    assert plain.splitlines()[-1] == repr([{"generated_text": text}])


def test_remove_input_takes_the_prompt_away_and_the_default_keeps_it(answers: Answers) -> None:
    assert not _texts(returned(answers, "gpt-j"))[0].startswith(PROMPT)
    assert _texts(returned(answers, "gpt-neo"))[0].startswith(PROMPT)
    assert _texts(returned(answers, "with the input"))[0].startswith(PROMPT)


def test_a_model_answers_to_its_own_name(answers: Answers) -> None:
    assert _texts(returned(answers, "named"))[0].startswith(PROMPT)


def test_response_length_counts_new_tokens(answers: Answers) -> None:
    (text,) = _texts(returned(answers, "response_length"))
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)


def test_items_keep_their_order_past_the_tenth(answers: Answers) -> None:
    texts = _texts(returned(answers, "list of eleven"))
    assert [text.startswith(f"Number {number} is") for number, text in enumerate(texts)] == [True] * 11


def test_arrays_and_nested_lists_are_texts_as_well(answers: Answers) -> None:
    two = _texts(returned(answers, "array of two"))
    assert [two[0].startswith("One day"), two[1].startswith("A fox")] == [True, True]
    (one,) = _texts(returned(answers, "nested list"))
    assert one.startswith("One day")


def test_any_option_of_generate_is_taken(answers: Answers) -> None:
    assert _texts(returned(answers, "beams"))[0].startswith(PROMPT)


def test_a_file_of_text_is_a_prompt(answers: Answers) -> None:
    assert _texts(returned(answers, "a file"))[0].startswith(PROMPT)


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("unknown id", "0" * 24),
        ("unknown option", "maximal_length"),
        ("wrong type", "max_length"),
        ("negative penalty", "penalty"),
        ("object array", ""),
        ("numbers", ""),
        ("scripts", "scripts"),
    ],
)
def test_what_is_wrong_is_said(answers: Answers, step: str, names: str) -> None:
    error = raised(answers, step, by="Exception")
    assert "[\x1b[91mERROR\x1b[0m]: Error: " in error["printed"]  # the client prints the body's "error", and raises
    assert names in error["printed"]


def test_a_task_uploads_its_data_runs_and_ends(answers: Answers) -> None:
    assert "Data not found on servers" in answers["not deployed: uploads"]["printed"]
    task = returned(answers, "not deployed: uploads")
    assert task["state"] == "COMPLETE"
    (text,) = _texts(task["result"])
    assert text.startswith(PROMPT)


def test_data_that_is_there_is_not_uploaded_again(answers: Answers) -> None:
    assert "Uploading" not in answers["not deployed: finds its data"]["printed"]
    first, second = (returned(answers, f"not deployed: {step}") for step in ("uploads", "finds its data"))
    assert second["result"] == first["result"]  # greedy
    assert second["id"] != first["id"]


def test_data_of_a_loader_go_in_chunks(answers: Answers) -> None:
    texts = _texts(returned(answers, "not deployed: a loader")["result"])
    assert [text.startswith(begin) for text, begin in zip(texts, ("One day", "A fox", "A bird"), strict=True)] == [
        True
    ] * 3


def test_a_task_may_be_waited_for_later(answers: Answers) -> None:
    task = returned(answers, "not deployed: asynchronous")
    assert [text[:3] for text in _texts(task["result"])] == ["One", "A f"]


def test_a_task_takes_a_model_by_name(answers: Answers) -> None:
    assert _texts(returned(answers, "not deployed: named")["result"])[0].startswith(PROMPT)


@pytest.mark.parametrize("step", ["data by id", "wrong type"])
def test_a_task_that_cannot_be_is_an_error(answers: Answers, step: str) -> None:
    error = raised(answers, f"not deployed: {step}", by="Exception")
    assert "[\x1b[91mERROR\x1b[0m]: Error" in error["printed"]


@pytest.mark.parametrize("step", ["export of a result", "train", "compile by label", "export"])
def test_what_is_not_served_is_refused_in_words(answers: Answers, step: str) -> None:
    error = raised(answers, step, by="Exception")
    assert re.search(r"\[\x1b\[91mERROR\x1b\[0m\]: Error: \S", error["printed"]), error
