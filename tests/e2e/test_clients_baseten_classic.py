"""Baseten's 0.8.2, the client of the document, against a server."""

import pytest

from .answers import Answers, raised, returned

PROMPT = "If I was a billionaire, I would"


@pytest.fixture(scope="module")
def answers(run_driver, server, model_name) -> Answers:
    return run_driver("baseten-classic", "baseten_classic", server.url, "any-key", model_name)


def _succeeded(answer) -> str:
    assert set(answer) == {"status", "data", "message"}, answer
    assert answer["status"] == "success", answer
    return answer["data"]


@pytest.mark.parametrize(
    "step",
    [
        "documented",
        "a version",
        "a version's id as a model's",
        "by name",
        "a dict",
        "defaults",
        "every parameter",
        "sampled",
    ],
)
def test_one_input_gives_one_result_that_begins_with_the_prompt(answers: Answers, step: str) -> None:
    assert _succeeded(returned(answers, step)).startswith(PROMPT)


def test_greedy_is_the_default(answers: Answers) -> None:
    assert returned(answers, "documented") == returned(answers, "a version")


def test_the_message_is_null_where_there_is_nothing_to_say(answers: Answers) -> None:
    assert returned(answers, "documented")["message"] is None


def test_several_inputs_give_as_many_results(answers: Answers) -> None:
    first, second = returned(answers, "several")
    assert _succeeded(first).startswith(PROMPT)
    assert _succeeded(second).startswith("One day")


def test_limits_clamp_and_the_message_says_so(answers: Answers) -> None:
    answer = returned(answers, "over the limits")
    assert _succeeded(answer).startswith(PROMPT)
    assert "512" in answer["message"]
    assert "64" in answer["message"]


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("no prompt", "prompt"),
        ("a prompt that is none", "prompt"),
        ("a type that is none", "max_length"),
        ("groups that do not divide", "num_beam_groups"),
    ],
)
def test_a_wrong_input_has_failed_and_says_why(answers: Answers, step: str, names: str) -> None:
    answer = returned(answers, step)
    assert (answer["status"], answer["data"]) == ("failed", None)
    assert names in answer["message"]


@pytest.mark.parametrize("step", ["nothing", "no object"])
def test_an_input_that_is_none_has_failed(answers: Answers, step: str) -> None:
    answer = returned(answers, step)
    assert (answer["status"], answer["data"]) == ("failed", None)
    assert answer["message"]


def test_an_error_of_http_is_an_api_error_with_the_servers_words(answers: Answers) -> None:
    raised(answers, "a path that is none", by="ApiError", saying="<Server response: ")


def test_deploying_is_not_served(answers: Answers) -> None:
    assert answers["summary"]["raised"] in ("ApiError", "HTTPError"), answers["summary"]


def test_the_client_was_never_told_to_come_again(answers: Answers) -> None:
    assert [line for line in returned(answers, "log") if "Failed to invoke" in line] == []
