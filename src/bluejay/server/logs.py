"""Structured logs: a line of JSON each for machines, a readable one for people; prompts and answers are in neither.

What a caller sent can be quoted by an exception's message, so of exceptions the log has the place and the class. At the
level DEBUG it has the message too.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from typing import Any

import structlog

from bluejay.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
Event = MutableMapping[str, Any]


def set_up_logs(*, as_json: bool, level: str = "INFO") -> None:
    """Send everything that is logged in this process to stderr, once; Python's warnings too.

    Raises: ConfigError if there is no such level.
    """
    level = level.upper()
    if level not in LEVELS:
        raise ConfigError(f"log level is {level[:40]!r}, expected one of {', '.join(LEVELS)}")
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_colours,
        structlog.processors.format_exc_info if level == "DEBUG" else _place_of_exception,
    ]
    # Of its own accord structlog would show the local variables of each frame.
    for_people = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    last = structlog.processors.JSONRenderer() if as_json else for_people
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last]
        )
    )
    # gRPC's C library reads this when it is loaded; its own lines would be neither JSON nor news: it raises as well.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    for name in ("alembic", "uvicorn.error"):
        logging.getLogger(name).setLevel("WARNING")
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # `Call` logs requests, with their ids
    if level != "DEBUG":
        logging.getLogger("asyncio").filters[:] = [_first_line]


def _without_colours(_logger: Any, _method: str, event: Event) -> Event:
    """Uvicorn says some things twice, once with colours."""
    event.pop("color_message", None)
    return event


def _first_line(record: logging.LogRecord) -> bool:
    """Further lines of asyncio's show tasks, and with them the messages of their exceptions."""
    record.msg, record.args = record.getMessage().partition("\n")[0], ()
    return True


def _place_of_exception(_logger: Any, _method: str, event: Event) -> Event:
    """An exception as the lines of the program that it went through, and its class."""
    found = event.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        event["exception"] = "\n".join(_told(error, set()))
    return event


def _told(error: BaseException, seen: set[int]) -> Iterator[str]:
    """What came before it first, as Python shows them."""
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _told(before, seen)
        yield ""
    yield from (line.rstrip("\n") for line in traceback.format_tb(error.__traceback__))
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _told(one, seen)
    yield type(error).__qualname__
