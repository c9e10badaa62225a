"""The Open Inference Protocol over gRPC, on a running server, by a plain channel."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc import StatusCode

from bluejay.accounts.ledger import Ledger
from bluejay.accounts.plans import read_plans
from bluejay.accounts.store import Store
from bluejay.errors import ConfigError
from bluejay.server import serving
from bluejay.server.dialects.open_inference_grpc import ENVELOPE_BYTES, GrpcServer
from bluejay.server.dialects.open_inference_messages import MESSAGES, RECEIVED, SERVICE
from bluejay.server.options import ModelOptions, ServerOptions
from bluejay.server.protocol import MAX_LINGERING
from bluejay.server.serving import Server

StartServer = Callable[..., AbstractContextManager[Any]]
WAIT_S = 60.0


class Stub:
    """Calls by name: `stub("ServerLive")`; `key` goes with each."""

    def __init__(self, channel: grpc.Channel, key: str | None = None) -> None:
        self._channel = channel
        self.metadata = () if key is None else (("authorization", f"Bearer {key}"),)

    def start(self, name: str, asked: Any = None, *, timeout: float = WAIT_S, **options: Any) -> Any:
        """A call under way."""
        call = self._channel.unary_unary(f"/{SERVICE}/{name}", bytes, MESSAGES[f"{name}Response"].FromString)
        message = MESSAGES[f"{name}Request"]() if asked is None else asked
        data = message if isinstance(message, bytes) else message.SerializeToString()
        return call.future(data, timeout=timeout, **{"metadata": self.metadata, **options})

    def __call__(self, name: str, asked: Any = None, **options: Any) -> Any:
        return self.start(name, asked, **options).result()

    def refused(self, name: str, asked: Any = None, **options: Any) -> grpc.RpcError:
        """The error that a call ends with."""
        with pytest.raises(grpc.RpcError) as caught:
            self(name, asked, **options)
        return caught.value

    def stream(self, asked: Any) -> Any:
        """What comes back for messages, as it comes."""
        call = self._channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer", bytes, MESSAGES["ModelStreamInferResponse"].FromString
        )
        return call((message.SerializeToString() for message in asked), timeout=WAIT_S, metadata=self.metadata)


@contextmanager
def stub_of(serving: Any, key: str | None = None) -> Iterator[Stub]:
    with grpc.insecure_channel(serving.grpc) as channel:
        yield Stub(channel, key)


@pytest.fixture(scope="module")
def stub(server: Any) -> Iterator[Stub]:
    with stub_of(server) as stub:
        yield stub


def infer(*texts: str, outputs: tuple[str, ...] = (), raw: bool = False, **parameters: Any) -> Any:
    asked = MESSAGES["ModelInferRequest"](model_name="bluejay", id="42")
    given = asked.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
    data = [text.encode() for text in texts]
    if raw:
        asked.raw_input_contents.append(b"".join(struct.pack("<I", len(text)) + text for text in data))
    else:
        given.contents.bytes_contents.extend(data)
    for name in outputs:
        asked.outputs.add(name=name)
    return tell(asked, parameters)


def tell(asked: Any, parameters: dict[str, Any]) -> Any:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(asked.parameters[name], kinds[type(value)], value)
    return asked


def said(answer: Any) -> list[str]:
    return [text.decode() for text in answer.outputs[0].contents.bytes_contents]


def test_it_tells_what_it_is(stub: Stub) -> None:
    assert stub("ServerLive").live
    assert stub("ServerReady").ready
    assert stub("ModelReady", MESSAGES["ModelReadyRequest"](name="bluejay", version="1")).ready
    assert stub("ServerMetadata").name == "bluejay"
    model = stub("ModelMetadata", MESSAGES["ModelMetadataRequest"](name="eleutherai-gpt-j-6b"))
    assert (model.name, list(model.versions), model.platform) == ("bluejay", ["1"], "bluejay")
    assert [tensor.name for tensor in model.inputs] == ["text_input", "input_ids"]
    assert list(model.outputs[3].shape) == [-1, -1]
    [state] = stub("RepositoryIndex").models
    assert (state.name, state.version, state.state) == ("bluejay", "1", "READY")


def test_it_says_what_http_says(stub: Stub, server: Any) -> None:
    answer = stub("ModelInfer", infer("Once", "Füchse 🦊", max_length=12))
    assert (answer.model_name, answer.model_version, answer.id) == ("bluejay", "1", "42")
    given = {"name": "text_input", "shape": [2], "datatype": "BYTES", "data": ["Once", "Füchse 🦊"]}
    with server.client() as http:
        told = http.post("/v2/models/bluejay/infer", json={"inputs": [given], "parameters": {"max_length": 12}})
    assert said(answer) == told.json()["outputs"][0]["data"]
    assert list(answer.outputs[0].shape) == [2]


def test_raw_contents_are_answered_by_raw_contents(stub: Stub) -> None:
    names = ("text_output", "num_tokens")
    plain = stub("ModelInfer", infer("Once", outputs=names, max_length=8))
    raw = stub("ModelInfer", infer("Once", outputs=names, raw=True, max_length=8))
    text = said(plain)[0].encode()
    assert raw.raw_output_contents[0] == struct.pack("<I", len(text)) + text
    assert np.frombuffer(raw.raw_output_contents[1], "<i8").tolist() == list(plain.outputs[1].contents.int64_contents)
    assert not raw.outputs[0].HasField("contents")
    told = stub("ModelInfer", infer("Once", max_length=8, binary_data_output=True))
    assert list(told.raw_output_contents) == [raw.raw_output_contents[0]]
    told = stub("ModelInfer", infer("Once", raw=True, max_length=8, binary_data_output=False))
    assert said(told) == said(plain)


def test_options_may_travel_as_text(stub: Stub) -> None:
    as_text = {"max_length": "20", "do_sample": "True", "temperature": "0.9", "top_p": "5e-1", "seed": "3"}
    as_typed = {"max_length": 20, "do_sample": True, "temperature": 0.9, "top_p": 0.5, "seed": 3}
    assert said(stub("ModelInfer", infer("Once", **as_text))) == said(stub("ModelInfer", infer("Once", **as_typed)))
    words = stub("ModelInfer", infer("Once", exclude_prompt="true", max_tokens="4", bad_words_ids="[[1], [2, 3]]"))
    assert not said(words)[0].startswith("Once")


def test_prompts_may_be_ids(stub: Stub) -> None:
    asked = tell(MESSAGES["ModelInferRequest"](), {"max_length": 4})  # the only model need not be named
    given = asked.inputs.add(name="input_ids", datatype="INT32", shape=[1, 2])
    given.contents.int_contents.extend([7, 8])
    [output] = stub("ModelInfer", asked).outputs
    assert (output.name, output.datatype, list(output.shape)) == ("output_ids", "INT64", [1, 4])
    assert list(output.contents.int64_contents)[:2] == [7, 8]


def with_input(**changes: Any) -> Any:
    asked = infer("Once")
    for name, value in changes.items():
        if name == "shape":
            asked.inputs[0].shape[:] = value
        else:
            setattr(asked.inputs[0], name, value)
    return asked


def without_value() -> Any:
    asked = infer("Once")
    asked.parameters["top_k"].SetInParent()
    return asked


def both() -> Any:
    asked = infer("Once")
    asked.raw_input_contents.append(b"")
    return asked


def misplaced() -> Any:
    asked = infer("Once", raw=True)
    asked.raw_input_contents.append(b"")
    return asked


def mistaken(size: int) -> Any:
    asked = infer("Once", raw=True)
    asked.inputs[0].parameters["binary_data_size"].int64_param = size
    return asked


def crowded(name: str) -> Any:
    asked = infer("Once")
    of = {"inputs": MESSAGES["InferInputTensor"], "outputs": MESSAGES["InferRequestedOutputTensor"]}.get(name, bytes)
    getattr(asked, name).extend([of()] * 257)
    return asked


def with_parameters(count: int) -> Any:
    asked = infer("Once", raw=True)
    for number in range(count):
        asked.inputs[0].parameters[f"p{number}"].int64_param = 1
    return asked


@pytest.mark.parametrize(
    "asked, message",
    [
        (b"\xff\xff", "the message is no ModelInferRequest"),
        (MESSAGES["ModelInferRequest"](), "inputs hold no prompts"),
        (with_input(name="colour"), "unknown input 'colour'"),
        (with_input(shape=[2]), "holds 2 elements, the data 1"),
        (with_input(shape=[-1]), "the shape is [-1]"),
        (with_input(shape=[2**62, 2**62]), "elements, expected at most"),
        (with_input(shape=[1] * 9), "9 dimensions"),
        (with_input(datatype="FP32"), "the data 0"),
        (with_input(datatype="COLOUR"), "the datatype is 'COLOUR'"),
        (infer("Once", outputs=("colour",)), "unknown output 'colour'"),
        (infer("Once", max_length="many"), "max_length is 'many'"),
        (infer("Once", max_length="9" * 5000), "max_length is"),
        (infer("Once", temperature="1e309"), "temperature is inf"),
        (infer("Once", temperature="nan"), "temperature is nan"),
        (infer("Once", bad_words_ids="[[1"), "bad_words_ids is '[[1'"),
        (infer("Once", do_sample="maybe"), "do_sample is 'maybe'"),
        (infer("Once", colour="red"), "unknown option 'colour'"),
        (infer("Once", stream=True), "use ModelStreamInfer"),
        (infer("Once", binary_data_output=1), "true or false"),
        (infer(), "no prompt"),
        (infer("many words " * 5000), "characters"),
        (without_value(), "the parameter top_k has no value"),
        (both(), "has contents beside raw_input_contents"),
        (misplaced(), "2 raw_input_contents for 1 inputs"),
        (infer("Once", **{f"p{number}": 1 for number in range(2049)}), "2,049 parameters, expected at most 2,048"),
        (crowded("inputs"), "258 inputs, expected at most 256"),
        (crowded("outputs"), "257 outputs, expected at most 256"),
        (crowded("raw_input_contents"), "257 raw_input_contents, expected at most 256"),
        (with_parameters(2049), "2,049 parameters, expected at most 2,048"),
        (mistaken(7), "binary_data_size is 7, the raw contents have 8 bytes"),
    ],
)
def test_what_is_wrong_is_named(stub: Stub, asked: Any, message: str) -> None:
    error = stub.refused("ModelInfer", asked)
    assert error.code() is StatusCode.INVALID_ARGUMENT
    assert message in error.details()
    assert dict(error.trailing_metadata())["x-request-id"]


def test_what_is_not_there_is_not_found(stub: Stub) -> None:
    for name, asked in (
        ("ModelReady", MESSAGES["ModelReadyRequest"](name="nope")),
        ("ModelMetadata", MESSAGES["ModelMetadataRequest"](name="bluejay", version="2")),
        ("ModelInfer", MESSAGES["ModelInferRequest"](model_name="nope")),
        ("RepositoryModelLoad", MESSAGES["RepositoryModelLoadRequest"](model_name="nope")),
        ("RepositoryModelUnload", MESSAGES["RepositoryModelUnloadRequest"](repository_name="nope")),
    ):
        error = stub.refused(name, asked)
        assert error.code() is StatusCode.NOT_FOUND
        assert "there is" in error.details()
    asked = MESSAGES["RepositoryModelLoadRequest"](model_name="bluejay")
    asked.parameters["config"].string_param = "{}"
    assert "'config' is not supported" in stub.refused("RepositoryModelLoad", asked).details()
    assert stub.refused("RepositoryModelLoad").code() is StatusCode.INVALID_ARGUMENT


def test_messages_are_bounded(stub: Stub) -> None:
    most = ServerOptions().max_body_bytes + ENVELOPE_BYTES
    assert stub.refused("ModelInfer", bytes(most)).code() is StatusCode.INVALID_ARGUMENT
    assert stub.refused("ModelInfer", bytes(most + 1)).code() is StatusCode.RESOURCE_EXHAUSTED
    # Compressed ones would be bounded before they are inflated.
    error = stub.refused("ModelInfer", infer("Once" * 1000), compression=grpc.Compression.Gzip)
    assert error.code() in (StatusCode.UNIMPLEMENTED, StatusCode.INTERNAL)
    assert stub("ServerLive").live


def test_what_is_received_has_lists_of_pairs_which_can_be_counted() -> None:
    asked = RECEIVED["ModelInferRequest"].FromString(infer("Once", top_k=1).SerializeToString())
    assert [(entry.key, entry.value.int64_param) for entry in asked.parameters] == [("top_k", 1)]
    for kind in RECEIVED.values():
        assert not any(nested.GetOptions().map_entry for nested in kind.DESCRIPTOR.nested_types)


def test_an_answer_comes_in_pieces(stub: Stub) -> None:
    whole = stub("ModelInfer", infer("Once upon a time", exclude_prompt=True, max_tokens=8))
    asked = infer("Once upon a time", outputs=("text_output", "finish_reason"), stream=True, max_tokens=8)
    answers = [answer.infer_response for answer in stub.stream([asked])]
    assert "".join(said(answer)[0] for answer in answers) == said(whole)[0]
    assert {answer.id for answer in answers} == {"42"}
    reasons = [answer.outputs[1].contents.bytes_contents[0] for answer in answers]
    assert [*dict.fromkeys(reasons)] == [b"", b"length"]
    ends = [answer.parameters["triton_final_response"].bool_param for answer in answers]
    assert ends == [False] * (len(answers) - 1) + [True]


def test_a_stream_goes_on_behind_what_is_wrong(stub: Stub) -> None:
    answers = list(
        stub.stream(
            [
                infer("Once", colour=1),
                MESSAGES["ModelInferRequest"](model_name="nope", id="7"),
                infer("Once", max_length=8, triton_enable_empty_final_response=True),
                infer("Once", "One", stream=True, max_tokens=2, outputs=("output_ids",)),
            ]
        )
    )
    assert "unknown option 'colour'" in answers[0].error_message
    assert ("no model 'nope'" in answers[1].error_message, answers[1].infer_response.id) == (True, "7")
    assert said(answers[2].infer_response) == said(stub("ModelInfer", infer("Once", max_length=8)))
    ends = [answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers[2:4]]
    assert (ends, len(answers[3].infer_response.outputs)) == ([False, True], 0)
    pieces = [answer.infer_response for answer in answers[4:]]
    assert sorted(piece.parameters["index"].int64_param for piece in pieces) == [0, 0, 1, 1]
    assert [list(piece.outputs[0].shape) for piece in pieces] == [[1, 1]] * 4


def running(http: httpx.Client) -> tuple[float, float]:
    """Requests that run, and those of this dialect that were given up."""
    lines = [line for line in http.get("/metrics").text.splitlines() if 'dialect="open_inference_grpc"' in line]

    def total(*words: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(word in line for word in words))

    return total("bluejay_requests_running{"), total("bluejay_requests_total{", 'outcome="cancelled"')


def test_who_goes_frees_what_ran_for_them(stub: Stub, server: Any) -> None:
    long = {"max_tokens": 900, "min_new_tokens": 900}
    with server.client() as http:
        _, before = running(http)
        calls = [stub.start("ModelInfer", infer("Once", **long)) for _ in range(3)]
        stream = stub.stream([infer("Once", stream=True, **long)])
        next(stream)
        until_s = time.monotonic() + WAIT_S
        while running(http)[0] < 4 and time.monotonic() < until_s:
            time.sleep(0.02)
        for call in (*calls, stream):
            call.cancel()
        assert stub.refused("ModelInfer", infer("Once", **long), timeout=0.3).code() is StatusCode.DEADLINE_EXCEEDED
        while running(http) != (0, before + 5) and time.monotonic() < until_s:
            time.sleep(0.02)
        assert running(http) == (0, before + 5)
        held = [line for line in http.get("/metrics").text.splitlines() if line.startswith("bluejay_engine_running{")]
        assert [line.rpartition(" ")[2] for line in held] == ["0.0"]


def test_keys_plans_and_administrators_are_those_of_http(keyed: Any) -> None:
    once = infer("Once", max_length=4)
    # By KServe's numbers, and by Triton's.
    unload = MESSAGES["RepositoryModelUnloadRequest"](repository_name="bluejay")
    load = MESSAGES["RepositoryModelLoadRequest"](model_name="bluejay")
    with stub_of(keyed.serving) as stub:
        assert stub("ServerLive").live
        assert stub("ServerReady").ready
        for name in ("ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "RepositoryIndex"):
            error = stub.refused(name)
            assert error.code() is StatusCode.UNAUTHENTICATED
            assert dict(error.trailing_metadata())["www-authenticate"] == "Bearer"
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.stream([once]))
        assert caught.value.code() is StatusCode.UNAUTHENTICATED
        assert said(stub("ModelInfer", once, metadata=(("x-api-key", keyed.user),)))
        stub.metadata = (("authorization", f"Api-Key {keyed.user}"),)
        assert said(stub("ModelInfer", once))
        assert stub.refused("RepositoryModelUnload", unload).code() is StatusCode.PERMISSION_DENIED

        stub.metadata = (("authorization", f"Bearer {keyed.once}"),)
        assert said(stub("ModelInfer", once))
        error = stub.refused("ModelInfer", once)
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["retry-after"]) >= 1

        stub.metadata = (("authorization", f"Bearer {keyed.admin}"),)
        assert stub("RepositoryModelUnload", unload).isUnloaded
        assert not stub("ServerReady").ready
        assert not stub("ModelReady", MESSAGES["ModelReadyRequest"](name="bluejay")).ready
        error = stub.refused("ModelInfer", once)
        assert (error.code(), "was unloaded" in error.details()) == (StatusCode.UNAVAILABLE, True)
        answer = stub("RepositoryModelLoad", load)
        assert (answer.model_name, answer.isLoaded) == ("bluejay", True)
        assert said(stub("ModelInfer", once))


def test_at_its_end_the_server_finishes_what_runs(start_server: StartServer) -> None:
    with start_server() as serving, stub_of(serving) as stub:
        idle: Queue[Any] = Queue()
        stream = stub.stream(iter(idle.get, None))
        idle.put(infer("Once", max_length=4))
        next(stream)
        call = stub.start("ModelInfer", infer("Once", outputs=("num_tokens",), max_tokens=200, min_new_tokens=200))
        with serving.client() as http:
            while running(http)[0] < 1:
                time.sleep(0.01)
        serving.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:  # nobody waits for a stream that says nothing
            next(stream)
        assert caught.value.code() is StatusCode.UNAVAILABLE
        assert list(call.result().outputs[0].contents.int64_contents) == [200]
        idle.put(None)
        assert serving.process.wait(WAIT_S) == 0
        assert "Traceback" not in serving.log


@contextmanager
def made(folder: Path, **options: Any) -> Iterator[Server]:
    """A server that was not started."""
    store = Store.open(f"sqlite:///{folder}/accounts.db")
    ledger = Ledger(folder / "journal", store)
    try:
        models = [ModelOptions("bluejay", "default")]
        yield Server(ServerOptions(port=0, **options), models, store=store, ledger=ledger, plans=read_plans({}))
    finally:
        ledger.close()
        store.close()


@asynccontextmanager
async def started(server: Server) -> AsyncIterator[str]:
    """Its gRPC alone, whose address it gives; no model is ready."""
    grpc_server = GrpcServer(server.house)
    address = grpc_server.listen()
    await grpc_server.start()
    try:
        yield address
    finally:
        await grpc_server.stop(0)


def test_messages_are_bounded_as_bodies_are(tmp_path: Path) -> None:
    async def send(server: Server) -> list[StatusCode]:
        async with started(server) as address, grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            codes = []
            for size in (2048 + ENVELOPE_BYTES, 2049 + ENVELOPE_BYTES):
                with pytest.raises(grpc.RpcError) as caught:
                    await call(bytes(size), timeout=WAIT_S)
                codes.append(caught.value.code())
            return codes

    with made(tmp_path, grpc_port=0, max_body_bytes=2048) as server:
        assert asyncio.run(send(server)) == [StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED]


def test_connections_are_bounded(tmp_path: Path) -> None:
    async def crowd(server: Server) -> list[bool]:
        async with started(server) as address:
            host, _, port = address.rpartition(":")
            clients = [await asyncio.open_connection(host, int(port)) for _ in range(9)]
            try:
                # Who is welcome hears the server's settings, the others that the connection has ended.
                heard = [asyncio.wait_for(reader.read(1), WAIT_S) for reader, _ in clients]
                words = await asyncio.gather(*heard, return_exceptions=True)
                return [isinstance(word, bytes) and word != b"" for word in words]
            finally:
                for _, writer in clients:
                    writer.close()

    with made(tmp_path, grpc_port=0, max_connections=2) as server:
        welcome = asyncio.run(crowd(server))
        assert sum(welcome) == 2


@pytest.mark.parametrize("grpc_port, expected", [(None, 100), (0, 200)])
def test_there_are_files_for_its_connections_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grpc_port: int | None, expected: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(serving, "allow_files", asked.append)

    async def listen(server: Server) -> None:
        server.listen()
        for listening in server._sockets:
            listening.close()

    with made(tmp_path, grpc_port=grpc_port, max_connections=100) as server:
        asyncio.run(listen(server))
    assert asked == [expected + MAX_LINGERING]


def test_who_is_turned_away_is_counted_and_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def send(server: Server) -> None:
        async with started(server) as address, grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            for asked in (infer("Once"), infer("Once", colour=1)):  # no model is ready: "try again soon"
                with pytest.raises(grpc.RpcError):
                    await call(asked.SerializeToString(), timeout=WAIT_S)

    with made(tmp_path, grpc_port=0) as server, caplog.at_level(logging.DEBUG, "bluejay.server"):
        asyncio.run(send(server))
        counted = server.service.metrics.registry.get_sample_value
        for status in ("400", "503"):
            labels = {"dialect": "open_inference_grpc", "status": status}
            assert counted("bluejay_http_answers_total", labels) == 1
    lines = [record for record in caplog.records if record.getMessage().startswith("ModelInfer")]
    told = [(line.levelno, line.getMessage(), line.refused) for line in lines]  # type: ignore[attr-defined]
    assert told == [
        (logging.DEBUG, "ModelInfer 503", "Overloaded"),
        (logging.INFO, "ModelInfer 400", "InvalidRequest"),
    ]


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async def listen(server: Server) -> None:
        server.listen()

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with (
            made(tmp_path, grpc_port=port) as server,
            pytest.raises(ConfigError, match=f"gRPC on 127.0.0.1 port {port}.*--grpc-port N"),
        ):
            asyncio.run(listen(server))


def test_it_can_be_left_out(tmp_path: Path) -> None:
    async def listen(server: Server) -> str | None:
        server.listen()
        for listening in server._sockets:
            listening.close()
        return server.grpc_address

    with made(tmp_path, grpc_port=None) as server:
        assert asyncio.run(listen(server)) is None
