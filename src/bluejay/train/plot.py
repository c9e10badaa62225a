"""A picture of a run: training and validation loss against tokens seen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bluejay.train import metrics


def available() -> bool:
    """Whether matplotlib is installed; it comes with `pip install "bluejay[train]"`."""
    return importlib.util.find_spec("matplotlib") is not None


def losses(source: Path, target: Path, tokens_per_step: int) -> Path | None:
    """Draw metrics.jsonl into a PNG; returns its path, or None where matplotlib is not installed."""
    if not available():
        return None
    from matplotlib.figure import Figure  # a second to import, and only wanted here

    rows = metrics.read(source)
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    train = [(row["step"] * tokens_per_step / 1e6, row["loss"]) for row in rows if row["kind"] == "train"]
    if train:
        tokens, loss = zip(*train, strict=True)
        axes.plot(tokens, loss, color="#9ecae1", linewidth=0.6)
        axes.plot(tokens, _smoothed(list(loss)), color="#08519c", linewidth=1.5, label="training")
    validation = [(row["step"] * tokens_per_step / 1e6, row["loss"]) for row in rows if row["kind"] == "validation"]
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d94801", marker="o", markersize=3, label="validation")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    figure.savefig(target)
    return target


def _smoothed(values: list[float], keep: float = 0.97) -> list[float]:
    """Exponential moving average, without the bias of its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
