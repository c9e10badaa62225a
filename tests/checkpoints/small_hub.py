"""A model hub on loopback: the routes that huggingface_hub uses, and the faults that a network has."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

CONFIG = {
    "model_type": "gptj",
    "vocab_size": 16,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "rotary_dim": 2,
}


def model_files(weights: bytes = b"weights" * 100) -> dict[str, bytes]:
    """A GPT-J as it lies on the hub, with much that Bluejay has no use for."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": weights,
        "pytorch_model.bin": b"the same as a pickle",
        "flax_model.msgpack": b"flax",
        "tf_model.h5": b"tensorflow",
        "rust_model.ot": b"rust",
        "onnx/model.onnx": b"onnx",
        "modeling_gptj.py": b"print('never run')",
        "README.md": b"# A model",
    }


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def hash_of(name: str, content: bytes) -> str:
    """The hub's name for a file's content: SHA-256 for large files, git's SHA-1 for small ones."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\x00" % len(content) + content).hexdigest()


@dataclass
class SmallHub:
    """What the hub holds, what it was asked, and how it fails.

    Attributes:
        models: repo_id -> revision -> file name -> content.
        requests: method, path and Range header of each request.
        cut: file name -> how often to break the connection off after half of what was asked for.
        broken: file names that come with a byte flipped.
        token: what `Authorization` must carry, None for a hub that is open to all.
        tokens_at_cdn: whether the host of the large files was sent an `Authorization`.
        down: answer everything with 503.
    """

    endpoint: str = ""
    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    token: str | None = None
    tokens_at_cdn: bool = False
    down: bool = False

    def add(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Put a model there; return its commit."""
        revisions = self.models.setdefault(repo_id, {})
        commit = hashlib.sha1(repr((repo_id, sorted(files.items()))).encode()).hexdigest()
        revisions[revision] = revisions[commit] = files
        return commit

    def commit(self, repo_id: str, revision: str) -> str:
        revisions = self.models[repo_id]
        files = revisions[revision]
        return next(name for name in revisions if len(name) == 40 and revisions[name] is files)

    def fetched(self, method: str = "GET") -> list[str]:
        """The names of the files that were asked for, in order."""
        paths = [path for asked, path, _ in self.requests if asked == method and "/resolve/" in path]
        return [path.partition("/resolve/")[2].partition("/")[2] for path in paths]

    def ranges(self) -> list[str]:
        return [wanted for method, path, wanted in self.requests if method == "GET" and wanted and "/cdn/" in path]


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    """Serve a hub as long as the block runs."""
    hub = SmallHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.down:
            self._send(503, b"")
        elif match := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            self._content(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            if self._exists(match[1], revision := match[2] or "main"):
                files = [{"rfilename": name} for name in self.hub.models[match[1]][revision]]
                commit = self.hub.commit(match[1], revision)
                answer = {"id": match[1], "sha": commit, "private": False, "tags": [], "siblings": files}
                self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        elif (match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)) and self._exists(match[1], match[2]):
            self._resolve(match[1], match[2], match[3])

    def _exists(self, repo_id: str, revision: str) -> bool:
        """Whether the model can be served; an error is sent where it cannot."""
        sent = self.headers.get("Authorization")
        if self.hub.token is not None and sent != f"Bearer {self.hub.token}":
            self._send(401 if sent is None else 403, b"", {"X-Error-Code": "GatedRepo"})
        elif repo_id not in self.hub.models:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.hub.models[repo_id]:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        content = self.hub.models[repo_id][revision].get(name)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": self.hub.commit(repo_id, revision), "ETag": f'"{hash_of(name, content)}"'}
        if is_large(name):  # as the real hub: on another host, behind a redirect that says what to expect
            port = self.hub.endpoint.rpartition(":")[2]
            headers["Location"] = f"http://localhost:{port}/cdn/{hash_of(name, content)}/{name}"
            headers["X-Linked-Etag"], headers["X-Linked-Size"] = headers.pop("ETag"), str(len(content))
            self._send(302, b"", headers)
        else:
            self._send(200, content, headers)

    def _content(self, digest: str, name: str) -> None:
        self.hub.tokens_at_cdn |= "Authorization" in self.headers
        everything = [files[name] for model in self.hub.models.values() for files in model.values() if name in files]
        content = next(content for content in everything if hash_of(name, content) == digest)
        if name in self.hub.broken:
            content = bytes([content[0] ^ 1]) + content[1:]
        start = 0
        headers = {}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status, body = (206 if start else 200), content[start:]
        if self.hub.cut.get(name, 0):
            self.hub.cut[name] -= 1
            self.close_connection = True
            self._send(status, body, headers, sent=len(body) // 2)
        else:
            self._send(status, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
