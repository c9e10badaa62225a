"""`bluejay flagged`: what filters found, for a person to look at."""

from __future__ import annotations

import getpass
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bluejay.cli.accounts import DatabaseOption, open_store

if TYPE_CHECKING:
    from rich.table import Table

    from bluejay.accounts.records import FlaggedRecord

flagged = typer.Typer(no_args_is_help=True, help="Look through what filters found: list, accept, reject, export.")

SHOWN_CHARS = 60  # of a text in the list

Ids = Annotated[
    list[int], typer.Argument(min=1, max=2**63 - 1, metavar="ID…", help="As the list shows them.", show_default=False)
]
Note = Annotated[str | None, typer.Option(help="Why.", show_default=False)]
Reviewer = Annotated[str | None, typer.Option(help="Who says so; you, if none.", show_default=False)]


@flagged.command("list")
def list_flagged(
    status: Annotated[str, typer.Option(help="pending, accepted, rejected or all.")] = "pending",
    after: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Ids above this one.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=500, help="At most so many.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print them whole, as JSON.")] = False,
    database: DatabaseOption = None,
) -> None:
    """List flagged generations, those first that came first.

    [bold]Examples[/bold]

        bluejay flagged list

        bluejay flagged list --status rejected --json
    """
    with open_store(database) as store:
        found = store.list_flagged(None if status == "all" else status, after=after, limit=limit)
    if as_json:
        typer.echo(json.dumps([_as_json(record) for record in found], indent=2, ensure_ascii=False))
    elif found:
        from rich.console import Console

        Console().print(_table(found))
        if len(found) == limit:
            typer.echo(f"there may be more: --after {found[-1].id}", err=True)
    else:
        typer.echo("nothing here; a server keeps what filters find if told --keep-flagged", err=True)


@flagged.command("accept")
def accept(ids: Ids, note: Note = None, reviewer: Reviewer = None, database: DatabaseOption = None) -> None:
    """Say that generations were harmless.

    [bold]Example[/bold]

        bluejay flagged accept 3 4 --note "a quotation"
    """
    _review(ids, "accepted", note, reviewer, database)


@flagged.command("reject")
def reject(ids: Ids, note: Note = None, reviewer: Reviewer = None, database: DatabaseOption = None) -> None:
    """Say that generations should not have been.

    [bold]Example[/bold]

        bluejay flagged reject 5
    """
    _review(ids, "rejected", note, reviewer, database)


@flagged.command("export")
def export(
    output: Annotated[Path | None, typer.Option(help="A file of JSON lines; stdout if none.")] = None,
    status: Annotated[str, typer.Option(help="pending, accepted, rejected or all.")] = "all",
    database: DatabaseOption = None,
) -> None:
    """Write flagged generations out, a line of JSON each.

    [bold]Example[/bold]

        bluejay flagged export --status accepted --output accepted.jsonl
    """
    wanted = None if status == "all" else status
    with open_store(database) as store:
        lines = (json.dumps(_as_json(record), ensure_ascii=False) + "\n" for record in store.export_flagged(wanted))
        if output is None:
            sys.stdout.writelines(lines)
            return
        with output.open("w", encoding="utf-8") as file:
            count = sum(1 for line in lines if file.write(line))
    typer.echo(f"{count} written to {output}", err=True)


def _review(
    ids: list[int], verdict: Literal["accepted", "rejected"], note: str | None, reviewer: str | None, url: str | None
) -> None:
    with open_store(url) as store:
        for number in ids:
            record = store.review_flagged(number, verdict, reviewer=reviewer or _me(), note=note)
            typer.echo(f"{record.id} {record.status} by {record.reviewer}")


def _me() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "somebody"


def _as_json(record: FlaggedRecord) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in vars(record).items()}


def _table(found: list[FlaggedRecord]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("ID", "When", "Model", "Rule", "Action", "Status", "Text", box=None, pad_edge=False)
    for record in found:
        said = " ".join((record.text or record.prompt).split())
        table.add_row(
            str(record.id),
            f"{record.created_at.astimezone():%Y-%m-%d %H:%M}",
            Text(record.model),
            Text(record.rule),
            record.action,
            record.status,
            Text(said[:SHOWN_CHARS]),  # as it is: [red] in it is no colour
        )
    return table
