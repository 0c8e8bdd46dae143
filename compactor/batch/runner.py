"""Knows which documents of a folder are compacted, where to, and what happens when one fails. Knows no model.

The caller hands in the function that compacts one document, so that the model is loaded once.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from compactor.batch.manifest import MANIFEST_NAME, Manifest, Record
from compactor.cache_file import read_metadata
from compactor.document import Document, is_document, read_document
from compactor.errors import CacheFileError, DocumentError, OutputError
from compactor.output import check_output

if TYPE_CHECKING:
    from compactor.cache_file import FileSizes
    from compactor.types import CacheMetadata

SUFFIX = ".kv"


class Saveable(Protocol):
    """The part of a compacted cache that the batch needs."""

    @property
    def metadata(self) -> CacheMetadata:
        """What the cache says of itself."""
        ...

    def save(self, path: Path, *, force: bool = False) -> FileSizes:
        """Write the cache to ``path``."""
        ...


@dataclass(frozen=True)
class Job:
    """One document and its output."""

    source: Path
    output: Path
    name: str  # of the source below the folder, with forward slashes
    output_name: str  # of the output below the output folder, with forward slashes


@dataclass(frozen=True)
class Plan:
    """What a run would do with one document."""

    input: str
    action: Literal["compact", "skip", "fail"]
    document_tokens: int | None = None
    message: str | None = None  # why it would fail


CompactOne = Callable[[Document], Saveable]
Describe = Callable[[Exception], str]
Announce = Callable[[int, Job], None]


@dataclass(frozen=True)
class Batch:
    """All documents of one folder, in the order of their names."""

    root: Path
    output_root: Path
    jobs: list[Job]


def find_jobs(
    root: Path,
    output_root: Path,
    *,
    patterns: Sequence[str] = (),
    exclude: Sequence[str] = (),
    recursive: bool = True,
) -> Batch:
    """List the documents below ``root``: those that match a pattern, without patterns all but binary files.

    A pattern is a shell pattern for the name or for the path below ``root``; in a path ``*`` crosses folders.
    Left out are hidden files and folders, what ``exclude`` matches (a folder with all in it), ``output_root``
    if it lies in ``root``, compacted caches, and linked folders, so that no loop is followed. Raises
    DocumentError when ``root`` is no folder, cannot be listed, or holds no such document.
    """
    if not os.path.isdir(root):
        what = "is a file; use compact for it" if os.path.exists(root) else "does not exist; check the path"
        raise DocumentError(f"{root} {what}.")
    names = sorted(_walk(root, output_root, exclude, recursive))
    if patterns:
        names = [name for name in names if _matches(name, patterns)]
    else:
        names = [name for name in names if is_document(root / name)]
    if not names:
        what = f"that matches {' or '.join(patterns)}" if patterns else "to compact"
        raise DocumentError(f"{root} has no document {what}; check --pattern, --exclude and --recursive.")
    jobs = [Job(root / name, output_root / (name + SUFFIX), name, name + SUFFIX) for name in names]
    return Batch(root, output_root, jobs)


def _walk(root: Path, output_root: Path, exclude: Sequence[str], recursive: bool) -> Iterator[str]:
    """Yield the paths below ``root`` of all regular files that may be documents, and of broken links."""

    def fail(failure: OSError) -> None:
        what = f"{failure.filename} cannot be listed: {failure.strerror}"
        raise DocumentError(f"{what}; change its permissions or --exclude it.") from failure

    own = {os.path.realpath(output_root), os.path.realpath(output_root / MANIFEST_NAME)}
    for folder, folder_names, file_names in os.walk(root, onerror=fail):
        below = os.path.relpath(folder, root)

        def is_wanted(name: str, folder: str = folder, below: str = below) -> bool:
            hidden = name.startswith(".")
            excluded = _matches(os.path.normpath(os.path.join(below, name)), exclude)
            return not (hidden or excluded or os.path.realpath(os.path.join(folder, name)) in own)

        folder_names[:] = [name for name in folder_names if recursive and is_wanted(name)]
        for name in filter(is_wanted, file_names):
            path = os.path.join(folder, name)
            special = os.path.exists(path) and not os.path.isfile(path)  # a pipe, a socket, a device
            if not special and not name.endswith(SUFFIX):
                yield os.path.normpath(os.path.join(below, name)).replace(os.sep, "/")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    name = name.replace(os.sep, "/")
    base = name.rpartition("/")[2]
    for pattern in patterns:
        pattern = pattern.removeprefix("./").removesuffix("/")
        if fnmatchcase(base, pattern) or fnmatchcase(name, pattern):
            return True
        if pattern.startswith("**/") and fnmatchcase(name, pattern[3:]):
            return True
    return False


def settings_digest(settings: dict[str, Any], **others: Any) -> str:
    """Return the SHA-256 of all that decides an output besides its document, as hex digits."""
    text = json.dumps({"settings": settings, **others}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def open_manifest(output_root: Path) -> Manifest:
    """Create the output folder where it is missing, and open its manifest. Raises OutputError."""
    _make_folder(output_root)
    path = output_root / MANIFEST_NAME
    check_output(path, force=True)
    return Manifest(path)


def run_batch(
    batch: Batch,
    manifest: Manifest,
    compact_one: CompactOne,
    *,
    settings_sha256: str,
    force: bool = False,
    describe: Describe = str,
    announce: Announce = lambda _index, _job: None,
) -> Iterator[Record]:
    """Compact every document that changed; yield the record of each one once it is in the manifest.

    ``announce`` is called with index and job before a document is compacted. A failure becomes a record whose
    sentence ``describe`` makes. Ctrl-C passes through and leaves no record of the document at hand. Raises
    OutputError when the manifest itself cannot be written.
    """
    for index, job in enumerate(batch.jobs):
        started = time.perf_counter()
        record = Record(
            input=job.name,
            output=job.output_name,
            status="failed",
            root=str(batch.root.resolve()),
            input_sha256=None,
            settings_sha256=settings_sha256,
        )
        try:
            record = replace(record, input_sha256=hash_file(job.source))
            made = manifest.made(job.name)
            if made and not force and is_unchanged(job, made, record.input_sha256, settings_sha256):
                record = _skipped(record, made)
            else:
                document, may_replace = _open(job, made, record.root, force)
                announce(index, job)
                record = _done(record, *_make(job, document, may_replace, compact_one))
        except Exception as failure:  # whatever it is, the other documents must not suffer from it
            record = replace(record, error=type(failure).__name__, message=describe(failure))
        elapsed_s = round(time.perf_counter() - started, 3)
        record = replace(record, elapsed_s=elapsed_s, finished=datetime.now(UTC).isoformat(timespec="seconds"))
        manifest.append(record)
        yield record


def plan_batch(
    batch: Batch,
    manifest: Manifest,
    count_tokens: Callable[[Document], int],
    *,
    settings_sha256: str,
    force: bool = False,
    describe: Describe = str,
) -> Iterator[Plan]:
    """Tell what ``run_batch`` would do with each document. ``count_tokens`` raises where compacting would."""
    for job in batch.jobs:
        try:
            made = manifest.made(job.name)
            if made and not force and is_unchanged(job, made, hash_file(job.source), settings_sha256):
                yield Plan(job.name, "skip", made.document_tokens)
                continue
            document, may_replace = _open(job, made, str(batch.root.resolve()), force)
            if job.output.exists():
                check_output(job.output, may_replace)
            yield Plan(job.name, "compact", count_tokens(document))
        except Exception as failure:
            yield Plan(job.name, "fail", message=describe(failure))


def _open(job: Job, made: Record | None, root: str, force: bool) -> tuple[Document, bool]:
    """Return the document, and whether its output may replace an existing file."""
    document = read_document(str(job.source))
    return document, force or _may_replace(job, made, root, document)


def _make(job: Job, document: Document, may_replace: bool, compact_one: CompactOne) -> tuple[CacheMetadata, FileSizes]:
    _make_folder(job.output.parent)
    check_output(job.output, may_replace)  # now, and not after the long work
    cache = compact_one(document)
    return cache.metadata, cache.save(job.output, force=may_replace)


def _done(record: Record, metadata: CacheMetadata, sizes: FileSizes) -> Record:
    return replace(
        record,
        status="done",
        document_tokens=metadata.document_tokens,
        kept_keys=metadata.report.get("kept_keys"),
        document_keys=metadata.report.get("document_keys"),
        bytes=sum(sizes),
    )


def _skipped(record: Record, made: Record) -> Record:
    return replace(
        record,
        status="skipped",
        document_tokens=made.document_tokens,
        kept_keys=made.kept_keys,
        document_keys=made.document_keys,
        bytes=made.bytes,
    )


def is_unchanged(job: Job, made: Record | None, input_sha256: str | None, settings_sha256: str) -> bool:
    """Tell whether the output was made from the same bytes and settings and still has a sound header, and its sidecar
    beside it where the settings ask for one."""
    if made is None or made.output != job.output_name:
        return False
    if (made.input_sha256, made.settings_sha256) != (input_sha256, settings_sha256):
        return False
    try:
        metadata, _ = read_metadata(job.output)
        if metadata.settings.get("keep_curves"):
            from compactor.curves import has_curves  # needs torch

            if not has_curves(job.output):
                return False
        return job.output.stat().st_size == made.bytes
    except (CacheFileError, OSError):
        return False


def _may_replace(job: Job, made: Record | None, root: str, document: Document) -> bool:
    """Tell whether an existing output is the batch's own: made from this file, or from the same text.

    Raises OutputError when it was made from the file of another folder.
    """
    try:
        metadata, _ = read_metadata(job.output)
        if metadata.document_sha256 == document.sha256:  # such as one whose run was cut off before its record
            return True
    except CacheFileError:
        pass
    if made and made.root != root and job.output.exists():
        raise OutputError(
            f"{job.output} was made from {made.root}/{made.input}; choose another output folder, or replace "
            "it with --force."
        )
    return made is not None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise OutputError(
            f"The folder {folder} cannot be made: {failure.strerror}; choose another output folder."
        ) from failure


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits. Raises DocumentError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise DocumentError(f"{file} does not exist; check the path or the link.") from None
    except OSError as failure:
        raise DocumentError(f"{file} cannot be read: {failure.strerror}; check its permissions.") from failure
