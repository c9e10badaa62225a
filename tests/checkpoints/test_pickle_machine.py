"""The pickle machine: whatever a file asks for, nothing runs."""

import collections
import copyreg
import os
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bluejay.checkpoints.pickle_machine import MAX_OPCODES, Global, PickleMachine
from bluejay.errors import CheckpointError

EXTENSION = 0x7B


def empty_dict() -> dict[str, object]:
    return {}


def run(data: bytes) -> object:
    return PickleMachine(
        data,
        where="pytorch_model.bin",
        constructors={"collections.OrderedDict": empty_dict},
        names=frozenset({"torch.FloatStorage"}),
        persistent=lambda identity: identity,
    ).run()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that every attack of these tests would make."""
    path = tmp_path / "canary"
    copyreg.add_extension("os", "system", EXTENSION)
    yield path
    copyreg.remove_extension("os", "system", EXTENSION)
    assert not path.exists()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def attacks(command: str) -> dict[str, tuple[bytes, str]]:
    """Ways to call os.system(command), and what the refusal names."""
    argument = text(command)
    two = b"\x80\x02"
    four = b"\x80\x04"
    module, name = text("os"), text("system")
    return {
        "GLOBAL": (two + b"cos\nsystem\n" + argument + b"\x85R.", "os.system"),
        "GLOBAL, MARK, TUPLE": (two + b"cposix\nsystem\n(" + argument + b"tR.", "posix.system"),
        "STACK_GLOBAL": (four + module + name + b"\x93" + argument + b"\x85R.", "os.system"),
        "STACK_GLOBAL, memo": (four + module + b"\x940" + name + b"h\x00\x93" + argument + b"\x85R.", "opcode"),
        "STACK_GLOBAL, dots": (four + text("torch._utils") + text("os.system") + b"\x93.", "torch._utils.os.system"),
        "STACK_GLOBAL, no str": (four + b"K\x01K\x02\x93.", "a global without a name"),
        "INST": (b"(" + argument + b"ios\nsystem\n.", "os.system"),
        "INST of an allowed one": (b"(icollections\nOrderedDict\n.", "INST"),
        "OBJ": (b"(cos\nsystem\n" + argument + b"o.", "os.system"),
        "OBJ of an allowed one": (b"(ccollections\nOrderedDict\no.", "OBJ"),
        "NEWOBJ": (two + b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        "NEWOBJ_EX": (four + b"ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        "EXT1": (two + b"\x82" + bytes([EXTENSION]) + argument + b"\x85R.", "EXT1"),
        "EXT2": (two + b"\x83" + EXTENSION.to_bytes(2, "little") + argument + b"\x85R.", "EXT2"),
        "EXT4": (two + b"\x84" + EXTENSION.to_bytes(4, "little") + argument + b"\x85R.", "EXT4"),
        "BUILD a global": (two + b"ccollections\nOrderedDict\n}" + text("fn") + argument + b"sb.", "attributes"),
        "BUILD, not a dict": (two + b"}" + argument + b"b.", "attributes"),
        "PERSID": (b"Pos.system\n.", "PERSID"),
        "REDUCE a name": (two + b"ctorch\nFloatStorage\n" + argument + b"\x85R.", "a call of torch.FloatStorage"),
        "REDUCE a string": (two + text("os.system") + argument + b"\x85R.", "a call of something unnamed"),
        "eval": (two + b"cbuiltins\neval\n" + argument + b"\x85R.", "builtins.eval"),
        "Python 2's eval": (two + b"c__builtin__\neval\n" + argument + b"\x85R.", "__builtin__.eval"),
        "torch.load": (two + b"ctorch\nload\n" + argument + b"\x85R.", "torch.load"),
        "inner pickle": (two + b"ctorch.storage\n_load_from_bytes\n" + argument + b"\x85R.", "_load_from_bytes"),
        "getattr": (two + b"cbuiltins\ngetattr\ncos\nsystem\n.", "builtins.getattr"),
        "in a list": (two + b"](cos\nsystem\ne.", "os.system"),
        "as a key": (two + b"}cos\nsystem\nK\x01s.", "os.system"),
        "after dropping it": (two + b"}cos\nsystem\n0.", "os.system"),
        "bytes": (b"\x80\x03C\x03abc.", "opcode 43"),
        "a name that breaks a terminal": (two + b"cos\x1b[2J\nsystem\n.", r"'os\x1b[2J.system'"),
    }


@pytest.mark.parametrize("kind", attacks("true"))
def test_an_attack_is_refused_by_its_name(canary: Path, kind: str) -> None:
    data, named = attacks(f"touch {canary}")[kind]
    with pytest.raises(CheckpointError) as caught:
        run(data)
    assert str(caught.value).startswith("pytorch_model.bin asks for ")
    assert named in str(caught.value)


class Attack:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_python_s_own_spelling_of_an_attack_is_refused(canary: Path, protocol: int) -> None:
    data = pickle.dumps({"transformer.wte.weight": Attack(f"touch {canary}")}, protocol)
    # Protocols 0 and 1 spell their strings in opcodes that no torch.save has used.
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system" if protocol >= 2 else "asks for"):
        run(data)


def test_the_attack_is_a_real_one(tmp_path: Path) -> None:
    data, _ = attacks(f"touch {tmp_path / 'canary'}")["STACK_GLOBAL"]
    pickle.loads(data)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_what_pickle_says(protocol: int) -> None:
    value = {
        "constants": (None, True, False),
        "numbers": [0, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**63 - 1],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "texts": ["", "é", "x" * 300],
        "dicts": [{}, {"a": {"b": []}}],
    }
    value["again"] = value["texts"]
    assert run(pickle.dumps(value, protocol)) == value


def test_an_ordered_dict_loses_its_attributes() -> None:
    state = collections.OrderedDict(a=1, b=2)
    state._metadata = {"": {"version": 1}}
    assert run(pickle.dumps(state, 2)) == {"a": 1, "b": 2}


def test_a_name_stays_a_name() -> None:
    assert run(b"\x80\x02ctorch\nFloatStorage\n.") == Global("torch.FloatStorage")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02(K\x01.",  # a mark that nothing closes leaves one value: taken, as Python does
        b"\x80\x02K\x01K\x02.",
    ],
)
def test_what_is_left_on_the_stack_does_not_matter(data: bytes) -> None:
    assert run(data) in (1, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short at byte 0"),
        (b"\x80", "cut short"),
        (b"\x80\x02X\xff\xff\xff\xff", "cut short"),
        (b"\x80\x02.", "damaged at byte 3"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02\x86.", "damaged"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02q\x05.", "damaged"),
        (b"\x80\x02}K\x01K\x02s.", "damaged"),  # a key that is no text
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02K\x01K\x02a.", "damaged"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "damaged"),
        (b"\x80\x02c" + b"a" * 300 + b"\nb\n.", "damaged"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "damaged"),  # an argument too many
        (b"\x80\x02ccollections\nOrderedDict\n]R.", "damaged"),
        (b"\x80\x02}(" + text("a") + b"K\x01" + text("a") + b"K\x02u.", "'a' occurs twice"),
        (b"\x80\x02" + b"N" * (MAX_OPCODES + 1) + b".", f"goes on after {MAX_OPCODES} opcodes"),
    ],
)
def test_a_damaged_pickle_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        run(data)


@pytest.mark.parametrize("opcode", [b"(", b"}", b"K\x01\x94"])
def test_memory_is_bounded(opcode: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            run(b"\x80\x04" + opcode * 2_000_000)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


def test_a_nest_of_any_depth_is_let_go() -> None:
    with pytest.raises(CheckpointError):
        run(b"\x80\x02)" + b"\x85" * (MAX_OPCODES + 1))
    assert run(b"\x80\x02)" + b"\x85" * 100_000 + b".") is not None


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        run(data)
    except CheckpointError as error:
        assert len(str(error)) < 1000


opcodes = st.sampled_from(
    [bytes([code]) for code in b"()]}.NRbcQtuseaqhKMJX\x80\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95"]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(opcodes | st.sampled_from([b"K\x01", b"q\x00", b"h\x00", text("a")]), max_size=40))
def test_any_program_is_read_or_refused(program: list[bytes]) -> None:
    try:
        run(b"\x80\x02" + b"".join(program) + b".")
    except CheckpointError as error:
        assert len(str(error)) < 1000
