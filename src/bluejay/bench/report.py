"""What was measured, as figures for programs and as a table and two sentences for people."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING

from bluejay.bench.engine import Timings
from bluejay.bench.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table

RESTLESS = 1.5  # fastest over slowest reading: 1.2 in the quietest runs on two shared cores, 2 to 8 in restless ones


@dataclass(frozen=True)
class Subject:
    """What was measured, and how.

    Attributes:
        model, shape: the name of the opened model, or that of the shape with random weights; the other one is None.
        layers: blocks that ran.
        quantize: "int8", "int4" or "none"; group_size is then None.
        dtype: that activations are computed in.
        threads: that compute, and that read memory.
        kernels: instruction set of the compiled kernels; "pytorch" for a network of floats.
        torch_version, bluejay_version: of the libraries.
        load_s: seconds for making or opening the network.
        weight_bytes_per_step: see `weights.step_weight_bytes`.
        kv_bytes_per_step: keys and values that a step reads, the mean over a run's steps; not among the weights.
    """

    model: str | None
    shape: str | None
    layers: int
    quantize: str
    group_size: int | None
    dtype: str
    threads: int
    kernels: str
    torch_version: str
    bluejay_version: str
    load_s: float
    weight_bytes_per_step: int
    kv_bytes_per_step: int


def figures(subject: Subject, workload: Workload, timings: Timings) -> dict[str, str | int | float | None]:
    """Everything under the names that `--json` prints; names carry their units, GB are 10^9 bytes.

    Medians over the steps, the prompts and the readings of memory's speed.
    """
    step_s, prefill_s = median(timings.step_s), median(timings.prefill_s)
    bandwidth = median(timings.bandwidth_gb_per_s)
    achieved = subject.weight_bytes_per_step / step_s / 1e9
    return {
        **asdict(subject),
        **asdict(workload),
        "decode_tokens_per_s": workload.batch_size / step_s,
        "decode_ms_per_step": 1e3 * step_s,
        "decode_ms_per_step_min": 1e3 * min(timings.step_s),
        "decode_ms_per_step_p90": 1e3 * _p90(timings.step_s),
        "prefill_tokens_per_s": workload.batch_size * workload.prompt_tokens / prefill_s,
        "prefill_s": prefill_s,
        "achieved_gb_per_s": achieved,
        "read_bandwidth_gb_per_s": bandwidth,
        "read_bandwidth_gb_per_s_min": min(timings.bandwidth_gb_per_s),
        "read_bandwidth_gb_per_s_max": max(timings.bandwidth_gb_per_s),
        "bandwidth_ratio": achieved / bandwidth,
        "peak_memory_bytes": timings.peak_memory_bytes,
    }


def to_json(found: dict[str, str | int | float | None]) -> str:
    """One line."""
    return json.dumps(found)


def sentences(found: dict[str, str | int | float | None]) -> list[str]:
    """What the figures mean."""
    f = {name: value for name, value in found.items() if isinstance(value, int | float)}
    rows = f"{f['batch_size']} rows" if f["batch_size"] > 1 else "one row"
    reads = (
        f"A step reads {_gb(f['weight_bytes_per_step'])} of weights at {f['achieved_gb_per_s']:.1f} GB/s: "
        f"{f['bandwidth_ratio']:.2f} of the {f['read_bandwidth_gb_per_s']:.1f} GB/s that plain reading reaches "
        f"here with {_threads(int(f['threads']))}."
    )
    if f["bandwidth_ratio"] > 1:
        reads += " More than all of it: the weights come out of caches, or the machine's speed changed meanwhile."
    slowest, fastest = f["read_bandwidth_gb_per_s_min"], f["read_bandwidth_gb_per_s_max"]
    if fastest > RESTLESS * slowest:
        reads += f" Memory's speed went from {slowest:.1f} to {fastest:.1f} GB/s meanwhile: measure again, or longer."
    return [
        f"Decodes {f['decode_tokens_per_s']:.2f} tokens/s, {f['decode_ms_per_step']:.1f} ms a step for {rows}; reads "
        f"prompts at {f['prefill_tokens_per_s']:.1f} tokens/s.",
        reads,
    ]


def table(found: dict[str, str | int | float | None]) -> Table:
    """All figures, named as in JSON."""
    from rich.table import Table

    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold")
    made.add_column(justify="right")
    for name, value in found.items():
        if value is not None:
            made.add_row(name, f"{value:,.3f}" if isinstance(value, float) else _whole(value))
    return made


def _whole(value: str | int) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _p90(values: tuple[float, ...]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
