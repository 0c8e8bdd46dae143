"""The command ``compactor eval``: methods, sizes, tasks and lengths on one model. Knows no step of the evaluation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from compactor import console
from compactor.cli.failures import failure_of
from compactor.cli.inspect import check_plot, printable
from compactor.cli.options import (
    COMPACT_DEFAULTS,
    Device,
    Dtype,
    Json,
    Model,
    Offline,
    Quiet,
    Revision,
    Seed,
    SelfStudyTokens,
    split_list,
)
from compactor.cli.units import show_bytes, show_seconds
from compactor.config import METHODS, QUERY_SOURCES, CompactSettings, DecodeSettings, check_used
from compactor.errors import BatchError, SettingsError
from compactor.evaluate.records import FULL, LONG_ANSWER, SHORT_ANSWER, Record, ResultsFile
from compactor.evaluate.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console

    from compactor.evaluate.results import Cell, Correlation, Mean
    from compactor.evaluate.runner import Evaluation, Plan, Source
    from compactor.model import LoadedModel

DEFAULT_TASKS = "needle,facts,questions"
DEFAULT_METHODS = "balanced,kvzip,truncation"
HIGHEST_SEED = 2**63 - 1

Number = TypeVar("Number", int, float)


def eval_command(
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="LIST", help=f"Built-in tasks, of {','.join(TASKS)}. [default: {DEFAULT_TASKS}]"
        ),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            help="Instead: JSON lines with context, question, answer and optionally choices.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", metavar="LIST", help=f"Methods, of {','.join(METHODS)}."),
    ] = DEFAULT_METHODS,
    keep_ratio: Annotated[
        str,
        typer.Option("-r", "--keep-ratio", metavar="LIST", help="Fractions of the document's keys that are kept."),
    ] = "0.2,0.1,0.05,0.02",
    length: Annotated[
        str, typer.Option("--length", metavar="LIST", help="Lengths of the built-in tasks' documents, in tokens.")
    ] = "2000",
    documents: Annotated[
        int,
        typer.Option(
            "--documents", metavar="N", help="Documents per built-in task and length, with seeds from --seed on."
        ),
    ] = 3,
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="FILE", help="The results, JSON lines; results that it has are kept."),
    ] = "results.jsonl",
    model: Model = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            help="Longest answer, in tokens, where a question names no limit of its own. "
            f"[default: {SHORT_ANSWER}; {LONG_ANSWER} where a sentence or a list is asked for]",
        ),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            "--queries",
            metavar="LIST",
            help=f"Reference queries that the methods may use, all of one pass. [default: {','.join(QUERY_SOURCES)}]",
        ),
    ] = None,
    self_study_tokens: SelfStudyTokens = None,
    seed: Seed = COMPACT_DEFAULTS.seed,
    peer: Annotated[
        str | None,
        typer.Option(
            "--peer", metavar="LIST", help="Presses of an installed kvpress, by class name; Outer(Inner) wraps one."
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="OUT.png", help="Draw quality against bytes and seconds; needs matplotlib."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            metavar="SECONDS",
            help="Begin nothing new after this time; the same command goes on from there.",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: print the table of the results that there are.")
    ] = False,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure methods and sizes on tasks: scores, distance to the full cache, bytes, seconds.

    Each document is prefilled once for all methods and sizes. Every result is one line of the results file as soon as
    it is there; results made with the same settings are not run again, so the same command goes on where it stopped.
    A result that fails is recorded with the reason and counted in its field of the table; the others go on, and the
    exit code is 9.
    """
    started = time.monotonic()
    if plot is not None:
        if os.path.abspath(plot) == os.path.abspath(output):
            raise SettingsError("--plot and --output name the same file; give two names.")
        check_plot(plot, output)
    if report:
        if not Path(output).is_file():
            raise SettingsError(f"{printable(output)} does not exist; name the results with -o FILE.")
        _show_results(ResultsFile(Path(output)), plot, json)
        return
    methods = methods_of(method)
    ratios = tuple(dict.fromkeys(numbers_of("--keep-ratio", keep_ratio, float)))
    peers = split_list(peer)
    lengths = tuple(dict.fromkeys(numbers_of("--length", length, int)))
    if questions is not None and task is not None:
        raise SettingsError("Give --task or --questions, not both.")
    if documents < 1 or min(lengths) < 1:
        raise SettingsError("--documents and --length are at least 1.")
    if seed + documents - 1 > HIGHEST_SEED:
        raise SettingsError(f"--seed is {seed}; with --documents {documents} the last seed is too large.")
    tasks = tasks_of(task or DEFAULT_TASKS)
    for ratio in ratios:
        CompactSettings(keep_ratio=ratio)  # raises SettingsError
    settings = CompactSettings(
        keep_ratio=min(ratios),
        queries=split_list(queries) or QUERY_SOURCES,  # the union: one study serves all methods
        self_study_tokens=self_study_tokens,
        seed=seed,
        certify=False,
    )
    check_used(methods, split_list(queries), ["self_study_tokens"] if self_study_tokens is not None else [])
    if max_new_tokens is not None:
        DecodeSettings(max_new_tokens=max_new_tokens)  # raises SettingsError
    if time_limit is not None and not time_limit > 0:
        raise SettingsError(f"--time-limit is {time_limit:g}; give a positive number of seconds.")
    given = None if questions is None else _read_questions(questions)

    from compactor.output import check_output

    check_output(output, force=True)
    results = ResultsFile(Path(output))

    from compactor.evaluate.peer import find_press  # only now torch, which takes seconds to import
    from compactor.evaluate.runner import Evaluation, Plan
    from compactor.model import load_model

    for name in peers:
        for press in name.replace(")", "").split("("):
            find_press(press)
    reporter = console.ConsoleReporter(quiet=quiet)
    loaded = load_model(model, revision=revision, device=device, dtype=dtype, offline=offline, reporter=reporter)
    sources = given or task_sources(loaded, tasks, lengths, range(seed, seed + documents))
    plan = Plan(methods, ratios, settings, max_new_tokens, peers)
    evaluation = Evaluation(loaded, plan, results, reporter, lambda failure: failure_of(failure).sentence)
    out_of_time = partial(_is_after, None if time_limit is None else started + time_limit)
    _run(evaluation, plan, sources, out_of_time, quiet=quiet)
    _show_results(results, plot, json)
    if evaluation.num_failed:
        raise BatchError(
            f"{evaluation.num_failed:,} of {len(sources) * len(plan.combinations):,} results failed; {output} says "
            "why. Mend that and give the same command again: it leaves out what is done."
        )


# --------------------------------------------------------------------------------------------------- arguments


def methods_of(text: str) -> tuple[str, ...]:
    """Return the methods of a list, each once. Raises SettingsError for one that does not exist, or for none."""
    names = tuple(dict.fromkeys(split_list(text)))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        what = f"does not know {', '.join(map(repr, unknown))}" if unknown else "is empty"
        raise SettingsError(f"--method {what}; choose from {', '.join(METHODS)}.")
    return names


def tasks_of(text: str) -> tuple[str, ...]:
    """Return the built-in tasks of a list, each once. Raises SettingsError for one that does not exist, or for none."""
    names = tuple(dict.fromkeys(split_list(text)))
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        what = f"does not know {', '.join(map(repr, unknown))}" if unknown else "is empty"
        raise SettingsError(f"--task {what}; choose from {', '.join(TASKS)}.")
    return names


def numbers_of(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Return the numbers of a comma-separated option. Raises SettingsError for what is none, or for no number."""
    try:
        numbers = [kind(part) for part in split_list(text)]
    except ValueError:
        numbers = []
    if not numbers:
        raise SettingsError(f"{option} is {text!r}; give numbers with commas between them.")
    return numbers


def task_sources(
    loaded: LoadedModel, tasks: Sequence[str], lengths: Sequence[int], seeds: Sequence[int]
) -> list[Source]:
    """Return the documents of the built-in tasks, to be made when their turn comes.

    Every task and length has its first document before any has its second: a run that is cut off has seen all.
    """
    from compactor.evaluate.runner import Source
    from compactor.evaluate.tasks import make_document
    from compactor.prompt import encode_plain

    def count_tokens(text: str) -> int:
        return len(encode_plain(loaded.tokenizer, text))

    return [
        Source(task, f"{task}-{length}-{seed}", seed, length, partial(make_document, task, length, seed, count_tokens))
        for seed in seeds
        for length in lengths
        for task in tasks
    ]


def _read_questions(path: str) -> list[Source]:
    from compactor.evaluate.question_files import read_question_file

    documents = read_question_file(path)

    from compactor.evaluate.runner import Source  # only now torch

    return [
        Source(document.task, document.name, document.seed, None, partial(lambda found: found, document))
        for document in documents
    ]


# --------------------------------------------------------------------------------------------------- run


def _is_after(limit: float | None) -> bool:
    return limit is not None and time.monotonic() > limit


def _run(
    evaluation: Evaluation,
    plan: Plan,
    sources: Sequence[Source],
    out_of_time: Callable[[], bool],
    *,
    quiet: bool,
) -> None:
    total = len(sources) * len(plan.combinations)
    told: Record | None = None
    try:
        for record in evaluation.run(sources, out_of_time):
            same = told is not None and record.status == "failed" and _reason(told) == _reason(record)
            told = record
            if not same and (not quiet or record.status == "failed"):
                count = evaluation.num_present + evaluation.num_done + evaluation.num_failed
                console.note(f"[{count:,}/{total:,}] {show_record(record)}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_standing(evaluation, total)}") from None
    if evaluation.was_stopped and not quiet:
        console.note(f"note: the time limit is reached; {_standing(evaluation, total)}")


def _reason(record: Record) -> tuple[str, str | None]:
    """Return what a failure is told by; a document that fails as a whole has one for all methods and sizes."""
    return record.document, record.message


def _standing(evaluation: Evaluation, total: int) -> str:
    there = evaluation.num_present + evaluation.num_done
    return f"{there:,} of {total:,} results are in {evaluation.results.path}, and the same command goes on from there"


def show_record(record: Record) -> str:
    """Return a result in one line."""
    size = "" if record.keep_ratio is None else f" {record.keep_ratio:g}"
    what = f"{printable(record.document)} {record.method}{size}"
    if record.status == "failed":
        return f"{what}: failed: {record.message}"
    score = f"score {sum(record.scores) / max(1, len(record.scores)):.2f}"
    if record.keep_ratio is None:
        elapsed = show_seconds(record.prefill_seconds or 0)
        return f"{what}: {score}, {show_bytes(record.full_bytes or 0)}, prefill {elapsed}"
    known = [value for value in record.kl if value is not None]
    kl = f"KL {sum(known) / len(known):.3g}" if known and len(known) == len(record.kl) else "KL not finite"
    size_bytes = record.tensor_bytes if record.file_bytes is None else record.file_bytes
    return f"{what}: {score}, {kl}, {show_bytes(size_bytes or 0)}, {show_seconds(record.seconds or 0)}"


# --------------------------------------------------------------------------------------------------- results


def _show_results(results: ResultsFile, plot: str | None, as_json: bool) -> None:
    from compactor.evaluate.results import correlations, failures, num_settings, table

    cells, ranks = table(results.records), correlations(results.records)
    failed = failures(results.records)
    if as_json:
        console.answer_json(
            {
                "output": str(results.path),
                "settings": num_settings(results.records),
                "results": [asdict(cell) for cell in cells],
                "predicted_damage": [asdict(rank) for rank in ranks],
                "failed": [{**record.key._asdict(), "message": record.message} for record in failed],
            }
        )
    else:
        show_tables(console.rich_console(), cells, ranks)
        if num_settings([record for record in results.records if record.status == "done"]) > 1:
            console.note(f"note: {results.path} holds results of different settings; a table mixes them.")
        if failed:
            console.note(f"note: {len(failed):,} results of {results.path} failed and take no part; it says why.")
    if plot is not None:
        from compactor.evaluate.plots import draw

        draw(plot, cells)
        console.note(f"wrote {printable(plot)}")


def show_tables(screen: Console, cells: Sequence[Cell], ranks: Sequence[Correlation]) -> None:
    """Print a table per model, task and length, and one of the predictions: a row per method, a column per size."""
    from rich.markup import escape

    if not cells:
        screen.print("There are no results.")
        return
    screen.print(
        "Per field: score with its 95% interval; KL to the full cache on its own answers, nats per token; answer "
        "tokens with the same most likely token, answers equal to the full cache's; bytes of the file, seconds of "
        "compaction after the prefill + of what several methods or sizes share; seconds to the first token, tokens/s."
    )
    for model, task, length in dict.fromkeys((cell.model, cell.task, cell.length) for cell in cells):
        own = [cell for cell in cells if (cell.model, cell.task, cell.length) == (model, task, length)]
        title = f"{model}, {task}" + ("" if length is None else f", {length:,} tokens")
        screen.print()
        screen.print(escape(printable(title)), style="bold")
        for cell in own:
            if cell.method == FULL:
                screen.print(escape(show_full(cell)))
        rows = {(cell.method, cell.keep_ratio): show_cell(cell) for cell in own if cell.method != FULL}
        if rows:
            screen.print(_grid(rows))
    if ranks:
        screen.print("\nSpearman's rank correlation of predicted damage and measured KL, over all documents")
        screen.print(_grid({(r.method, r.keep_ratio): f"{_real(r.spearman)} ({r.documents})" for r in ranks}))


def _grid(fields: dict[tuple[str, float | None], str]) -> Any:
    """Return a rich table with a row per method and a column per size."""
    from rich.markup import escape
    from rich.table import Table

    ratios = sorted({ratio for _, ratio in fields if ratio is not None}, reverse=True)
    grid = Table(show_lines=True)
    grid.add_column("method")
    for ratio in ratios:
        grid.add_column(f"keep {ratio:g}")
    for method in dict.fromkeys(method for method, _ in fields):
        grid.add_row(escape(method), *(escape(fields.get((method, ratio), "")) for ratio in ratios))
    return grid


def show_full(cell: Cell) -> str:
    """Return what the full cache does, in one line."""
    if not cell.documents:
        return f"full cache: {_failed(cell)}"
    return (
        f"full cache: score {_interval(cell.score)}, {show_bytes(cell.tensor_bytes or 0)}, prefill "
        f"{show_seconds(cell.prefill_seconds or 0)}, {_speed(cell)}; {cell.documents:,} documents, "
        f"{cell.questions:,} questions" + (f", {_failed(cell)}" if cell.failed else "")
    )


def show_cell(cell: Cell) -> str:
    """Return a field of the table: five short lines, one more with a rank correlation, and one with failures."""
    if not cell.documents:
        return _failed(cell)
    shared = f" + {show_seconds(cell.shared_seconds)}" if cell.shared_seconds else ""
    lines = [
        _interval(cell.score),
        f"KL {_interval(cell.kl, '.3g')}",
        f"{_percent(cell.agreement)} tokens, {_percent(cell.same)} answers",
        f"{show_bytes(cell.bytes or 0)}, {show_seconds(cell.seconds or 0)}{shared}",
        _speed(cell),
    ]
    if cell.damage_correlation is not None:
        lines.append(f"damage rank {cell.damage_correlation:.2f}")
    if cell.failed:
        lines.append(_failed(cell))
    return "\n".join(lines)


def _failed(cell: Cell) -> str:
    return f"{cell.failed:,} {'document' if cell.failed == 1 else 'documents'} failed"


def _interval(value: Mean | None, digits: str = ".2f") -> str:
    if value is None:
        return "not finite"
    return f"{value.mean:{digits}} [{value.low:{digits}}, {value.high:{digits}}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _real(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _speed(cell: Cell) -> str:
    rate = "-" if cell.tokens_per_second is None else f"{cell.tokens_per_second:.0f}"
    return f"{show_seconds(cell.first_token_seconds or 0)} first, {rate} tokens/s"
