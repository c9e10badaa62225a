"""`bluejay generate --file PROMPTS.jsonl --output OUT.jsonl`: one line out for each line in, in their order."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from bluejay.cli.generate import Row, as_dict, check_options, generation_defaults, read_row, row_of
from bluejay.errors import BluejayError, InvalidRequest, RequestError

if TYPE_CHECKING:
    from bluejay.decoding.params import SamplingParams
    from bluejay.engine import LLM, RequestOutput

Line = tuple[str, "SamplingParams"]
Parse = Callable[[str, int], Line]


def answer_file(file: Path, output: Path, options: dict[str, Any], opening: dict[str, Any]) -> None:
    """Answer a file of prompts, with a bar on stderr.

    Args:
        options: of all lines that do not say otherwise.
        opening: what `open_llm` is told.
    Raises: InvalidRequest if a file is not what it should be; what is wrong with a line is written in its place.
    """
    if file.suffix != ".jsonl" or not file.is_file():
        raise InvalidRequest(f"--file {file} is no .jsonl file of prompts, which --output needs", "file")
    if output.resolve() == file.resolve():
        raise InvalidRequest(f"--output {output} is the file of the prompts itself; give another", "output")
    check_options(Row(""), options)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bluejay.cli.loading import open_llm

    try:
        done, total = num_done(output, file), count_lines(file)
        with output.open("a", encoding="utf-8"):
            pass  # what cannot be written is said before a model is read, which may take minutes
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} or {output}: not readable: {error}", "file") from None
    if done:
        typer.secho(f"{output} has {done} of {total} lines; going on behind them", dim=True, err=True)
    if done >= total:
        return
    llm = open_llm(**opening)
    typer.secho(f"keys and values: room for {llm.engine.num_cache_tokens:,} tokens", dim=True, err=True)
    defaults = generation_defaults(llm.path)
    num_tokens, num_failed, started = 0, 0, time.perf_counter()

    def parse(line: str, number: int) -> Line:
        row, problems = row_of(line, number, file)
        if row is None or problems:
            raise InvalidRequest("; ".join(problems))
        return row.prompt, row.params(defaults, options)

    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=total, completed=done, rate="")

        def on_line(new_tokens: int, failed: bool) -> None:
            nonlocal num_tokens, num_failed
            num_tokens, num_failed = num_tokens + new_tokens, num_failed + failed
            rate = f"{num_tokens / (time.perf_counter() - started):.0f} tokens/s"
            progress.update(task, advance=1, rate=rate)

        _run(llm, file, output, parse, lambda found: as_dict(llm, found), skip=done, on_line=on_line)
    seconds = time.perf_counter() - started
    typer.secho(
        f"{total - done} lines, {num_failed} of them errors; {num_tokens} tokens in {seconds:.2f} s, "
        f"{num_tokens / seconds:.0f} tokens/s",
        dim=True,
        err=True,
    )


def num_done(output: Path, source: Path) -> int:
    """How many lines of an output of before are complete; what an interruption left of the last one is cut off.

    Raises: InvalidRequest if the file is no output of this source.
    """
    if not output.exists():
        return 0
    count, size = 0, 0
    with output.open("rb") as done, _open(source) as asked:
        lines = _numbered(asked)
        for line in done:
            if not line.endswith(b"\n"):
                break
            count, size = count + 1, size + len(line)
            _check_belongs(line, *next(lines, (0, "")), output, source, count)
    if size < output.stat().st_size:
        with output.open("r+b") as file:
            file.truncate(size)
    return count


def _check_belongs(line: bytes, asked_number: int, asked: str, output: Path, source: Path, number: int) -> None:
    """Check that a line of the output answers the line of the source that stands in its place."""
    try:
        answered = json.loads(line)
        named = {name: answered[name] for name in _NAMES if name in answered}
        # Error lines of earlier versions say nothing but their number.
        fits = answered["line"] == asked_number and (named == _named(asked) or (not named and "error" in answered))
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise InvalidRequest(
            f"{output}: line {number} does not answer {source}; remove the file, or give another --output", "output"
        )


_NAMES = ("prompt", "line_sha256")


def _named(asked: str) -> dict[str, str]:
    """What tells a line of the source from others: its prompt; where it has none, the hash of its text."""
    row = read_row(asked)
    return {"line_sha256": sha256(asked.strip().encode()).hexdigest()} if row is None else {"prompt": row["prompt"]}


def count_lines(source: Path) -> int:
    """Lines that hold something."""
    with _open(source) as lines:
        return sum(1 for _ in _numbered(lines))


def _open(source: Path) -> TextIO:
    return source.open(encoding="utf-8-sig")  # some editors begin a file with a mark that is no text


def _numbered(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers in the file."""
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _run(
    llm: LLM,
    source: Path,
    output: Path,
    parse: Parse,
    to_dict: Callable[[RequestOutput], dict[str, Any]],
    *,
    skip: int,
    on_line: Callable[[int, bool], None],
) -> None:
    """Answer the lines of a file, but for the first `skip` of them; each is written as soon as its turn comes.

    Args:
        parse: a line and its number -> prompt and options; what it raises becomes an error line.
        to_dict: what is written of an output.
        on_line: called with the new tokens of each line, and whether it failed.
    """
    on_their_way: deque[tuple[int, str]] = deque()  # number and text of lines
    # Half a character in a prompt is written as JSON escapes it: \ud800.
    with _open(source) as lines, output.open("a", encoding="utf-8", errors="backslashreplace") as out:

        def prompts() -> Iterator[Line | BluejayError]:
            for number, line in islice(_numbered(lines), skip, None):
                on_their_way.append((number, line))
                try:
                    yield parse(line, number)
                except BluejayError as error:
                    yield error

        for result in llm.generate_each(prompts()):
            number, line = on_their_way.popleft()
            written, num_tokens = _written(result, to_dict)
            if failed := "error" in written:
                written = {**_named(line), **written}
            out.write(json.dumps({"line": number, **written}, ensure_ascii=False) + "\n")
            out.flush()
            on_line(num_tokens, failed)


def _written(
    result: RequestOutput | BluejayError, to_dict: Callable[[RequestOutput], dict[str, Any]]
) -> tuple[dict[str, Any], int]:
    """What a line out holds besides its number, and the number of new tokens."""
    if isinstance(result, BluejayError):
        error = {"type": type(result).__name__, "message": str(result)}
        return {"error": error | ({"param": result.param} if isinstance(result, RequestError) else {})}, 0
    if any(sequence.finish_reason == "error" for sequence in result.sequences):
        from bluejay.engine.request import NO_TOKEN

        return {"error": {"type": "EngineError", "message": NO_TOKEN}}, 0
    return to_dict(result), sum(len(sequence.token_ids) for sequence in result.sequences)
