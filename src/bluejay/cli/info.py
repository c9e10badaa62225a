"""`bluejay info`: what Bluejay found on this machine, what it chose, and why."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, sizes in bytes.")] = False,
) -> None:
    """Tell what Bluejay found on this machine, and what it chose: kernels, threads, settings.

    [bold]Examples[/bold]

        bluejay info

        BLUEJAY_KERNELS=portable bluejay info --json
    """
    found = _gather()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    Console().print(_table(found))


def _gather() -> dict[str, Any]:
    import torch

    from bluejay import __version__
    from bluejay.accounts.database import default_path
    from bluejay.bench.machine import free_memory_bytes
    from bluejay.model.device import available_memory_bytes
    from bluejay.settings import explain_settings, settings_file, without_password

    settings = {name: {"value": value, "source": source} for name, (value, source) in explain_settings().items()}
    database = settings["database"]
    database["value"] = without_password(database["value"]) or f"sqlite:///{default_path()}"
    return {
        "bluejay": __version__,
        "python": platform.python_version(),
        "pytorch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor_name(Path("/proc/cpuinfo")),
        "kernels": _kernels(),
        "threads": _threads(settings["threads"]),
        "memory": {"total_bytes": available_memory_bytes(), "free_bytes": free_memory_bytes()},
        "gpus": _gpus(),
        "default_model": _default_model(),
        "settings": settings,
        "settings_file": {"path": str(settings_file()), "exists": settings_file().exists()},
    }


def _processor_name(cpuinfo: Path) -> str:
    """The processor by its maker's name, where the system knows it; its architecture elsewhere."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _kernels() -> dict[str, Any]:
    import os
    import warnings

    from bluejay import ops

    with warnings.catch_warnings():  # what the warning says is said below
        warnings.simplefilter("ignore", RuntimeWarning)
        chosen = ops.voice()
    return {
        "chosen": chosen,
        "available": ops.available_voices(),
        "missing": ops.why_missing(),
        "forced_by": ops.ENVIRONMENT if os.environ.get(ops.ENVIRONMENT, "auto") != "auto" else None,
    }


def _threads(setting: dict[str, Any]) -> dict[str, Any]:
    from bluejay.ops.threads import processors

    if setting["value"]:
        return {"number": setting["value"], "reason": f"set by {setting['source']}"}
    found = processors()
    return {"number": found.threads, "reason": found.reason}


def _gpus() -> list[dict[str, Any]]:
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found = [{"name": card.name, "memory_bytes": card.total_memory} for card in cards]
    if torch.backends.mps.is_available():
        found.append({"name": "Apple Metal", "memory_bytes": torch.mps.recommended_max_memory()})
    return found


def _default_model() -> dict[str, Any]:
    from bluejay.checkpoints import hub, open_checkpoint
    from bluejay.checkpoints.hub_cache import DEFAULT_MODEL
    from bluejay.model import num_parameters

    path = hub.resolve(DEFAULT_MODEL)
    config = open_checkpoint(path).config
    return {"path": str(path), "family": config.model_type, "num_parameters": num_parameters(config)}


def _table(found: dict[str, Any]) -> Table:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    kernels, threads, memory, model = (found[key] for key in ("kernels", "threads", "memory", "default_model"))
    rows = [
        ("bluejay", f"{found['bluejay']}, Python {found['python']}, PyTorch {found['pytorch']}"),
        ("system", found["platform"]),
        ("processor", found["processor"]),
        ("kernels", kernels["chosen"] + (f", as {kernels['forced_by']} says" if kernels["forced_by"] else "")),
    ]
    if kernels["missing"]:
        rows.append(("", f"compiled kernels are missing: {kernels['missing']}"))
    there = ", ".join(kernels["available"])
    rows += [
        ("", f"there are {there}; choose with BLUEJAY_KERNELS" if len(kernels["available"]) > 1 else ""),
        ("threads", f"{threads['number']}: {threads['reason']}; choose with --threads or BLUEJAY_THREADS"),
        ("memory", f"{decimal(memory['total_bytes'])}, {decimal(memory['free_bytes'])} of it free"),
        ("GPU", "; ".join(f"{card['name']}, {decimal(card['memory_bytes'])}" for card in found["gpus"]) or "none"),
        ("default model", f"{model['family']}, {model['num_parameters'] / 1e6:.1f} M parameters, {model['path']}"),
    ]
    for name, setting in found["settings"].items():
        label = "settings" if name == next(iter(found["settings"])) else ""
        rows.append((label, f"{name} = {setting['value']} ({setting['source']})"))
    file = found["settings_file"]
    rows.append(("settings file", file["path"] + ("" if file["exists"] else ", which is not there")))
    for name, value in rows:
        if name or value:
            table.add_row(name, Text(value))
    return table
