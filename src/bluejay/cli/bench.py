"""`bluejay bench`: how fast this machine runs a model, against what its memory allows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from bluejay.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

    from bluejay.bench.engine import Run, Timings
    from bluejay.bench.report import Subject
    from bluejay.bench.weights import Model
    from bluejay.bench.workload import Workload
    from bluejay.model import ModelConfig
    from bluejay.model.quantized import Quantization

bench = typer.Typer(no_args_is_help=True, help="Measure how fast this machine runs a model.")

WHAT, RUNS = "What is measured", "Runs"


class Quantize(StrEnum):
    """How weights are kept."""

    none = "none"
    int8 = "int8"
    int4 = "int4"


class FloatDType(StrEnum):
    """What float weights are kept in; float16 is slow or missing in many operators of a CPU."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@bench.callback()
def _bench() -> None:
    """Measure how fast this machine runs a model."""


@bench.command("engine")
def engine(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a known size: gpt-j-6b, gpt-neo-125m, gpt-neo-1.3b, gpt-neo-2.7b.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="With --shape: its first layers only.", show_default="all", rich_help_panel=WHAT)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model's path or name instead.", rich_help_panel=WHAT)
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(
            help="How weights are kept.", show_default="none; with --model as they are stored", rich_help_panel=WHAT
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="With --shape and int8 or int4: weights that share a scale, 32 or 64.",
            show_default="32",
            rich_help_panel=WHAT,
        ),
    ] = None,
    dtype: Annotated[
        FloatDType | None,
        typer.Option(help="Of weights that are not quantised.", show_default="float32", rich_help_panel=WHAT),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that run at once.", rich_help_panel=RUNS)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", rich_help_panel=RUNS)] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens behind each prompt.", rich_help_panel=RUNS)] = 32,
    repeats: Annotated[int, typer.Option(help="Timed runs, after one to warm up.", rich_help_panel=RUNS)] = 3,
    seed: Annotated[int, typer.Option(help="Of random weights and prompts.", rich_help_panel=RUNS)] = 0,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; 0: one for each core.", rich_help_panel=RUNS)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=RUNS)] = False,
) -> None:
    """Time prompts and decoding steps in this process, on the CPU, and the speed of its memory in between.

    Decoding reads all weights for each step, so memory's speed is its limit: bandwidth_ratio says how near it comes.

    [bold]Examples[/bold]

        bluejay bench engine --shape gpt-j-6b --quantize int4

        bluejay bench engine --shape gpt-j-6b --layers 4 --quantize int8 --batch-size 8 --prompt-tokens 512

        bluejay bench engine --model gpt-neo-125m --quantize none --json
    """
    _check_options(shape, layers, model, quantize, group_size, dtype)
    from bluejay import ops
    from bluejay.bench.workload import Workload

    ops.voice()  # a wrong BLUEJAY_KERNELS is said before a model is made
    workload = Workload(batch_size, prompt_tokens, max_new_tokens, repeats, seed)
    if shape is not None:
        network, subject = _random(shape, layers, quantize or Quantize.none, group_size, dtype, threads, workload)
    else:
        network, subject = _opened(str(model), quantize, dtype, threads, workload)
    timings = _measured(network, workload)

    from rich.console import Console

    from bluejay.bench import report

    found = report.figures(subject, workload, timings)
    if as_json:
        typer.echo(report.to_json(found))
        return
    Console().print(report.table(found))
    for sentence in ["", *report.sentences(found)]:
        typer.echo(sentence)


def _check_options(
    shape: str | None,
    layers: int | None,
    model: str | None,
    quantize: Quantize | None,
    group_size: int | None,
    dtype: FloatDType | None,
) -> None:
    """Options that do not go together, all at once and before anything takes its time."""
    quantized = quantize in (Quantize.int8, Quantize.int4)
    wrong = {
        "give one of --shape and --model": (shape is None) == (model is None),
        "--layers belongs to --shape": layers is not None and shape is None,
        "--group-size belongs to --shape; for a model of your own: bluejay convert": group_size is not None
        and shape is None,
        "--group-size belongs to --quantize int8 or int4": group_size is not None
        and shape is not None
        and not quantized,
        "--dtype belongs to weights that are not quantised": dtype is not None and quantized,
    }
    if found := [message for message, is_wrong in wrong.items() if is_wrong]:
        raise InvalidRequest("; ".join(found))


def _random(
    name: str,
    layers: int | None,
    quantize: Quantize,
    group_size: int | None,
    dtype: FloatDType | None,
    threads: int | None,
    workload: Workload,
) -> tuple[Model, Subject]:
    """A known shape with random weights."""
    import torch
    from rich.console import Console

    from bluejay import ops
    from bluejay.bench import weights
    from bluejay.bench.workload import shape
    from bluejay.model.quantized import QUANTIZED_DTYPES, Quantization
    from bluejay.settings import load_settings

    config = shape(name, layers)
    workload.check_context(config)
    bits = QUANTIZED_DTYPES.get(quantize)
    quantization = None if bits is None else Quantization(bits, group_size or 32)
    weights_dtype: torch.dtype = getattr(torch, dtype or "float32")
    count = load_settings({"threads": threads}).threads or ops.num_threads()
    # As open_llm does: PyTorch's threads and the kernels' would wait for each other.
    torch.set_num_threads(count if quantization is None else 1)
    ops.set_num_threads(count)
    num_bytes = _check_memory(config, quantization, weights_dtype, workload)
    began = time.perf_counter()
    with Console(stderr=True).status(f"drawing {num_bytes / 1e9:.1f} GB of random weights"):
        network = weights.random_model(config, quantization, weights_dtype, workload.seed)
    return network, _subject(network, workload, time.perf_counter() - began, shape=name)


def _opened(
    name: str, quantize: Quantize | None, dtype: FloatDType | None, threads: int | None, workload: Workload
) -> tuple[Model, Subject]:
    """A model of the user's."""
    import torch

    from bluejay.checkpoints import hub, open_checkpoint
    from bluejay.cli.loading import open_llm
    from bluejay.model.quantized import QUANTIZED_DTYPES, Quantization

    config = open_checkpoint(hub.resolve(name)).config
    workload.check_context(config)
    # What is stored as integers is mapped, not copied; and who leaves the dtype to LLM gets one that fits.
    if quantize is not None and (quantize is Quantize.none or Quantization.of(config) is None):
        bits = QUANTIZED_DTYPES.get(quantize)
        quantization = None if bits is None else Quantization(bits)
        _check_memory(config, quantization, getattr(torch, dtype or "float32"), workload)
    wanted = {None: dtype or "auto", Quantize.none: dtype or "float32"}.get(quantize, quantize)
    began = time.perf_counter()
    llm = open_llm(name, dtype=str(wanted), device="cpu", threads=threads)
    return llm.model, _subject(llm.model, workload, time.perf_counter() - began, model=name)


def _check_memory(
    config: ModelConfig, quantization: Quantization | None, dtype: torch.dtype, workload: Workload
) -> int:
    """The bytes of the weights, if they fit with keys and values of the whole run."""
    from bluejay.bench import machine, weights

    num_bytes = weights.weight_bytes(config, quantization, dtype)
    longest = workload.prompt_tokens + workload.max_new_tokens
    cached = workload.batch_size * weights.kv_bytes(config, longest, _kv_itemsize(quantization, dtype))
    machine.check_memory(num_bytes, cached, machine.free_memory_bytes())
    return num_bytes


def _subject(
    network: Model, workload: Workload, load_s: float, *, model: str | None = None, shape: str | None = None
) -> Subject:
    import torch

    from bluejay import __version__, ops
    from bluejay.bench import weights
    from bluejay.bench.report import Subject
    from bluejay.model.kernels import works_by_kernels
    from bluejay.model.quantized import Quantization

    quantization = Quantization.of(network.config)
    dtype = network.transformer.ln_f.weight.dtype
    by_kernels = quantization is not None or works_by_kernels(network)
    kernels = ops.voice() if by_kernels else "pytorch"
    if not by_kernels:
        ops.set_num_threads(torch.get_num_threads())  # memory is read with as many as PyTorch computes with
    lengths = range(workload.prompt_tokens + 1, workload.prompt_tokens + workload.max_new_tokens)
    itemsize = _kv_itemsize(quantization, dtype)
    cached = sum(weights.kv_bytes(network.config, length, itemsize) for length in lengths)
    return Subject(
        model=model,
        shape=shape,
        layers=network.config.n_layer,
        quantize="none" if quantization is None else quantization.name,
        group_size=None if quantization is None else quantization.group_size,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if kernels in ("pytorch", ops.REFERENCE) else ops.num_threads(),
        kernels=kernels,
        torch_version=torch.__version__,
        bluejay_version=__version__,
        load_s=load_s,
        weight_bytes_per_step=weights.step_weight_bytes(network, workload.batch_size),
        kv_bytes_per_step=workload.batch_size * cached // len(lengths),
    )


def _kv_itemsize(quantization: Quantization | None, dtype: torch.dtype) -> int:
    """Bytes of one number in the engine's cache, where it is left to choose."""
    from bluejay.engine.kernel_cache import CACHE_DTYPE

    return (dtype if quantization is None else CACHE_DTYPE).itemsize


def _measured(network: Model, workload: Workload) -> Timings:
    """Measure, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bluejay.bench.engine import measure

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        return measure(
            _engine(network),
            workload.prompts(network.config.vocab_size),
            workload,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _engine(network: Model) -> Run:
    """The engine's own loop as `bench.engine.measure` takes it, choice of the likeliest token included."""
    from bluejay.decoding.params import SamplingParams
    from bluejay.engine.plain import PlainEngine
    from bluejay.engine.request import GenerationRequest

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[int]:
        params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        engine = PlainEngine(network, max_rows=len(prompts))
        events = engine.stream([GenerationRequest(list(prompt), params) for prompt in prompts])
        while step := list(islice(events, len(prompts))):  # one event for each row
            yield len(step)

    return run
