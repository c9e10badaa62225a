"""Which models `bluejay serve` offers: of its command line, of the settings file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from bluejay.cli.serve import _models
from bluejay.errors import ConfigError
from bluejay.settings import Settings

TABLES = {"jay": {"source": "default", "aliases": ["bird"], "defaults": {"max_length": 9}}, "tit": {"source": "/tit"}}


def offered(named: list[str], names: list[str] | None = None, draft: str | None = None) -> list[tuple[Any, ...]]:
    models = _models(named, names or [], TABLES, Settings(), draft)
    return [(one.name, one.source, one.aliases, one.defaults, one.draft) for one in models]


def test_without_a_command_line_all_tables_are_offered() -> None:
    assert offered([]) == [
        ("jay", "default", ("bird",), {"max_length": 9}, None),
        ("tit", "/tit", (), {}, None),
    ]
    with pytest.raises(ConfigError, match="--name and --draft"):
        offered([], draft="ngram")


def test_the_command_line_may_name_tables_beside_paths() -> None:
    assert offered(["jay", "crow=/models/c", "/models/gpt-j-6b"], draft="ngram") == [
        ("jay", "default", ("bird",), {"max_length": 9}, "ngram"),
        ("crow", "/models/c", (), {}, "ngram"),
        ("gpt-j-6b", "/models/gpt-j-6b", (), {}, "ngram"),
    ]
    assert offered(["jay"], ["first", "second"]) == [("first", "default", ("second",), {"max_length": 9}, None)]


def test_tables_that_the_command_line_passes_over_are_told(
    start_server: Callable[..., AbstractContextManager[Any]],
) -> None:
    settings = "[models.jay]\nsource = 'default'\n[models.tit]\nsource = '/nowhere'\n"
    with start_server("jay", settings=settings) as serving, serving.client() as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["jay"]
    assert "The settings file has models that the command line does not name: tit" in serving.log
