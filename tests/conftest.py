"""What every test stands on: no network, a home of its own, one thread, and two tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

# huggingface_hub reads these when it is imported, so they are set before anything else is.
_HOME = tempfile.TemporaryDirectory(prefix="bluejay-tests-")
os.environ.update(BLUEJAY_HOME=_HOME.name, HF_HOME=_HOME.name, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import httpx  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from bluejay.model import ModelConfig, build  # noqa: E402
from bluejay.model.gpt_neo import GPTNeo  # noqa: E402
from bluejay.model.gptj import GPTJ  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings

Model = GPTJ | GPTNeo

TINY_GPTJ = ModelConfig(
    model_type="gptj",
    vocab_size=300,
    n_positions=128,
    n_embd=32,
    n_layer=2,
    n_head=2,
    rotary_dim=8,
    bos_token_id=0,
    eos_token_id=0,
)
TINY_GPT_NEO = ModelConfig(
    model_type="gpt_neo",
    vocab_size=300,
    n_positions=128,
    n_embd=32,
    n_layer=2,
    n_head=2,
    attention_layers=("global", "local"),
    window_size=8,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def pytest_unconfigure() -> None:
    _HOME.cleanup()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    """Build a config's network with seeded weights of such a size that every part of it is felt in the logits."""

    def make(config: ModelConfig, seed: int = 0) -> Model:
        model = build(config, device="meta").to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "wte" not in name:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
            else:
                mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
                torch.nn.init.normal_(weight, mean, std=0.3, generator=generator)
        return model.eval()

    return make


@pytest.fixture
def tiny_gptj(make_model: Callable[..., Model]) -> Model:
    return make_model(TINY_GPTJ)


@pytest.fixture
def tiny_gpt_neo(make_model: Callable[..., Model]) -> Model:
    return make_model(TINY_GPT_NEO)


@pytest.fixture(params=["gptj", "gpt_neo"])
def tiny_model(request: pytest.FixtureRequest) -> Model:
    """Each family in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")


@dataclass
class Serving:
    """A running `bluejay serve`.

    Attributes:
        grpc: host and port of gRPC, None where it serves none.
        home: its folder, with `log.txt`, the database and the journal.
    """

    url: str
    grpc: str | None
    process: subprocess.Popen[bytes]
    home: Path

    @property
    def log(self) -> str:
        return (self.home / "log.txt").read_text(errors="replace")

    def client(self, **options: object) -> httpx.Client:
        """An HTTP client of this server, without proxies."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)  # type: ignore[arg-type]

    def stop(self, number: int = signal.SIGTERM, within_s: float = 40) -> int:
        """End it by a signal; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the server did not end within {within_s} s of signal {number}:\n{self.log[-3000:]}")


StartServer = Callable[..., AbstractContextManager[Serving]]


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    """Start a server with the flags given, on free ports, in a home of its own: `with start_server("--strict-names"):`.

    `home` continues an earlier server's, `settings` is the text of its settings file, `env` goes on top of the rest.
    """

    @contextmanager
    def start(
        *flags: str, home: Path | None = None, settings: str | None = None, env: dict[str, str] | None = None
    ) -> Iterator[Serving]:
        home = tmp_path_factory.mktemp("server") if home is None else home
        ready = home / "ready.json"
        ready.unlink(missing_ok=True)
        if settings is not None:
            (home / "config.toml").write_text(settings)
        command = [sys.executable, "-m", "bluejay", "serve", "--port", "0", "--ready-file", str(ready)]
        if not any(flag.startswith("--grpc-port") for flag in flags):
            command += ["--grpc-port", "0"]
        with (home / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**server_environment(home), **(env or {})},
            )
        try:
            told = _wait_for(ready, process, home)
            yield (serving := Serving(told["url"], told["grpc"], process, home))
            serving.stop()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    return start


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Iterator[Serving]:
    """The default model on the loopback, open to everybody there; tests share it, and leave it as it was."""
    with start_server() as serving:
        yield serving


def server_environment(home: Path) -> dict[str, str]:
    """Nothing of who runs the tests: a home of its own, no proxies, offline."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    own = {"HOME": home, "XDG_DATA_HOME": home / "data", "XDG_CONFIG_HOME": home, "BLUEJAY_HOME": home / "bluejay"}
    if (home / "config.toml").exists():
        own["BLUEJAY_CONFIG"] = home / "config.toml"
    return kept | {name: str(path) for name, path in own.items()} | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _wait_for(ready: Path, process: subprocess.Popen[bytes], home: Path) -> dict[str, str]:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        if ready.exists():
            told: dict[str, str] = json.loads(ready.read_text())
            return told
        time.sleep(0.05)
    pytest.fail(f"the server was not ready (exit code {process.poll()}):\n{(home / 'log.txt').read_text()[-3000:]}")
