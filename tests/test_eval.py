"""Claims about evaluations: every number against a slower way to get it, and nothing is run twice."""

from __future__ import annotations

import json
import os
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import scipy.stats
import torch
from tiny_models import make_tiny

from compactor import pipeline
from compactor.attach import CompactedCache, attach_layers
from compactor.config import CompactSettings, DecodeSettings
from compactor.decode import answer_question
from compactor.document import make_document
from compactor.errors import OutputError, SettingsError
from compactor.evaluate import asking, metering, peer, runner
from compactor.evaluate.asking import CacheRespondent, num_positions
from compactor.evaluate.examples import Example, TaskDocument
from compactor.evaluate.metering import MeteredStudy
from compactor.evaluate.records import FULL, Key, Record, ResultsFile
from compactor.evaluate.results import correlations, table
from compactor.evaluate.runner import Evaluation, Plan, Source
from compactor.fidelity import Exchange, answer_log_probs, compare
from compactor.job import prepare, target_total
from compactor.methods import get_method
from compactor.model import LoadedModel, load_model
from compactor.prefill import Prefilled
from compactor.prompt import encode_plain
from compactor.study import Study, prefill_document
from compactor.types import LayerCache, Segment, SilentReporter

TEXT = (
    "The tenant shall pay rent on the first day of each month. Clause 7 says that repairs under 150 euros are paid by "
    "the tenant. The landlord may not enter without notice. Interest of 4.5% is due after 30 days. "
)
EXAMPLES = (
    Example("When is rent due?", ("on the first day",), "f1", kind="open", max_new_tokens=6),
    Example("What does clause 7 say about the deposit and about repairs?", ("150 euros",), "exact"),
    Example("Who pays?", ("the tenant",), "choice-likelihood", choices=("the landlord", "the tenant", "nobody at all")),
    Example("Enter?", ("notice",), "exact", answer_prefix="The landlord"),
)
RATIOS = (0.5, 0.2)
METHODS = ("truncation", "random")
SETTINGS = CompactSettings(
    keep_ratio=0.2, queries=("context", "repeat"), self_study_tokens=32, reserve=128, certify=False
)
PLAN = Plan(METHODS, RATIOS, SETTINGS, max_new_tokens=10)


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    """Measure speed on few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "SPEED_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny random model in float32."""
    return load_model(str(make_tiny("llama", tmp_path_factory.mktemp("eval") / "tiny")), device="cpu")


def task_document(task: str = "leases", seed: int = 0) -> TaskDocument:
    """Return a document of about 180 tokens; another one for every seed and task."""
    text = "".join(f"Part {part} of {task} {seed}. {TEXT}" for part in range(2))
    return TaskDocument(task, f"{task}-{seed}", text, EXAMPLES, seed)


def sources(*tasks: str, documents: int = 1, length: int | None = 180) -> list[Source]:
    return [
        Source(task, f"{task}-{seed}", seed, length, partial(task_document, task, seed))
        for task in tasks or ("leases",)
        for seed in range(documents)
    ]


def evaluate(loaded: LoadedModel, path: Path, given: list[Source], plan: Plan = PLAN, **limits: Any) -> Evaluation:
    """Run to the end, or to the limit; return the counts."""
    evaluation = Evaluation(loaded, plan, ResultsFile(path), SilentReporter())
    made = list(evaluation.run(given, **limits))
    assert len([record for record in made if record.status == "done"]) == evaluation.num_done
    return evaluation


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two tasks, two documents each, two methods, two sizes."""
    path = tmp_path_factory.mktemp("finished") / "results.jsonl"
    evaluate(loaded, path, sources("leases", "loans", documents=2))
    return path


def study_of(loaded: LoadedModel, document: TaskDocument, plan: Plan = PLAN) -> Study:
    job = prepare(make_document(document.name, document.text), loaded, plan.settings)
    return Study(job, prefill_document(job))


def caches(study: Study, method: str, keep_ratio: float) -> CompactedCache:
    """Compact by way of the pipeline."""
    job = replace(study.job, settings=replace(study.job.settings, keep_ratio=keep_ratio))
    return pipeline.compact_study(study, target_total(job), method, certify=False)


def asked_ids(study: Study, example: Example) -> list[int]:
    tokenizer = study.job.loaded.tokenizer
    return [*study.job.prompt.question_ids(example.question), *encode_plain(tokenizer, example.answer_prefix)]


# --------------------------------------------------------------------------------------------- one line each


def test_every_combination_has_one_line(finished: Path) -> None:
    found = [(r["task"], r["document"], r["seed"], r["length"], r["method"], r["keep_ratio"]) for r in lines(finished)]
    expected = {
        (task, f"{task}-{seed}", seed, 180, method, ratio)
        for task in ("leases", "loans")
        for seed in (0, 1)
        for method, ratio in [(FULL, None), *((m, r) for m in METHODS for r in RATIOS)]
    }
    assert len(found) == len(expected)
    assert set(found) == expected
    for record in lines(finished):
        assert record["status"] == "done", record["message"]
        lengths = {len(record[name]) for name in ("scores", "answers", "expected", "kinds", "answer_tokens")}
        assert lengths == {len(EXAMPLES)}
        assert "/" not in record["model"]


def test_a_document_is_prefilled_once_and_nothing_is_run_twice(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled: list[str] = []

    def watch(job: Any) -> Prefilled:
        prefilled.append(job.document.name)
        return prefill_document(job)

    monkeypatch.setattr(runner, "prefill_document", watch)
    path, given = tmp_path / "r.jsonl", sources(documents=2)
    evaluate(loaded, path, given)
    assert prefilled == ["leases-0", "leases-1"]
    before = path.read_bytes()
    again = evaluate(loaded, path, given)
    assert (again.num_present, again.num_done) == (10, 0)
    assert path.read_bytes() == before
    assert len(prefilled) == 2
    more = evaluate(loaded, path, given, replace(PLAN, keep_ratios=(0.5, 0.2, 0.1)))
    assert (more.num_present, more.num_done) == (10, 4)
    assert prefilled[2:] == ["leases-0", "leases-1"]


def test_other_settings_or_questions_are_other_results(loaded: LoadedModel, tmp_path: Path) -> None:
    path, plan = tmp_path / "r.jsonl", Plan(("random",), (0.2,), SETTINGS, max_new_tokens=2)
    evaluate(loaded, path, sources(), plan)
    for other in (replace(plan, max_new_tokens=3), replace(plan, settings=replace(SETTINGS, self_study_tokens=64))):
        assert evaluate(loaded, path, sources(), other).num_done == 2
    fewer = replace(task_document(), examples=EXAMPLES[:1])
    evaluation = evaluate(loaded, path, [replace(sources()[0], make=lambda: fewer)], plan)
    assert evaluation.num_done == 2
    assert len(ResultsFile(path).records) == 2  # the newest of each key


def test_a_torn_line_is_passed_over_and_run_again(loaded: LoadedModel, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    whole = finished.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:-1]) + whole[-1][:50])
    evaluation = evaluate(loaded, path, sources("leases", "loans", documents=2))
    assert (evaluation.num_present, evaluation.num_done) == (19, 1)
    *kept, torn, last = path.read_bytes().splitlines(keepends=True)
    assert (kept, torn) == (whole[:-1], whole[-1][:50] + b"\n")
    assert json.loads(last)["kl"] == json.loads(whole[-1])["kl"]


def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nof today\n")
    with pytest.raises(OutputError, match=r"notes\.txt holds no results"):
        ResultsFile(path)
    assert path.read_text() == "my notes\nof today\n"


@pytest.mark.parametrize("calls", [0, 1, 8])
def test_when_time_is_up_nothing_new_begins_and_the_next_run_completes_the_same_results(
    loaded: LoadedModel, finished: Path, tmp_path: Path, calls: int
) -> None:
    path, given = tmp_path / "r.jsonl", sources("leases", documents=2)
    left = iter([False] * calls)
    stopped = evaluate(loaded, path, given, out_of_time=lambda: next(left, True))
    assert stopped.was_stopped
    assert stopped.num_done == {0: 0, 1: 0, 8: 6}[calls]  # one call is before a document, one before each result
    assert (len(lines(path)) if path.exists() else 0) == stopped.num_done
    if calls == 8:
        resumed = evaluate(loaded, path, given)
        assert not resumed.was_stopped
        assert (resumed.num_present, resumed.num_done) == (6, 4)
        for ours, theirs in zip(lines(path), lines(finished), strict=False):
            for name in ("document", "method", "keep_ratio", "scores", "kl", "answers", "settings_sha256"):
                assert ours[name] == theirs[name], name


def test_an_interrupt_keeps_what_is_done(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> Callable[..., Any]:
        if name == "random":
            raise KeyboardInterrupt
        return get_method(name)

    monkeypatch.setattr(runner, "get_method", interrupted)
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, path, sources())
    assert [(r["method"], r["status"]) for r in lines(path)] == [(FULL, "done"), *[("truncation", "done")] * 2]


def test_a_failure_is_recorded_with_its_sentence_and_the_others_go_on(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(task_document("long"), text=TEXT * 60)
    given = [Source("long", "long-0", 0, None, lambda: long), *sources()]

    def broken(name: str) -> Callable[..., Any]:
        if name == "truncation":
            raise SettingsError("The method is broken; mend it.")
        return get_method(name)

    path = tmp_path / "r.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "get_method", broken)
        evaluation = evaluate(loaded, path, given)
    assert (evaluation.num_failed, evaluation.num_done) == (5 + 2, 3)
    failed = [record for record in lines(path) if record["status"] == "failed"]
    assert [r["error"] for r in failed] == ["DocumentError"] * 5 + ["SettingsError"] * 2
    assert all("too many for the model's window of 2,048" in record["message"] for record in failed[:5])
    assert failed[5]["message"] == "The method is broken; mend it."
    counts = {
        (cell.task, cell.method, cell.keep_ratio): (cell.documents, cell.failed)
        for cell in table(ResultsFile(path).records)
    }
    assert {key: count for key, count in counts.items() if key[0] == "long"} == {
        ("long", *combination): (0, 1) for combination in PLAN.combinations
    }
    others = {key: count for key, count in counts.items() if key[0] != "long"}
    assert others == {key: (0, 1) if key[1] == "truncation" else (1, 0) for key in others} and len(others) == 5
    mended = evaluate(loaded, path, given)  # what failed is tried again, and a result replaces its failure
    assert (mended.num_failed, mended.num_done, mended.num_present) == (5, 2, 3)
    assert [r.document for r in ResultsFile(path).records if r.status == "failed"] == ["long-0"] * 5


def test_what_is_there_of_a_document_that_now_fails_is_not_counted_twice(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, given = tmp_path / "r.jsonl", sources()[:1]
    evaluate(loaded, path, given)
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:3]))

    def broken(*_arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(runner, "Bench", broken)
    again = evaluate(loaded, path, given)
    assert (again.num_present, again.num_done, again.num_failed) == (3, 0, 2)
    assert [r["status"] for r in lines(path)] == ["done"] * 3 + ["failed"] * 2
    assert [(cell.documents, cell.failed) for cell in table(ResultsFile(path).records)] == [(1, 0)] * 3 + [(0, 1)] * 2


def test_a_mean_is_of_the_documents_that_did_not_fail() -> None:
    done = [made_up(i, kl, None) for i, kl in enumerate((0.1, 0.3))]
    (cell,) = table([*done, replace(made_up(2, 9.0, None), status="failed", kl=[], scores=[])])
    assert (cell.documents, cell.failed, cell.questions) == (2, 1, 2)
    assert cell.kl is not None and cell.kl.mean == pytest.approx(0.4)


# --------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_batch_of_questions_is_answered_as_one_by_one(family: str, loaded: LoadedModel, tmp_path: Path) -> None:
    model = loaded if family == "llama" else load_model(str(make_tiny(family, tmp_path / "tiny")), device="cpu")
    study = study_of(model, task_document())
    cache = caches(study, "random", 0.5).attach(model.model)
    texts = [example.question for example in EXAMPLES]
    batch = CacheRespondent(model, cache).generate([study.job.prompt.question_ids(text) for text in texts], 12)
    alone = [
        answer_question(model, cache, study.job.prompt, text, DecodeSettings(max_new_tokens=12)).token_ids
        for text in texts
    ]
    assert batch == alone
    assert len(set(map(tuple, batch))) > 1


@pytest.mark.parametrize("method", ["truncation", "random"])
def test_kl_and_agreement_are_those_of_one_question_at_a_time(method: str, loaded: LoadedModel, finished: Path) -> None:
    study = study_of(loaded, task_document("loans", 1))
    full = attach_layers(loaded.model, study.full.layers, study.full.logical_length)
    other = caches(study, method, 0.2).attach(loaded.model)
    (record,) = (
        r for r in lines(finished) if (r["document"], r["method"], r["keep_ratio"]) == ("loans-1", method, 0.2)
    )
    for i, example in enumerate(EXAMPLES):
        question = asked_ids(study, example)
        limit = example.max_new_tokens or PLAN.max_new_tokens or 0
        ((answer,), (theirs,)) = (CacheRespondent(loaded, one).generate([question], limit) for one in (full, other))
        truth, ours = (answer_log_probs(loaded, one, question, answer) for one in (full, other))
        distance = compare(truth, ours)
        assert len(answer) == record["answer_tokens"][i] <= limit
        assert record["kl"][i] == pytest.approx(distance.mean_kl, rel=1e-3, abs=1e-6)
        assert record["agreement"][i] == pytest.approx(float(distance.agreement.double().mean()))
        assert record["same"][i] == (answer == theirs)
        if example.metric != "choice-likelihood":
            assert record["answers"][i] == loaded.tokenizer.decode(theirs, skip_special_tokens=True)
    assert any(value > 1e-3 for value in record["kl"])


def test_an_empty_answer_is_compared_at_its_stop_token(loaded: LoadedModel) -> None:
    study = study_of(loaded, task_document())
    cache = attach_layers(loaded.model, study.full.layers, study.full.logical_length)
    exchanges = [Exchange((5, 6, 7, 8), ()), Exchange((5, 6), (9, 10))]
    states = CacheRespondent(loaded, cache).states(exchanges)
    assert num_positions(exchanges) == [1, 2]
    logits = loaded.model.get_output_embeddings()(states)
    for part, (question, answer) in zip(logits.split([1, 2]), [([5, 6, 7, 8], []), ([5, 6], [9, 10])], strict=True):
        expected = answer_log_probs(loaded, cache, question, answer)
        torch.testing.assert_close(part.double().log_softmax(-1), expected, atol=1e-5, rtol=1e-4)


def test_the_likely_choice_is_the_one_whose_tokens_are_likeliest_on_average(
    loaded: LoadedModel, finished: Path
) -> None:
    study = study_of(loaded, task_document("leases", 0))
    cache = attach_layers(loaded.model, study.full.layers, study.full.logical_length)
    example = EXAMPLES[2]
    means = []
    for choice in example.choices:
        tokens = encode_plain(loaded.tokenizer, choice)
        log_probs = answer_log_probs(loaded, cache, asked_ids(study, example), tokens)
        means.append(statistics.fmean(float(row[token]) for row, token in zip(log_probs, tokens, strict=True)))
    likeliest = example.choices[max(range(3), key=means.__getitem__)]
    record = next(r for r in lines(finished) if (r["document"], r["method"]) == ("leases-0", FULL))
    assert record["answers"][2] == likeliest
    assert record["scores"][2] == float(likeliest in example.answers)


def test_a_choice_after_a_prefix_begins_with_a_space() -> None:
    assert runner.choice_texts(EXAMPLES[2]) == list(EXAMPLES[2].choices)
    assert runner.choice_texts(replace(EXAMPLES[2], answer_prefix="By"))[1] == " the tenant"
    assert runner.choice_texts(replace(EXAMPLES[2], answer_prefix="By "))[1] == "the tenant"


def test_bytes_are_those_of_a_file_on_the_disk(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[int, int] = {}

    def save_too(cache: CompactedCache) -> int:
        path = tmp_path / f"{len(saved)}.kv"
        cache.save(path)
        saved[os.stat(path).st_size] = sum(t.nbytes for layer in cache.layers for t in layer.tensors().values())
        return measure(cache)

    measure = runner.bytes_on_disk
    monkeypatch.setattr(runner, "bytes_on_disk", save_too)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    evaluate(loaded, tmp_path / "r.jsonl", sources())
    compacted = [record for record in lines(tmp_path / "r.jsonl") if record["method"] != FULL]
    assert {record["file_bytes"]: record["tensor_bytes"] for record in compacted} == saved
    assert len(saved) > 1
    assert list((tmp_path / "scratch").iterdir()) == []


def test_our_method_is_nearer_than_chance_and_reports_its_cost(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    evaluate(loaded, path, sources(), replace(PLAN, methods=("balanced", "random"), keep_ratios=(0.2,)))
    ours, chance = (next(r for r in lines(path) if r["method"] == name) for name in ("balanced", "random"))
    assert statistics.fmean(ours["kl"]) < statistics.fmean(chance["kl"])
    assert ours["kept_keys"] == chance["kept_keys"] == round(0.2 * ours["document_keys"])
    assert ours["shared_seconds"] > chance["shared_seconds"]  # the reference passes, which chance does not use
    assert ours["phases"] and ours["report"]["reconstruction_error"] > 0
    assert ours["predicted_damage"] == ours["report"].get("predicted_damage")


class Clock:
    """Time that passes only where a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_shared_seconds_belong_to_everyone_who_used_them_and_own_seconds_to_one(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(metering, "time", clock)
    job = prepare(make_document("lease", TEXT), loaded, SETTINGS)
    study = MeteredStudy(job, Prefilled([], 0, [], torch.zeros(0)))

    def take(seconds: float) -> float:
        clock.now += seconds
        return seconds

    def scores() -> float:
        return study.once("passes", lambda: take(8.0)) + take(4.0)

    def first() -> float:
        return study.once("scores", scores) + take(1.0)

    def second() -> float:
        return study.once("scores", scores) + study.once("other", lambda: take(16.0)) + take(2.0)

    results = [study.measure(run) for run in (first, second, first, lambda: take(0.5))]
    assert [result for result, _ in results] == [13.0, 30.0, 13.0, 0.5]
    assert [(cost.own_s, cost.shared_s) for _, cost in results] == [(1.0, 12.0), (2.0, 28.0), (1.0, 12.0), (0.5, 0.0)]


def test_segments_are_shared_by_those_who_ask_for_them(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(), []

    def ask(*_: object) -> list[Segment]:
        clock.now += 8.0
        asked.append("once")
        return [Segment((1, 2, 3), "repeat", 2)]

    monkeypatch.setattr(metering, "time", clock)
    monkeypatch.setattr("compactor.study.ask", ask)
    job = prepare(make_document("lease", TEXT), loaded, SETTINGS)
    study = MeteredStudy(job, Prefilled([], 0, [], torch.zeros(0)))
    runs: list[Callable[[], Any]] = [lambda: study.segments, lambda: 0, lambda: study.segments]
    costs = [study.measure(run)[1] for run in runs]
    assert [(cost.own_s, cost.shared_s) for cost in costs] == [(0.0, 8.0), (0.0, 0.0), (0.0, 8.0)]
    assert asked == ["once"]


# --------------------------------------------------------------------------------------------- the table


def test_the_table_is_what_the_lines_say(finished: Path) -> None:
    cells = table(ResultsFile(finished).records)
    assert len(cells) == 2 * 5
    assert [(cell.method, cell.keep_ratio) for cell in cells[:5]] == [
        (FULL, None), ("truncation", 0.5), ("truncation", 0.2), ("random", 0.5), ("random", 0.2),
    ]  # fmt: skip
    for cell in cells:
        own = [
            line
            for line in lines(finished)
            if (line["task"], line["method"], line["keep_ratio"]) == (cell.task, cell.method, cell.keep_ratio)
        ]
        assert (cell.documents, cell.questions) == (len(own), 2 * len(EXAMPLES))
        assert cell.score is not None
        assert cell.score.mean == pytest.approx(numpy.mean([line["scores"] for line in own]))
        assert cell.score.low <= cell.score.mean <= cell.score.high
        assert cell.seconds == pytest.approx(numpy.median([line["seconds"] for line in own]))
        assert cell.tensor_bytes == pytest.approx(numpy.mean([line["tensor_bytes"] for line in own]))
        if cell.method == FULL:
            assert (cell.kl, cell.agreement, cell.same, cell.file_bytes) == (None, None, None, None)
            assert cell.bytes == cell.tensor_bytes
            continue
        assert cell.kl is not None
        assert cell.kl.mean == pytest.approx(numpy.mean([line["kl"] for line in own]))
        means = [float(numpy.mean(line["kl"])) for line in own]
        assert (cell.kl.low, cell.kl.high) == pytest.approx((min(means), max(means)))  # two documents: its quantiles
        assert cell.agreement == pytest.approx(numpy.mean([line["agreement"] for line in own]))
        assert cell.same == pytest.approx(numpy.mean([line["same"] for line in own]))
        assert cell.bytes == cell.file_bytes == pytest.approx(numpy.mean([line["file_bytes"] for line in own]))


def made_up(document: int, kl: float, damage: float | None, *, method: str = "best", task: str = "t") -> Record:
    return Record(
        "done", "m", task, f"d{document}", document, 100, method, 0.1, "digest", scores=[1.0], kl=[kl, 3 * kl],
        predicted_damage=damage,
    )  # fmt: skip


def test_predicted_damage_is_ranked_against_measured_kl_from_five_documents_on() -> None:
    kl, damage = [0.3, 0.1, 0.4, 0.2, 0.5, 0.6], [3.0, 1.0, 2.0, 5.0, 4.0, 9.0]
    records = [made_up(i, *pair) for i, pair in enumerate(zip(kl, damage, strict=True))]
    expected = scipy.stats.spearmanr(kl, damage).statistic
    (cell,) = table(records)
    assert cell.damage_correlation == pytest.approx(expected)
    (found,) = correlations([*records, made_up(0, 0.1, None, method="kvzip")])
    assert (found.method, found.documents, found.spearman) == ("best", 6, pytest.approx(expected))
    assert table(records[:4])[0].damage_correlation is None
    assert correlations(records[:4]) == []
    two_tasks = [replace(record, task=f"t{i % 2}") for i, record in enumerate(records)]
    assert correlations(two_tasks)[0].spearman == pytest.approx(expected)
    assert [cell.damage_correlation for cell in table(two_tasks)] == [None, None]


def test_a_distance_that_is_not_finite_is_kept_as_nothing_and_leaves_no_mean(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results = ResultsFile(path)
    results.append(replace(made_up(0, 0.1, 1.0), kl=[0.1, float("nan"), float("inf")]))
    results.append(made_up(1, 0.2, float("inf")))
    assert lines(path)[0]["kl"] == [0.1, None, None]
    again = ResultsFile(path).records
    assert again == results.records
    (cell,) = table(again)
    assert cell.kl is None
    assert cell.score is not None and cell.score.mean == 1.0


def test_a_failure_never_hides_a_result(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "r.jsonl")
    done = made_up(0, 0.1, None)
    for record in (replace(done, status="failed"), done, replace(done, status="failed")):
        results.append(record)
    for seen in (results, ResultsFile(tmp_path / "r.jsonl")):
        assert [record.status for record in seen.records] == ["done"]
        assert seen.has(done.key, "digest") and not seen.has(done.key, "other")
        assert not seen.has(Key("m", "t", "d0", 0, 100, "best", 0.2), "digest")


# --------------------------------------------------------------------------------------------- peers


class KeepFirst:
    """A press by the protocol of kvpress: keeps the first keys of every layer."""

    def __init__(self, compression_ratio: float = 0.0) -> None:
        self.compression_ratio = compression_ratio

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        assert model.config._attn_implementation == "sdpa"
        hooks = [block.self_attn.register_forward_hook(self.cut, with_kwargs=True) for block in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def cut(self, module: Any, _inputs: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs["cache_position"][-1] + 1 == kwargs["hidden_states"].shape[1]:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            kept = round(layer.keys.shape[2] * (1.0 - self.compression_ratio))
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        return output


class Wrapping(KeepFirst):
    """A press around another press."""

    def __init__(self, press: KeepFirst) -> None:
        super().__init__(press.compression_ratio)


@pytest.fixture
def fake_kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("kvpress")
    module.KeepFirstPress, module.WrappingPress = KeepFirst, Wrapping  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", module)


def first_keys(layer: LayerCache, kept: int) -> LayerCache:
    """Return the layer with the first keys of every head."""
    keys, values = (part.view(layer.num_kv_heads, -1, part.shape[-1])[:, :kept] for part in (layer.keys, layer.values))
    return replace(
        layer,
        keys=keys.flatten(0, 1),
        values=values.flatten(0, 1),
        biases=torch.zeros(layer.num_kv_heads * kept),
        positions=torch.arange(kept, dtype=torch.int32).repeat(layer.num_kv_heads),
        offsets=torch.arange(layer.num_kv_heads + 1, dtype=torch.int32) * kept,
    )


@pytest.mark.parametrize("name", ["KeepFirstPress", "WrappingPress(KeepFirstPress)"])
def test_a_press_is_asked_as_a_cache_with_its_keys_at_the_positions_after_the_document(
    name: str, loaded: LoadedModel, fake_kvpress: None
) -> None:
    study = study_of(loaded, task_document())
    questions = [asked_ids(study, example) for example in EXAMPLES]
    exchanges = [Exchange(tuple(question), (7, 8, 9)) for question in questions]
    with peer.compressed(loaded, study.job, name, 0.5) as made:
        answers, states = made.respondent.generate(questions, 8), made.respondent.states(exchanges)
    total = study.full.logical_length
    layers = [first_keys(layer, round(total * 0.5)) for layer in study.full.layers]
    ours = CacheRespondent(loaded, attach_layers(loaded.model, layers, total))
    assert loaded.model.config._attn_implementation == "compactor"
    assert answers == ours.generate(questions, 8)
    torch.testing.assert_close(states, ours.states(exchanges), atol=1e-4, rtol=1e-3)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert made.tensor_bytes == numbers * study.job.storage_dtype.itemsize


def test_a_press_that_removes_nothing_answers_as_the_full_cache(
    loaded: LoadedModel, fake_kvpress: None, tmp_path: Path
) -> None:
    plan = Plan((), (1.0,), SETTINGS, 10, peers=("KeepFirstPress",))
    path = tmp_path / "r.jsonl"
    evaluate(loaded, path, sources(), plan)
    full, press = lines(path)
    assert press["method"] == "kvpress:KeepFirstPress"
    assert (press["answers"], press["scores"]) == (full["answers"], full["scores"])
    assert press["same"] == [True] * len(EXAMPLES)
    assert max(press["kl"]) < 1e-6
    assert press["file_bytes"] is None
    assert press["tensor_bytes"] == full["full_bytes"]


def test_a_peer_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(SettingsError, match="pip install kvpress"):
        peer.find_press("KnormPress")


def test_a_press_of_another_name_or_kind_is_refused(fake_kvpress: None) -> None:
    with pytest.raises(SettingsError, match="choose from KeepFirstPress, WrappingPress"):
        peer.find_press("KeepLastPress")
    with pytest.raises(SettingsError, match="cannot be made from a ratio alone"):
        peer.make_press("WrappingPress", 0.5)
