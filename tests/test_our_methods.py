"""Claims about fast, balanced and best: which queries they ask, what their sizes and errors mean, what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
from tiny_models import make_tiny

from compactor import study as study_module
from compactor.attach import dense_heads
from compactor.budget_profile import BudgetProfile, allocate_by_shares, profile_model, write_profile
from compactor.config import OUR_METHODS, CompactSettings
from compactor.document import make_document
from compactor.errors import NumericalError
from compactor.job import Job, prepare
from compactor.methods import Compacted, get_method, ours
from compactor.methods.best import SELF_STUDY_ROUNDS
from compactor.methods.fast import sample_pieces
from compactor.methods.ours import first_size, remaining_gains
from compactor.model import LoadedModel, load_model
from compactor.packed import Packed
from compactor.pipeline import compact
from compactor.solve import fit as fit_module
from compactor.solve.fit import FitLayer, HeadFit
from compactor.solve.refine import HeadKeyValues, Refiner
from compactor.solve.select import Selection
from compactor.study import Study, picks_per_chunk, prefill_document
from compactor.types import Segment

TEXT = "The tenant shall pay rent on the first day of each month. Repairs under 150 euros are paid by the tenant. "
COPIES = 9  # more than one context span
CHUNK = 48


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several greedy problems a head, and small ones."""
    monkeypatch.setattr(study_module, "GREEDY_CHUNK", CHUNK)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_layers=2)), device="cpu")


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny("gemma3_text", tmp_path_factory.mktemp("sliding"), num_layers=2)), device="cpu")


def study_of(loaded: LoadedModel, copies: int = COPIES, **settings: Any) -> Study:
    self_study_tokens = None if settings.get("method") == "fast" else 24
    fields = {
        "keep_ratio": 0.2, "cache_dtype": "float32", "self_study_tokens": self_study_tokens, "reserve": 128,
        "certify": False, **settings,
    }  # fmt: skip
    if "max_error" in settings:
        del fields["keep_ratio"]
    text = make_document("lease", "".join(f"Part {i}. {TEXT}" for i in range(copies)))
    job = prepare(text, loaded, CompactSettings(**fields))
    return Study(job, prefill_document(job))


@pytest.fixture(scope="module")
def lease(tiny: LoadedModel) -> Study:
    """One study, shared by the tests that only read it."""
    return study_of(tiny)


def asking(study: Study, **settings: Any) -> Study:
    """The study with other settings of the size; what was computed before stays."""
    job = replace(study.job, settings=replace(study.job.settings, **{"keep_ratio": None, **settings}))
    other = Study(job, study.full, study.statistics)
    vars(other)["segments"] = study.segments
    return other


def num_document_keys(study: Study) -> int:
    return len(study.full.full_layers) * study.job.loaded.num_kv_heads * len(study.job.document_ids)


def counts_of(study: Study, compacted: Compacted) -> list[int]:
    layers = [compacted.layers[i] for i in study.full.full_layers]
    return [length - study.full.prefix_length for layer in layers for length in layer.head_lengths]


def assert_same(first: Compacted, second: Compacted) -> None:
    for layer, other in zip(first.layers, second.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name
    assert first.report == second.report


# ------------------------------------------------------------------------------------------- what all three do


@pytest.mark.parametrize("method", OUR_METHODS)
def test_equal_seeds_give_equal_tensors(method: str, tiny: LoadedModel) -> None:
    first, again = (get_method(method)(study_of(tiny, method=method), 150) for _ in range(2))
    assert_same(first, again)
    if method != "fast":  # the only one that draws no random number
        other = get_method(method)(study_of(tiny, method=method, seed=1), 150)
        assert any(not torch.equal(a.biases, b.biases) for a, b in zip(first.layers, other.layers, strict=True))


def test_methods_and_sizes_of_one_study_do_not_influence_each_other(lease: Study, tiny: LoadedModel) -> None:
    shared = {
        (method, size): get_method(method)(lease, size) for method in OUR_METHODS for size in (300, 120)
    }  # fmt: skip
    for (method, size), made in shared.items():
        if size == 120:
            assert_same(get_method(method)(study_of(tiny), size), made)


@pytest.mark.parametrize("method", OUR_METHODS)
def test_a_method_keeps_exactly_the_keys_that_were_asked_and_every_head_some(method: str, lease: Study) -> None:
    for size in (len(lease.full.full_layers) * lease.job.loaded.num_kv_heads, 151, 400):
        counts = counts_of(lease, get_method(method)(lease, size))
        assert sum(counts) == size and min(counts) >= max(1, size // 10 // len(counts))


@pytest.mark.parametrize("method", OUR_METHODS)
def test_keeping_everything_changes_nothing(method: str, lease: Study) -> None:
    made = get_method(method)(lease, num_document_keys(lease))
    for layer, full in zip(made.layers, lease.full.layers, strict=True):
        assert all(torch.equal(tensor, full.tensors()[name]) for name, tensor in layer.tensors().items())
    assert made.report["reconstruction_error"] == made.report["predicted_damage"] == 0.0


@pytest.mark.parametrize("method", OUR_METHODS)
def test_sliding_layers_stay_as_they_are(method: str, sliding: LoadedModel) -> None:
    study = study_of(sliding, copies=2, method=method)
    made = get_method(method)(study, 40)
    assert sum(counts_of(study, made)) == 40
    assert torch.equal(made.layers[0].keys, study.full.layers[0].keys)
    assert made.layers[0].sliding_window == study.full.layers[0].sliding_window


@pytest.mark.parametrize("method", OUR_METHODS)
def test_predicted_damage_and_error_fall_with_size(method: str, lease: Study) -> None:
    made = [get_method(method)(lease, size) for size in (40, 120, 400, 800)]
    for name in ("predicted_damage", "reconstruction_error"):
        values = [float(one.report[name]) for one in made]
        assert values == sorted(values, reverse=True) and values[0] > 2 * values[-1] > 0, name
    for one in made:
        assert one.report["reconstruction_error"] <= one.report["reconstruction_error_before_values"]


@pytest.mark.parametrize("queries", [("context",), ("repeat",), ("self-study",), ("context", "self-study")])
@pytest.mark.parametrize("method", OUR_METHODS)
def test_every_choice_of_queries_works_with_every_method(
    method: str, queries: tuple[str, ...], tiny: LoadedModel
) -> None:
    study = study_of(tiny, queries=queries)  # the study of another method
    made = get_method(method)(study, 120)
    assert sum(counts_of(study, made)) == 120 and 0 < made.report["reconstruction_error"] < 1


def test_damage_is_the_squared_error_of_all_heads_in_common_currency(
    lease: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: dict[int, list[HeadFit]] = {}
    plain = ours.report

    def seen(study: Study, fits: dict[int, FitLayer], *others: Any) -> dict[str, object]:
        heads.update({i: layer.heads for i, layer in fits.items()})
        return plain(study, fits, *others)

    monkeypatch.setattr(ours, "report", seen)
    said = get_method("balanced")(lease, 120).report
    norms = lease.full.residual_norms
    error = sum(head.squared_error / float(norms[i]) ** 2 for i in heads for head in heads[i])
    energy = sum(head.energy / float(norms[i]) ** 2 for i in heads for head in heads[i])
    assert said["reconstruction_error"] == pytest.approx((error / energy) ** 0.5)
    assert said["predicted_damage"] == pytest.approx(error / (2 * len(lease.job.document_ids)))
    for i, layer in heads.items():
        own = sum(head.squared_error for head in layer) / sum(head.energy for head in layer)
        assert said["reconstruction_error_per_layer"][str(i)] == pytest.approx(own**0.5)


# ------------------------------------------------------------------------------------------- queries of each


def test_fast_asks_no_self_study_and_repeats_pieces_of_the_document(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_fields: object) -> list[Segment]:
        raise AssertionError("fast must not ask")

    monkeypatch.setattr(study_module, "self_study_segments", refuse)
    study = study_of(tiny, method="fast")
    get_method("fast")(study, 150)
    assert "segments" not in vars(study)
    pieces = sample_pieces(study)
    document = study.job.document_ids
    repeated = [segment.token_ids[segment.answer_start :] for segment in pieces]
    assert repeated
    starts = [next(i for i in range(len(document)) if tuple(document[i : i + len(one)]) == one) for one in repeated]
    assert starts == sorted(starts) and all(segment.source == "repeat" for segment in pieces)


def test_fast_keeps_keys_and_values_as_they_are(lease: Study) -> None:
    made = get_method("fast")(lease, 120)
    for layer, full in zip(made.layers, lease.full.layers, strict=True):
        assert not layer.biases.any()
        for head, (start, stop) in enumerate(pairwise(layer.offsets.tolist())):
            own, all_keys = slice(start, stop), [part[0, head] for part in dense_heads(full)]
            rows = layer.positions[own].long()
            assert rows.tolist() == sorted(set(rows.tolist()))
            for found, whole in zip((layer.keys[own], layer.values[own]), all_keys, strict=True):
                assert torch.equal(found, whole[rows].to(found.dtype))


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 300, 1024, 5000])
def test_pieces_of_fast_are_few_and_spread_over_the_document(num_tokens: int, lease: Study) -> None:
    ids = list(range(100_000, 100_000 + num_tokens))  # every token is its own position
    study = Study(replace(lease.job, document_ids=ids), lease.full)
    pieces = [segment.token_ids[segment.answer_start :] for segment in sample_pieces_in(study, 2048)]
    tokens = [token - 100_000 for piece in pieces for token in piece]
    assert tokens and len(tokens) == len(set(tokens)) and max(tokens) < num_tokens
    assert len(pieces) >= min(4, -(-num_tokens // 64))
    if num_tokens >= 1024:
        assert len(tokens) <= num_tokens // 4 + 64
        assert min(tokens) < num_tokens / 3 and max(tokens) > num_tokens * 2 / 3


def sample_pieces_in(study: Study, room: int) -> list[Segment]:
    """The pieces of a document in a window that leaves ``room`` tokens."""
    with patch.object(Job, "room", new_callable=PropertyMock, return_value=room):
        return sample_pieces(study)


@pytest.mark.parametrize(("copies", "queries"), [(2, ()), (COPIES, ("repeat",))])
def test_fast_is_greedy_where_the_documents_own_queries_say_nothing(
    copies: int, queries: tuple[str, ...], tiny: LoadedModel
) -> None:
    """A document of one context span scores nothing: sorting zeros would keep its beginning, in the first heads. Nor
    does a study without context queries, as an evaluation may make it for several methods."""
    study = study_of(tiny, copies=copies, queries=queries)
    made = get_method("fast")(study, 60)
    counts = counts_of(study, made)
    assert sum(counts) == 60 and max(counts) < 40
    first = made.layers[0].positions[study.full.prefix_length : made.layers[0].head_lengths[0]]
    assert first.tolist() != list(range(study.full.prefix_length, study.full.prefix_length + len(first)))


def test_best_studies_more_than_balanced_and_shares_its_repeat_pass(tiny: LoadedModel) -> None:
    study = study_of(tiny, self_study_tokens=800)
    more = study.more_segments(SELF_STUDY_ROUNDS)

    def rows(segments: list[Segment], source: str) -> list[Segment]:
        return [segment for segment in segments if segment.source == source]

    assert rows(more, "repeat") == rows(study.segments, "repeat")
    tokens = [sum(len(one.token_ids) for one in rows(segments, "self-study")) for segments in (study.segments, more)]
    assert tokens[1] > 1.3 * tokens[0] > 0
    asked: list[list[Segment]] = []
    plain = study.run_layers

    def seen(segments: Any, *arguments: Any, **fields: Any) -> None:
        asked.append(list(segments))
        plain(segments, *arguments, **fields)

    study.run_layers = seen  # type: ignore[method-assign]
    get_method("best")(study, 100)
    get_method("balanced")(study, 100)
    assert [len(batch) for batch in asked] == [len(more)] * 2 + [len(study.segments)] * 2  # to select, then to fit


# ------------------------------------------------------------------------------------------- --max-error


@pytest.mark.parametrize("method", OUR_METHODS)
def test_max_error_holds_and_a_much_smaller_cache_would_break_it(method: str, lease: Study) -> None:
    study = asking(lease, max_error=0.25)
    everything = num_document_keys(study)
    made = get_method(method)(study, everything)
    size = sum(counts_of(study, made))
    assert made.report["reconstruction_error"] <= 0.25 and size < everything
    smaller = get_method(method)(lease, int(0.8 * size))
    assert smaller.report["reconstruction_error"] > 0.25
    assert_same(get_method(method)(lease, size), made)  # the answer is the cache of that size


def test_a_tighter_bound_keeps_more_and_one_that_nothing_meets_keeps_everything(lease: Study) -> None:
    sizes = []
    for bound in (0.6, 0.3, 0.1, 1e-9):
        made = get_method("balanced")(asking(lease, max_error=bound), num_document_keys(lease))
        assert made.report["reconstruction_error"] <= bound
        sizes.append(sum(counts_of(lease, made)))
    assert sizes == sorted(set(sizes)) and sizes[-1] == num_document_keys(lease)


def test_a_bound_that_everything_meets_keeps_one_key_a_head(lease: Study) -> None:
    made = get_method("balanced")(asking(lease, max_error=100.0), num_document_keys(lease))
    assert counts_of(lease, made) == [1] * 4


@pytest.mark.parametrize("true_exponent", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("bound", [0.01, 0.1, 0.5])
def test_the_search_ends_close_to_the_smallest_size_however_wrong_the_forecast(
    bound: float, true_exponent: float, lease: Study
) -> None:
    """The fit is replaced by a known error curve, which the gains foretell with another exponent."""
    total = num_document_keys(lease)
    tried: list[int] = []

    def error(size: int) -> float:
        return (1.0 - size / total) ** true_exponent * (size / 4) ** -0.3

    def known(size: int) -> Compacted:
        tried.append(size)
        return Compacted([], 0, {"reconstruction_error": error(size), "size": size})

    num_document = len(lease.job.document_ids)
    gains = torch.linspace(1, 0, num_document).square().expand(2, 2, -1)
    found = ours.solve_error(lease, bound, Selection(torch.zeros(0), gains), known)
    assert error(int(found.report["size"])) <= bound
    assert len(tried) <= ours.ERROR_ROUNDS + 1 and len(set(tried)) == len(tried)
    assert all(4 <= size <= total for size in tried)
    smallest = next(size for size in range(4, total + 1) if error(size) <= bound)
    assert smallest <= found.report["size"] <= max(1.35 * smallest, smallest + 0.25 * (total - smallest))


def test_remaining_gains_are_what_the_largest_leave() -> None:
    gains = torch.tensor([[[4.0, 1.0], [3.0, 0.0]]])
    assert remaining_gains(gains).tolist() == [4.0, 1.0, 0.0, 0.0]
    left_out = remaining_gains(gains)
    assert first_size(left_out, 0.5, 1) == 2  # a quarter of 4 may be left out
    assert first_size(left_out, 0.49, 1) == 3
    assert first_size(left_out, 5.0, 1) == 1 and first_size(left_out, 5.0, 2) == 2
    assert first_size(left_out, 1e-9, 1) <= 4


# ------------------------------------------------------------------------------------------- budgets and curves


def test_a_budget_profile_replaces_the_ranking(lease: Study, tmp_path: Path) -> None:
    shares = [[0.1, 0.4], [0.3, 0.2]]
    path = tmp_path / "profile.json"
    write_profile(path, BudgetProfile(profile_model(lease.job.loaded.identity()), [0, 1], shares, 1, 0.2))
    study = asking(lease, keep_ratio=0.2, budget=str(path))
    expected = allocate_by_shares(torch.tensor(shares), 150, len(study.job.document_ids)).flatten().tolist()
    assert expected == [15, 60, 45, 30]
    for method in OUR_METHODS:
        assert counts_of(study, get_method(method)(study, 150)) == expected
        assert counts_of(lease, get_method(method)(lease, 150)) != expected


def test_kept_curves_carry_the_gram_matrices_and_gains_of_the_kept_keys(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the attention of the rows of the fit, recorded as the layers see it."""
    study = study_of(tiny, keep_curves=True)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, float, Packed]] = {}
    plain = FitLayer.attend_packed

    def recorded(
        self: FitLayer, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        index = next(i for i, layer in enumerate(study.full.layers) if layer is self.full)
        seen[index] = queries.clone(), keys.clone(), scaling, self.packed
        return plain(self, queries, keys, values, scaling)

    with monkeypatch.context() as patch:
        patch.setattr(FitLayer, "attend_packed", recorded)
        made = get_method("balanced")(study, 150)
    assert made.curves is not None
    prefix, weights = study.full.prefix_length, study_module.source_weights(study.job, study.segments)
    selection = next(value for value in study.statistics.values() if isinstance(value, Selection))
    for index, (queries, keys, scaling, packed) in seen.items():
        full_keys = dense_heads(study.full.layers[index])[0][0].double()
        curves = made.curves[index]
        assert curves is not None
        for head, curve in enumerate(curves):
            layer = made.layers[index]
            own_entries = slice(int(layer.offsets[head]) + prefix, int(layer.offsets[head + 1]))
            kept, refined = layer.positions[own_entries].long(), layer.keys[own_entries].double()
            total = torch.zeros(len(kept), len(kept), dtype=torch.float64)
            for query_head in (2 * head, 2 * head + 1):
                gain = float(study.job.head_gains[index, query_head])
                for (first, last), source in zip(packed.bounds, packed.sources, strict=True):
                    own = torch.cat([full_keys[head], keys[head, first:last].double()])
                    scores = scaling * queries[query_head, first:last].double() @ own.T
                    hidden = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
                    scores[:, len(full_keys[head]) :].masked_fill_(hidden, -torch.inf)
                    shares = (
                        (scaling * queries[query_head, first:last].double() @ refined.T)
                        .sub_(scores.logsumexp(-1, keepdim=True))
                        .exp_()
                    )
                    total += weights[source] * gain**2 * shares.T @ shares
            currency = float(study.full.residual_norms[index]) ** -2
            torch.testing.assert_close(curve.diagonals.double(), total.diagonal() * currency, rtol=1e-3, atol=1e-9)
            roots = total.diagonal().sqrt()
            whole = total / roots / roots.unsqueeze(-1)
            chunk_of = (kept - prefix) // CHUNK
            assert curve.chunk_lengths == torch.bincount(chunk_of, minlength=len(curve.blocks)).tolist()
            for chunk, block in enumerate(curve.blocks):
                own = whole[chunk_of == chunk][:, chunk_of == chunk]
                torch.testing.assert_close(block.double(), own, rtol=2e-3, atol=2e-3)  # float16
            by_key = dict(
                zip(selection.order[index, head].tolist(), selection.gains[index, head].tolist(), strict=True)
            )
            assert curve.gains.tolist() == pytest.approx([by_key[key - prefix] for key in kept.tolist()])
    assert get_method("balanced")(study_of(tiny), 150).curves is None


def test_one_order_serves_every_size_of_a_document_that_is_not_long(
    lease: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_document = len(lease.job.document_ids)
    longest = -(-num_document // -(-num_document // CHUNK))
    everything = num_document_keys(lease)
    assert picks_per_chunk(lease, 10) == picks_per_chunk(lease, everything) == longest
    monkeypatch.setattr(study_module, "DEEP_TOKENS", 100)
    assert study_module.LEAST_PICKS <= picks_per_chunk(lease, 10) < picks_per_chunk(lease, everything) == longest


def test_a_long_document_is_ordered_to_the_depth_that_its_size_needs(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = get_method("balanced")(study_of(tiny), 60)
    monkeypatch.setattr(study_module, "DEEP_TOKENS", 100)
    study = study_of(tiny)
    monkeypatch.setattr(study_module, "LEAST_PICKS", 4)
    assert picks_per_chunk(study, 60) < CHUNK / 2
    shallow = get_method("balanced")(study, 60)
    assert sum(counts_of(study, shallow)) == 60
    assert shallow.report["reconstruction_error"] == pytest.approx(deep.report["reconstruction_error"], rel=0.05)
    for size in (400, 60):  # each size has its own order
        assert_same(get_method("balanced")(study, size), get_method("balanced")(study_of(tiny), size))


def test_every_layer_is_fitted_to_queries_that_compacted_layers_below_gave(
    lease: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On-policy: what layer 1 sees changes with how much layer 0 kept."""
    seen: dict[int, torch.Tensor] = {}
    plain = FitLayer.attend_packed

    def recorded(self: FitLayer, queries: torch.Tensor, *others: Any) -> torch.Tensor:
        index = next(i for i, layer in enumerate(lease.full.layers) if layer is self.full)
        seen[index] = queries.clone()
        return plain(self, queries, *others)

    monkeypatch.setattr(FitLayer, "attend_packed", recorded)
    made = get_method("balanced")(lease, 40)
    few = dict(seen)
    get_method("balanced")(lease, num_document_keys(lease))
    torch.testing.assert_close(few[0], seen[0])
    assert float((few[1] - seen[1]).abs().max()) > 0.01
    assert made.layers[0].head_lengths[0] < lease.full.layers[0].head_lengths[0]


def test_equal_runs_write_equal_files(tiny: LoadedModel, tmp_path: Path) -> None:
    """Byte for byte, sidecar and certificate included: no timing, no path and no global random state is in a file."""
    settings = CompactSettings(
        keep_ratio=0.2, self_study_tokens=24, reserve=128, keep_curves=True, budget=None, certify=True
    )
    text = make_document("lease", TEXT * 6)
    for name in ("one", "two"):
        torch.manual_seed(len(name + text.text) if name == "one" else 7)
        cache = compact(text, tiny, settings)
        assert cache.metadata.report["seconds"]["fit"] > 0
        cache.save(tmp_path / f"{name}.kv")
    for suffix in (".kv", ".kv.curves"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["balanced", "fast", "attention-matching-rms", "attention-matching-omp"])
def test_numbers_that_are_not_finite_are_an_error_that_names_layer_and_head(
    method: str, wrong: float, tiny: LoadedModel
) -> None:
    study = study_of(tiny, copies=2, queries=("repeat",))
    layer = study.full.layers[1]
    num_keys = layer.head_lengths[0]
    layer.values[num_keys + num_keys // 2, 3] = wrong  # of head 1, in the middle of the document
    with pytest.raises(NumericalError, match=r"^Layer 1, KV head 1: .*; take --dtype float32"):
        get_method(method)(study, 150)


@pytest.mark.parametrize("factor", [-1.0, float("nan")])
@pytest.mark.parametrize(("keep_curves", "every_other"), [(False, 10**9), (True, 10**9), (False, 0)])
def test_a_head_that_its_refinement_made_worse_stays_as_it_was(
    tiny: LoadedModel, keep_curves: bool, every_other: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted to all rows, or to every other."""

    def spoil(by: float) -> Callable[..., list[HeadKeyValues]]:
        return lambda _self, _parts, heads: [replace(heads[0], values=by * heads[0].values), *heads[1:]]

    monkeypatch.setattr(fit_module, "EVERY_OTHER", every_other)
    study = study_of(tiny, keep_curves=keep_curves)
    tried = asking(study, refine_steps=3, keep_ratio=0.2)
    monkeypatch.setattr(Refiner, "refine", spoil(1.0))
    plain = get_method("balanced")(tried, 60)
    monkeypatch.setattr(Refiner, "refine", spoil(factor))
    made = get_method("balanced")(tried, 60)
    for one, other in zip(made.layers, plain.layers, strict=True):
        for name in ("keys", "values", "biases", "positions"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert made.report["reconstruction_error"] == pytest.approx(plain.report["reconstruction_error"], rel=1e-3)
