"""Knows the lines of a results file: what one method made of one document. Knows no model and no statistics.

The file only grows: one JSON object a line, on the disk before the next result is begun. What is there is not run
again. A line that was cut off by a crash is passed over.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from compactor.errors import OutputError
from compactor.output import append_line

FULL = "full"  # the method of the uncompacted cache
SHORT_ANSWER, LONG_ANSWER = 32, 64  # tokens at most: of a few words, and of a sentence or a list
DIGITS = 7  # significant digits of a real number in the file

Status = Literal["done", "failed"]


class Key(NamedTuple):
    """What a result is about; the settings it was made with are its digest's."""

    model: str
    task: str
    document: str
    seed: int
    length: int | None  # tokens that were asked for; None: as the document came
    method: str
    keep_ratio: float | None  # None: the full cache


@dataclass(frozen=True)
class Record:
    """One result. Lists have one entry per question; a failed result has only its key and a message."""

    status: Status
    model: str
    task: str
    document: str
    seed: int
    length: int | None
    method: str
    keep_ratio: float | None
    settings_sha256: str  # of settings, model, document and questions: what else decides the result
    settings: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""  # of the model's activations
    tool_version: str = ""
    torch_version: str = ""
    document_tokens: int | None = None
    kept_keys: int | None = None
    document_keys: int | None = None
    file_bytes: int | None = None  # of the file on the disk; None where nothing is saved
    tensor_bytes: int | None = None  # of all tensors in the storage type
    full_bytes: int | None = None  # keys and values of the full cache in the storage type
    prefill_seconds: float | None = None
    seconds: float | None = None  # of the method alone, after the prefill
    shared_seconds: float | None = None  # of what it shares with other methods and sizes: reference passes, statistics
    phases: dict[str, float] = field(default_factory=dict)  # seconds, in the method's own words
    first_token_seconds: float | None = None  # one question alone, to its first token
    tokens_per_second: float | None = None  # one question alone, after the first token
    scores: list[float] = field(default_factory=list)  # 0 to 1
    kl: list[float | None] = field(default_factory=list)  # mean over the answer's tokens, nats; None is not finite
    agreement: list[float] = field(default_factory=list)  # share of answer tokens with the same most likely token
    same: list[bool] = field(default_factory=list)  # the same answer as the full cache's, token by token
    answer_tokens: list[int] = field(default_factory=list)  # of the full cache's answer
    answers: list[str] = field(default_factory=list)  # what was judged
    expected: list[str] = field(default_factory=list)  # right answers
    kinds: list[str] = field(default_factory=list)
    predicted_damage: float | None = None
    report: dict[str, float] = field(default_factory=dict)  # the method's own numbers
    error: str | None = None  # name of the exception
    message: str | None = None  # one sentence: what failed, what to do
    finished: str = ""  # ISO 8601, UTC

    @property
    def key(self) -> Key:
        """What the result is about."""
        return Key(self.model, self.task, self.document, self.seed, self.length, self.method, self.keep_ratio)


class ResultsFile:
    """The results of one file. Raises OutputError when it cannot be read or written, or holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[Key, Record] = {}
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        except OSError as failure:
            raise OutputError(f"{path} cannot be read: {failure.strerror}; choose another file.") from failure
        self._torn = lines[-1] != b""  # the last line has no end
        found = [_parse(line) for line in lines]
        for record in found:
            if record is not None:
                self._remember(record)
        if not self._last and any(line.strip() for line in lines[:-1]):
            raise OutputError(f"{path} holds no results of `compactor eval`; choose another file.")

    @property
    def records(self) -> list[Record]:
        """The newest result of every key, in the order of their first lines; a failure never hides a result."""
        return list(self._last.values())

    def has(self, key: Key, settings_sha256: str) -> bool:
        """Whether the result is there, made with the same settings."""
        record = self._last.get(key)
        return record is not None and record.status == "done" and record.settings_sha256 == settings_sha256

    def append(self, record: Record) -> Record:
        """Add a line; it is on the disk when this returns. Returns the record as it was written."""
        record = rounded(record)
        line = b"\n" * self._torn + json.dumps(asdict(record), ensure_ascii=True, allow_nan=False).encode() + b"\n"
        self._torn = True  # until the whole line is written
        append_line(self.path, line, mode=0o644, remedy="choose another file")
        self._torn = False
        self._remember(record)
        return record

    def _remember(self, record: Record) -> None:
        before = self._last.get(record.key)
        if before is None or record.status == "done" or before.status == "failed":
            self._last[record.key] = record


def rounded(record: Record) -> Record:
    """Return the record as JSON keeps it: real numbers to DIGITS digits, None for those that are not finite."""
    return replace(record, **{field.name: _plain(getattr(record, field.name)) for field in fields(Record)})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _parse(line: bytes) -> Record | None:
    """Return the record of a line, None for a torn or foreign one. Unknown keys are passed over."""
    try:
        value: Any = json.loads(line)
        known = {field.name: value[field.name] for field in fields(Record) if field.name in value}
        record = Record(**known)
        hash(record.key)
    except (ValueError, TypeError, KeyError):
        return None
    return record if record.status in ("done", "failed") and isinstance(record.method, str) else None
