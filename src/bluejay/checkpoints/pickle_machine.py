"""A pickle machine that can only describe tensors.

Pickle is a small language, and its REDUCE calls whatever function a file names. This machine knows the opcodes that a
dict of tensors needs, keeps every global as a mere name, and calls only the constructors that it is given. Anything
else is refused by its name. Nothing here imports or looks up Python objects, so there is nothing for a file to reach.

Source: CPython's Lib/pickletools.py describes each opcode; torch.save writes protocol 2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from bluejay.checkpoints.files import short
from bluejay.errors import CheckpointError

# GPT-J's 341 tensors take some 15,000. Each opcode makes at most one small object, so this bounds the memory as well.
MAX_OPCODES = 500_000
MAX_GLOBAL_CHARS = 256


@dataclass(frozen=True)
class Global:
    """A global that the file names, such as "torch.FloatStorage"; never looked up."""

    name: str


Constructor = Callable[..., object]


class PickleMachine:
    """Runs one pickle.

    Args:
        data: the bytes.
        position: where in them the pickle starts; after `run`, where it ends.
        where: the file's name, for messages.
        constructors: what REDUCE may call, by the global's name; these and `names` are all that a file may ask for.
        names: globals that may be named but not called.
        persistent: turns a persistent id into an object.
    """

    def __init__(
        self,
        data: bytes,
        *,
        where: str,
        position: int = 0,
        constructors: Mapping[str, Constructor] | None = None,
        names: frozenset[str] = frozenset(),
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        self.data = data
        self.position = position
        self.where = where
        self.constructors = constructors or {}
        self.names = names
        self.persistent = persistent
        self.stack: list[object] = []
        self.below_marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """The object that the pickle describes.

        Raises: CheckpointError for a damaged pickle and for one that asks for anything not allowed.
        """
        try:
            for _ in range(MAX_OPCODES):
                opcode = self.take(1)
                if opcode == b".":
                    return self.stack.pop()
                OPCODES.get(opcode, _refuse_opcode)(self)
        except (IndexError, KeyError, TypeError, ValueError, struct.error):
            raise CheckpointError(f"{self.where}: its pickle is damaged at byte {self.position}") from None
        raise CheckpointError(f"{self.where}: its pickle goes on after {MAX_OPCODES} opcodes; no state dict is so long")

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise CheckpointError(f"{self.where}: its pickle is cut short at byte {len(self.data)}")
        self.position += count
        return taken

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return int(value)

    def line(self) -> str:
        end = self.data.index(b"\n", self.position, self.position + MAX_GLOBAL_CHARS)
        text = self.take(end - self.position).decode("utf-8")
        self.position += 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[object]:
        items, self.stack = self.stack, self.below_marks.pop()
        return items

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def refuse(self, thing: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where} asks for {thing}, which no weights need; nothing was run. "
            "If you trust its origin, get the model as safetensors"
        )

    # What the opcodes do.

    def mark(self) -> None:
        self.below_marks.append(self.stack)
        self.stack = []

    def push_global(self, module: object, name: object) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a global without a name"
        if full not in self.constructors and full not in self.names:
            self.refuse(full if full.isascii() and full.isprintable() and len(full) < 120 else short(full))
        self.push(Global(full))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function.name not in self.constructors:
            self.refuse(f"a call of {function.name if isinstance(function, Global) else 'something unnamed'}")
        if not isinstance(arguments, tuple):
            raise TypeError
        self.push(self.constructors[function.name](*arguments))

    def build(self) -> None:
        attributes, target = self.stack.pop(), self.stack[-1]
        # An OrderedDict's attributes are the versions of its modules; anything else has no business here.
        if type(target) is not dict or type(attributes) is not dict:
            self.refuse("attributes on an object")

    def persistent_id(self) -> None:
        identity = self.stack.pop()
        if self.persistent is None:
            self.refuse("an object outside of itself")
        self.push(self.persistent(identity))

    def append(self, values: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(values)

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a deeply nested tuple would overflow the interpreter's own stack.
            if not isinstance(key, str):
                raise TypeError
            if key in target:
                raise CheckpointError(f"{self.where}: the key {short(key)} occurs twice")
            target[key] = value

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]


def _refuse_opcode(machine: PickleMachine) -> None:
    opcode = machine.data[machine.position - 1 : machine.position]
    if opcode == b"i":  # INST spells out what it would call
        machine.push_global(machine.line(), machine.line())
    machine.refuse(f"pickle's opcode {REFUSED.get(opcode, opcode.hex())}")


# The dangerous ones by name, for messages; any opcode that is not in OPCODES is refused.
REFUSED = {
    b"i": "INST",
    b"o": "OBJ",
    b"\x81": "NEWOBJ",
    b"\x92": "NEWOBJ_EX",
    b"\x82": "EXT1 (a registered extension)",
    b"\x83": "EXT2 (a registered extension)",
    b"\x84": "EXT4 (a registered extension)",
    b"P": "PERSID",
    b"\x97": "NEXT_BUFFER",
}

OPCODES: dict[bytes, Callable[[PickleMachine], None]] = {
    b"\x80": lambda m: m.skip(1),  # PROTO
    b"\x95": lambda m: m.skip(8),  # FRAME
    # Values.
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),  # BININT1
    b"M": lambda m: m.push(m.number("<H")),  # BININT2
    b"J": lambda m: m.push(m.number("<i")),  # BININT
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),  # LONG1
    b"\x8c": lambda m: m.push(m.take(m.number("<B")).decode("utf-8")),  # SHORT_BINUNICODE
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8")),  # BINUNICODE
    # Containers.
    b"(": PickleMachine.mark,
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.push_tuple(1),  # TUPLE1
    b"\x86": lambda m: m.push_tuple(2),  # TUPLE2
    b"\x87": lambda m: m.push_tuple(3),  # TUPLE3
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),  # TUPLE
    b"a": lambda m: m.append([m.stack.pop()]),  # APPEND
    b"e": lambda m: m.append(m.pop_to_mark()),  # APPENDS
    b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),  # SETITEM
    b"u": lambda m: m.set_items(m.pop_to_mark()),  # SETITEMS
    # The memo.
    b"q": lambda m: m.remember(m.number("<B")),  # BINPUT
    b"r": lambda m: m.remember(m.number("<I")),  # LONG_BINPUT
    b"\x94": lambda m: m.remember(len(m.memo)),  # MEMOIZE
    b"h": lambda m: m.push(m.memo[m.number("<B")]),  # BINGET
    b"j": lambda m: m.push(m.memo[m.number("<I")]),  # LONG_BINGET
    # Objects.
    b"c": lambda m: m.push_global(m.line(), m.line()),  # GLOBAL
    b"\x93": lambda m: m.push_global(m.stack.pop(-2), m.stack.pop()),  # STACK_GLOBAL
    b"R": PickleMachine.reduce,
    b"b": PickleMachine.build,
    b"Q": PickleMachine.persistent_id,  # BINPERSID
}
