"""Knows files and text, not tokens.

Text of any suffix is told from binary data by its content. PDF, Word and HTML go through libraries of the
extra ``[documents]``; Word and HTML become Markdown, so that headings, lists and tables survive.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compactor.errors import DocumentError

STDIN = "-"
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
DOCUMENT_SUFFIXES = (".pdf", ".docx", *HTML_SUFFIXES)
MAX_BYTES = 256 * 2**20  # far beyond any model's window, far below any machine's memory
SNIFF_BYTES = 64 * 2**10
MAX_CONTROL_SHARE = 0.01  # of all characters; a stray control character does not make a text binary

_UTF8_BOM = b"\xef\xbb\xbf"
_PDF_MAGIC = b"%PDF-"
_ZIP_MAGIC = b"PK\x03\x04"
_BINARY_MAGIC = {
    _ZIP_MAGIC: "a zip archive or an office document other than .docx",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old or password-protected office document (.doc, .xls)",
    b"{\\rtf": "a rich text document (.rtf)",
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\x00": "xz data",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"SQLite format 3\x00": "a SQLite database",
    b"!<arch>\n": "an object archive",
}
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_TEXT_CONTROLS = frozenset("\t\n\r\f\v\b\x1b\x1a")  # backspace and escape colour logs; 1a ends old DOS files
_CONTROLS = frozenset(map(chr, [*range(0x20), 0x7F])) - _TEXT_CONTROLS


@dataclass(frozen=True)
class Document:
    """A document as text with ``\\n`` line ends."""

    name: str  # the file's base name, or "stdin"
    text: str
    sha256: str  # hex digest of the UTF-8 text, not of the file


def read_document(path: str) -> Document:
    """Read a file, or standard input for ``-``.

    Raises DocumentError with one sentence when there is no such file, or when it is a folder, unreadable,
    empty, binary, not UTF-8, larger than MAX_BYTES, or a PDF, Word or HTML file that yields no text.
    """
    if path == STDIN:
        return make_document("stdin", _decode(_read(sys.stdin.buffer, "stdin", STDIN), "stdin", STDIN))
    file = Path(path)
    try:
        if file.is_dir():
            raise DocumentError(f"{path} is a folder; give one file, or use batch-compact for the folder.")
        with file.open("rb") as stream:
            data = _read(stream, path, file.suffix.lower())
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist; check the path.") from None
    except PermissionError:
        raise DocumentError(f"{path} may not be read by this user; change its permissions.") from None
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the path
        reason = getattr(failure, "strerror", None) or failure
        raise DocumentError(f"{path!r} cannot be read: {reason}.") from failure
    return make_document(file.name, _decode(data, path, file.suffix.lower()))


def is_document(file: Path) -> bool:
    """Tell from the name and the first bytes whether a file is meant to be read: neither binary nor blank.

    A file that cannot be opened counts as one, so that reading it says why.
    """
    if file.suffix.lower() in DOCUMENT_SUFFIXES:
        return not file.name.startswith("~$")  # a lock file of Word
    try:
        with file.open("rb") as stream:
            head = stream.read(SNIFF_BYTES)
        _refuse_binary(head, file.name)
    except OSError:
        return True
    except DocumentError:
        return False
    return bool(head.removeprefix(_UTF8_BOM).strip())


def make_document(name: str, text: str) -> Document:
    """Wrap text that is already in memory. Raises DocumentError when it is empty or all white space."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DocumentError(f"{name} has no text; give a document with at least one word.")
    clean_name = name.encode("utf-8", "replace").decode("utf-8")  # a file name may be no valid text
    return Document(clean_name, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _read(stream: IO[bytes], path: str, suffix: str) -> bytes:
    """Read all bytes, but refuse binary data and oversized files before reading them whole."""
    head = stream.read(SNIFF_BYTES)
    if not _is_pdf(head, suffix) and suffix != ".docx":
        _refuse_binary(head, path)
    data = head + stream.read(MAX_BYTES + 1 - len(head))
    if len(data) > MAX_BYTES:
        raise DocumentError(f"{path} is larger than {MAX_BYTES // 2**20} MiB, beyond any model; split it.")
    return data


def _decode(data: bytes, path: str, suffix: str) -> str:
    if not data.removeprefix(_UTF8_BOM).strip():
        raise DocumentError(f"{path} is empty; give a document with at least one word.")
    if _is_pdf(data, suffix):
        return _read_pdf(data, path)
    if suffix == ".docx":
        return _read_docx(data, path)
    if suffix in HTML_SUFFIXES:
        return _read_html(data, path)
    return _read_text(data, path)


def _is_pdf(head: bytes, suffix: str) -> bool:
    return suffix == ".pdf" or head.startswith(_PDF_MAGIC)


def _refuse_binary(head: bytes, path: str) -> None:
    for magic, kind in _BINARY_MAGIC.items():
        if head.startswith(magic):
            raise DocumentError(f"{path} is {kind}, not text; convert it to text first.")
    if head.startswith(_UTF16_BOMS):
        raise DocumentError(f"{path} is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8.")
    if b"\x00" in head:
        where = f"byte {head.index(0)} is zero"
        raise DocumentError(f"{path} is binary ({where}), not text; convert it to text first.")


def _read_text(data: bytes, path: str) -> str:
    data = data.removeprefix(_UTF8_BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise DocumentError(
            f"{path} is not UTF-8 (byte {failure.start} is 0x{data[failure.start]:02x}); "
            "if it is Latin-1, convert it: iconv -f latin1 -t utf-8."
        ) from None
    if "\x00" in text:
        raise DocumentError(f"{path} is binary (it has a zero byte), not text; convert it to text first.")
    num_controls = sum(map(text.count, _CONTROLS))
    if num_controls > MAX_CONTROL_SHARE * len(text):
        raise DocumentError(
            f"{path} looks binary: {num_controls:,} of its {len(text):,} characters are control characters; "
            "convert it to text first."
        )
    return text


def _read_pdf(data: bytes, path: str) -> str:
    pypdf = _library("pypdf", path)
    with _broken(path, "PDF"):
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not _opens_without_password(reader):
            raise DocumentError(f"{path} is an encrypted PDF; decrypt it first: qpdf --decrypt IN OUT.")
        text = "\n\n".join(page.extract_text().strip() for page in reader.pages)
    text = _clean(text)
    if not text.strip():
        raise DocumentError(f"{path} has no text in it (a scan?); recognise its text first: ocrmypdf IN OUT.")
    return text


def _opens_without_password(reader: Any) -> bool:
    """Many encrypted files only restrict printing and open with the empty password."""
    try:
        return bool(reader.decrypt(""))
    except Exception:  # a missing crypto library, an unknown cipher, a broken dictionary: closed all the same
        return False


def _read_docx(data: bytes, path: str) -> str:
    mammoth = _library("mammoth", path)
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise DocumentError(f"{path} is an old or protected Word document; save it as a plain .docx.")
    with _broken(path, "Word document"):
        size = sum(member.file_size for member in zipfile.ZipFile(io.BytesIO(data)).infolist())
        if size > MAX_BYTES:
            raise DocumentError(f"{path} unpacks to over {MAX_BYTES // 2**20} MiB; split it or drop images.")
        no_image = mammoth.images.img_element(lambda _image: {})
        html = mammoth.convert_to_html(io.BytesIO(data), convert_image=no_image).value
    return _markdown(html, path)


def _read_html(data: bytes, path: str) -> str:
    """A page that is not UTF-8 may declare its own encoding, which the library follows."""
    try:
        return _markdown(data.decode("utf-8-sig"), path)
    except UnicodeDecodeError:
        return _markdown(data, path)


def _markdown(html: str | bytes, path: str) -> str:
    bs4, markdownify = _library("bs4", path), _library("markdownify", path)
    with _broken(path, "HTML document"):
        soup = bs4.BeautifulSoup(html, "html.parser")
        for tag in soup(["script", "style", "noscript", "template", "svg", "img"]):
            tag.decompose()
        converter = markdownify.MarkdownConverter(
            heading_style="atx", bullets="-", escape_asterisks=False, escape_underscores=False
        )
        text = str(converter.convert_soup(soup))
    text = _clean(text).strip()
    if not text:
        raise DocumentError(f"{path} has no text in it; give a document with at least one word.")
    return text + "\n"


def _library(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DocumentError(
            f"Reading {path} needs the document readers; install them: pip install 'kv-compactor[documents]'."
        ) from None


@contextmanager
def _broken(path: str, kind: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one sentence; keep its log off the screen."""
    log = logging.getLogger("pypdf")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except DocumentError:
        raise
    except Exception as failure:  # damaged files make these libraries raise nearly anything
        reason = str(failure).strip().split("\n")[0].rstrip(".") or type(failure).__name__
        raise DocumentError(f"{path} is broken or not a {kind} ({reason}); export it again.") from failure
    finally:
        log.setLevel(level)


def _clean(text: str) -> str:
    """Drop what only a damaged or unusual file yields: control characters and halves of surrogate pairs."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.translate(dict.fromkeys(map(ord, _CONTROLS)))
