"""`bluejay projects`: who a server serves and counts together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bluejay.cli.accounts import DatabaseOption, day, open_store, require_plan

if TYPE_CHECKING:
    from rich.table import Table

    from bluejay.accounts.records import ProjectRecord

projects = typer.Typer(no_args_is_help=True, help="Make and list the projects of a server, and choose their plans.")

Project = Annotated[str, typer.Argument(metavar="PROJECT", help="Its name or id.", show_default=False)]


@projects.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Letters, digits, dots, dashes, underscores.", show_default=False)],
    plan: Annotated[str, typer.Option(help="free, developer, premium, or one of the settings file's.")] = "free",
    database: DatabaseOption = None,
) -> None:
    """Make a project. Its keys share the limits of its plan.

    [bold]Examples[/bold]

        bluejay projects create research --plan premium
    """
    require_plan(plan)
    with open_store(database) as store:
        made = store.create_project(name, plan)
    typer.echo(f"project {made.name}, plan {made.plan}; give it a key: bluejay keys create NAME --project {made.name}")


@projects.command("list")
def list_projects(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    database: DatabaseOption = None,
) -> None:
    """List the projects and their plans.

    [bold]Examples[/bold]

        bluejay projects list
    """
    with open_store(database) as store:
        found = store.list_projects()
    if as_json:
        typer.echo(json.dumps([_as_json(project) for project in found], indent=2))
    elif found:
        from rich.console import Console

        Console().print(_table(found))
    else:
        typer.echo("no projects here; make one with: bluejay projects create NAME", err=True)


@projects.command("plan")
def set_plan(
    project: Project,
    plan: Annotated[str, typer.Argument(help="free, developer, premium, or one of the settings file's.")],
    database: DatabaseOption = None,
) -> None:
    """Put a project on another plan.

    [bold]Examples[/bold]

        bluejay projects plan research developer
    """
    require_plan(plan)
    with open_store(database) as store:
        changed = store.set_plan(project, plan)
    typer.echo(f"project {changed.name} is on the plan {changed.plan}")


@projects.command("disable")
def disable(project: Project, database: DatabaseOption = None) -> None:
    """Refuse all keys of a project from now on.

    [bold]Examples[/bold]

        bluejay projects disable research
    """
    with open_store(database) as store:
        changed = store.disable_project(project)
    typer.echo(
        f"project {changed.name} is disabled; its keys are refused until: bluejay projects enable {changed.name}"
    )


@projects.command("enable")
def enable(project: Project, database: DatabaseOption = None) -> None:
    """Take the keys of a project again.

    [bold]Examples[/bold]

        bluejay projects enable research
    """
    with open_store(database) as store:
        changed = store.enable_project(project)
    typer.echo(f"project {changed.name} is enabled")


def _as_json(project: ProjectRecord) -> dict[str, Any]:
    return {
        "id": project.id,
        "name": project.name,
        "plan": project.plan,
        "created_at": project.created_at.isoformat(timespec="seconds"),
        "disabled_at": None if project.disabled_at is None else project.disabled_at.isoformat(timespec="seconds"),
    }


def _table(found: list[ProjectRecord]) -> Table:
    from rich.table import Table

    table = Table("Project", "Plan", "State", "Created", "Id", box=None, pad_edge=False)
    for project in found:
        state = "enabled" if project.disabled_at is None else f"disabled {day(project.disabled_at)}"
        table.add_row(project.name, project.plan, state, day(project.created_at), project.id)
    return table
