"""lm-eval's `local-completions`. argv: URL, API key, model name, a folder with its tokenizer, its context in tokens.

lm-eval sends contexts and continuations as one prompt with `echo`, one token to generate and one log-probability, reads
the log-probabilities of the continuation, and calls it greedy where each is the same float as the greatest beside it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from steps import Steps

URL, KEY, MODEL, TOKENIZER, CONTEXT = sys.argv[1:]
os.environ.update(OPENAI_API_KEY=KEY, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

PAIRS = [
    ("Once upon a time", " there was a little girl"),
    ("Once upon a time", " granite seventeen"),
    ("The fox said: ", "hello"),  # a space at the end of a context becomes the continuation's
    ("", "One day, Tom went to the park."),
    ("Once upon a time there was a bird. " * 20, "The bird was happy."),
]
TEXTS = ["Once upon a time there was a blue jay who liked to sing.", "Tom and Sam went to the park. " * 200]

steps = Steps()


def opened(**options):
    base = {"tokenizer": TOKENIZER, "tokenizer_backend": "huggingface", "max_length": int(CONTEXT), "max_retries": 1}
    return LocalCompletionsAPI(base_url=f"{URL}/v1/completions", model=MODEL, **{**base, **options})


def asked(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=arguments_of_one, idx=index)
        for index, arguments_of_one in enumerate(arguments)
    ]


def likelihoods(**options):
    return opened(**options).loglikelihood(asked("loglikelihood", PAIRS))


def rolling(**options):
    return opened(**options).loglikelihood_rolling(asked("loglikelihood_rolling", [(text,) for text in TEXTS]))


def generated(**options):
    wanted = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    return opened(**options).generate_until(
        asked("generate_until", [(context, wanted) for context, _ in PAIRS if context])
    )


steps.run("pairs", lambda: PAIRS)
steps.run("texts", lambda: TEXTS)
steps.run("loglikelihood", likelihoods)
steps.run("loglikelihood in batches", lambda: likelihoods(batch_size=4))
steps.run("loglikelihood concurrently", lambda: likelihoods(num_concurrent=4))
steps.run("loglikelihood as texts", lambda: likelihoods(tokenized_requests=False))
steps.run("loglikelihood, the server's tokenizer", lambda: likelihoods(tokenizer=None, tokenizer_backend="remote"))
steps.run(
    "loglikelihood, a tokenizer found", lambda: likelihoods(tokenizer=None, tokenizer_backend="auto", auth_token=KEY)
)
steps.run("rolling", rolling)
steps.run("rolling, the server's tokenizer", lambda: rolling(tokenizer=None, tokenizer_backend="remote"))
continuations = steps.run("generate", generated)
steps.run("generate as texts", lambda: generated(tokenized_requests=False))
steps.run("generate in batches", lambda: generated(batch_size=4))


def of_its_own():
    """What greedy decoding says is greedy."""
    pairs = [
        (context, said) for (context, _), said in zip([pair for pair in PAIRS if pair[0]], continuations, strict=True)
    ]
    return [{"pair": pair, "answer": opened().loglikelihood(asked("loglikelihood", [pair]))[0]} for pair in pairs]


steps.run("greedy", of_its_own)

TASK = """
task: choices_of_this_test
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def evaluated():
    """As users evaluate: a task of a file, by name, over the API."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "choices.jsonl")
        lines = [
            {"context": "Once upon a", "choices": ["time", "granite"], "answer": 0},
            {"context": "She was very happy and", "choices": ["seventeen", "smiled"], "answer": 1},
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        Path(folder, "task.yaml").write_text(TASK.format(file=file))
        manager = TaskManager(include_path=folder, include_defaults=False)
        results = lm_eval.simple_evaluate(
            opened(), tasks=["choices_of_this_test"], task_manager=manager, bootstrap_iters=0
        )
        return {"acc": results["results"]["choices_of_this_test"]["acc,none"], "of": len(lines)}


steps.run("evaluate", evaluated)
steps.finish()
