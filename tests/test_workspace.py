"""Claims about the workspace: a bound makes less be done at once, changes no result, and is refused where it cannot
hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Command
from test_pipeline import document, quick, tiny

from compactor import attention, estimate, pipeline, sampling, study, workspace
from compactor.config import CompactSettings
from compactor.errors import MemoryShortError, SettingsError
from compactor.job import prepare
from compactor.study import Study, held_bytes, pass_rows, prefill_document

CPU = torch.device("cpu")


@pytest.fixture
def tiny_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds as small as tiny models need."""
    monkeypatch.setattr(workspace, "LEAST_BYTES", 1000)
    monkeypatch.setattr(study, "LEAST_ROWS", 16)


def test_without_a_bound_everything_has_its_usual_size(tmp_path: Path) -> None:
    loaded = tiny(tmp_path)
    assert workspace.bound() is None
    assert attention.block_elements(CPU) == attention.CPU_BLOCK_ELEMENTS
    assert held_bytes() == study.GRAM_BYTES
    job = prepare(document(), loaded, CompactSettings())
    assert pass_rows(Study(job, prefill_document(job))) == study.GRAM_ROWS


def test_a_bound_leaves_each_part_its_share_and_ends_with_its_block(tmp_path: Path, tiny_bounds: None) -> None:
    loaded = tiny(tmp_path)
    job = prepare(document(), loaded, CompactSettings())
    asked = Study(job, prefill_document(job))
    free = sampling.rows_at_once(loaded, 10)
    for num_bytes in (1 << 20, 1 << 22):
        with workspace.bounded(num_bytes):
            assert 4 * attention.block_elements(CPU) == num_bytes // 16
            assert held_bytes() == num_bytes // 4
            assert pass_rows(asked) * study.row_bytes(job) <= num_bytes // 2
            per_token = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * 4
            assert sampling.rows_at_once(loaded, 10) * 10 * per_token <= num_bytes // 3 < free * 10 * per_token
    assert workspace.bound() is None and sampling.rows_at_once(loaded, 10) == free
    with pytest.raises(ZeroDivisionError), workspace.bounded(1 << 20):
        _ = 1 / 0
    assert workspace.bound() is None


@pytest.mark.parametrize("num_bytes", [-1, 0, 100_000_000])
def test_a_bound_too_small_to_work_in_is_refused(num_bytes: int) -> None:
    with pytest.raises(SettingsError, match="the least is 250,000,000"), workspace.bounded(num_bytes):
        pass


@pytest.mark.parametrize("method", ["fast", "balanced"])
def test_a_bounded_compaction_gives_the_same_cache_up_to_rounding(
    method: str, tmp_path: Path, tiny_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny(tmp_path)
    settings = CompactSettings(**quick(method), refine_steps=0 if method == "balanced" else None)
    monkeypatch.setattr(pipeline, "check_workspace", lambda _job: None)
    free = pipeline.compact(document(3), loaded, settings)
    seen: list[int] = []
    elements = attention.block_elements
    monkeypatch.setattr(attention, "block_elements", lambda device: seen.append(elements(device)) or seen[-1])
    with workspace.bounded(1 << 18):
        bounded = pipeline.compact(document(3), loaded, settings)
    assert seen and max(seen) == (1 << 18) // 16 // 4
    assert bounded.metadata.report["kept_keys"] == free.metadata.report["kept_keys"]
    error = "reconstruction_error"
    assert bounded.metadata.report[error] == pytest.approx(free.metadata.report[error], rel=0.02)


def test_a_job_that_cannot_hold_the_bound_is_refused_before_it_begins(
    tmp_path: Path, tiny_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny(tmp_path)
    monkeypatch.setattr(pipeline, "prefill_document", lambda _job: pytest.fail("began"))
    with workspace.bounded(5000), pytest.raises(MemoryShortError, match="lower --self-study-tokens"):
        pipeline.compact(document(), loaded, CompactSettings())


def test_the_estimate_tells_the_workspace_and_follows_a_bound(tmp_path: Path, tiny_bounds: None) -> None:
    loaded = tiny(tmp_path)
    free = estimate.estimate(document(), loaded, CompactSettings())
    assert 0 < free.workspace_bytes < free.peak_bytes
    with workspace.bounded(1 << 20):
        bounded = estimate.estimate(document(), loaded, CompactSettings())
    assert bounded.workspace_bytes < free.workspace_bytes
    assert free.peak_bytes - bounded.peak_bytes == free.workspace_bytes - bounded.workspace_bytes


@pytest.mark.parametrize("words", ["0", "-3", "nan", "0.001"])
def test_the_command_refuses_a_bound_that_is_none(words: str, invoke: Command, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("A contract.")
    for command in (("compact", text), ("batch", tmp_path, "-o", tmp_path / "out"), ("bench", "compact")):
        done = invoke(*command, "--workspace", words)
        assert done.returncode == SettingsError.exit_code and "--workspace is" in done.stderr, done
