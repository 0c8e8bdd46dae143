"""The command ``batch-compact``: a folder of documents in, a folder of caches out. Knows no step between."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compactor import console
from compactor.cli.failures import DEBUG_VARIABLE, failure_of
from compactor.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Offline,
    Quiet,
    Revision,
    Workspace,
    with_settings,
    workspace_bytes,
)
from compactor.cli.units import show_bytes, show_seconds
from compactor.config import CompactSettings
from compactor.errors import BatchError

if TYPE_CHECKING:
    from compactor.batch.manifest import Manifest, Record
    from compactor.batch.runner import Batch, Job, Plan
    from compactor.model import LoadedModel

ENDINGS = {"done": "done", "skipped": "unchanged", "failed": "failed"}
ACTIONS = {"compact": "to compact", "skip": "unchanged", "fail": "would fail"}


@with_settings
def batch_command(
    *,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder with the documents.")],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="The folder for the caches: DIR/a/b.txt becomes OUT/a/b.txt.kv.",
        ),
    ],
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--pattern",
            metavar="GLOB",
            help="Only files whose name, or path below DIR, matches; may be given several times. "
            "Without it every text, .pdf, .docx and .html file.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "-x",
            "--exclude",
            metavar="GLOB",
            help="Leave out matching files and folders; several are allowed.",
        ),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive/--no-recursive", help="Go into subfolders.")] = True,
    model: Model = None,
    settings: CompactSettings,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    workspace: Workspace = None,
    force: Annotated[
        bool,
        typer.Option("-f", "--force", help="Compact unchanged documents again; replace any existing file."),
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be done with each document; write nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compact every document of a folder; go on where the last run stopped.

    A document that fails does not stop the others. OUT/manifest.jsonl gets one line of JSON per document and
    run; documents whose bytes, settings and model are those of the last run are left as they are. Hidden
    files, binary files, linked folders and OUT itself are passed over. In a GLOB, * crosses folders.
    """
    from compactor.batch.manifest import MANIFEST_NAME, Manifest
    from compactor.batch.runner import find_jobs, open_manifest
    from compactor.budget_profile import load_profile
    from compactor.workspace import bounded

    most = workspace_bytes(workspace)
    if settings.budget is not None:
        load_profile(settings.budget)
    out = Path(output)
    batch = find_jobs(Path(folder), out, patterns=pattern or (), exclude=exclude or (), recursive=recursive)
    manifest = Manifest(out / MANIFEST_NAME) if dry_run else open_manifest(out)

    from compactor.model import load_model  # only now torch, which takes seconds to import

    reporter = console.ConsoleReporter(quiet=quiet)
    loaded = load_model(model, revision=revision, device=device, dtype=dtype, offline=offline, reporter=reporter)
    if dry_run:
        _plan(batch, manifest, loaded, settings, force=force, json=json)
        return
    with bounded(most):
        _run(batch, manifest, loaded, settings, reporter, force=force, fail_fast=fail_fast, json=json)


def _run(
    batch: Batch,
    manifest: Manifest,
    loaded: LoadedModel,
    settings: CompactSettings,
    reporter: console.ConsoleReporter,
    *,
    force: bool,
    fail_fast: bool,
    json: bool,
) -> None:
    from compactor import pipeline
    from compactor.batch.runner import run_batch

    records: list[Record] = []
    num_jobs = len(batch.jobs)

    def announce(index: int, job: Job) -> None:
        if not reporter.quiet:
            console.note(f"[{index + 1}/{num_jobs}] {printable(job.name)}")

    try:
        for record in run_batch(
            batch,
            manifest,
            lambda document: pipeline.compact(document, loaded, settings, reporter),
            settings_sha256=outcome_digest(loaded, settings),
            force=force,
            describe=_describe,
            announce=announce,
        ):
            records.append(record)
            if not reporter.quiet or record.status == "failed":
                console.note(f"[{len(records)}/{num_jobs}] {ending(record)}")
            if fail_fast and record.status == "failed":
                break
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted after {len(records)} of {num_jobs} documents; the same command goes on from there"
        ) from None
    if json:
        console.answer(_json(batch, records))
    else:
        console.answer(show_records(records, batch.output_root))
    raise_if_failed(records, num_jobs, manifest.path)


def _plan(
    batch: Batch,
    manifest: Manifest,
    loaded: LoadedModel,
    settings: CompactSettings,
    *,
    force: bool,
    json: bool,
) -> None:
    from compactor.batch.runner import plan_batch
    from compactor.job import prepare

    plans = list(
        plan_batch(
            batch,
            manifest,
            lambda document: len(prepare(document, loaded, settings).document_ids),
            settings_sha256=outcome_digest(loaded, settings),
            force=force,
            describe=_describe,
        )
    )
    if json:
        console.answer(_json(batch, plans))
    else:
        console.answer(show_plans(plans))


def outcome_digest(loaded: LoadedModel, settings: CompactSettings) -> str:
    """Return the SHA-256 of all that decides an output besides its document: settings, model, file format."""
    from compactor.batch.runner import hash_file, settings_digest
    from compactor.cache_file import FORMAT_VERSION

    identity = asdict(loaded.identity())
    for where_it_lies in ("name", "revision"):
        del identity[where_it_lies]
    profile = None if settings.budget is None else hash_file(Path(settings.budget))
    return settings_digest(
        settings.to_json(), model=identity, dtype=str(loaded.dtype), format_version=FORMAT_VERSION, profile=profile
    )


def ending(record: Record) -> str:
    """Return how a document ended, in one line."""
    name = printable(record.input)
    if record.status == "failed":
        return f"{name}: failed: {printable(record.message or '')}"
    if record.status == "skipped":
        return f"{name}: unchanged"
    return f"{name}: done, {show_bytes(record.bytes or 0)}, {show_seconds(record.elapsed_s)}"


def show_records(records: Sequence[Record], output_root: Path) -> str:
    """Return the table of a run: a line a document, one more for the sentence of a failure, and the sums."""
    rows = [("document", "result", "tokens", "kept", "size", "time")]
    for record in records:
        kept = record.kept_keys / record.document_keys if record.kept_keys and record.document_keys else None
        rows.append(
            (
                printable(record.input),
                ENDINGS[record.status],
                "" if record.document_tokens is None else f"{record.document_tokens:,}",
                "" if kept is None else f"{kept:.1%}",
                "" if record.bytes is None else show_bytes(record.bytes),
                "" if record.status == "skipped" else show_seconds(record.elapsed_s),
            )
        )
    notes = [None, *(record.message for record in records)]
    counts = _counts([ENDINGS[record.status] for record in records], ENDINGS.values())
    size = show_bytes(sum(record.bytes or 0 for record in records))
    elapsed = show_seconds(sum(record.elapsed_s for record in records))
    return f"{_table(rows, notes)}\n{counts}; {size} in {output_root}, {elapsed}"


def show_plans(plans: Sequence[Plan]) -> str:
    """Return the table of a dry run."""
    rows = [("document", "plan", "tokens")]
    rows += [
        (
            plan.input,
            ACTIONS[plan.action],
            "" if plan.document_tokens is None else f"{plan.document_tokens:,}",
        )
        for plan in plans
    ]
    notes = [None, *(plan.message for plan in plans)]
    return f"{_table(rows, notes)}\n{_counts([ACTIONS[plan.action] for plan in plans], ACTIONS.values())}"


def _table(rows: Sequence[tuple[str, ...]], notes: Sequence[str | None]) -> str:
    """Return the rows, two columns to the left and the others to the right; a note has a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, note in zip(rows, notes, strict=True):
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if note:
            lines.append(f"    {printable(note)}")
    return "\n".join(lines)


def _counts(found: Sequence[str], order: Iterable[str]) -> str:
    return ", ".join(f"{found.count(what):,} {what}" for what in order if what in found)


def raise_if_failed(records: Sequence[Record], num_jobs: int, manifest: Path) -> None:
    """Raise BatchError with the count when a document failed."""
    num_failed = sum(record.status == "failed" for record in records)
    if not num_failed:
        return
    left = num_jobs - len(records)
    untried = f" and {left:,} were not tried" if left else ""
    raise BatchError(
        f"{num_failed:,} of {num_jobs:,} documents failed{untried}; {manifest} says why. "
        "Mend them and give the same command again: it leaves out what is done."
    )


def _describe(failure: Exception) -> str:
    if os.environ.get(DEBUG_VARIABLE):
        console.note("".join(traceback.format_exception(failure)).rstrip())
    return failure_of(failure).sentence


def _json(batch: Batch, documents: Sequence[Record | Plan]) -> str:
    """Return the result for programs, in ASCII: a file name that is no text stays what it is."""
    import json

    return json.dumps({"output": str(batch.output_root), "documents": [asdict(item) for item in documents]})


def printable(text: str) -> str:
    """Replace what a terminal must not get from a file name: control characters, bytes that are no text."""
    return "".join(char if char.isprintable() else "?" for char in text)
