"""The command ``compact``: one document in, one compacted cache out. Knows no step of the computation."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compactor import console
from compactor.cli.inspect import show_fidelity
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
from compactor.cli.units import show_bytes, show_factor, show_fields, show_number, show_seconds
from compactor.config import CompactSettings
from compactor.errors import SettingsError

if TYPE_CHECKING:
    from compactor.attach import CompactedCache
    from compactor.cache_file import FileSizes

STDIN = "-"
SUFFIX = ".kv"
CURVES_SUFFIX = ".curves"  # as in curves.py, which needs torch


@with_settings
def compact_command(
    *,
    document: Annotated[
        str,
        typer.Argument(metavar="DOC", help="Text, Markdown, source code, .pdf, .docx or .html; - is standard input."),
    ],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="The file to write; without it DOC's name with .kv, here."),
    ] = None,
    model: Model = None,
    settings: CompactSettings,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offline: Offline = False,
    workspace: Workspace = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing file.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the time and memory that it would take; write nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a document into a compacted KV cache, from which `query` answers questions.

    Give at most one of --keep-ratio, --target-tokens, --max-bytes and --max-error.
    """
    path, most = None, workspace_bytes(workspace)
    if not dry_run:  # as it was given: Path would drop the slash that tells a folder
        path = default_output(document) if output is None else output
    reporter = console.ConsoleReporter(quiet=quiet)
    try:
        from compactor.budget_profile import load_profile
        from compactor.document import read_document
        from compactor.output import check_output
        from compactor.workspace import bounded

        if path is not None:
            check_output(path, force)
            if settings.keep_curves:
                check_output(f"{path}{CURVES_SUFFIX}", force)
        if settings.budget is not None:
            load_profile(settings.budget)
        text = read_document(document)

        from compactor import pipeline  # only now torch, which takes seconds to import
        from compactor.estimate import estimate
        from compactor.model import load_model

        loaded = load_model(model, revision=revision, device=device, dtype=dtype, offline=offline, reporter=reporter)
        with bounded(most):
            if path is None:
                expected = asdict(estimate(text, loaded, settings))
                console.answer_json(expected) if json else console.answer(show_estimate(expected))
                return
            cache = pipeline.compact(text, loaded, settings, reporter)
        sizes = cache.save(path, force=force)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or "interrupted; nothing was written") from None
    if json:
        console.answer_json(summary(path, cache, sizes))
    else:
        console.answer(show_summary(path, cache, sizes))


def default_output(document: str) -> Path:
    """Return the document's name with the suffix .kv, here. Raises SettingsError for standard input."""
    if document == STDIN:
        raise SettingsError("A document from standard input has no name; give the output with -o FILE.kv.")
    name = Path(document).name
    if not name or name == "..":
        raise SettingsError(f"{document} is no file name; give the output with -o FILE.kv.")
    return Path(name).with_suffix(SUFFIX)


def summary(path: str | Path, cache: CompactedCache, sizes: FileSizes) -> dict[str, Any]:
    """Return what was made, as plain JSON values."""
    metadata = cache.metadata
    return {
        "output": str(path),
        "document": metadata.document_name,
        "document_tokens": metadata.document_tokens,
        "prefix_tokens": metadata.prefix_length,
        "model": metadata.model.name,
        "dtype": metadata.dtype,
        "file": sizes._asdict(),
        "settings": metadata.settings,
        "report": metadata.report,
    }


def show_summary(path: str | Path, cache: CompactedCache, sizes: FileSizes) -> str:
    """Return what was made, for people: tokens, kept keys, bytes, seconds per phase, fidelity, reconstruction error."""
    metadata = cache.metadata
    report = dict(metadata.report)
    seconds: dict[str, float] = report.pop("seconds", {})
    kept, total = report.pop("kept_keys", None), report.pop("document_keys", None)
    full_bytes, tensor_bytes = report.pop("full_bytes", None), report.pop("tensor_bytes", cache.nbytes)
    fidelity = show_fidelity(report.pop("fidelity", {}))
    report.pop("kept_ratio", None)
    fields: dict[str, object] = {
        "document": f"{metadata.document_name}, {metadata.document_tokens:,} tokens, "
        f"after {metadata.prefix_length} of the chat template",
        "model": f"{metadata.model.name}, {metadata.dtype}",
    }
    if kept is not None and total:
        fields["kept"] = f"{kept:,} of {total:,} document keys ({kept / total:.1%})"
    if full_bytes:
        fields["size"] = (
            f"{show_bytes(full_bytes)} -> {show_bytes(tensor_bytes)}, "
            f"{show_factor(full_bytes, tensor_bytes)}, header {show_bytes(sizes.header_bytes)}"
        )
    if fidelity:
        fields["fidelity"] = fidelity
    if seconds:
        fields["time"] = f"{show_seconds(sum(seconds.values()))}: {show_phases(seconds)}"
    fields |= {name: show_number(value) for name, value in report.items() if isinstance(value, int | float)}
    return f"{path}\n{show_fields(fields)}"


def show_estimate(expected: dict[str, Any]) -> str:
    """Return what a compaction would cost, for people."""
    fields = dict(expected)
    seconds = fields.pop("seconds", {})
    return show_fields({**fields, "phases": show_phases(seconds)}, indent="")


def show_phases(seconds: dict[str, float]) -> str:
    """Return the seconds of each phase on one line."""
    return ", ".join(f"{name} {show_seconds(value)}" for name, value in seconds.items())
