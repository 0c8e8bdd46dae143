"""Knows how an exception becomes one sentence and an exit code. Knows no command.

A failure that the program expects (``errors.py``) says what to do about it. Anything else is a bug: one line,
and the traceback where COMPACTOR_DEBUG is set.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import typer

from compactor import console
from compactor.errors import INTERRUPTED_EXIT_CODE, CompactorError, MemoryShortError, OutputError

BROKEN_PIPE_EXIT_CODE = 141  # what a shell reports of a program that the closed pipe stopped
DEBUG_VARIABLE = "COMPACTOR_DEBUG"
OUT_OF_MEMORY = "The machine ran out of {where} memory; {remedy}."
LESS_MEMORY = "lower --prefill-chunk or --chunk, take a smaller model, or give --dtype bfloat16"
OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
OUTPUT_ERRNOS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file would be larger than allowed here",
}
# Typer's own usage errors, under the name they have in every release of typer: with or without click.
UsageFailure = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Failure(NamedTuple):
    """One sentence (empty: say nothing) and the exit code."""

    sentence: str
    exit_code: int


def exit_code_of(run: Callable[[], object]) -> int:
    """Call ``run`` and return the exit code; a failure is told on stderr."""
    try:
        run()
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return _tell(error)
    return 0


def failure_of(error: BaseException) -> Failure:
    """Return the sentence and the exit code for an exception."""
    if isinstance(error, CompactorError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, UsageFailure):
        return _usage_failure(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Failure(str(error) or "interrupted", INTERRUPTED_EXIT_CODE)
    if isinstance(error, BrokenPipeError):
        return Failure("", BROKEN_PIPE_EXIT_CODE)
    if where := _memory_that_ran_out(error):
        return Failure(OUT_OF_MEMORY.format(where=where, remedy=LESS_MEMORY), MemoryShortError.exit_code)
    if isinstance(error, OSError) and error.errno in OUTPUT_ERRNOS:
        what = error.filename or "the output"
        return Failure(f"Cannot write {what}: {OUTPUT_ERRNOS[error.errno]}.", OutputError.exit_code)
    kind = type(error).__name__
    text = " ".join(str(error).split()) or "no message"
    return Failure(f"internal error: {kind}: {text}; rerun with {DEBUG_VARIABLE}=1 for the traceback", 1)


@contextmanager
def memory_remedy(remedy: str) -> Iterator[None]:
    """Where memory runs out inside, raise MemoryShortError with what this command can lower."""
    try:
        yield
    except Exception as error:
        if where := _memory_that_ran_out(error):
            raise MemoryShortError(OUT_OF_MEMORY.format(where=where, remedy=remedy)) from error
        raise


def _tell(error: BaseException) -> int:
    failure = failure_of(error)
    try:
        if os.environ.get(DEBUG_VARIABLE):
            console.note("".join(traceback.format_exception(error)).rstrip())
        if failure.sentence:
            console.error(failure.sentence)
    except OSError:  # stderr is gone as well; the exit code still tells
        pass
    if failure.exit_code == BROKEN_PIPE_EXIT_CODE:
        _silence_stdout()
    return failure.exit_code


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_failure(error: BaseException) -> Failure:
    message = getattr(error, "format_message", lambda: str(error))().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    hint = f" Try '{context.command_path} --help'." if context is not None else ""
    return Failure(f"{message}.{hint}", int(getattr(error, "exit_code", 2)))


def _memory_that_ran_out(error: BaseException) -> str:
    """Return "host" or "GPU" when the error says that memory ran out, else ""; never imports torch."""
    if isinstance(error, MemoryError):
        return "host"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "host"
    if not isinstance(error, RuntimeError):
        return ""
    text = str(error).lower()
    if type(error).__name__ == "OutOfMemoryError" or any(words in text for words in OUT_OF_MEMORY_WORDS):
        return "host" if "cpuallocator" in text else "GPU"
    return ""
