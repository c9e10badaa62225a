"""`bluejay train`: run a recipe, with progress, and say where the model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from bluejay.train.loop import Event


def train(
    config: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    output_dir: Annotated[Path | None, typer.Option(help="Replaces the recipe's output_dir.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Replaces the recipe's \\[data] dir.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: removes the run's checkpoints.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0: as many as there are cores.")] = None,
) -> None:
    """Train a model from nothing, or fine-tune a checkpoint.

    Writes tokens, checkpoints, metrics.jsonl, loss.png and the finished model into the recipe's output_dir.
    Ctrl-C saves first; --resume goes on as if nothing had happened.

    [bold]Examples[/bold]

        bluejay train recipes/default.toml

        bluejay train recipes/default.toml --resume
    """
    from bluejay.engine.threads import set_torch_threads
    from bluejay.errors import ConfigError
    from bluejay.model.device import choose_device
    from bluejay.settings import load_settings
    from bluejay.train import plot
    from bluejay.train.config import load_config
    from bluejay.train.loop import start_over
    from bluejay.train.loop import train as run

    if resume and fresh:
        raise ConfigError("--resume and --fresh exclude each other")
    settings = load_settings({"device": device, "threads": threads})
    choose_device(settings.device)  # a wrong one is said before an old run is removed
    read = load_config(config, output_dir=output_dir, data_dir=data_dir)
    set_torch_threads(settings.threads)
    if not plot.available():
        typer.echo('note: no loss.png without matplotlib: pip install "bluejay[train]"', err=True)
    if fresh:
        start_over(read)
    with Progressing() as progressing:
        run(read, progressing, resume=resume, device=settings.device)


class Progressing:
    """Shows a run's events on stderr: a bar with loss, tokens per second and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._preparing: dict[str, TaskID] = {}

    def __enter__(self) -> Progressing:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        from bluejay.train import loop

        def say(text: str) -> None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        match event:
            case loop.Preparing(what, done):
                self._prepare(what, done)
            case loop.Started():
                self._hide_preparing()
                say(
                    f"{event.num_parameters:,} parameters on {event.device} in {event.dtype}; "
                    f"{event.tokens_per_step:,} tokens a step, {event.tokens_per_epoch:,} an epoch"
                )
                self._task = self._progress.add_task(
                    "training", total=event.total_steps, completed=event.step, figures=""
                )
            case loop.Stepped() if self._task is not None:
                figures = f"loss {event.loss:.3f} · {event.tokens_per_s:,.0f} tokens/s"
                self._progress.update(self._task, completed=event.step, figures=figures)
            case loop.Validated():
                say(f"step {event.step}: validation loss {event.loss:.4f}, {event.bits_per_byte:.4f} bits per byte")
            case loop.Saved():
                say(f"step {event.step}: saved {event.path}")
            case loop.Finished():
                self._hide_preparing()
                say(f"model: {event.model_path}")
                if event.plot_path is not None:
                    say(f"losses: {event.plot_path}")
                say(f'try: bluejay generate --model {event.model_path} "Once upon a time"')

    def _prepare(self, what: str, done: int) -> None:
        from rich.markup import escape

        if what not in self._preparing:
            self._preparing[what] = self._progress.add_task(escape(what), total=None, figures="")
        self._progress.update(self._preparing[what], completed=done, figures=f"{done:,} tokens" if done else "")

    def _hide_preparing(self) -> None:
        for task in self._preparing.values():
            self._progress.remove_task(task)
        self._preparing.clear()
