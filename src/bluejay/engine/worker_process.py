"""A worker's process as its parent holds it: started, connected, watched, ended."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bluejay.engine import messages
from bluejay.engine.messages import Hello, Message
from bluejay.errors import EngineError

MAX_SOCKET_PATH_BYTES = 103  # macOS takes no more, Linux 107
CONNECT_TIMEOUT_S = 30.0  # Python's start and the imports without torch: 0.1 s, and much more on a machine that is busy
WATCH_S = 0.1  # how often silence is looked for; it is noticed so much too late at most
STOPPED_SILENCE_S = 0.5  # of a process that the system calls stopped: it will not speak before somebody continues it
MAX_LINE_CHARS = 2_000
LARGE_BYTES = 64 * 1024  # of a message; to understand such a one would hold the loop for milliseconds
POLL_S = 0.01  # a process that starts or ends is asked so often


_log = logging.getLogger(__name__)


class WorkerProcess:
    """A process that runs `bluejay.engine.worker`, and the connection to it. Made by `start`.

    Attributes:
        max_silence_s: a worker that says nothing for so long is killed; may be set at any time.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        max_silence_s: float,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.max_silence_s = max_silence_s
        self._killed_because: str | None = None
        self._heard_s = time.monotonic()
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, *, max_silence_s: float) -> WorkerProcess:
        """Start a process and greet it. Raises: EngineError if it does not connect, or is of another version."""
        try:
            worker = cls(*await _connected(), max_silence_s)
        except OSError as error:
            raise EngineError(f"the engine's worker cannot be started: {error}") from None
        try:
            worker.send(Hello(messages.PROTOCOL_VERSION))
            messages.check_version(await worker.receive())
        except BaseException:
            await worker.end()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        """Whether the process runs and is connected, as far as is known."""
        return self._process.poll() is None and not self._writer.transport.is_closing()

    def listen(self, max_silence_s: float) -> None:
        """Begin to count the silence of a worker that has stood by."""
        self._heard_s, self.max_silence_s = time.monotonic(), max_silence_s

    @property
    def silent_s(self) -> float:
        """Seconds since the last message, less those in which this process did not listen."""
        return time.monotonic() - self._heard_s

    def send(self, message: Message) -> None:
        """Send without waiting: the worker's reader always reads, and one that does not is killed soon.

        Raises: ProtocolError if the message cannot be sent.
        """
        frame = messages.pack(message)
        if not self._writer.transport.is_closing():
            self._writer.write(frame)

    async def receive(self) -> Message:
        """The next message. Raises: EngineError that says how the worker ended, when there will be none."""
        try:
            header = await self._reader.readexactly(messages.HEADER.size)
            body = await self._reader.readexactly(messages.num_body_bytes(header))
        except (asyncio.IncompleteReadError, OSError):
            raise EngineError(await self._why_it_ended()) from None
        self._heard_s = time.monotonic()
        if len(body) < LARGE_BYTES:
            return messages.unpack(body)
        self._heard_s = math.inf  # nobody is silent while what they said is being understood
        message = await asyncio.to_thread(messages.unpack, body)
        self._heard_s = time.monotonic()
        return message

    def kill(self, reason: str) -> None:
        """End the process at once; `receive` then raises, and says that the worker did what `reason` says."""
        self._killed_because = self._killed_because or reason
        self._process.kill()
        # Not left to the process: the system gives its memory back first, then closes its files.
        self._writer.transport.abort()

    async def end(self) -> None:
        """Kill the process if it still runs, and wait until nothing of it is left. May be called again."""
        self._watching.cancel()
        self.kill("was ended")
        await _unbroken(self._wait())

    async def _wait(self) -> None:
        await asyncio.wait([self._watching])
        await _end(self._process)
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _watch(self) -> None:
        """Kill a worker that is silent for too long."""
        while self.silent_s <= (STOPPED_SILENCE_S if _is_stopped(self._process) else self.max_silence_s):
            asleep_s = time.monotonic()
            await asyncio.sleep(WATCH_S)
            late_s = time.monotonic() - asleep_s - WATCH_S
            if late_s > WATCH_S:  # this process was busy or stopped itself: what was said meanwhile is not yet read
                self._heard_s += late_s
        self.kill(f"gave no sign of life for {self.silent_s:.1f} s")

    async def _why_it_ended(self) -> str:
        if self._killed_because is None:
            for _ in range(10):  # a process closes its files just before it can be asked for its exit code
                if self._process.poll() is not None:
                    break
                await asyncio.sleep(POLL_S)
        return f"the engine's worker {self._killed_because or _ending(self._process)}"


async def _connected() -> tuple[subprocess.Popen[bytes], asyncio.StreamReader, asyncio.StreamWriter]:
    with _door() as (listener, path):
        # -P: without it a file in the working directory could stand before a module of the same name.
        command = [sys.executable, "-P", "-m", "bluejay.engine.worker", path]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # A thread, not this loop: a loop that is busy must not keep the worker waiting for room in the pipe.
        threading.Thread(target=_log_lines, args=(process.stderr, process.pid), daemon=True).start()
        try:
            return process, *await _accept(listener, process)
        except BaseException:
            await _unbroken(_end(process))
            raise


def _log_lines(stderr: IO[bytes], pid: int) -> None:
    """Log what a worker writes to stderr, line by line, until it ends: warnings, and what it says as it falls."""
    with stderr:
        for line in stderr:
            if text := line.decode(errors="replace").rstrip():
                _log.warning("worker: %s", text[:MAX_LINE_CHARS], extra={"worker_pid": pid})


@contextmanager
def _door() -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens, and its path in a folder which no other user can enter; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bluejay-"))
    try:
        if len(os.fsencode(folder / "socket")) > MAX_SOCKET_PATH_BYTES:  # TMPDIR is a long one
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix="bluejay-", dir="/tmp"))
        path = str(folder / "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            (folder / "socket").chmod(0o600)
            listener.listen(1)
            listener.setblocking(False)
            yield listener, path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _accept(
    listener: socket.socket, process: subprocess.Popen[bytes]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The connection of the process that was started. Raises: EngineError if none or another one comes."""
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            connected, _ = listener.accept()
        except BlockingIOError:
            await asyncio.sleep(POLL_S)
        else:
            break
        if process.poll() is not None:
            raise EngineError(f"the engine's worker {_ending(process)} before it connected")
        if time.monotonic() > deadline_s:
            raise EngineError(f"the engine's worker did not connect within {CONNECT_TIMEOUT_S:g} s")
    try:
        connected.setblocking(False)
        if (pid := _peer(connected)) not in (None, process.pid):
            raise EngineError(f"process {pid} connected instead of the engine's worker, process {process.pid}")
        return await asyncio.open_unix_connection(sock=connected)
    except BaseException:
        connected.close()
        raise


def _peer(connected: socket.socket) -> int | None:
    """The process at the other end; None where the system does not say."""
    if sys.platform != "linux":
        return None
    layout = struct.Struct("3i")  # struct ucred: pid, uid, gid; unix(7)
    pid: int = layout.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))[0]
    return pid


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, also a stopped one, and wait until it is gone."""
    process.kill()
    while process.poll() is None:  # asked rather than waited for in a thread: nothing of this outlives the loop
        await asyncio.sleep(POLL_S)


async def _unbroken(work: Coroutine[Any, Any, None]) -> None:
    """Await work to its end, also when cancelled meanwhile, however often: a process must not be left behind."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether somebody has stopped the process; False where the system does not say."""
    if not hasattr(os, "waitid") or process.returncode is not None:
        return False
    try:  # WNOWAIT: only looked at; what it ends with remains for `poll`
        return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    if code is None:
        return "closed its connection"
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"
