import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import bluejay
from bluejay import SamplingParams
from bluejay.checkpoints import save
from bluejay.engine import LLM
from bluejay.engine.options import EngineOptions
from bluejay.errors import CheckpointError, ContextLengthExceeded, EngineError, InvalidRequest, ModelNotFound
from bluejay.model import CausalAttention, build
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
PROMPTS = ["the fox", "the jay sang in the wood", "owl"]


def _slow_greedy(llm: LLM, prompt: str, num_tokens: int) -> list[int]:
    """Read everything again for each token: no cache, no batch."""
    ids = llm.encode(prompt)
    known = torch.tensor(llm.tokenizer.known_ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            row = torch.tensor([ids])
            logits = llm.model.logits(llm.model(row, torch.arange(len(ids))[None], CausalAttention()))[0, -1]
            ids.append(int(known[logits[known].argmax()]))
    return ids[-num_tokens:]


def test_batched_equals_alone_equals_no_cache(
    llm_of: Callable[[GPTJ | GPTNeo], LLM], tiny_model: GPTJ | GPTNeo
) -> None:
    llm = llm_of(tiny_model)
    together = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
    assert together == [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    assert together == [_slow_greedy(llm, prompt, 12) for prompt in PROMPTS]


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(llm: LLM) -> None:
    drawn = SamplingParams(max_new_tokens=10, do_sample=True, temperature=1.5, seed=4, num_return_sequences=2)
    alone = llm.generate(PROMPTS[0], drawn)[0]
    others = [SamplingParams(do_sample=True, seed=9), SamplingParams(num_beams=3), drawn]
    among = llm.generate([PROMPTS[1], PROMPTS[2], PROMPTS[0]], others)[2]
    assert [s.token_ids for s in alone.sequences] == [s.token_ids for s in among.sequences]
    assert alone.sequences[0].token_ids != alone.sequences[1].token_ids


def test_the_stream_is_the_text(llm: LLM) -> None:
    for params in (GREEDY, SamplingParams(max_new_tokens=30, do_sample=True, temperature=2.0, seed=1)):
        assert "".join(llm.stream(PROMPTS[0], params)) == llm.generate(PROMPTS[0], params)[0].text


def test_a_stream_that_fails_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    assert next(stream)
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="RuntimeError: the disk is gone"):
        patch.setattr("bluejay.engine.runner.Runner._begin", _fail)
        list(stream)


def test_a_stream_without_tokens_says_so(llm_of: Callable[[GPTJ | GPTNeo], LLM], tiny_gptj: GPTJ) -> None:
    with torch.no_grad():
        tiny_gptj.lm_head.bias.fill_(float("nan"))
    with pytest.raises(EngineError, match="no token could be chosen"):
        list(llm_of(tiny_gptj).stream(PROMPTS[0], SamplingParams(do_sample=True)))


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("the disk is gone")


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(llm: LLM) -> None:
    text = llm.generate(PROMPTS[0], GREEDY)[0].text
    stop = text[4:7]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, stop=stop)
    output = llm.generate(PROMPTS[0], params)[0]
    assert output.text == text[: text.index(stop)]
    assert output.finish_reason == "stop"
    assert "".join(llm.stream(PROMPTS[0], params)) == output.text


def test_ids_without_a_token_are_never_chosen(llm: LLM) -> None:
    assert llm.tokenizer.vocab_size < llm.config.vocab_size
    params = SamplingParams(max_new_tokens=60, do_sample=True, temperature=100.0, top_k=0, seed=2, ignore_eos=True)
    assert max(llm.generate(PROMPTS[0], params)[0].token_ids) < llm.tokenizer.vocab_size


def test_outputs_carry_prompt_reason_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    output = llm.generate(PROMPTS[1], params)[0]
    assert output.prompt == PROMPTS[1]
    assert output.prompt_token_ids == llm.tokenizer.encode(PROMPTS[1])
    assert output.finish_reason == "length"
    assert output.logprobs is not None and len(output.logprobs) == 3
    assert all(one.top[0] == (one.token_id, one.logprob) and len(one.top) == 2 for one in output.logprobs)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_prompts_may_be_ids_and_the_empty_text_begins_a_document(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    assert llm.generate([ids], GREEDY)[0].token_ids == llm.generate(PROMPTS[0], GREEDY)[0].token_ids
    assert llm.generate(ids, GREEDY)[0].prompt == PROMPTS[0]
    assert llm.generate("", GREEDY)[0].prompt_token_ids == [llm.tokenizer.eos_token_id]


def test_score_agrees_with_the_logprobs_of_generate(model_dir: Path) -> None:
    llm = LLM(model_dir, options=EngineOptions(cache_dtype="float32"))  # scores know no cache, nor its rounding
    params = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=0)
    output = llm.generate(PROMPTS[0], params)[0]
    scored = llm._scorer.score([(output.prompt_token_ids, output.token_ids)])[0]
    assert output.logprobs is not None
    assert scored.logprob == pytest.approx(sum(one.logprob for one in output.logprobs), rel=1e-5)
    assert scored.is_greedy


def test_score_encodes_across_the_border(llm: LLM) -> None:
    whole, spaced = llm.score([("the fox", " and the jay"), ("the fox ", "and the jay")])
    assert whole.logprob == pytest.approx(spaced.logprob)
    assert not math.isnan(llm.score([("", "the fox")])[0].logprob)
    with pytest.raises(InvalidRequest, match="continuation is empty"):
        llm.score([("the fox", "")])


def test_embed_is_the_mean_of_hidden_states(llm: LLM) -> None:
    ids = torch.tensor([llm.tokenizer.encode(PROMPTS[1])])
    with torch.inference_mode():
        hidden = llm.model(ids, torch.arange(ids.shape[1])[None], CausalAttention())
    vectors = llm.embed(PROMPTS)
    assert vectors.shape == (3, llm.config.n_embd)
    torch.testing.assert_close(vectors[1], hidden[0].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(llm.embed(PROMPTS[1])[0], vectors[1], rtol=1e-4, atol=1e-5)


def test_the_context_cuts_the_answer_and_refuses_a_prompt_that_fills_it(llm: LLM) -> None:
    context = llm.config.n_positions
    output = llm.generate([[5] * (context - 3)], SamplingParams(max_new_tokens=50, ignore_eos=True))[0]
    assert len(output.token_ids) == 3
    assert output.finish_reason == "length"
    with pytest.raises(ContextLengthExceeded, match=str(context)):
        llm.generate([[5] * context])


def test_wrong_calls_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="2 prompts and 1 sets of options"):
        llm.generate(PROMPTS[:2], [GREEDY])
    with pytest.raises(InvalidRequest, match=r"\[999\]"):
        llm.generate([[1, 999]])
    with pytest.raises(InvalidRequest, match="max_length"):
        llm.stream("the fox and the jay sang", SamplingParams(max_length=2))


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ModelNotFound, match="nobody/nothing"):
        LLM("nobody/nothing")


def test_a_tokenizer_of_another_model_is_refused(model_dir: Path, tiny_gptj: GPTJ) -> None:
    import dataclasses

    config = dataclasses.replace(tiny_gptj.config, vocab_size=100)
    small = build(config).requires_grad_(False)
    small.load_state_dict({name: torch.zeros_like(t) for name, t in small.state_dict().items()})
    save(small, config, model_dir)
    with pytest.raises(CheckpointError, match="belong to different models"):
        LLM(model_dir)


def test_load_opens_the_network_alone(model_dir: Path) -> None:
    model = bluejay.load(model_dir, dtype="bfloat16", trainable=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())


def test_a_token_across_the_border_is_scored(llm: LLM) -> None:
    whole = llm.tokenizer.encode("the fox and")
    context, continuation = "the fox a", "nd"
    kept = llm.tokenizer.encode(context)
    assert whole[: len(kept)] != kept  # " and" is one token
    found = llm._encode_pair(context, continuation)
    assert found[0] + found[1] == whole and found[0] and found[1]
    assert llm.score([(context, continuation)])[0].logprob < 0
    assert llm._encode_pair("t", "he") == ([llm.tokenizer.eos_token_id], llm.tokenizer.encode("the"))


def test_ids_may_be_any_whole_numbers_and_nothing_else(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    expected = llm.generate([ids], GREEDY)[0].token_ids
    for given in (np.array(ids), np.array([ids]), list(np.array(ids)), torch.tensor(ids)):
        assert llm.generate(given, GREEDY)[0].token_ids == expected  # type: ignore[arg-type]
    for wrong, named in (([1.5], "1.5 .float"), ([[1, "x"]], "'x' .str"), (7, "7 .int"), ([None], "None")):
        with pytest.raises(InvalidRequest, match=named):
            llm.generate(wrong)  # type: ignore[arg-type]


def test_a_checkpoint_without_weights_is_named(model_dir: Path) -> None:
    from safetensors.torch import save_file

    save_file({}, model_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match="hold 0 tensors"):
        LLM(model_dir)


def test_generate_each_keeps_the_order_and_passes_errors_on(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    lost = InvalidRequest("lost on the way")
    items = [("the fox", params), lost, ("the jay " * 99, params), *[(f"the owl {i}", params) for i in range(9)]]
    fetched = []

    def source() -> Iterator[object]:
        for item in items:
            fetched.append(item)
            yield item

    found = []
    for result in llm.generate_each(source(), ahead=3):
        assert len(fetched) <= len(found) + 3
        found.append(result)
    assert found[1] is lost
    assert isinstance(found[2], ContextLengthExceeded)
    for item, result in zip(items, found, strict=True):
        if isinstance(item, tuple) and not isinstance(result, ContextLengthExceeded):
            assert result.text == llm.generate(*item)[0].text
            assert result.prompt == item[0]


def test_who_leaves_generate_each_cancels_the_rest(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=50, ignore_eos=True)
    results = llm.generate_each((f"the fox {i}", params) for i in range(9))
    next(results)
    results.close()
    llm.engine.step()
    assert llm.engine.statistics().held_blocks == 0
