"""Draw generate.svg, the picture in README.md, from what the default model writes.

    .venv/bin/python docs/pictures/draw.py
"""

from pathlib import Path

from rich.console import Console
from rich.text import Text

import bluejay

PROMPT = "Once upon a time there was a little blue jay who"
SEED = 7

llm = bluejay.LLM("default")
params = bluejay.SamplingParams(max_new_tokens=120, do_sample=True, temperature=0.8, top_k=0, top_p=0.95, seed=SEED)
story = llm.generate(PROMPT, params)[0].text

with Path("/dev/null").open("w") as nowhere:
    console = Console(record=True, width=88, file=nowhere, force_terminal=True)
    console.print(Text(f'$ bluejay generate --seed {SEED} --max-new-tokens 120 \\\n    "{PROMPT}"', style="cyan"))
    console.print(Text.assemble((PROMPT, "bold"), story))
    console.save_svg(str(Path(__file__).with_name("generate.svg")), title="bluejay")
