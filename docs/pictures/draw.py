"""Draw generate.svg, the picture in README.md, from what the default model writes.

    .venv/bin/python docs/pictures/draw.py
"""

import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

import bluejay

PROMPT = "Once upon a time there was a little blue jay who"
SEED = 3

llm = bluejay.LLM("default")
params = bluejay.SamplingParams(max_new_tokens=200, do_sample=True, temperature=0.8, top_k=50, seed=SEED)
story = llm.generate(PROMPT, params)[0].text

with Path("/dev/null").open("w") as nowhere:
    console = Console(record=True, width=88, file=nowhere, force_terminal=True)
    console.print(Text(f'$ bluejay generate --seed {SEED} \\\n    "{PROMPT}"', style="cyan"))
    console.print(Text.assemble((PROMPT, "bold"), story))
    picture = console.export_svg(title="bluejay")
# rich names a font on a host of its own choice; a picture in a README should ask nobody.
picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S).replace("Fira Code", "monospace")
Path(__file__).with_name("generate.svg").write_text(picture, encoding="utf-8")
