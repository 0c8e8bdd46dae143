"""Claims about the kernel of attention to the tails of a batch, its torch twin, and the layer that uses it.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_tail.py` shows the tests
singly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor import attention
from compactor.shared_layers import Sections, SharedLayer
from compactor.types import LayerCache
from compactor_kernels.reference import PartialAttention
from compactor_kernels.reference_tail import tail_decode_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if INTERPRETED or COMPILED:
    from compactor_kernels.tail_decode import Tiles, choose_tiles, is_interpreted, tail_decode

zeros = partial(torch.zeros, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """Inputs of the kernel."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    padding: torch.Tensor
    tail_end: int | torch.Tensor
    document: tuple[torch.Tensor, torch.Tensor] | None
    scaling: float

    def kernel(self, **options: Any) -> PartialAttention:
        return tail_decode(*self.given(), scaling=self.scaling, document=self.document, **options)

    def twin(self, dtype: torch.dtype | None = None) -> PartialAttention:
        queries, *rest = self.given()
        return tail_decode_reference(
            queries if dtype is None else queries.to(dtype), *rest, scaling=self.scaling, document=self.document
        )

    def given(self) -> tuple[Any, ...]:
        return self.queries, self.keys, self.values, self.padding, self.tail_end


def make_case(
    padding: tuple[int, ...] = (0, 3),
    *,
    group: int = 2,
    num_kv_heads: int = 2,
    q_len: int = 1,
    tail_len: int = 40,
    tail_end: int = 33,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    on_device: bool = False,
    merged: bool = True,
    size: float = 1.0,
    device: str = DEVICE,
) -> Case:
    """Random tails; one sequence for each number of hidden columns."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    rows = len(padding), group * num_kv_heads, q_len
    tails = len(padding), num_kv_heads, tail_len, head_dim
    return Case(
        (size * draw(*rows, head_dim)).to(device, dtype),
        (size * draw(*tails)).to(device, dtype),
        draw(*tails).to(device, dtype),
        torch.tensor(padding, dtype=torch.int64, device=device),
        torch.tensor([tail_end], device=device) if on_device else tail_end,
        (draw(*rows, head_dim).to(device), (3.0 + draw(*rows)).to(device)) if merged else None,
        head_dim**-0.5,
    )


def assert_exact(case: Case, **options: Any) -> None:
    """The kernel is as far from the float64 twin as the rounding of its products' operands, and not farther."""
    assert_rounding(case.kernel(**options), case)


def assert_rounding(found: PartialAttention, case: Case) -> None:
    exact = case.twin(torch.float64)
    # the scores are exact up to fp32 sums; only the weights are rounded to the type of the queries
    slack = torch.finfo(case.queries.dtype).eps * float(case.values.abs().max()) + 1e-5
    assert found.out.shape == case.queries.shape and found.lse.dtype == torch.float32
    torch.testing.assert_close(found.out.double(), exact.out, rtol=torch.finfo(found.out.dtype).eps, atol=slack)
    torch.testing.assert_close(found.lse.double(), exact.lse, rtol=1e-5, atol=1e-5)  # equal where infinite


def textbook_attention(case: Case) -> PartialAttention:
    """The same in float64, one query and one key at a time, written without the twin's tricks."""
    batch, num_heads, q_len, _ = case.queries.shape
    group = num_heads // case.keys.shape[1]
    queries, keys, values = (part.cpu().double() for part in (case.queries, case.keys, case.values))
    out, lse = torch.zeros_like(queries), torch.full(queries.shape[:-1], -math.inf, dtype=torch.float64)
    for sequence in range(batch):
        for head in range(num_heads):
            for row in range(q_len):
                seen = range(int(case.padding[sequence]), int(case.tail_end) + row + 1)
                own = sequence, head // group
                scores = [float(queries[sequence, head, row] @ keys[own][j]) * case.scaling for j in seen]
                vectors = [values[own][j] for j in seen]
                if case.document is not None:
                    scores.append(float(case.document[1][sequence, head, row]))
                    vectors.append(case.document[0][sequence, head, row].cpu().double())
                mass = sum(math.exp(score) for score in scores)
                for score, vector in zip(scores, vectors, strict=True):
                    if mass:
                        out[sequence, head, row] += math.exp(score) / mass * vector
                lse[sequence, head, row] = math.log(mass) if mass else -math.inf
    return PartialAttention(out, lse)


def edge_case(merged: bool, **options: Any) -> Case:
    """Sequences that see all, some and nothing of their tail, before a document of which a head may hold nothing."""
    case = make_case((0, 5, 34, 36, 40), q_len=5, tail_end=33, merged=merged, **options)
    if case.document is not None:
        case.document[1][:, 1] = -math.inf
        case.document[0][:, 1] = 0.0
    return case


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestTailDecode:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
    def test_every_size_of_head_and_type(self, head_dim: int, dtype: torch.dtype) -> None:
        assert_exact(make_case(head_dim=head_dim, dtype=dtype))

    @pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
    @pytest.mark.parametrize("q_len", [1, 5])
    def test_every_group(self, group: int, q_len: int) -> None:
        assert_exact(make_case(group=group, q_len=q_len, num_kv_heads=2 if group < 7 else 1))

    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("on_device", [False, True])
    @pytest.mark.parametrize("q_len", [1, 5])
    @pytest.mark.parametrize("padding", [(0,), (7, 0, 33)])
    def test_every_way_to_call(self, padding: tuple[int, ...], q_len: int, on_device: bool, merged: bool) -> None:
        assert_exact(make_case(padding, q_len=q_len, on_device=on_device, merged=merged, dtype=torch.float16))

    @pytest.mark.parametrize("tail_end", [0, 1, 15, 31, 32, 63, 64, 69])
    def test_ends_at_the_borders_of_tiles(self, tail_end: int) -> None:
        for on_device in (False, True):
            assert_exact(make_case((0, 1), tail_len=70, tail_end=tail_end, on_device=on_device, dtype=torch.float16))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_prompts_are_several_tiles_of_rows(self, dtype: torch.dtype) -> None:
        assert_exact(make_case((0, 11), q_len=37, tail_len=37, tail_end=0, group=3, num_kv_heads=1, dtype=dtype))

    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_that_see_nothing(self, merged: bool, dtype: torch.dtype) -> None:
        case = edge_case(merged, dtype=dtype)
        found = case.kernel()
        assert_rounding(found, case)
        blind = found.lse.isinf()
        assert not found.out[blind].any() and bool(blind[4, 1].all()) and not blind[0].any()
        if case.document is not None:
            torch.testing.assert_close(found.out[4, 0], case.document[0][4, 0])

    def test_hidden_columns_are_not_looked_at(self) -> None:
        case = make_case((0, 6), dtype=torch.float16, tail_len=90, tail_end=33)
        clean = case.kernel()
        for part in (case.keys, case.values):
            part[1, :, :6] = torch.nan
            part[:, :, 34:] = torch.nan
        for found, expected in zip(case.kernel(), clean, strict=True):
            assert torch.equal(found, expected)

    def test_strided_buffers(self) -> None:
        case = make_case(q_len=5, dtype=torch.float16)
        plain = case.kernel()
        longer = torch.full((4, 2, 2, 55, 64), torch.nan, device=DEVICE, dtype=torch.float16)  # the buffers' ends
        longer[1, :, :, 9:49], longer[2, :, :, 9:49] = case.keys, case.values
        wide = case.queries.transpose(1, 2).contiguous().transpose(1, 2)
        views = replace(case, queries=wide, keys=longer[1, :, :, 9:49], values=longer[2, :, :, 9:49])
        by_token = replace(case, values=case.values.transpose(1, 2).contiguous().transpose(1, 2))
        for other in (views, by_token):
            for found, expected in zip(other.kernel(), plain, strict=True):
                assert torch.equal(found, expected)

    def test_scores_in_the_thousands(self) -> None:
        case = make_case(size=60.0, merged=False)
        scores = case.scaling * case.queries.double() @ case.keys.double().repeat_interleave(2, 1).mT
        assert float(scores.abs().max()) > 2000
        exact, found = case.twin(torch.float64), case.kernel()
        torch.testing.assert_close(found.out.double(), exact.out, rtol=0.01, atol=0.01)
        torch.testing.assert_close(found.lse.double(), exact.lse, rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_result_may_have_the_type_of_the_queries(self, dtype: torch.dtype) -> None:
        case = make_case(q_len=5, dtype=dtype)
        found = case.kernel(out_type=dtype)
        assert found.out.dtype == dtype and found.out.transpose(1, 2).is_contiguous()
        assert_rounding(found, case)

    @pytest.mark.parametrize("tiles", [(16, 16, 64, 4, 1), (16, 128, 64, 4, 2), (64, 32, 64, 4, 3)])
    def test_tiles_change_nothing(self, tiles: tuple[int, ...]) -> None:
        assert_exact(make_case(q_len=5, group=7, num_kv_heads=1, dtype=torch.float16), tiles=Tiles(*tiles))

    def test_nothing_to_do(self) -> None:
        case = make_case()
        assert replace(case, queries=case.queries[:, :, :0], document=None).kernel().out.shape == (2, 4, 0, 64)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"queries": zeros(2, 4, 64)}, "queries must be"),
            ({"queries": zeros(2, 5, 1, 64)}, "num_heads must be"),
            ({"queries": zeros(2, 4, 1, 512)}, "head_dim must be"),
            ({"queries": zeros(2, 4, 1, 64, dtype=torch.float64)}, "queries must be float32"),
            ({"queries": zeros(2, 4, 1, 128)[..., ::2]}, "last dimension of queries"),
            ({"keys": zeros(2, 2, 40, 32)}, "keys must be"),
            ({"keys": zeros(1, 2, 40, 64)}, "keys must be"),
            ({"keys": zeros(2, 2, 64, 40).mT}, "last dimension of keys"),
            ({"values": zeros(2, 2, 39, 64)}, "values must be"),
            ({"values": zeros(2, 2, 40, 64, dtype=torch.float16)}, "type of the queries"),
            ({"padding": zeros(3, dtype=torch.int64)}, "padding must be"),
            ({"padding": zeros(2, dtype=torch.int32)}, "padding must be"),
            ({"padding": zeros(4, dtype=torch.int64)[::2]}, "padding must be contiguous"),
            ({"tail_end": -1}, "tail_end must be"),
            ({"tail_end": 40}, "tail_end must be 0 to 39"),
            ({"tail_end": zeros(2, dtype=torch.int64)}, "tail_end must be"),
            ({"tail_end": zeros(1)}, "tail_end must be"),
            ({"document": (zeros(2, 4, 1, 32), zeros(2, 4, 1))}, "document out must be"),
            ({"document": (zeros(2, 4, 1, 64), zeros(2, 4))}, "document lse must be"),
            ({"document": (zeros(2, 4, 1, 64).half(), zeros(2, 4, 1))}, "document out must be"),
            ({"document": (zeros(4, 2, 1, 64).transpose(0, 1), zeros(2, 4, 1))}, "must be contiguous"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(make_case(), **fields).kernel()

    def test_a_foreign_type_of_result_is_refused(self) -> None:
        with pytest.raises(ValueError, match="out_type must be"):
            make_case().kernel(out_type=torch.float16)

    @pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
    @pytest.mark.parametrize("element_bytes", [2, 4])
    def test_tiles_suit_the_matrix_units_and_the_memory(self, head_dim: int, element_bytes: int) -> None:
        for num_rows in (1, 4, 40, 5000):
            tiles = choose_tiles(num_rows, head_dim, element_bytes)
            sizes = tiles.row_tile, tiles.key_tile, tiles.dim_tile
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes) and tiles.dim_tile >= head_dim
            in_flight = 2 * max(2, tiles.num_stages - 1) * tiles.key_tile  # keys and values
            held = (in_flight + tiles.row_tile) * tiles.dim_tile * element_bytes
            assert held <= 96 * 1024  # of the 99 KiB of the smallest Ampere

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED

    @pytest.mark.skipif(not COMPILED, reason="needs a GPU")
    def test_a_captured_call_follows_the_end_on_the_device(self) -> None:
        case = make_case(tail_end=2, on_device=True, dtype=torch.float16)
        case.kernel()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = case.kernel()
        for end in (2, 20, 39):
            case.tail_end.fill_(end)
            graph.replay()
            assert_rounding(found, case)

    @pytest.mark.parametrize("with_sections", [False, True])
    @pytest.mark.parametrize("fixed", [False, True])
    def test_a_layer_gives_the_same_with_it(
        self, fixed: bool, with_sections: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = run_layer(fixed, with_sections)
        monkeypatch.setattr(attention, "kernel_usable", lambda name, _query: name == "tail_decode")
        refused: Callable[..., Any] = lambda *_args, **_kwargs: pytest.fail("not the kernel")  # noqa: E731
        monkeypatch.setattr(attention, "tail_attention", refused)
        for found, wanted in zip(run_layer(fixed, with_sections), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def run_layer(fixed: bool, with_sections: bool) -> list[torch.Tensor]:
    """Give a layer a prompt of 4 tokens and three single ones; return what it attends to at each step."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    num_kept, num_kv_heads, batch, head_dim = 30, 2, 3, 16
    document = LayerCache(
        keys=draw(num_kv_heads * num_kept, head_dim),
        values=draw(num_kv_heads * num_kept, head_dim),
        biases=draw(num_kv_heads * num_kept),
        positions=torch.arange(num_kept, dtype=torch.int32).repeat(num_kv_heads).to(DEVICE),
        offsets=torch.tensor([0, num_kept, 2 * num_kept], dtype=torch.int32, device=DEVICE),
    )
    options: dict[str, Any] = {}
    if with_sections:  # the last row sees all of the document
        options = {"prefix_length": 4, "sections": Sections(2, 10, 16), "rows_per_section": 1}
    layer = SharedLayer(document, num_kept, torch.tensor([0, 1, 3], device=DEVICE), 9, **options)
    results = []
    tail_end = torch.tensor([4], device=DEVICE)
    for q_len in (4, 1, 1, 1):
        query, key, value = (draw(batch, count, q_len, head_dim) for count in (4, 2, 2))
        out = layer.attend(query, *layer.update(key, value), mask=None, scaling=0.3, position_ids=None)
        results.append(out.clone())
        if fixed:
            if layer.tail_end is None:
                layer.fix_shapes(tail_end)
            else:
                tail_end += 1
    return results


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestTailDecode")


@pytest.mark.parametrize("merged", [False, True])
def test_the_twin_is_textbook_attention(merged: bool) -> None:
    for case in (
        edge_case(merged, head_dim=5, device="cpu"),
        make_case((0, 2), group=3, q_len=3, tail_len=9, tail_end=4, head_dim=5, merged=merged, device="cpu"),
    ):
        in_double, exact = case.twin(torch.float64), textbook_attention(case)
        assert in_double.out.dtype == torch.float64
        for found, expected in zip(in_double, exact, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for single, expected in zip(case.twin(), exact, strict=True):
            torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)
        at = torch.tensor([int(case.tail_end)])
        for found, expected in zip(replace(case, tail_end=at).twin(), case.twin(), strict=True):
            assert torch.equal(found, expected)


def test_the_twin_is_what_attention_did_before() -> None:
    case = make_case((0, 4, 12), q_len=6, tail_len=14, tail_end=8, head_dim=16, device="cpu")
    columns = torch.arange(14)
    mask = (columns <= columns[8:].unsqueeze(-1)) & (columns >= case.padding.view(-1, 1, 1))
    assert case.document is not None
    tail = attention.tail_attention(case.queries, case.keys, case.values, mask=mask.unsqueeze(1), scaling=case.scaling)
    expected = attention.merge(*case.document, *tail)
    for found, wanted in zip(case.twin(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
