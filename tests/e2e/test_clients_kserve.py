"""The `kserve` 0.21 package's clients against a server: V1, V2 and gRPC."""

import pytest

from .answers import Answers, raised, returned

PROMPT = "Once upon a time"
UNICORNS = "In a shocking finding, scientist discovered a herd of unicorns"


@pytest.fixture(scope="module")
def answers(run_driver, server, model_name) -> Answers:
    assert server.grpc, "the server serves no gRPC"
    return run_driver("kserve", "kserve_client", server.url, "any-key", model_name, env={"GRPC": server.grpc})


def _texts(predictions) -> list[str]:
    assert all(set(item) == {"generated_text"} for item in predictions), predictions
    return [item["generated_text"] for item in predictions]


@pytest.mark.parametrize("step", ["live", "model ready", "documented model ready"])
def test_v1_is_alive_and_ready(answers: Answers, step: str) -> None:
    assert returned(answers, f"v1: {step}") is True


def test_v1_one_instance_gives_a_flat_list(answers: Answers) -> None:
    (text,) = _texts(returned(answers, "v1: one instance")["predictions"])
    assert text.startswith(UNICORNS)


def test_v1_several_instances_give_a_list_each(answers: Answers) -> None:
    first, second = returned(answers, "v1: several")["predictions"]
    assert _texts(first)[0].startswith(PROMPT)
    assert _texts(second)[0].startswith("One day a fox")


@pytest.mark.parametrize("step", ["by name", "upper case", "every parameter"])
def test_v1_parameters_may_be_left_out_and_be_in_any_case(answers: Answers, step: str) -> None:
    (text,) = _texts(returned(answers, f"v1: {step}")["predictions"])
    assert text.startswith(PROMPT)


@pytest.mark.parametrize("step", ["unknown model ready", "unknown model"])
def test_v1_a_model_that_is_not_there(answers: Answers, step: str) -> None:
    raised(answers, f"v1: {step}", by="HTTPStatusError", saying="Model with name no-such-model does not exist., '404 ")


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("no instances", "instances"),
        ("instances that are no list", "instances"),
        ("no instance", "instances"),
        ("an instance that is no text", "instances"),
        ("a type that is none", "max_length"),
        ("a negative length", "max_length"),
        ("unknown parameter", "no_such"),
    ],
)
def test_v1_what_is_wrong_is_named(answers: Answers, step: str, names: str) -> None:
    error = raised(answers, f"v1: {step}", by="HTTPStatusError", saying=names)
    assert "'400 Bad Request'" in error["text"]


def test_v1_explains_nothing(answers: Answers) -> None:
    raised(answers, "v1: explain", by="HTTPStatusError", saying="'501 Not Implemented'")


@pytest.mark.parametrize("step", ["live", "ready", "model ready"])
def test_v2_is_live_and_ready(answers: Answers, step: str) -> None:
    assert returned(answers, f"v2: {step}") is True


def test_v2_a_model_that_is_not_there_is_not_ready(answers: Answers) -> None:
    assert returned(answers, "v2: unknown model ready") is False


def _only(answer, model_name: str):
    """The texts of the one output, where the answer is as it must be."""
    assert answer["model_name"] == model_name
    (output,) = [output for output in answer["outputs"] if output["datatype"] == "BYTES"][:1]
    assert len(output["data"]) == _size(output["shape"])
    return output


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


@pytest.mark.parametrize(
    "step", ["infer", "infer, binary in", "infer, binary in and out", "infer, an output asked for"]
)
def test_v2_tensors_are_json_or_binary(answers: Answers, model_name: str, step: str) -> None:
    answer = returned(answers, f"v2: {step}")
    output = _only(answer, model_name)
    assert answer["id"] == "request-1"
    assert output["shape"] == [1]
    assert output["data"][0].startswith(PROMPT)
    assert output["data"] == _only(returned(answers, "v2: infer"), model_name)["data"]  # greedy


def test_v2_a_text_for_each_element(answers: Answers, model_name: str) -> None:
    output = _only(returned(answers, "v2: infer several"), model_name)
    assert output["shape"] == [2]
    assert [output["data"][0].startswith(PROMPT), output["data"][1].startswith("One day a fox")] == [True, True]
    output = _only(returned(answers, "v2: infer in two dimensions"), model_name)
    assert output["shape"] == [2, 1]


def test_v2_texts_are_utf_8(answers: Answers, model_name: str) -> None:
    assert _only(returned(answers, "v2: infer, a text beyond ASCII"), model_name)["data"][0].startswith("Füchse 🦊")


def test_v2_a_dict_is_a_request_as_well(answers: Answers, model_name: str) -> None:
    answer = returned(answers, "v2: infer, a dict")
    assert _only(answer, model_name)["data"][0].startswith("One")


def test_v2_a_model_that_is_not_there_is_not_found(answers: Answers) -> None:
    error = raised(answers, "v2: infer, unknown model", by="HTTPStatusError", saying="no-such-model")
    assert "'404 Not Found'" in error["text"]


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("an output that is not", "no-such-output"),
        ("a wrong shape", "shape"),
        ("a wrong datatype", "FP32"),
        ("nothing", "inputs"),
        ("a wrong option", "max_length"),
    ],
)
def test_v2_what_is_wrong_is_named(answers: Answers, step: str, names: str) -> None:
    error = raised(answers, f"v2: infer, {step}", by="HTTPStatusError", saying=names)
    assert "'400 Bad Request'" in error["text"] or "'422 Unprocessable" in error["text"]


@pytest.mark.parametrize("step", ["live", "ready", "model ready"])
def test_grpc_is_live_and_ready(answers: Answers, step: str) -> None:
    assert returned(answers, f"grpc: {step}") is True


@pytest.mark.parametrize("step", ["infer", "infer raw"])
def test_grpc_says_what_rest_says(answers: Answers, model_name: str, step: str) -> None:
    answer = returned(answers, f"grpc: {step}")
    assert answer["id"] == "request-1"
    assert _only(answer, model_name)["data"] == _only(returned(answers, "v2: infer"), model_name)["data"]


def test_grpc_a_text_for_each_element(answers: Answers, model_name: str) -> None:
    output = _only(returned(answers, "grpc: infer several"), model_name)
    assert output["data"] == _only(returned(answers, "v2: infer several"), model_name)["data"]


def test_grpc_floats_are_the_clients_own_limit(answers: Answers) -> None:
    """It raises before it sends anything: a float travels as a string."""
    raised(answers, "grpc: infer, a float", by="InvalidInput")


@pytest.mark.parametrize("step", ["unknown model ready", "infer, unknown model"])
def test_grpc_a_model_that_is_not_there_is_not_found(answers: Answers, step: str) -> None:
    error = raised(answers, f"grpc: {step}", by="RpcError", saying="no-such-model")
    assert "StatusCode.NOT_FOUND" in error["text"]


def test_grpc_what_is_wrong_is_named(answers: Answers) -> None:
    error = raised(answers, "grpc: infer, a wrong option", by="RpcError", saying="max_length")
    assert "StatusCode.INVALID_ARGUMENT" in error["text"]
