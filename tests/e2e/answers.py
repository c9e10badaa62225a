"""Reading what a driver's steps returned or raised."""

from __future__ import annotations

from typing import Any

Answers = dict[str, dict[str, Any]]


def returned(answers: Answers, step: str) -> Any:
    """What a step returned; fails with what it raised."""
    assert "returned" in answers[step], f"{step}: {answers[step]}"
    return answers[step]["returned"]


def raised(answers: Answers, step: str, *, by: str, saying: str = "") -> dict[str, Any]:
    """What a step raised: an error of class `by`, or of one below it, with `saying` in its text, whatever the case."""
    answer = answers[step]
    assert by in [answer.get("raised"), *answer.get("bases", [])], f"{step}: {answer}"
    assert saying.lower() in answer["text"].lower(), f"{step}: {answer}"
    return answer
