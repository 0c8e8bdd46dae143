"""The command ``query``: load a compacted cache once, answer questions from it. Knows no attention."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compactor import console
from compactor.cli.failures import memory_remedy
from compactor.cli.options import DECODE_DEFAULTS, Device, Dtype, Json, Offline, Quiet, Revision, Seed
from compactor.cli.units import show_seconds
from compactor.config import DecodeSettings, is_text
from compactor.errors import SettingsError

if TYPE_CHECKING:
    from compactor.decode import Answer

STDIN = "-"
LESS_MEMORY = "lower --max-new-tokens, ask a shorter question, or give --dtype bfloat16 or another --device"


def query_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The compacted cache that `compact` wrote.")],
    questions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTION",
            help="Questions, each answered on its own; none, or -, takes the lines of standard input.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", metavar="N", help="Length of an answer at most.")
    ] = DECODE_DEFAULTS.max_new_tokens,
    temperature: Annotated[
        float,
        typer.Option("-t", "--temperature", metavar="X", help="Sampling temperature; 0 takes the likeliest token."),
    ] = DECODE_DEFAULTS.temperature,
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="FRACTION", help="Sample from the likeliest tokens of this total probability."),
    ] = DECODE_DEFAULTS.top_p,
    seed: Seed = DECODE_DEFAULTS.seed,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="Where the model lies now; without it the name in the file. Another model is refused.",
        ),
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    usage: Annotated[
        bool,
        typer.Option("-u", "--usage", help="Tell tokens, seconds to the first token and tokens per second."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer questions about a document from its compacted cache.

    Answers go to standard output token by token; everything else goes to standard error.
    """
    settings = DecodeSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    from_stdin = not questions or questions == [STDIN]
    if not from_stdin and any(not question.strip() for question in questions or []):
        raise SettingsError("A question is empty; ask something.")
    if not all(map(is_text, questions or [])):
        raise SettingsError("A question is not UTF-8; convert it, or check the locale of the terminal.")

    from compactor.cache_file import read_metadata

    metadata, _ = read_metadata(file)

    from compactor import attach, decode  # only now torch, which takes seconds to import
    from compactor.model import load_model
    from compactor.prompt import build_prompt

    loaded = load_model(
        model or metadata.model.name,
        revision=revision or (None if model else metadata.model.revision),
        device=device,
        dtype=dtype,
        offline=offline,
        reporter=console.ConsoleReporter(quiet=quiet),
        expected=metadata.model,
    )
    prompt = build_prompt(loaded.tokenizer, system=metadata.system, thinking=metadata.thinking)
    cache = attach.load(file).attach(loaded.model, check=False)

    several = from_stdin or len(questions or []) > 1
    asked = 0
    for question in _stdin_questions() if from_stdin else questions or []:
        if several and not json:
            _separate(question, first=asked == 0)
        asked += 1
        on_text = None if json else _stream
        with memory_remedy(LESS_MEMORY):
            answer = decode.answer_question(loaded, cache, prompt, question, settings, on_text)
        if json:
            console.answer_json({"question": question, "answer": answer.text, "usage": _usage(answer)})
        else:
            console.answer("")
        if usage:
            console.note(_usage_line(answer))
    if not asked:
        raise SettingsError('There is no question; give one: query FILE.kv "What does it say?"')


def _stream(text: str) -> None:
    console.answer(text, end="")


def _separate(question: str, *, first: bool) -> None:
    if not first:
        console.answer("")
    console.note(f"> {question}")


def _stdin_questions() -> Iterator[str]:
    if sys.stdin.isatty():
        console.note("One question per line; end with Ctrl-D.")
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            question = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise SettingsError(f"Line {number} of standard input is not UTF-8; convert it.") from None
        if question:
            yield question


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": len(answer.token_ids),
        "seconds_to_first_token": answer.seconds_to_first_token,
        "tokens_per_second": answer.tokens_per_second,
    }


def _usage_line(answer: Answer) -> str:
    first = show_seconds(answer.seconds_to_first_token)
    return (
        f"usage: {answer.prompt_tokens:,} prompt tokens, {len(answer.token_ids):,} answer tokens, "
        f"first token after {first}, {answer.tokens_per_second:.1f} tokens/s"
    )
