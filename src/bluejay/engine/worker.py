"""The engine in a process of its own: `python -m bluejay.engine.worker SOCKET`, started by `WorkerProcess`.

main thread   messages -> engine.add; engine.step() -> events
reader        socket -> queue of messages; the end of the socket ends the process, whatever the main thread is at
heart         tells all the time that the process lives, and how long its step has lasted

Nothing here imports torch before the reader runs: that takes seconds, and who waits for it may be gone meanwhile.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Never

from bluejay.engine import messages
from bluejay.engine.messages import (
    Beat,
    Cancel,
    Count,
    Counted,
    Embed,
    Embedded,
    Events,
    Facts,
    Failed,
    Fault,
    Generate,
    Hello,
    Message,
    Open,
    Progress,
    ProtocolError,
    Ready,
    Refused,
)
from bluejay.errors import BluejayError, EngineError, InvalidRequest, RequestError

if TYPE_CHECKING:
    from bluejay.engine.embedding import Embedding
    from bluejay.engine.llm import LLM
    from bluejay.engine.request import GenerationEvent

BEAT_S = 0.25
NICE = 5  # whoever holds the engine has little to do, and others wait for it: let it go first
PR_SET_PDEATHSIG = 1  # prctl(2)

_log = logging.getLogger(__name__)


class Connection:
    """The worker's end of the socket. Any thread may send."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises: ProtocolError if it cannot be sent. Does not return if nobody is left to read it."""
        frame = messages.pack(message)
        with self._lock:
            try:
                self._socket.sendall(frame)
            except OSError:
                _leave(0)

    def receive(self) -> Message:
        """The next message. Raises: EOFError when there will be none, ProtocolError if it is none."""
        header = self._read(messages.HEADER.size)
        return messages.unpack(self._read(messages.num_body_bytes(header)))

    def _read(self, num_bytes: int) -> bytes:
        read = bytearray()
        while len(read) < num_bytes:
            try:
                part = self._socket.recv(num_bytes - len(read))
            except OSError:
                part = b""
            if not part:
                raise EOFError
            read += part
        return bytes(read)


class Worker:
    """Serves one client until that goes.

    Args:
        connection: to the client.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._step_began_s: float | None = None
        self._numbers: dict[int, int] = {}  # the client's number of a request -> the engine's
        self._names: dict[int, int] = {}  # and back
        self._embeddings: dict[int, Embedding] = {}  # those on their way, by the client's number

    def run(self) -> Never:
        """Greet, load, serve; ends the process."""
        try:
            self._greet()
            for loop in (self._read, self._beat):
                threading.Thread(target=loop, daemon=True).start()
            llm = self._open()
            while True:
                self._serve(llm)
        except Exception as error:
            self._fail(error)

    def _greet(self) -> None:
        self._connection.send(Hello(messages.PROTOCOL_VERSION))
        try:
            messages.check_version(self._connection.receive())
        except EOFError:
            _leave(0)

    def _read(self) -> None:
        """Fill the inbox, in a thread of its own."""
        try:
            while True:
                self._inbox.put(self._connection.receive())
                self._opened.set()
        except EOFError:
            _leave(0)
        except Exception as error:
            self._fail(error)

    def _beat(self) -> None:
        """Tell that the process lives, in a thread of its own; nobody listens to one that only stands by."""
        self._opened.wait()
        while True:
            began_s = self._step_began_s
            self._connection.send(Beat(0.0 if began_s is None else time.monotonic() - began_s))
            time.sleep(BEAT_S)

    def _open(self) -> LLM:
        """Load what the first message names, and tell how far that is."""
        gc.disable()  # what torch makes when imported stays for good: looking through it took a tenth of the start
        # Before it is known what to open: a worker that stands by has the longest part of its start behind it.
        from bluejay.engine.llm import LLM
        from bluejay.engine.threads import set_model_threads, set_torch_threads

        asked = self._inbox.get()
        if not isinstance(asked, Open):
            raise ProtocolError(f"the second message is {type(asked).__name__}, expected Open")
        set_torch_threads(asked.threads)
        llm = LLM(
            asked.model,
            dtype=asked.dtype,
            device=asked.device,
            options=asked.options,
            draft=asked.draft,
            on_progress=lambda done, total: self._connection.send(Progress(done, total)),
        )
        set_model_threads(llm, asked.threads, one_by_one=True)
        gc.freeze()  # nor is it looked through between steps
        gc.enable()
        config = llm.config
        folder = llm.path if llm.path.is_dir() else llm.path.parent
        facts = Facts(
            model=llm.name,
            path=str(folder),
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            num_cache_tokens=llm.engine.num_cache_tokens,
            pid=os.getpid(),
        )
        self._connection.send(Ready(facts))
        return llm

    def _serve(self, llm: LLM) -> None:
        """Take what has come, or wait for it where there is nothing else to do; then one step."""
        waits = not llm.engine.has_work
        while waits or not self._inbox.empty():
            message = self._inbox.get()
            self._take(llm, message)
            waits = False
            if isinstance(message, Embed):
                break  # a text of megabytes takes long to become tokens: those of others come in between
        with self._timed():
            events = llm.engine.step()
        self._tell(llm, events)
        self._tell_embeddings()

    def _take(self, llm: LLM, message: Message) -> None:
        match message:
            case Cancel(number):
                if number in self._numbers:
                    llm.engine.cancel(self._numbers[number])
                if (embedding := self._embeddings.pop(number, None)) is not None:
                    embedding.cancel()
            case Generate(number) | Count(number) | Embed(number):
                try:
                    with self._timed():
                        self._answer(llm, message)
                except Exception as error:  # whatever it is, it is this request's and not the others'
                    if not isinstance(error, RequestError):
                        _log.exception("a request failed")
                    self._connection.send(Refused(number, Fault.of(error)))
            case _:
                raise ProtocolError(f"{type(message).__name__} came, expected a request")

    def _answer(self, llm: LLM, message: Generate | Count | Embed) -> None:
        match message:
            case Generate(number, request):
                own = self._numbers[number] = llm.engine.add(request)
                self._names[own] = number
            case Count(number):
                self._connection.send(Counted(number, llm.engine.statistics()))
            case Embed(number, texts):
                from bluejay.engine.embedding import Embedding

                self._embeddings[number] = Embedding(llm.engine, llm.encode_texts(texts))

    def _tell(self, llm: LLM, events: list[GenerationEvent]) -> None:
        named = [
            (self._names[event.request], messages.told(event, self._names[event.request]))
            for event in events
            if event.request in self._names
        ]
        for event in events:
            if event.usage is not None:
                self._forget(event.request)
        if not named:
            return
        try:
            self._connection.send(Events([event for _, event in named]))
        except ProtocolError:  # log-probabilities of a whole vocabulary; who asked for them is told, the others go on
            for number, one in named:
                self._tell_one(llm, number, one)

    def _tell_embeddings(self) -> None:
        """Answer the questions of which all texts have been read."""
        for number, embedding in list(self._embeddings.items()):
            try:
                if (vectors := embedding.result()) is None:
                    continue
                self._connection.send(Embedded(number, vectors.shape[1], vectors.numpy().tobytes()))
            except EngineError as error:  # more than fits into a message, too
                self._connection.send(Refused(number, Fault.of(error)))
            del self._embeddings[number]

    def _tell_one(self, llm: LLM, number: int, event: messages.Said | GenerationEvent) -> None:
        try:
            self._connection.send(Events([event]))
        except ProtocolError as error:
            too_large = InvalidRequest(f"{error}; ask for fewer log-probabilities", "logprobs")
            self._connection.send(Refused(number, Fault.of(too_large)))
            if (own := self._numbers.get(number)) is not None:
                llm.engine.cancel(own)
                self._forget(own)

    def _forget(self, own: int) -> None:
        if (number := self._names.pop(own, None)) is not None:
            del self._numbers[number]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What happens within counts as a step: one that never ends is noticed by its age."""
        self._step_began_s = time.monotonic()
        try:
            yield
        finally:
            self._step_began_s = None

    def _fail(self, error: Exception) -> Never:
        if not isinstance(error, BluejayError):  # that is told by whoever asked for the impossible
            _log.error("the worker failed", exc_info=error)
        self._connection.send(Failed(Fault.of(error)))
        _leave(1)


def _leave(code: int) -> Never:
    """End at once: other threads may be in the middle of a step, and nothing is left to be told."""
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends.

    The end of the socket tells the same, but not to a process that is stopped, nor while torch is being imported.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Connect and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_parent()
    os.nice(NICE)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.connect(sys.argv[1])
    Worker(Connection(connected)).run()


if __name__ == "__main__":
    main()
