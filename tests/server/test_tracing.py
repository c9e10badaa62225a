"""Spans of requests, sent to a collector that the test is."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
import pytest

from bluejay.errors import ConfigError
from bluejay.server.dialects.open_inference_messages import MESSAGES, SERVICE
from bluejay.server.tracing import NO_SPAN, NO_TRACING, OpenTelemetry, asked_for, open_tracing

try:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import StatusCode
except ImportError:
    pytest.skip("the extra otel is not installed", allow_module_level=True)

PREDICT = "/v1/models/bluejay:predict"
PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


def test_spans_say_what_they_are_told() -> None:
    exporter = InMemorySpanExporter()

    async def trace() -> None:
        tracing = OpenTelemetry(exporter)
        span = tracing.begin("openai", "POST", "/v1/completions", "r1", PARENT)
        assert span.trace_id == "0af7651916cd43dd8448eb211c80319c"
        span.tell(bluejay_outcome="completed", bluejay_first_token_s=None, gen_ai_usage_output_tokens=7)
        span.end(200)
        span.end(500)
        tracing.begin("openai", "GET", "/v1/models", "r2", {"traceparent": "nonsense"}).end(503)
        await tracing.close()

    asyncio.run(trace())
    first, second = exporter.get_finished_spans()
    assert first.name == "POST /v1/completions"
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(first.attributes or {}) == {
        "bluejay.dialect": "openai",
        "bluejay.request_id": "r1",
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "bluejay.outcome": "completed",
        "gen_ai.usage.output_tokens": 7,
        "http.response.status_code": 200,
    }
    assert first.status.status_code is StatusCode.UNSET
    assert second.parent is None
    assert second.status.status_code is StatusCode.ERROR
    assert first.resource.attributes["service.name"] == "bluejay"


def test_without_being_asked_for_there_is_none() -> None:
    assert open_tracing(False, {}) is NO_TRACING
    assert open_tracing(True, {"OTEL_SDK_DISABLED": "true"}) is NO_TRACING
    assert NO_TRACING.begin("d", "GET", "/", "r", PARENT) is NO_SPAN
    asyncio.run(NO_TRACING.close())


@pytest.mark.parametrize(
    "flag, environ, wanted",
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"BLUEJAY_TRACE": "1"}, True),
        (False, {"BLUEJAY_TRACE": "off"}, False),
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        (True, {"OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_flag_and_environment_ask_for_traces(flag: bool, environ: dict[str, str], wanted: bool) -> None:
    assert asked_for(flag, environ) is wanted


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"BLUEJAY_TRACE": "perhaps"}, "BLUEJAY_TRACE is 'perhaps'"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin', expected otlp"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc', expected http/protobuf"),
    ],
)
def test_what_cannot_be_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_tracing(True, environ)


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'bluejay\[otel\]'"):
        open_tracing(True, {})


def test_nothing_of_it_is_imported_unasked() -> None:
    code = (
        "import sys; import bluejay.server.serving; from bluejay.server.tracing import open_tracing; "
        "open_tracing(False, {}); its = ('opentelemetry.sdk', 'opentelemetry.exporter'); "
        "sys.exit(any(name.startswith(its) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans as OTLP over HTTP."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.taken.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.taken = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_sends_a_span_for_each_request(
    start_server: Callable[..., AbstractContextManager[Any]], collector: Any
) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}", "OTEL_SERVICE_NAME": "jay"}
    with start_server("--log-json", env=env) as serving:
        with grpc.insecure_channel(serving.grpc) as channel:
            call_grpc(channel, "ServerLive", b"")
            asked = MESSAGES["ModelInferRequest"](model_name="bluejay")
            asked.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"A fox")
            call_grpc(channel, "ModelInfer", asked.SerializeToString())
            with pytest.raises(grpc.RpcError):
                call_grpc(channel, "ModelInfer", b"nonsense")
            streamed = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter(2 * [asked.SerializeToString()]))
            assert len(list(streamed)) == 2
        with serving.client() as client:
            body = {"instances": ["A hidden bird", "A fox"], "parameters": {"max_length": 12}}
            assert client.post(PREDICT, json=body, headers=PARENT).status_code == 200
            assert client.post(PREDICT, json={"hidden": 1}).status_code == 400
            client.get("/livez")
        assert serving.stop() == 0
        assert "0af7651916cd43dd8448eb211c80319c" in serving.log
    assert {path for path, _ in collector.taken} == {"/v1/traces"}
    assert all(b"hidden" not in body for _, body in collector.taken)
    sent = [ExportTraceServiceRequest.FromString(body) for _, body in collector.taken]
    resources = [resource for request in sent for resource in request.resource_spans]
    named = {one.key: one.value.string_value for one in resources[0].resource.attributes}
    assert named["service.name"] == "jay"
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    told = [{one.key: one.value for one in span.attributes} for span in spans]
    assert [(span.name.rpartition("/")[2], status(values)) for span, values in zip(spans, told, strict=True)] == [
        ("ModelInfer", 200),
        ("ModelInfer", 400),
        ("ModelStreamInfer", 200),
        ("ModelStreamInfer", 200),
        ("{model:path}:predict", 200),
        ("{model:path}:predict", 400),
    ]
    over_grpc, over_http = told[0], told[4]
    assert over_grpc["bluejay.dialect"].string_value == "open_inference_grpc"
    assert over_grpc["gen_ai.usage.output_tokens"].int_value > 3
    good = over_http
    assert good["bluejay.dialect"].string_value == "kserve_v1"
    assert good["gen_ai.response.model"].string_value == "bluejay"
    assert good["bluejay.outcome"].string_value == "completed"
    assert good["gen_ai.usage.input_tokens"].int_value > 3
    assert good["gen_ai.usage.output_tokens"].int_value > 3
    assert spans[4].parent_span_id.hex() == "b7ad6b7169203331"


def call_grpc(channel: grpc.Channel, name: str, message: bytes) -> None:
    channel.unary_unary(f"/{SERVICE}/{name}")(message, timeout=60, metadata=tuple(PARENT.items()))


def status(values: dict[str, Any]) -> int:
    code: int = values["http.response.status_code"].int_value
    return code


def test_a_collector_that_is_away_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bluejay.server.tracing.CLOSING_S", 0.3)

    async def trace() -> float:
        tracing = open_tracing(True, {})
        tracing.begin("openai", "GET", "/v1/models", "r", {}).end(200)
        began_s = time.monotonic()
        await tracing.close()
        return time.monotonic() - began_s

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert asyncio.run(trace()) < 5
