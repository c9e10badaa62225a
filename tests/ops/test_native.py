"""The choice of a voice, the errors of a wrong call, and processes that split or end while threads compute."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from bluejay import ops
from bluejay.errors import KernelError
from bluejay.ops import native, reference

needs_kernels = pytest.mark.skipif(ops.why_missing() is not None, reason=f"no kernels: {ops.why_missing()}")


@pytest.fixture(autouse=True)
def leave_the_voice_as_it_was(monkeypatch):
    monkeypatch.setattr(ops, "_threads", ops._threads)
    before = ops.voice()
    yield
    ops.choose(before)


@pytest.fixture
def missing(monkeypatch):
    def extension():
        raise native.Missing("they were not compiled when Bluejay was installed")

    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(ops, "_voice", None)
    yield
    monkeypatch.undo()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    environ = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)


def int8_layer(inputs=64, outputs=48, seed=0):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return reference.pack(*reference.quantize_int8(weight), bits=8)


def test_reference_is_always_there():
    assert ops.available_voices()[-1] == "reference"
    assert ops.choose("reference") == ops.voice() == "reference"


@needs_kernels
def test_each_voice_can_be_chosen_and_says_the_same():
    x, layer = torch.randn(3, 64), int8_layer()
    expected = reference.linear_int8(x, *layer, None, out_features=48)
    for name in ops.available_voices():
        assert ops.choose(name) == ops.voice() == name
        torch.testing.assert_close(ops.linear_int8(x, *layer, None, out_features=48), expected, rtol=1e-5, atol=1e-5)


def test_auto_is_the_best():
    assert ops.choose("auto") == ops.available_voices()[0]


def test_an_unknown_voice_is_named_with_those_that_there_are():
    before = ops.voice()
    with pytest.raises(KernelError, match=r"BLUEJAY_KERNELS is 'sse9', expected auto or one of .*reference"):
        ops.choose("sse9")
    assert ops.voice() == before


@needs_kernels
def test_instructions_that_the_processor_lacks_are_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(native, "supported", lambda: ["portable"])
        with pytest.raises(KernelError, match=r"'avx2', which this processor lacks; it has portable, reference"):
            ops.choose("avx2")


@needs_kernels
def test_the_extension_itself_refuses_instructions_that_the_processor_lacks():
    lacking = {"avx512_vnni", "avx2", "portable"} - set(native.supported())
    for name in [*lacking, "sse9"]:
        with pytest.raises(KernelError, match=name):
            native.set_active(name)


def test_the_environment_is_asked_once():
    code = "from bluejay import ops; import os; print(ops.voice()); os.environ.clear(); print(ops.voice())"
    assert run(code, BLUEJAY_KERNELS="reference").stdout.split() == ["reference", "reference"]
    done = run("from bluejay import ops; ops.voice()", BLUEJAY_KERNELS="fast")
    assert "KernelError: BLUEJAY_KERNELS is 'fast', expected" in done.stderr


def test_without_kernels_there_is_one_warning_and_the_reference(missing):
    x, layer = torch.randn(2, 64), int8_layer()
    with pytest.warns(RuntimeWarning, match=r"they were not compiled.*install a C\+\+ compiler") as caught:
        found = ops.linear_int8(x, *layer, None, out_features=48)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.linear_int8(x, *layer, None, out_features=48), found)
    assert ops.voice() == "reference"


def test_without_kernels_a_forced_voice_is_an_error_and_reference_is_silent(missing):
    with pytest.raises(KernelError, match="there are no kernels"):
        ops.choose("portable")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.choose("reference") == "reference"


def test_an_extension_that_does_not_load_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "bluejay.ops._native", None)  # as if an import of it failed
    monkeypatch.delattr(ops, "_native", raising=False)
    with pytest.raises(native.Missing):
        native.extension.__wrapped__()


@needs_kernels
def test_threads_are_the_pools():
    ops.choose("auto")
    for count in (1, 3, 2):
        ops.set_num_threads(count)
        assert ops.num_threads() == native.extension().num_threads() == count
    ops.set_num_threads(0)
    assert ops.num_threads() == native.extension().num_threads() >= 1


@pytest.mark.parametrize("count", [-1, 1025])
def test_a_wrong_number_of_threads_is_named(count):
    with pytest.raises(KernelError, match=f"threads is {count}, expected 1 to 1024"):
        ops.set_num_threads(count)


@needs_kernels
def test_a_call_of_the_wrong_kind_is_an_error_that_tells_what_was_given():
    ops.choose("auto")
    with pytest.raises(KernelError, match=r"float32 \[64\]"):
        ops.read_sum(torch.zeros(64))
    with pytest.raises(KernelError, match="multiple of 64"):
        ops.read_sum(torch.zeros(65, dtype=torch.uint8))
    with pytest.raises(KernelError, match="gradient"):
        ops.linear_int8(torch.zeros(1, 64, requires_grad=True), *int8_layer(), None, out_features=48)


def test_sums_agree():
    buffer = torch.randint(256, (64 * 1001,), dtype=torch.uint8)
    for name in ops.available_voices():
        ops.choose(name)
        assert ops.read_sum(buffer) == reference.read_sum(buffer)


def test_tensors_elsewhere_go_to_the_reference():
    x, (weight, scales) = torch.zeros(2, 64, device="meta"), int8_layer()
    found = ops.linear_int8(x, weight.to("meta"), scales.to("meta"), None, out_features=48)
    assert (found.shape, found.device.type) == ((2, 48), "meta")


@needs_kernels
def test_a_child_computes_what_its_parent_does():
    # In a process of its own: torch does not promise that its own threads survive a fork.
    code = """
import os, torch
from bluejay import ops
from bluejay.ops import reference
torch.set_num_threads(1)
ops.set_num_threads(2)
weight = torch.randn(512, 256)
layer = reference.pack(*reference.quantize_int8(weight), bits=8)
x = torch.randn(64, 256)
expected = ops.linear_int8(x, *layer, None, out_features=512)
child = os.fork()
same = torch.equal(ops.linear_int8(x, *layer, None, out_features=512), expected)
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
print("same")
"""
    done = run(code)
    assert done.stdout == "same\n", done.stderr


@needs_kernels
def test_the_interpreter_ends_while_the_pool_sleeps():
    code = "import torch; from bluejay import ops; ops.set_num_threads(3); ops.read_sum(torch.zeros(2**20).byte())"
    done = run(code)
    assert (done.stderr, done.returncode) == ("", 0)


@needs_kernels
def test_tensors_of_another_layout_are_refused_and_lazy_ones_are_worked_out():
    ops.choose("auto")
    with pytest.raises(KernelError, match="must be dense"):
        ops.linear_int8(torch.zeros(2, 64), *int8_layer(), torch.zeros(48).to_sparse(), out_features=48)
    lazy = torch.randn(2, 64, dtype=torch.complex64).conj().imag  # a view that remembers to change the sign
    assert lazy.is_neg()
    found = ops.linear_int8(lazy, *int8_layer(), None, out_features=48)
    assert torch.equal(found, ops.linear_int8(lazy.clone().resolve_neg(), *int8_layer(), None, out_features=48))


def test_the_command_line_tells_of_missing_kernels_in_one_line():
    code = (
        "import sys; sys.modules['bluejay.ops._native'] = None; from bluejay.cli import main; "
        "sys.argv = ['bluejay', 'generate', '--dtype', 'int8', '--max-new-tokens', '2', 'Once']; main()"
    )
    done = run(code)
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0, done.stderr
    assert len(warned) == 1
    assert "without kernels: they were not compiled" in warned[0]
    assert "RuntimeWarning" not in done.stderr
