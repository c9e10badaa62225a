import json

import pytest
from rich.console import Console

from bluejay.bench import report
from bluejay.bench.engine import Timings
from bluejay.bench.report import Subject
from bluejay.bench.workload import Workload

SUBJECT = Subject(
    model=None,
    shape="gpt-j-6b",
    layers=28,
    quantize="int4",
    group_size=32,
    dtype="float32",
    threads=2,
    kernels="avx2",
    torch_version="2.13.0",
    bluejay_version="0.1.0",
    load_s=2.5,
    weight_bytes_per_step=3_300_000_000,
    kv_bytes_per_step=120_000_000,
)
WORKLOAD = Workload(batch_size=4, prompt_tokens=100, max_new_tokens=6, repeats=1)
TIMINGS = Timings(
    prefill_s=(8.0, 4.0, 5.0),
    step_s=(0.150, 0.200, 0.175, 0.100, 0.300),
    bandwidth_gb_per_s=(21.0, 25.0, 20.0),
    peak_memory_bytes=4_000_000_000,
)


def test_figures_are_medians_with_units() -> None:
    found = report.figures(SUBJECT, WORKLOAD, TIMINGS)
    assert found["decode_ms_per_step"] == pytest.approx(175)
    assert found["decode_ms_per_step_min"] == pytest.approx(100)
    assert found["decode_ms_per_step_p90"] == pytest.approx(260)
    assert found["decode_tokens_per_s"] == pytest.approx(4 / 0.175)
    assert found["prefill_s"] == 5.0
    assert found["prefill_tokens_per_s"] == pytest.approx(4 * 100 / 5.0)
    assert found["weight_bytes_per_step"] == 3_300_000_000
    assert found["achieved_gb_per_s"] == pytest.approx(3.3 / 0.175)
    assert found["read_bandwidth_gb_per_s"] == 21.0
    assert found["bandwidth_ratio"] == pytest.approx(3.3 / 0.175 / 21)
    assert found["peak_memory_bytes"] == 4_000_000_000


def test_json_has_these_names() -> None:
    text = report.to_json(report.figures(SUBJECT, WORKLOAD, TIMINGS))
    assert "\n" not in text
    assert set(json.loads(text)) == {
        *("decode_tokens_per_s", "decode_ms_per_step", "decode_ms_per_step_min", "decode_ms_per_step_p90"),
        *("prefill_tokens_per_s", "prefill_s", "weight_bytes_per_step", "kv_bytes_per_step", "achieved_gb_per_s"),
        *("read_bandwidth_gb_per_s", "read_bandwidth_gb_per_s_min", "read_bandwidth_gb_per_s_max", "bandwidth_ratio"),
        *("peak_memory_bytes", "load_s", "model", "shape", "layers", "quantize", "group_size", "dtype", "threads"),
        *("kernels", "torch_version", "bluejay_version"),
        *("batch_size", "prompt_tokens", "max_new_tokens", "repeats", "seed"),
    }


def test_a_single_step_is_its_own_ninth_decile() -> None:
    found = report.figures(SUBJECT, WORKLOAD, Timings((1.0,), (0.5,), (20.0,), 1))
    assert found["decode_ms_per_step_p90"] == 500


def test_sentences_say_what_the_figures_mean() -> None:
    speed, memory = report.sentences(report.figures(SUBJECT, WORKLOAD, TIMINGS))
    assert speed == "Decodes 22.86 tokens/s, 175.0 ms a step for 4 rows; reads prompts at 80.0 tokens/s."
    assert memory == (
        "A step reads 3.30 GB of weights at 18.9 GB/s: 0.90 of the 21.0 GB/s that plain reading reaches "
        "here with 2 threads."
    )


def test_more_than_the_memorys_speed_is_explained() -> None:
    fast = Timings((1.0,), (0.1,), (20.0,), 1)
    assert "come out of caches" in report.sentences(report.figures(SUBJECT, WORKLOAD, fast))[1]


def test_a_restless_machine_is_named() -> None:
    restless = Timings((1.0,), (0.2,), (20.0, 10.0, 31.0), 1)
    assert "went from 10.0 to 31.0 GB/s" in report.sentences(report.figures(SUBJECT, WORKLOAD, restless))[1]


def test_the_table_has_all_that_is_known() -> None:
    found = report.figures(SUBJECT, WORKLOAD, TIMINGS)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report.table(found))
    lines = dict(line.split() for line in capture.get().splitlines())
    assert set(lines) == set(found) - {"model"}
    assert lines["weight_bytes_per_step"] == "3,300,000,000"
    assert lines["bandwidth_ratio"] == "0.898"
