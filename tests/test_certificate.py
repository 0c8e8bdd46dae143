"""Claims about the certificate: its numbers are those of each answer alone, no fit has seen its questions, and a cache
that fails it is not written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from test_attach import reference_logits
from tiny_models import TRAINING_TEXT, make_tiny

import compactor
from compactor import certificate, console, self_study
from compactor.attach import attach_layers, load
from compactor.certificate import HeldOut, fidelity_report, make_held_out
from compactor.cli.inspect import show_fidelity
from compactor.config import SUMMARISING, CompactSettings
from compactor.document import Document, make_document
from compactor.errors import FidelityError
from compactor.fidelity import ComparedLayer, Exchange, Fidelity, answer_log_probs, compare
from compactor.job import num_compacted, prepare
from compactor.methods import Compacted, get_method
from compactor.model import LoadedModel, load_model
from compactor.pipeline import compact, compact_study, every_key
from compactor.study import Study, prefill_document

TEXT = (
    "The tenant shall pay rent on the first day of each month. Clause 7 says that repairs under 150 euros are paid by "
    "the tenant. The landlord may not enter without notice. Interest of 4.5% is due after 30 days. "
)
SOFT = {"final_logit_softcapping": 10.0}
OPTIONS = ("--device", "cpu", "--method", "random", "--quiet")


def document(copies: int = 2) -> Document:
    return make_document("lease", "".join(f"Part {i}. {TEXT}" for i in range(copies)))


def study_of(folder: Path, family: str = "llama", *, copies: int = 2, fields: Any = None, **settings: Any) -> Study:
    """Prefill a document with a tiny random model in float32."""
    loaded = load_model(str(make_tiny(family, folder / "model", **(fields or {}))), device="cpu")
    job = prepare(
        document(copies), loaded, CompactSettings(**{"cache_dtype": "float32", "method": "random", **settings})
    )
    return Study(job, prefill_document(job))


def random_keys(study: Study, ratio: float, method: str = "random") -> Compacted:
    return get_method(method)(study, round(ratio * every_key(study.job)))


def held_out_of(study: Study) -> HeldOut:
    held_out = study.once("held-out", lambda: make_held_out(study))
    assert held_out is not None
    return held_out


def one_by_one(study: Study, layers: list[Any], logical_length: int) -> list[Fidelity]:
    """Measure every answer by itself, without a batch and with the model's own head."""
    loaded, full = study.job.loaded, study.full
    sides = [attach_layers(loaded.model, full.layers, full.logical_length)]
    sides.append(attach_layers(loaded.model, layers, logical_length))
    found = []
    for exchange in held_out_of(study).exchanges:
        asked = list(exchange.question_ids), list(exchange.answer_ids)
        found.append(compare(*(answer_log_probs(loaded, side, *asked) for side in sides)))
    return found


def assert_says(report: dict[str, Any], alone: list[Fidelity]) -> None:
    kl = torch.cat([fidelity.kl for fidelity in alone])
    agreement = torch.cat([fidelity.agreement for fidelity in alone])
    means = [fidelity.mean_kl for fidelity in alone]
    assert report["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert report["kl_p95"] == pytest.approx(float(kl.quantile(0.95)), rel=1e-3)
    assert report["kl_worst"] == pytest.approx(max(means), rel=1e-3)
    assert report["agreement"] == pytest.approx(float(agreement.double().mean()))


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("qwen3", {}), ("gemma3_text", SOFT)])
def test_the_certificate_says_what_every_answer_alone_says(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    study = study_of(tmp_path, family, fields=fields)
    compacted = random_keys(study, 0.3)
    report = fidelity_report(study, compacted)
    assert report is not None
    held_out = held_out_of(study)
    alone = one_by_one(study, compacted.layers, compacted.logical_length)
    assert_says(report, alone)
    assert report["kl_mean"] > 1e-3
    assert report["tokens"] == sum(len(fidelity.kl) for fidelity in alone)
    assert report["questions"] == len(held_out.questions) == len(set(held_out.questions)) > 4
    worst = max(range(len(alone)), key=lambda i: alone[i].mean_kl)
    assert report["worst_question"] == held_out.questions[worst]
    assert json.loads(json.dumps(report)) == report


def test_answers_are_the_full_caches_greedy_ones(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    loaded, full = study.job.loaded, study.full
    document_ids = [*study.job.prompt.prefix_ids, *study.job.document_ids]
    for exchange in held_out_of(study).exchanges:
        logits = reference_logits(loaded, [*document_ids, *exchange.input_ids])[-len(exchange.answer_ids) :]
        chosen = logits.gather(1, torch.tensor(exchange.answer_ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(chosen, logits.amax(1), atol=1e-3, rtol=0)
    assert full.logical_length == len(document_ids)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_document_means_that_questions_follow_the_prefix(family: str, tmp_path: Path) -> None:
    study = study_of(tmp_path, family, copies=1)
    loaded, prefix = study.job.loaded, list(study.job.prompt.prefix_ids)
    documented = [*prefix, *study.job.document_ids]
    alone = []
    for exchange in held_out_of(study).exchanges:
        sides = [
            reference_logits(loaded, [*before, *exchange.input_ids])[-len(exchange.answer_ids) :].double()
            for before in (documented, prefix)
        ]
        alone.append(compare(*(side.log_softmax(-1) for side in sides)))
    report = fidelity_report(study, random_keys(study, 0.5))
    assert report is not None
    assert_says(report["no_document"], alone)


def test_without_a_template_no_document_is_an_empty_cache(tmp_path: Path) -> None:
    study = study_of(tmp_path, copies=1, fields={"chat_template": None})
    assert study.full.prefix_length == 0
    report = fidelity_report(study, random_keys(study, 0.3))
    assert report is not None and report["no_document"]["kl_mean"] > report["kl_mean"] / 10 > 0


def test_a_cache_that_keeps_everything_is_at_distance_zero(tmp_path: Path) -> None:
    study = study_of(tmp_path, "gemma3_text")
    report = fidelity_report(study, random_keys(study, 1.0))
    assert report is not None
    assert [report[name] for name in ("kl_mean", "kl_p95", "kl_worst", "agreement")] == [0.0, 0.0, 0.0, 1.0]
    assert set(report["attention_error_per_layer"].values()) == {0.0}
    assert report["measured_damage"] == 0.0
    assert report["no_document"]["kl_mean"] > 1e-3


def test_keep_ratio_one_has_a_certificate_of_zero(tmp_path: Path) -> None:
    loaded = load_model(str(make_tiny("llama", tmp_path / "model")), device="cpu")
    cache = compact(document(), loaded, CompactSettings(keep_ratio=1.0, cache_dtype="float32"))
    fidelity = cache.metadata.report["fidelity"]
    assert (fidelity["kl_mean"], fidelity["agreement"]) == (0.0, 1.0)


def test_fewer_keys_are_further_away(tmp_path: Path) -> None:
    study = study_of(tmp_path, copies=3)
    reports = [fidelity_report(study, random_keys(study, ratio)) for ratio in (0.05, 0.4, 0.9)]
    for name in ("kl_mean", "measured_damage"):
        numbers = [report[name] for report in reports if report]
        assert numbers[0] > numbers[1] > numbers[2] > 0, name


def test_a_method_that_shortens_the_document_has_a_kl_and_no_attention_error(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    cut = random_keys(study, 0.3, "truncation")
    assert cut.logical_length < study.full.logical_length
    report = fidelity_report(study, cut)
    assert report is not None
    assert_says(report, one_by_one(study, cut.layers, cut.logical_length))
    assert report["attention_error_per_layer"] is None and report["measured_damage"] is None


def test_the_methods_prediction_stands_beside_what_was_measured(tmp_path: Path) -> None:
    study = study_of(tmp_path, copies=1)
    compacted = random_keys(study, 0.5)
    silent = fidelity_report(study, compacted)
    said = fidelity_report(study, Compacted(compacted.layers, compacted.logical_length, {"predicted_damage": 0.25}))
    assert silent is not None and silent["expected_damage"] is None
    assert said is not None and said["expected_damage"] == 0.25
    assert said["measured_damage"] == silent["measured_damage"] > 0


# ------------------------------------------------------------------------------------------------ attention


def exact_outputs(layer: ComparedLayer, call: dict[str, Any], kept: Any, row: int, head: int) -> torch.Tensor:
    """Attention of one sequence and query head over ragged kept keys and its own tail, float64, without a shortcut."""
    query, key, value = (call[name].double() for name in ("query", "key", "value"))
    kv_head = head // (query.shape[1] // key.shape[1])
    own = slice(int(kept.offsets[kv_head]), int(kept.offsets[kv_head + 1]))
    out = []
    for i in range(query.shape[2]):
        keys = torch.cat([kept.keys[own].double(), key[row, kv_head, : i + 1]])
        values = torch.cat([kept.values[own].double(), value[row, kv_head, : i + 1]])
        biases = torch.cat([kept.biases[own].double(), torch.zeros(i + 1, dtype=torch.float64)])
        out.append((keys @ query[row, head, i] * call["scaling"] + biases).softmax(-1) @ values)
    return torch.stack(out)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_attention_errors_and_damage_are_those_of_float64(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, family, copies=1, fields={"num_layers": 2})
    held_out = held_out_of(study)
    calls: list[tuple[ComparedLayer, dict[str, Any]]] = []
    attend: Callable[..., torch.Tensor] = ComparedLayer.attend

    def watch(layer: ComparedLayer, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((layer, dict(zip(("query", "key", "value"), tensors, strict=True)) | options))
        return attend(layer, *tensors, **options)

    monkeypatch.setattr(ComparedLayer, "attend", watch)
    compacted = get_method("kvzip")(study, round(0.3 * every_key(study.job)))
    report = fidelity_report(study, compacted)
    assert report is not None
    damage, errors = 0.0, {}
    lengths = [len(exchange.input_ids) for exchange in held_out.exchanges]
    for i, (layer, call) in enumerate(calls):
        if study.full.layers[i].sliding_window is not None:
            continue
        squared = energy = 0.0
        for row, length in enumerate(lengths):
            for head in range(study.job.loaded.num_heads):
                weight = float(study.job.head_gains[i, head]) ** 2
                full = exact_outputs(layer, call, study.full.layers[i], row, head)[:length]
                other = exact_outputs(layer, call, compacted.layers[i], row, head)[:length]
                squared += weight * float((other - full).square().sum())
                energy += weight * float(full.square().sum())
        errors[str(i)] = (squared / energy) ** 0.5
        damage += squared / sum(lengths) / float(study.full.residual_norms[i]) ** 2
    assert len(errors) == num_compacted(study.job.loaded)
    assert report["attention_error_per_layer"] == pytest.approx(errors, rel=1e-4)
    assert report["measured_damage"] == pytest.approx(damage, rel=1e-4)


# ------------------------------------------------------------------------------------------------ questions


def test_no_fit_has_seen_a_held_out_question(tmp_path: Path) -> None:
    study = study_of(tmp_path, method="balanced", self_study_tokens=512)
    held_out, suffix = held_out_of(study), len(study.job.prompt.suffix_ids)
    assert {segment.source for segment in study.segments} == {"repeat", "self-study"}
    for exchange in held_out.exchanges:
        question = exchange.question_ids[:-suffix]
        for segment in study.segments:
            assert segment.token_ids[: len(question)] != question
    ours = {certificate.SECTION_PROMPT, certificate.PLAIN_QUESTION, *certificate.FIXED_QUESTIONS}
    theirs = {*self_study.WHOLE_PROMPTS, self_study.PASSAGE_PROMPT, self_study.PLAIN_PROMPT}
    assert not {text.split("{")[0] for text in ours} & {text.split("{")[0] for text in theirs}


def test_a_question_that_the_fit_asked_too_is_replaced_or_left_out(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    before = held_out_of(study).questions
    seen = [before[0], certificate.FIXED_QUESTIONS[1]]
    again = study_of(tmp_path)
    again.asked.update(tuple(again.job.prompt.question_ids(text)) for text in seen)
    after = held_out_of(again).questions
    assert not set(after) & set(seen)
    assert after[0] == certificate.PLAIN_QUESTION.format(opening=certificate.section_openings(again.job)[0])
    assert len(after) >= len(before) - 2


def test_the_questions_are_sampled_with_another_seed_than_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    original = certificate.Nucleus
    monkeypatch.setattr(
        certificate, "Nucleus", lambda *a, seed, **k: seeds.append(seed) or original(*a, seed=seed, **k)
    )
    for seed in (0, 7, 2**63 - 1):
        held_out_of(study_of(tmp_path, copies=1, seed=seed))
    assert len(set(seeds)) == 3 and not {0, 7, 2**63 - 1} & set(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sections_are_spread_over_the_whole_document(tmp_path: Path) -> None:
    text = " ".join(f"word{i:04d}" for i in range(400))
    job = prepare(
        make_document("words", text), study_of(tmp_path, fields={"window": 8192}).job.loaded, CompactSettings()
    )
    openings = certificate.section_openings(job)
    first = [int(re.findall(r"\d{4}", opening)[0]) for opening in openings]
    assert len(openings) == certificate.LEAST_SECTIONS
    assert first == pytest.approx([0, 100, 200, 300], abs=3)
    for opening in openings:
        assert opening in text


def test_equal_seeds_give_equal_certificates(tmp_path: Path) -> None:
    reports, questions = [], []
    for seed in (3, 3, 4):
        study = study_of(tmp_path, copies=1, seed=seed)
        report = fidelity_report(study, random_keys(study, 0.4))
        assert report is not None
        del report["seconds"]
        reports.append(report)
        questions.append(held_out_of(study).questions)
    assert reports[0] == reports[1] != reports[2]
    assert questions[0] == questions[1] != questions[2]


def test_the_full_cache_is_asked_once_for_all_methods_and_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, copies=1)
    made: list[HeldOut | None] = []
    original = certificate.make_held_out
    monkeypatch.setattr(certificate, "make_held_out", lambda study: made.append(original(study)) or made[-1])
    caches = [
        compact_study(study, size, method) for size, method in ((60, "random"), (90, "random"), (60, "truncation"))
    ]
    assert len(made) == 1
    distances = {cache.metadata.report["fidelity"]["kl_mean"] for cache in caches}
    assert len(distances) == 3
    assert "fidelity" not in compact_study(study, 60, certify=False).metadata.report


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What is due? It is rent.", "What is due?"),
        ("\n  Who pays  \nrent?", "Who pays"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_a_question_is_the_first_line_up_to_its_mark(text: str, question: str) -> None:
    assert certificate.first_question(text) == question


def test_a_model_that_asks_nothing_is_asked_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path, copies=1)
    monkeypatch.setattr(certificate, "write", lambda study, prompts, *_, **__: [[] for _ in prompts])
    plain = [certificate.PLAIN_QUESTION.format(opening=opening) for opening in certificate.section_openings(study.job)]
    assert certificate.ask_sections(study) == plain


def test_an_answer_is_read_up_to_its_last_token_but_one() -> None:
    assert Exchange((1, 2), (3,)).input_ids == (1, 2)
    assert Exchange((1, 2), (3, 4, 5)).input_ids == (1, 2, 3, 4)


def crowded(folder: Path) -> tuple[LoadedModel, Document]:
    """A model whose window leaves 64 tokens after a document; the tiny tokenizer needs more for a question."""
    made = make_tiny("llama", folder / "model", window=1024)
    loaded, text = load_model(str(made), device="cpu"), document(5)
    job = prepare(text, loaded, CompactSettings(reserve=64))
    made = make_tiny("llama", folder / "small", window=1024 - job.room + 64)
    return load_model(str(made), device="cpu"), text


def test_a_window_without_room_gives_null_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, text = crowded(tmp_path)
    monkeypatch.setattr(certificate, "LEAST_ANSWER", 50)
    cache = compact(text, loaded, CompactSettings(method="random", reserve=64), console.ConsoleReporter())
    assert "note: The model's window leaves no room" in capsys.readouterr().err
    assert cache.metadata.report["fidelity"] is None
    assert show_fidelity(None) == "not measured"
    with pytest.raises(FidelityError, match="cannot be checked"):
        compact(text, loaded, CompactSettings(method="random", reserve=64, require_kl=5.0))


def test_little_room_leaves_the_questions_that_fit(tmp_path: Path) -> None:
    loaded, text = crowded(tmp_path)
    study = Study(job := prepare(text, loaded, CompactSettings(reserve=64)), prefill_document(job))
    for exchange in held_out_of(study).exchanges:
        assert len(exchange.question_ids) + len(exchange.answer_ids) <= job.room == 64


# ------------------------------------------------------------------------------------------------ requirement


def test_a_cache_within_the_requirement_is_the_one_without_it(tmp_path: Path) -> None:
    loaded = study_of(tmp_path).job.loaded
    free = compact(document(), loaded, CompactSettings(method="random", keep_ratio=0.5))
    bound = compact(document(), loaded, CompactSettings(method="random", keep_ratio=0.5, require_kl=100.0))
    for ours, theirs in zip(free.layers, bound.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
    assert free.metadata.report["fidelity"]["kl_mean"] == bound.metadata.report["fidelity"]["kl_mean"]
    assert "tried" not in bound.metadata.report["fidelity"]


def test_grow_reaches_the_bound_and_records_what_it_tried(tmp_path: Path) -> None:
    study = study_of(tmp_path, cache_dtype="auto")
    loaded, everything = study.job.loaded, every_key(study.job)
    halfway = fidelity_report(study, random_keys(study, 0.5))
    assert halfway is not None
    bound = halfway["kl_mean"]
    with pytest.raises(FidelityError) as caught:
        compact(document(), loaded, CompactSettings(method="random", keep_ratio=0.1, require_kl=bound))
    assert "--grow" in str(caught.value) and f"{bound:g}" in str(caught.value)
    grown = compact(document(), loaded, CompactSettings(method="random", keep_ratio=0.1, require_kl=bound, grow=True))
    report = grown.metadata.report
    sizes = [step["kept_keys"] for step in report["fidelity"]["tried"]]
    distances = [step["kl_mean"] for step in report["fidelity"]["tried"]]
    assert sizes[0] == round(0.1 * everything) and sizes[-1] == report["kept_keys"] <= everything
    for smaller, larger in pairwise(sizes):
        assert larger == min(everything, -(-3 * smaller // 2))
    assert distances[-1] == report["fidelity"]["kl_mean"] <= bound
    assert all(kl > bound for kl in distances[:-1]) and len(distances) > 2


def test_with_max_error_the_remedy_is_a_lower_bound(tmp_path: Path) -> None:
    """The size is not the user's to raise, and the search ended long before every key was kept."""
    loaded = study_of(tmp_path).job.loaded
    settings = CompactSettings(max_error=0.9, queries=("repeat",), require_kl=1e-9)
    with pytest.raises(FidelityError, match="; lower --max-error"):
        compact(document(), loaded, settings)


def test_grow_ends_at_the_full_cache(tmp_path: Path) -> None:
    """In bfloat16 even all keys are a rounding away from the float32 cache; less than that cannot be had."""
    loaded = study_of(tmp_path).job.loaded
    settings = CompactSettings(method="random", keep_ratio=0.3, require_kl=1e-12, grow=True)
    with pytest.raises(FidelityError, match="every key is kept already"):
        compact(document(), loaded, settings)


@pytest.mark.parametrize("method", SUMMARISING)
@pytest.mark.parametrize("keep_ratio", [0.3, 1.0])
def test_a_summary_that_is_too_far_is_called_one_and_never_keeps_every_key(
    keep_ratio: float, method: str, tmp_path: Path
) -> None:
    loaded = study_of(tmp_path).job.loaded
    settings = CompactSettings(method=method, keep_ratio=keep_ratio, require_kl=1e-12)
    with pytest.raises(FidelityError, match=r"^The summary of lease is .* away from the full cache") as caught:
        compact(document(), loaded, settings)
    longest = keep_ratio == 1.0
    assert ("; it may be as long as the document already, so raise --require-kl" in str(caught.value)) == longest
    assert ("; keep more (--keep-ratio" in str(caught.value)) == (not longest)
    assert "key is kept" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two documents."""
    folder = tmp_path_factory.mktemp("certificate")
    make_tiny("llama", folder / "tiny")
    (folder / "docs").mkdir()
    (folder / "docs" / "long.txt").write_text(TRAINING_TEXT * 2)
    (folder / "docs" / "short.txt").write_text("Rent is due.")
    return folder


def test_the_command_prints_the_certificate_and_inspect_shows_it(invoke: Command, folder: Path, tmp_path: Path) -> None:
    words = ("compact", folder / "docs" / "long.txt", "-m", folder / "tiny", *OPTIONS)
    done = invoke(*words, "-o", "doc.kv")
    assert done.returncode == 0, done.stderr
    fidelity = load(tmp_path / "doc.kv").metadata.report["fidelity"]
    line = f"fidelity {show_fidelity(fidelity)}"
    shown = invoke("inspect", "doc.kv")
    for output in (done.stdout, shown.stdout):
        assert line in [" ".join(row.split()) for row in output.splitlines()]
    for name in ("kl mean", "no document", "attention error per layer", "measured damage", "questions"):
        assert any(row.strip().startswith(name) for row in shown.stdout.splitlines()), name
    told = json.loads(invoke(*words, "-o", "again.kv", "--json").stdout)["report"]
    assert told["seconds"]["certify"] >= told["fidelity"].pop("seconds") > 0  # of the run, so that the file has none
    assert told["fidelity"] == fidelity


def test_without_the_certificate_there_is_none(invoke: Command, folder: Path, tmp_path: Path) -> None:
    done = invoke("compact", folder / "docs" / "long.txt", "-m", folder / "tiny", *OPTIONS, "--no-certify")
    assert done.returncode == 0, done.stderr
    assert "fidelity" not in done.stdout
    assert "fidelity" not in load(tmp_path / "long.kv").metadata.report


def test_a_cache_that_fails_the_requirement_is_not_written(invoke: Command, folder: Path, tmp_path: Path) -> None:
    words = ("compact", folder / "docs" / "long.txt", "-m", folder / "tiny", *OPTIONS, "--require-kl", "1e-9")
    done = invoke(*words)
    assert (done.returncode, done.stdout) == (10, "")
    assert list(tmp_path.iterdir()) == []
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: The compacted ") and "long.txt is " in error
    assert "nats per token" in error and "--require-kl 1e-09" in error and "--grow" in error


def test_a_file_that_fails_again_keeps_what_was_there(invoke: Command, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "doc.kv").write_text("precious")
    words = ("compact", folder / "docs" / "long.txt", "-m", folder / "tiny", *OPTIONS, "--require-kl", "1e-9")
    assert invoke(*words, "-o", "doc.kv", "--force").returncode == 10
    assert (tmp_path / "doc.kv").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--grow",), "--require-kl"),
        (("--require-kl", "0.1", "--no-certify"), "--no-certify"),
        (("--require-kl", "0"), "positive"),
        (("--method", "magic"), "balanced"),
        (("--max-error", "0.1", "--keep-ratio", "0.1"), "only one"),
    ],
)
@pytest.mark.parametrize("command_name", ["compact", "batch"])
def test_contradictory_options_are_refused(
    command_name: str, options: tuple[str, ...], word: str, invoke: Command, folder: Path
) -> None:
    source = folder / "docs" if command_name == "batch" else folder / "docs" / "long.txt"
    done = invoke(command_name, source, "-o", "out", *options)
    assert done.returncode == 2
    assert word in done.stderr


def test_a_document_that_fails_the_requirement_is_a_failed_one_of_the_batch(
    invoke: Command, folder: Path, tmp_path: Path
) -> None:
    """Every key of the short document is kept in full precision; the long one loses nine in ten."""
    words = ("batch", folder / "docs", "-m", folder / "tiny", "-o", "out", *OPTIONS, "--cache-dtype", "float32")
    done = invoke(*words, "--target-tokens", "20", "--require-kl", "1e-9")
    assert done.returncode == 9
    assert "nats per token away from the full cache" in done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "out").rglob("*.kv")] == ["short.txt.kv"]
    records = [json.loads(row) for row in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert {record["input"]: record["status"] for record in records} == {"long.txt": "failed", "short.txt": "done"}
    (failed,) = [record for record in records if record["status"] == "failed"]
    assert failed["error"] == "FidelityError" and "--require-kl 1e-09" in failed["message"]


# ------------------------------------------------------------------------------------------------ what is shown


def test_the_line_has_the_numbers_people_look_for() -> None:
    fidelity = {
        "kl_mean": 0.01234,
        "kl_p95": 0.0612,
        "kl_worst": 0.1099,
        "agreement": 0.9712,
        "no_document": {"kl_mean": 1.9154},
    }
    assert show_fidelity(fidelity) == (
        "KL 0.012 nats per token (95%: 0.061, worst answer 0.11; no document 1.92), same token 97%"
    )
    exact = fidelity | {"kl_mean": 0.0, "kl_p95": -1e-17, "kl_worst": 3e-4}
    assert show_fidelity(exact).startswith("KL 0 nats per token (95%: 0, worst answer 0.0003;")


@pytest.mark.parametrize("foreign", [{}, "fine", {"kl_mean": "0.1"}, [1, 2], {"kl_mean": 0.1, "no_document": None}])
def test_a_report_of_another_shape_has_no_line(foreign: object) -> None:
    assert show_fidelity(foreign) == ""


def test_the_library_returns_the_certificate(folder: Path) -> None:
    cache = compactor.compact(document(1), str(folder / "tiny"), method="random", keep_ratio=0.5)
    fidelity = cache.metadata.report["fidelity"]
    assert 0 < fidelity["kl_mean"] <= fidelity["kl_worst"]
    assert cache.metadata.settings["certify"] is True
