"""Claims about balanced on documents of many sections: a sample tells how many keys a layer keeps, its rows which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from compactor.budget_profile import BudgetProfile, allocate_by_shares, profile_model, write_profile
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.errors import NumericalError
from compactor.job import prepare
from compactor.methods import get_method, sampled
from compactor.methods.ours import head_counts
from compactor.methods.sampled import by_sample, sampled_sections, sampled_segments, spread_out
from compactor.model import LoadedModel, load_model
from compactor.solve.budget import allocate
from compactor.solve.fit import FitLayer
from compactor.study import Study, fit, prefill_document, scored_selection, source_weights

TEXT = "The tenant shall pay rent on the first day of each month. Repairs under 150 euros are paid by the tenant. "
SECTION = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(make_tiny("llama", tmp_path_factory.mktemp("tiny"), num_layers=2)), device="cpu")


@pytest.fixture(autouse=True)
def short_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "SECTION_TOKENS", SECTION)


@pytest.fixture(scope="module")
def lease(tiny: LoadedModel) -> Study:
    return study_of(tiny)


def study_of(loaded: LoadedModel, **settings: Any) -> Study:
    fields = {
        "keep_ratio": 0.2, "cache_dtype": "float32", "self_study_tokens": 200, "reserve": 128, "certify": False,
        **settings,
    }  # fmt: skip
    text = make_document("lease", "".join(f"Part {i}. {TEXT}" for i in range(9)))
    job = prepare(text, loaded, CompactSettings(**fields))
    return Study(job, prefill_document(job))


@pytest.mark.parametrize("num_document", [1, 60, 100, 150, 200, 211, 1000, 5003])
def test_sections_of_a_sample_are_equally_far_apart_and_their_share_is_that_of_the_sample(num_document: int) -> None:
    sections = sampled_sections(num_document)
    count = round(num_document / SECTION)
    if count < 2 * sampled.LEAST_SECTIONS:
        assert sections == []
        return
    starts = torch.tensor([first for first, _ in sections])
    every = round(int(starts.diff()[0]) / SECTION)
    assert every == 2 or len(sections) >= sampled.LEAST_SECTIONS
    assert every == sampled.EVERY or (every < sampled.EVERY) == (count < sampled.LEAST_SECTIONS * sampled.EVERY)
    assert len(sections) <= max(count / every + 1, sampled.ENOUGH_SECTIONS + 1)
    assert (starts.diff() - every * SECTION).abs().max() <= every * SECTION / 5
    assert all(abs(last - first - SECTION) <= SECTION / 5 for first, last in sections)
    assert starts[0] > 0 and sections[-1][1] <= num_document
    covered = sum(last - first for first, last in sections)
    assert abs(covered * every - num_document) <= every * SECTION


def test_segments_say_what_they_are_about(lease: Study) -> None:
    document = lease.job.document_ids
    repeats = [one for one in lease.segments if one.source == "repeat"]
    for one in repeats:
        own = one.token_ids[one.answer_start :]
        assert one.about is not None and list(own) == document[one.about : one.about + len(own)]
    studied = [one for one in lease.segments if one.source == "self-study"]
    assert {one.about for one in studied if one.about is not None}
    assert all(one.about is None or 0 <= one.about < len(document) for one in studied)


def test_a_sample_repeats_its_sections_and_asks_about_no_others(lease: Study) -> None:
    document, sections = lease.job.document_ids, sampled_sections(len(lease.job.document_ids))
    sample = sampled_segments(lease, lease.segments, sections)
    repeated = [one.token_ids[one.answer_start :] for one in sample if one.source == "repeat"]
    assert [list(ids) for ids in repeated] == [document[first:last] for first, last in sections]
    inside = [one for one in lease.segments if one.about is not None and one.source == "self-study"]
    inside = [one for one in inside if any(first <= int(one.about or 0) < last for first, last in sections)]
    assert [one for one in sample if one.source == "self-study" and one.about is not None] == inside
    assert sampled_segments(lease, lease.segments, []) == []
    alone = [one for one in lease.segments if one.source == "self-study"]
    assert all(one.source == "self-study" for one in sampled_segments(lease, alone, sections))


def test_each_gain_of_a_sample_stands_for_as_many_keys() -> None:
    gains = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0))
    for num_document in (7, 21, 26):
        spread = spread_out(gains, num_document)
        assert spread.shape == (2, 3, num_document) and (spread.diff(dim=-1) <= 0).all()
        for own, expanded in zip(gains.flatten(0, 1), spread.flatten(0, 1), strict=True):
            times = torch.tensor([int((expanded == one).sum()) for one in own])
            assert int(times.sum()) == num_document and int(times.max() - times.min()) <= 1


def test_a_layer_keeps_what_the_sample_says_and_the_best_keys_by_its_own_rows(lease: Study) -> None:
    """Layer 0 sees the same queries in both passes, so that the scores of a whole selection are its oracle."""
    weights = source_weights(lease.job, lease.segments)
    selection = by_sample(lease, lease.segments, weights, 150)
    assert selection.order is None and selection.by_position() is None
    counts = head_counts(lease, selection, 150)
    assert int(counts.sum()) == 150
    made = fit(lease, lease.segments, weights, selection, counts)
    whole = scored_selection(lease, lease.segments, weights)
    assert whole.order is not None
    expected = allocate(whole.gains[:1], int(counts[0].sum()))[0].tolist()
    first, second = made.values()
    assert [len(head.kept) for head in first.heads] == expected
    for head, order, count in zip(first.heads, whole.order[0], expected, strict=True):
        assert set(head.kept.tolist()) == set(order[:count].tolist())
    assert sum(len(head.kept) for head in second.heads) == int(counts[1].sum())


def test_the_sample_of_everything_shares_the_keys_out_as_all_rows_do(
    lease: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(num_document: int) -> list[tuple[int, int]]:
        return [(first, min(first + SECTION, num_document)) for first in range(0, num_document, SECTION)]

    monkeypatch.setattr(sampled, "sampled_sections", everything)
    weights = source_weights(lease.job, lease.segments)
    found = head_counts(lease, by_sample(lease, lease.segments, weights, 150), 150)
    whole = head_counts(lease, scored_selection(lease, lease.segments, weights), 150)
    # the repeated sections are shorter than the pieces of the repeat pass, nothing else differs
    assert (found.sum(1) - whole.sum(1)).abs().max() <= 15


def test_short_documents_are_scored_whole(lease: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "LEAST_SECTIONS", 100)
    weights = source_weights(lease.job, lease.segments)
    found, whole = by_sample(lease, lease.segments, weights, 150), scored_selection(lease, lease.segments, weights)
    assert found.order is not None and whole.order is not None
    assert torch.equal(found.order, whole.order) and torch.equal(found.gains, whole.gains)


def test_given_shares_of_heads_hold(lease: Study, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    shares = [[0.1, 0.4], [0.3, 0.2]]
    write_profile(path, BudgetProfile(profile_model(lease.job.loaded.identity()), [0, 1], shares, 1, 0.2))
    job = replace(lease.job, settings=replace(lease.job.settings, budget=str(path)))
    study = Study(job, lease.full)
    vars(study)["segments"] = lease.segments
    made = get_method("balanced")(study, 150)
    lengths = [n - lease.full.prefix_length for layer in made.layers for n in layer.head_lengths]
    assert lengths == allocate_by_shares(torch.tensor(shares), 150, len(job.document_ids)).flatten().tolist()


@pytest.mark.parametrize("queries", [("repeat",), ("self-study",), ("context",), ("repeat", "self-study")])
def test_every_choice_of_queries_keeps_the_size(tiny: LoadedModel, queries: tuple[str, ...]) -> None:
    study = study_of(tiny, queries=queries)
    made = get_method("balanced")(study, 150)
    assert sum(n - study.full.prefix_length for layer in made.layers for n in layer.head_lengths) == 150
    assert 0.0 < float(made.report["reconstruction_error"]) < 1.0


def test_exact_attention_is_computed_once_for_the_rows_of_the_fit(
    lease: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sample costs is a quarter of the rows; no pass but the fit sees them all."""
    rows: dict[str, list[int]] = {}
    run_layers = Study.run_layers

    def counted(self: Study, segments: list[Any], phase: str, make: Any) -> None:
        rows.setdefault(phase, []).append(sum(len(one.token_ids) for one in segments))
        run_layers(self, segments, phase, make)

    monkeypatch.setattr(Study, "run_layers", counted)
    study = Study(lease.job, lease.full)
    vars(study)["segments"] = lease.segments
    get_method("balanced")(study, 150)
    everything = sum(len(one.token_ids) for one in lease.segments)
    assert rows["fit"] == [everything]
    assert 0 < sum(rows["select"]) < everything / 2


def test_curves_hold_the_gains_of_the_fits_own_rows(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tiny, keep_curves=True)
    layers: list[FitLayer] = []
    plain = FitLayer.attend_packed

    def recorded(self: FitLayer, *given: Any) -> torch.Tensor:
        layers.append(self)
        return plain(self, *given)

    monkeypatch.setattr(FitLayer, "attend_packed", recorded)
    made = get_method("balanced")(study, 150)
    assert made.curves is not None
    for layer, curves in zip(layers, made.curves, strict=True):
        assert curves is not None and layer.inputs.order is not None and layer.inputs.curve_gains is not None
        for head, fitted, curve in zip(range(2), layer.heads, curves, strict=True):
            assert torch.equal(curve.gains, layer.inputs.curve_gains[head][fitted.kept])
            assert float(curve.gains.min()) >= float(layer.inputs.curve_gains[head].sort().values[-len(fitted.kept)])


def test_numbers_that_are_not_finite_are_an_error_that_names_layer_and_head(tiny: LoadedModel) -> None:
    study = study_of(tiny)
    assert study.segments
    values = study.full.layers[1].values.view(2, -1, study.full.layers[1].values.shape[-1])
    values[1, study.full.prefix_length + 5] = torch.nan
    with pytest.raises(NumericalError, match="Layer 1, KV head 1"):
        get_method("balanced")(study, 150)
