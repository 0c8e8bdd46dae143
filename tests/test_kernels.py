"""Claims about the kernels and their torch twins.

With a GPU the kernels are compiled. Without one they run in Triton's interpreter, in a process of their own,
because Triton reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernels.py`
shows them singly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor_kernels import reference
from compactor_kernels.reference import PartialAttention, biased_attention_reference, quantise

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
EPSILON = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if INTERPRETED or COMPILED:
    from compactor_kernels.biased_decode import (
        biased_decode,
        choose_keys_per_split,
        choose_tiles,
        is_interpreted,
        split_tile,
    )


@dataclass(frozen=True)
class Case:
    """Inputs of biased attention, and the lengths of the heads on the host."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    biases: torch.Tensor
    lengths: tuple[int, ...]
    scaling: float
    num_documents: int = 1

    @property
    def offsets(self) -> torch.Tensor:
        bounds = [sum(self.lengths[:head]) for head in range(len(self.lengths) + 1)]
        return torch.tensor(bounds, dtype=torch.int32, device=self.keys.device)

    def kernel(self, **options: int) -> PartialAttention:
        options = {"max_head_length": max(self.lengths), "num_documents": self.num_documents, **options}
        kept = (self.keys, self.values, self.biases, self.offsets)
        return biased_decode(self.queries, *kept, scaling=self.scaling, **options)

    def twin(self, dtype: torch.dtype | None = None) -> PartialAttention:
        queries, keys, values = (x.to(dtype or x.dtype) for x in (self.queries, self.keys, self.values))
        kept = (keys, values, self.biases, self.offsets)
        return biased_attention_reference(queries, *kept, scaling=self.scaling, num_documents=self.num_documents)


def make_case(
    lengths: tuple[int, ...],
    *,
    group: int = 2,
    batch: int = 1,
    q_len: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    scaling: float | None = None,
    device: str = DEVICE,
) -> Case:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return Case(
        queries=normal(batch, group * len(lengths), q_len, head_dim),
        keys=normal(sum(lengths), head_dim),
        values=normal(sum(lengths), head_dim),
        biases=torch.randn(sum(lengths), generator=generator).to(device),
        lengths=lengths,
        scaling=head_dim**-0.5 if scaling is None else scaling,
    )


def join(documents: list[Case]) -> Case:
    """Several documents, of equally many heads and sequences, as one case."""
    parts = (torch.cat([getattr(one, name) for one in documents]) for name in ("queries", "keys", "values", "biases"))
    lengths = tuple(length for one in documents for length in one.lengths)
    return Case(*parts, lengths, documents[0].scaling, len(documents))


def textbook_attention(case: Case) -> PartialAttention:
    """Attention in float64 by plain softmax, one query at a time, written without the twin's tricks."""
    batch, num_heads, q_len, head_dim = case.queries.shape
    out = torch.zeros(batch, num_heads, q_len, head_dim, dtype=torch.float64)
    lse = torch.full((batch, num_heads, q_len), -math.inf, dtype=torch.float64)
    keys, values, biases = (x.cpu().double() for x in (case.keys, case.values, case.biases))
    bounds = case.offsets.tolist()
    group = num_heads // len(case.lengths)
    for sequence in range(batch):
        for head in range(num_heads):
            kept = slice(bounds[head // group], bounds[head // group + 1])
            if kept.start == kept.stop:
                continue
            for row in range(q_len):
                query = case.queries[sequence, head, row].cpu().double()
                scores = keys[kept] @ query * case.scaling + biases[kept]
                out[sequence, head, row] = torch.softmax(scores, 0) @ values[kept]
                lse[sequence, head, row] = torch.logsumexp(scores, 0)
    return PartialAttention(out, lse)


def in_8_bits(case: Case) -> dict[str, object]:
    """Keys and values that lack their scales."""
    return {"keys": case.keys.to(torch.int8), "values": case.values.to(torch.int8)}


def largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def assert_as_exact_as_twin(case: Case, result: PartialAttention, factor: float = 4.0) -> None:
    """The kernel's error is at most ``factor`` times that of the twin's result in the type of the inputs."""
    exact, twin = case.twin(torch.float64), case.twin()
    assert result.out.dtype == result.lse.dtype == torch.float32
    assert result.out.shape == case.queries.shape
    assert torch.equal(result.lse.isinf(), exact.lse.isinf())
    seen = ~exact.lse.isinf()
    out_bound = factor * largest(twin.out.to(case.queries.dtype).double() - exact.out)
    out_bound += factor * EPSILON * largest(case.values)
    assert largest(result.out - exact.out) <= out_bound
    lse_bound = factor * largest(twin.lse[seen] - exact.lse[seen])
    lse_bound += 16 * EPSILON * max(1.0, largest(exact.lse[seen]))
    assert largest(result.lse[seen] - exact.lse[seen]) <= lse_bound


# The twin


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("lengths", [(5,), (9, 0, 1, 30), (0, 0)])
def test_twin_equals_textbook_attention(lengths: tuple[int, ...], group: int) -> None:
    case = make_case(lengths, group=group, batch=2, q_len=3, head_dim=20, device="cpu")
    exact = textbook_attention(case)
    in_double, in_single = case.twin(torch.float64), case.twin()
    assert in_double.out.dtype == torch.float64 and in_single.out.dtype == torch.float32
    torch.testing.assert_close(in_double.out, exact.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_double.lse, exact.lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_single.out, exact.out.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_twin_computes_half_types_in_float32(dtype: torch.dtype) -> None:
    case = make_case((40, 7), dtype=dtype, device="cpu")
    out, lse = case.twin()
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, textbook_attention(case).out.float(), rtol=1e-5, atol=1e-5)


def test_twin_in_blocks_of_rows_is_the_twin_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((30, 11), batch=2, q_len=5, device="cpu")
    whole = case.twin(torch.float64)
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", 64)
    blocked = case.twin(torch.float64)
    torch.testing.assert_close(blocked.out, whole.out)
    torch.testing.assert_close(blocked.lse, whole.lse)


def test_twin_takes_offsets_from_the_host() -> None:
    case = make_case((4, 6), device="cpu")
    on_host = biased_attention_reference(
        case.queries, case.keys, case.values, case.biases, [0, 4, 10], scaling=case.scaling
    )
    assert torch.equal(on_host.out, case.twin().out)


def test_twin_hides_keys_of_bias_minus_infinity() -> None:
    case = make_case((3, 3), device="cpu")
    case.biases[1:3] = -math.inf
    case.biases[3:] = -math.inf
    out, lse = case.twin()
    torch.testing.assert_close(out[:, :2], case.values[0].expand(1, 2, 1, -1))
    assert not out[:, 2:].any() and (lse[:, 2:] == -math.inf).all()


def test_twin_of_several_documents_is_each_by_itself() -> None:
    """Documents of unequal lengths, two sequences each; the heads of one follow those of the other."""
    documents = [make_case(lengths, batch=2, q_len=3, device="cpu") for lengths in ((30, 2), (0, 7), (1, 1))]
    joined = join(documents)
    out, lse = joined.twin()
    torch.testing.assert_close(out, torch.cat([textbook_attention(one).out for one in documents]).float())
    torch.testing.assert_close(lse, torch.cat([textbook_attention(one).lse for one in documents]).float())


def test_vectors_of_8_bits_are_half_a_step_off_at_most() -> None:
    vectors = (
        torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).double() * torch.logspace(-6, 3, 50)[:, None]
    )
    vectors[7] = 0.0
    rounded, scales = quantise(vectors)
    assert rounded.dtype == torch.int8 and scales.dtype == torch.float32 and scales[7] == 1.0
    assert (rounded.abs().amax(1)[vectors.abs().amax(1) > 0] == 127).all()
    off = (rounded * scales.double().unsqueeze(1) - vectors).abs()
    assert (off <= 0.50001 * scales.double().unsqueeze(1)).all()


# The kernel


class TestBiasedDecode:
    """Collected where the kernel can run: compiled on a GPU, or in the interpreter's own process."""

    __test__ = COMPILED or INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
    def test_kernel_is_as_exact_as_its_twin(self, head_dim: int, dtype: torch.dtype) -> None:
        case = make_case((37, 131), head_dim=head_dim, dtype=dtype)
        assert_as_exact_as_twin(case, case.kernel())
        assert_as_exact_as_twin(case, case.kernel(keys_per_split=48))

    @pytest.mark.parametrize("group", range(1, 17))
    def test_every_group_size_reads_its_own_kv_head(self, group: int) -> None:
        case = make_case((19, 0, 10), group=group, dtype=torch.float16)
        assert_as_exact_as_twin(case, case.kernel(keys_per_split=100))
        if group in (1, 3, 8):
            assert_as_exact_as_twin(case, case.kernel(keys_per_split=16))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(("batch", "q_len"), [(1, 1), (3, 2), (1, 17), (2, 33), (1, 130)])
    def test_questions_of_any_length_and_batch(self, batch: int, q_len: int, dtype: torch.dtype) -> None:
        case = make_case((140, 5), group=3, batch=batch, q_len=q_len, dtype=dtype)
        assert_as_exact_as_twin(case, case.kernel(keys_per_split=1000))
        if batch * q_len < 10:
            assert_as_exact_as_twin(case, case.kernel(keys_per_split=64))

    @pytest.mark.parametrize("keys_per_split", [3, 16, 129, 1000])
    def test_splitting_the_keys_does_not_change_the_answer(self, keys_per_split: int) -> None:
        case = make_case((131, 1, 0, 16), q_len=2)
        assert_as_exact_as_twin(case, case.kernel(keys_per_split=keys_per_split))

    @pytest.mark.parametrize("keys_per_split", [4, 100])
    def test_empty_heads_give_zero_and_minus_infinity(self, keys_per_split: int) -> None:
        case = make_case((0, 9, 0))
        out, lse = case.kernel(keys_per_split=keys_per_split)
        empty = torch.tensor([True, True, False, False, True, True])
        assert not out[:, empty].any() and (lse[:, empty] == -math.inf).all()
        assert out[:, ~empty].all() and lse[:, ~empty].isfinite().all()

    def test_a_layer_without_keys_gives_zero_and_minus_infinity(self) -> None:
        out, lse = make_case((0, 0)).kernel()
        assert not out.any() and (lse == -math.inf).all()

    def test_no_question_gives_no_answer(self) -> None:
        out, lse = make_case((4, 4), q_len=0).kernel()
        assert out.shape == (1, 4, 0, 64) and lse.shape == (1, 4, 0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_one_key_gives_its_value(self, dtype: torch.dtype) -> None:
        case = make_case((1, 1), dtype=dtype)
        out, lse = case.kernel()
        assert torch.equal(out[0, :, 0], case.values.float().repeat_interleave(2, dim=0))
        assert_as_exact_as_twin(case, PartialAttention(out, lse))

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_huge_and_hopeless_biases_with_peaked_scores(self, dtype: torch.dtype) -> None:
        case = make_case((90, 33), dtype=dtype, scaling=1.0)  # scores of +-25
        case.biases[::5] = 7.0
        case.biases[1::5] = -30.0
        case.biases[2::5] = -1e4
        assert_as_exact_as_twin(case, case.kernel())
        assert_as_exact_as_twin(case, case.kernel(keys_per_split=17))

    def test_bias_minus_infinity_hides_a_key_and_a_whole_split(self) -> None:
        case = make_case((40, 8))
        case.biases[:20] = -math.inf
        case.biases[40:] = -math.inf
        result = case.kernel(keys_per_split=16)
        assert (result.lse[:, 2:] == -math.inf).all()
        assert_as_exact_as_twin(case, result)

    def test_bias_log_n_is_the_key_n_times(self) -> None:
        case = make_case((12,), group=4)
        biased = replace(case, biases=case.biases.clone())
        biased.biases[5] += math.log(3)
        order = torch.tensor([*range(12), 5, 5], device=DEVICE)
        repeated = replace(
            case, keys=case.keys[order], values=case.values[order], biases=case.biases[order], lengths=(14,)
        )
        torch.testing.assert_close(biased.kernel().out, repeated.kernel().out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(biased.kernel().lse, repeated.kernel().lse, rtol=1e-5, atol=1e-5)

    def test_two_parts_merged_by_their_lse_are_the_whole(self) -> None:
        case = make_case((50,), group=4)

        def part(kept: slice, length: int) -> Case:
            keys, values, biases = case.keys[kept], case.values[kept], case.biases[kept]
            return replace(case, keys=keys, values=values, biases=biases, lengths=(length,))

        a, b, whole = part(slice(0, 20), 20).kernel(), part(slice(20, 50), 30).kernel(), case.kernel()
        lse = torch.logaddexp(a.lse, b.lse)
        out = a.out * (a.lse - lse).exp().unsqueeze(-1) + b.out * (b.lse - lse).exp().unsqueeze(-1)
        torch.testing.assert_close(out, whole.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, whole.lse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("keys_per_split", [None, 16, 64])
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize(("batch", "q_len"), [(1, 1), (2, 1), (3, 11)])
    def test_sequences_attend_to_their_own_document(
        self, batch: int, q_len: int, dtype: torch.dtype, keys_per_split: int | None
    ) -> None:
        """Each of three documents has ``batch`` sequences; one is 20 times as long as another."""
        shape = {"batch": batch, "q_len": q_len, "dtype": dtype, "group": 3}
        case = join([make_case(lengths, **shape) for lengths in ((131, 7), (0, 6), (40, 1))])
        assert_as_exact_as_twin(case, case.kernel(keys_per_split=keys_per_split))

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    def test_keys_and_values_of_8_bits_are_multiplied_out(self, head_dim: int, dtype: torch.dtype) -> None:
        """As exact as attention over the rounded numbers in the type of the queries."""
        for lengths, q_len, documents in (((37, 131), 1, 1), ((90, 0), 3, 2)):
            case = join([make_case(lengths, head_dim=head_dim, dtype=dtype, q_len=q_len) for _ in range(documents)])
            case.biases[3:9] = -math.inf
            (keys, key_scales), (values, value_scales) = quantise(case.keys), quantise(case.values * 30.0)
            exact = replace(
                case,
                queries=case.queries.double(),
                keys=keys.double() * key_scales.double().unsqueeze(1),
                values=values.double() * value_scales.double().unsqueeze(1),
            ).twin()
            for keys_per_split in (None, 16, 64):
                found = biased_decode(
                    case.queries,
                    keys,
                    values,
                    case.biases,
                    case.offsets,
                    scaling=case.scaling,
                    max_head_length=max(lengths),
                    num_documents=documents,
                    scales=(key_scales, value_scales),
                    keys_per_split=keys_per_split,
                )
                tolerance = 16 * torch.finfo(torch.float32 if dtype == torch.float32 else dtype).eps
                torch.testing.assert_close(found.out.double(), exact.out, rtol=tolerance, atol=30.0 * tolerance)
                torch.testing.assert_close(found.lse.double(), exact.lse, rtol=tolerance, atol=tolerance)

    def test_settled_keys_give_the_same_bits(self) -> None:
        case = make_case((131, 40), batch=2)
        given = case.queries, case.keys, case.values, case.biases, case.offsets
        for keys_per_split in (None, 16):
            found = biased_decode(
                *given, scaling=case.scaling, max_head_length=131, keys_per_split=keys_per_split, settled=True
            )
            assert torch.equal(found.out, case.kernel(keys_per_split=keys_per_split).out)

    def test_splits_are_merged_a_power_of_two_at_once(self) -> None:
        assert [split_tile(number) for number in (1, 2, 3, 17, 64, 500)] == [2, 2, 4, 32, 64, 64]

    def test_a_wrong_longest_head_loses_no_keys(self) -> None:
        case = make_case((131, 5, 7))
        for max_head_length in (48, 500):
            assert_as_exact_as_twin(case, case.kernel(max_head_length=max_head_length, keys_per_split=32))

    def test_queries_may_be_a_transposed_view(self) -> None:
        case = make_case((21, 30), batch=2, q_len=3)
        view = case.queries.transpose(1, 2).contiguous().transpose(1, 2)
        assert not view.is_contiguous()
        assert torch.equal(replace(case, queries=view).kernel().out, case.kernel().out)

    def test_equal_calls_give_equal_bits(self) -> None:
        case = make_case((131, 40), batch=2)
        first, second = (case.kernel(keys_per_split=32) for _ in range(2))
        assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: {"queries": c.queries[0]}, "queries must be"),
            (lambda c: {"queries": c.queries.double()}, "not torch.float64"),
            (lambda c: {"queries": c.queries[:, :3]}, "multiple of num_kv_heads=2, not 3"),
            (lambda c: {"queries": c.queries.mT.contiguous().mT}, "last dimension of queries"),
            (lambda c: {"queries": torch.zeros(1, 4, 1, 257)}, "head_dim must be 1 to 256, not 257"),
            (lambda c: {"keys": c.keys[:, :32]}, "keys must be"),
            (lambda c: {"keys": c.keys.half()}, "keys must have the type of the queries"),
            (lambda c: {"keys": c.keys.T.contiguous().T}, "keys must be contiguous"),
            (lambda c: {"values": c.values[:-1]}, "values must be"),
            (lambda c: {"values": c.values.to("meta")}, "like the queries, not on meta"),
            (lambda c: {"biases": c.biases[:-1]}, "biases must be"),
            (lambda c: {"biases": c.biases.half()}, "biases must be"),
            (lambda c: {"offsets": c.offsets.long()}, "offsets must be"),
            (lambda c: {"offsets": c.offsets[:1]}, "offsets must be"),
            (lambda c: {"max_head_length": 4}, "max_head_length=4"),
            (lambda c: {"keys_per_split": 0}, "keys_per_split must be"),
            (lambda c: {"num_documents": 2}, "multiple of num_documents=2"),
            (lambda c: {"num_documents": 0}, "multiple of num_documents=0"),
            (lambda c: {"num_documents": 3, "queries": c.queries.expand(3, -1, -1, -1)}, "3 . num_kv_heads"),
            (lambda c: {"keys": c.keys.to(torch.int8)}, "keys must have the type of the queries"),
            (lambda c: {"scales": (c.biases, c.biases)}, "keys must be int8"),
            (lambda c: {**in_8_bits(c), "scales": (c.biases[1:], c.biases)}, "key scales must be"),
            (lambda c: {**in_8_bits(c), "scales": (c.biases, c.biases.half())}, "value scales must be"),
        ],
    )
    def test_bad_input_is_refused_in_a_sentence(
        self, change: Callable[[Case], dict[str, object]], message: str
    ) -> None:
        case = make_case((5, 4), q_len=2)
        arguments = {name: getattr(case, name) for name in ("queries", "keys", "values", "biases", "offsets")}
        arguments |= {"scaling": case.scaling, "max_head_length": 5} | change(case)
        with pytest.raises(ValueError, match=message):
            biased_decode(**arguments)

    def test_tiles_are_what_the_matrix_units_take(self) -> None:
        for head_dim in range(1, 257):
            for num_rows in (1, 16, 17, 64, 4096):
                for element_bytes in (2, 4):
                    for few_keys in (False, True):
                        tiles = choose_tiles(num_rows, head_dim, element_bytes, 101_376, few_keys=few_keys)
                        for size in (tiles.row_tile, tiles.key_tile, tiles.dim_tile):
                            assert size >= 16 and size & (size - 1) == 0
                        assert tiles.dim_tile >= head_dim and tiles.num_stages >= 1

    def test_splits_fill_the_device_once(self) -> None:
        for num_kept, row_tiles in ((0, 1), (1, 1), (9_832, 1), (491_520, 1), (491_520, 40)):
            for heads in (1, 8, 64, 1000):
                length = choose_keys_per_split(num_kept, heads, row_tiles, 64, 132)
                assert length >= 64 and length % 64 == 0
                half_full = min(132, heads * row_tiles / 2)
                assert num_kept * row_tiles / length + half_full <= 2 * 132

    @pytest.mark.skipif(INTERPRETED, reason="large sizes need a GPU")
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    def test_large_sizes_on_a_gpu(self, head_dim: int, dtype: torch.dtype) -> None:
        lengths = (4096, 0, 205, 1777)
        for batch, q_len in ((1, 1), (8, 1), (32, 1), (1, 1024), (2, 257)):
            case = make_case(lengths, group=4, batch=batch, q_len=q_len, head_dim=head_dim, dtype=dtype)
            assert_as_exact_as_twin(case, case.kernel())

    @pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
    def test_call_is_captured_without_a_sync(self) -> None:
        case = make_case((1000, 77), batch=2, dtype=torch.float16)
        kept = (case.keys, case.values, case.biases, case.offsets)
        case.kernel()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = biased_decode(case.queries, *kept, scaling=case.scaling, max_head_length=1000)
        case.queries.mul_(-1)
        graph.replay()
        assert_as_exact_as_twin(case, PartialAttention(out, lse))

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestBiasedDecode")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes host tensors")
def test_compiled_kernel_refuses_host_tensors() -> None:
    from compactor_kernels.biased_decode import biased_decode as compiled

    case = make_case((3,), device="cpu")
    with pytest.raises(ValueError, match="must be on a GPU, not on cpu"):
        kept = (case.keys, case.values, case.biases, case.offsets)
        compiled(case.queries, *kept, scaling=case.scaling, max_head_length=3)
