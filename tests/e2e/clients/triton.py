"""`tritonclient` over HTTP and gRPC. argv: URL, API key, model name. $GRPC: host:port of gRPC; without it, HTTP alone.

Its gRPC parameters know floats (`double_param`), which the Open Inference Protocol itself does not.
$UNLOADED is a second model that may be unloaded and loaded.
"""

import os
import sys

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from steps import Steps

URL, KEY, MODEL = sys.argv[1:]
GRPC, OTHER = os.environ.get("GRPC"), os.environ.get("UNLOADED", MODEL)
HEADERS = {"authorization": f"Bearer {KEY}"}
OPTIONS = {"max_length": 16, "do_sample": False}

steps = Steps()


def exercise(kind, module, client):
    """The same calls over both protocols."""

    def run(name, call):
        return steps.run(f"{kind}: {name}", call)

    def ask(method, *arguments, **options):
        # A copy: over HTTP the client writes into the headers that it is given, and leaves it there.
        return getattr(client, method)(*arguments, headers=dict(HEADERS), **options)

    as_json = {"as_json": True} if module is over_grpc else {}
    run("live", lambda: ask("is_server_live"))
    run("ready", lambda: ask("is_server_ready"))
    run("model ready", lambda: ask("is_model_ready", MODEL))
    run("model ready by version", lambda: ask("is_model_ready", MODEL, "1"))
    run("unknown model ready", lambda: ask("is_model_ready", "no-such-model"))
    run("metadata", lambda: ask("get_server_metadata", **as_json))
    metadata = run("model metadata", lambda: ask("get_model_metadata", MODEL, **as_json)) or {}
    run("unknown model's metadata", lambda: ask("get_model_metadata", "no-such-model", **as_json))
    run("model config", lambda: ask("get_model_config", MODEL, **as_json))
    run("statistics", lambda: ask("get_inference_statistics", MODEL, **as_json))
    run("index", lambda: ask("get_model_repository_index", **as_json))

    name = next((entry["name"] for entry in metadata.get("inputs", []) if entry["datatype"] == "BYTES"), "text_input")
    answer_name = next(
        (entry["name"] for entry in metadata.get("outputs", []) if entry["datatype"] == "BYTES"), "text_output"
    )

    def texts(*prompts, **options):
        told = module.InferInput(name, [len(prompts)], "BYTES")
        told.set_data_from_numpy(np.array([prompt.encode() for prompt in prompts], dtype=object), **options)
        return told

    def infer(*prompts, model=MODEL, parameters=OPTIONS, told=None, given=None, **options):
        inputs = given or [texts(*prompts, **(told or {}))]
        result = ask("infer", model, inputs, request_id="request-1", parameters=parameters, **options)
        response = result.get_response() if module is over_http else result.get_response(as_json=True)
        array = result.as_numpy(answer_name)
        data = (
            None if array is None else [text.decode() if isinstance(text, bytes) else text for text in array.flatten()]
        )
        kept = {key: value for key, value in response.items() if key != "raw_output_contents"}
        return {"response": kept, "texts": data, "shape": None if array is None else list(array.shape)}

    run("infer", lambda: infer("Once upon a time"))
    run("infer several", lambda: infer("Once upon a time", "One day a fox"))
    run("infer, an output by name", lambda: infer("Once", outputs=[module.InferRequestedOutput(answer_name)]))
    run("infer, an output that is not", lambda: infer("Once", outputs=[module.InferRequestedOutput("no-such-output")]))
    run("infer, a text beyond ASCII", lambda: infer("Füchse 🦊"))
    run("infer by version", lambda: infer("Once upon a time", model_version="1"))
    run("infer, a float", lambda: infer("Once upon a time", parameters={"max_length": 16, "temperature": 0.5}))
    run("infer, unknown model", lambda: infer("Once", model="no-such-model"))
    run("infer, a wrong option", lambda: infer("Once", parameters={"max_length": "many"}))
    run("infer, an unknown option", lambda: infer("Once", parameters={"max_length": 16, "no_such_option": 1}))
    numbers = module.InferInput(name, [1], "FP32")
    numbers.set_data_from_numpy(np.ones(1, dtype=np.float32))
    run("infer, a wrong datatype", lambda: infer(given=[numbers]))
    other = module.InferInput("no-such-input", [1], "BYTES")
    other.set_data_from_numpy(np.array([b"Once"], dtype=object))
    run("infer, an input that is not", lambda: infer(given=[other]))

    if module is over_http:
        asked = [module.InferRequestedOutput(answer_name, binary_data=False)]
        run("infer, JSON", lambda: infer("Once upon a time", told={"binary_data": False}, outputs=asked))
        run("infer, binary in, JSON out", lambda: infer("Once upon a time", outputs=asked))
        run("infer, JSON in, binary out", lambda: infer("Once upon a time", told={"binary_data": False}))
        for encoding in ("gzip", "deflate"):
            run(f"infer, {encoding}", lambda chosen=encoding: infer("Once", request_compression_algorithm=chosen))
        run("infer, a gzipped answer", lambda: infer("Once upon a time", response_compression_algorithm="gzip"))
        run(
            "infer asynchronously",
            lambda: ask("async_infer", MODEL, [texts("Once")], parameters=OPTIONS).get_result().as_numpy(answer_name),
        )
    else:
        run("infer asynchronously", lambda: waited(ask, MODEL, [texts("Once")], answer_name))

    run("unload", lambda: ask("unload_model", OTHER))
    run("unloaded: ready", lambda: ask("is_model_ready", OTHER))
    run("unloaded: infer", lambda: infer("Once", model=OTHER))
    run("load", lambda: ask("load_model", OTHER))
    run("loaded: ready", lambda: ask("is_model_ready", OTHER))
    run("loaded: infer", lambda: infer("Once", model=OTHER))
    run("unload an unknown model", lambda: ask("unload_model", "no-such-model"))
    run("load an unknown model", lambda: ask("load_model", "no-such-model"))


def waited(ask, model, inputs, name):
    from queue import Queue

    done = Queue()
    ask("async_infer", model, inputs, lambda result, error: done.put((result, error)), parameters=OPTIONS)
    result, error = done.get(timeout=60)
    if error:
        raise error
    return result.as_numpy(name)


with over_http.InferenceServerClient(URL.removeprefix("http://"), connection_timeout=60, network_timeout=60) as http:
    exercise("http", over_http, http)
if GRPC:
    with over_grpc.InferenceServerClient(GRPC) as grpc:
        exercise("grpc", over_grpc, grpc)

steps.finish()
