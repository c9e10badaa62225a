"""`bluejay convert`: from any checkpoint format to any other."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DType(StrEnum):
    """What weights are kept in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantized(StrEnum):
    """What linear layers are quantised to."""

    int8 = "int8"
    int4 = "int4"


class Format(StrEnum):
    """What a checkpoint is written as."""

    safetensors = "safetensors"
    torch_bin = "torch-bin"
    mesh_jax = "mesh-jax"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A model's directory or name, step_N of mesh-transformer-jax, or one .safetensors or .bin file."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The directory to write; made if it is not there.")],
    dtype: Annotated[
        DType | None, typer.Option(help="What to keep the weights in.", show_default="as they are stored")
    ] = None,
    quantize: Annotated[
        Quantized | None, typer.Option(help="Write linear layers with 8 or 4 bits.", show_default="no")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="With --quantize: weights that share a scale, 32 or 64.", show_default="32"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The source's config: 6B_roto_256.json for mesh-transformer-jax.",
            show_default="config.json beside the weights",
        ),
    ] = None,
    to: Annotated[Format, typer.Option(help="What to write.")] = Format.safetensors,
    cores_per_replica: Annotated[
        int | None, typer.Option(min=1, help="Shards to write, with --to mesh-jax.", show_default="8")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a directory that is not empty, over a model of the same format.")
    ] = False,
) -> None:
    """Convert a checkpoint: Hugging Face's safetensors and pytorch_model.bin, and mesh-transformer-jax.

    One tensor at a time is in memory. The tokenizer's files come along. The directory opens only when it is complete.

    [bold]Examples[/bold]

        bluejay convert gpt-j-6b/ gpt-j-6b-bf16/ --dtype bfloat16

        bluejay convert gpt-j-6b/ gpt-j-6b-int4/ --quantize int4

        bluejay convert step_383500/ out/ --config 6B_roto_256.json

        bluejay convert out/ step_0/ --to mesh-jax --cores-per-replica 8
    """
    if cores_per_replica is not None and to is not Format.mesh_jax:
        raise typer.BadParameter("belongs to --to mesh-jax", param_hint="--cores-per-replica")
    if quantize is None and group_size is not None:
        raise typer.BadParameter("belongs to --quantize", param_hint="--group-size")
    if quantize is not None and (dtype is not None or to is not Format.safetensors):
        other = "--dtype" if dtype is not None else "--to"
        raise typer.BadParameter(f"does not go with {other}: quantised models are safetensors", param_hint="--quantize")
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from bluejay import checkpoints, ops
    from bluejay.checkpoints import hub
    from bluejay.model.quantized import QUANTIZED_DTYPES, Quantization
    from bluejay.settings import load_settings

    if threads := load_settings().threads:
        ops.set_num_threads(threads)
    wanted = None if quantize is None else Quantization(QUANTIZED_DTYPES[quantize], group_size or 32)
    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=None)
        written = checkpoints.convert(
            hub.resolve(source),
            target,
            config=config,
            dtype=None if dtype is None else getattr(torch, dtype),
            quantization=wanted,
            to=to.replace("-", "_"),
            cores_per_replica=cores_per_replica or 8,
            force=force,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    num_bytes = sum(path.stat().st_size for path in written)
    typer.echo(f"{target}: {len(written)} files, {num_bytes:,} bytes", err=True)
