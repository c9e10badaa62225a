"""metrics.jsonl: one JSON object for each step and each validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row at the end."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line that a crash cut in two is not one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise
    return rows


def truncate(path: Path, step: int) -> None:
    """Drop the rows of steps after `step`: a resumed run does them again."""
    kept = [row for row in read(path) if row["step"] <= step]
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    unfinished.replace(path)
