"""`bluejay keys`: the API keys of a server."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bluejay.cli.accounts import DatabaseOption, day, open_store, parse_moment

if TYPE_CHECKING:
    from rich.table import Table

    from bluejay.accounts.records import KeyRecord

keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke the API keys of a server.")

DEFAULT_PROJECT = "default"


@keys.command("create")
def create(
    name: Annotated[
        str, typer.Argument(help="What the key is for, such as a person or a program.", show_default=False)
    ],
    project: Annotated[str, typer.Option(help="Name or id of the project that it belongs to.")] = DEFAULT_PROJECT,
    admin: Annotated[bool, typer.Option("--admin", help="Let it use the administrators' routes too.")] = False,
    expires: Annotated[
        str | None, typer.Option(help="A date, or a span such as 12h, 30d, 8w.", show_default="never")
    ] = None,
    database: DatabaseOption = None,
) -> None:
    """Make a key and print it. It is kept as a hash only, so it is shown this once.

    The key goes to stdout, all else to stderr. The project "default" is made if it is not there.

    [bold]Examples[/bold]

        bluejay keys create laptop

        KEY=$(bluejay keys create nightly --project research --expires 30d)

        bluejay keys create operator --admin
    """
    expires_at = None if expires is None else parse_moment(expires, "expires", direction=1)
    scopes = ("user", "admin") if admin else ("user",)
    with open_store(database) as store:
        if project == DEFAULT_PROJECT and store.find_project(project) is None:
            store.create_project(project)
        created = store.create_key(project, name, scopes=scopes, expires_at=expires_at)
    record = created.record
    until = "" if record.expires_at is None else f", valid until {record.expires_at:%Y-%m-%d %H:%M} UTC"
    typer.echo(f"a key for {name} in the project {record.project.name}, plan {record.project.plan}{until}:", err=True)
    typer.echo(created.text)
    typer.echo(
        "Keep it now: it is shown this once and cannot be had again. To use it:\n"
        '  curl -H "Authorization: Bearer $KEY" http://127.0.0.1:8000/v1/models',
        err=True,
    )


@keys.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Name or id of a project.", show_default="all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    database: DatabaseOption = None,
) -> None:
    """List the keys by how they begin; the keys themselves are not kept.

    [bold]Examples[/bold]

        bluejay keys list

        bluejay keys list --project research --json
    """
    with open_store(database) as store:
        found = store.list_keys(project)
    if as_json:
        typer.echo(json.dumps([_as_json(key) for key in found], indent=2))
    elif found:
        from rich.console import Console

        Console().print(_table(found))
    else:
        typer.echo("no keys here; make one with: bluejay keys create NAME", err=True)


@keys.command("revoke")
def revoke(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Its first 11 characters, its id, or all of it.", show_default=False)
    ],
    database: DatabaseOption = None,
) -> None:
    """Refuse a key from now on. There is no way back: make another one instead.

    [bold]Examples[/bold]

        bluejay keys revoke bj-3fK9x_Qa
    """
    with open_store(database) as store:
        revoked = store.revoke_key(key.rstrip("…"))
    typer.echo(f"{revoked.prefix}… ({revoked.name}, project {revoked.project.name}) is revoked")


def _state(key: KeyRecord) -> str:
    if key.revoked_at is not None:
        return "revoked"
    now = datetime.now(UTC)
    if key.expires_at is not None and key.expires_at <= now:
        return "expired"
    return "valid" if key.problem(now) is None else "project disabled"


def _as_json(key: KeyRecord) -> dict[str, Any]:
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at", "last_used_at")}
    return {
        "id": key.id,
        "prefix": key.prefix,
        "name": key.name,
        "project": key.project.name,
        "scopes": list(key.scopes),
        "state": _state(key),
        **{name: None if time is None else time.isoformat(timespec="seconds") for name, time in times.items()},
    }


def _table(found: list[KeyRecord]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("Key", "Name", "Project", "Scopes", "State", "Created", "Expires", "Last used"):
        # A key is revoked by what the first column shows, so that is never cut.
        table.add_column(heading, no_wrap=heading == "Key", overflow="fold")
    for key in found:
        table.add_row(
            key.prefix,
            escape(key.name),
            key.project.name,
            ", ".join(key.scopes),
            _state(key),
            day(key.created_at),
            day(key.expires_at) or "never",
            day(key.last_used_at) or "never",
        )
    return table
