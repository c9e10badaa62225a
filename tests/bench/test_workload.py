import pytest

from bluejay.bench.workload import Workload, shape
from bluejay.errors import ContextLengthExceeded, InvalidRequest
from bluejay.model import PRESETS


def test_prompts_are_rows_of_token_ids_and_the_same_for_a_seed() -> None:
    prompts = Workload(batch_size=3, prompt_tokens=50).prompts(300)
    assert [len(prompt) for prompt in prompts] == [50, 50, 50]
    assert {type(token) for prompt in prompts for token in prompt} == {int}
    assert all(0 <= token < 300 for prompt in prompts for token in prompt)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert prompts == Workload(batch_size=3, prompt_tokens=50).prompts(300)
    assert prompts != Workload(batch_size=3, prompt_tokens=50, seed=1).prompts(300)


def test_the_first_token_takes_no_step() -> None:
    assert Workload(max_new_tokens=32).num_steps == 31


def test_wrong_numbers_are_named_all_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Workload(batch_size=0, prompt_tokens=0, max_new_tokens=1, repeats=0, seed=-1)
    assert str(caught.value) == (
        "batch_size is 0, expected at least 1; prompt_tokens is 0, expected at least 1; "
        "max_new_tokens is 1, expected at least 2; repeats is 0, expected at least 1; seed is -1, expected at least 0"
    )
    assert caught.value.param == "batch_size"


def test_a_context_that_is_too_short_is_told_with_its_numbers() -> None:
    config = PRESETS["gpt-j-6b"]
    Workload(prompt_tokens=2000, max_new_tokens=48).check_context(config)
    with pytest.raises(ContextLengthExceeded, match=r"2000 and max_new_tokens 49 are 2049 .* holds 2048"):
        Workload(prompt_tokens=2000, max_new_tokens=49).check_context(config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_can_be_cut_to_its_first_layers(name: str) -> None:
    whole = PRESETS[name]
    assert shape(name) == whole
    assert shape(name, whole.n_layer) == whole
    cut = shape(name, 3)
    assert cut.n_layer == 3
    assert [cut.window(layer) for layer in range(3)] == [whole.window(layer) for layer in range(3)]


def test_unknown_shapes_and_numbers_of_layers() -> None:
    with pytest.raises(InvalidRequest, match=r"'gpt-3', expected one of gpt-j-6b, gpt-neo-125m, gpt-neo-1.3b"):
        shape("gpt-3")
    for layers in (0, 29):
        with pytest.raises(InvalidRequest, match=f"layers is {layers}, gpt-j-6b has 1 to 28"):
            shape("gpt-j-6b", layers)
