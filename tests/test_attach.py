"""Claims about attaching: a cache that keeps every key is the full cache, whatever the questions look like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_tiny
from transformers import DynamicCache

from compactor import attention
from compactor.attach import AttachedCache, attach_layers
from compactor.errors import CompactorError
from compactor.model import LoadedModel, load_model
from compactor.prefill import Prefilled, prefill
from compactor.reference_queries import left_pad
from compactor.types import LayerCache, SilentReporter

HEADS = [(4, 4), (4, 2), (4, 1)]  # MHA, GQA, MQA
PREFIX, DOCUMENT = [1, 5, 9], list(range(10, 70))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family."""
    return str(request.param)


def tiny(family: str, folder: Path, num_heads: int = 4, num_kv_heads: int = 2) -> LoadedModel:
    """Load a tiny random model of the family in float32."""
    return load_model(str(make_tiny(family, folder, num_heads=num_heads, num_kv_heads=num_kv_heads)), device="cpu")


def prefilled(loaded: LoadedModel, chunk: int = 16) -> Prefilled:
    """Prefill the test document in small chunks."""
    return prefill(loaded, PREFIX, DOCUMENT, prefill_chunk=chunk, head_gains=None, reporter=SilentReporter())


def reference_logits(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Logits of transformers alone, one uncached eager pass in float32: (num_tokens, vocabulary)."""
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokens])).logits[0]
    return logits


def attached(loaded: LoadedModel, full: Prefilled) -> AttachedCache:
    """Attach the full cache."""
    return attach_layers(loaded.model, full.layers, full.logical_length)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_a_cache_that_keeps_every_key_is_the_full_cache(
    family: str, num_heads: int, num_kv_heads: int, tmp_path: Path
) -> None:
    loaded = tiny(family, tmp_path, num_heads, num_kv_heads)
    question = [80, 81, 82, 83, 84]
    expected = reference_logits(loaded, PREFIX + DOCUMENT + question)[-5:]
    cache = attached(loaded, prefilled(loaded))
    with torch.no_grad():
        logits = loaded.model(
            torch.tensor([question]),
            past_key_values=cache,
            attention_mask=cache.attention_mask(torch.ones(1, 5).long()),
        ).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_a_question_in_two_chunks_equals_one(family: str, tmp_path: Path) -> None:
    loaded = tiny(family, tmp_path)
    question = list(range(80, 105))
    expected = reference_logits(loaded, PREFIX + DOCUMENT + question)[-25:]
    cache = attached(loaded, prefilled(loaded))
    pieces = []
    with torch.no_grad():
        for piece in (question[:9], question[9:24], question[24:]):
            pieces.append(loaded.model(torch.tensor([piece]), past_key_values=cache).logits[0])
    torch.testing.assert_close(torch.cat(pieces), expected, atol=2e-4, rtol=2e-4)


def test_left_padded_questions_equal_single_ones(family: str, tmp_path: Path) -> None:
    loaded = tiny(family, tmp_path)
    questions = [list(range(80, 100)), [90, 91, 92], [85]]
    full = prefilled(loaded)
    singles = []
    for question in questions:
        reference_logits(loaded, question)  # leaves the model on eager: the oracle must not use our attention
        with torch.no_grad():
            tokens = torch.tensor([PREFIX + DOCUMENT + question])
            plain = DynamicCache(config=loaded.model.config)
            answer = loaded.model.generate(
                tokens, past_key_values=plain, do_sample=False, max_new_tokens=24, min_new_tokens=24, pad_token_id=0
            )
            singles.append(answer[0, tokens.shape[1] :].tolist())
    cache = attached(loaded, full)
    ids, mask = left_pad(questions, pad_id=0)
    with torch.no_grad():
        batch = loaded.model.generate(
            ids, attention_mask=cache.attention_mask(mask), past_key_values=cache, do_sample=False, max_new_tokens=24,
            min_new_tokens=24, pad_token_id=0,
        )  # fmt: skip
    assert batch[:, ids.shape[1] :].tolist() == singles


def test_prefill_in_chunks_equals_prefill_at_once(family: str, tmp_path: Path) -> None:
    loaded = tiny(family, tmp_path)
    for small, large in zip(prefilled(loaded, 7).layers, prefilled(loaded, 1000).layers, strict=True):
        assert torch.equal(small.positions, large.positions)
        torch.testing.assert_close(small.keys, large.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(small.values, large.values, atol=1e-4, rtol=1e-4)


def test_unequal_heads_with_log_two_biases_equal_doubled_keys(tmp_path: Path) -> None:
    """A key with bias log 2 counts twice: the same as a cache in which it physically stands twice."""
    loaded = tiny("llama", tmp_path)
    full = prefilled(loaded)
    biased, doubled = [], []
    for layer in full.layers:
        first = slice(0, 20)
        rest = slice(layer.head_lengths[0], int(layer.offsets[-1]))
        rows = torch.cat([torch.arange(20), torch.arange(rest.start, rest.stop)])
        biases = torch.zeros(len(rows))
        biases[:5] = torch.tensor(2.0).log()
        biased.append(ragged(layer, rows, biases, first.stop))
        rows_twice = torch.cat([torch.arange(5), rows])
        doubled.append(ragged(layer, rows_twice, torch.zeros(len(rows_twice)), first.stop + 5))
    outputs = []
    for layers in (biased, doubled):
        cache = attach_layers(loaded.model, layers, full.logical_length)
        with torch.no_grad():
            outputs.append(loaded.model(torch.tensor([[80, 81, 82]]), past_key_values=cache).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def ragged(layer: LayerCache, rows: torch.Tensor, biases: torch.Tensor, first_length: int) -> LayerCache:
    """Take some rows of a two-head layer; the first head keeps ``first_length`` of them."""
    return LayerCache(
        layer.keys[rows], layer.values[rows], biases, layer.positions[rows],
        torch.tensor([0, first_length, len(rows)], dtype=torch.int32),
    )  # fmt: skip


def test_crop_and_forget_restore_the_document(tmp_path: Path) -> None:
    loaded = tiny("qwen3", tmp_path)
    cache = attached(loaded, prefilled(loaded))
    with torch.no_grad():
        before = loaded.model(torch.tensor([[80, 81]]), past_key_values=cache).logits
        loaded.model(torch.tensor([[82, 83, 84]]), past_key_values=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == cache.logical_length
        after = loaded.model(torch.tensor([[80, 81]]), past_key_values=cache).logits
    assert torch.equal(before, after)


def test_a_model_that_was_switched_away_is_refused_not_wrong(tmp_path: Path) -> None:
    loaded = tiny("llama", tmp_path)
    cache = attached(loaded, prefilled(loaded))
    loaded.model.set_attn_implementation("sdpa")
    with pytest.raises(CompactorError, match="did not attend through the compacted cache"):
        loaded.model(torch.tensor([[80]]), past_key_values=cache)


def test_the_model_without_a_cache_still_answers_as_sdpa(tmp_path: Path) -> None:
    loaded = tiny("gemma3_text", tmp_path)
    tokens = list(range(10, 60))
    expected = reference_logits(loaded, tokens)
    attached(loaded, prefilled(loaded))
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_a_long_tail_in_blocks_equals_the_tail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 50, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 50, 50, generator=generator) > 0.5
    mask[0, 0, 3] = False  # a row that sees nothing
    results = []
    for elements in (1 << 20, 900):  # 900: two rows of the batch's eight heads
        monkeypatch.setattr(attention, "CPU_BLOCK_ELEMENTS", elements)
        causal = attention.tail_attention(query[:, :, 30:], key, value, mask=None, scaling=0.3)
        results.append([*causal, *attention.tail_attention(query, key, value, mask=mask, scaling=0.3)])
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks)
    assert results[1][3][0, :, 3].isneginf().all()
    assert not results[1][2][0, :, 3].any()
