"""Claims about the kernel of attention statistics, its torch twin, and the scores that are made with them.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_attention_stats.py` shows the
tests singly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from interpreter import assert_passes_interpreted
from tiny_models import make_tiny

from compactor import attention, prefill
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.job import prepare
from compactor.model import load_model
from compactor.packed import ExactRows
from compactor.solve import key_scores
from compactor.solve.key_scores import KeySums
from compactor.study import prefill_document
from compactor_kernels import reference_stats
from compactor_kernels.reference_stats import AttentionStats, attention_stats_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
EPSILON = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = {"squares": True, "shares": True, "peaks": True}

if INTERPRETED or COMPILED:
    from compactor_kernels.attention_stats import (
        Machine,
        Tiles,
        attention_stats,
        choose_num_splits,
        choose_tiles,
        is_interpreted,
    )

    H100, A100, L40, B200 = (
        Machine(9, 132, 232_448),
        Machine(8, 108, 166_912),
        Machine(8, 142, 101_376),
        Machine(10, 148, 232_448),
    )


@dataclass(frozen=True)
class Case:
    """Inputs of attention statistics."""

    queries: torch.Tensor
    keys: torch.Tensor
    row_shift: torch.Tensor
    stops: torch.Tensor | None
    scaling: float

    def kernel(self, **options: object) -> AttentionStats:
        stats = attention_stats(
            self.queries, self.keys, self.row_shift, scaling=self.scaling, stops=self.stops, **(ALL | options)
        )
        assert isinstance(stats, AttentionStats)
        return stats

    def twin(self, dtype: torch.dtype | None = None, **options: bool) -> AttentionStats:
        queries, keys = (x.to(dtype or x.dtype) for x in (self.queries, self.keys))
        return attention_stats_reference(
            queries, keys, self.row_shift, scaling=self.scaling, stops=self.stops, **(ALL | options)
        )


def make_case(
    num_rows: int,
    kv_len: int,
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    limited: bool = False,
    device: str = DEVICE,
) -> Case:
    """Rows of attention: the shift is minus the log-sum-exp over all keys, plus the logarithm of a weight."""
    generator = torch.Generator().manual_seed(7)
    queries = torch.randn(group * num_kv_heads, num_rows, head_dim, generator=generator).to(device, dtype)
    keys = torch.randn(num_kv_heads, kv_len, head_dim, generator=generator).to(device, dtype)
    weights = torch.rand(group * num_kv_heads, num_rows, generator=generator).to(device)
    stops = torch.randint(0, kv_len + 2, (num_rows,), generator=generator).sort().values.int().to(device)
    case = Case(queries, keys, weights.log(), stops if limited else None, head_dim**-0.5)
    return replace(case, row_shift=case.row_shift - exact_scores(case).logsumexp(-1).flatten(0, 1).float())


def exact_scores(case: Case) -> torch.Tensor:
    """Return s q.k in float64, (num_kv_heads, group, num_rows, kv_len)."""
    grouped = case.queries.double().unflatten(0, (case.keys.shape[0], -1))
    return grouped @ case.keys.double().unsqueeze(1).mT * case.scaling


def textbook(case: Case) -> AttentionStats:
    """The statistics in float64, one row at a time."""
    num_kv_heads, kv_len, _ = case.keys.shape
    group = case.queries.shape[0] // num_kv_heads
    squares, shares, peaks = torch.zeros(3, num_kv_heads, kv_len, dtype=torch.float64).unbind()
    for head, row in product(range(case.queries.shape[0]), range(case.queries.shape[1])):
        keys = case.keys[head // group].double()
        powers = (keys @ case.queries[head, row].double() * case.scaling + case.row_shift[head, row].double()).exp()
        if case.stops is not None:
            powers[int(case.stops[row]) :] = 0.0
        squares[head // group] += powers.square()
        shares[head // group] += powers
        peaks[head // group] = torch.maximum(peaks[head // group], powers)
    return AttentionStats(squares, shares, peaks)


def largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def assert_as_exact_as_twin(case: Case, result: AttentionStats, factor: float = 4.0) -> None:
    """The kernel's error is at most ``factor`` times that of the twin in float32, and a few roundings."""
    exact, twin = case.twin(torch.float64), case.twin()
    for got, true, single in zip(result, exact, twin, strict=True):
        if got is None:
            continue
        assert true is not None and single is not None
        assert got.dtype == torch.float32 and got.shape == case.keys.shape[:2]
        assert largest(got - true) <= factor * largest(single - true) + 16 * EPSILON * largest(true)
        assert torch.equal(got == 0, true == 0)


# The twin


@pytest.mark.parametrize("limited", [False, True])
def test_twin_equals_the_definition(limited: bool) -> None:
    case = make_case(9, 20, group=3, head_dim=12, dtype=torch.float32, limited=limited, device="cpu")
    for got, single, true in zip(case.twin(torch.float64), case.twin(), textbook(case), strict=True):
        assert got is not None and got.dtype == torch.float64 and single is not None and single.dtype == torch.float32
        torch.testing.assert_close(got, true, rtol=1e-12, atol=0)
        torch.testing.assert_close(single, true.float(), rtol=1e-5, atol=0)


def test_twin_in_blocks_of_rows_is_the_twin_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(30, 11, limited=True, dtype=torch.float32, device="cpu")
    whole = case.twin(torch.float64)
    monkeypatch.setattr(reference_stats, "SCORE_ELEMENTS", 200)
    for one, other in zip(case.twin(torch.float64), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_twin_gives_what_is_asked_for() -> None:
    case = make_case(5, 6, device="cpu")
    assert [part is None for part in case.twin(squares=False, peaks=False)] == [True, False, True]


def test_limits_of_context_rows_are_those_of_their_spans() -> None:
    for start, stop, prefix in ((0, 1500, 10), (300, 900, 10), (0, 5, 10), (700, 701, 0)):
        expected = torch.zeros(stop - start, dtype=torch.int32)
        for first, last, past in prefill.context_spans(start, stop, prefix):
            expected[first - start : last - start] = past - prefix
        assert torch.equal(prefill.context_stops(start, stop, prefix, torch.device("cpu")), expected)


# The kernel


class TestAttentionStats:
    """Collected where the kernel can run: compiled on a GPU, or in the interpreter's own process."""

    __test__ = COMPILED or INTERPRETED

    @pytest.mark.parametrize("limited", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
    def test_kernel_is_as_exact_as_its_twin(self, head_dim: int, dtype: torch.dtype, limited: bool) -> None:
        rows, keys = (37, 45) if dtype == torch.float32 else (70, 260)
        case = make_case(rows, keys, head_dim=head_dim, dtype=dtype, limited=limited)
        assert_as_exact_as_twin(case, case.kernel())
        assert_as_exact_as_twin(case, case.kernel(shares=False, peaks=False, num_splits=2))

    @pytest.mark.parametrize("group", range(1, 17))
    def test_every_group_size_reads_its_own_kv_head(self, group: int) -> None:
        case = make_case(19, 33, group=group, limited=group % 2 == 0)
        assert_as_exact_as_twin(case, case.kernel())

    @pytest.mark.parametrize("limited", [False, True])
    @pytest.mark.parametrize(
        ("num_rows", "kv_len"), [(1, 1), (1, 256), (64, 256), (63, 255), (65, 257), (200, 3), (7, 700)]
    )
    def test_odd_sizes(self, num_rows: int, kv_len: int, limited: bool) -> None:
        case = make_case(num_rows, kv_len, group=3, limited=limited)
        assert_as_exact_as_twin(case, case.kernel(shares=False, peaks=False))

    @pytest.mark.parametrize("asked", list(product([False, True], repeat=3)))
    def test_only_what_is_asked_for_is_returned(self, asked: tuple[bool, bool, bool]) -> None:
        case = make_case(70, 90)
        options = dict(zip(("squares", "shares", "peaks"), asked, strict=True))
        result = case.kernel(**options)
        assert tuple(part is not None for part in result) == asked
        assert_as_exact_as_twin(case, result)

    @pytest.mark.parametrize("num_splits", [2, 11])
    @pytest.mark.parametrize("limited", [False, True])
    def test_splitting_the_rows_changes_only_the_order_of_sums(self, num_splits: int, limited: bool) -> None:
        case = make_case(150, 40, num_kv_heads=1, group=3, limited=limited)  # 9 row tiles
        first, second = (case.kernel(num_splits=num_splits) for _ in range(2))
        assert_as_exact_as_twin(case, first)
        for one, other, whole in zip(first, second, case.kernel(num_splits=1), strict=True):
            assert one is not None and other is not None and torch.equal(one, other)
            torch.testing.assert_close(one, whole, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("limits", [[0] * 140, [300] * 140, [0] * 50 + [256] * 90, [0] * 139 + [1], [5000] * 140])
    def test_rows_see_the_keys_before_their_limit(self, limits: list[int]) -> None:
        case = make_case(140, 300)
        case = replace(case, stops=torch.tensor(limits, dtype=torch.int32, device=DEVICE))
        result = case.kernel(num_splits=2)
        assert_as_exact_as_twin(case, result)
        assert result.squares is not None
        assert not result.squares[:, max(limits) :].any() and bool(result.squares[:, : max(limits)].all())

    def test_a_shift_of_minus_infinity_takes_a_row_out(self) -> None:
        case = make_case(90, 20)
        case.row_shift[:, 30:] = -torch.inf
        fewer = replace(case, queries=case.queries[:, :30], row_shift=case.row_shift[:, :30].contiguous())
        for one, other in zip(case.kernel(), fewer.kernel(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)

    def test_no_rows_give_zeros_and_no_keys_nothing(self) -> None:
        case = make_case(4, 6)
        none = replace(case, queries=case.queries[:, :0], row_shift=case.row_shift[:, :0])
        assert all(part is not None and part.shape == (2, 6) and not part.any() for part in none.kernel())
        squares = replace(case, keys=case.keys[:, :0]).kernel().squares
        assert squares is not None and squares.shape == (2, 0)

    def test_shares_of_attention_sum_to_the_rows(self) -> None:
        case = make_case(77, 120, group=3)
        whole = replace(case, row_shift=-exact_scores(case).logsumexp(-1).flatten(0, 1).float())
        shares = whole.kernel().shares
        assert shares is not None
        torch.testing.assert_close(shares.sum(-1).cpu(), torch.full((2,), 3.0 * 77), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_scores_in_the_thousands(self, dtype: torch.dtype) -> None:
        case = make_case(40, 60, dtype=dtype)
        case = replace(case, queries=40.0 * case.queries, keys=40.0 * case.keys)
        scores = exact_scores(case)
        assert largest(scores) > 2000
        case = replace(case, row_shift=-scores.logsumexp(-1).flatten(0, 1).float())
        for got, true in zip(case.kernel(), case.twin(torch.float64), strict=True):
            torch.testing.assert_close(got, true.float(), rtol=5e-3, atol=1e-6)  # float32 scores of 4,000

    def test_strided_views_give_the_same_bits(self) -> None:
        case = make_case(70, 90, limited=True)
        apart = case.queries.transpose(0, 1).contiguous().transpose(0, 1)
        longer = torch.cat([torch.zeros_like(case.keys), case.keys, case.keys], dim=1)[:, 90:180]
        assert not apart.is_contiguous() and not longer.is_contiguous()
        for one, other in zip(replace(case, queries=apart, keys=longer).kernel(), case.kernel(), strict=True):
            assert one is not None and other is not None and torch.equal(one, other)

    def test_tiles_of_every_generation_give_the_same_answer(self) -> None:
        case = make_case(150, 140, head_dim=32, limited=True)
        for machine, count in product((H100, A100, B200), (1, 3)):
            tiles = choose_tiles(32, 2, count, machine)
            options = {} if count == 3 else {"shares": False, "peaks": False}
            assert_as_exact_as_twin(case, case.kernel(tiles=tiles, **options))

    def test_tiles_are_what_matrix_units_and_shared_memory_take(self) -> None:
        for machine, head_dim, count, width in product((H100, A100, L40, B200), range(1, 257), (1, 2, 3), (2, 4)):
            tiles = choose_tiles(head_dim, width, count, machine)
            assert isinstance(tiles, Tiles)
            for size in (tiles.row_tile, tiles.key_tile, tiles.dim_tile):
                assert size >= 16 and size & (size - 1) == 0
            assert tiles.dim_tile >= head_dim and tiles.row_tile % (8 * tiles.fold) == 0
            held = (tiles.key_tile + tiles.num_stages * tiles.row_tile) * tiles.dim_tile * width
            assert held < machine.shared_bytes
            if machine == H100 and head_dim <= 128 and width == 2:
                assert 2 * (held + 2048) <= machine.shared_bytes and tiles.num_stages >= 2

    def test_splits_fill_the_device_and_keep_their_rows(self) -> None:
        for num_row_tiles, num_blocks in ((1, 1), (128, 56), (2944, 1024), (128, 1024), (15, 8)):
            splits = choose_num_splits(num_row_tiles, num_blocks, H100)
            assert splits >= 1 and (splits == 1 or num_row_tiles // splits >= 16)
            assert splits * num_blocks < 2 * 4 * 132 + num_blocks

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: {"queries": c.queries[0]}, "queries must be"),
            (lambda c: {"queries": c.queries.double()}, "not torch.float64"),
            (lambda c: {"queries": c.queries[:3], "row_shift": c.row_shift[:3]}, "multiple of num_kv_heads=2, not 3"),
            (lambda c: {"queries": c.queries.mT.contiguous().mT}, "last dimension of queries"),
            (lambda c: {"queries": torch.zeros(4, 5, 257)}, "head_dim must be 1 to 256, not 257"),
            (lambda c: {"keys": c.keys[..., :32]}, "keys must be"),
            (lambda c: {"keys": c.keys.float()}, "keys must have the type of the queries"),
            (lambda c: {"keys": c.keys.mT.contiguous().mT}, "last dimension of keys"),
            (lambda c: {"keys": c.keys.to("meta")}, "like the queries, not on meta"),
            (lambda c: {"row_shift": c.row_shift[:, 1:]}, "row_shift must be"),
            (lambda c: {"row_shift": c.row_shift.half()}, "row_shift must be"),
            (lambda c: {"row_shift": c.row_shift.T.contiguous().T}, "row_shift must be contiguous"),
            (lambda c: {"stops": torch.zeros(5, device=DEVICE)}, "stops must be"),
            (lambda c: {"stops": torch.zeros(4, dtype=torch.int32, device=DEVICE)}, "stops must be"),
            (lambda c: {"num_splits": 0}, "num_splits must be"),
        ],
    )
    def test_bad_input_is_refused_in_a_sentence(
        self, change: Callable[[Case], dict[str, object]], message: str
    ) -> None:
        case = make_case(5, 4)
        arguments = {name: getattr(case, name) for name in ("queries", "keys", "row_shift", "stops", "scaling")}
        with pytest.raises(ValueError, match=message):
            attention_stats(**(arguments | change(case)))

    def test_key_sums_by_kernel_are_those_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = make_case(50, 70, group=3, head_dim=16, dtype=torch.bfloat16, device="cpu")
        rows = (2, 3, 50)
        generator = torch.Generator().manual_seed(3)
        near, out = (torch.randn(*rows, 16, generator=generator) for _ in range(2))
        lse = -case.row_shift.view(rows)
        exact = ExactRows(lse, out, lse - 0.5, near, lse - 1.0, out)
        roots = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.2)
        sums = []
        for by_kernel in (False, True):
            monkeypatch.setattr(key_scores, "has_stats_kernel", lambda queries, by_kernel=by_kernel: by_kernel)
            one = KeySums.empty(2, 70, 16, torch.device(DEVICE))
            on_device = ExactRows(*(part.to(DEVICE) for part in vars(exact).values()))
            for _ in range(2):  # sums are added to
                one.add(case.queries.to(DEVICE).view(2, 150, 16), case.keys.to(DEVICE), case.scaling, on_device,
                        roots.to(DEVICE))  # fmt: skip
            sums.append(one)
        for name, got in vars(sums[1]).items():
            rtol = 1e-5 if INTERPRETED else 1e-3  # on a GPU the torch path rounds its exponentials to float16
            torch.testing.assert_close(got, getattr(sums[0], name), rtol=rtol, atol=0)

    @pytest.mark.skipif(not INTERPRETED, reason="emulates a GPU")
    def test_context_scores_by_kernel_are_those_of_torch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded = load_model(str(make_tiny("qwen2", tmp_path, num_layers=2)), device="cpu", dtype="bfloat16")
        text = "".join(f"Part {i}. The tenant pays {7 * i} euros of rent. " for i in range(42))
        settings = CompactSettings(keep_ratio=0.3, reserve=128, prefill_chunk=200)
        job = prepare(make_document("lease", text), loaded, settings)
        assert len(job.document_ids) > 3 * prefill.CONTEXT_SPAN
        emulate_fused_attention(monkeypatch)
        by_torch = prefill_document(job)
        monkeypatch.setattr(prefill, "has_stats_kernel", lambda queries: True)
        by_kernel = prefill_document(job)
        assert set(by_kernel.context_scores) == set(by_torch.full_layers)
        for i, scores in by_torch.context_scores.items():
            assert torch.equal(by_kernel.layers[i].keys, by_torch.layers[i].keys)
            torch.testing.assert_close(by_kernel.context_scores[i], scores, rtol=2e-3, atol=1e-4 * float(scores.max()))
            assert bool((scores[:, : 2 * prefill.CONTEXT_SPAN] > 0).all())

    @pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    @pytest.mark.parametrize(("q_len", "kv_len"), [(1, 300), (100, 100), (257, 1000), (513, 514)])
    def test_fused_attention_is_causal_from_the_end_and_takes_groups(
        self, q_len: int, kv_len: int, dtype: torch.dtype
    ) -> None:
        """What the prefill relies on: the last rows of the keys, fewer KV heads than heads, strided keys."""
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(8, q_len, 128, generator=generator).to(DEVICE, dtype)
        keys, values = torch.randn(2, 2, kv_len + 50, 128, generator=generator).to(DEVICE, dtype)[:, :, :kv_len]
        out, lse = attention.fused_attention(queries, keys, values, 0.1, causal=True)
        scores = attention.causal_scores(queries.double().view(2, 4, q_len, 128), keys.double(), 0.1)
        exact = attention.weigh_values(scores.softmax(-1), values.double())
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1).flatten(0, 1), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(out.double(), exact.view(8, q_len, 128), rtol=2e-2, atol=2e-2)

    @pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_cudnns_attention_agrees_with_float64(
        self, dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On GPUs that have it; rows and keys of one head lie apart, as they do in a cache."""
        if not attention.cudnn_passes(torch.zeros(1, device=DEVICE).device, dtype, head_dim):  # with its index
            pytest.skip("this GPU or this PyTorch has none")
        monkeypatch.setattr(attention, "CUDNN_OPERATIONS", 0)
        monkeypatch.setattr(attention, "_by_flash", lambda *_: pytest.fail("FlashAttention-2 answered"))
        generator = torch.Generator().manual_seed(0)
        num_keys = 1234
        queries = torch.randn(3, 777, head_dim, generator=generator).to(DEVICE, dtype)
        keys, values = torch.randn(2, 3, num_keys + 50, head_dim, generator=generator).to(DEVICE, dtype)[:, :, 50:]
        out, lse = attention.fused_attention(queries, keys, values, 0.1, causal=False)
        scores = torch.bmm(queries.double() * 0.1, keys.double().mT)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(out.double(), scores.softmax(-1) @ values.double(), rtol=2e-2, atol=2e-2)

    @pytest.mark.skipif(INTERPRETED, reason="large sizes need a GPU")
    @pytest.mark.parametrize("limited", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    def test_large_sizes_on_a_gpu(self, head_dim: int, dtype: torch.dtype, limited: bool) -> None:
        for num_rows, kv_len, group in ((2048, 4096, 4), (1777, 3001, 1), (33, 9001, 7)):
            case = make_case(num_rows, kv_len, group=group, head_dim=head_dim, dtype=dtype, limited=limited)
            assert_as_exact_as_twin(case, case.kernel())
            squares = [case.kernel(shares=False, peaks=False) for _ in range(2)]
            assert_as_exact_as_twin(case, squares[0])
            assert squares[0].squares is not None and squares[1].squares is not None
            assert torch.equal(squares[0].squares, squares[1].squares)

    @pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
    def test_call_is_captured_without_a_sync(self) -> None:
        case = make_case(300, 700, limited=True)
        case.kernel()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = case.kernel()
        case.row_shift.sub_(1.0)
        graph.replay()
        assert_as_exact_as_twin(case, result)

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


def emulate_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the half-precision path on the CPU, its primitives written out."""

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.bmm(left.float(), right.float())

    def fused(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        *,
        causal: bool,
        out_type: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (part.repeat_interleave(len(query) // len(part), dim=0) for part in (keys, values))
        scores = product(query, keys.mT) * scaling
        if causal:
            attention.hide_future(scores)
        return product(scores.softmax(-1), values).to(query.dtype).to(out_type), scores.logsumexp(-1)

    monkeypatch.setattr(attention, "is_fast", lambda query: query.dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(attention, "half_product", product)
    monkeypatch.setattr(attention, "fused_attention", fused)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestAttentionStats")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes host tensors")
def test_compiled_kernel_refuses_host_tensors() -> None:
    from compactor_kernels.attention_stats import attention_stats as compiled

    case = make_case(3, 4, device="cpu")
    with pytest.raises(ValueError, match="must be on a GPU, not on cpu"):
        compiled(case.queries, case.keys, case.row_shift, scaling=case.scaling)
