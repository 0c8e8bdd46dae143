"""Knows the lines of manifest.jsonl: what happened to each document, run after run. Knows no model.

The file only grows: one JSON object a line for every document and run, on the disk before the next document
begins. The last line of a document tells how it stands; the last one that did not fail, what its output was
made from. A line that was cut off by a crash is passed over.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from compactor.errors import OutputError
from compactor.output import append_line

MANIFEST_NAME = "manifest.jsonl"

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Record:
    """What happened to one document in one run. A document that was not read has no hash."""

    input: str  # path below the folder, with forward slashes
    output: str  # path below the output folder, with forward slashes
    status: Status
    root: str  # absolute path of the folder
    input_sha256: str | None  # of the file's bytes
    settings_sha256: str  # of settings, model and file format: what else decides the output
    document_tokens: int | None = None
    kept_keys: int | None = None
    document_keys: int | None = None
    bytes: int | None = None  # of the output file
    elapsed_s: float = 0.0
    error: str | None = None  # name of the exception
    message: str | None = None  # one sentence: what failed, what to do
    finished: str = ""  # ISO 8601, UTC


class Manifest:
    """The manifest of one output folder. Raises OutputError when it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: dict[str, Record] = {}
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        except OSError as failure:
            raise OutputError(f"{path} cannot be read: {failure.strerror}; choose another folder.") from failure
        self._torn = lines[-1] != b""  # the last line has no end
        for line in lines:
            if record := _parse(line):
                self._remember(record)

    def made(self, name: str) -> Record | None:
        """Return the record of a document's output: the last one that did not fail."""
        return self._made.get(name)

    def append(self, record: Record) -> None:
        """Add a line; it is on the disk when this returns."""
        line = b"\n" * self._torn + _line(record)
        self._torn = True  # until the whole line is written
        append_line(self.path, line, mode=0o600, remedy="choose another folder")
        self._torn = False
        self._remember(record)

    def _remember(self, record: Record) -> None:
        if record.status != "failed":
            self._made[record.input] = record


def _line(record: Record) -> bytes:
    value = asdict(record)
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a file name that is no valid text
        return json.dumps(value).encode() + b"\n"


def _parse(line: bytes) -> Record | None:
    """Return the record of a line, None for a torn or foreign one. Unknown keys are passed over."""
    try:
        value: Any = json.loads(line)
        known = {field.name: value[field.name] for field in fields(Record) if field.name in value}
        record = Record(**known)
    except (ValueError, TypeError, KeyError):
        return None
    sound = isinstance(record.input, str) and record.status in ("done", "skipped", "failed")
    return record if sound else None
