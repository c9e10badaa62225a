"""JSON of large answers, written in a thread while the event loop goes on."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

PART = 64  # entries of a list that are written in one call, and the largest table among them


def dumps_in_parts(content: Any, *, ensure_ascii: bool) -> str:
    """What `json.dumps` says, of values whose keys are texts.

    `json.dumps` lets no other thread work before it is done, which may take a second. Here they get their turn between
    the parts.
    """
    dump = json.JSONEncoder(ensure_ascii=ensure_ascii, allow_nan=False, separators=(",", ":")).encode
    parts: list[str] = []

    def write(value: Any) -> None:
        if isinstance(value, dict) and not _is_small(value):
            before = "{"
            for key, one in value.items():
                parts.append(f"{before}{dump(key)}:")
                write(one)
                before = ","
            parts.append("}")
        elif isinstance(value, list) and not _is_small(value):
            write_list(value)
        else:
            parts.append(dump(value))

    def write_list(values: list[Any]) -> None:
        if all(_is_small(value) for value in values):
            for first in range(0, len(values), PART):
                parts.append(("," if first else "[") + dump(values[first : first + PART])[1:-1])
        else:
            for number, value in enumerate(values):
                parts.append("," if number else "[")
                write(value)
        parts.append("]")

    write(content)
    return "".join(parts)


def _is_small(value: Any) -> bool:
    """Whether a value is no list or table, or a short one of such values."""
    if not isinstance(value, dict | list):
        return True
    inside = value.values() if isinstance(value, dict) else value
    return len(value) <= PART and not any(isinstance(one, dict | list) for one in islice(inside, PART))
