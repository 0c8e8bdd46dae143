"""Knows how to put bytes on a disk: whole, or not at all. Knows nothing of what they mean."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from compactor.errors import OutputError

AnyPath = str | os.PathLike[str]

_WRITE_PIECE = 16 << 20  # bytes a system call; between two of them Ctrl-C is heard
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the folder is on a read-only file system; choose another folder",
    errno.EACCES: "the folder does not let you write; choose another folder",
    errno.EPERM: "the folder does not let you write; choose another folder",
    errno.ENOENT: "the folder does not take new files; choose another folder",
    errno.EFBIG: "the file would be larger than the system allows; see `ulimit -f`, or keep fewer tokens",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
}


def check_output(path: AnyPath, force: bool) -> None:
    """Raise OutputError when a file could not be written to ``path``; call it before the long work starts.

    Refused: ``-``, a folder, anything that is not a regular file, an existing file without ``force``, and a
    folder that is missing or in which no file can be created (which is tried).
    """
    if os.fspath(path) == "-":
        raise OutputError("The output is a file and cannot go to stdout; give its name instead of '-'.")
    try:
        temporary = _temporary_beside(_find_target(path, force))
        try:
            os.close(_create(temporary))
        finally:
            _remove(temporary)
    except OSError as error:
        raise OutputError(_sentence(path, error)) from error


def write_atomically(path: AnyPath, pieces: Iterable[memoryview], *, force: bool = False) -> None:
    """Write ``pieces`` (of bytes) to a temporary file (mode 0600), sync it, and rename it to ``path``.

    The temporary file lies in the same folder. Whatever is raised in between, Ctrl-C included, leaves no
    temporary file, and an existing ``path`` as it was. Raises OutputError for what the system refuses: a full
    disk, a quota, a read-only folder.
    """
    try:
        target = _find_target(path, force)
        temporary = _temporary_beside(target)
        try:
            _write_and_sync(temporary, pieces)
            _find_target(path, force)  # it may have appeared in the meantime
            os.replace(temporary, target)
        finally:
            _remove(temporary)
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(_sentence(path, error)) from error


def append_line(path: AnyPath, line: bytes, *, mode: int, remedy: str) -> None:
    """Add a line to a file, which is on the disk when this returns; ``mode`` are the permissions of a new file.

    Raises OutputError, whose sentence ends with ``remedy``; part of the line may then be there.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, mode)
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as failure:
        raise OutputError(f"{path} cannot be written: {failure.strerror}; {remedy}.") from failure


def _find_target(path: AnyPath, force: bool) -> Path:
    """Return the file that ``path`` names, links followed, or raise OutputError."""
    text = os.fspath(path)
    target = Path(os.path.realpath(text))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if text.endswith(("/", os.sep)):
            raise OutputError(f"{text} names a folder; give the name of a file in it.") from None
        if not target.parent.exists():
            raise OutputError(f"The folder {target.parent} does not exist; create it first.") from None
        return target
    if stat.S_ISDIR(mode):
        raise OutputError(f"{text or 'The output'} is a folder; give the name of a file in it.")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{text} is a device or a pipe; give the name of an ordinary file.")
    if not force:
        raise OutputError(f"{text} exists already; pass --force to replace it.")
    return target


def _temporary_beside(target: Path) -> Path:
    return target.parent / f".compactor-{secrets.token_hex(8)}.tmp"


def _create(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o600)


def _remove(path: Path) -> None:
    with suppress(OSError):  # it may not exist; what went wrong before matters more
        path.unlink()


def _write_and_sync(path: Path, pieces: Iterable[memoryview]) -> None:
    descriptor = _create(path)
    try:
        for piece in pieces:
            rest = piece
            while rest:
                rest = rest[os.write(descriptor, rest[:_WRITE_PIECE]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system can sync a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sentence(path: AnyPath, error: OSError) -> str:
    unknown = f"the system says '{error.strerror or error}'; choose another folder"
    return f"{os.fspath(path)} cannot be written: {_REASONS.get(error.errno or 0, unknown)}."
