"""lm-eval's `local-completions` against a server: its scores are the engine's own."""

import json
from pathlib import Path

import pytest

import bluejay

from .answers import Answers, returned

MODEL = Path(bluejay.__file__).parent / "default_model"


@pytest.fixture(scope="module")
def answers(run_driver, server, model_name) -> Answers:
    context = json.loads((MODEL / "config.json").read_text())["n_positions"]
    return run_driver("lm-eval", "lm_eval_client", server.url, "any-key", model_name, str(MODEL), str(context))


@pytest.fixture(scope="module")
def llm() -> bluejay.LLM:
    return bluejay.LLM()


@pytest.mark.parametrize(
    "step",
    [
        "loglikelihood",
        "loglikelihood in batches",
        "loglikelihood concurrently",
        "loglikelihood as texts",
        "loglikelihood, the server's tokenizer",
        "loglikelihood, a tokenizer found",
    ],
)
def test_log_likelihoods_are_the_engines(answers: Answers, llm: bluejay.LLM, step: str) -> None:
    scores = llm.score([tuple(pair) for pair in returned(answers, "pairs")])
    assert [value for value, _ in returned(answers, step)] == pytest.approx(
        [score.logprob for score in scores], abs=2e-3
    )
    assert [greedy for _, greedy in returned(answers, step)] == [score.is_greedy for score in scores]


def test_rolling_log_likelihoods_are_the_engines(answers: Answers, llm: bluejay.LLM) -> None:
    (score,) = llm.score([("", returned(answers, "texts")[0])])
    short, long = returned(answers, "rolling")
    assert short == pytest.approx(score.logprob, abs=2e-3)
    assert long < short  # a text of several windows
    assert returned(answers, "rolling, the server's tokenizer") == pytest.approx([short, long], abs=2e-2)


def test_generated_texts_are_greedy_and_end_before_their_stop(answers: Answers, llm: bluejay.LLM) -> None:
    contexts = [context for context, _ in returned(answers, "pairs") if context]
    params = bluejay.SamplingParams(max_new_tokens=12, stop=["\n\n", "<|endoftext|>"])
    expected = [output.text for output in llm.generate(contexts, params)]
    assert returned(answers, "generate") == expected
    assert returned(answers, "generate as texts") == expected
    assert returned(answers, "generate in batches") == expected


def test_what_is_generated_greedily_is_greedy(answers: Answers, llm: bluejay.LLM) -> None:
    for own in returned(answers, "greedy"):
        (score,) = llm.score([tuple(own["pair"])])
        value, greedy = own["answer"]
        assert (value, greedy) == (pytest.approx(score.logprob, abs=2e-3), score.is_greedy)
    assert any(own["answer"][1] for own in returned(answers, "greedy"))


def test_a_task_is_evaluated_over_the_api(answers: Answers) -> None:
    assert returned(answers, "evaluate") == {"acc": 1.0, "of": 2}
