"""Knows the terminal: answers go to stdout, everything else to stderr. The only module that prints.

Without a terminal on stderr there is no colour and no bar; each phase is then one line when it starts and one when it
ends, so that a log (or a program) can follow.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from compactor.types import Advance


def answer(text: str, *, end: str = "\n") -> None:
    """Write a piece of the result to stdout at once; what its encoding lacks becomes a question mark."""
    text += end
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        sys.stdout.write(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
    sys.stdout.flush()


def answer_json(value: Any) -> None:
    """Write one JSON document to stdout, on one line."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    answer(json.dumps(value, ensure_ascii=not is_utf8))


def note(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def error(message: str) -> None:
    """Write the one sentence of a failure to stderr."""
    note(f"error: {message}")


def rich_console(*, stderr: bool = False) -> Console:
    """Return a rich console for tables; plain text where the stream is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 120
    return Console(file=stream, highlight=False, soft_wrap=False, width=width)


class ConsoleReporter:
    """Shows phases on stderr: a bar with counts and times on a terminal, two plain lines a phase elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def note(self, message: str) -> None:
        """Show one sentence that matters but does not stop the work."""
        if not self.quiet:
            note(f"note: {message}")

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        """Show a phase of ``total`` units; the bound function adds finished units."""
        if self.quiet:
            yield lambda _units: None
        elif sys.stderr.isatty():
            with _bar(name, total, unit) as advance:
                yield advance
        else:
            started = time.perf_counter()
            size = f" ({total:,} {unit})" if total is not None else ""
            note(f"{name}{size} ...")
            yield lambda _units: None
            note(f"{name}: {time.perf_counter() - started:.1f} s")


@contextmanager
def _bar(name: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [
        TextColumn(f"{name:<16}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=rich_console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda units: progress.advance(task, units)
