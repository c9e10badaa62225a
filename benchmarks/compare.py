"""Run Bluejay and its rivals side by side: `python -m benchmarks.compare` (or `make benchmarks`).

Contests, each alternating in one run: `models` (with CTranslate2 int8, the yardstick), `engine` (many requests at
once), `openvino`, `floats` (rivals with float weights), `matrix` (one product). Each writes
docs/benchmarks/cpu-rivals-CONTEST.json, and the page and the chart are drawn anew out of all of
them. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.contest import ROOT, Entry, Task, run
from benchmarks.machine import describe

BLUEJAY = ".venv/bin/python"
CTRANSLATE2 = ".venvs/rivals-ctranslate2/bin/python"
OPENVINO = ".venvs/rivals-openvino/bin/python"
TRANSFORMERS = ".venvs/oracle/bin/python"

PROMPT, STEPS = 32, 16
LAYERS = 4
MODEL_TASKS = [
    *(
        Task(f"decode, batch {batch}", "decode", {"batch": batch, "prompt": PROMPT, "steps": STEPS})
        for batch in (1, 8, 16)
    ),
    Task("prefill, 512 tokens", "prefill", {"tokens": 512}),
]
BATCH_TASKS = [Task("16 requests of 32 + 64, 1024 tokens", "generate", {"batch": 16, "prompt": PROMPT, "new": 64})]
MATRIX_TASKS = [Task(f"M={rows}", "multiply", {"rows": rows}) for rows in (1, 4, 8, 16, 32, 128, 512)]


def entries(contest: str, threads: int) -> list[Entry]:
    """Who takes part in a contest; those of one contest are in memory together."""

    def model(name: str, python: str, module: str, variant: str) -> Entry:
        return Entry(name, python, module, {"variant": variant, "n_layer": LAYERS, "threads": threads})

    def matrix(name: str, python: str, module: str, variant: str) -> Entry:
        return Entry(name, python, module, {"variant": variant, "threads": threads})

    bluejay = [model(f"Bluejay {kind}", BLUEJAY, "bluejay_model", kind) for kind in ("int8", "int4")]
    return {
        "models": [
            *bluejay,
            model("CTranslate2 int8", CTRANSLATE2, "ctranslate2_model", "int8"),
        ],
        "engine": [
            model("Bluejay int8", BLUEJAY, "bluejay_engine", "int8"),
            model("CTranslate2 int8", CTRANSLATE2, "ctranslate2_model", "int8"),
        ],
        "openvino": [
            *bluejay,
            model("OpenVINO int8", OPENVINO, "openvino_model", "int8"),
            model("OpenVINO int4", OPENVINO, "openvino_model", "int4"),
        ],
        "floats": [
            *bluejay,
            model("CTranslate2 float32", CTRANSLATE2, "ctranslate2_model", "float32"),
            model("transformers float32", TRANSFORMERS, "transformers_model", "float32"),
            model("transformers bfloat16", TRANSFORMERS, "transformers_model", "bfloat16"),
        ],
        "matrix": [
            matrix("Bluejay int8", BLUEJAY, "bluejay_matrix", "int8"),
            matrix("Bluejay int4", BLUEJAY, "bluejay_matrix", "int4"),
            matrix("OpenVINO int8", OPENVINO, "openvino_matrix", "int8"),
            matrix("OpenVINO int4", OPENVINO, "openvino_matrix", "int4"),
            matrix("PyTorch int8pack", BLUEJAY, "torch_matrix", "int8pack"),
            matrix("PyTorch int4pack", BLUEJAY, "torch_matrix", "int4pack"),
            matrix("PyTorch int8 dynamic", BLUEJAY, "torch_matrix", "int8dynamic"),
            matrix("PyTorch bfloat16", BLUEJAY, "torch_matrix", "bfloat16"),
            matrix("PyTorch float32", BLUEJAY, "torch_matrix", "float32"),
        ],
    }[contest]


def main() -> None:
    """Run the contests that the command line names, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contests", nargs="*", choices=report.CONTESTS, default=report.CONTESTS)
    parser.add_argument("--rounds", type=int, default=5, help="readings of each contestant and task (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="of each contestant (default: 2)")
    parser.add_argument("--only", help="contestants whose names contain this, or these, parted by commas")
    parser.add_argument("--tasks", help="tasks whose names contain this, or these, parted by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where results are written")
    parser.add_argument("--add", action="store_true", help="keep the readings there are, if they are of this commit")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not before the contestants are ended
    asked.out.mkdir(parents=True, exist_ok=True)
    for contest in asked.contests:
        among = [entry for entry in entries(contest, asked.threads) if _matches(entry.name, asked.only)]
        all_tasks = {"matrix": MATRIX_TASKS, "engine": BATCH_TASKS}.get(contest, MODEL_TASKS)
        tasks = [task for task in all_tasks if _matches(task.name, asked.tasks)]
        file = asked.out / f"cpu-rivals-{contest}.json"
        about = {"command": _command(contest, asked), **describe()}
        earlier = _earlier(file, about["commit"]) if asked.add else {}
        run(among, tasks, asked.rounds, ROOT / "runs/benchmarks", partial(_write, file, about, earlier))
    report.write(asked.out)


def _command(contest: str, asked: argparse.Namespace) -> str:
    options = "".join(f' --{key} "{value}"' for key in ("only", "tasks") if (value := getattr(asked, key)))
    added = " --add" if asked.add else ""
    return f"python -m benchmarks.compare {contest} --rounds {asked.rounds} --threads {asked.threads}{options}{added}"


def _earlier(file: Path, commit: str) -> dict[str, Any]:
    """The contestants of a run before, with their readings.

    Raises: SystemExit if they come from another commit.
    """
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    if found["commit"] != commit:
        sys.exit(f"{file} holds readings of commit {found['commit']}, this is {commit}; leave --add away to begin anew")
    contestants: dict[str, Any] = found["contestants"]
    return contestants


def _write(file: Path, about: dict[str, Any], earlier: dict[str, Any], found: dict[str, Any]) -> None:
    """Write a contest's file: readings of this run behind the earlier ones."""
    contestants = dict(earlier)
    for name, contestant in found.items():
        before = earlier.get(name, {}).get("readings", {})
        readings = {task: before.get(task, []) + new for task, new in contestant["readings"].items()}
        contestants[name] = {**contestant, "readings": readings}
    file.write_text(json.dumps({**about, "contestants": contestants}, indent=1, ensure_ascii=False) + "\n")


def _matches(name: str, wanted: str | None) -> bool:
    return wanted is None or any(part.strip() in name for part in wanted.split(","))


if __name__ == "__main__":
    main()
