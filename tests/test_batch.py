"""A folder is compacted as far as it can be, and only what changed is compacted again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compactor import output
from compactor.batch.manifest import MANIFEST_NAME, Manifest, Record
from compactor.batch.runner import Plan, find_jobs, open_manifest, plan_batch, run_batch, settings_digest
from compactor.cache_file import FileSizes, read_metadata, save_cache
from compactor.document import Document
from compactor.errors import DocumentError, MemoryShortError, OutputError
from compactor.types import CacheMetadata, LayerCache, ModelIdentity

SETTINGS = "0" * 64


@dataclass
class FakeCache:
    """A real file of one layer and head that keeps one key."""

    metadata: CacheMetadata

    def save(self, path: Path, *, force: bool = False) -> FileSizes:
        import torch

        layer = LayerCache(
            keys=torch.zeros(1, 2),
            values=torch.zeros(1, 2),
            biases=torch.zeros(1),
            positions=torch.zeros(1, dtype=torch.int32),
            offsets=torch.tensor([0, 1], dtype=torch.int32),
        )
        return save_cache(path, [layer], self.metadata, force=force)


@dataclass
class FakeCompact:
    """Compacts nothing, remembers what it was asked for, and raises for the documents of ``failures``."""

    failures: dict[str, BaseException] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def __call__(self, document: Document) -> FakeCache:
        self.seen.append(document.name)
        if document.name in self.failures:
            raise self.failures[document.name]
        identity = ModelIdentity("fake", None, "llama", "c", "w", "t", "h", 1, 1, 1, 2)
        return FakeCache(
            CacheMetadata(
                model=identity,
                dtype="float32",
                logical_length=11,
                prefix_length=1,
                position_scheme="contiguous",
                sliding_windows=[None],
                system=None,
                thinking=False,
                document_name=document.name,
                document_sha256=document.sha256,
                document_tokens=10,
                settings={},
                seed=0,
                tool_version="0",
                report={"kept_keys": 1, "document_keys": 10},
            )
        )


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of three texts, one of them below."""
    folder = tmp_path / "docs"
    _write(folder, {"a.txt": "alpha", "b.md": "beta", "sub/c.py": "gamma = 1"})
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "caches"


def _write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _names(root: Path, out: Path, **options: Any) -> list[str]:
    return [job.name for job in find_jobs(root, out, **options).jobs]


def _run(docs: Path, out: Path, compact: FakeCompact | None = None, **options: Any) -> dict[str, Record]:
    """Run the batch; return the records by name."""
    return {record.input: record for record in _iterate(docs, out, compact or FakeCompact(), **options)}


def _iterate(docs: Path, out: Path, compact: FakeCompact, **options: Any) -> Iterator[Record]:
    options.setdefault("settings_sha256", SETTINGS)
    return run_batch(find_jobs(docs, out), open_manifest(out), compact, **options)


def _statuses(records: dict[str, Record]) -> dict[str, str]:
    return {name: record.status for name, record in records.items()}


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / MANIFEST_NAME).read_text().splitlines()]


# --- which files --------------------------------------------------------------------------------------------


def test_outputs_mirror_the_tree(docs: Path, out: Path) -> None:
    batch = find_jobs(docs, out)
    assert [job.name for job in batch.jobs] == ["a.txt", "b.md", "sub/c.py"]
    assert [job.output for job in batch.jobs] == [out / "a.txt.kv", out / "b.md.kv", out / "sub" / "c.py.kv"]


def test_files_of_one_stem_have_their_own_outputs(docs: Path, out: Path) -> None:
    _write(docs, {"a.md": "other", "a": "third", "A.txt": "fourth"})
    outputs = [job.output for job in find_jobs(docs, out).jobs]
    assert len(set(outputs)) == len(outputs) == 6


def test_binary_blank_and_hidden_files_are_passed_over(docs: Path, out: Path) -> None:
    _write(docs, {"x.png": b"\x89PNG", "y.bin": b"a\x00", "empty.py": "", ".hidden": "x", ".git/config": "x"})
    _write(docs, {"old.kv": "text", "~$d.docx": "x"})
    assert _names(docs, out) == ["a.txt", "b.md", "sub/c.py"]


def test_a_pattern_takes_binary_files_too_so_that_they_fail_aloud(docs: Path, out: Path) -> None:
    _write(docs, {"x.png": b"\x89PNG"})
    assert _names(docs, out, patterns=["*.png"]) == ["x.png"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*.txt"], ["a.txt"]),
        (["*.txt", "*.py"], ["a.txt", "sub/c.py"]),
        (["sub/*"], ["sub/c.py"]),
        (["./sub/*.py"], ["sub/c.py"]),
        (["**/*.txt"], ["a.txt"]),
        (["[ab].*"], ["a.txt", "b.md"]),
    ],
)
def test_patterns_match_names_and_paths(docs: Path, out: Path, patterns: list[str], names: list[str]) -> None:
    assert _names(docs, out, patterns=patterns) == names


@pytest.mark.parametrize("exclude", ["sub", "sub/", "sub/*", "*.py", "**/c.py"])
def test_excluded_files_and_folders_are_left_out(docs: Path, out: Path, exclude: str) -> None:
    assert _names(docs, out, exclude=[exclude]) == ["a.txt", "b.md"]


def test_subfolders_are_left_out_on_request(docs: Path, out: Path) -> None:
    assert _names(docs, out, recursive=False) == ["a.txt", "b.md"]


def test_an_output_folder_inside_is_never_compacted(docs: Path) -> None:
    out = docs / "caches"
    assert list(_run(docs, out)) == ["a.txt", "b.md", "sub/c.py"]
    _write(out, {"notes.txt": "lies among the caches"})
    assert set(_statuses(_run(docs, out)).values()) == {"skipped"}


def test_the_folder_itself_may_take_the_outputs(docs: Path) -> None:
    assert list(_run(docs, docs)) == ["a.txt", "b.md", "sub/c.py"]
    assert (docs / "sub" / "c.py.kv").exists()
    assert _statuses(_run(docs, docs)) == dict.fromkeys(["a.txt", "b.md", "sub/c.py"], "skipped")


def test_a_manifest_of_another_program_is_a_document(docs: Path, out: Path) -> None:
    _write(docs, {MANIFEST_NAME: '{"a": 1}'})
    assert MANIFEST_NAME in _names(docs, out)


def test_linked_folders_are_not_followed_so_that_no_loop_is(docs: Path, out: Path) -> None:
    (docs / "sub" / "up").symlink_to(docs)
    (docs / "self").symlink_to(docs / "self")
    assert _names(docs, out) == ["a.txt", "b.md", "self", "sub/c.py"]
    assert _run(docs, out)["self"].error == "DocumentError"


def test_linked_files_are_documents(docs: Path, out: Path, tmp_path: Path) -> None:
    _write(tmp_path, {"elsewhere.txt": "delta"})
    (docs / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    assert _run(docs, out)["link.txt"].status == "done"


def test_pipes_are_passed_over(docs: Path, out: Path) -> None:
    os.mkfifo(docs / "pipe")
    assert "pipe" not in _names(docs, out, patterns=["*"])


@pytest.mark.parametrize(
    ("name", "sentence"), [("missing", "does not exist"), ("a.txt", "is a file"), ("void", "no document")]
)
def test_a_folder_without_documents_is_refused(docs: Path, out: Path, name: str, sentence: str) -> None:
    (docs / "void").mkdir()
    with pytest.raises(DocumentError, match=sentence):
        find_jobs(docs / name, out)


def test_a_pattern_that_matches_nothing_is_named(docs: Path, out: Path) -> None:
    with pytest.raises(DocumentError, match=r"\*\.rst"):
        find_jobs(docs, out, patterns=["*.rst"])


# --- one run ------------------------------------------------------------------------------------------------


def test_every_document_becomes_a_sound_file_and_a_line(docs: Path, out: Path) -> None:
    records = _run(docs, out)
    assert _statuses(records) == dict.fromkeys(["a.txt", "b.md", "sub/c.py"], "done")
    metadata, _ = read_metadata(out / "sub" / "c.py.kv")
    assert metadata.document_name == "c.py"
    lines = _lines(out)
    assert [line["input"] for line in lines] == list(records)
    record = records["sub/c.py"]
    assert record.output == "sub/c.py.kv"
    assert record.bytes == (out / "sub" / "c.py.kv").stat().st_size
    assert (record.document_tokens, record.kept_keys, record.document_keys) == (10, 1, 10)
    assert lines[-1] == {**lines[-1], "status": "done", "root": str(docs), "error": None, "message": None}


@pytest.mark.parametrize(
    "failure",
    [DocumentError("too long"), MemoryShortError("lower --chunk"), RuntimeError("a bug"), MemoryError()],
)
def test_a_failure_does_not_stop_the_rest(docs: Path, out: Path, failure: Exception) -> None:
    compact = FakeCompact({"b.md": failure})
    records = _run(docs, out, compact)
    assert _statuses(records) == {"a.txt": "done", "b.md": "failed", "sub/c.py": "done"}
    assert compact.seen == ["a.txt", "b.md", "c.py"]
    assert records["b.md"].error == type(failure).__name__
    assert records["b.md"].message == str(failure)
    assert not (out / "b.md.kv").exists()


def test_a_document_that_cannot_be_read_does_not_stop_the_rest(docs: Path, out: Path) -> None:
    _write(docs, {"b.md": "Größe".encode("latin1")})
    (docs / "gone.txt").symlink_to(docs / "nowhere")
    compact = FakeCompact()
    records = _run(docs, out, compact)
    assert compact.seen == ["a.txt", "c.py"]
    assert "not UTF-8" in str(records["b.md"].message)
    assert records["b.md"].input_sha256 is not None
    assert "does not exist" in str(records["gone.txt"].message)
    assert records["gone.txt"].input_sha256 is None


def test_the_caller_describes_failures(docs: Path, out: Path) -> None:
    compact = FakeCompact({"b.md": RuntimeError("x")})
    records = _run(docs, out, compact, describe=lambda failure: f"told: {failure}")
    assert records["b.md"].message == "told: x"


def test_only_documents_that_are_compacted_are_announced(docs: Path, out: Path) -> None:
    announced: list[tuple[int, str]] = []
    announce = lambda index, job: announced.append((index, job.name))  # noqa: E731
    _run(docs, out, announce=announce)
    _write(docs, {"b.md": "changed"})
    _run(docs, out, announce=announce)
    assert announced == [(0, "a.txt"), (1, "b.md"), (2, "sub/c.py"), (1, "b.md")]


def test_interruption_keeps_what_is_done_and_the_next_run_goes_on(docs: Path, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(docs, out, FakeCompact({"b.md": KeyboardInterrupt()}))
    assert [line["input"] for line in _lines(out)] == ["a.txt"]
    compact = FakeCompact()
    assert _statuses(_run(docs, out, compact)) == {"a.txt": "skipped", "b.md": "done", "sub/c.py": "done"}
    assert compact.seen == ["b.md", "c.py"]


def test_a_record_is_on_the_disk_before_the_next_document_begins(docs: Path, out: Path) -> None:
    for count, record in enumerate(_iterate(docs, out, FakeCompact()), start=1):
        assert len(_lines(out)) == count
        assert _lines(out)[-1]["input"] == record.input


def test_an_output_that_cannot_be_written_is_refused_before_the_work(docs: Path, out: Path) -> None:
    (out / "sub").parent.mkdir()
    (out / "sub").write_text("a file where a folder must be")
    compact = FakeCompact()
    records = _run(docs, out, compact)
    assert records["sub/c.py"].error == "OutputError"
    assert compact.seen == ["a.txt", "b.md"]


# --- the next run -------------------------------------------------------------------------------------------


def test_unchanged_documents_are_skipped_again_and_again(docs: Path, out: Path) -> None:
    first = _run(docs, out)
    compact = FakeCompact()
    for _ in range(2):
        again = _run(docs, out, compact)
        assert set(_statuses(again).values()) == {"skipped"}
        assert {name: record.bytes for name, record in again.items()} == {
            name: record.bytes for name, record in first.items()
        }
    assert compact.seen == []
    assert len(_lines(out)) == 9


def test_a_changed_document_is_compacted_again(docs: Path, out: Path) -> None:
    _run(docs, out)
    _write(docs, {"b.md": "beta, changed"})
    assert _statuses(_run(docs, out)) == {"a.txt": "skipped", "b.md": "done", "sub/c.py": "skipped"}


def test_a_touched_document_is_not(docs: Path, out: Path) -> None:
    _run(docs, out)
    os.utime(docs / "a.txt", (1, 1))
    assert _run(docs, out)["a.txt"].status == "skipped"


def test_other_settings_compact_everything_again(docs: Path, out: Path) -> None:
    _run(docs, out)
    assert set(_statuses(_run(docs, out, settings_sha256="1" * 64)).values()) == {"done"}


def test_force_compacts_everything_again(docs: Path, out: Path) -> None:
    _run(docs, out)
    assert set(_statuses(_run(docs, out, force=True)).values()) == {"done"}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 40), lambda path: _flip(path)])
def test_a_missing_or_damaged_output_is_made_again(docs: Path, out: Path, damage: Callable[[Path], object]) -> None:
    _run(docs, out)
    damage(out / "a.txt.kv")
    assert _statuses(_run(docs, out))["a.txt"] == "done"
    read_metadata(out / "a.txt.kv")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_a_failed_document_is_tried_again(docs: Path, out: Path) -> None:
    _run(docs, out, FakeCompact({"b.md": DocumentError("x")}))
    assert _statuses(_run(docs, out)) == {"a.txt": "skipped", "b.md": "done", "sub/c.py": "skipped"}


def test_a_failure_does_not_forget_the_output_that_is_there(docs: Path, out: Path) -> None:
    _run(docs, out)
    _write(docs, {"b.md": "too long"})
    assert _run(docs, out, FakeCompact({"b.md": DocumentError("x")}))["b.md"].status == "failed"
    _write(docs, {"b.md": "beta"})
    assert _run(docs, out)["b.md"].status == "skipped"


def test_a_new_document_is_compacted(docs: Path, out: Path) -> None:
    _run(docs, out)
    _write(docs, {"d.txt": "delta"})
    compact = FakeCompact()
    _run(docs, out, compact)
    assert compact.seen == ["d.txt"]


def test_a_foreign_file_in_the_place_of_an_output_is_kept(docs: Path, out: Path) -> None:
    _write(out, {"a.txt.kv": "someone's notes"})
    for _ in range(2):
        records = _run(docs, out)
        assert records["a.txt"].error == "OutputError"
        assert "--force" in str(records["a.txt"].message)
        assert (out / "a.txt.kv").read_text() == "someone's notes"
    assert _run(docs, out, force=True)["a.txt"].status == "done"


def test_an_output_whose_record_was_lost_is_replaced(docs: Path, out: Path) -> None:
    _run(docs, out)
    (out / MANIFEST_NAME).unlink()
    assert set(_statuses(_run(docs, out)).values()) == {"done"}


def test_an_output_of_another_folder_is_kept(docs: Path, out: Path, tmp_path: Path) -> None:
    _run(docs, out)
    other = tmp_path / "other"
    _write(other, {"a.txt": "another text", "b.md": "beta"})
    before = (out / "a.txt.kv").read_bytes()
    records = _run(other, out)
    assert str(docs) in str(records["a.txt"].message)
    assert (out / "a.txt.kv").read_bytes() == before
    assert records["b.md"].status == "skipped"  # the same bytes: nothing is lost
    assert _run(other, out, force=True)["a.txt"].status == "done"


def test_the_digest_depends_on_settings_and_model_only() -> None:
    digest = settings_digest({"seed": 0, "chunk": 1}, model={"weights": "w"})
    assert digest == settings_digest({"chunk": 1, "seed": 0}, model={"weights": "w"})
    assert digest != settings_digest({"chunk": 1, "seed": 1}, model={"weights": "w"})
    assert digest != settings_digest({"chunk": 1, "seed": 0}, model={"weights": "v"})


# --- the plan -----------------------------------------------------------------------------------------------


def test_a_plan_tells_what_the_run_then_does(docs: Path, out: Path) -> None:
    _run(docs, out)
    _write(docs, {"b.md": "changed", "d.txt": "long", "e.txt": b"Gr\xf6\xdfe"})
    _write(out, {"f.txt.kv": "foreign"})
    _write(docs, {"f.txt": "text"})

    def count_tokens(document: Document) -> int:
        if document.name == "d.txt":
            raise DocumentError("too long")
        return 7

    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    plans = list(plan_batch(find_jobs(docs, out), open_manifest(out), count_tokens, settings_sha256=SETTINGS))
    assert plans[:4] == [
        Plan("a.txt", "skip", 10),
        Plan("b.md", "compact", 7),
        Plan("d.txt", "fail", message="too long"),
        Plan("e.txt", "fail", message=plans[3].message),
    ]
    assert [plan.action for plan in plans[4:]] == ["fail", "skip"]
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before
    compact = FakeCompact({"d.txt": DocumentError("too long")})
    expected = {"skip": "skipped", "compact": "done", "fail": "failed"}
    assert _statuses(_run(docs, out, compact)) == {plan.input: expected[plan.action] for plan in plans}


# --- the manifest -------------------------------------------------------------------------------------------


def _record(name: str, **values: Any) -> Record:
    return Record(name, name + ".kv", values.pop("status", "done"), "/docs", "a" * 64, SETTINGS, **values)


def test_the_last_record_that_did_not_fail_describes_the_output(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    manifest = Manifest(path)
    manifest.append(_record("a", bytes=1))
    manifest.append(_record("b", bytes=2))
    manifest.append(_record("a", bytes=3))
    manifest.append(_record("a", status="failed"))
    for reread in (manifest, Manifest(path)):
        assert reread.made("a") == _record("a", bytes=3)
        assert reread.made("b") == _record("b", bytes=2)
        assert reread.made("c") is None


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_torn_last_line_is_passed_over_and_not_written_to(tmp_path: Path, cut: int) -> None:
    path = tmp_path / MANIFEST_NAME
    for name in ("a", "b"):
        Manifest(path).append(_record(name))
    os.truncate(path, path.stat().st_size - cut)
    manifest = Manifest(path)
    assert manifest.made("a") is not None
    manifest.append(_record("c"))
    reread = Manifest(path)
    assert reread.made("a") is not None
    assert reread.made("c") is not None
    assert (reread.made("b") is not None) == (cut == 1)  # only its line end was lost


def test_lines_of_other_programs_and_newer_releases_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    Manifest(path).append(_record("a"))
    newer = json.loads(path.read_text()) | {"input": "b", "new_field": [1]}
    with path.open("ab") as stream:
        stream.write(b'{"other": 1}\n[1]\nnull\n\xff\xfe\n"text"\n' + json.dumps(newer).encode() + b"\n")
    manifest = Manifest(path)
    assert manifest.made("a") is not None
    assert manifest.made("b") is not None


def test_names_that_are_no_text_survive(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    name = os.fsdecode(b"caf\xe9.txt")
    Manifest(path).append(_record(name))
    assert Manifest(path).made(name) is not None


def test_a_disk_that_fills_up_stops_the_batch_with_a_sentence(
    docs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = _iterate(docs, out, FakeCompact())
    next(records)
    monkeypatch.setattr(output.os, "write", lambda _descriptor, data: len(data) // 2)
    with pytest.raises(OutputError, match=MANIFEST_NAME):
        Manifest(out / MANIFEST_NAME).append(_record("b"))


def test_the_manifest_is_its_owners_alone(docs: Path, out: Path) -> None:
    _run(docs, out)
    assert (out / MANIFEST_NAME).stat().st_mode & 0o077 == 0


def test_an_output_folder_that_cannot_be_made_is_refused(docs: Path) -> None:
    with pytest.raises(OutputError, match="cannot be made"):
        open_manifest(docs / "a.txt" / "caches")


def test_finding_and_planning_need_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; import compactor.batch.runner, compactor.cli.batch;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the command --------------------------------------------------------------------------------------------

Command = Callable[..., "Ran"]


@dataclass
class Ran:
    """What a command left behind."""

    exit_code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import make_tiny

    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny", num_layers=1, window=256)


@pytest.fixture
def batch_command(docs: Path, out: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run batch-compact on ``docs`` with a tiny model; return exit code and output."""
    from compactor.cli.app import load_command, run

    def call(*arguments: str, model: Path = tiny) -> Ran:
        given = [str(docs), "-o", str(out), "-m", str(model), "--queries", "context", "--reserve", "64"]
        with pytest.raises(SystemExit) as stop:
            run("batch-compact", lambda: load_command("batch"), [*given, *arguments])
        captured = capsys.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return call


def test_the_command_compacts_a_folder_for_real(docs: Path, out: Path, batch_command: Command) -> None:
    _write(docs, {"b.md": "Größe".encode("latin1"), "sub/long.txt": "rent " * 2000})
    ran = batch_command("--keep-ratio", "0.5")
    assert ran.exit_code == 9
    assert "2 of 4 documents failed" in ran.err
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.kv")} == {"a.txt.kv", "sub/c.py.kv"}
    metadata, table = read_metadata(out / "sub" / "c.py.kv")
    assert metadata.settings["keep_ratio"] == 0.5
    assert sum(table.sizes) == (out / "sub" / "c.py.kv").stat().st_size
    for part in ("b.md", "iconv", "too many for the model's window of 256", "unchanged"):
        assert (part in ran.out) == (part != "unchanged")
    assert ran.out.splitlines()[-1].startswith("2 done, 2 failed; ")


def test_the_command_skips_what_is_unchanged_until_settings_or_model_change(
    docs: Path, batch_command: Command, tmp_path: Path
) -> None:
    from tiny_models import make_tiny

    def statuses(*arguments: str, **options: Path) -> set[str]:
        ran = batch_command("--json", *arguments, **options)
        assert ran.exit_code == 0
        return {document["status"] for document in json.loads(ran.out)["documents"]}

    assert statuses() == {"done"}
    assert statuses() == {"skipped"}
    assert statuses("--keep-ratio", "0.1") == {"skipped"}  # the default, given
    assert statuses("--keep-ratio", "0.5") == {"done"}
    assert statuses("--keep-ratio", "0.5", "--dtype", "bfloat16") == {"done"}
    other = make_tiny("llama", tmp_path / "other", num_layers=1, window=256, seed=1)
    assert statuses(model=other) == {"done"}
    other.rename(tmp_path / "moved")
    assert statuses(model=tmp_path / "moved") == {"skipped"}
    assert statuses("--force", model=tmp_path / "moved") == {"done"}


def test_a_dry_run_writes_nothing(docs: Path, out: Path, batch_command: Command) -> None:
    _write(docs, {"long.txt": "rent " * 2000})
    ran = batch_command("--dry-run")
    assert ran.exit_code == 0
    assert ran.out.splitlines()[-1] == "3 to compact, 1 would fail"
    assert not out.exists()


def test_fail_fast_stops_at_the_first_failure(docs: Path, out: Path, batch_command: Command) -> None:
    _write(docs, {"a.txt": b"Gr\xf6\xdfe"})
    ran = batch_command("--fail-fast")
    assert ran.exit_code == 9
    assert "1 of 3 documents failed and 2 were not tried" in ran.err
    assert len(_lines(out)) == 1


def test_ctrl_c_leaves_the_manifest_and_says_how_to_go_on(
    docs: Path, out: Path, batch_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compactor import pipeline

    compact = pipeline.compact

    def interrupted(document: Document, *rest: Any) -> Any:
        if document.name == "b.md":
            raise KeyboardInterrupt
        return compact(document, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compact", interrupted)
        ran = batch_command()
    assert ran.exit_code == 130
    assert "interrupted after 1 of 3 documents" in ran.err
    assert [line["status"] for line in _lines(out)] == ["done"]
    assert sorted(path.name for path in out.rglob("*")) == ["a.txt.kv", MANIFEST_NAME]
    assert batch_command().exit_code == 0
    assert [line["status"] for line in _lines(out)[1:]] == ["skipped", "done", "done"]


def test_memory_that_runs_out_names_what_to_lower_and_goes_on(
    batch_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compactor import pipeline

    compact = pipeline.compact

    def out_of_memory(document: Document, *rest: Any) -> Any:
        if document.name == "b.md":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return compact(document, *rest)

    monkeypatch.setattr(pipeline, "compact", out_of_memory)
    ran = batch_command()
    assert ran.exit_code == 9
    assert "lower --prefill-chunk" in ran.out
    assert "2 done, 1 failed" in ran.out


def test_quiet_tells_only_failures(docs: Path, batch_command: Command) -> None:
    assert batch_command("--quiet").err == ""
    _write(docs, {"b.md": b"Gr\xf6\xdfe"})
    lines = batch_command("--quiet").err.splitlines()
    assert len(lines) == 2
    assert "b.md: failed" in lines[0]
    assert lines[1].startswith("error: 1 of 3")


def test_control_characters_of_a_name_never_reach_the_terminal(docs: Path, batch_command: Command) -> None:
    name = os.fsdecode(b"\x1b[31m\n\xe9.txt")
    _write(docs, {name: b"Gr\xf6\xdfe"})
    ran = batch_command()
    assert "?[31m??.txt" in ran.out
    assert not any(char in ran.out + ran.err for char in ("\x1b", "\udce9"))
    documents = json.loads(batch_command("--json").out)["documents"]
    assert name in [document["input"] for document in documents]


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["--keep-ratio", "2"], 2), (["--exclude", "*"], 3), (["--model", "/nowhere/model"], 4)],
)
def test_bad_arguments_have_their_exit_codes(batch_command: Command, arguments: list[str], exit_code: int) -> None:
    ran = batch_command(*arguments)
    assert ran.exit_code == exit_code
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert ran.out == ""


def test_ctrl_c_stops_the_real_process_within_a_document(docs: Path, out: Path, tiny: Path) -> None:
    _write(docs, {"b.md": "The tenant shall pay rent. " * 30})
    arguments = [
        str(docs),
        "-o",
        str(out),
        "-m",
        str(tiny),
        "--reserve",
        "64",
        "--self-study-tokens",
        "20000",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "compactor", "batch", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("self-study"):  # of the first document
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert rest.splitlines()[-1].startswith("error: interrupted after 0 of 3 documents")
    assert [path for path in out.rglob("*") if path.is_file()] == []
