"""What `--help` prints is what was written."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from bluejay.cli import app
from bluejay.server.options import ServerOptions

STYLES = ("[bold]", "[/bold]")


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for inner, its in getattr(command, "commands", {}).items():
        yield from _commands(f"{name} {inner}", its)


COMMANDS = dict(_commands("bluejay", typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_brackets_are_lost(name: str) -> None:
    """rich takes [server] for a style, and prints nothing: such are escaped."""
    command = COMMANDS[name]
    texts = [command.help, command.epilog, *(getattr(param, "help", None) for param in command.params)]
    for text in filter(None, texts):
        for style in STYLES:
            text = text.replace(style, "")
        assert Text.from_markup(text).plain == text.replace(r"\[", "[")


def test_the_help_of_serve_names_tables_and_what_holds_without_flags() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "[server], [engine], [models.NAME], [plans.NAME], [filters.NAME]." in " ".join(shown.split())
    assert "names of [models.NAME]; the default model" in shown
    assert "[OPTIONS] [MODEL]..." in shown
    rows = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│ --")}
    for name, field in {"--request-timeout": "request_timeout_s", "--drain": "drain_s"}.items():
        assert f"[default: ({getattr(ServerOptions(), field):g})]" in rows[name]
    for field in ("host", "port", "grpc_port", "max_running", "max_queue"):
        assert f"[default: ({getattr(ServerOptions(), field)})]" in rows["--" + field.replace("_", "-")]
