"""Claims about the published methods: each chooses by its published formula, at equal bytes, and its file answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from tiny_models import make_tiny

from compactor import prefill as prefill_module
from compactor import study as study_module
from compactor.attach import attach_layers, dense_heads, load
from compactor.config import BASELINES, METHOD_QUERIES, METHOD_SETTINGS, METHODS, SUMMARISING, CompactSettings
from compactor.document import make_document
from compactor.errors import DocumentError, SettingsError
from compactor.evaluate.metering import MeteredStudy
from compactor.job import prepare, target_total
from compactor.methods import Compacted, attention_matching_omp, get_method, kvzip, method_module
from compactor.methods import summary as summary_module
from compactor.methods.attention_matching import Head, MatchLayer, fit_values, mass_system
from compactor.methods.attention_matching_omp import PursuitLayer, pursue
from compactor.methods.attention_matching_rms import RmsLayer, fit_biases
from compactor.methods.document_attention import WINDOW, document_attention
from compactor.methods.h2o import heavy_and_recent
from compactor.methods.keeping import keep_chosen, plain_tokens, uniform_counts
from compactor.methods.snapkv import window_and_past
from compactor.methods.streaming import sinks_and_window
from compactor.methods.summary import longest_summary
from compactor.methods.summary_compacted import FACTOR
from compactor.methods.truncation import first_tokens
from compactor.model import LoadedModel, load_model
from compactor.pipeline import compact as run
from compactor.pipeline import compact_study
from compactor.prompt import encode_plain
from compactor.solve.budget import key_bytes
from compactor.study import Study, prefill_document
from compactor.types import LayerCache

TEXT = (
    "The tenant shall pay rent on the first day of each month. Clause 7 says that repairs under 150 euros are paid by "
    "the tenant. The landlord may not enter without notice. Interest of 4.5% is due after 30 days. "
)
CHOOSING = ("kvzip", "snapkv", "h2o", "streaming", "random")  # their smaller caches are parts of their larger ones
FITTING = ("attention-matching-rms", "attention-matching-omp")
QUESTION = [30, 31, 32, 33]


@cache
def loaded_tiny(folder: Path, family: str) -> LoadedModel:
    return load_model(str(make_tiny(family, folder / family)), device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """Tiny random models by family, made once."""
    folder = tmp_path_factory.mktemp("models")
    return lambda family: loaded_tiny(folder, family)


def study_of(loaded: LoadedModel, copies: int = 2, **settings: Any) -> Study:
    """A prefilled document of about 60 tokens a copy, no two copies the same."""
    fields = {
        "keep_ratio": 0.2,
        "cache_dtype": "float32",
        "self_study_tokens": 48,
        "reserve": 128,
        "certify": False,
        **settings,
    }
    if "max_bytes" in settings:
        del fields["keep_ratio"]
    text = make_document("lease", "".join(f"Part {i}. {TEXT}" for i in range(copies)))
    job = prepare(text, loaded, CompactSettings(**fields))
    return Study(job, prefill_document(job))


@pytest.fixture(scope="module")
def lease(models: Callable[[str], LoadedModel]) -> Study:
    """One study of a llama, shared by the tests that only read it."""
    return study_of(models("llama"))


def all_heads(study: Study) -> int:
    return len(study.full.full_layers) * study.job.loaded.num_kv_heads


def compact(study: Study, method: str, num_kept: int | None = None) -> Compacted:
    return get_method(method)(study, target_total(study.job) if num_kept is None else num_kept)


def kept_of(layer: LayerCache, head: int, prefix: int) -> list[int]:
    """Document-relative indices of the keys that a head keeps."""
    start, stop = int(layer.offsets[head]), int(layer.offsets[head + 1])
    return (layer.positions[start + prefix : stop] - prefix).tolist()


def kept_keys(study: Study, compacted: Compacted) -> int:
    prefix = study.full.prefix_length
    layers = [layer for layer in compacted.layers if layer.sliding_window is None]
    return sum(length - prefix for layer in layers for length in layer.head_lengths)


def attention_of(loaded: LoadedModel, tokens: list[int]) -> list[np.ndarray]:
    """transformers' own attention over tokens: per layer (num_heads, num_tokens, num_tokens) float64."""
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = loaded.model(torch.tensor([tokens]), output_attentions=True, use_cache=False).attentions
    finally:
        loaded.model.set_attn_implementation(before)
    return [layer[0].double().numpy() for layer in found]


def logits_after(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """transformers' own logits of the last `QUESTION` tokens, without any cache of ours."""
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return loaded.model(torch.tensor([tokens + QUESTION]), use_cache=False).logits[0, -len(QUESTION) :]
    finally:
        loaded.model.set_attn_implementation(before)


def answer_logits(loaded: LoadedModel, compacted: Compacted) -> torch.Tensor:
    attached = attach_layers(loaded.model, compacted.layers, compacted.logical_length)
    with torch.no_grad():
        return loaded.model(torch.tensor([QUESTION]), past_key_values=attached).logits[0]


# ------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_module_a_summary_and_a_function(method: str) -> None:
    module = method_module(method)
    assert module.SUMMARY and "\n" not in module.SUMMARY
    assert callable(get_method(method))


class Watched(CompactSettings):
    """Settings that remember which of the options that not every method uses were looked at; copies do not."""

    def __getattribute__(self, name: str) -> Any:
        if name in OPTIONS and self is WATCHED[-1]:
            READ.add(name)
        return super().__getattribute__(name)


OPTIONS = {name for names in METHOD_SETTINGS.values() for name in names} - {"max_error"}  # every size is asked for it
READ: set[str] = set()
WATCHED: list[CompactSettings | None] = [None]


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_settings_says_what_every_method_looks_at(method: str, lease: Study) -> None:
    fields = {**vars(lease.job.settings), "self_study_tokens": None, "queries": ()}
    study = Study(replace(lease.job, settings=Watched(**fields)), lease.full)
    READ.clear()
    WATCHED.append(study.job.settings)
    compact(study, method)
    assert set(METHOD_SETTINGS.get(method, ())) & OPTIONS == READ


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_use_is_refused(method: str) -> None:
    uses = METHOD_SETTINGS.get(method, ())
    special = {"budget": "b.json", "keep_curves": True, "min_log_bias": -1.0, "max_log_bias": 2.0}
    for name in (*OPTIONS, "max_error"):
        value = special.get(name, 64)
        if name in uses:
            assert getattr(CompactSettings(method=method, **{name: value}), name) == value
        else:
            with pytest.raises(SettingsError, match=f"--method {method} does not use --{name.replace('_', '-')}; "):
                CompactSettings(method=method, **{name: value})
    for source in ("context", "repeat", "self-study"):
        if source in METHOD_QUERIES.get(method, ()):
            assert CompactSettings(method=method, queries=(source,)).queries == (source,)
        else:
            with pytest.raises(SettingsError, match=f"--method {method} does not use --queries {source}; "):
                CompactSettings(method=method, queries=(source,))
    settings = CompactSettings(method=method)
    assert settings.queries == METHOD_QUERIES.get(method, ())
    assert replace(settings, keep_ratio=0.3).queries == settings.queries


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_at_most_the_bytes_that_were_asked(
    method: str, family: str, models: Callable[[str], LoadedModel]
) -> None:
    study = study_of(models(family))
    num_kept, loaded, prefix = target_total(study.job), study.job.loaded, study.full.prefix_length
    compacted = compact(study, method)
    kept = kept_keys(study, compacted)
    if method in ("truncation", "summary"):  # plain caches: no biases, no positions
        plain_key = 2 * loaded.head_dim * study.job.storage_dtype.itemsize
        asked = num_kept * key_bytes(loaded.head_dim, study.job.storage_dtype.itemsize)
        assert kept * plain_key <= asked
        if method == "truncation":
            assert asked < (kept + all_heads(study)) * plain_key
    elif method == "summary-compacted":
        tokens = compacted.report["summary_tokens"]
        assert plain_tokens(study, num_kept) < tokens <= plain_tokens(study, FACTOR * num_kept)
        assert kept == num_kept < all_heads(study) * tokens
    else:
        assert num_kept - (method == "attention-matching-omp") * num_kept // 5 <= kept <= num_kept
    for index, (layer, full) in enumerate(zip(compacted.layers, study.full.layers, strict=True)):
        assert layer.keys.dtype == layer.values.dtype == study.job.storage_dtype
        assert layer.biases.dtype == torch.float32 and torch.isfinite(layer.biases).all()
        assert torch.isfinite(layer.values).all()
        if layer.sliding_window is not None:
            assert method in ("truncation", *SUMMARISING) or torch.equal(layer.keys, full.keys)
            continue
        for head in range(layer.num_kv_heads):
            rows = slice(int(layer.offsets[head]), int(layer.offsets[head + 1]))
            positions = layer.positions[rows]
            assert positions[:prefix].tolist() == list(range(prefix))
            assert (positions.diff() > 0).all() and int(positions[-1]) < compacted.logical_length
            assert not layer.biases[rows][:prefix].any()
            if method not in SUMMARISING:
                true = dense_heads(study.full.layers[index])[0][0, head][positions.long()]
                is_refined = method in ("balanced", "best")  # kept keys move; the prefix is what it was
                own = layer.keys[rows][:prefix] if is_refined else layer.keys[rows]
                torch.testing.assert_close(own, true[: len(own)], rtol=1e-4, atol=1e-4)
                assert not is_refined or not torch.allclose(layer.keys[rows][prefix:], true[prefix:], atol=1e-3)


@pytest.mark.parametrize("method", BASELINES)
def test_max_bytes_bounds_the_file_of_every_method(method: str, models: Callable[[str], LoadedModel]) -> None:
    study = study_of(models("llama"), max_bytes=60_000)
    compacted = compact(study, method)
    assert 40_000 < sum(layer.nbytes for layer in compacted.layers) <= 60_000


@pytest.mark.parametrize("method", [name for name in BASELINES if name not in SUMMARISING])
def test_keeping_everything_is_the_full_cache(method: str, lease: Study) -> None:
    compacted = compact(lease, method, all_heads(lease) * len(lease.job.document_ids))
    assert compacted.logical_length == lease.full.logical_length
    for layer, full in zip(compacted.layers, lease.full.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor, full.tensors()[name]), name
    expected = logits_after(lease.job.loaded, [*lease.job.prompt.prefix_ids, *lease.job.document_ids])
    torch.testing.assert_close(answer_logits(lease.job.loaded, compacted), expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("method", BASELINES)
def test_equal_runs_give_equal_tensors(method: str, models: Callable[[str], LoadedModel]) -> None:
    first, again = (compact(study_of(models("llama"), copies=1), method) for _ in range(2))
    for layer, other in zip(first.layers, again.layers, strict=True):
        assert all(torch.equal(layer.tensors()[name], other.tensors()[name]) for name in layer.tensors())


@pytest.mark.parametrize("method", ["kvzip", "random", *FITTING])
def test_sizes_of_one_study_do_not_influence_each_other(
    method: str, lease: Study, models: Callable[[str], LoadedModel]
) -> None:
    compact(lease, method, 300)
    after = compact(lease, method, 100)
    alone = compact(study_of(models("llama")), method, 100)
    for layer, other in zip(after.layers, alone.layers, strict=True):
        assert all(torch.equal(layer.tensors()[name], other.tensors()[name]) for name in layer.tensors())


@pytest.mark.parametrize("method", CHOOSING)
def test_a_smaller_cache_is_a_part_of_a_larger_one_and_nothing_is_refitted(method: str, lease: Study) -> None:
    prefix, smaller = lease.full.prefix_length, None
    for num_kept in (all_heads(lease), 65, 200, 470):
        compacted = compact(lease, method, num_kept)
        assert kept_keys(lease, compacted) == num_kept
        kept = {
            (i, head, j)
            for i, layer in enumerate(compacted.layers)
            for head in range(layer.num_kv_heads)
            for j in kept_of(layer, head, prefix)
        }
        assert smaller is None or smaller < kept
        smaller = kept
        for layer, full in zip(compacted.layers, lease.full.layers, strict=True):
            assert not layer.biases.any()
            values = dense_heads(full)[1][0]
            for head in range(layer.num_kv_heads):
                rows = slice(int(layer.offsets[head]), int(layer.offsets[head + 1]))
                assert torch.equal(layer.values[rows], values[head, layer.positions[rows].long()])


@pytest.mark.parametrize("method", ["snapkv", "h2o", "streaming", "random", *FITTING])
def test_uniform_methods_keep_equally_many_keys_in_every_head(method: str, lease: Study) -> None:
    heads = all_heads(lease)
    compacted = compact(lease, method, 10 * heads + 3)
    counts = [length - lease.full.prefix_length for layer in compacted.layers for length in layer.head_lengths]
    assert counts == [11] * 3 + [10] * (heads - 3)
    assert [n for layer in uniform_counts(lease, 10 * heads + 3).values() for n in layer] == counts


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", BASELINES)
def test_the_file_of_every_method_loads_and_answers_alike(
    method: str, family: str, models: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    study = study_of(models(family), copies=1)
    loaded = study.job.loaded
    cache = compact_study(study, target_total(study.job), method)
    cache.save(tmp_path / "doc.kv")
    again = load(tmp_path / "doc.kv")
    assert again.metadata.document_tokens == len(study.job.document_ids)
    shorter = method in ("truncation", *SUMMARISING)
    assert again.metadata.logical_length < study.full.logical_length or not shorter
    outputs = []
    for one in (cache, again):
        with torch.no_grad():
            outputs.append(loaded.model(torch.tensor([QUESTION]), past_key_values=one.attach(loaded.model)).logits)
    assert torch.equal(*outputs)


# ------------------------------------------------------------------------------------------- h2o and snapkv


def document_probabilities(study: Study) -> list[np.ndarray]:
    """Causal attention between document tokens, per layer (num_kv_heads, group, T, T) float64."""
    prefix, loaded = study.full.prefix_length, study.job.loaded
    found = attention_of(loaded, [*study.job.prompt.prefix_ids, *study.job.document_ids])
    return [
        layer[:, prefix:, prefix:].reshape(loaded.num_kv_heads, -1, layer.shape[-1] - prefix, layer.shape[-1] - prefix)
        for layer in found
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_document_attention_is_transformers_own_whatever_the_prefill_chunk(
    family: str, models: Callable[[str], LoadedModel]
) -> None:
    expected = document_probabilities(study_of(models(family)))
    for chunk in (16, 4096):
        received = document_attention(study_of(models(family), prefill_chunk=chunk))
        for i, sums in received.items():
            np.testing.assert_allclose(sums.all_rows.numpy(), expected[i].sum((1, 2)), atol=1e-3, rtol=1e-3)
            window = expected[i][:, :, -WINDOW:].sum((1, 2))
            np.testing.assert_allclose(sums.window_rows.numpy(), window, atol=1e-3, rtol=1e-3)


def test_h2o_keeps_the_heavy_hitters_and_the_recent_tokens(lease: Study) -> None:
    probabilities, num_document = document_probabilities(lease), len(lease.job.document_ids)
    heads, count = all_heads(lease), 13
    compacted = compact(lease, "h2o", heads * count)
    for i, layer in enumerate(compacted.layers):
        for head in range(layer.num_kv_heads):
            scores = probabilities[i][head].sum((0, 1))
            recent = list(range(num_document - 6, num_document))
            heavy = sorted(range(num_document - 6), key=lambda j: -scores[j])[:7]
            assert kept_of(layer, head, lease.full.prefix_length) == sorted(heavy + recent)


def test_snapkv_keeps_the_window_and_what_it_looks_at_pooled(lease: Study) -> None:
    probabilities, num_document = document_probabilities(lease), len(lease.job.document_ids)
    first, count = num_document - WINDOW, WINDOW + 9
    compacted = compact(lease, "snapkv", all_heads(lease) * count)
    for i, layer in enumerate(compacted.layers):
        for head in range(layer.num_kv_heads):
            mean = probabilities[i][head][:, first:, :first].mean((0, 1))
            pooled = np.array([mean[max(0, j - 3) : j + 4].max() for j in range(first)])
            kept = kept_of(layer, head, lease.full.prefix_length)
            assert kept[-WINDOW:] == list(range(first, num_document))
            threshold = np.sort(pooled)[-9]  # neighbours of a peak are equal, so that the last of them may be any
            assert all(pooled[j] >= threshold * (1 - 1e-4) for j in kept[:-WINDOW])
            assert {j for j in range(first) if pooled[j] > threshold * (1 + 1e-4)} <= set(kept)


def test_snapkv_without_room_for_its_window_keeps_the_last_tokens() -> None:
    scores = torch.arange(200.0)
    assert window_and_past(scores, 5).tolist() == list(range(195, 200))
    assert window_and_past(scores[:20], 20).tolist() == list(range(20))
    assert sorted(window_and_past(scores, 200).tolist()) == list(range(200))


def test_h2o_splits_odd_counts_in_favour_of_heavy_hitters() -> None:
    scores = torch.tensor([1.0, 5.0, 2.0, 0.0, 9.0])
    assert heavy_and_recent(scores, 1).tolist() == [4]
    assert sorted(heavy_and_recent(scores, 3).tolist()) == [1, 2, 4]
    assert sorted(heavy_and_recent(scores, 5).tolist()) == [0, 1, 2, 3, 4]


def test_streaming_keeps_sinks_and_the_end() -> None:
    assert sinks_and_window(20, 7).tolist() == [0, 1, 2, 3, 17, 18, 19]
    assert sinks_and_window(20, 2).tolist() == [0, 1]
    assert sinks_and_window(20, 20).tolist() == list(range(20))


def test_random_keys_differ_between_seeds_and_heads(models: Callable[[str], LoadedModel]) -> None:
    first, other = (compact(study_of(models("llama"), seed=seed), "random") for seed in (1, 2))
    prefix = len(study_of(models("llama")).job.prompt.prefix_ids)
    assert kept_of(first.layers[0], 0, prefix) != kept_of(other.layers[0], 0, prefix)
    assert kept_of(first.layers[0], 0, prefix) != kept_of(first.layers[0], 1, prefix)


# ------------------------------------------------------------------------------------------- kvzip


@pytest.mark.parametrize("piece", [2000, 50])
def test_kvzip_ranks_all_heads_by_the_most_attention_while_repeating(
    piece: int, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle reads prefix, document and repetition as one plain text, and renormalises over what is compared."""
    monkeypatch.setattr(kvzip, "PIECE", piece)
    study = study_of(models("llama"))
    loaded, prefix, document = study.job.loaded, study.full.prefix_length, study.job.document_ids
    expected = np.zeros((loaded.num_layers, loaded.num_kv_heads, len(document)))
    covered = []
    segments = kvzip.repeat_segments(
        study.job.prompt, document, kvzip.chunk_borders(len(document), piece), study.job.room
    )
    pieces = kvzip.pieces_of(study, segments)
    for segment, (start, stop) in zip(segments, pieces, strict=True):
        assert list(segment.token_ids[start - stop :]) == document[start:stop]
        assert study.job.prompt.suffix_ids == segment.token_ids[: start - stop][-len(study.job.prompt.suffix_ids) :]
        covered += range(start, stop)
        end = prefix + len(document)
        found = attention_of(loaded, [*study.job.prompt.prefix_ids, *document, *segment.token_ids])
        for i, layer in enumerate(found):
            rows = layer[:, end:]
            own = rows[..., prefix + start : prefix + stop]
            total = rows[..., :prefix].sum(-1) + own.sum(-1) + rows[..., end:].sum(-1)
            most = (own / total[..., None]).max(1).reshape(loaded.num_kv_heads, -1, stop - start).max(1)
            expected[i, :, start:stop] = most
    assert covered == list(range(len(document)))
    assert len(segments) == -(-len(document) // piece)
    np.testing.assert_allclose(kvzip.repeat_scores(study).numpy(), expected, atol=1e-5, rtol=1e-3)
    num_kept = 120
    compacted = compact(study, "kvzip", num_kept)
    best = np.sort(np.argsort(-expected.ravel(), kind="stable")[:num_kept])
    kept = [
        (i * loaded.num_kv_heads + head) * len(document) + j
        for i, layer in enumerate(compacted.layers)
        for head in range(layer.num_kv_heads)
        for j in kept_of(layer, head, prefix)
    ]
    assert len(set(kept) ^ set(best.tolist())) <= 2  # a near tie at the border
    assert len({length for layer in compacted.layers for length in layer.head_lengths}) > 1


def test_a_head_may_keep_no_key_at_all(lease: Study) -> None:
    """KVzip has no floor; heads without any document key, and without a prefix, must still answer."""
    some, none = torch.arange(9), torch.empty(0, dtype=torch.int64)
    compacted = keep_chosen(lease, lambda i, head: none if (i, head) == (1, 0) else some)
    assert compacted.layers[1].head_lengths[0] == lease.full.prefix_length
    assert torch.isfinite(answer_logits(lease.job.loaded, compacted)).all()


# ------------------------------------------------------------------------------------------- truncation and summary


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_truncation_is_the_cache_of_the_beginning(family: str, models: Callable[[str], LoadedModel]) -> None:
    study = study_of(models(family))
    tokens = plain_tokens(study, target_total(study.job))
    compacted = compact(study, "truncation")
    assert compacted.logical_length == study.full.prefix_length + tokens < study.full.logical_length
    expected = logits_after(study.job.loaded, [*study.job.prompt.prefix_ids, *study.job.document_ids[:tokens]])
    torch.testing.assert_close(answer_logits(study.job.loaded, compacted), expected, atol=3e-4, rtol=3e-4)
    whole = first_tokens(study, 10**6)
    assert whole.logical_length == study.full.logical_length


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("num_kept", [6, 200])
def test_a_summary_is_the_cache_of_its_own_tokens(
    num_kept: int, family: str, models: Callable[[str], LoadedModel]
) -> None:
    study = study_of(models(family))
    compacted = compact(study, "summary", num_kept)
    ((_, most),) = [key for key in study.statistics if isinstance(key, tuple) and key[0] == "summary"]
    tokens = study.statistics[("summary", most)]
    assert isinstance(tokens, list)
    assert 1 <= len(tokens) <= most == plain_tokens(study, num_kept)
    assert compacted.report["summary_tokens"] == len(tokens)
    assert not set(tokens) & {study.job.loaded.tokenizer.eos_token_id, study.job.loaded.tokenizer.bos_token_id}
    expected = logits_after(study.job.loaded, [*study.job.prompt.prefix_ids, *tokens])
    torch.testing.assert_close(answer_logits(study.job.loaded, compacted), expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("method", SUMMARISING)
def test_a_window_without_room_for_the_request_is_refused(
    method: str, tmp_path: Path, models: Callable[[str], LoadedModel]
) -> None:
    length = study_of(models("llama")).full.logical_length
    narrow = load_model(str(make_tiny("llama", tmp_path / "narrow", window=length + 65)), device="cpu")
    with pytest.raises(DocumentError, match="too few to ask for a summary"):
        compact(study_of(narrow, reserve=64), method)


@pytest.mark.parametrize("max_tokens", [3, 40, 100_000])
def test_a_summary_is_asked_for_as_long_as_the_window_has_room_for(max_tokens: int, lease: Study) -> None:
    job = lease.job
    most = longest_summary(job, max_tokens)
    assert most + len(summary_module.request(job, most)) <= job.room
    assert most == max_tokens or most + 3 + len(summary_module.request(job, most)) >= job.room  # a number's digits
    for room in range(len(summary_module.request(job, 1)) + 8):
        narrow = replace(job, loaded=replace(job.loaded, window=job.loaded.window - job.room + room))
        try:
            most = longest_summary(narrow, max_tokens)
        except DocumentError:
            assert room <= len(summary_module.request(job, max_tokens))
        else:
            assert 1 <= most <= max_tokens and most + len(summary_module.request(narrow, most)) <= room


# ------------------------------------------------------------------------------------------- summary-compacted


SUMMARY = "Rent is due on the first day of each month. The tenant pays repairs under 150 euros. Clause 7 says so."


def writes(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, text: str) -> list[int]:
    """Let the model summarise every document as ``text``; return its tokens."""
    tokens = encode_plain(loaded.tokenizer, text)
    monkeypatch.setattr(summary_module, "answer_after", lambda *_arguments: [list(tokens)])
    return tokens


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_compacted_summary_is_what_balanced_makes_of_the_summary_as_a_document(
    family: str, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the whole pipeline on a document that says what the summary says, its own queries among others."""
    for module in (prefill_module, study_module):
        monkeypatch.setattr(module, "CONTEXT_SPAN", 8)
    study = study_of(models(family), copies=3, method="summary-compacted", keep_ratio=0.06, refine_steps=8)
    tokens = writes(monkeypatch, study.job.loaded, SUMMARY)
    num_kept, heads = target_total(study.job), all_heads(study)
    assert plain_tokens(study, num_kept) < len(tokens) < len(study.job.document_ids)
    cache = compact_study(study, num_kept)
    settings = replace(study.job.settings, method="balanced", keep_ratio=num_kept / (heads * len(tokens)))
    expected = run(make_document("summary", SUMMARY), study.job.loaded, settings)
    assert cache.metadata.logical_length == expected.metadata.logical_length
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name
    assert any(layer.biases.any() for layer in cache.layers)
    said, of_oracle = cache.metadata.report, expected.metadata.report
    assert said["kept_keys"] == of_oracle["kept_keys"] == num_kept
    assert said["document_keys"] == heads * len(study.job.document_ids)
    assert said["summary_tokens"] == len(tokens)
    assert said["reconstruction_error"] == of_oracle["reconstruction_error"] > 0
    assert said["reference_rows"] == of_oracle["reference_rows"]
    assert said["reference_rows"]["context"] == len(tokens) - 8 > 0
    assert "predicted_damage" not in said  # which would be that of the summary alone
    assert list(said["seconds"]) == ["prefill", "summarise", "ask", "select", "budget", "fit"]


@pytest.mark.parametrize("method", SUMMARISING)
def test_a_summary_that_fits_as_it_is_is_kept_whole(
    method: str, models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(models("llama"), copies=1)
    tokens = writes(monkeypatch, study.job.loaded, SUMMARY)
    sizes = range(all_heads(study), all_heads(study) * len(study.job.document_ids))
    fits = next(size for size in sizes if plain_tokens(study, size) == len(tokens))
    compacted = compact(study, method, fits)
    assert compacted.report == {"summary_tokens": len(tokens)}
    assert kept_keys(study, compacted) == all_heads(study) * len(tokens)
    expected = logits_after(study.job.loaded, [*study.job.prompt.prefix_ids, *tokens])
    torch.testing.assert_close(answer_logits(study.job.loaded, compacted), expected, atol=3e-4, rtol=3e-4)
    if method == "summary-compacted":  # one key less, and there is something to choose
        assert kept_keys(study, compact(study, method, fits - 1)) == fits - 1


def test_at_full_size_both_summaries_are_one(lease: Study) -> None:
    everything = all_heads(lease) * len(lease.job.document_ids)
    plain, compacted = (compact(lease, method, everything) for method in SUMMARISING)
    assert plain.report == compacted.report and plain.logical_length == compacted.logical_length
    for layer, other in zip(plain.layers, compacted.layers, strict=True):
        assert all(torch.equal(layer.tensors()[name], other.tensors()[name]) for name in layer.tensors())


def test_a_compacted_summary_is_the_plain_summary_of_a_larger_size(models: Callable[[str], LoadedModel]) -> None:
    """Of `FACTOR` times the bytes: it is written once for both."""
    study = study_of(models("llama"))
    small = 2 * all_heads(study)
    compacted, plain = compact(study, "summary-compacted", small), compact(study, "summary", FACTOR * small)
    written = [key for key in study.statistics if isinstance(key, tuple) and key[0] == "summary"]
    assert written == [("summary", plain_tokens(study, FACTOR * small))]
    assert compacted.logical_length == plain.logical_length
    assert kept_keys(study, compacted) == small < kept_keys(study, plain)


def test_sizes_with_equal_summaries_share_all_passes_but_the_fit(models: Callable[[str], LoadedModel]) -> None:
    """As the meter of `compactor eval` sees it: what is shared is counted as shared for whoever uses it."""
    alone = study_of(models("llama"), copies=1, refine_steps=4)
    study = MeteredStudy(alone.job, alone.full)
    everything = all_heads(study) * len(study.job.document_ids)
    first, cost = study.measure(lambda: compact(study, "summary-compacted", everything // 2))
    made = set(study.statistics)
    second, again = study.measure(lambda: compact(study, "summary-compacted", everything // 3))
    assert set(study.statistics) == made and len(made) == 4  # summary, its prefill, its segments, its order
    assert cost.shared_s == again.shared_s == sum(study.seconds.values()) > 0
    assert kept_keys(study, first) == everything // 2 and kept_keys(study, second) == everything // 3
    assert "segments" not in vars(study)  # the document itself is asked nothing
    for layer, other in zip(second.layers, compact(alone, "summary-compacted", everything // 3).layers, strict=True):
        assert all(torch.equal(layer.tensors()[name], other.tensors()[name]) for name in layer.tensors())


# ------------------------------------------------------------------------------------------- attention matching


def random_head(num_document: int = 60, num_rows: int = 240, head_dim: int = 8, seed: int = 0) -> Head:
    """Keys in clusters, so that one stands for many, and peaked queries."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, head_dim, generator=generator)
    member = torch.arange(num_document) % 12
    keys = centres[member] + 0.3 * torch.randn(num_document, head_dim, generator=generator)
    queries = 1.2 * torch.randn(num_rows, head_dim, generator=generator)
    return Head(queries, keys, torch.randn(num_document, head_dim, generator=generator), keys)


def features_of(head: Head) -> np.ndarray:
    scores = head.queries.double().numpy() @ head.keys.double().numpy().T
    return np.exp(scores - scores.max(1, keepdims=True))


def layer_of(kind: type[MatchLayer]) -> MatchLayer:
    """A layer that only chooses."""
    return object.__new__(kind)


@pytest.mark.parametrize("kind", [RmsLayer, PursuitLayer])
def test_outputs_and_masses_are_those_of_the_document_alone(kind: type[MatchLayer]) -> None:
    head = random_head()
    features = features_of(head)
    _, _, rows = layer_of(kind).choose(head, 10)
    np.testing.assert_allclose(rows.mass[:, 0].numpy(), features.sum(1), rtol=1e-5)
    expected = features / features.sum(1, keepdims=True) @ head.values.double().numpy()
    np.testing.assert_allclose(rows.outputs.numpy(), expected, atol=1e-5)


def test_rms_takes_the_keys_with_the_largest_root_mean_square_attention() -> None:
    head = random_head()
    features = features_of(head)
    attention = features / features.sum(1, keepdims=True)
    scores = np.sqrt((attention**2).mean(0))
    kept, _, _ = layer_of(RmsLayer).choose(head, 15)
    assert kept.tolist() == np.argsort(-scores, kind="stable")[:15].tolist()


@pytest.mark.parametrize("count", [3, 15, 40])
def test_rms_biases_are_scipys_least_squares_in_the_box(count: int) -> None:
    head = random_head()
    features = features_of(head)
    kept, biases, rows = layer_of(RmsLayer).choose(head, count)
    scipys = scipy.optimize.lsq_linear(
        features[:, kept], features.sum(1), bounds=(math.exp(-3), math.exp(3)), method="bvls", tol=1e-14
    )
    assert float(biases.min()) >= -3 - 1e-6 and float(biases.max()) <= 3 + 1e-6
    residual = features[:, kept] @ np.exp(biases.double().numpy()) - features.sum(1)
    assert (residual**2).sum() <= 2 * scipys.cost * (1 + 1e-5) + 1e-8
    np.testing.assert_allclose(biases.exp().numpy(), scipys.x, rtol=2e-3, atol=2e-3)
    gram, target = mass_system(head, rows, kept)
    np.testing.assert_allclose(gram.numpy(), features[:, kept].T @ features[:, kept], rtol=1e-5)
    np.testing.assert_allclose(target.numpy(), features[:, kept].T @ features.sum(1), rtol=1e-5)


def test_a_bias_at_the_border_of_the_box_is_three() -> None:
    """One key for fifty equal ones needs log 50 = 3.9, more than the published box allows."""
    assert float(fit_biases(torch.eye(1), torch.tensor([50.0]))) == pytest.approx(3.0)
    assert float(fit_biases(torch.eye(1), torch.tensor([0.01]))) == pytest.approx(-3.0)


def test_values_are_scipys_least_squares_of_the_outputs() -> None:
    head = random_head()
    kept, biases, rows = layer_of(RmsLayer).choose(head, 20)
    values, error, energy = fit_values(head, kept, biases, rows.outputs)
    weights = torch.softmax(head.queries.double() @ head.keys[kept].double().T + biases.double(), -1).numpy()
    outputs = rows.outputs.double().numpy()
    expected = scipy.linalg.lstsq(weights, outputs)[0]
    best = ((weights @ expected - outputs) ** 2).sum()
    assert ((weights @ values.double().numpy() - outputs) ** 2).sum() <= best * (1 + 1e-4)
    assert error == pytest.approx(best, rel=1e-3)
    assert energy == pytest.approx((outputs**2).sum(), rel=1e-6)
    np.testing.assert_allclose(values.numpy(), expected, atol=2e-2)


def naive_pursuit(
    features: np.ndarray, count: int, per_refit: Callable[[int], int], least: float, rounds: int
) -> tuple[list[int], np.ndarray]:
    """Orthogonal matching pursuit on explicit rows: the published algorithm, refitted by scipy."""
    mass, picked, gone = features.sum(1), [], set()
    weights = np.zeros(0)

    def refit() -> np.ndarray:
        return scipy.optimize.lsq_linear(features[:, picked], mass, bounds=(0, math.exp(7)), method="bvls", tol=1e-15).x

    for round_ in range(rounds + 1):
        while len(picked) < count:
            lacking = features.T @ (mass - features[:, picked] @ weights)
            free = [j for j in range(features.shape[1]) if j not in picked and j not in gone]
            best = sorted(free, key=lambda j: -lacking[j])[: min(per_refit(len(picked)), count - len(picked))]
            if not best:
                break
            picked += best
            weights = refit()
        weak = weights < least
        if round_ == rounds or not weak.any():
            break
        gone |= {j for j, low in zip(picked, weak, strict=True) if low}
        picked = [j for j in picked if j not in gone]
        weights = refit()
    return picked, weights


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", [((300, 1), (1500, 4)), ((3, 1), (9, 2))])
def test_pursuit_picks_and_weighs_like_the_published_algorithm(
    schedule: tuple[tuple[int, int], ...], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_matching_omp, "SCHEDULE", schedule)
    monkeypatch.setattr(attention_matching_omp, "LATER", 3)
    features = features_of(random_head(seed=seed))
    for count in (1, 8, 25):
        picked, weights = pursue(torch.as_tensor(features.T @ features), count)
        expected, their_weights = naive_pursuit(features, count, attention_matching_omp.keys_per_refit, math.exp(-7), 3)
        assert picked.tolist() == expected
        np.testing.assert_allclose(weights.numpy(), their_weights, rtol=1e-4, atol=1e-6)


def test_pursuit_drops_keys_that_lose_their_weight_and_replaces_them() -> None:
    """The first key covers two halves badly; once both halves are there it is worth nothing and makes room."""
    left, right, other = np.zeros(90), np.zeros(90), np.zeros(90)
    left[:40], right[40:80], other[80:] = 1.0, 1.0, 0.2
    both = 0.9 * (left + right)
    features = np.stack([both, left, right, other], 1)
    picked, weights = pursue(torch.as_tensor(features.T @ features), 3)
    expected, their_weights = naive_pursuit(features, 3, lambda _n: 1, math.exp(-7), 3)
    assert picked.tolist() == expected
    np.testing.assert_allclose(weights.numpy(), their_weights, atol=1e-6)


def test_pursuit_stands_equal_unseen_and_nearly_equal_keys() -> None:
    features = features_of(random_head(num_document=24))
    features = np.concatenate([features, features, features + 1e-9], 1)
    features[:, 5] = 0.0
    for count in (5, 30, 71):
        picked, weights = pursue(torch.as_tensor(features.T @ features), count)
        assert len(set(picked.tolist())) == len(picked) <= count
        assert torch.isfinite(weights).all() and float(weights.min()) >= 0
        missing = features[:, picked] @ weights.numpy() - features.sum(1)
        best = scipy.optimize.lsq_linear(features[:, picked], features.sum(1), bounds=(0, math.exp(7)), tol=1e-14).cost
        assert (missing**2).sum() <= 2 * best + 1e-4 * (features.sum(1) ** 2).sum()


def test_pursuit_matches_the_mass_better_than_rms() -> None:
    head = random_head(num_document=120)
    features = features_of(head)
    errors = []
    for kind in (PursuitLayer, RmsLayer):
        kept, biases, _ = layer_of(kind).choose(head, 12)
        residual = features[:, kept] @ np.exp(biases.double().numpy()) - features.sum(1)
        errors.append((residual**2).sum())
    assert errors[0] < errors[1]


def test_the_first_layer_chooses_by_the_queries_of_every_segment(lease: Study) -> None:
    """The oracle reads prefix, document and each segment as one plain text and renormalises over the document."""
    loaded, prefix, end = lease.job.loaded, lease.full.prefix_length, lease.full.logical_length
    squares = np.zeros((loaded.num_kv_heads, len(lease.job.document_ids)))
    for segment in lease.segments:
        found = attention_of(loaded, [*lease.job.prompt.prefix_ids, *lease.job.document_ids, *segment.token_ids])
        rows = found[0][:, end:, prefix:end]
        rows = rows / rows.sum(-1, keepdims=True)
        squares += (rows**2).sum(1).reshape(loaded.num_kv_heads, -1, squares.shape[1]).sum(1)
    count = 20
    compacted = compact(lease, "attention-matching-rms", all_heads(lease) * count)
    for head in range(loaded.num_kv_heads):
        best = np.argsort(-squares[head], kind="stable")[:count]
        assert kept_of(compacted.layers[0], head, prefix) == sorted(best.tolist())


@pytest.mark.parametrize("method", FITTING)
def test_the_pass_is_on_policy(method: str, lease: Study) -> None:
    """What the fitting pass computes for a segment is what the model computes later over the compacted cache."""
    loaded = lease.job.loaded
    seen: list[torch.Tensor] = []
    hook = loaded.model.get_decoder().norm.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    try:
        compacted = compact(lease, method, all_heads(lease) * 12)
        in_pass = seen[-1]
        start = 0
        for segment in lease.segments:
            attached = attach_layers(loaded.model, compacted.layers, compacted.logical_length)
            with torch.no_grad():
                loaded.model(torch.tensor([list(segment.token_ids)]), past_key_values=attached)
            stop = start + len(segment.token_ids)
            torch.testing.assert_close(in_pass[start:stop], seen[-1], atol=2e-4, rtol=2e-3)
            start = stop
    finally:
        hook.remove()


def test_without_segments_the_repeat_pass_is_matched(models: Callable[[str], LoadedModel]) -> None:
    study = study_of(models("llama"), copies=6, queries=("context",), keep_ratio=0.05)
    assert not study.segments
    compacted = compact(study, "attention-matching-rms")
    assert kept_keys(study, compacted) == target_total(study.job)
    assert 0 < compacted.report["document_output_error"] < 1
