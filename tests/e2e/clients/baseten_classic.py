"""Baseten's package before 0.9. argv: URL, API key, model name. It keeps URL and key in $HOME/.baseten_config."""

import logging
import sys
import warnings

warnings.simplefilter("ignore")  # its dependencies are of 2023

import baseten  # noqa: E402
from steps import Steps  # noqa: E402

URL, KEY, MODEL = sys.argv[1:]
MODEL_ID, VERSION_ID = "8wl9m4q", "rqvz1xw"  # as Baseten's were: seven letters and digits
PROMPT = "If I was a billionaire, I would"

steps = Steps()
logged = []


class Kept(logging.Handler):
    """A 503 is no error to this client: it logs, and returns None."""

    def emit(self, record):
        logged.append(record.getMessage())


logging.getLogger("baseten").addHandler(Kept())

baseten.configure(URL)
baseten.login(KEY)
model, version, named = (
    baseten.deployed_model_id(MODEL_ID),
    baseten.deployed_model_version_id(VERSION_ID),
    baseten.deployed_model_id(MODEL),
)

steps.run("documented", lambda: model.predict([{"prompt": PROMPT, "max_length": 50}]))
steps.run("a version", lambda: version.predict([{"prompt": PROMPT, "max_length": 50}]))
steps.run("a version's id as a model's", lambda: baseten.deployed_model_id(VERSION_ID).predict({"prompt": PROMPT}))
steps.run("by name", lambda: named.predict({"prompt": PROMPT, "max_length": 20}))
steps.run("a dict", lambda: model.predict({"prompt": PROMPT, "max_length": 20}))
steps.run(
    "several", lambda: model.predict([{"prompt": PROMPT, "max_length": 20}, {"prompt": "One day", "max_length": 12}])
)
steps.run("defaults", lambda: model.predict({"prompt": PROMPT}))
steps.run(
    "every parameter",
    lambda: model.predict(
        {
            "prompt": PROMPT,
            "max_length": 24,
            "min_length": 16,
            "do_sample": False,
            "early_stopping": True,
            "num_beams": 4,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.1,
            "length_penalty": 1.0,
            "encoder_no_repeat_ngram_size": 3,
            "num_return_sequences": 2,
            "max_time": 30.0,
            "num_beam_groups": 2,
            "diversity_penalty": 0.5,
            "remove_invalid_values": True,
        }
    ),
)
steps.run("sampled", lambda: model.predict({"prompt": PROMPT, "max_length": 20, "do_sample": True, "temperature": 0.8}))
steps.run("over the limits", lambda: model.predict({"prompt": PROMPT, "max_length": 9999, "min_length": 65}))
steps.run("no prompt", lambda: model.predict({"max_length": 20}))
steps.run("nothing", lambda: model.predict([]))
steps.run("a prompt that is none", lambda: model.predict({"prompt": 7}))
steps.run("a type that is none", lambda: model.predict({"prompt": PROMPT, "max_length": "many"}))
steps.run("groups that do not divide", lambda: model.predict({"prompt": PROMPT, "num_beams": 3, "num_beam_groups": 2}))
steps.run("no object", lambda: model.predict("a text"))
steps.run("a path that is none", lambda: baseten.deployed_model_id("a/b").predict({"prompt": PROMPT}))
steps.run("summary", baseten.models_summary)  # over GraphQL
steps.run("log", lambda: logged)
steps.finish()
