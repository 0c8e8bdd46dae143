"""The command ``compactor recompact``: a smaller cache from a cache and its sidecar. Knows no model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compactor import console
from compactor.cli.options import Json, MaxBytes, TargetTokens
from compactor.cli.units import show_bytes, show_factor, show_fields
from compactor.config import CompactSettings
from compactor.errors import SettingsError


def recompact_command(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE.kv", help="A cache that `compact --keep-curves` wrote, its .curves beside it."),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT.kv",
            help="The file to write, with its own .curves; FILE itself with --force.",
        ),
    ],
    keep_ratio: Annotated[
        float | None,
        typer.Option(
            "-r", "--keep-ratio", metavar="FRACTION", help="Fraction of the original document's keys that is kept."
        ),
    ] = None,
    target_tokens: TargetTokens = None,
    max_bytes: MaxBytes = None,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace existing files.")] = False,
    json: Json = False,
) -> None:
    """Make a compacted cache smaller without the model, from what `compact --keep-curves` kept beside it.

    Give one of --keep-ratio, --target-tokens and --max-bytes. Compacting the document itself at the smaller size
    answers better, and needs the model.
    """
    if keep_ratio is None and target_tokens is None and max_bytes is None:
        raise SettingsError("Give the new size: --keep-ratio, --target-tokens or --max-bytes.")
    target = CompactSettings(keep_ratio=keep_ratio, target_tokens=target_tokens, max_bytes=max_bytes)
    from compactor.output import check_output

    check_output(output, force)
    from compactor.recompact import describe_files, recompact  # only now torch

    smaller = recompact(file, output, target, force=force)
    report, files = smaller.metadata.report, describe_files(output)
    if json:
        console.answer_json(
            {
                "output": output,
                **files,
                "document": smaller.metadata.document_name,
                "settings": smaller.metadata.settings,
                "report": report,
            }
        )
    else:
        console.answer(show_recompacted(output, report, files))


def show_recompacted(output: str, report: dict[str, Any], files: dict[str, int]) -> str:
    """Return what was made, for people."""
    before = report["recompacted_from"]
    fields: dict[str, object] = {
        "kept": f"{before['kept_keys']:,} -> {report['kept_keys']:,} of {report['document_keys']:,} document keys "
        f"({before['kept_ratio']:.1%} -> {report['kept_ratio']:.1%})",
        "size": f"{show_bytes(before['tensor_bytes'])} -> {show_bytes(report['tensor_bytes'])}, "
        f"{show_factor(before['tensor_bytes'], report['tensor_bytes'])}; curves {show_bytes(files['curves_bytes'])}",
        "recompaction error": report["recompaction_error"],
        "fidelity": "not measured at this size",
    }
    return f"{output}\n{show_fields(fields)}"
