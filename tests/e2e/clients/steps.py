"""What the drivers share: run one call of a client after the other, and print what they returned as one JSON document.

Drivers run in their clients' environments and import nothing of Bluejay.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from typing import Any


class Steps:
    """The calls of one driver by name: `{"returned": …}`, or `{"raised": class, "bases": classes, "text": …, …}`."""

    def __init__(self) -> None:
        self._done: dict[str, dict[str, Any]] = {}

    def run(self, name: str, call: Callable[[], Any]) -> Any:
        """Call; what it prints is kept beside what it returns. Returns that, or None where it raised."""
        assert name not in self._done, name
        returned, printed = None, io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                returned = call()
                answer = {"returned": plain(returned)}
            except Exception as error:
                answer = {
                    "raised": type(error).__name__,
                    "bases": [base.__name__ for base in type(error).__mro__[1:-2]],
                    "text": str(error),
                    **{key: plain(value) for key, value in vars(error).items() if key in _TELLING},
                }
        self._done[name] = {**answer, **({"printed": printed.getvalue()} if printed.getvalue() else {})}
        return returned

    def finish(self) -> None:
        json.dump(self._done, sys.stdout)


_TELLING = {"status_code", "code", "param", "type", "body", "error_response", "reason", "status"}


def plain(value: Any) -> Any:
    """Values of clients (pydantic models, bytes, arrays, tuples) as JSON has them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):  # pydantic
        return plain(value.model_dump())
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return repr(value)
