"""`bluejay serve`: one server, every API that GPT-J ever had."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bluejay.errors import ConfigError
from bluejay.settings import TABLES, Settings, load_settings, load_table

if TYPE_CHECKING:
    from bluejay.engine.options import EngineOptions
    from bluejay.server.options import ModelOptions, ServerOptions
    from bluejay.server.tracing import Tracing

ADDRESS, MODEL, LOAD, ACCOUNTS = "Address", "Models", "Load", "Accounts and logs"


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Paths or names, or NAME=PATH, or names of \\[models.NAME]; the default model if none.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where to listen.", show_default="127.0.0.1", rich_help_panel=ADDRESS)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="0: any free one.", show_default="8000", rich_help_panel=ADDRESS)
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Open Inference over gRPC; -1: not at all.", show_default="8081", rich_help_panel=ADDRESS),
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Serve other machines without a key.", rich_help_panel=ADDRESS)
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="What the first model is called; may be repeated, all names count.", rich_help_panel=MODEL),
    ] = None,
    strict_names: Annotated[
        bool | None,
        typer.Option(
            "--strict-names", help="Do not answer to the ids that hosted services had.", rich_help_panel=MODEL
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As for generate.", rich_help_panel=MODEL)] = None,
    device: Annotated[str | None, typer.Option(help="As for generate.", rich_help_panel=MODEL)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each model.", rich_help_panel=MODEL)] = None,
    draft: Annotated[
        str | None, typer.Option(help="Guess ahead: auto, ngram, or a model.", rich_help_panel=MODEL)
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(help="Sequences that a model works on together.", show_default="64", rich_help_panel=LOAD),
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Sequences that may wait.", show_default="256", rich_help_panel=LOAD)
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds.", show_default="600", rich_help_panel=LOAD)
    ] = None,
    drain: Annotated[
        float | None,
        typer.Option(help="Seconds that running requests get at the end.", show_default="30", rich_help_panel=LOAD),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="sqlite:///path or postgresql://…; none: in your home.", rich_help_panel=ACCOUNTS),
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Folder for usage on its way to the database.", rich_help_panel=ACCOUNTS)
    ] = None,
    keep_flagged: Annotated[
        bool | None,
        typer.Option("--keep-flagged", help="Keep what a filter flags, for review.", rich_help_panel=ACCOUNTS),
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="A JSON object each line.", rich_help_panel=ACCOUNTS)
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="OpenTelemetry, as OTEL_… say; needs the extra otel.", rich_help_panel=ACCOUNTS),
    ] = False,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING.", rich_help_panel=ACCOUNTS)] = "INFO",
    ready_file: Annotated[
        Path | None, typer.Option(help="Written when all models are ready: its URLs as JSON.", rich_help_panel=ADDRESS)
    ] = None,
) -> None:
    r"""Serve GPT-J and GPT-Neo: KServe, Open Inference, Baseten, Neuro and OpenAI, on one port.

    What flags do not say, the settings file may: \[server], \[engine], \[models.NAME], \[plans.NAME],
    \[filters.NAME].
    """
    settings = load_settings({"dtype": dtype, "device": device, "threads": threads, "database": database})
    flags = {
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "strict_names": strict_names,
        "insecure": insecure,
        "max_running": max_running,
        "max_queue": max_queue,
        "request_timeout_s": request_timeout,
        "drain_s": drain,
        "keep_flagged": keep_flagged,
    }
    tables = {table: load_table(table) for table in TABLES}
    options = _options(tables["server"], flags)
    offered = _models(models or [], name or [], tables["models"], settings, draft)
    from bluejay.server.logs import set_up_logs
    from bluejay.server.tracing import open_tracing

    tracing = open_tracing(trace, os.environ)
    set_up_logs(as_json=log_json, level=log_level)
    say = logging.getLogger("bluejay").info if log_json else partial(typer.echo, err=True)
    if models and (passed_over := sorted(set(tables["models"]) - set(models))):
        say(f"The settings file has models that the command line does not name: {', '.join(passed_over)}")
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        runner.run(_serve(options, offered, settings, tables, journal, ready_file, tracing, say))


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Makes uvloop's event loop; None is Python's own, where there is no uvloop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _options(table: dict[str, Any], flags: dict[str, Any]) -> ServerOptions:
    from bluejay.server.options import ServerOptions

    known = {field.name for field in dataclasses.fields(ServerOptions)}
    if unknown := sorted(set(table) - known):
        raise ConfigError(f"[server] has unknown settings: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    values = {**table, **{key: value for key, value in flags.items() if value is not None}}
    if values.get("grpc_port") == -1:
        values["grpc_port"] = None
    return ServerOptions(**values)


def _engine_options(table: dict[str, Any]) -> EngineOptions:
    from bluejay.engine.options import EngineOptions

    known = {field.name for field in dataclasses.fields(EngineOptions)} - {"max_num_sequences"}  # --max-running
    if unknown := sorted(set(table) - known):
        raise ConfigError(f"[engine] has unknown settings: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return EngineOptions(**table)


def _models(
    named: list[str], names: list[str], tables: dict[str, Any], settings: Settings, draft: str | None
) -> list[ModelOptions]:
    """What is offered: by the command line; else by [models.NAME] of the settings file; else the settings' model.

    The command line may name a table, too.
    """
    from bluejay.server.options import ModelOptions

    if not named and tables and (names or draft):
        raise ConfigError("--name and --draft are for models that the command line names; [models.NAME] has its own")
    if not named and tables:
        return [_table_model(name, table) for name, table in tables.items()]
    offered = []
    for text in named or [settings.model]:
        if text in tables:
            offered.append(_table_model(text, tables[text]))
            continue
        called, is_pair, source = text.partition("=")
        source = source if is_pair else text
        called = called if is_pair else "bluejay" if source == "default" else Path(source).name or source
        offered.append(ModelOptions(called, source))
    if draft:
        offered = [dataclasses.replace(model, draft=draft) for model in offered]
    if names:
        offered[0] = dataclasses.replace(offered[0], name=names[0], aliases=tuple(names[1:]))
    return offered


def _are_texts(table: dict[str, Any]) -> bool:
    aliases = table.get("aliases", [])
    return isinstance(aliases, list) and all(isinstance(alias, str) for alias in aliases)


def _table_model(name: str, table: Any) -> ModelOptions:
    from bluejay.server.options import ModelOptions
    from bluejay.server.sampling import sampling_params

    known = {"source", "aliases", "defaults", "draft"}
    if (
        not isinstance(table, dict)
        or set(table) - known
        or not isinstance(table.get("source"), str)
        or not _are_texts(table)
    ):
        raise ConfigError(f"[models.{name}]: expected source = PATH OR NAME, and perhaps aliases, defaults, draft")
    sampling_params(table.get("defaults"))  # what is wrong with them is to be said now, not to each caller
    return ModelOptions(
        name, table["source"], tuple(table.get("aliases", ())), table.get("defaults", {}), table.get("draft")
    )


async def _serve(
    options: ServerOptions,
    models: list[ModelOptions],
    settings: Settings,
    tables: dict[str, Any],
    journal: Path | None,
    ready_file: Path | None,
    tracing: Tracing,
    say: Callable[[str], None],
) -> None:
    from bluejay.accounts.ledger import Ledger, default_folder
    from bluejay.accounts.plans import read_plans
    from bluejay.accounts.store import Store
    from bluejay.server.filters import read_filters
    from bluejay.server.serving import Server, write_ready_file

    plans = read_plans(tables["plans"])
    filters = read_filters(tables["filters"], [model.name for model in models])
    store = Store.open(settings.database or None)
    try:
        ledger = Ledger(journal or default_folder(), store)
        try:
            server = Server(
                options,
                models,
                store=store,
                ledger=ledger,
                plans=plans,
                engine_options=_engine_options(tables["engine"]),
                dtype=settings.dtype,
                device=settings.device,
                threads=settings.threads,
                filters=filters,
                tracing=tracing,
            )
            url = server.listen()
            _greet(url, server, say)

            def ready() -> None:
                say(f"ready: {', '.join(model.name for model in server.models)}")
                if ready_file is not None:
                    write_ready_file(ready_file, url, server.grpc_address)

            await server.run(ready)
        finally:
            ledger.close()
    finally:
        store.close()


def _greet(url: str, server: Any, say: Callable[[str], None]) -> None:
    grpc = "" if server.grpc_address is None else f", for gRPC on {server.grpc_address}"
    say(f"Bluejay listens on {url}{grpc}")
    if server.house.door.is_open:
        reach = "this machine" if server.options.is_loopback else "EVERYBODY who reaches this address"
        say(f"There is no key yet: it is open to {reach}. To ask for keys: bluejay keys create NAME")
    sys.stderr.flush()
