"""Claims about the kernel that ends the attention of one decoding step, its torch twin, and the layer that uses it.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_step.py` shows the tests
singly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor import attention
from compactor.shared_layers import STEP_ROWS, Sections, SharedLayer
from compactor.types import LayerCache
from compactor_kernels.reference import biased_attention_reference
from compactor_kernels.reference_step import step_decode_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAPACITY = 40

if INTERPRETED or COMPILED:
    from compactor_kernels.biased_decode import Splits, attend_splits
    from compactor_kernels.step_decode import is_interpreted, step_decode

zeros = partial(torch.zeros, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """Inputs of the kernel, and the kept keys that its splits are of."""

    queries: torch.Tensor
    new_keys: torch.Tensor
    new_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    padding: torch.Tensor
    tail_end: torch.Tensor
    document: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # keys, values, biases, offsets
    scaling: float
    keys_per_split: int

    def splits(self) -> Splits:
        options = {"max_head_length": max(1, int(self.document[3].diff().max())), "scaling": self.scaling}
        return attend_splits(self.queries, *self.document, **options, keys_per_split=self.keys_per_split)

    def kernel(self, splits: Splits | None = None) -> torch.Tensor:
        return step_decode(*self.given(), splits or self.splits(), scaling=self.scaling)

    def given(self) -> tuple[torch.Tensor, ...]:
        return (
            self.queries, self.new_keys, self.new_values, self.keys, self.values, self.padding, self.tail_end
        )  # fmt: skip

    def copy(self) -> Case:
        """The same with buffers of its own."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())


def make_case(
    padding: tuple[int, ...] = (0, 3),
    *,
    lengths: tuple[int, ...] = (50, 7),
    group: int = 2,
    tail_end: int = 33,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    keys_per_split: int = 16,
    size: float = 1.0,
    device: str = DEVICE,
) -> Case:
    """Random tails; one sequence for each number of hidden columns, one KV head for each number of kept keys. What
    nobody may look at is not a number: columns from ``tail_end`` on, and hidden ones."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    num_kv_heads, batch, total = len(lengths), len(padding), sum(lengths)
    new, tails = (batch, num_kv_heads, 1, head_dim), (batch, num_kv_heads, CAPACITY, head_dim)
    keys, values = ((factor * draw(*tails)).to(dtype) for factor in (size, 1.0))
    for part in (keys, values):
        part[:, :, tail_end:] = torch.nan
        for sequence, hidden in enumerate(padding):
            part[sequence, :, :hidden] = torch.nan
    offsets = [sum(lengths[:head]) for head in range(num_kv_heads + 1)]
    kept = (size * draw(total, head_dim)).to(dtype), draw(total, head_dim).to(dtype), draw(total)
    return Case(
        (size * draw(batch, group * num_kv_heads, 1, head_dim)).to(dtype),
        (size * draw(*new)).to(dtype),
        draw(*new).to(dtype),
        keys,
        values,
        torch.tensor(padding, dtype=torch.int64, device=device),
        torch.tensor([tail_end], dtype=torch.int64, device=device),
        (*kept, torch.tensor(offsets, dtype=torch.int32, device=device)),
        head_dim**-0.5,
        keys_per_split,
    )


def in_one_softmax(case: Case) -> torch.Tensor:
    """Attend in float64 to all that a query sees at once: kept keys, tail, own key."""
    kept_keys, kept_values, biases, offsets = case.document
    group = case.queries.shape[1] // case.keys.shape[1]
    out = torch.empty(case.queries.shape, dtype=torch.float64, device=case.queries.device)
    for sequence, hidden in enumerate(case.padding.tolist()):
        for head in range(case.queries.shape[1]):
            own, tail = head // group, slice(hidden, int(case.tail_end))
            kept = slice(int(offsets[own]), int(offsets[own + 1]))
            keys, values = (
                torch.cat([part[kept], tails[sequence, own, tail], new[sequence, own]]).double()
                for part, tails, new in (
                    (kept_keys, case.keys, case.new_keys),
                    (kept_values, case.values, case.new_values),
                )
            )
            scores = keys @ case.queries[sequence, head, 0].double() * case.scaling
            scores[: kept.stop - kept.start] += biases[kept].double()
            out[sequence, head, 0] = scores.softmax(0) @ values
    return out


def assert_exact(case: Case) -> None:
    """The result is float64's to rounding, the new token is where it belongs, and all else is as it was."""
    expected, before = in_one_softmax(case), case.copy()
    assert_rounding(case.kernel(), expected, case)
    assert_only_the_new_token_is_written(before, case)


def assert_rounding(found: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    assert found.dtype == case.queries.dtype and found.transpose(1, 2).is_contiguous()
    parts = case.values, case.document[1], case.new_values
    largest = max(float(part.nan_to_num().abs().max()) for part in parts if part.numel())
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=eps * largest + 1e-5)


def assert_only_the_new_token_is_written(before: Case, after: Case) -> None:
    end = int(after.tail_end)
    for old, new, token in (
        (before.keys, after.keys, after.new_keys),
        (before.values, after.values, after.new_values),
    ):
        assert torch.equal(new[:, :, end : end + 1], token)
        others = [column for column in range(new.shape[2]) if column != end]
        torch.testing.assert_close(new[:, :, others], old[:, :, others], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [(50, 7), (0, 30)])
def test_the_twin_is_one_softmax_over_all(lengths: tuple[int, ...]) -> None:
    case = make_case((0, 3, 33), lengths=lengths, group=3, head_dim=5, device="cpu")
    clean = replace(case, keys=case.keys.nan_to_num(), values=case.values.nan_to_num())  # the twin multiplies by zero
    before = clean.copy()
    document = biased_attention_reference(case.queries.double(), *case.document, scaling=case.scaling)
    expected = in_one_softmax(case)
    found = step_decode_reference(*clean.given(), (document.out, document.lse), scaling=case.scaling)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert_only_the_new_token_is_written(before, clean)


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestStepDecode:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [1, 16, 64, 80, 96, 128, 256])
    def test_every_size_of_head_and_type(self, head_dim: int, dtype: torch.dtype) -> None:
        assert_exact(make_case(head_dim=head_dim, dtype=dtype))

    @pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
    def test_every_group(self, group: int) -> None:
        assert_exact(make_case(group=group, dtype=torch.float16))
        assert_exact(make_case((2,), group=group, lengths=(20,), dtype=torch.bfloat16))

    @pytest.mark.parametrize("tail_end", [0, 1, 31, 32, 33, CAPACITY - 1])
    def test_both_ends_of_the_buffer_and_between(self, tail_end: int) -> None:
        for head_dim in (64, 256):  # tiles of 128 and of 32 keys
            hidden = min(1, tail_end)
            assert_exact(make_case((0, hidden, tail_end), tail_end=tail_end, head_dim=head_dim, dtype=torch.float16))

    @pytest.mark.parametrize("lengths", [(0, 30), (30, 0, 1), (0, 0), (1,), (200, 0, 3, 70)])
    def test_heads_keep_what_they_keep(self, lengths: tuple[int, ...]) -> None:
        assert_exact(make_case(lengths=lengths))

    @pytest.mark.parametrize("keys_per_split", [16, 48, 1000])
    def test_one_split_and_many(self, keys_per_split: int) -> None:
        case = make_case(lengths=(1200, 33, 0), keys_per_split=keys_per_split)
        assert len(case.splits().out) == -(-1200 // keys_per_split)
        assert_exact(case)

    def test_splits_that_were_not_written_are_not_read(self) -> None:
        case = make_case(lengths=(100, 20))
        splits, expected = case.splits(), in_one_softmax(case)
        splits.out[2:, :, 2:], splits.lse[2:, :, 2:] = torch.nan, torch.nan  # the second head's, beyond its 20 keys
        assert_rounding(case.kernel(splits), expected, case)

    def test_strided_inputs(self) -> None:
        case = make_case((0, 3, 5), dtype=torch.float16)
        plain = case.copy().kernel()
        # as one projection leaves them, tokens before heads; the buffers are the middle of longer ones
        joined = torch.cat([part.transpose(1, 2) for part in (case.queries, case.new_keys, case.new_values)], 2)
        queries, new_keys, new_values = (part.transpose(1, 2) for part in joined.split([4, 2, 2], 2))
        longer = torch.full((2, 3, 2, CAPACITY + 15, 64), torch.nan, device=DEVICE, dtype=torch.float16)
        keys, values = longer[:, :, :, 9 : CAPACITY + 9]
        keys.copy_(case.keys)
        values.copy_(case.values)
        strided = replace(case, queries=queries, new_keys=new_keys, new_values=new_values, keys=keys, values=values)
        assert not any(part.is_contiguous() for part in (queries, new_keys, new_values, keys, values))
        assert torch.equal(strided.kernel(), plain)
        assert_only_the_new_token_is_written(case, strided)
        assert bool(longer[:, :, :, :9].isnan().all()) and bool(longer[:, :, :, CAPACITY + 9 :].isnan().all())
        by_token = replace(case.copy(), values=case.values.transpose(1, 2).contiguous().transpose(1, 2))
        assert torch.equal(by_token.kernel(), plain)

    def test_equal_calls_give_equal_bits(self) -> None:
        case = make_case((0, 3, 0, 9), lengths=(400, 90), group=4, dtype=torch.bfloat16)
        splits = case.splits()
        first = case.kernel(splits)
        assert torch.equal(case.kernel(splits), first) and torch.equal(case.kernel(), first)

    def test_scores_in_the_thousands(self) -> None:
        case = make_case(size=60.0)
        expected = in_one_softmax(case)
        torch.testing.assert_close(case.kernel().double(), expected, rtol=0.01, atol=0.01)

    def test_hidden_kept_keys_count_for_nothing(self) -> None:
        case = make_case(lengths=(50, 20))
        case.document[2][50:] = -torch.inf
        assert_exact(case)

    def test_the_next_token_finds_the_one_before(self) -> None:
        case = make_case(tail_end=3)
        for end in (3, 4, 5):
            case.tail_end.fill_(end)
            assert_exact(case)
            case.new_keys.copy_(torch.roll(case.new_keys, 1, -1))

    def test_no_sequence_gives_nothing(self) -> None:
        case = make_case()
        fields = {
            name: getattr(case, name)[:0] for name in ("queries", "new_keys", "new_values", "keys", "values", "padding")
        }
        assert replace(case, **fields).kernel().shape == (0, 4, 1, 64)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"queries": zeros(2, 4, 64)}, "queries must be"),
            ({"queries": zeros(2, 4, 2, 64)}, "queries must be"),
            ({"queries": zeros(2, 5, 1, 64)}, "num_heads must be"),
            ({"queries": zeros(2, 4, 1, 512)}, "head_dim must be"),
            ({"queries": zeros(2, 4, 1, 64, dtype=torch.float64)}, "queries must be float32"),
            ({"queries": zeros(2, 4, 1, 128)[..., ::2]}, "last dimension of queries"),
            ({"queries": zeros(3, 4, 1, 64)}, "new_keys must be"),
            ({"new_keys": zeros(2, 2, 2, 64)}, "new_keys must be"),
            ({"new_keys": zeros(2, 2, 1, 64).half()}, "new_keys must have the type"),
            ({"new_values": zeros(2, 4, 1, 64)}, "new_values must be"),
            ({"new_values": zeros(2, 2, 1, 128)[..., ::2]}, "last dimension of new_values"),
            ({"keys": zeros(2, 2, 40, 32)}, "keys must be"),
            ({"keys": zeros(1, 2, 40, 64)}, "keys must be"),
            ({"keys": zeros(2, 2, 64, 40).mT}, "last dimension of keys"),
            ({"keys": zeros(2, 2, 0, 64), "values": zeros(2, 2, 0, 64)}, "keys must be"),
            ({"values": zeros(2, 2, 39, 64)}, "values must be"),
            ({"values": zeros(2, 2, 40, 64, dtype=torch.float16)}, "type of the queries"),
            ({"padding": zeros(3, dtype=torch.int64)}, "padding must be"),
            ({"padding": zeros(2, dtype=torch.int32)}, "padding must be"),
            ({"padding": zeros(4, dtype=torch.int64)[::2]}, "padding must be"),
            ({"tail_end": zeros(2, dtype=torch.int64)}, "tail_end must be"),
            ({"tail_end": zeros(1)}, "tail_end must be"),
            ({"tail_end": torch.zeros(1, dtype=torch.int64, device="meta")}, "tail_end must be on"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, Any], message: str) -> None:
        case = make_case()
        splits = case.splits()
        with pytest.raises(ValueError, match=message):
            replace(case, **fields).kernel(splits)

    def test_splits_of_other_queries_are_refused(self) -> None:
        for other in (make_case((0,)), make_case(group=4), make_case(head_dim=32)):
            with pytest.raises(ValueError, match="splits must be of queries"):
                make_case().kernel(other.splits())
        splits = make_case().splits()
        with pytest.raises(ValueError, match="splits must be of queries"):
            make_case().kernel(splits._replace(lse=splits.lse[:1]))

    @pytest.mark.skipif(not COMPILED, reason="needs a GPU")
    def test_a_captured_call_follows_the_end_on_the_device(self) -> None:
        case = make_case(tail_end=2, dtype=torch.float16)
        splits = case.splits()  # their lengths are read on the host
        case.kernel(splits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = case.kernel(splits)
        case.keys.copy_(torch.randn_like(case.keys))
        case.values.copy_(torch.randn_like(case.values))
        for end in (3, 20, CAPACITY - 1):
            case.tail_end.fill_(end)
            before, expected = case.copy(), in_one_softmax(case)
            graph.replay()
            assert_rounding(found, expected, case)
            assert_only_the_new_token_is_written(before, case)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_layer_gives_the_same_with_it(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, _ = run_layer(rows)
        given, calls = count_steps(monkeypatch)
        monkeypatch.setattr(attention, "kernel_usable", lambda name, _: name in given)
        found, layer = run_layer(rows)
        assert len(calls) == 3 and layer.new is None  # the prompt and its successor's shapes are not a step's
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)

    def test_a_layer_does_without_it_where_it_would_be_slow_or_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given, calls = count_steps(monkeypatch)
        run_layer(STEP_ROWS + 1)
        monkeypatch.setattr(attention, "kernel_usable", lambda name, _: name in given)
        run_layer(STEP_ROWS + 1)
        run_layer(3, sections=True)
        monkeypatch.setattr(attention, "kernel_usable", lambda name, _: name == "step_decode")
        run_layer(3)
        assert not calls

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


def count_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], list[int]]:
    """Return the names of the kernels that a layer's step needs, and a list that grows with every such step."""
    import compactor_kernels.step_decode as module

    calls: list[int] = []

    def counted(*given: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return step_decode(*given, **options)

    monkeypatch.setattr(module, "step_decode", counted)
    return {"biased_decode", "step_decode"}, calls


def run_layer(rows: int, *, sections: bool = False) -> tuple[list[torch.Tensor], SharedLayer]:
    """Give a layer a prompt of 4 tokens and three single ones; return what it attends to at each step."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    num_kept, head_dim = 30, 16
    document = LayerCache(
        keys=draw(2 * num_kept, head_dim),
        values=draw(2 * num_kept, head_dim),
        biases=draw(2 * num_kept),
        positions=torch.arange(num_kept, dtype=torch.int32).repeat(2).to(DEVICE),
        offsets=torch.tensor([0, num_kept, 2 * num_kept], dtype=torch.int32, device=DEVICE),
    )
    options: dict[str, Any] = {}
    if sections:
        options = {"prefix_length": 4, "sections": Sections(2, 10, 16), "rows_per_section": 1}
    padding = torch.arange(rows, device=DEVICE) % 4
    layer = SharedLayer(document, num_kept, padding, 9, **options)
    tail_end, results = torch.tensor([4], device=DEVICE), []
    for q_len in (4, 1, 1, 1):
        query, key, value = (draw(rows, count, q_len, head_dim) for count in (4, 2, 2))
        if q_len == 1:
            layer.fix_shapes(tail_end)
        results.append(
            layer.attend(query, *layer.update(key, value), mask=None, scaling=0.3, position_ids=None).clone()
        )
        if q_len == 1:
            tail_end += 1
    return results, layer


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestStepDecode")
