"""OpenTelemetry: a span for each request, which says who served it, how much and how it ended; never a text.

An extra: `pip install bluejay[otel]`. Nothing of it is imported, and no connection opened, unless somebody asks for
traces: by --trace, BLUEJAY_TRACE=1, or OpenTelemetry's own OTEL_EXPORTER_OTLP_ENDPOINT, which says where they go (OTLP
over HTTP). Its other variables count too: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_….
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bluejay.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from bluejay.accounts.records import Usage

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
CLOSING_S = 3.0  # a server that ends waits so long for who collects its traces


class Span:
    """What is told of one request; this one tells nobody.

    Attributes:
        trace_id: for the log, None where nothing is traced.
    """

    trace_id: str | None = None

    def tell(self, **attributes: str | int | float | None) -> None:
        """Add to it; None is not said, and _ stands for the dots in names."""

    def served(self, usage: Usage) -> None:
        """Tell what a model did for the request."""
        self.tell(
            gen_ai_response_model=usage.served_model,
            gen_ai_usage_input_tokens=usage.prompt_tokens,
            gen_ai_usage_output_tokens=usage.generated_tokens,
            bluejay_cached_tokens=usage.cached_tokens,
            bluejay_first_token_s=usage.first_token_s,
            bluejay_outcome=usage.outcome,
        )

    def end(self, status: int) -> None:
        """The request was answered, with that HTTP status; a second end is none."""


NO_SPAN = Span()


class Tracing:
    """Begins spans; this one begins none."""

    def begin(self, dialect: str, method: str, route: str, request_id: str, headers: Mapping[str, str]) -> Span:
        """A span of a request that came now, below the one that its `traceparent` names."""
        return NO_SPAN

    async def close(self) -> None:
        """Send what was not sent yet, if that can be done soon."""


NO_TRACING = Tracing()


def asked_for(flag: bool, environ: Mapping[str, str]) -> bool:
    """Whether there are to be traces. Raises: ConfigError if a variable says neither yes nor no."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    own = environ.get("BLUEJAY_TRACE", "").lower()
    if own not in TRUE + FALSE:
        raise ConfigError(f"BLUEJAY_TRACE is {own[:40]!r}, expected 1 or 0")
    return flag or own in TRUE or any(environ.get(name) for name in ENDPOINTS)


def open_tracing(flag: bool, environ: Mapping[str, str]) -> Tracing:
    """Traces as they were asked for.

    Args:
        flag: --trace was given.
        environ: the environment.
    Raises: ConfigError if they were asked for and cannot be had.
    """
    if not asked_for(flag, environ):
        return NO_TRACING
    if (exporter := environ.get("OTEL_TRACES_EXPORTER") or "otlp") != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {exporter[:40]!r}, expected otlp or none")
    if wrong := [name for name in PROTOCOLS if environ.get(name, "http/protobuf") not in ("", "http/protobuf")]:
        raise ConfigError(f"{wrong[0]} is {environ[wrong[0]][:40]!r}, expected http/protobuf")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError("traces need OpenTelemetry: pip install 'bluejay[otel]'; or ask for none") from None
    return OpenTelemetry(OTLPSpanExporter())


class OpenTelemetry(Tracing):
    """Sends spans away, in batches, in a thread.

    Args:
        exporter: where to.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from bluejay import __version__

        named = Resource({SERVICE_NAME: "bluejay", "service.version": __version__}).merge(
            OTELResourceDetector().detect()
        )
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("bluejay", __version__)
        self._parents = TraceContextTextMapPropagator()

    def begin(self, dialect: str, method: str, route: str, request_id: str, headers: Mapping[str, str]) -> Span:
        from opentelemetry.trace import SpanKind

        # Not made the current one: nothing below it is traced, and a stream ends in another task.
        context = self._parents.extract({name: headers[name] for name in self._parents.fields if name in headers})
        span = self._tracer.start_span(f"{method} {route}", context, SpanKind.SERVER)
        begun = _OpenSpan(span)
        begun.tell(bluejay_dialect=dialect, bluejay_request_id=request_id)
        begun.tell(http_request_method=method, http_route=route)
        return begun

    async def close(self) -> None:
        # A thread that nobody has to wait for: by itself it would try for half a minute.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSING_S)


# Written with _ where they are told; OpenTelemetry's conventions and Bluejay's own.
NAMES = {
    name.replace(".", "_"): name
    for name in (
        "http.request.method",
        "http.response.status_code",
        "http.route",
        "gen_ai.response.model",
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.output_tokens",
        "bluejay.cached_tokens",
        "bluejay.dialect",
        "bluejay.first_token_s",
        "bluejay.outcome",
        "bluejay.request_id",
    )
}


class _OpenSpan(Span):
    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def tell(self, **attributes: str | int | float | None) -> None:
        for name, value in attributes.items():
            if value is not None:
                self._span.set_attribute(NAMES[name], value)

    def end(self, status: int) -> None:
        if not self._span.is_recording():
            return
        from opentelemetry.trace import StatusCode

        self.tell(http_response_status_code=status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
