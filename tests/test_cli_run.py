"""Claims about `compact` and `query` on a tiny random model: what goes where, and what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command
from tiny_models import TRAINING_TEXT, make_tiny

from compactor.cache_file import read_metadata
from compactor.config import METHOD_SETTINGS, METHODS

SIZE = ("--device", "cpu", "--keep-ratio", "0.3")
STUDYING = ("--self-study-tokens", "32", "--chunk", "64")
OPTIONS = (*SIZE, *STUDYING)
QUESTIONS = ("What does clause 7 say?", "When is rent due?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a document, and its compacted cache."""
    import compactor

    folder = tmp_path_factory.mktemp("run")
    model = make_tiny("llama", folder / "tiny")
    (folder / "doc.txt").write_text(TRAINING_TEXT * 2)
    options = {"keep_ratio": 0.3, "self_study_tokens": 32, "chunk": 64, "certify": False}
    cache = compactor.compact(folder / "doc.txt", str(model), **options)
    cache.save(folder / "doc.kv")
    return folder


def test_compact_writes_the_file_and_prints_a_summary(invoke: Command, folder: Path, tmp_path: Path) -> None:
    done = invoke("compact", folder / "doc.txt", "-m", folder / "tiny", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["doc.kv"]
    lines = done.stdout.splitlines()
    assert lines[0] == "doc.kv"
    for label in ("document ", "kept ", "size ", "fidelity ", "time ", "reconstruction error "):
        assert any(line.startswith(f"  {label}") for line in lines), label
    for phase in ("load model", "prefill", "self-study", "select", "fit", "held-out", "certify"):
        assert f"\n{phase}: " in f"\n{done.stderr}", phase


def test_compact_for_programs_prints_one_json_document(invoke: Command, folder: Path, tmp_path: Path) -> None:
    done = invoke("compact", folder / "doc.txt", "-m", folder / "tiny", *OPTIONS, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert done.stderr == ""
    assert made["output"] == "doc.kv"
    assert made["report"]["kept_keys"] == round(0.3 * made["report"]["document_keys"])
    assert sum(made["file"].values()) == (tmp_path / "doc.kv").stat().st_size
    assert made["file"]["tensor_bytes"] == made["report"]["tensor_bytes"] < made["report"]["full_bytes"]


@pytest.mark.parametrize("method", METHODS)
def test_the_file_of_every_method_answers(method: str, invoke: Command, folder: Path, tmp_path: Path) -> None:
    words = ("compact", folder / "doc.txt", "-m", folder / "tiny", *SIZE, "--method", method)
    studying = STUDYING if "self_study_tokens" in METHOD_SETTINGS.get(method, ()) else ()
    done = invoke(*words, *studying, "--no-certify", "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    made = json.loads(done.stdout)
    assert made["settings"]["method"] == method
    assert 0.2 < made["report"]["kept_ratio"] < 0.36
    assert made["report"]["tensor_bytes"] < made["report"]["full_bytes"]
    asked = invoke("query", "doc.kv", "--device", "cpu", "-n", "4", "--json", *QUESTIONS)
    assert asked.returncode == 0, asked.stderr
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [answer["question"] for answer in answers] == list(QUESTIONS)
    assert all(0 < answer["usage"]["answer_tokens"] <= 4 for answer in answers)


def test_max_error_finds_a_size_whose_error_is_below_the_bound(invoke: Command, folder: Path, tmp_path: Path) -> None:
    """A tighter bound takes more keys, and neither takes all of them."""
    reports = []
    for bound in ("0.5", "0.25"):
        options = ("--device", "cpu", "--queries", "repeat", "--chunk", "64", "--no-certify", "--max-error", bound)
        done = invoke("compact", folder / "doc.txt", "-m", folder / "tiny", *options, "--json", "-o", f"{bound}.kv")
        assert done.returncode == 0, done.stderr
        assert f"--max-error {bound}" in done.stderr
        reports.append(json.loads(done.stdout)["report"])
        assert 0 < reports[-1]["reconstruction_error"] <= float(bound)
    assert reports[0]["kept_keys"] < reports[1]["kept_keys"] < reports[1]["document_keys"]


def test_a_profile_of_caches_shares_the_keys_of_the_next_document(
    invoke: Command, folder: Path, tmp_path: Path
) -> None:
    """Every head gets the share that it had in the caches, to the rounding to whole keys."""
    learnt = invoke("budget", folder / "doc.kv", "-o", "profile.json", "--json")
    assert learnt.returncode == 0, learnt.stderr
    shares = [share for layer in json.loads(learnt.stdout)["shares"] for share in layer]
    (tmp_path / "next.txt").write_text(TRAINING_TEXT.replace("30 days", "40 days") * 3)
    words = ("compact", "next.txt", "-m", folder / "tiny", *OPTIONS, "--no-certify", "--quiet", "--json")
    done = invoke(*words, "--keep-ratio", "0.2", "--budget", "profile.json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["settings"]["budget"] == "profile.json"
    metadata, table = read_metadata(tmp_path / "next.kv")
    counts = [length - metadata.prefix_length for layer in table.head_lengths for length in layer]
    assert sum(counts) == made["report"]["kept_keys"] == round(0.2 * made["report"]["document_keys"])
    assert len(set(counts)) > 1
    for count, share in zip(counts, shares, strict=True):
        assert count == pytest.approx(share * sum(counts), abs=1)
    assert invoke("query", "next.kv", "-n", "4", QUESTIONS[0]).returncode == 0


def test_dry_run_reads_standard_input_and_writes_nothing(invoke: Command, folder: Path, tmp_path: Path) -> None:
    text = (folder / "doc.txt").read_text()
    done = invoke("compact", "-", "-m", folder / "tiny", "--dry-run", "--json", stdin=text)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    assert expected["total_seconds"] >= 0 and expected["peak_bytes"] > expected["tensor_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_questions_are_answered_one_by_one(invoke: Command, folder: Path) -> None:
    """Arguments, lines of standard input and single calls give equal answers: no question sees another."""
    common = ("query", folder / "doc.kv", "-n", "12", "--json")
    together = invoke(*common, *QUESTIONS)
    assert together.returncode == 0, together.stderr
    answers = [json.loads(line) for line in together.stdout.splitlines()]
    assert [answer["question"] for answer in answers] == list(QUESTIONS)
    assert all(0 < answer["usage"]["answer_tokens"] <= 12 for answer in answers)
    lines = invoke(*common, stdin=f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n")
    alone = invoke(*common, QUESTIONS[1])
    from_lines = [json.loads(line)["answer"] for line in lines.stdout.splitlines()]
    assert from_lines == [answer["answer"] for answer in answers]
    assert json.loads(alone.stdout)["answer"] == answers[1]["answer"]


def test_stdout_holds_the_answers_and_nothing_else(invoke: Command, folder: Path) -> None:
    as_json = invoke("query", folder / "doc.kv", "-n", "8", "--json", *QUESTIONS)
    first, second = (json.loads(line)["answer"] for line in as_json.stdout.splitlines())
    done = invoke("query", folder / "doc.kv", "-n", "8", "--usage", *QUESTIONS)
    assert done.stdout == f"{first}\n\n{second}\n"
    for question in QUESTIONS:
        assert f"> {question}\n" in done.stderr
    assert done.stderr.count("usage: ") == 2
    assert done.stderr.count("tokens/s") == 2


def test_sampling_is_seeded(invoke: Command, folder: Path) -> None:
    def answer(seed: int) -> str:
        options = ("-n", "16", "--temperature", "1.5", "--seed", seed)
        return invoke("query", folder / "doc.kv", *options, QUESTIONS[0]).stdout

    assert answer(1) == answer(1) != answer(2)


def test_another_model_is_refused_with_both_names(invoke: Command, folder: Path, tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other", seed=1)
    done = invoke("query", folder / "doc.kv", "-m", other, QUESTIONS[0])
    assert (done.returncode, done.stdout) == (6, "")
    error = done.stderr.splitlines()[-1]
    assert str(other) in error and str(folder / "tiny") in error


def test_same_model_in_another_folder_is_accepted(invoke: Command, folder: Path, tmp_path: Path) -> None:
    moved = make_tiny("llama", tmp_path / "moved")
    done = invoke("query", folder / "doc.kv", "-m", moved, "-n", "4", QUESTIONS[0])
    assert done.returncode == 0, done.stderr


def test_no_question_at_all_is_an_error(invoke: Command, folder: Path) -> None:
    done = invoke("query", folder / "doc.kv", "-")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: There is no question")


def test_a_document_is_compacted_in_one_process_and_queried_in_others(
    command: Command, invoke: Command, folder: Path, tmp_path: Path
) -> None:
    done = command("compact", folder / "doc.txt", "-m", folder / "tiny", *OPTIONS, "-o", "new.kv")
    assert done.returncode == 0, done.stderr
    words = ("query", "new.kv", "--device", "cpu", "-n", "8", QUESTIONS[0])
    there, here = command(*words), invoke(*words)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout != ""
