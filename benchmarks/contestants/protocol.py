"""What a contestant is: a process that answers one JSON object a line, and does nothing between questions.

    -> {"call": "prepare"}                                      make or load the weights, run once
    <- {"ok": {"version": "4.8.5", "threads": 2, …}}
    -> {"call": "decode", "batch": 8, "prompt": 32, "steps": 16}
    <- {"ok": {"seconds": 0.131}}                               of one step
    -> {"call": "prefill", "tokens": 512}
    <- {"ok": {"seconds": 2.7}}                                 of the whole prompt, to its first new token

This module runs in the rivals' environments: it knows the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Answer = dict[str, Any]


def arguments() -> dict[str, Any]:
    """The JSON object on the command line: which variant, how many layers, how many threads."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def step_seconds(generate: Callable[[int, int, int], float], batch: int, prompt: int, steps: int) -> float:
    """Seconds of one step of decoding, out of the difference of two lengths: prompts and the cost of a call drop out.

    Args:
        generate: seconds for so many rows, tokens of each prompt, and new tokens.
    """
    # A contestant that was just woken has cold caches and sleeping threads. That would lengthen the short run only,
    # and what is too much in it is missing in the difference: so one run comes first that does not count.
    generate(batch, prompt, 2)
    short = generate(batch, prompt, 1)
    return (generate(batch, prompt, 1 + steps) - short) / steps


def serve(calls: Mapping[str, Callable[..., Answer]]) -> None:
    """Answer until stdin ends."""
    # Whatever a library prints must not mix with the answers: they go to a copy of stdout, and stdout joins stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer: Answer = {"ok": calls[question.pop("call")](**question)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
