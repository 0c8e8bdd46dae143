"""Claims about the rows of ``compactor bench kernels`` beside those of `biased_decode`: the ways do the same work, its
least is counted rightly, and errors show. Kernels run compiled where there is a GPU, else in Triton's interpreter, in a
process of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import Command
from interpreter import assert_passes_interpreted

from compactor.bench import kernel_jobs
from compactor.bench.kernel_jobs import Job, Numbers, Way, count_sets, hidden_sizes, time_jobs
from compactor.bench.report import Row, Work
from compactor.bench.timing import Timing
from compactor.bench.workloads import KERNELS, KernelSettings
from compactor.kernel_trial import TRIALS
from compactor.types import SilentReporter

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
CPU = torch.device("cpu")
SETTINGS = KernelSettings(
    keys=96,
    keep=12,
    rows=50,
    hidden=40,
    spread=4.0,
    heads=4,
    kv_heads=2,
    head_dim=16,
    batches=(1, 3),
    q_len=2,
    repeats=1,
)
OTHERS = tuple(name for name in KERNELS if name != "biased_decode")

# Counted by hand for the sizes above in float32: 2 query heads a KV head, so 100 rows of each; 5 and 19 kept keys in
# the ragged heads; first the operations, then the bytes.
WORK = {
    # rows see 101 and 102 columns; 102 keys and values; queries, document and outputs of 8 rows, and two lse
    "tail_decode": [
        (b * 4 * 16 * 4 * (101 + 102), b * (2 * 2 * 102 * 16 * 4 + 3 * 8 * 16 * 4 + 2 * 8 * 4)) for b in (1, 3)
    ],
    # 6 vectors of a row read and written, cos and sin read
    "rotary": [(0, rows * (2 * 6 + 2) * 16 * 4) for rows in (1 * 2, 3 * 2, 50)],
    # with limits rows 46 to 63 see 32 keys, rows 64 to 95 see 64
    "attention_stats": [
        (2 * 4 * pairs * 16, (4 * 50 + 2 * 96) * 16 * 4 + 4 * 50 * 4 + 2 * 96 * 4)
        for pairs in (50 * 96, 18 * 32 + 32 * 64)
    ],
    # vectors and log-sum-exps: five and five; four, four and a weight; four, two and a weight
    "merge_rows": [
        (0, 200 * (5 * 16 + 5) * 4),
        (0, 200 * (4 * 16 + 4 + 1) * 4 + 2 * (16 + 3) * 4),
        (0, 200 * (4 * 16 + 2 + 1) * 4 + 2 * 2 * 8),
    ],
    # shift and weight of a row; with near share and rest
    "kept_shares": [
        (2 * 2 * 100 * 12 * 16, 2 * ((112 * 16 + 12 + 100 * numbers) * 4 + 100 * 12 * 2)) for numbers in (2, 4)
    ],
    "gram": [
        (2 * 100 * 12 * 13, 2 * (100 * 12 * 4 + 2 * 12 * 12 * 8)),
        (2 * 100 * 2 * 12 * 32, 2 * (100 * (12 + 32) * 4 + 2 * 12 * 32 * 8)),
    ],
    # product, out, near and two halves of a target; two weights; unit and energy of a head; 50 row numbers
    "value_targets": [(0, 200 * (3 * 16 * 4 + 2 * 16 * 2 + 2 * 4) + 2 * (4 + 8) + 50 * 8)],
    # two chunks of 96 keys, all of which are picked: 6 * 12 + 32 are more
    "greedy": [
        (
            2 * (2 * 96 * 96 * 17 + 96 * 96 * 96 + 4 * 96 * 96 * 17),
            2 * (96 * 96 * 4 + 96 * 17 * 4 + 96 * (8 + 4) + 4),
        )
    ],
    # two systems of 12 rows, 12 * 12 * 12 / 3 = 576, and 16 right-hand sides; 78 numbers are half of one
    "cholesky": [(2 * (576 + 2 * 144 * 16), 2 * (78 + 2 * 12 * 16) * 4)],
    # three steps; right-hand side, start and box, read, and the point, written; three numbers; 12 flags
    "nnls": [(2 * 3 * (576 + 2 * 144), 2 * ((78 + 5 * 12 + 3) * 8 + 12))],
    # query, near, out and three numbers of a row; keys, values, biases and two moments, read and written
    "refine_steps": [
        (10 * 100 * 24 * 16, 200 * (3 * 16 + 3) * 4 + 24 * (2 * 16 + 1) * 3 * 2 * 4 + 100 * 8),
    ],
    # 101 keys and values of 2 heads, of which the last is written too; queries, outputs and 32 splits of 4 heads
    "step_decode": [
        (b * 4 * 101 * 4 * 16, b * (2 * 2 * 102 * 16 + 2 * 4 * 16 + 32 * 4 * (16 + 1)) * 4) for b in (1, 3)
    ],
    # 64 + 32 + 32 outputs of 40 inputs, 40, and 152 of two matrices
    "gemv": [
        (2 * rows * matrices * 40, (matrices * 40 + rows * (40 + outputs)) * 4)
        for rows in (1, 2)
        for matrices, outputs in ((128, 128), (40, 40), (2 * 152, 152))
    ],
    # rows and norms, with a sum the addend and the total too; a weight
    "rms_norm": [(0, (1 + rows * vectors) * 40 * 4) for rows in (1 * 2, 3 * 2) for vectors in (2, 4)],
}


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module(KERNELS["attention_stats"]), "CONTEXT_SPAN", 32)


def jobs_of(name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device = CPU) -> list[Job]:
    """The jobs of a kernel, which are not timed."""
    found: list[Job] = []
    module = import_module(KERNELS[name])
    with monkeypatch.context() as patch:
        patch.setattr(module, "time_jobs", lambda kernel, jobs, *_: found.extend(jobs))
        module.rows(SETTINGS.on(device.type), device, SilentReporter())
    return found


def test_every_kernel_that_is_tried_is_timed() -> None:
    assert set(KERNELS) == set(TRIALS) - {"biased_decode_int8"}  # of which biased_decode has rows
    assert set(WORK) == set(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_work_is_the_least_that_the_job_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = [job.work for job in jobs_of(name, monkeypatch)]
    assert [(one.operations, one.bytes) for one in work] == WORK[name]
    assert {one.precision for one in work} == {"float32"}


@pytest.mark.parametrize("name", OTHERS)
def test_twins_are_right_and_what_is_wrong_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in jobs_of(name, monkeypatch):
        numbers = Numbers(CPU, 0)
        inputs, others = job.make(numbers), job.make(numbers)
        (twin,) = job.ways
        assert twin.name.endswith(", twin")
        assert job.error(inputs, twin.call(twin.prepare(inputs))) < 3e-6, twin.name
        assert job.error(inputs, twin.call(twin.prepare(others))) > 0.01, twin.name


@pytest.mark.parametrize("name", OTHERS)
def test_there_is_a_row_for_every_job_and_way(name: str) -> None:
    found = import_module(KERNELS[name]).rows(SETTINGS.on("cpu"), CPU, SilentReporter())
    assert [(sum(w.operations for w in row.work), sum(w.bytes for w in row.work)) for row in found] == WORK[name]
    for row in found:
        assert 0.0 <= row.figures["relative_error"] < 3e-6 and row.timing.runs == 1
        assert {name: row.sizes[name] for name in ("heads", "kv_heads", "head_dim")} == {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
        }


def test_rows_follow_the_device() -> None:
    assert (KernelSettings().on("cuda").rows, KernelSettings().on("cpu").rows) == (8192, 128)
    assert KernelSettings(rows=7).on("cuda").rows == 7
    assert (KernelSettings().on("cuda").hidden, KernelSettings().on("cpu").hidden) == (2560, 256)
    assert KernelSettings(hidden=7).on("cuda").hidden == 7
    assert hidden_sizes(KernelSettings().on("cuda")) == (2560, 9728)  # Qwen3-4B


# ---------------------------------------------------------------------------------------------------------- the timing


def make_job(ways: Sequence[Way], num_bytes: float = 1000.0) -> Job:
    """A job whose inputs are numbers that count up, and whose results are these numbers."""
    drawn: list[int] = []

    def make(_: Numbers) -> int:
        drawn.append(len(drawn))
        return drawn[-1]

    return Job({}, Work(bytes=num_bytes), make, lambda inputs, found: float(abs(found - inputs)), ways)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """How each row was timed, and what its calls gave; there is a GPU with a cache of 1,000 bytes."""
    seen: list[tuple[str, list[int]]] = []

    def measure(run: Any, *_: Any, **__: Any) -> Timing:
        seen.append(("single", [run() for _ in range(10)]))
        return Timing(1.0, 1.0, 1.0, 1)

    def measure_small(calls: Sequence[Any], *_: Any, **__: Any) -> Timing:
        seen.append(("graph", [call() for call in calls]))
        return Timing(1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(kernel_jobs, "measure", measure)
    monkeypatch.setattr(kernel_jobs, "measure_small", measure_small)
    monkeypatch.setattr(kernel_jobs, "cache_bytes", lambda _: 1000)
    monkeypatch.setattr(kernel_jobs, "Numbers", lambda *_: None)
    return seen


def test_small_work_is_replayed_on_several_inputs_unless_it_waits(timed: list[tuple[str, list[int]]]) -> None:
    ways = [Way("one", lambda given: given), Way("two", lambda given: given - 5, lambda given: given + 6, waits=True)]
    rows = time_jobs("x", [make_job(ways)], SETTINGS, torch.device("cuda"), SilentReporter())
    assert timed == [("graph", 8 * [0, 1, 2, 3]), ("single", [1, 2, 3, 4, 1, 2, 3, 4, 1, 2])]
    assert [(row.name, row.figures["relative_error"]) for row in rows] == [("one", 0.0), ("two", 1.0)]


def test_large_work_is_timed_call_by_call_on_inputs_that_no_cache_holds(timed: list[tuple[str, list[int]]]) -> None:
    cuda = torch.device("cuda")
    time_jobs("x", [make_job([Way("one", lambda given: given)], 1e9)], SETTINGS, cuda, SilentReporter())
    assert timed == [("single", 10 * [0])]
    assert [count_sets(num_bytes, cuda) for num_bytes in (0.0, 1.0, 1333.0, 1334.0, 5000.0)] == [512, 512, 4, 3, 1]


def test_what_cannot_run_is_left_out_and_told() -> None:
    class Notes(SilentReporter):
        told: list[str] = []  # noqa: RUF012

        def note(self, message: str) -> None:
            self.told.append(message)

    def fail(_: Any) -> int:
        raise RuntimeError("no kernel\n  for this")

    job = make_job([Way("one", fail), Way("two", lambda given: given)])
    rows = time_jobs("x", [job], SETTINGS, CPU, Notes())
    assert [row.name for row in rows] == ["two"]
    assert Notes.told == ["one cannot run here and is left out: no kernel for this"]


def test_many_sizes_share_a_column(invoke: Command) -> None:
    done = invoke(
        "bench", "kernels", "--kernels", "biased_decode,rotary,greedy", "--keys", "40", "--keep", "4", "--rows", "20",
        "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--batch", "1", "--repeats", "1", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "heads 2, kv heads 1, head dim 8" in lines
    for start in ("rotary, twin batch 1, rows 20 ", "greedy, twin keys 40, problems 1, picks 40 "):
        assert sum(line.startswith(start) for line in lines) == 2, "once with times, once with figures"
    assert not any("…" in line for line in lines)


# --------------------------------------------------------------------------------------------------------- the kernels


class TestKernelWays:
    """Collected where the kernels can run: compiled on a GPU, or in the interpreter's own process."""

    __test__ = COMPILED or INTERPRETED

    @pytest.mark.parametrize("name", OTHERS)
    def test_kernels_do_the_same_work_as_their_twins(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module = import_module(KERNELS[name])
        if INTERPRETED:
            monkeypatch.setattr(module, "kernel_runs" if name == "gram" else "usable", lambda *_: True)
        device = torch.device("cuda" if COMPILED else "cpu")
        rows: list[Row] = module.rows(SETTINGS.on(device.type), device, SilentReporter())
        names = {row.name for row in rows}
        assert {f"{one}, twin" for one in names if not one.endswith((", twin", ", torch"))} == {
            one for one in names if one.endswith(", twin")
        }
        for row in rows:
            assert row.figures["relative_error"] < 0.02, row.name


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestKernelWays")
