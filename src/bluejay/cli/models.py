"""`bluejay models`: the models on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from bluejay.checkpoints.hub import CachedModel

models = typer.Typer(invoke_without_command=True)

Name = Annotated[str, typer.Argument(help=r'OWNER/NAME\[@REVISION], "default" or "default-draft".', show_default=False)]
Revision = Annotated[str | None, typer.Option(help="A branch, a tag or a commit.", show_default=False)]


@models.callback()
def list_models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON, sizes in bytes.")] = False,
) -> None:
    """List the models on this machine; check or remove one of them.

    [bold]Examples[/bold]

        bluejay models

        bluejay models verify gpt-neo-125m

        bluejay models rm gpt-j-6b@float16
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise typer.BadParameter(f"belongs to the list, not to {context.invoked_subcommand}", param_hint="--json")
        return
    from rich.console import Console

    from bluejay.checkpoints import hub

    found = hub.list_models()
    if as_json:
        typer.echo(json.dumps([_as_json(model) for model in found], indent=2))
    elif found:
        Console().print(_table(found))
    else:
        typer.echo("no models here; get one with: bluejay pull gpt-neo-125m", err=True)


@models.command("verify")
def verify(name: Name, revision: Revision = None) -> None:
    """Read every file of a model and compare it with its hash.

    [bold]Examples[/bold]

        bluejay models verify default

        bluejay models verify EleutherAI/gpt-j-6b --revision float16
    """
    from bluejay.checkpoints import hub
    from bluejay.checkpoints.hub_cache import PACKAGED
    from bluejay.errors import CheckpointError

    result = hub.verify(name, revision)
    for file in result.unchecked:
        typer.echo(f"{file}: no hash is known, not checked", err=True)
    if result.damaged:
        remedy = f"bluejay models rm {name}, then bluejay pull {name}"
        raise CheckpointError(
            "\n  ".join(
                [
                    f"{name} is damaged, in {result.path}:",
                    *(f"{file.name}: {file.problem}" for file in result.damaged),
                    f"to repair it: {'install Bluejay again' if name in PACKAGED else remedy}",
                ]
            )
        )
    typer.echo(f"{name}: {result.num_checked} files, all of them intact")


@models.command("rm")
def rm(
    name: Name,
    revision: Revision = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the cache: all its revisions, or the one that is named.

    [bold]Examples[/bold]

        bluejay models rm gpt-neo-125m

        bluejay models rm gpt-j-6b@float16 --yes
    """
    from rich.filesize import decimal

    from bluejay.checkpoints import hub

    size = decimal(hub.remove(name, revision, dry_run=True))
    if not yes:
        typer.confirm(f"Remove {name} ({size})?", abort=True)
    hub.remove(name, revision)
    typer.echo(f"{name} removed, {size} freed")


def _as_json(model: CachedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "revision": model.revision,
        "path": str(model.path),
        "size_bytes": model.size_bytes,
        "family": model.family,
        "format": model.format,
        "quantization": model.quantization,
        "last_used": None if model.last_used is None else model.last_used.isoformat(timespec="seconds"),
    }


def _shortened(revision: str | None) -> str:
    """A commit by its first characters, anything else whole."""
    if revision is None:
        return ""
    return revision[:12] if len(revision) == 40 else revision


def _table(found: list[CachedModel]) -> Table:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table("Name", "Revision", "Family", "Weights", box=None, pad_edge=False)
    table.add_column("Size", justify="right")
    table.add_column("Last used")
    for model in found:
        table.add_row(
            model.name,
            _shortened(model.revision),
            model.family,
            " ".join(filter(None, (model.format or "incomplete", model.quantization))),
            decimal(model.size_bytes),
            "" if model.last_used is None else f"{model.last_used.astimezone():%Y-%m-%d}",
        )
    return table
