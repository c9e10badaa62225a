"""A server's life: listen, load, serve, and end without a request being lost."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import uvicorn

from bluejay.accounts.ledger import Ledger
from bluejay.accounts.plans import Plan
from bluejay.accounts.store import Store
from bluejay.engine.client import EngineClient
from bluejay.engine.options import EngineOptions
from bluejay.errors import ConfigError, ModelNotFound, Stopped
from bluejay.server.app import NO_DIALECT, create_app
from bluejay.server.auth import Door
from bluejay.server.call import House, Life
from bluejay.server.dialects.open_inference_grpc import GrpcServer
from bluejay.server.filters import Filters
from bluejay.server.generation import Service
from bluejay.server.jobs import Jobs
from bluejay.server.limits import Gate, Limits
from bluejay.server.metrics import Metrics
from bluejay.server.models import Models, ServedModel
from bluejay.server.options import ModelOptions, ServerOptions
from bluejay.server.protocol import MAX_LINGERING, BoundedProtocol, bounded, tune
from bluejay.server.review import Review
from bluejay.server.shelf import Shelf
from bluejay.server.threads import store_threads
from bluejay.server.tracing import NO_TRACING, Tracing

LAST_WORDS_S = 3.0
SPARE_FILES = 256  # beside connections: workers, the database, the journal, what the system needs

_log = logging.getLogger("bluejay.server")


class Server:
    """Everything that serves, from the socket to the engines.

    Args:
        options: how it behaves.
        models: what it offers.
        store, ledger: accounts, and where usage is written; closed by who made them.
        plans: by name.
        engine_options, dtype, device, threads: of every engine.
        filters: what looks at answers.
        tracing: what is told of requests to who collects traces.

    Raises: ConfigError for names that clash, or an address that others reach while there is no key.
    """

    def __init__(
        self,
        options: ServerOptions,
        models: Sequence[ModelOptions],
        *,
        store: Store,
        ledger: Ledger,
        plans: dict[str, Plan],
        engine_options: EngineOptions | None = None,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 0,
        filters: Filters | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        engine_options = replace(engine_options or EngineOptions(), max_num_sequences=options.max_running)
        open_to_all = not store.has_keys()
        if open_to_all and not options.is_loopback and not options.insecure:
            raise ConfigError(
                f"host is {options.host}, which others reach, and there is no key yet; make one (bluejay keys "
                "create NAME) "
                "or say --insecure to serve everybody"
            )

        def serve(model: ModelOptions) -> ServedModel:
            def make() -> EngineClient:
                return EngineClient(
                    model.source, dtype=dtype, device=device, threads=threads, options=engine_options, draft=model.draft
                )

            return ServedModel(model, make, Gate(options.max_running, options.max_queue))

        self.options = options
        self.models = Models(map(serve, models), strict_names=options.strict_names)
        metrics = Metrics()
        self.filters = filters or Filters()
        asking = store_threads()
        self.review = Review(store, metrics, threads=asking) if options.keep_flagged else None
        self.service = Service(
            options,
            store,
            limits=Limits(),
            ledger=ledger,
            filters=self.filters,
            metrics=metrics,
            review=self.review,
            threads=asking,
        )
        plans = {name: _with_own_names(plan, self.models) for name, plan in plans.items()}
        door = Door(None if open_to_all else store, plans, open_to_admin=options.is_loopback)
        jobs = Jobs(
            self.service,
            max_running=max(1, options.max_running // 2),  # the other half is for who waits for an answer
            max_open=options.max_jobs,
            max_bytes=options.max_kept_bytes,
            keep_s=options.keep_s,
        )
        uploads: Shelf[Any] = Shelf(options.max_jobs, options.max_kept_bytes, options.keep_s)
        self.house = House(options, self.models, self.service, door, store, Life(), jobs, uploads, tracing, asking)
        self.app = create_app(self.house)
        self.grpc_address: str | None = None
        self._grpc: GrpcServer | None = None
        self._sockets: list[socket.socket] = []
        self._asked_to_end = asyncio.Event()

    def listen(self) -> str:
        """Take the ports; the URL that reaches HTTP, `grpc_address` is where gRPC is. To be called where the loop runs.

        Raises: ConfigError if one is taken or not ours to take.
        """
        options = self.options
        try:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            listening = socket.socket(family, socket.SOCK_STREAM)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tune(listening)
            listening.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on {options.host} port {options.port}: {getattr(error, 'strerror', None) or error}; "
                "choose another: --port N"
            ) from None
        self._sockets = [listening]
        if options.grpc_port is not None:
            self._grpc = GrpcServer(self.house)
            try:
                self.grpc_address = self._grpc.listen()
            except ConfigError:
                listening.close()
                raise
        num_ports = 1 if options.grpc_port is None else 2  # each has as many connections
        allow_files(num_ports * options.max_connections + MAX_LINGERING)
        port = listening.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        return f"http://{host}:{port}"

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT, then until what runs has ended; a second signal ends it at once.

        Args:
            on_ready: called when all models are.
        Raises: what loading a model raises.
        """
        loop = asyncio.get_running_loop()
        http = _Http(self._config())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.house.tracing.close)
            if self.review is not None:
                stack.push_async_callback(self.review.close)
            stack.push_async_callback(self.filters.close)
            serving = asyncio.create_task(http.serve(sockets=self._sockets))
            stack.push_async_callback(_finish, http, serving)
            if self._grpc is not None:
                await self._grpc.start()
                stack.push_async_callback(self._grpc.stop, 0)
            for model in self.models:
                stack.push_async_callback(model.close)
            stack.push_async_callback(self.house.jobs.close)
            loading = asyncio.gather(*(_loaded(model) for model in self.models))
            ending = asyncio.create_task(self._asked_to_end.wait())
            first: set[asyncio.Future[Any]] = {loading, ending, serving}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                gc.collect()
                gc.freeze()  # what is here now stays: looking through it again and again would stop the loop for 50 ms
                on_ready()
            else:
                loading.cancel()
            await asyncio.wait([ending, serving], return_when=asyncio.FIRST_COMPLETED)
            ending.cancel()
            await self._drain(http)

    def _config(self) -> uvicorn.Config:
        options, life, metrics = self.options, self.house.life, self.service.metrics
        protocol = bounded(options, lambda: life.draining, lambda status: metrics.answered(NO_DIALECT, status))
        return uvicorn.Config(
            self.app,
            http=cast(Any, protocol),
            ws="none",
            loop="uvloop",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            backlog=2048,
            timeout_graceful_shutdown=max(1, int(options.drain_s)),
            proxy_headers=False,
        )

    def _end(self) -> None:
        if self.house.life.draining:
            self.house.life.hurried = True
        self.house.life.draining = True
        self._asked_to_end.set()

    async def _drain(self, http: uvicorn.Server) -> None:
        """Say "not ready" for a while, take what comes meanwhile, then stop listening and finish what runs."""
        loop, options = asyncio.get_running_loop(), self.options
        self.house.jobs.drain()
        deadline_s = loop.time() + options.drain_s
        farewell_s = loop.time() + min(options.farewell_s, options.drain_s)
        while loop.time() < farewell_s and not self.house.life.hurried:
            await asyncio.sleep(0.02)
        http.should_exit = True
        await asyncio.sleep(0.2)  # uvicorn looks ten times a second; behind this nobody comes any more
        stopping = None if self._grpc is None else asyncio.create_task(self._grpc.stop(deadline_s - loop.time()))
        # Tasks are requests too: those whose bodies or tokens are still being read.
        while (self.service.running or http.server_state.tasks) and loop.time() < deadline_s:
            if self.house.life.hurried:
                break
            await asyncio.sleep(0.02)
        if self.service.running:
            _log.warning("ending with %d requests unfinished", len(self.service.running))
        while stopping is not None and not stopping.done() and not self.house.life.hurried:
            await asyncio.wait([stopping], timeout=0.05)


def _with_own_names(plan: Plan, models: Models) -> Plan:
    """A plan whose models are called what they call themselves, of those that are served here."""
    if plan.models is None:
        return plan
    names = []
    for name in plan.models:
        try:
            names.append(models.find(name).name)
        except ModelNotFound:
            _log.warning("the plan %s has the model %s, which is not served here", plan.name, name)
    return replace(plan, models=tuple(names))


class _Http(uvicorn.Server):
    """Uvicorn without its own signals: `Server` has them."""

    def capture_signals(self) -> Any:
        """Nothing to capture."""
        from contextlib import nullcontext

        return nullcontext()


async def _loaded(model: ServedModel) -> None:
    """Load a model. What an administrator unloads meanwhile is no failure. Raises: what is wrong with it."""
    try:
        await model.begin()
    except (asyncio.CancelledError, Stopped):
        if model.wanted:
            raise


async def _finish(http: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """The engines have ended, and with them every answer; connections get a moment to be read to their end."""
    http.should_exit = True
    await asyncio.wait([serving], timeout=LAST_WORDS_S)
    for task in list(http.server_state.tasks):
        task.cancel()
    await asyncio.sleep(0)
    for connection in list(http.server_state.connections):
        cast(BoundedProtocol, connection).abort()
    await asyncio.wait([serving])


def allow_files(num_connections: int) -> None:
    """Raise the process's limit of open files so far that it holds all connections, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        _log.warning(
            "this process may open %d files, too few for %d connections; raise the limit (ulimit -n) or lower "
            "max_connections",
            allowed,
            num_connections,
        )


def write_ready_file(path: Path, url: str, grpc: str | None) -> None:
    """Tell who started the server where it is, all at once."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"url": url, "grpc": grpc, "pid": os.getpid()}), encoding="utf-8")
    partial.replace(path)
