"""Neuro's `npu`. argv: URL, API key, model name. The client knows a server only by $BASE_URL, read when it is imported.

Strings that are no 24 hexadecimal digits are names to this client, not ids: it sends them as `model_name`.
"""

import os
import sys
import tempfile
from pathlib import Path

from steps import Steps

URL, KEY, MODEL = sys.argv[1:]
GPT_J, GPT_NEO = "60ca2a1e54f6ecb69867c72c", "60a40f81b635d67d627bf6b2"
os.environ["BASE_URL"] = f"{URL}/"

import npu  # noqa: E402
import numpy as np  # noqa: E402

steps = Steps()
data = ["When I visit Bath I will"]


def documented(model_id, **kwargs):
    """The document's script: log in, predict, print."""
    npu.api(KEY, deployed=True)
    output = npu.predict(model_id, data, kwargs)
    print(output)
    return output


steps.run("gpt-j", lambda: documented(GPT_J, max_length=15, remove_input=True, penalty=1.0))
steps.run("gpt-neo", lambda: documented(GPT_NEO, max_length=15))
steps.run("named", lambda: npu.predict(MODEL, data, {"max_length": 15}))
steps.run("with the input", lambda: npu.predict(GPT_J, data, {"max_length": 15, "remove_input": False}))
steps.run("response_length", lambda: npu.predict(GPT_J, data, {"response_length": 4, "do_sample": False}))
several = [f"Number {number} is" for number in range(11)]
steps.run("list of eleven", lambda: npu.predict(GPT_J, several, {"max_new_tokens": 2, "do_sample": False}))
steps.run("array of two", lambda: npu.predict(GPT_J, np.array(["One day", "A fox"]), {"max_length": 8}))
steps.run("nested list", lambda: npu.predict(GPT_J, [["One day"]], {"max_length": 8}))
steps.run(
    "beams", lambda: npu.predict(GPT_J, data, {"max_length": 12, "num_beams": 2, "do_sample": False, "top_k": 50})
)

with tempfile.TemporaryDirectory() as folder:
    text = Path(folder, "prompt.txt")
    text.write_text("When I visit Bath I will")
    steps.run("a file", lambda: npu.predict(GPT_J, str(text), {"max_length": 15}))

steps.run("unknown id", lambda: npu.predict("0" * 24, data, {"max_length": 15}))
steps.run("unknown option", lambda: npu.predict(GPT_J, data, {"max_length": 15, "maximal_length": 15}))
steps.run("wrong type", lambda: npu.predict(GPT_J, data, {"max_length": "many"}))
steps.run("negative penalty", lambda: npu.predict(GPT_J, data, {"max_length": 15, "penalty": -1.0}))
steps.run("object array", lambda: npu.predict(GPT_J, [{"a": "pickle"}], {"max_length": 15}))
steps.run("numbers", lambda: npu.predict(GPT_J, np.zeros(3), {"max_length": 15}))
steps.run("scripts", lambda: npu.predict(GPT_J, data, {"max_length": 15}, scripts=["print(1)"]))


def waited(task):
    return {"id": task.task_id, "state": task.task_state, "type": task.task_type, "result": task.get_result()}


steps.run("not deployed: log in", lambda: npu.api(KEY, deployed=False))
# The first uploads its data, the second finds it there by its hash.
for name in ("uploads", "finds its data"):
    steps.run(
        f"not deployed: {name}",
        lambda: waited(npu.predict(GPT_J, data, {"max_length": 15, "do_sample": False})),
    )
steps.run(
    "not deployed: asynchronous",
    lambda: waited(npu.predict(GPT_J, ["One day", "A fox"], {"max_length": 8}, asynchronous=True)),
)
loader = npu.core.DataLoader([[np.array(["One day", "A fox"])], [np.array(["A bird"])]])
steps.run("not deployed: a loader", lambda: waited(npu.predict(GPT_J, loader, {"max_length": 8})))
steps.run("not deployed: named", lambda: waited(npu.predict(MODEL, data, {"max_length": 15})))
steps.run("not deployed: data by id", lambda: waited(npu.predict(GPT_J, "0" * 24, {"max_length": 15})))
steps.run("not deployed: wrong type", lambda: waited(npu.predict(GPT_J, data, {"max_length": "many"})))
steps.run("export of a result", lambda: npu.export_task_result("no-such-task"))
steps.run("train", lambda: npu.train(GPT_J, (np.zeros(2), np.zeros(2)), loss="loss", metrics=["accuracy"]))
steps.run("compile by label", lambda: npu.compile(None, model_label="anything"))
steps.run("export", lambda: npu.export(GPT_J, as_object=False, save_to_disk=False))

steps.finish()
