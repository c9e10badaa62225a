"""The training loop: prepare, step, validate, save, finish."""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bluejay import checkpoints
from bluejay.errors import ConfigError
from bluejay.model import CausalAttention, ModelConfig, build
from bluejay.model.device import choose_device
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.tokenizer import Tokenizer, load_tokenizer
from bluejay.tokenizer.training import train_bpe
from bluejay.train import checkpoint, metrics, plot
from bluejay.train.config import TrainConfig
from bluejay.train.data import Rows, TokenFile, documents, pack
from bluejay.train.loss import cross_entropy
from bluejay.train.optim import initialise, learning_rate, make_optimizer


@dataclass(frozen=True)
class Preparing:
    """Work before the first step; `done` counts tokens where there are any."""

    what: str
    done: int = 0


@dataclass(frozen=True)
class Started:
    """Everything is ready; `step` steps are done already, after a resume."""

    step: int
    total_steps: int
    num_parameters: int
    tokens_per_step: int
    tokens_per_epoch: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Stepped:
    """One optimiser step; loss in nats per token, z_loss left out."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_s: float


@dataclass(frozen=True)
class Validated:
    """loss in nats per token; bits_per_byte counts the bytes of the text, separators cost but have none."""

    step: int
    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint of `step` is whole on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The model is written; plot_path is None where matplotlib is not installed."""

    model_path: Path
    plot_path: Path | None


Event = Preparing | Started | Stepped | Validated | Saved | Finished
Observer = Callable[[Event], None]


def train(config: TrainConfig, observe: Observer, *, resume: bool = False, device: str = "auto") -> Path:
    """Run a recipe to its end, or on from its last checkpoint.

    SIGINT (Ctrl-C) lets the step end, saves a checkpoint and raises KeyboardInterrupt; a second one does not wait.

    Args:
        observe: told of every event, in order.
        resume: go on from the last checkpoint in output_dir.
        device: "auto", "cpu", "cuda", "cuda:1".
    Returns: the directory of the finished model, in Hugging Face's layout.
    Raises: ConfigError, CheckpointError.
    """
    _check_output(config.output_dir, resume)
    run = Run(config, observe, choose_device(device))
    step = run.restore() if resume else run.start()
    observe(run.describe(step))
    with _deferred_interrupt() as interrupted:
        while step < config.recipe.total_steps:
            step = run.step(step)
            last = step == config.recipe.total_steps
            if last or step % config.recipe.val_every == 0:
                run.validate(step)
            if last or interrupted() or step % config.recipe.ckpt_every == 0:
                run.save(step)
            if interrupted():
                raise KeyboardInterrupt
    return run.finish()


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted and not raised, so that it never cuts a step in two; the second one is raised at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread alone
        return
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        signals.append(number)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGINT, previous)


class Run:
    """What one run holds: network, optimiser, rows, metrics file."""

    def __init__(self, config: TrainConfig, observe: Observer, device: torch.device) -> None:
        self.config, self.recipe, self.observe, self.device = config, config.recipe, observe, device
        self.folder = config.output_dir
        self.dtype = _compute_dtype(config.recipe.dtype, device)
        self.model, self.tokenizer = _network(config, observe)
        self.model.to(device)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self._files = [(self._tokens(source.file), source.repeat) for source in config.data.train]
        self.rows = Rows(self._files, seq=self.recipe.seq, batch=self.recipe.per_replica_batch, seed=config.seed)
        self.validation = self._tokens(config.data.validation) if config.data.validation is not None else None
        if self.validation is not None and not self.validation.rows(self.recipe.seq):
            raise ConfigError(
                f"{config.data.validation}: holds less than one row of recipe.seq {self.recipe.seq} tokens"
            )
        self._token_bytes = _bytes_per_token(self.tokenizer, self.model.config.vocab_size).to(device)
        self._metrics = self.folder / "metrics.jsonl"

    def step(self, step: int) -> int:
        """One optimiser step; returns the number of steps done."""
        started = time.perf_counter()
        lr = learning_rate(step, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = self.recipe.gradient_accumulation_steps
        loss = torch.zeros((), device=self.device)
        for part in range(parts):
            inputs, targets = self.rows.batch(step * parts + part)
            objective, plain = self._loss(inputs, targets)
            (objective / parts).backward()  # type: ignore[no-untyped-call]
            loss += plain / parts
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        if not math.isfinite(float(loss) + grad_norm):  # before the weights are touched
            raise ConfigError(
                f"at step {step + 1} the loss is {float(loss)} and the gradient's norm {grad_norm}; lower recipe.lr "
                "or raise recipe.warmup_steps, and go on from the last checkpoint with --resume"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        self._record(Stepped(step + 1, float(loss), grad_norm, lr, self.recipe.tokens_per_step / seconds))
        return step + 1

    def _loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        positions = torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model(inputs, positions, CausalAttention())
        head = self.model.lm_head
        weight = head.weight if head.weight is not None else self.model.transformer.wte.weight
        bias = head.bias.to(self.dtype) if head.bias is not None else None
        return cross_entropy(
            hidden.flatten(0, 1).to(self.dtype),
            weight.to(self.dtype),
            bias,
            targets.flatten(),
            z_loss=self.recipe.z_loss if torch.is_grad_enabled() else 0.0,
        )

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Loss and bits per byte on the first `val_batches` batches of the validation text."""
        if self.validation is None:
            return
        seq, rows = self.recipe.seq, self.validation.rows(self.recipe.seq)
        if self.recipe.val_batches is not None:
            rows = min(rows, self.recipe.val_batches * self.recipe.per_replica_batch)
        nats, num_bytes = 0.0, 0
        for first in range(0, rows, self.recipe.per_replica_batch):
            last = min(first + self.recipe.per_replica_batch, rows)
            both = torch.from_numpy(np.stack([self.validation.row(i, seq) for i in range(first, last)]))
            targets = both[:, 1:].to(self.device)
            nats += float(self._loss(both[:, :-1], targets)[1]) * targets.numel()
            num_bytes += int(self._token_bytes[targets].sum())
        if rows:
            self._record(Validated(step, nats / (rows * seq), nats / math.log(2) / num_bytes))

    def save(self, step: int) -> None:
        path = checkpoint.save(self.folder / "checkpoints", step, self.model, self.optimizer, self._agreement())
        checkpoint.prune(self.folder / "checkpoints", keep_n=self.recipe.keep_n, keep_every=self.recipe.keep_every)
        self.observe(Saved(step, path))

    def start(self) -> int:
        """The first step; metrics that an earlier run left are dropped."""
        self._metrics.unlink(missing_ok=True)
        return 0

    def restore(self) -> int:
        """Read the last checkpoint; returns the step to go on from. Metrics of steps that come again are dropped."""
        last = checkpoint.latest(self.folder / "checkpoints")
        assert last is not None  # _check_output has looked
        step = checkpoint.restore(last, self.model, self.optimizer, self._agreement())
        metrics.truncate(self._metrics, step)
        return step

    def finish(self) -> Path:
        """Write the model in Hugging Face's layout and the plot of the losses."""
        target = self.folder / "model"
        self.observe(Preparing("writing the model"))
        checkpoints.save(self.model, self.model.config, target)
        self.tokenizer.save(target)
        plot_path = plot.losses(self._metrics, self.folder / "loss.png", self.recipe.tokens_per_step)
        self.observe(Finished(target, plot_path))
        return target

    def describe(self, step: int) -> Started:
        return Started(
            step=step,
            total_steps=self.recipe.total_steps,
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            tokens_per_step=self.recipe.tokens_per_step,
            tokens_per_epoch=self.rows.rows_per_epoch * self.recipe.seq,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def _tokens(self, file: Path) -> TokenFile:
        what = f"tokenising {file.name}"
        self.observe(Preparing(what))
        return pack(
            file, self.tokenizer, self.folder / "tokens", lambda written: self.observe(Preparing(what, written))
        )

    def _record(self, event: Stepped | Validated) -> None:
        kind = "train" if isinstance(event, Stepped) else "validation"
        metrics.append(self._metrics, {"kind": kind, **dataclasses.asdict(event)})
        self.observe(event)

    def _agreement(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "seq": self.recipe.seq,
            "per_replica_batch": self.recipe.per_replica_batch,
            "gradient_accumulation_steps": self.recipe.gradient_accumulation_steps,
            "model": self.model.config.to_dict(),
            "tokenizer": self.tokenizer.fingerprint(),
            # Token files are named by what is in them.
            "texts": [[file.path.name, repeat] for file, repeat in self._files],
        }


def start_over(config: TrainConfig) -> None:
    """Remove what an earlier run left in output_dir, save its tokens, which depend on the texts alone."""
    shutil.rmtree(config.output_dir / "checkpoints", ignore_errors=True)
    shutil.rmtree(config.output_dir / "tokenizer", ignore_errors=True)


def _check_output(folder: Path, resume: bool) -> None:
    """Make output_dir and see that it holds a run if, and only if, one is to go on; before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be made: {error}") from None
    last = checkpoint.latest(folder / "checkpoints")
    if last is None and resume:
        raise ConfigError(f"{folder}: holds no checkpoint to resume from; start without --resume")
    if last is not None and not resume:
        raise ConfigError(f"{folder}: holds a run already; go on with --resume, or start over with --fresh")


def _network(config: TrainConfig, observe: Observer) -> tuple[GPTJ | GPTNeo, Tokenizer]:
    if config.tune_model_path is not None:
        observe(Preparing("reading the model"))
        model = checkpoints.load_model(config.tune_model_path, dtype=torch.float32, trainable=True)
        tokenizer = load_tokenizer(config.tune_model_path)
        if config.recipe.seq > model.config.n_positions:
            raise ConfigError(f"recipe.seq {config.recipe.seq} is longer than n_positions {model.config.n_positions}")
        return model.train(), tokenizer
    assert config.model is not None  # load_config refuses a config with neither
    tokenizer = _tokenizer(config, observe)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is {config.model.vocab_size}"
        )
    shape = _with_special_tokens(config.model, tokenizer)
    model = build(shape)
    initialise(model, shape, torch.Generator().manual_seed(config.seed))
    return model, tokenizer


def _with_special_tokens(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    eos = tokenizer.eos_token_id
    return dataclasses.replace(
        model,
        bos_token_id=model.bos_token_id if model.bos_token_id is not None else eos,
        eos_token_id=model.eos_token_id if model.eos_token_id is not None else eos,
        torch_dtype="float32",
    )


def _tokenizer(config: TrainConfig, observe: Observer) -> Tokenizer:
    """Open the tokenizer, or learn one from the training texts once and keep it for a resumed run."""
    choice = config.tokenizer
    if choice.path is not None:
        return load_tokenizer(choice.path)
    folder = config.output_dir / "tokenizer"
    if not folder.is_dir():
        observe(Preparing(f"learning a vocabulary of {choice.vocab_size}"))
        texts: Iterable[str] = (text for source in config.data.train for text in documents(source.file))
        assert choice.vocab_size is not None  # load_config refuses a config with neither
        unfinished = folder.with_name(".tokenizer_unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        train_bpe(texts, choice.vocab_size).save(unfinished)
        unfinished.replace(folder)
    return load_tokenizer(folder)


def _bytes_per_token(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """[vocab_size] int64; a special token is no text and counts 0."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for token_id in tokenizer.known_ids:
        if not tokenizer.is_special(token_id):
            lengths[token_id] = len(tokenizer.token_bytes(token_id))
    return lengths


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
