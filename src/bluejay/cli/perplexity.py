"""`bluejay perplexity`: bits per byte of a text under a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from bluejay.errors import InvalidRequest


def perplexity(
    file: Annotated[Path, typer.Argument(help="Text, documents split by <|endoftext|>; .jsonl, .xz, .gz too.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Path or name; the default model if none.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens that the window moves; half of the context if none.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16, int8, int4.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a text under a model: bits per byte, perplexity per token and per word.

    [bold]Examples[/bold]

        bluejay perplexity story.txt

        bluejay perplexity wiki.test.raw --model gpt-neo-125m --stride 512 --json
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from bluejay.cli.loading import open_llm
    from bluejay.evaluate.perplexity import perplexity as measure
    from bluejay.train.data import documents

    # What is wrong with file or stride is said before a model is read, which may take minutes.
    texts = list(documents(file))
    if not texts:
        raise InvalidRequest(f"{file}: holds no text; there is nothing to score", param="file")
    if stride is not None:
        _check_stride(stride, model)
    llm = open_llm(model, dtype=dtype, device=device)
    bar = Progress(
        TextColumn("scoring"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    started = time.perf_counter()
    with bar:
        task = bar.add_task("scoring", total=sum(len(text.encode()) for text in texts))
        found = measure(
            llm.model,
            llm.tokenizer,
            texts,
            stride=stride,
            device=llm.device,
            on_progress=lambda done: bar.update(task, completed=done),
        )
    figures = {
        "bits_per_byte": found.bits_per_byte,
        "loss_nats_per_token": found.loss,
        "token_perplexity": found.token_perplexity,
        "word_perplexity": found.word_perplexity,
        "documents": found.num_documents,
        "tokens": found.num_tokens,
        "bytes": found.num_bytes,
        "seconds": time.perf_counter() - started,
    }
    if as_json:
        typer.echo(json.dumps({"model": llm.name, "file": str(file), **figures}))
        return
    for name, value in figures.items():
        typer.echo(f"{name:<20} {value:,.4f}" if isinstance(value, float) else f"{name:<20} {value:,}")


def _check_stride(stride: int, model: str | None) -> None:
    """Hold the stride against the model's context, of which the config alone tells."""
    from bluejay.checkpoints import hub, open_checkpoint
    from bluejay.settings import load_settings

    context = open_checkpoint(hub.resolve(load_settings({"model": model}).model)).config.n_positions
    if not 1 <= stride <= context:
        raise InvalidRequest(f"stride is {stride}, expected 1 to the context of {context} tokens", param="stride")
