"""What the documents of the hosted services print, letter by letter, in printed/; hosts, ids and keys are put in."""

from __future__ import annotations

import re
from pathlib import Path

PRINTED = Path(__file__).with_name("printed")
KSERVE = ("kserve-unicorns", "kserve-batch", "kserve-sentiment", "kserve-sql")  # the last two end in ":predic"
NEURO = {"neuro-gpt-j": "60ca2a1e54f6ecb69867c72c", "neuro-gpt-neo": "60a40f81b635d67d627bf6b2"}


def kserve_command(name: str, url: str) -> str:
    """A command line of the KServe document; a reader leaves out the prompt, "$ "."""
    return _printed(f"{name}.sh").removeprefix("$ ").replace("<URL>", url)


def baseten_command(url: str, version_id: str, api_key: str) -> str:
    """The command line of Baseten's document: any host instead of Baseten's."""
    command = _printed("baseten.sh").replace("https://app.baseten.co", url)
    return command.replace("{MODEL_VERSION_ID}", version_id).replace("{YOUR_API_KEY}", api_key)


def neuro_script(name: str, token: str) -> str:
    """A script of Neuro's documents. GPT-J's lacks two commas between options; a reader writes them."""
    script = _printed(f"{name}.txt").replace("'API_TOKEN'", repr(token))
    return re.sub(r"^(    '\w+': ?\w+(?:\.\d+)?)( #)", r"\1,\2", script, flags=re.M)


def _printed(file: str) -> str:
    return (PRINTED / file).read_text(encoding="utf-8")
