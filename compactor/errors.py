"""Knows every way the program can fail on purpose, and the exit code of each. Knows no printing.

A message is one or two sentences: what happened, and what to do about it.
"""

from __future__ import annotations


class CompactorError(Exception):
    """Base of every error that compactor raises on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class SettingsError(CompactorError):
    """A setting is out of range, or settings contradict each other."""

    exit_code = 2


class DocumentError(CompactorError):
    """The document cannot be used: missing, a folder, empty, binary, not UTF-8, or longer than the model's window."""

    exit_code = 3


class ModelError(CompactorError):
    """The model cannot be found, fetched, loaded, or is of a family that is not supported."""

    exit_code = 4


class CacheFileError(CompactorError):
    """The file is not a compacted cache, is damaged, or has a format version this release does not read."""

    exit_code = 5


class MismatchError(CompactorError):
    """The compacted cache belongs to another model, tokenizer, chat template or position scheme."""

    exit_code = 6


class OutputError(CompactorError):
    """The result cannot be written: it exists, the folder is read-only, the disk is full."""

    exit_code = 7


class MemoryShortError(CompactorError):
    """The machine ran out of host or GPU memory; the message says what to lower."""

    exit_code = 8


class BatchError(CompactorError):
    """At least one document of a batch, or result of an evaluation, failed; manifest or results say which and why."""

    exit_code = 9


class FidelityError(CompactorError):
    """The compacted cache answers less faithfully than ``--require-kl`` asks; nothing was written."""

    exit_code = 10


class NumericalError(CompactorError):
    """The model or the fit gave numbers that are not finite, or the fit equations that cannot be solved."""

    exit_code = 11
    REMEDY = "take --dtype float32, or look for weights that are not finite"


INTERRUPTED_EXIT_CODE = 130
