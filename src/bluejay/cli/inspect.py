"""`bluejay inspect`: what a checkpoint is, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bluejay.checkpoints import Inspection


def inspect(
    model: Annotated[str, typer.Argument(help="A model's directory or name, or one .safetensors or .bin file.")],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The config: 6B_roto_256.json for mesh-transformer-jax.",
            show_default="config.json beside the weights",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, each tensor by name.")] = False,
) -> None:
    """Tell a checkpoint's family, shapes, dtypes, parameters and tokenizer, and everything that is wrong with it.

    Weights are not read, so this takes a second for any size. Exit code 1 if something is wrong.

    [bold]Examples[/bold]

        bluejay inspect default

        bluejay inspect gpt-j-6b/

        bluejay inspect step_383500/ --config 6B_roto_256.json

        bluejay inspect pytorch_model.bin --json
    """
    from rich.console import Console

    from bluejay import checkpoints
    from bluejay.checkpoints import hub
    from bluejay.tokenizer import load_tokenizer

    path = hub.resolve(model)

    def count_tokens(directory: Path) -> tuple[int, int]:
        tokenizer = load_tokenizer(directory)
        return len(tokenizer.known_ids), tokenizer.vocab_size

    found = checkpoints.inspect(path, config=config, count_tokens=count_tokens)
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        for part in _report(found):
            Console().print(part)
    if found.problems:
        raise typer.Exit(1)


def _as_json(found: Inspection) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "format": found.format,
        "config": None if found.config is None else found.config.to_dict(),
        "num_parameters": found.num_parameters,
        "num_bytes": found.num_bytes,
        "dtypes": found.dtypes,
        "tokenizer_files": list(found.tokenizer_files),
        "num_tokens": found.num_tokens,
        "num_token_ids": found.num_token_ids,
        "problems": list(found.problems),
        "tensors": {
            name: {"shape": list(info.shape), "dtype": _name(info.dtype), "file": str(info.file)}
            for name, info in found.tensors.items()
        },
    }


def _report(found: Inspection) -> list[RenderableType]:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("path", Text(str(found.path)))
    parts: list[RenderableType] = [facts]
    if (config := found.config) is not None:
        facts.add_row("family", config.model_type + (f" ({found.format})" if found.format else ""))
        facts.add_row(
            "network",
            f"{config.n_layer} layers, width {config.n_embd:,}, {config.n_head} heads of {config.head_dim}, "
            f"MLP {config.inner_dim:,}, context {config.n_positions:,}, vocabulary {config.vocab_size:,}",
        )
    if found.tensors:
        quantization = found.quantization
        groups = "" if quantization is None else f", {quantization.group_size} weights share a scale"
        facts.add_row("parameters", f"{found.num_parameters:,}")
        facts.add_row("weights", f"{decimal(found.num_bytes)}, {', '.join(found.dtypes)}{groups}")
    tokens = "" if found.num_tokens is None else f"{found.num_tokens:,} tokens, "
    if found.num_token_ids not in (None, found.num_tokens):
        tokens += f"ids below {found.num_token_ids:,}, "
    facts.add_row("tokenizer", Text(tokens + (", ".join(found.tokenizer_files) or "none")))
    if found.tensors:
        parts += ["", _shapes(found)]
    if found.problems:
        parts += ["", Text("what is wrong", style="bold red"), *(Text(f"  {problem}") for problem in found.problems)]
    return parts


def _shapes(found: Inspection) -> RenderableType:
    """One row for each kind of tensor: those of all layers together."""
    import re
    from collections import Counter

    from rich.table import Table
    from rich.text import Text

    kinds = Counter(
        (re.sub(r"\.h\.\d+\.", ".h.*.", name), str(list(info.shape)), _name(info.dtype))
        for name, info in found.tensors.items()
    )
    table = Table("Tensor", "Shape", "Dtype", box=None, pad_edge=False)
    table.add_column("Count", justify="right")
    for (name, shape, dtype), count in kinds.items():
        # A name out of a broken file may hold anything, terminal controls too.
        table.add_row(Text(name if name.isprintable() else ascii(name)), Text(shape), dtype, str(count))
    return table


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
