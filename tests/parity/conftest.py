"""The oracle: transformers, in a process and an environment of its own, asked over pipes."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venvs" / "oracle" / "bin" / "python"
TIMEOUT_S = 300  # the widest model takes some twenty seconds on an idle core, and cores are not always idle


class OracleError(Exception):
    """transformers raised; the message is its own, with the name of its class."""


@dataclass
class Generated:
    """What transformers' `generate` returned: new tokens of each row, and arrays by HF's names where asked for."""

    sequences: list[list[int]]
    arrays: dict[str, Tensor]


class Oracle:
    """Asks transformers. Handles come from `open`; every method raises OracleError where transformers raises."""

    def __init__(self, folder: Path) -> None:
        self._stderr_path = folder / "stderr.txt"
        quiet = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [PYTHON, Path(__file__).with_name("oracle_process.py"), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                env={**os.environ, **quiet},
            )

    def open(self, path: Path) -> int:
        return self._ask("open", path=str(path))  # type: ignore[no-any-return]

    def close(self, handle: int) -> None:
        self._ask("close", handle=handle)

    def logits(
        self, handle: int, input_ids: Sequence[Sequence[int]], attention_mask: Sequence[Sequence[int]]
    ) -> Tensor:
        """[B, T, V] float32 of a padded batch."""
        return self._arrays(self._ask("logits", handle=handle, input_ids=input_ids, attention_mask=attention_mask))[
            "logits"
        ]

    def generate(self, handle: int, prompts: Sequence[Sequence[int]], *, seed: int = 0, **options: Any) -> Generated:
        """transformers' `generate` with its own option names; prompts are padded on the left.

        Padding is in transformers' history: give prompts of one length where a processor looks at the history.
        `return_dict_in_generate` with `output_scores` or `output_logits` fills `arrays`.
        """
        return self._generated("generate", handle, prompts, options, seed)

    def processed(self, handle: int, prompts: Sequence[Sequence[int]], *, seed: int = 0, **options: Any) -> Generated:
        """Sample; `arrays["scores"]` [steps, rows, V] is what each token was drawn from, after all processors."""
        return self._generated("processed", handle, prompts, options, seed)

    def stop(self) -> None:
        """End the process that this object started, by closing what it reads and then by its own pid."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _generated(
        self, call: str, handle: int, prompts: Sequence[Sequence[int]], options: dict[str, Any], seed: int
    ) -> Generated:
        answer = self._ask(call, handle=handle, prompts=prompts, options=options, seed=seed)
        return Generated(answer["sequences"], self._arrays(answer) if "arrays" in answer else {})

    def _arrays(self, answer: dict[str, Any]) -> dict[str, Tensor]:
        path = Path(answer["arrays"])
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        path.unlink()
        return tensors

    def _ask(self, call: str, **arguments: Any) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            answer = json.loads(self._read_line())
        except (BrokenPipeError, EOFError, TimeoutError) as error:
            pytest.fail(f"the oracle did not answer {call!r} ({error!r}); its stderr ends with:\n{self._stderr()}")
        if "error" in answer:
            raise OracleError(answer["error"])
        return answer["ok"]

    def _read_line(self) -> bytes:
        assert self._process.stdout
        stdout = self._process.stdout.fileno()
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([stdout], [], [], TIMEOUT_S)[0]:
                raise TimeoutError(f"no answer within {TIMEOUT_S} s")
            piece = os.read(stdout, 1 << 16)
            if not piece:
                raise EOFError("it ended")
            line += piece
        return line

    def _stderr(self) -> str:
        return self._stderr_path.read_text(errors="replace")[-4000:]


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """transformers 4.56.2, the reference; `make test` installs it and insists on it."""
    if not PYTHON.exists():
        reason = f"the oracle's environment is not there ({PYTHON}); `make test` makes it"
        if os.environ.get("BLUEJAY_REQUIRE_ORACLE"):
            pytest.fail(reason)
        pytest.skip(reason)
    oracle = Oracle(tmp_path_factory.mktemp("oracle"))
    yield oracle
    oracle.stop()


@pytest.fixture(scope="session")
def write_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.nn.Module], Path]:
    """Write a model as transformers keeps it: config.json and model.safetensors, by the safetensors library alone."""

    def write(model: torch.nn.Module) -> Path:
        folder = tmp_path_factory.mktemp("hf")
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write
