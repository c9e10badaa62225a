"""Draw the page and the chart out of the JSON files that `compare` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # the backend is chosen first
from benchmarks.contest import QUIET
from benchmarks.contestants.matrix import GROUP_SIZE, INPUTS, OUTPUTS
from benchmarks.shape import Shape

CONTESTS = ["models", "engine", "openvino", "floats", "matrix"]
YARDSTICK, LINK = "CTranslate2 int8", "Bluejay int8"
# What Bluejay set out to reach: times as fast as the yardstick.
GOALS = {
    ("Bluejay int8", "decode, batch 1"): 2.2,
    ("Bluejay int4", "decode, batch 1"): 3.6,
    ("Bluejay int8", "decode, batch 8"): 2.0,
    ("Bluejay int4", "decode, batch 8"): 2.0,
    ("Bluejay int8", "decode, batch 16"): 1.8,
    ("Bluejay int4", "decode, batch 16"): 1.8,
    ("Bluejay int8", "prefill, 512 tokens"): 1.1,
    ("Bluejay int4", "prefill, 512 tokens"): 1.3,
}

FEWEST_ROUNDS = 5

Found = dict[str, Any]


def write(folder: Path) -> None:
    """Write cpu-rivals.md and, where the contest of models was run, cpu-rivals.svg."""
    files = {contest: folder / f"cpu-rivals-{contest}.json" for contest in CONTESTS}
    found: dict[str, Found] = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if "models" in found:
        draw(found, folder / "cpu-rivals.svg")
    page = "\n\n".join(part for part in _page(found) if part)
    (folder / "cpu-rivals.md").write_text(page + "\n")


def _page(found: dict[str, Found]) -> Iterable[str]:
    shape = Shape()
    yield "# Bluejay and its rivals on a CPU"
    yield (
        "*Written by `make benchmarks`; do not edit. How the sides are held to the same work: "
        "[benchmarks/README.md](../../benchmarks/README.md).*"
    )
    if "models" in found:
        yield "![How many times as fast as CTranslate2 int8 Bluejay and its rivals are](cpu-rivals.svg)"
    yield (
        f"GPT-J-6B's shapes with random weights: {shape.n_layer} of its 28 layers and the head, {_millions(shape)} "
        "million weights for each token. Decoding goes on from prompts of 32 tokens; prefill is one prompt of 512 "
        "tokens to its first new token. Medians of alternating readings; in parentheses their range."
    )
    if "models" in found:
        yield "## CTranslate2"
        yield _model_table(found["models"])
        yield _goals(found["models"])
        yield _provenance(found["models"])
    if "engine" in found:
        yield "## Many requests at once"
        yield "Sixteen requests that come together, from the first call to the last token, prompts included."
        yield _model_table(found["engine"])
        yield _provenance(found["engine"])
    if "openvino" in found:
        yield "## OpenVINO"
        yield _model_table(found["openvino"])
        yield _provenance(found["openvino"])
    if "floats" in found:
        yield "## Float weights"
        yield _model_table(found["floats"])
        yield _provenance(found["floats"])
    if "matrix" in found:
        yield "## One matrix"
        yield (
            f"{OUTPUTS} outputs of {INPUTS} inputs, M rows of activations; milliseconds for one product. Bluejay's "
            f"int8 and every int4 have a scale for each {GROUP_SIZE} inputs, the other int8 one for each output. Each "
            "side goes through copies of the matrix that are together larger than the caches. PyTorch's packed "
            "operators take and give bfloat16, the others float32."
        )
        yield _matrix_table(found["matrix"])
        yield _provenance(found["matrix"])


def _millions(shape: Shape) -> str:
    return f"{shape.parameters_per_token / 1e6:,.0f}"


def seconds(found: Found, name: str, task: str) -> list[float]:
    """The readings of a contestant, round by round; none if it failed or did not take part."""
    readings = found["contestants"].get(name, {}).get("readings", {}).get(task, [])
    return [reading["seconds"] for reading in readings]


def tokens(task: str) -> int:
    """What one reading of a model's task yields: a step's tokens, or a prompt's."""
    return int(task.removesuffix(" tokens").rsplit(" ", 1)[1])


def ratio(found: Found, name: str, task: str, against: str) -> float | None:
    """How many times as fast: the median of the rounds' ratios, each of readings that followed one another."""
    pairs = list(zip(seconds(found, against, task), seconds(found, name, task), strict=False))
    return median(theirs / ours for theirs, ours in pairs) if pairs else None


def _tasks(found: Found) -> list[str]:
    any_readings: dict[str, Any] = next(iter(found["contestants"].values()))["readings"]
    return list(any_readings)


def _model_table(found: Found) -> str:
    tasks = _tasks(found)
    rows = []
    for name, contestant in found["contestants"].items():
        cells = [_cell(seconds(found, name, task), tokens(task)) for task in tasks]
        rows.append([name, *cells] if any(cells) else [name, f"does not run: {contestant.get('failure')}"])
    heads = [f"{task}: tok/s" for task in tasks]
    table = _table(["", *heads], rows)
    steps = [[name, *(_ms(seconds(found, name, task)) for task in tasks)] for name in found["contestants"]]
    return table + "\n\nThe same in milliseconds, of a step or of the prompt:\n\n" + _table(["", *tasks], steps)


def _cell(readings: Sequence[float], num_tokens: int) -> str:
    if not readings:
        return ""
    slowest, fastest = num_tokens / max(readings), num_tokens / min(readings)
    return f"{num_tokens / median(readings):.1f} ({slowest:.1f} to {fastest:.1f})"


def _ms(readings: Sequence[float]) -> str:
    return f"{1e3 * median(readings):.1f}" if readings else ""


def _goals(found: Found) -> str:
    rows = []
    for (name, task), goal in GOALS.items():
        reached = ratio(found, name, task, YARDSTICK)
        if reached is not None:
            rows.append([f"{name}, {task}", f"{reached:.2f} ×", f"{goal} ×", "yes" if reached >= goal else "no"])
    if not rows:
        return ""
    return f"Against {YARDSTICK}, medians of the rounds' ratios:\n\n" + _table(["", "reached", "goal", "met"], rows)


def _matrix_table(found: Found) -> str:
    tasks = _tasks(found)
    rows = []
    for name, contestant in found["contestants"].items():
        cells = [_ms(seconds(found, name, task)) for task in tasks]
        rows.append([name, *cells] if any(cells) else [name, f"does not run: {contestant.get('failure')}"])
    return _table(["", *tasks], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in rows:
        cells = [*row, *[""] * (len(heads) - len(row))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _provenance(found: Found) -> str:
    """Machine, versions, commit, command, date, and what disturbed the run."""
    machine = found["machine"]
    readings = [
        reading
        for contestant in found["contestants"].values()
        for task in contestant["readings"].values()
        for reading in task
    ]
    loud = sum(reading["others"] > QUIET for reading in readings)
    commit = found["commit"] + (f" and {n} changed files" if (n := found["changed_files"]) else "")
    versions = {name: _version(contestant) for name, contestant in found["contestants"].items()}
    parts = [
        f"- Machine: {machine['processor']} (family/model/stepping {machine['family_model_stepping']}), "
        f"{machine['cores']} cores{' of a virtual machine' if machine['virtual'] else ''}, "
        f"{', '.join(machine['instruction_sets'])}; {', '.join(machine['cache_per_core_chip'])}; "
        f"{machine['memory_gib']} GiB; {machine['kernel']}",
        "- Versions: " + "; ".join(f"{name}: {version}" for name, version in versions.items()),
        f"- Commit {commit}, {found['date']}: `{found['command']}`",
    ]
    rounds = min(len(task) for contestant in found["contestants"].values() for task in contestant["readings"].values())
    if rounds < FEWEST_ROUNDS:
        parts.append(f"- Preliminary: {rounds} rounds, fewer than {FEWEST_ROUNDS}; not to be quoted.")
    if loud:
        parts.append(
            f"- The machine was not quiet: during {loud} of {len(readings)} readings other processes took more than "
            f"{QUIET} processors, at most {max(reading['others'] for reading in readings):.1f}."
        )
    return "\n".join(parts)


def _version(contestant: Found) -> str:
    facts = contestant.get("facts", {})
    extra = [f"PyTorch {facts['torch']}"] if "torch" in facts else []
    extra += [f"{facts[key]}" for key in ("kernels", "compute_type") if key in facts]
    extra += [f"{facts['threads']} threads"] if "threads" in facts else []
    return str(facts.get("version", "unknown")) + (f" ({', '.join(extra)})" if extra else "")


def draw(found: dict[str, Found], file: Path) -> None:
    """A panel for each task, a bar for each contestant: how many times as fast as the yardstick."""
    models = found["models"]
    tasks = _tasks(models)
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10, "svg.hashsalt": "bluejay"})
    times = {task: _chained(found, task) for task in tasks}
    most = max(map(len, times.values()))
    figure, axes = plt.subplots(2, -(-len(tasks) // 2), figsize=(10, 1.6 + 0.56 * most), squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        _panel(axis, times[task], task)
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    machine = models["machine"]
    figure.suptitle(
        f"GPT-J-6B's shapes, {Shape().n_layer} layers and head: speed, {YARDSTICK} being 1 (longer is faster)\n"
        f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['instruction_sets'])}; {models['date']}",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def _chained(found: dict[str, Found], task: str) -> dict[str, float]:
    """Times as fast as the yardstick, by contestant.

    Machines change their speed from run to run: who was not in the yardstick's run is compared with Bluejay int8 in its
    own run, and that with the yardstick.
    """
    link = ratio(found["models"], LINK, task, YARDSTICK)
    times: dict[str, float] = {}
    for contest in (name for name in CONTESTS if name in found and name != "matrix"):
        for name in found[contest]["contestants"]:
            direct = contest == "models"
            measured = ratio(found[contest], name, task, YARDSTICK if direct else LINK)
            if measured is not None and (direct or link is not None):
                times.setdefault(name, measured if direct or link is None else measured * link)
    return times


def _panel(axis: Any, times: dict[str, float], task: str) -> None:
    axis.barh(list(times), list(times.values()), color=[_color(name) for name in times])
    axis.invert_yaxis()
    for place, value in enumerate(times.values()):
        axis.text(value, place, f" {value:.2f}", va="center", fontsize=9)
    axis.axvline(1, color="#555555", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1.15 * max(times.values(), default=1))
    axis.set_title(task, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _color(name: str) -> str:
    return "#1f6fb2" if name.startswith("Bluejay") else "#b4b9bf"
