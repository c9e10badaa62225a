"""`bluejay generate`: go on from prompts, streaming to the terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bluejay.errors import EngineError, InvalidRequest, RequestError

if TYPE_CHECKING:
    from bluejay.decoding.params import SamplingParams
    from bluejay.decoding.sampler import TokenLogprobs
    from bluejay.engine import LLM, RequestOutput

LENGTH, DRAWING, BEAMS, REPEATS, OUTPUT = "Length", "Drawing", "Beams", "Repetition and bans", "Input and output"

# What the command line does where neither the user nor the model's generation_config.json says otherwise. A person who
# types a prompt wants to read a text, not transformers' 20 likeliest tokens.
NEW_TOKENS = 128


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to go on from; - reads one from stdin.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Path or name; the default model if none.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help='A prompt from a file; of .jsonl one prompt a line: {"prompt": …, with options of its own}.',
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="With --file PROMPTS.jsonl: a JSON line for each of its lines; goes on where it was interrupted.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each prompt.", rich_help_panel=OUTPUT)
    ] = False,
    echo: Annotated[
        bool, typer.Option("--echo/--no-echo", help="Print the prompt before its text.", rich_help_panel=OUTPUT)
    ] = True,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the answer; 128 if neither you nor the model says.", rich_help_panel=LENGTH),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together.", rich_help_panel=LENGTH)
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Tokens before an end.", rich_help_panel=LENGTH)] = None,
    min_length: Annotated[
        int | None, typer.Option(help="The same, counting the prompt.", rich_help_panel=LENGTH)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.", rich_help_panel=LENGTH)
    ] = None,
    max_time: Annotated[float | None, typer.Option(help="Seconds.", rich_help_panel=LENGTH)] = None,
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos", help="Go on behind an end-of-text.", rich_help_panel=LENGTH)
    ] = None,
    eos_token_id: Annotated[
        list[int] | None, typer.Option(help="Token that ends the answer; may be repeated.", rich_help_panel=LENGTH)
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--greedy", help="Draw tokens, or take the likeliest.", rich_help_panel=DRAWING),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1 bolder, above 1 wilder.", rich_help_panel=DRAWING)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Among the k likeliest; 0: all.", rich_help_panel=DRAWING)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Among those of this joint probability.", rich_help_panel=DRAWING)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Of at least this share of the likeliest's.", rich_help_panel=DRAWING)
    ] = None,
    typical_p: Annotated[
        float | None, typer.Option(help="Among those of typical surprise.", rich_help_panel=DRAWING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same text.", rich_help_panel=DRAWING)] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option("--num-return-sequences", "-n", help="Answers.", rich_help_panel=DRAWING)
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="1: no beam search.", rich_help_panel=BEAMS)] = None,
    num_beam_groups: Annotated[int | None, typer.Option(help="Diverse beam search.", rich_help_panel=BEAMS)] = None,
    diversity_penalty: Annotated[float | None, typer.Option(help="Between groups.", rich_help_panel=BEAMS)] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Above 0 favours long answers.", rich_help_panel=BEAMS)
    ] = None,
    early_stopping: Annotated[str | None, typer.Option(help="true, false or never.", rich_help_panel=BEAMS)] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 avoids repeats.", rich_help_panel=REPEATS)
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Taken off a logit for each time that its token came.", rich_help_panel=REPEATS)
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Taken off once its token came at all.", rich_help_panel=REPEATS)
    ] = None,
    logit_bias: Annotated[
        str | None, typer.Option(help='Added to logits, as JSON: {"50256": -100}.', rich_help_panel=REPEATS)
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No n-gram of this size twice.", rich_help_panel=REPEATS)
    ] = None,
    encoder_no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No n-gram of the prompt.", rich_help_panel=REPEATS)
    ] = None,
    bad_words_ids: Annotated[
        str | None, typer.Option(help="Banned token sequences, as JSON: [[5], [6, 7]].", rich_help_panel=REPEATS)
    ] = None,
    remove_invalid_values: Annotated[
        bool | None, typer.Option("--remove-invalid-values", help="NaN counts as 0.", rich_help_panel=REPEATS)
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: of so many likeliest tokens.", rich_help_panel=OUTPUT)
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="The same for the prompt's tokens.", rich_help_panel=OUTPUT)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16, int8, int4.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0: all cores, one for a small model.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="Guess ahead, for speed alone: ngram, auto, or a smaller model's name.")
    ] = None,
) -> None:
    """Go on from one or several prompts.

    Options have the names and meanings of transformers' generate. What is not given comes from the model's
    generation_config.json; the default model draws at temperature 0.8. Text goes to stdout, all else to stderr.

    [bold]Examples[/bold]

        bluejay generate "Once upon a time"

        bluejay generate "The fox said" --greedy --max-new-tokens 40 --stop "."

        bluejay generate "The fox" "The jay" --num-beams 4 -n 2 --json

        echo "One day" | bluejay generate - --seed 1

        bluejay generate --file prompts.jsonl --model ./gpt-j-6b --output answers.jsonl
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if not echo and (as_json or output is not None):
        raise InvalidRequest("--no-echo is for text; --json and --output give the prompt a field of its own", "echo")
    rows = [] if output is not None else list(_rows(prompts or [], file))
    options = _parsed({name: given[name] for name in _option_names() if name in given})
    if not as_json and output is None:
        for where, asked in [("", options), *((row.where, row.options) for row in rows)]:
            if asked.get("logprobs") is not None or asked.get("prompt_logprobs") is not None:
                raise InvalidRequest(f"{where}logprobs are printed with --json only", param="logprobs")

    from bluejay.cli.loading import open_llm

    # Wrong options are said before a model is read, which may take minutes.
    for row in rows:
        check_options(row, options)
    if output is not None:
        from bluejay.cli.offline import answer_file

        if prompts or file is None:
            raise InvalidRequest(
                f"--output {output} needs --file with a .jsonl file of prompts, and no others", "output"
            )
        opening = {"model": model, "dtype": dtype, "device": device, "threads": threads, "draft": draft}
        answer_file(file, output, options, opening)
        return
    llm = open_llm(model, dtype=dtype, device=device, threads=threads, one_by_one=len(rows) == 1, draft=draft)
    defaults = generation_defaults(llm.path)
    params = [row.params(defaults, options) for row in rows]
    texts = [row.prompt for row in rows]
    started = time.perf_counter()
    streams = len(rows) == 1 and params[0].num_return_sequences == 1 and not as_json
    if streams:
        num_tokens, failed = _stream(llm, texts[0], params[0], echo)
    else:
        num_tokens, failed = _print_outputs(llm, texts, params, as_json=as_json, echo=echo)
    seconds = time.perf_counter() - started
    typer.secho(f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.0f} tokens/s", dim=True, err=True)
    if failed:
        raise EngineError(
            "no token could be chosen for " + ", ".join(failed) + ": the model's scores are no numbers, or every token "
            "is banned; try --dtype float32, --remove-invalid-values, or fewer bans"
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt, with options of its own where a .jsonl file gives some; `where` is its place, for messages."""

    prompt: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""

    def params(self, defaults: dict[str, Any], options: dict[str, Any]) -> SamplingParams:
        """Options of the row > of the command > of the model > of the command line itself."""
        from bluejay.decoding.params import SamplingParams

        own = {**options, **self.options}
        merged: dict[str, Any] = {}
        for level in (defaults, options, self.options):
            if level.get("max_length") is not None:
                merged.pop("max_new_tokens", None)  # which would count, though who says less said it
            merged |= level
        if merged.get("max_length") is None and merged.get("max_new_tokens") is None:
            merged["max_new_tokens"] = NEW_TOKENS
        if own.get("num_beams", 1) != 1 and "do_sample" not in own:
            merged["do_sample"] = False  # who asks for beams gets a beam search, also of a model that draws by default
        try:
            return SamplingParams.from_json(merged)
        except RequestError as error:
            raise type(error)(f"{self.where}{error}", error.param) from None


def check_options(row: Row, options: dict[str, Any]) -> None:
    """Refuse what is wrong with every model: whether to draw may be the model's recommendation."""
    try:
        row.params({"do_sample": True}, options)
    except RequestError:
        row.params({}, options)


def _option_names() -> list[str]:
    from bluejay.decoding.params import SamplingParams

    return [field.name for field in dataclasses.fields(SamplingParams)]


def _parsed(options: dict[str, Any]) -> dict[str, Any]:
    """Turn what the command line can only say as text into values."""
    if "early_stopping" in options:
        text = options["early_stopping"]
        options["early_stopping"] = {"true": True, "false": False}.get(text.lower(), text)
    for name in ("bad_words_ids", "logit_bias"):
        if name in options:
            try:
                options[name] = json.loads(options[name])
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"{name} is no JSON: {error}", param=name) from None
    return options


def _rows(prompts: Sequence[str], file: Path | None) -> Iterator[Row]:
    """The prompts of the command, of stdin and of the file; of stdin also where nothing else is given."""
    if not prompts and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidRequest('there is no prompt; try: bluejay generate "Once upon a time"', param="prompt")
        prompts = ["-"]
    if [*prompts, str(file)].count("-") > 1:
        raise InvalidRequest("- stands more than once, and stdin can be read only once; give it once", param="prompt")
    for prompt in prompts:
        yield Row(_stdin() if prompt == "-" else prompt)
    if file is not None:
        text = _stdin() if str(file) == "-" else _read(file)
        yield from _jsonl(text, file) if file.suffix == ".jsonl" else [Row(text.rstrip("\n"))]


def _stdin() -> str:
    if sys.stdin is None:
        raise InvalidRequest("stdin is closed; give a prompt, or let something write to stdin", param="prompt")
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin is not UTF-8 text: {error}", param="prompt") from None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark that is no text
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file}: not readable as text: {error}", param="file") from None


def _jsonl(text: str, file: Path) -> list[Row]:
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row, wrong = row_of(line, number, file)
            problems += wrong
            rows += [] if row is None else [row]
    if problems or not rows:
        raise InvalidRequest(f"{file}: " + ("; ".join(problems) or "holds no prompt"), param="file")
    return rows


def row_of(line: str, number: int, file: Path) -> tuple[Row | None, list[str]]:
    """A line of a .jsonl file, and what is wrong with it."""
    options = read_row(line)
    if options is None:
        return None, [f'line {number} is not a JSON object with a string "prompt"']
    prompt = options.pop("prompt")
    unknown = [repr(name[:100]) for name in sorted(options.keys() - set(_option_names()))]
    problems = [f"line {number}: unknown option {', '.join(unknown[:8])}"] if unknown else []
    return Row(prompt, options, f"{file}: line {number}: "), problems


def read_row(line: str) -> dict[str, Any] | None:
    """The prompt and the options of a line; None if it is not a JSON object with a string "prompt"."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the latter of what is nested too deeply
        return None
    return row if isinstance(row, dict) and isinstance(row.get("prompt"), str) else None


def generation_defaults(path: Path) -> dict[str, Any]:
    """Options that a model's generation_config.json recommends, of those that Bluejay has; none without the file.

    Raises: ConfigError for a file that cannot be read, or recommends a value that `SamplingParams` refuses.
    """
    from bluejay.decoding.params import SamplingParams
    from bluejay.errors import ConfigError

    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        known = {name: raw[name] for name in _option_names() if raw.get(name) is not None}
        SamplingParams.from_json(known)
    except (OSError, ValueError, AttributeError, TypeError, RequestError) as error:
        raise ConfigError(f"{file}: {error}; mend or remove the file") from None
    return known


def _stream(llm: LLM, prompt: str, params: SamplingParams, echo: bool) -> tuple[int, list[str]]:
    """Print one answer as it comes; returns the number of new tokens, and the prompt if no token could be chosen.

    Raises: EngineError if the engine failed.
    """
    events = llm.stream_events([prompt], params)
    num_tokens, reason, error = 0, None, None
    if echo:
        typer.secho(prompt, bold=True, nl=False)
    sys.stdout.flush()
    for event in events:
        num_tokens += len(event.token_ids)
        reason = event.finish_reason
        sys.stdout.write(event.text)
        sys.stdout.flush()
        error = event.error
    typer.echo()
    if error is not None:
        raise EngineError(error)
    return num_tokens, [_named(1, prompt)] if reason == "error" else []


def _print_outputs(
    llm: LLM, prompts: list[str], params: list[SamplingParams], *, as_json: bool, echo: bool
) -> tuple[int, list[str]]:
    """Run all prompts together and print them in order; returns the number of new tokens, and prompts that failed."""
    from rich.console import Console

    with Console(stderr=True).status(f"generating for {len(prompts)} prompts"):
        outputs = llm.generate(prompts, params)
    for output in outputs:
        if as_json:
            typer.echo(json.dumps(as_dict(llm, output), ensure_ascii=False))
            continue
        for number, sequence in enumerate(output.sequences, 1):
            if len(output.sequences) > 1:
                typer.secho(f"[{number}] ", dim=True, nl=False)
            if echo:
                typer.secho(output.prompt, bold=True, nl=False)
            typer.echo(sequence.text + "\n")
    num_tokens = sum(len(sequence.token_ids) for output in outputs for sequence in output.sequences)
    failed = [
        _named(number, output.prompt)
        for number, output in enumerate(outputs, 1)
        if any(sequence.finish_reason == "error" for sequence in output.sequences)
    ]
    return num_tokens, failed


def _named(number: int, prompt: str) -> str:
    return f"prompt {number} ({prompt if len(prompt) <= 40 else prompt[:39] + '…'!r})"


def as_dict(llm: LLM, output: RequestOutput) -> dict[str, Any]:
    """An output as --json and --output write it."""
    found: dict[str, Any] = {
        "model": llm.name,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "sequences": [
            {
                "text": sequence.text,
                "token_ids": sequence.token_ids,
                "finish_reason": sequence.finish_reason,
                **({} if sequence.beam_score is None else {"beam_score": sequence.beam_score}),
                **(
                    {} if sequence.logprobs is None else {"logprobs": [_logprob(llm, one) for one in sequence.logprobs]}
                ),
            }
            for sequence in output.sequences
        ],
    }
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = [None if one is None else _logprob(llm, one) for one in output.prompt_logprobs]
    return found


def _logprob(llm: LLM, one: TokenLogprobs) -> dict[str, Any]:
    def named(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token_id": token_id, "token": llm.tokenizer.decode([token_id]), "logprob": logprob}

    return {**named(one.token_id, one.logprob), "top": [named(*pair) for pair in one.top]}
