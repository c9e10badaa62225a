"""`tritonclient` against a server, over HTTP and over gRPC."""

import pytest

from .answers import Answers, raised, returned

PROMPT = "Once upon a time"
NOT_FOUND = {"http": "[404]", "grpc": "[StatusCode.NOT_FOUND]"}
INVALID = {"http": "[400]", "grpc": "[StatusCode.INVALID_ARGUMENT]"}


@pytest.fixture(params=["http", "grpc"])
def over(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def answers(run_driver, server, model_name) -> Answers:
    assert server.grpc, "the server serves no gRPC"
    return run_driver("kserve", "triton", server.url, "any-key", model_name, env={"GRPC": server.grpc})


@pytest.mark.parametrize("step", ["live", "ready", "model ready"])
def test_live_and_ready(answers: Answers, over: str, step: str) -> None:
    assert returned(answers, f"{over}: {step}") is True


def test_a_model_that_is_not_there_is_not_ready(answers: Answers, over: str) -> None:
    answer = answers[f"{over}: unknown model ready"]
    assert answer.get("returned") is False or NOT_FOUND["grpc"] in answer["text"], answer


def test_the_server_tells_its_name_and_what_it_can(answers: Answers, over: str) -> None:
    metadata = returned(answers, f"{over}: metadata")
    assert metadata["name"] == "bluejay"
    assert metadata["version"]
    assert "model_repository" in " ".join(metadata["extensions"])


def test_the_model_tells_its_tensors(answers: Answers, over: str, model_name: str) -> None:
    metadata = returned(answers, f"{over}: model metadata")
    assert metadata["name"] == model_name
    assert "BYTES" in [tensor["datatype"] for tensor in metadata["inputs"]]
    assert "BYTES" in [tensor["datatype"] for tensor in metadata["outputs"]]
    error = raised(answers, f"{over}: unknown model's metadata", by="InferenceServerException", saying="no-such-model")
    assert error["text"].startswith(NOT_FOUND[over])


@pytest.mark.parametrize("step", ["model config", "statistics", "index"])
def test_extensions_are_there_or_refused_in_words(answers: Answers, over: str, step: str) -> None:
    """An error without "error" in its body is none that this client can read."""
    answer = answers[f"{over}: {step}"]
    if "returned" not in answer:
        assert answer["raised"] == "InferenceServerException", answer
        assert "an exception occurred in the client" not in answer["text"], answer
        assert answer["text"].startswith(("[404]", "[501]", "[StatusCode.UNIMPLEMENTED]")), answer


def _texts(answers: Answers, step: str) -> list[str]:
    return returned(answers, step)["texts"]


def test_infer(answers: Answers, over: str, model_name: str) -> None:
    answer = returned(answers, f"{over}: infer")
    assert answer["response"]["id"] == "request-1"
    assert answer["response"]["model_name"] == model_name
    assert answer["shape"] == [1]
    assert answer["texts"][0].startswith(PROMPT)


def test_a_text_for_each_element(answers: Answers, over: str) -> None:
    first, second = _texts(answers, f"{over}: infer several")
    assert first == _texts(answers, f"{over}: infer")[0]  # greedy
    assert second.startswith("One day a fox")


def test_http_and_grpc_say_the_same(answers: Answers, over: str) -> None:
    assert _texts(answers, f"{over}: infer") == _texts(answers, "http: infer")


def test_an_output_by_name(answers: Answers, over: str) -> None:
    assert _texts(answers, f"{over}: infer, an output by name")[0].startswith("Once")


def test_texts_are_utf_8(answers: Answers, over: str) -> None:
    assert _texts(answers, f"{over}: infer, a text beyond ASCII")[0].startswith("Füchse 🦊")


def test_a_float_is_a_parameter(answers: Answers, over: str) -> None:
    assert _texts(answers, f"{over}: infer, a float")[0].startswith(PROMPT)


def test_asynchronously(answers: Answers, over: str) -> None:
    assert returned(answers, f"{over}: infer asynchronously")[0].startswith("Once")


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("an output that is not", "no-such-output"),
        ("an input that is not", "no-such-input"),
        ("a wrong datatype", "FP32"),
        ("a wrong option", "max_length"),
        ("an unknown option", "no_such_option"),
    ],
)
def test_what_is_wrong_is_named(answers: Answers, over: str, step: str, names: str) -> None:
    error = raised(answers, f"{over}: infer, {step}", by="InferenceServerException", saying=names)
    assert error["text"].startswith(INVALID[over])


def test_a_model_that_is_not_there_is_not_found(answers: Answers, over: str) -> None:
    error = raised(answers, f"{over}: infer, unknown model", by="InferenceServerException", saying="no-such-model")
    assert error["text"].startswith(NOT_FOUND[over])


def test_a_model_is_unloaded_and_loaded(answers: Answers, over: str) -> None:
    assert returned(answers, f"{over}: unload") is None
    ready = answers[f"{over}: unloaded: ready"]
    assert ready.get("returned") is False or NOT_FOUND["grpc"] in ready["text"], ready
    raised(answers, f"{over}: unloaded: infer", by="InferenceServerException")
    assert returned(answers, f"{over}: load") is None
    assert returned(answers, f"{over}: loaded: ready") is True
    assert _texts(answers, f"{over}: loaded: infer")[0].startswith("Once")


@pytest.mark.parametrize("step", ["unload an unknown model", "load an unknown model"])
def test_only_models_that_are_there_are_loaded(answers: Answers, over: str, step: str) -> None:
    error = raised(answers, f"{over}: {step}", by="InferenceServerException", saying="no-such-model")
    assert error["text"].startswith(NOT_FOUND[over])


@pytest.mark.parametrize("step", ["JSON", "binary in, JSON out", "JSON in, binary out", "a gzipped answer"])
def test_http_bodies_are_json_or_binary(answers: Answers, step: str) -> None:
    """Without a Content-Type, whatever it sends."""
    assert _texts(answers, f"http: infer, {step}")[0].startswith("Once")


@pytest.mark.parametrize("step", ["gzip", "deflate"])
def test_a_compressed_request_is_read_or_refused_by_name(answers: Answers, step: str) -> None:
    answer = answers[f"http: infer, {step}"]
    if "returned" in answer:
        assert answer["returned"]["texts"][0].startswith("Once")
    else:
        raised(answers, f"http: infer, {step}", by="InferenceServerException", saying="Content-Encoding")
