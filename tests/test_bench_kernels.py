"""Claims about ``compactor bench kernels``: everyone does the same work, rightly, on the documents that are said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from conftest import Command

from compactor.bench import biased_decode_rows as decode
from compactor.bench import kernels
from compactor.bench.report import Ceilings, Row
from compactor.bench.synthetic_cache import CacheMaker
from compactor.bench.timing import Timing
from compactor.bench.workloads import KERNELS, KernelSettings
from compactor.types import LayerCache, SilentReporter

CPU = torch.device("cpu")
SIZES = ("--kernels", "biased_decode", "--keys", "96", "--keep", "12", "--spread", "4", "--heads", "4",
         "--kv-heads", "2", "--head-dim", "16", "--batch", "1,3", "--repeats", "2", "--device", "cpu")  # fmt: skip
OURS, MASK, REPEATED = "biased_decode, twin", "SDPA, bias mask", "SDPA, bias mask, keys repeated"


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_ceilings", lambda _: Ceilings(1e9, {"float32": 1e12}))


class Notes(SilentReporter):
    """Remembers what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, message: str) -> None:
        self.told.append(message)


def softmax_attention(queries: torch.Tensor, layer: LayerCache) -> torch.Tensor:
    """Attention of one sequence (num_heads, q_len, head_dim), head by head, in float64."""
    lengths = layer.head_lengths
    parts = [part.double().split(lengths) for part in (layer.keys, layer.values, layer.biases)]
    group = len(queries) // len(lengths)
    outs = []
    for head, rows in enumerate(queries.double()):
        keys, values, biases = (part[head // group] for part in parts)
        outs.append((rows @ keys.T / keys.shape[1] ** 0.5 + biases).softmax(-1) @ values)
    return torch.stack(outs)


# ---------------------------------------------------------------------------------------------------------- the ways


WAYS: dict[str, tuple[bool, decode.Way]] = {
    "sdpa": (True, decode.SDPA),
    "padded": (False, decode.PADDED),
    "repeated": (False, decode.REPEATED),
}


@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("num_documents", [1, 3])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_each_sequence_attention_over_its_own_document(
    name: str, num_documents: int, q_len: int
) -> None:
    is_full, way = WAYS[name]
    maker = CacheMaker(40, 0, 16, torch.float32, CPU, seed=2)
    kept = [maker.full(2) if is_full else maker.kept([5, 23]) for _ in range(num_documents)]
    queries = torch.randn(3, 4, q_len, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([softmax_attention(own, kept[i % num_documents]) for i, own in enumerate(queries)])
    torch.testing.assert_close(way.attend(queries, way.prepare(kept, 3)).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode.biased_attention(decode.exact_attention, queries, kept), expected)
    ours = decode.attend_documents(queries, decode.joined_documents(kept, 3))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    rounded = decode.attend_documents(queries, decode.rounded_documents(kept, 3))
    assert 0.0 < float((rounded.double() - expected).norm() / expected.norm()) < 0.03


def test_heads_are_padded_to_the_longest_and_hidden_beyond_their_own_keys() -> None:
    layer = CacheMaker(60, 0, 16, torch.bfloat16, CPU, seed=0).kept([3, 17])
    keys, values, mask = decode.padded_heads([layer], 2)
    assert keys.shape == values.shape == (2, 2, 32, 16) and mask.shape == (2, 2, 1, 32)
    assert keys.data_ptr() == keys[1].data_ptr(), "one document is not copied"
    assert mask.isfinite().sum(-1).flatten().tolist() == 2 * layer.head_lengths
    assert mask.dtype == keys.dtype == torch.bfloat16


@pytest.fixture
def timed_calls(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Callable[[], torch.Tensor]]]:
    """The calls of every row, which are not made."""
    timed: list[Sequence[Callable[[], torch.Tensor]]] = []

    def measure_small(calls: Sequence[Callable[[], torch.Tensor]], *_: Any, **__: Any) -> Timing:
        timed.append(calls)
        return Timing(1e-6, 1e-6, 1e-6, 1)

    monkeypatch.setattr(decode, "measure_small", measure_small)
    return timed


def test_documents_visited_in_turn_do_not_fit_into_the_cache_and_a_warm_row_reads_one(
    timed_calls: list[Sequence[Callable[[], torch.Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = KernelSettings(keys=96, keep=12, spread=1.0, heads=4, kv_heads=2, head_dim=16, batches=(3,), repeats=1)
    one = 2 * 12 * (2 * 16 * 4 + 4)
    monkeypatch.setattr(decode, "cache_bytes", lambda _: 2 * one)
    rows = decode.rows(settings, CPU, SilentReporter())
    outputs = [torch.stack([call() for call in calls]) for calls in timed_calls]
    for row, made in zip(rows, outputs, strict=True):
        distinct = len({out.numpy().tobytes() for out in made})
        of_documents, is_kept = row.sizes["documents"], row.sizes["keys"] == 12
        sets = max(2, -(-4 * 2 * one // (of_documents * (one if is_kept else 2 * 96 * 2 * 16 * 4))))
        assert (len(made), distinct) == (sets, 1 if row.name.endswith("warm") else sets), row.name


# ------------------------------------------------------------------------------------------------------ what is told


@pytest.fixture(scope="module")
def whole() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "measure_ceilings", lambda _: Ceilings(1e9, {"float32": 1e12}))
        sizes = {"keys": 96, "keep": 12, "spread": 4.0, "heads": 4, "kv_heads": 2, "head_dim": 16}
        settings = KernelSettings(kernels=("biased_decode",), **sizes, batches=(1, 3), repeats=2)
        yield json.loads(json.dumps(kernels.bench_kernels(settings, CPU, SilentReporter()).to_json()))


def test_there_is_a_row_for_every_way_batch_and_number_of_documents(whole: dict[str, Any]) -> None:
    found = [
        (row["sizes"]["keys"], row["sizes"]["batch"], row["sizes"]["documents"], row["name"]) for row in whole["rows"]
    ]
    expected = []
    for keys, others in ((12, (MASK, REPEATED)), (96, ("SDPA",))):
        for batch, documents in ((1, 1), (3, 1), (3, 3)):
            names = OURS, f"{OURS}, warm", f"{OURS}, int8", *others
            expected += [(keys, batch, documents, name) for name in names]
    assert found == expected
    assert whole["bench"] == "kernels" and whole["settings"]["batches"] == [1, 3]
    assert whole["settings"]["dtype"] == "float32"


def test_work_is_that_of_the_job_whoever_does_it(whole: dict[str, Any]) -> None:
    kept = 5 + 19  # of two heads, the second four times the first
    for row in whole["rows"]:
        sizes, is_full = row["sizes"], row["sizes"]["keys"] == 96
        is_8_bit = row["name"].endswith("int8")
        num_keys = 2 * 96 if is_full else kept
        per_key = (0 if is_full else 4) + (2 * 16 + 8 if is_8_bit else 2 * 16 * 4)
        queries_and_outputs = 2 * sizes["batch"] * 4 * 16 * 4
        assert row["bytes"] == sizes["documents"] * num_keys * per_key + queries_and_outputs
        assert row["operations"] == 4 * sizes["batch"] * 2 * num_keys * 16  # two query heads a KV head
        least_s = max(row["bytes"] / 1e9, row["operations"] / 1e12)
        assert row["fraction"] == pytest.approx(least_s / row["median_s"])
        assert row["figures"]["longest_head"] == (96 if is_full else 19)
        assert 0.0 < row["figures"]["max_error"] < (0.1 if is_8_bit else 1e-5)
        assert row["runs"] == 2 and row["part_of"] is None


def test_the_table_tells_rows_of_one_name_apart(invoke: Command) -> None:
    done = invoke("bench", "kernels", *SIZES)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "heads 4, kv heads 2, head dim 16, q len 1" in lines
    for keys, batch, documents in ((12, 1, 1), (12, 3, 1), (12, 3, 3)):
        same = [line for line in lines if line.startswith(f"{MASK} batch {batch} documents {documents} keys {keys} ")]
        assert len(same) == 2, "once with times, once with figures"
    assert not any("…" in line for line in lines)
    assert "kept keys (2 batch sizes) ..." in done.stderr


def test_what_torch_cannot_do_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no kernel\n  for this")

    monkeypatch.setattr(decode, "SDPA", decode.SDPA._replace(attend=fail))
    notes = Notes()
    settings = KernelSettings(keys=32, keep=4, heads=2, kv_heads=2, head_dim=16, batches=(1,), repeats=1, spread=2.0)
    rows = decode.rows(settings, CPU, notes)
    assert [row.name for row in rows if row.sizes["keys"] == 32] == [OURS, f"{OURS}, warm", f"{OURS}, int8"]
    assert notes.told == ["SDPA cannot run here and is left out: no kernel for this"]


def test_every_kernel_of_the_registry_has_a_module_that_makes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("x", Timing(1.0, 1.0, 1.0, 1))
    for name, module in KERNELS.items():
        monkeypatch.setattr(import_module(module), "rows", lambda *_: [row])
        assert kernels.bench_kernels(KernelSettings(kernels=(name,)), CPU, SilentReporter()).rows == [row]
