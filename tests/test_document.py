"""Every kind of document is read as text; everything else is refused in one sentence that says what to do."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from compactor import document
from compactor.document import Document, is_document, make_document, read_document
from compactor.errors import DocumentError

WORD_XML = """<?xml version="1.0" encoding="UTF-8"?>
<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>{}</w:body></w:document>"""
PARAGRAPH = '<w:p><w:pPr><w:pStyle w:val="{}"/></w:pPr><w:r><w:t>{}</w:t></w:r></w:p>'


def _write(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def _sentence(path: str) -> str:
    """Return the sentence with which a file is refused, checked to be one line."""
    with pytest.raises(DocumentError) as failure:
        read_document(path)
    text = str(failure.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert text.startswith((path, "Reading " + path))
    return text


def _pdf(*pages: str) -> bytes:
    """Return a PDF with one line of text a page, written by hand."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for i, text in enumerate(pages):
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        content = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET"
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    xref = "".join(f"{place:010} 00000 n \n" for place in places)
    count = len(objects) + 1
    tail = f"xref\n0 {count}\n0000000000 65535 f \n{xref}trailer\n<< /Size {count} /Root 1 0 R >>\n"
    return data + f"{tail}startxref\n{len(data)}\n%%EOF\n".encode()


def _encrypted_pdf(text: str, user_password: str) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(_pdf(text)))
    writer.encrypt(user_password, "owner", algorithm="RC4-128")
    data = io.BytesIO()
    writer.write(data)
    return data.getvalue()


def _docx(body: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Override '
            'PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
            'wordprocessingml.document.main+xml"/></Types>',
        )
        archive.writestr(
            "_rels/.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            '<Relationship Id="r1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/'
            'officeDocument" Target="word/document.xml"/></Relationships>',
        )
        archive.writestr("word/document.xml", WORD_XML.format(body))
    return data.getvalue()


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "Makefile", "a.weird", "a b.TXT"])
def test_text_is_read_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    text = "Größe: 東京 🙂\n\n\tindented \f next page\n"
    read = read_document(_write(tmp_path, name, text.encode()))
    assert read == Document(name, text, hashlib.sha256(text.encode()).hexdigest())


def test_all_line_ends_become_newlines(tmp_path: Path) -> None:
    read = read_document(_write(tmp_path, "a.txt", b"one\r\ntwo\rthree\nfour\r\n"))
    assert read.text == "one\ntwo\nthree\nfour\n"
    assert read.sha256 == read_document(_write(tmp_path, "b.txt", b"one\ntwo\nthree\nfour\n")).sha256


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_document(_write(tmp_path, "a.txt", b"\xef\xbb\xbfhello")).text == "hello"


def test_colour_codes_and_a_stray_control_character_are_text(tmp_path: Path) -> None:
    text = "\x1b[31merror\x1b[0m " + "word " * 30 + "\x01"
    assert read_document(_write(tmp_path, "a.log", text.encode())).text == text


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Größe\r\n".encode())))
    assert read_document("-") == make_document("stdin", "Größe\n")


def test_standard_input_may_be_a_pdf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(_pdf("Clause 7"))))
    assert read_document("-").text == "Clause 7"


def test_a_named_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[b"x" * 200_000])
    writer.start()
    assert len(read_document(str(path)).text) == 200_000
    writer.join()


def test_a_name_that_is_no_text_is_made_one(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("hello")
    assert read_document(path).name == "caf?.txt"


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in _sentence(str(tmp_path / "missing.txt"))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in _sentence(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n", b"\xef\xbb\xbf"], ids=["empty", "blank", "mark"])
def test_a_file_without_a_word_is_refused(tmp_path: Path, data: bytes) -> None:
    assert "at least one word" in _sentence(_write(tmp_path, "a.txt", data))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"text\x00more", "byte 4 is zero"),
        (b"\x89PNG\r\n\x1a\n", "PNG image"),
        (b"\x7fELF\x02", "a program"),
        (b"GGUF\x03\x00", "GGUF model"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"{\\rtf1 hello}", "rich text"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old or password-protected"),
        (b"\xff\xfeh\x00i\x00", "iconv -f utf-16 -t utf-8"),
        (b"a" * 70_000 + b"\x00", "zero byte"),
        (b"abc\x01\x02\x03", "3 of its 6 characters are control characters"),
    ],
)
def test_binary_data_is_refused_by_kind(tmp_path: Path, data: bytes, kind: str) -> None:
    assert kind in _sentence(_write(tmp_path, "a.txt", data))


def test_binary_data_is_not_read_whole() -> None:
    class Endless(io.RawIOBase):
        num_read = 0

        def read(self, size: int = -1) -> bytes:
            assert size > 0
            self.num_read += size
            return bytes(size)

    stream = Endless()
    with pytest.raises(DocumentError):
        document._read(stream, "/dev/zero", "")
    assert stream.num_read <= document.SNIFF_BYTES


def test_latin_1_is_refused_with_its_byte_and_the_way_out(tmp_path: Path) -> None:
    sentence = _sentence(_write(tmp_path, "a.txt", "Größe".encode("latin1")))
    assert "byte 2 is 0xf6" in sentence
    assert "iconv -f latin1 -t utf-8" in sentence


def test_half_a_surrogate_pair_is_not_utf_8(tmp_path: Path) -> None:
    assert "not UTF-8" in _sentence(_write(tmp_path, "a.txt", b"a\xed\xa0\x80"))


def test_a_file_beyond_every_window_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_BYTES", 2**20)
    assert "larger than 1 MiB" in _sentence(_write(tmp_path, "a.txt", b"x" * (2**20 + 1)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.txt", b"hello")
    os.chmod(path, 0)
    assert "permissions" in _sentence(path)


def test_a_refusal_of_the_system_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = _write(tmp_path, "a.txt", b"hello")
    monkeypatch.setattr(Path, "open", refuse)
    assert "permissions" in _sentence(path)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    with pytest.raises(DocumentError, match="cannot be read"):
        read_document(str(loop))


def test_a_path_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(DocumentError, match="cannot be read"):
        read_document("a\x00b")


# --- PDF, Word, HTML ----------------------------------------------------------------------------------------


def test_a_pdf_is_read_page_by_page(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.pdf", _pdf("First page.", "Clause 7: no cats."))
    assert read_document(path).text == "First page.\n\nClause 7: no cats."


def test_a_pdf_under_another_name_is_read(tmp_path: Path) -> None:
    assert read_document(_write(tmp_path, "download", _pdf("Clause 7"))).text == "Clause 7"


def test_a_pdf_that_opens_without_a_password_is_read(tmp_path: Path) -> None:
    assert read_document(_write(tmp_path, "a.pdf", _encrypted_pdf("Clause 7", ""))).text == "Clause 7"


def test_an_encrypted_pdf_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.pdf", _encrypted_pdf("Clause 7", "secret"))
    assert "encrypted" in _sentence(path)


def test_a_scanned_pdf_is_refused(tmp_path: Path) -> None:
    assert "ocrmypdf" in _sentence(_write(tmp_path, "a.pdf", _pdf("", "")))


@pytest.mark.parametrize("data", [b"%PDF-1.4\nnothing", b"no pdf at all", _pdf("Clause 7")[:200]])
def test_a_broken_pdf_is_refused_without_noise(tmp_path: Path, data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    assert "broken or not a PDF" in _sentence(_write(tmp_path, "a.pdf", data))
    assert capfd.readouterr().err == ""


def test_a_word_document_becomes_markdown(tmp_path: Path) -> None:
    row = "<w:tr>" + "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>" * 2 + "</w:tr>"
    table = "<w:tbl>" + row.format("month", "rent") + row.format("May", "750") + "</w:tbl>"
    body = PARAGRAPH.format("Heading1", "Lease") + PARAGRAPH.format("Normal", "Größe_of_flat: 3 * 4 &lt;m&gt;")
    text = read_document(_write(tmp_path, "a.docx", _docx(body + table))).text
    assert text.startswith("# Lease\n\nGröße_of_flat: 3 * 4 ")
    assert re.search(r"\| month +\| rent +\|", text)
    assert re.search(r"\| May +\| 750 +\|", text)


def test_a_broken_word_document_is_refused(tmp_path: Path) -> None:
    good = _docx(PARAGRAPH.format("Normal", "hello"))
    for data in (b"no zip", good[:100], _zip("other.xml", "<a/>"), good.replace(b"word", b"wort")):
        assert "broken or not a Word document" in _sentence(_write(tmp_path, "a.docx", data))


def test_a_protected_word_document_is_refused(tmp_path: Path) -> None:
    data = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500)
    assert "protected Word document" in _sentence(_write(tmp_path, "a.docx", data))


def test_a_word_document_without_text_is_refused(tmp_path: Path) -> None:
    assert "no text" in _sentence(_write(tmp_path, "a.docx", _docx("<w:p/>")))


def test_a_word_document_that_unpacks_too_far_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_BYTES", 2**20)
    path = _write(tmp_path, "a.docx", _docx(PARAGRAPH.format("Normal", "x" * 2**21)))
    assert "unpacks to over 1 MiB" in _sentence(path)


def test_a_page_becomes_markdown_without_its_scripts(tmp_path: Path) -> None:
    page = (
        "<html><head><title>Lease</title><style>p {color: red}</style></head><body><h1>Lease</h1>"
        "<p>Rent is <b>750</b> euros,\n due <a href='x.html'>monthly</a>.</p><ul><li>no cats</li></ul>"
        "<script>alert('x')</script><img src='data:image/png;base64,AAAA'></body></html>"
    )
    text = read_document(_write(tmp_path, "a.HTML", page.encode())).text
    assert "# Lease\n\nRent is **750** euros," in text
    assert "- no cats" in text
    assert not any(word in text for word in ("color", "alert", "base64", "<"))


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("", "utf-8"),
        ("", "utf-8-sig"),
        ("<meta charset='iso-8859-1'>", "iso-8859-1"),
        ("<meta charset='iso-8859-1'>", "utf-8"),  # a false declaration
    ],
)
def test_a_page_is_read_in_its_encoding(tmp_path: Path, declared: str, encoding: str) -> None:
    page = f"<html><head>{declared}</head><body><p>Größe naïve</p></body></html>"
    assert read_document(_write(tmp_path, "a.htm", page.encode(encoding))).text == "Größe naïve\n"


def test_a_page_without_text_is_refused(tmp_path: Path) -> None:
    assert "no text" in _sentence(_write(tmp_path, "a.html", b"<html><script>x</script></html>"))


def test_a_page_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    page = b"<div>" * 20_000 + b"hello"
    assert "HTML" in _sentence(_write(tmp_path, "a.html", page))


@pytest.mark.parametrize(("name", "missing"), [("a.pdf", "pypdf"), ("a.docx", "mammoth"), ("a.html", "bs4")])
def test_a_missing_library_is_named_by_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert "pip install 'kv-compactor[documents]'" in _sentence(_write(tmp_path, name, b"<p>hello</p>"))


# --- what a folder offers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "meant"),
    [
        ("a.txt", b"hello", True),
        ("latin1.txt", b"Gr\xf6\xdfe", True),  # read_document says what is wrong with it
        ("a.pdf", b"%PDF-1.4", True),
        ("a.docx", b"PK\x03\x04", True),
        ("~$a.docx", b"\x05Ann", False),
        ("empty.py", b"", False),
        ("a.png", b"\x89PNG", False),
        ("a.bin", b"a\x00b", False),
        ("a.zip", b"PK\x03\x04", False),
    ],
)
def test_binary_and_blank_files_are_not_meant_to_be_read(tmp_path: Path, name: str, data: bytes, meant: bool) -> None:
    assert is_document(Path(_write(tmp_path, name, data))) is meant


def _zip(name: str, text: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, text)
    return data.getvalue()
