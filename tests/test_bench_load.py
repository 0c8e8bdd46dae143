"""Claims about ``compactor bench load``: the file is one that the program reads, times are of what is said, nothing
stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from tiny_models import make_tiny

from compactor.bench import loading
from compactor.bench.random_model import make_random_model
from compactor.bench.report import Ceilings
from compactor.bench.workloads import LoadSettings
from compactor.cache_file import load_cache, save_cache, verify_cache
from compactor.errors import ModelError
from compactor.identity import check_identity
from compactor.model import load_model
from compactor.types import SilentReporter

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, {"float32": 1e12})
SETTINGS = LoadSettings(shape="tiny", tokens=200, keep=0.1, spread=4.0, repeats=2)


class Notes(SilentReporter):
    """Remembers what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, message: str) -> None:
        self.told.append(message)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "measure_ceilings", lambda _: CEILINGS)


# ---------------------------------------------------------------------------------------------------------- the file


def test_the_file_is_one_that_the_model_would_have_made(tmp_path: Path) -> None:
    loaded = make_random_model("tiny", CPU, seed=0, tokens=200)
    layers, metadata = loading.make_cache(SETTINGS, loaded)
    save_cache(tmp_path / "a.kv", layers, metadata)
    verify_cache(tmp_path / "a.kv")
    read, found = load_cache(tmp_path / "a.kv")
    check_identity(found.model, loaded.identity())
    prefix = found.prefix_length
    assert prefix > 0 and found.logical_length == prefix + 200
    assert [sorted(layer.head_lengths) for layer in read] == 2 * [[prefix + 8, prefix + 32]]  # 20 on average, 1 to 4
    assert {layer.keys.dtype for layer in read} == {torch.bfloat16}


def test_layers_that_slide_keep_their_window(tmp_path: Path) -> None:
    loaded = load_model(str(make_tiny("gemma3_text", tmp_path / "model")), device="cpu")
    layers, metadata = loading.make_cache(SETTINGS, loaded)
    save_cache(tmp_path / "a.kv", layers, metadata)
    read, _ = load_cache(tmp_path / "a.kv")
    assert [layer.sliding_window for layer in read] == [16, 16, None]
    assert read[0].head_lengths == [15, 15]


# ---------------------------------------------------------------------------------------------------------- the rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path, list[int]]]:
    """The report, the folder, and the sizes that its file had."""
    folder, sizes = tmp_path_factory.mktemp("files"), list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "measure_ceilings", lambda _: CEILINGS)
        read = loading.read_plainly
        patch.setattr(
            loading, "read_plainly", lambda path, buffer: (sizes.append(path.stat().st_size), read(path, buffer))
        )
        settings = LoadSettings(shape="tiny", tokens=200, keep=0.1, spread=4.0, repeats=2, folder=str(folder))
        yield json.loads(json.dumps(loading.bench_load(settings, CPU, SilentReporter()).to_json())), folder, sizes


def test_there_are_rows_for_reading_loading_and_answering(whole: tuple[dict[str, Any], Path, list[int]]) -> None:
    rows = whole[0]["rows"]
    states = ["cold", "warm"] if sys.platform == "linux" else ["warm"]
    parts = ["map and check", "attach", "first token"]
    expected = [(None, f"{name}, {state}") for state in states for name in ("plain read", "load")]
    for state in states:
        whole_row = f"load to first token, {state}"
        expected += [(None, whole_row), *((whole_row, part) for part in parts)]
    assert [(row["part_of"], row["name"]) for row in rows] == expected
    assert all(row["sizes"] == {"tokens": 200, "kept": 20} and row["runs"] == 2 for row in rows)


def test_bytes_are_those_of_the_file_and_rates_follow(whole: tuple[dict[str, Any], Path, list[int]]) -> None:
    report, _, sizes = whole
    (size,) = set(sizes)
    rows = {row["name"]: row for row in report["rows"]}
    for state in ("cold", "warm") if sys.platform == "linux" else ("warm",):
        plain, load = rows[f"plain read, {state}"], rows[f"load, {state}"]
        for row in (plain, load):
            assert row["figures"]["file_bytes"] == size
            assert row["figures"]["bytes_per_s"] == pytest.approx(size / row["median_s"])
            assert row["figures"]["of_plain_read"] == pytest.approx(plain["median_s"] / row["median_s"])
        assert rows[f"load to first token, {state}"]["figures"]["untimed_first_run_s"] > 0.0


def test_nothing_stays_in_the_folder(whole: tuple[dict[str, Any], Path, list[int]]) -> None:
    assert list(whole[1].iterdir()) == []


def test_a_plain_read_gets_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PIECE", 7)
    data = bytes(range(256)) * 3
    (tmp_path / "file").write_bytes(data)
    buffer = bytearray(len(data))
    loading.read_plainly(tmp_path / "file", memoryview(buffer))
    assert buffer == data


def test_the_file_is_dropped_before_every_cold_run_and_no_warm_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(loading, "drop_from_page_cache", lambda _: events.append("drop") or True)
    (tmp_path / "file").write_bytes(b"x")
    bench = loading._Bench(SETTINGS, make_random_model("tiny", CPU, seed=0, tokens=200), tmp_path / "file", Notes())
    for state, expected in (("cold", ["drop", "run"] * 3), ("warm", ["run"] * 3)):
        events.clear()
        timing = bench._time("it", state, lambda: events.append("run"))
        assert events == expected and timing.runs == 2


def test_a_system_that_cannot_drop_a_file_has_no_cold_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(loading.os, "posix_fadvise", raising=False)
    (tmp_path / "file").write_bytes(b"x")
    notes = Notes()
    bench = loading._Bench(SETTINGS, make_random_model("tiny", CPU, seed=0, tokens=200), tmp_path / "file", notes)
    assert bench.states == ["warm"]
    assert notes.told == ["This system does not let a file be dropped from the page cache: there are no cold rows."]


# ------------------------------------------------------------------------------------------------------ a real model


def test_query_is_timed_as_a_process_that_answers_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = make_tiny("qwen3", tmp_path / "model"), list[list[str]]()

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(words)
        assert load_cache(words[4])[1].model.name == str(folder)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(loading, "describe_machine", lambda _: {})  # it asks git
    monkeypatch.setattr(loading.subprocess, "run", run)
    settings = LoadSettings(model=str(folder), tokens=100, keep=0.1, spread=2.0, repeats=1)
    report = loading.bench_load(settings, CPU, SilentReporter())
    assert report.rows[-1].name == loading.WHOLE_PROCESS and len(calls) == 2
    assert calls[0][:4] == [sys.executable, "-m", "compactor", "query"]
    options = calls[0][5:]
    assert options[0] == loading.QUESTION and {"--offline", "--max-new-tokens", "--device"} < set(options)


def test_a_query_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 5, "", "error: a.kv is damaged.\n")
    monkeypatch.setattr(loading.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"^`query` failed: a.kv is damaged\.$"):
        loading.run_query(tmp_path / "a.kv", CPU)


# -------------------------------------------------------------------------------------------------------- the command


def test_a_folder_that_is_not_there_is_one_sentence(invoke: Command, tmp_path: Path) -> None:
    done = invoke("bench", "load", "--tokens", "100", "--device", "cpu", "--folder", tmp_path / "no", "--quiet")
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith(f"error: No folder can be made in {tmp_path / 'no'}: ")
    assert done.stderr.endswith("; give another --folder.\n") and done.stderr.count("\n") == 1


def test_the_table_shows_rates_and_parts(invoke: Command) -> None:
    done = invoke("bench", "load", "--tokens", "100", "--spread", "2", "--repeats", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "tokens 100, kept 2" in done.stdout
    assert "  first token" in done.stdout and "of plain read" in done.stdout
    assert "write the file ..." in done.stderr and "..." not in done.stdout
