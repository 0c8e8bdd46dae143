"""Claims about ``compactor eval``: what it prints, where it goes on, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from tiny_models import TRAINING_TEXT, make_tiny

from compactor.evaluate import runner
from compactor.evaluate.records import ResultsFile

METHODS = ("--method", "truncation,random", "--keep-ratio", "0.5,0.2")
QUESTIONS = (
    ("When is rent due?", "the first day", None),
    ("What does clause 7 say?", "repairs under 150 euros are paid by the tenant", None),
    ("Who pays for repairs?", "tenant", ["landlord", "tenant"]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a file with questions about two documents."""
    folder = tmp_path_factory.mktemp("eval")
    make_tiny("llama", folder / "tiny")
    rows = [
        {"context": f"Lease {i}. {TRAINING_TEXT}", "question": question, "answer": answer, "choices": choices}
        for i in range(2)
        for question, answer, choices in QUESTIONS
    ]
    (folder / "leases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(folder: Path, *more: str) -> list[str]:
    model = ["-m", str(folder / "tiny"), "--device", "cpu", "--max-new-tokens", "6"]
    return ["eval", "--questions", str(folder / "leases.jsonl"), *model, *METHODS, *more]


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    """The results of a whole run, made in a process of its own."""
    path = folder / "whole.jsonl"
    process = [sys.executable, "-m", "compactor", *words(folder, "-o", str(path), "--quiet")]
    done = subprocess.run(process, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return path


def test_a_run_prints_a_table_and_goes_on_where_it_stopped(invoke: Command, folder: Path, results: Path) -> None:
    short = folder / "short.jsonl"
    short.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[:4]))
    done = invoke(*words(folder, "-o", str(short)))
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert [note.split()[0] for note in notes] == [f"[{i}/10]" for i in range(5, 11)]
    for expected in ("tiny, leases", "full cache: score", "keep 0.5", "keep 0.2", "truncation", "random", "KL "):
        assert expected in done.stdout, expected
    report = invoke("eval", "--report", "-o", short)
    assert report.stdout == done.stdout
    again = invoke(*words(folder, "-o", str(short), "--quiet"))
    assert (again.stdout, again.stderr) == (done.stdout, "")


def test_json_is_one_document_with_the_numbers_of_the_lines(invoke: Command, results: Path) -> None:
    done = invoke("eval", "--report", "-o", results, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert made["failed"] == [] and made["settings"] == 1
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(cell["method"], cell["keep_ratio"]) for cell in made["results"]] == [
        ("full", None), ("truncation", 0.5), ("truncation", 0.2), ("random", 0.5), ("random", 0.2),
    ]  # fmt: skip
    for cell in made["results"]:
        own = [r for r in lines if (r["method"], r["keep_ratio"]) == (cell["method"], cell["keep_ratio"])]
        scores = [score for record in own for score in record["scores"]]
        assert cell["documents"] == len(own) == 2
        assert cell["questions"] == len(scores) == 8  # a choice is asked twice
        assert cell["score"]["mean"] == pytest.approx(sum(scores) / 8)


def test_a_report_needs_no_torch(results: Path) -> None:
    code = (
        "import sys; from compactor.cli import app; sys.argv = ['compactor', 'eval', '--report', '-o', sys.argv[1]]\n"
        "try: app.main()\nexcept SystemExit: print([n for n in ('torch', 'transformers', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(results)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "magic"],
        ["--task", "hay"],
        ["--questions", "missing.jsonl"],
        ["--keep-ratio", "2"],
        ["-o", "no/such/folder/r.jsonl"],
    ],
)
def test_a_bad_argument_is_refused_without_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from compactor.cli import app\n"
        f"try: app.run('compactor', app.umbrella, ['eval', *{arguments!r}])\n"
        "except SystemExit as stop: print(stop.code, [n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    exit_code, heavy = done.stdout.splitlines()[-1].split(" ", 1)
    assert int(exit_code) in (2, 3, 7)
    assert heavy == "[]"


def test_a_built_in_task_is_made_at_every_length_with_every_seed(invoke: Command, folder: Path, tmp_path: Path) -> None:
    options = ("--method", "truncation", "--keep-ratio", "0.5", "--max-new-tokens", "4", "--device", "cpu")
    sizes = ("--task", "needle", "--length", "700,900", "--documents", "2", "--seed", "3")
    done = invoke("eval", "-m", folder / "tiny", *options, *sizes, "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    records = ResultsFile(tmp_path / "results.jsonl").records
    assert [(r.length, r.seed) for r in records if r.method == "full"] == [(700, 3), (900, 3), (700, 4), (900, 4)]
    for record in records:
        assert record.document_tokens is not None and record.length is not None
        assert 0.9 * record.length < record.document_tokens <= record.length
    assert [cell["length"] for cell in json.loads(done.stdout)["results"]] == [700, 700, 900, 900]


def test_a_time_limit_ends_well_and_says_how_to_go_on(invoke: Command, folder: Path, tmp_path: Path) -> None:
    done = invoke(*words(folder, "--time-limit", "0.0001"))
    assert done.returncode == 0, done.stderr
    assert "time limit is reached; 0 of 10 results are in results.jsonl, and the same command goes on" in done.stderr
    assert done.stdout == "There are no results.\n"


def test_an_interrupt_says_what_is_there(
    invoke: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "get_method", interrupt)
    done = invoke(*words(folder))
    assert done.returncode == 130
    assert "interrupted; 1 of 10 results are in results.jsonl" in done.stderr.splitlines()[-1]
    assert len(ResultsFile(tmp_path / "results.jsonl").records) == 1


def test_a_failed_combination_is_in_the_file_and_in_the_exit_code(invoke: Command, folder: Path) -> None:
    options = ("--task", "needle", "--length", "700,5000", "--documents", "1", "--method", "random", "-r", "0.5")
    done = invoke("eval", "-m", folder / "tiny", "--device", "cpu", "--max-new-tokens", "2", *options, "-o", "f.jsonl")
    assert done.returncode == 9
    assert done.stderr.splitlines()[-1].startswith("error: 2 of 4 results failed; f.jsonl says why.")
    assert done.stderr.count("too many for the model's window") == 1  # of the document, not of each result
    assert "note: 2 results of f.jsonl failed and take no part; it says why." in done.stderr
    before, long = done.stdout.split("needle, 5,000 tokens")
    assert "needle, 700 tokens" in before and "failed" not in before
    assert "full cache: 1 document failed" in long and long.count("1 document failed") == 2
    report = invoke("eval", "--report", "-o", "f.jsonl")
    assert (report.returncode, report.stdout) == (0, done.stdout)


def test_a_plot_is_drawn(invoke: Command, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = invoke("eval", "--report", "-o", results, "--plot", "quality.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        (("--method", "balanced,magic"), 2, "--method does not know 'magic'; choose from fast, balanced, best"),
        (("--method", ","), 2, "--method is empty"),
        (("--task", "needle,hay"), 2, "--task does not know 'hay'; choose from needle"),
        (("--task", "needle", "--questions", "q.jsonl"), 2, "Give --task or --questions, not both."),
        (("--questions", "missing.jsonl"), 3, "missing.jsonl does not exist"),
        (("--keep-ratio", "0.1,many"), 2, "--keep-ratio is '0.1,many'; give numbers with commas between them."),
        (("--keep-ratio", "0.1,1.5"), 2, "--keep-ratio is 1.5; give a fraction above 0 and at most 1."),
        (("--length", "2000,0"), 2, "--documents and --length are at least 1."),
        (("--documents", "0"), 2, "--documents and --length are at least 1."),
        (("--max-new-tokens", "0"), 2, "--max-new-tokens is 0"),
        (("--time-limit", "nan"), 2, "--time-limit is nan; give a positive number of seconds."),
        (("--queries", "guesses"), 2, "--queries does not know 'guesses'"),
        (
            ("--method", "fast,random,kvzip", "--self-study-tokens", "9"),
            2,
            "None of fast, random, kvzip uses --self-study-tokens; leave it out, or take one of balanced, best,",
        ),
        (("--method", "attention-matching-rms,kvzip", "--queries", "repeat,context"), 2, "uses --queries context;"),
        (("--method", "kvzip", "--queries", "repeat"), 2, "--method kvzip does not use --queries repeat;"),
        (("--seed", str(2**63 - 1), "--documents", "2"), 2, "the last seed is too large"),
        (("--report",), 2, "results.jsonl does not exist; name the results with -o FILE."),
        (("-o", "no/such/folder/r.jsonl"), 7, "The folder no/such/folder does not exist"),
        (("--plot", "quality.doc"), 2, "--plot draws .png, .pdf, .svg; quality.doc ends in none of them."),
        (("--plot", "a.png", "-o", "a.png"), 2, "--plot and --output name the same file; give two names."),
    ],
)
def test_a_bad_argument_is_one_sentence_and_writes_nothing(
    invoke: Command, tmp_path: Path, arguments: tuple[str, ...], exit_code: int, expected: str
) -> None:
    done = invoke("eval", *arguments)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr.replace(f"{tmp_path.resolve()}/", "")
    assert list(tmp_path.iterdir()) == []


def test_a_plot_without_matplotlib_is_refused_before_any_work(
    invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = invoke("eval", "--plot", "quality.png")
    assert done.returncode == 2
    assert done.stderr == ("error: --plot needs matplotlib; install it with: pip install 'kv-compactor[plots]'\n")
    assert list(tmp_path.iterdir()) == []


def test_a_peer_without_kvpress_is_refused_before_any_work(
    invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    done = invoke("eval", "--peer", "SnapKVPress")
    assert done.returncode == 2
    assert "pip install kvpress" in done.stderr
    assert done.stderr.count("\n") == 1
