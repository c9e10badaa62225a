"""The `bluejay` command: one file per verb, errors and exit codes in one place.

Exit codes: 0 done · 1 failed · 2 wrong option or value · 130 interrupted.
Torch takes a second to import, so verbs import what they need when they run: `--help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from bluejay import __version__
from bluejay.cli.bench import bench
from bluejay.cli.convert import convert
from bluejay.cli.flagged import flagged
from bluejay.cli.generate import generate
from bluejay.cli.info import info
from bluejay.cli.inspect import inspect
from bluejay.cli.keys import keys
from bluejay.cli.models import models
from bluejay.cli.perplexity import perplexity
from bluejay.cli.projects import projects
from bluejay.cli.pull import pull
from bluejay.cli.serve import serve
from bluejay.cli.train import train
from bluejay.cli.usage import usage
from bluejay.errors import BluejayError, ConfigError, RequestError

app = typer.Typer(
    name="bluejay",
    help="GPT-J and GPT-Neo on hardware you own: open any checkpoint, generate, serve, convert, train.",
    epilog='Try: bluejay generate "Once upon a time"',
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(serve)
app.add_typer(flagged, name="flagged")
app.command()(pull)
app.add_typer(models, name="models")
app.command()(inspect)
app.command()(convert)
app.command()(train)
app.command()(perplexity)
app.command()(info)
app.add_typer(bench, name="bench")
app.add_typer(projects, name="projects")
app.add_typer(keys, name="keys")
app.command()(usage)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"bluejay {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a `BluejayError`, and what the machine lacks, become one line on stderr and an exit code.

    Typer itself sees to Ctrl-C (130) and to a reader that left (1).
    """
    warnings.showwarning = _show_warning
    try:
        app()
    except BluejayError as error:
        _fail(str(error), 2 if isinstance(error, ConfigError | RequestError) else 1)
    except (MemoryError, OSError, RuntimeError) as error:
        if _is_out_of_memory(error):
            first = (str(error).splitlines() or [""])[0]
            _fail(f"out of memory; ask for fewer or shorter answers, --dtype bfloat16 or a smaller model. {first}", 1)
        if not isinstance(error, OSError):
            raise
        _fail(f"{error}; see that it exists, may be read or written, and that the disk has room", 1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, as for errors; the place in the code says nothing to who typed a command."""
    typer.secho("warning: ", fg="yellow", bold=True, nl=False, err=True)
    typer.echo(str(message), err=True)


def _fail(message: str, code: int) -> NoReturn:
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    sys.exit(code)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not imported for this: where it is not loaded, the error is not torch's
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # PyTorch's allocator for the CPU has no class of its own.
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)
