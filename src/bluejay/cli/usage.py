"""`bluejay usage`: what requests took."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bluejay.cli.accounts import DatabaseOption, open_store, parse_moment

if TYPE_CHECKING:
    from rich.table import Table

    from bluejay.accounts.records import UsageTotal


class By(StrEnum):
    """What to add up by."""

    PROJECT = "project"
    KEY = "key"
    MODEL = "model"
    DAY = "day"


def usage(
    by: Annotated[By, typer.Option(help="What to add up by. Days are those of UTC.")] = By.PROJECT,
    project: Annotated[str | None, typer.Option(help="Name or id of one project.", show_default="all")] = None,
    since: Annotated[
        str | None, typer.Option(help="A date or time in UTC, or a span such as 12h, 7d.", show_default="ever")
    ] = None,
    until: Annotated[str | None, typer.Option(help="As --since; not included.", show_default="now")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    database: DatabaseOption = None,
) -> None:
    """Add up what requests took: tokens of prompts, those of them that were cached, tokens generated.

    [bold]Examples[/bold]

        bluejay usage

        bluejay usage --by day --project research --since 30d

        bluejay usage --by key --since 2026-01-01 --until 2026-02-01 --json
    """
    begin = None if since is None else parse_moment(since, "since", direction=-1)
    end = None if until is None else parse_moment(until, "until", direction=-1)
    with open_store(database) as store:
        totals = store.usage_totals(by.value, project=project, since=begin, until=end)
    if as_json:
        typer.echo(json.dumps([_as_json(by, total) for total in totals], indent=2))
    elif totals:
        from rich.console import Console

        Console().print(_table(by, totals))
    else:
        typer.echo("no usage in that time", err=True)


def _as_json(by: By, total: UsageTotal) -> dict[str, Any]:
    counts = {name: value for name, value in vars(total).items() if name != "group"}
    return {by.value: total.group, **counts, "num_tokens": total.num_tokens}


def _table(by: By, totals: list[UsageTotal]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(by.value.capitalize(), box=None, pad_edge=False, show_footer=len(totals) > 1)
    table.columns[0].footer = "all"
    for heading, name in (
        ("Requests", "num_requests"),
        ("Prompt tokens", "prompt_tokens"),
        ("of them cached", "cached_tokens"),
        ("Generated", "generated_tokens"),
        ("Tokens", "num_tokens"),
    ):
        table.add_column(heading, f"{sum(getattr(total, name) for total in totals):,}", justify="right")
    for total in totals:
        counts = (
            total.num_requests,
            total.prompt_tokens,
            total.cached_tokens,
            total.generated_tokens,
            total.num_tokens,
        )
        label = "(without a key)" if total.group is None else escape(total.group)
        table.add_row(label, *(f"{count:,}" for count in counts))
    return table
