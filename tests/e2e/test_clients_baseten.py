"""Baseten's 0.13.1 against a server: routes without an envelope, asynchronous requests."""

import pytest

from .answers import Answers, raised, returned

PROMPT = "If I was a billionaire, I would"
PLACES = ["production", "development", "environment", "deployment", "regional"]


@pytest.fixture(scope="module")
def answers(run_driver, server, model_name) -> Answers:
    return run_driver("baseten", "baseten_new", server.url, "any-key", model_name)


def _succeeded(answer) -> str:
    assert set(answer) == {"status", "data", "message"}, answer
    assert answer["status"] == "success", answer
    return answer["data"]


@pytest.mark.parametrize("step", [*PLACES, "beams", "below a model's path"])
def test_the_answer_is_the_models_output_alone(answers: Answers, step: str) -> None:
    assert _succeeded(returned(answers, step)).startswith(PROMPT)


def test_every_place_is_the_same_model(answers: Answers) -> None:
    assert len({_succeeded(returned(answers, place)) for place in PLACES}) == 1  # greedy is the default


def test_the_asynchronous_client_is_answered_as_well(answers: Answers) -> None:
    assert [_succeeded(answer) for answer in returned(answers, "asynchronous client")] == [
        _succeeded(returned(answers, "production"))
    ] * 4


@pytest.mark.parametrize("step", ["raw", "raw, as octets"])
def test_raw_answers_are_json(answers: Answers, step: str) -> None:
    answer = returned(answers, step)
    assert answer["status"] == 200
    assert PROMPT in answer["body"]


@pytest.mark.parametrize(("step", "names"), [("no prompt", "prompt"), ("a type that is none", "max_length")])
def test_a_wrong_input_is_an_error_that_names_it(answers: Answers, step: str, names: str) -> None:
    error = raised(answers, step, by="ResponseErrorResponse", saying=names)
    assert error["status_code"] == 400
    assert error["error_response"]["error_code"] == "client_error"


def test_limits_clamp_and_the_message_says_so(answers: Answers) -> None:
    answer = returned(answers, "over the limits")
    assert _succeeded(answer).startswith(PROMPT)
    assert "512" in answer["message"]


@pytest.mark.parametrize("place", PLACES)
def test_an_asynchronous_request_is_followed_to_its_end(answers: Answers, place: str) -> None:
    answer = returned(answers, f"async: {place}")
    last = answer["last"]
    assert last["request_id"] == answer["request_id"]
    assert last["status"] == "SUCCEEDED"
    assert set(answer["seen"]) <= {"QUEUED", "IN_PROGRESS", "SUCCEEDED"}
    assert last["webhook_status"] == "NO_WEBHOOK_PROVIDED"
    assert last["errors"] == []
    assert last["created_at"] <= last["status_at"]


def test_a_webhook_is_refused_by_name(answers: Answers) -> None:
    """The server opens no connections of its own."""
    error = raised(answers, "async: a webhook", by="ResponseErrorResponse", saying="webhook_endpoint")
    assert error["status_code"] == 400
    assert error["error_response"]["error_code"] == "client_error"


def test_an_asynchronous_request_without_a_prompt_is_refused_at_once(answers: Answers) -> None:
    error = raised(answers, "async: no prompt", by="ResponseErrorResponse", saying="prompt")
    assert error["status_code"] == 400
    assert error["error_response"]["error_code"] == "client_error"


def test_cancelling_answers_whether_it_came_in_time(answers: Answers) -> None:
    answer = returned(answers, "async: cancel")
    assert answer["answer"]["request_id"] == answer["request_id"]
    assert isinstance(answer["answer"]["canceled"], bool)
    assert answer["answer"]["message"]


@pytest.mark.parametrize("step", ["async: cancel one that is not", "async: status of one that is not"])
def test_a_request_that_is_not_there_is_not_found(answers: Answers, step: str) -> None:
    assert raised(answers, step, by="ResponseError", saying="no-such-request")["status_code"] == 404


@pytest.mark.parametrize("place", PLACES)
def test_the_queue_is_counted(answers: Answers, place: str) -> None:
    answer = returned(answers, f"queue: {place}")
    assert answer["num_queued_requests"] >= 0
    assert answer["num_in_progress_requests"] >= 0
    assert answer["model_id"]
    assert answer["deployment_id"]


@pytest.mark.parametrize("place", PLACES)
def test_waking_is_accepted(answers: Answers, place: str) -> None:
    assert returned(answers, f"wake: {place}") is None


def test_the_name_of_an_environment_may_have_a_space(answers: Answers) -> None:
    assert _succeeded(returned(answers, "a space in a name")).startswith(PROMPT)
