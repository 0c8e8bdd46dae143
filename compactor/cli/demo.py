"""The command ``demo``: compacts a document that ships with the package and compares answers. Knows no mathematics."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compactor import console
from compactor.cli.options import Device, Dtype, Json, Model, Offline, Seed
from compactor.cli.units import show_bytes, show_factor, show_seconds

if TYPE_CHECKING:
    from compactor.attach import CompactedCache
    from compactor.cache_file import FileSizes
    from compactor.evaluate.compare import Comparison
    from compactor.job import Job

DOCUMENT = "gpl-1.0.txt"  # GNU General Public License, version 1: "verbatim copies" of it are permitted to everyone
QUESTIONS = (
    "Who may copy and distribute verbatim copies of this license document?",
    'What does "Program" refer to?',
    "For how many years must the written offer of source code be valid?",
)
KEEP_RATIO = 0.2
SELF_STUDY_TOKENS = 384
ANSWER_TOKENS = 32


def demo_command(
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Keep the compacted cache here (replaced if it exists)."),
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compact a document that ships with compactor (the GNU GPL, version 1) and ask it three questions.

    Shows the file's size against the full cache, answers with the full and with the compacted cache side by side, and
    how far the compacted cache, a truncated document and random keys of the same bytes are from the full cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.kv" if output is None else output
        _demo(path, model, device, dtype, offline, seed, json)


def _demo(
    path: str | Path, model: str | None, device: str, dtype: str, offline: bool, seed: int, as_json: bool
) -> None:
    from compactor import attach, pipeline
    from compactor.config import CompactSettings, DecodeSettings
    from compactor.document import make_document
    from compactor.evaluate.compare import compare_answers
    from compactor.job import prepare
    from compactor.model import load_model
    from compactor.output import check_output
    from compactor.study import prefill_document

    check_output(path, force=True)
    reporter = console.ConsoleReporter()
    loaded = load_model(model, device=device, dtype=dtype, offline=offline, reporter=reporter)
    text = files("compactor").joinpath("data", DOCUMENT).read_text(encoding="utf-8")
    settings = CompactSettings(keep_ratio=KEEP_RATIO, self_study_tokens=SELF_STUDY_TOKENS, seed=seed, certify=False)
    job = prepare(make_document(DOCUMENT, text), loaded, settings, reporter)
    full = prefill_document(job)
    sizes = pipeline.compact_prefilled(job, full).save(path, force=True)
    cache = attach.load(path)
    comparisons = compare_answers(job, full, cache, QUESTIONS, DecodeSettings(max_new_tokens=ANSWER_TOKENS))
    if as_json:
        console.answer_json(_as_json(job, cache, sizes, comparisons))
    else:
        _show(job, cache, sizes, comparisons)


def _mean_kl(comparisons: list[Comparison]) -> dict[str, float]:
    names = comparisons[0].kl
    return {name: sum(one.kl[name] for one in comparisons) / len(comparisons) for name in names}


def _as_json(job: Job, cache: CompactedCache, sizes: FileSizes, comparisons: list[Comparison]) -> dict[str, object]:
    return {
        "document": job.document.name,
        "model": job.loaded.name,
        "file": sizes._asdict(),
        "report": cache.metadata.report,
        "seconds": job.seconds,
        "kl_per_token": _mean_kl(comparisons),
        "questions": [
            {
                "question": one.question,
                "full": one.full.text,
                "compacted": one.compacted.text,
                "kl_per_token": one.kl,
                "agreement": one.agreement,
            }
            for one in comparisons
        ],
    }


def _show(job: Job, cache: CompactedCache, sizes: FileSizes, comparisons: list[Comparison]) -> None:
    from rich.markup import escape
    from rich.table import Table

    report = cache.metadata.report
    screen = console.rich_console()
    screen.print(
        f"\n{job.document.name}: {len(job.document_ids):,} tokens compacted in "
        f"{show_seconds(sum(job.seconds.values()))} with {job.loaded.name}\n"
        f"full cache {show_bytes(report['full_bytes'])}, compacted {show_bytes(sizes.tensor_bytes)} "
        f"(and {show_bytes(sizes.header_bytes)} of header): "
        f"{show_factor(report['full_bytes'], sizes.tensor_bytes)}\n"
    )
    answers = Table(show_lines=True)
    for column in ("question", "answer from the full cache", "answer from the compacted cache"):
        answers.add_column(column, ratio=1)
    for one in comparisons:
        answers.add_row(escape(one.question), escape(one.full.text), escape(one.compacted.text))
    screen.print(answers)
    distances = Table(title="Distance to the full cache on its own answers, equal bytes", title_justify="left")
    distances.add_column("cache")
    distances.add_column("KL, nats per token", justify="right")
    distances.add_column("same token", justify="right")
    for name, kl in _mean_kl(comparisons).items():
        agreement = sum(one.agreement[name] for one in comparisons) / len(comparisons)
        distances.add_row(name, f"{kl:.3f}", f"{agreement:.0%}")
    screen.print(distances)
