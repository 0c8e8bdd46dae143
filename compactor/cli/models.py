"""Knows how the known models are listed and fetched. Knows no files and no hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from compactor import console
from compactor.cli.options import Json, Quiet, Revision
from compactor.cli.units import show_bytes
from compactor.registry import DEFAULT_MODEL, KNOWN_MODELS, KnownModel, cached_at, folder_bytes

app = typer.Typer(add_completion=False, rich_markup_mode=None, help="List the known models, or fetch one.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A known name, a hub id or a GGUF file.")]


@app.callback(invoke_without_command=True)
def list_models(ctx: typer.Context, json: Json = False) -> None:
    """List the known models with their sizes, and which are on this machine."""
    if ctx.invoked_subcommand is not None:
        return
    rows = [_describe(known) for known in KNOWN_MODELS]
    if json:
        console.answer_json(rows)
    else:
        console.rich_console().print(_table(rows))
        console.note("Any hub id (owner/model), folder or GGUF file of a supported family works as well.")


@app.command("pull")
def pull(name: Name, revision: Revision = None, quiet: Quiet = False, json: Json = False) -> None:
    """Fetch a model so that it works without a network afterwards."""
    from compactor.model import pull_model

    folder = pull_model(name, revision=revision, reporter=console.ConsoleReporter(quiet=quiet))
    size = folder_bytes(folder)
    if json:
        console.answer_json({"name": name, "folder": str(folder), "bytes": size})
    else:
        console.answer(f"{name}: {show_bytes(size)} in {folder}")


def _describe(known: KnownModel) -> dict[str, Any]:
    folder = cached_at(known)
    return {
        **asdict(known),
        "weight_bytes": known.weight_bytes,
        "default": known.name == DEFAULT_MODEL,
        "cached": str(folder) if folder else None,
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "parameters", "weights", "KV/token", "window", "licence", "on this machine"):
        numeric = title in ("parameters", "weights", "KV/token", "window")
        table.add_column(title, justify="right" if numeric else "left", no_wrap=title != "licence")
    for row in rows:
        table.add_row(
            row["name"] + (" (default)" if row["default"] else ""),
            _show_parameters(row["parameters"]),
            show_bytes(row["weight_bytes"]),
            show_bytes(row["kv_bytes_per_token"]),
            f"{row['window']:,}",
            row["licence"] + (", gated" if row["gated"] else ""),
            "yes" if row["cached"] else "no",
        )
    return table


def _show_parameters(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 999.5e6 else f"{count / 1e6:.0f} M"
