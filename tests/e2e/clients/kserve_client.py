"""The `kserve` package's clients. argv: URL, API key, model name. $GRPC: host:port of gRPC; without it, REST alone."""

import asyncio
import os
import sys

import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from steps import Steps

URL, KEY, MODEL = sys.argv[1:]
GRPC = os.environ.get("GRPC")
DOCUMENTED = "eleutherai-gpt-j-6b"
HEADERS = {"Authorization": f"Bearer {KEY}"}
UNICORNS = (
    "In a shocking finding, scientist discovered a herd of unicorns living in a remote, previously unexplored valley"
)

steps = Steps()
loop = asyncio.new_event_loop()


def run(name, call):
    return steps.run(name, lambda: loop.run_until_complete(call()))


v1 = InferenceRESTClient(RESTConfig(protocol="v1"))
v2 = InferenceRESTClient(RESTConfig(protocol="v2"))


def predict(name, body, model=DOCUMENTED, **options):
    run(name, lambda: v1.infer(URL, body, model_name=model, headers=HEADERS, **options))


run("v1: live", lambda: v1.is_server_live(URL))
run("v1: ready", lambda: v1.is_server_ready(URL))  # the client has none
run("v1: model ready", lambda: v1.is_model_ready(URL, MODEL, headers=HEADERS))
run("v1: documented model ready", lambda: v1.is_model_ready(URL, DOCUMENTED, headers=HEADERS))
run("v1: unknown model ready", lambda: v1.is_model_ready(URL, "no-such-model", headers=HEADERS))
predict("v1: one instance", {"parameters": {"min_length": 30, "max_length": 40}, "instances": [UNICORNS]})
predict("v1: by name", {"instances": ["Once upon a time"]}, model=MODEL)
predict("v1: several", {"parameters": {"max_length": 20}, "instances": ["Once upon a time", "One day a fox"]})
predict("v1: upper case", {"parameters": {"MAX_LENGTH": 12, "Top_K": 1}, "instances": ["Once upon a time"]})
predict(
    "v1: every parameter",
    {
        "parameters": {
            "min_length": 10,
            "max_length": 16,
            "temperature": 0.7,
            "top_k": 40,
            "top_p": 0.9,
            "repetition_penalty": 1.125,
        },
        "instances": ["Once upon a time"],
    },
)
predict("v1: unknown parameter", {"parameters": {"max_length": 12, "no_such": 1}, "instances": ["Once upon a time"]})
predict("v1: unknown model", {"instances": ["Once upon a time"]}, model="no-such-model")
predict("v1: no instances", {"parameters": {"max_length": 12}})
predict("v1: instances that are no list", {"instances": "Once upon a time"})
predict("v1: no instance", {"instances": []})
predict("v1: an instance that is no text", {"instances": [1]})
predict("v1: a type that is none", {"parameters": {"max_length": "many"}, "instances": ["Once upon a time"]})
predict("v1: a negative length", {"parameters": {"max_length": -1}, "instances": ["Once upon a time"]})
run("v1: explain", lambda: v1.explain(URL, DOCUMENTED, {"instances": ["a"]}, headers=HEADERS))

run("v2: live", lambda: v2.is_server_live(URL))
run("v2: ready", lambda: v2.is_server_ready(URL))
run("v2: model ready", lambda: v2.is_model_ready(URL, MODEL, headers=HEADERS))
run("v2: unknown model ready", lambda: v2.is_model_ready(URL, "no-such-model", headers=HEADERS))

metadata = httpx.get(f"{URL}/v2/models/{MODEL}", headers=HEADERS).json()
tensor = next((entry["name"] for entry in metadata.get("inputs") or [] if entry["datatype"] == "BYTES"), "text_input")


def texts(*prompts, binary=False, as_shape=None):
    array = np.array([prompt.encode() for prompt in prompts], dtype=object).reshape(as_shape or [len(prompts)])
    told = InferInput(tensor, list(array.shape), "BYTES")
    told.set_data_from_numpy(array, binary_data=binary)
    return told


def request(*inputs, model=MODEL, **options):
    return InferRequest(model, list(inputs), request_id="request-1", **options)


async def rest(asked, model=MODEL):
    answer = await v2.infer(URL, asked, model_name=model, headers=dict(HEADERS))
    return described(answer)


def described(answer):
    return {
        "model_name": answer.model_name,
        "id": answer.id,
        "parameters": {key: str(value) for key, value in (answer.parameters or {}).items()},
        "outputs": [
            {
                "name": output.name,
                "datatype": output.datatype,
                "shape": list(output.shape),
                "data": [text.decode() if isinstance(text, bytes) else text for text in output.as_numpy().flatten()]
                if output.datatype == "BYTES"
                else output.as_numpy().flatten().tolist(),
            }
            for output in answer.outputs
        ],
    }


OPTIONS = {"max_length": 16, "do_sample": False, "temperature": 1.0}
run("v2: infer", lambda: rest(request(texts("Once upon a time"), parameters=OPTIONS)))
run("v2: infer several", lambda: rest(request(texts("Once upon a time", "One day a fox"), parameters=OPTIONS)))
run("v2: infer in two dimensions", lambda: rest(request(texts("Once", "One", as_shape=[2, 1]), parameters=OPTIONS)))
run("v2: infer, binary in", lambda: rest(request(texts("Once upon a time", binary=True), parameters=OPTIONS)))
run(
    "v2: infer, binary in and out",
    lambda: rest(request(texts("Once upon a time", binary=True), parameters={**OPTIONS, "binary_data_output": True})),
)
outputs = [entry["name"] for entry in metadata.get("outputs") or []] or ["text_output"]
run(
    "v2: infer, an output asked for",
    lambda: rest(
        request(
            texts("Once upon a time"),
            parameters=OPTIONS,
            request_outputs=[RequestedOutput(outputs[0], {"binary_data": False})],
        )
    ),
)
run(
    "v2: infer, an output that is not",
    lambda: rest(request(texts("Once"), parameters=OPTIONS, request_outputs=[RequestedOutput("no-such-output")])),
)
run("v2: infer, a text beyond ASCII", lambda: rest(request(texts("Füchse 🦊", binary=True), parameters=OPTIONS)))
run(
    "v2: infer, a dict",
    lambda: rest({"inputs": [{"name": tensor, "shape": [1], "datatype": "BYTES", "data": ["One"]}]}),
)
run("v2: infer, unknown model", lambda: rest(request(texts("Once"), model="no-such-model"), model="no-such-model"))
run(
    "v2: infer, a wrong shape",
    lambda: rest({"inputs": [{"name": tensor, "shape": [3], "datatype": "BYTES", "data": ["One"]}]}),
)
run(
    "v2: infer, a wrong datatype",
    lambda: rest({"inputs": [{"name": tensor, "shape": [1], "datatype": "FP32", "data": [1.0]}]}),
)
run("v2: infer, nothing", lambda: rest({}))
run("v2: infer, a wrong option", lambda: rest(request(texts("Once"), parameters={"max_length": "many"})))


async def with_grpc(call):
    async with InferenceGRPCClient(GRPC) as client:
        return await call(client, [("authorization", HEADERS["Authorization"])])


def grpc_run(name, call):
    run(f"grpc: {name}", lambda: with_grpc(call))


if GRPC:
    grpc_run("live", lambda client, headers: client.is_server_live(headers=headers))
    grpc_run("ready", lambda client, headers: client.is_server_ready(headers=headers))
    grpc_run("model ready", lambda client, headers: client.is_model_ready(MODEL, headers=headers))
    grpc_run("unknown model ready", lambda client, headers: client.is_model_ready("no-such-model", headers=headers))

    async def infer(client, headers, *inputs, model=MODEL, **options):
        return described(await client.infer(request(*inputs, model=model, **options), headers=headers))

    # Parameters of gRPC are booleans, integers and strings: a float travels as a string.
    told = {"max_length": 16, "do_sample": False, "temperature": "1.0"}
    grpc_run("infer", lambda client, headers: infer(client, headers, texts("Once upon a time"), parameters=told))
    grpc_run(
        "infer raw",
        lambda client, headers: infer(client, headers, texts("Once upon a time", binary=True), parameters=told),
    )
    grpc_run(
        "infer several",
        lambda client, headers: infer(client, headers, texts("Once upon a time", "One day a fox"), parameters=told),
    )
    grpc_run(
        "infer, a float", lambda client, headers: infer(client, headers, texts("Once"), parameters={"temperature": 0.5})
    )
    grpc_run(
        "infer, unknown model", lambda client, headers: infer(client, headers, texts("Once"), model="no-such-model")
    )
    grpc_run(
        "infer, a wrong option",
        lambda client, headers: infer(client, headers, texts("Once"), parameters={"max_length": "many"}),
    )

steps.finish()
