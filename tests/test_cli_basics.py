"""Claims about all commands before a model runs: help, errors, exit codes, imports, streams, docs/cli.md."""

from __future__ import annotations

import errno
import inspect
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import ROOT, Command
from typer.testing import CliRunner

import compactor
from compactor import errors
from compactor.cli import compact, failures, options, reference, units
from compactor.cli.app import COMMANDS
from compactor.config import CompactSettings

HEAVY = ("torch", "transformers", "scipy", "numpy", "safetensors", "rich.table", "matplotlib")
PROBE = """
import sys
from compactor.cli import app
start = getattr(app, sys.argv[1])
sys.argv = ["probe", *sys.argv[2:]]
try:
    start()
except SystemExit as stop:
    code = stop.code
heavy = [name for name in {heavy!r} if name in sys.modules]
print("PROBE", code, heavy)
"""


def probe(start: str, *arguments: str, cwd: Path) -> tuple[int, list[str]]:
    """Start a command in a process of its own; return its exit code and what it should not have imported."""
    words = [sys.executable, "-c", PROBE.format(heavy=HEAVY), start, *arguments]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    code, heavy = done.stdout.splitlines()[-1].removeprefix("PROBE ").split(" ", 1)
    return int(code), json.loads(heavy.replace("'", '"'))


# --------------------------------------------------------------------------------------------- help, imports


@pytest.mark.parametrize(
    ("start", "arguments"),
    [
        ("compact_main", ["--help"]),
        ("query_main", ["--help"]),
        ("batch_main", ["--help"]),
        ("main", []),
        ("main", ["--version"]),
        *[("main", [name, "--help"]) for name in COMMANDS],
    ],
)
def test_help_imports_nothing_heavy(start: str, arguments: list[str], tmp_path: Path) -> None:
    assert probe(start, *arguments, cwd=tmp_path) == (0, [])


@pytest.mark.parametrize(
    ("start", "arguments", "exit_code"),
    [
        ("compact_main", [], 2),
        ("compact_main", ["--no-such-option"], 2),
        ("compact_main", ["doc.txt", "--seed", "abc"], 2),
        ("compact_main", ["doc.txt", "--keep-ratio", "1.5"], 2),
        ("compact_main", ["doc.txt", "--keep-ratio", "0.5", "--max-bytes", "100"], 2),
        ("compact_main", ["doc.txt", "--queries", "context,guesses"], 2),
        ("compact_main", ["doc.txt", "--method", "magic"], 2),
        ("compact_main", ["doc.txt", "--method", "kvzip", "--keep-curves"], 2),
        ("compact_main", ["doc.txt", "--keep-ratio", "1", "--keep-curves"], 2),
        ("compact_main", ["doc.txt", "--max-error", "0.1", "--require-kl", "0.1", "--grow"], 2),
        ("compact_main", ["doc.txt", "--budget", "missing.json"], 2),
        ("compact_main", ["-"], 2),
        ("compact_main", ["missing.txt"], 3),
        ("compact_main", ["missing.txt", "-o", "no/such/folder/out.kv"], 7),
        ("query_main", [], 2),
        ("query_main", ["doc.kv", ""], 2),
        ("query_main", ["doc.kv", "What?", "--temperature", "-1"], 2),
        ("query_main", ["missing.kv", "What?"], 5),
        ("batch_main", [], 2),
        ("batch_main", [".", "-o", "out", "--chunk", "1"], 2),
        ("batch_main", [".", "-o", "out", "--budget", "missing.json"], 2),
        ("main", ["no-such-command"], 2),
        ("main", ["inspect", "missing.kv"], 5),
        ("main", ["recompact", "missing.kv", "-o", "out.kv"], 2),
        ("main", ["recompact", "missing.kv", "-o", "no/such/out.kv", "-r", "0.1"], 7),
        ("main", ["budget", "missing.kv", "-o", "out.json"], 5),
    ],
)
def test_bad_arguments_import_nothing_heavy(start: str, arguments: list[str], exit_code: int, tmp_path: Path) -> None:
    assert probe(start, *arguments, cwd=tmp_path) == (exit_code, [])


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"import compactor, sys; print([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_is_the_package_version(command: Command) -> None:
    assert command("--version").stdout == f"kv-compactor {compactor.__version__}\n"


def test_umbrella_without_a_command_lists_all(command: Command) -> None:
    done = command()
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", done.stdout, re.MULTILINE), name


# -------------------------------------------------------------------------------------- errors, exit codes


def test_bad_argument_is_one_line_with_a_remedy(command: Command) -> None:
    done = command("compact", "doc.txt", "--no-such-option")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: No such option: --no-such-option")
    assert done.stderr.endswith("Try 'compactor compact --help'.\n")
    assert done.stderr.count("\n") == 1


def test_missing_document_is_one_line_and_leaves_nothing(command: Command, tmp_path: Path) -> None:
    done = command("compact", "missing.txt", "-o", "out.kv")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: missing.txt does not exist; check the path.\n"
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_the_document_is_read(command: Command, tmp_path: Path) -> None:
    (tmp_path / "out.kv").write_text("precious")
    done = command("compact", "missing.txt", "-o", "out.kv")
    assert done.returncode == 7
    assert "out.kv exists already; pass --force" in done.stderr
    assert (tmp_path / "out.kv").read_text() == "precious"


def test_output_is_named_after_the_document_in_the_current_folder() -> None:
    assert compact.default_output("/somewhere/else/lease.v2.txt") == Path("lease.v2.kv")
    assert compact.default_output("README") == Path("README.kv")
    assert compact.default_output(".bashrc") == Path(".bashrc.kv")
    for nameless in ("-", "..", "/"):
        with pytest.raises(errors.SettingsError, match="-o"):
            compact.default_output(nameless)


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("raised", "exit_code", "words"),
    [
        (errors.MismatchError("The file is of model A, not B."), 6, "error: The file is of model A, not B."),
        (MemoryError(), 8, "ran out of host memory; lower --prefill-chunk or --chunk"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 8, "ran out of host memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 8, "ran out of GPU memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 8, "ran out of GPU memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            8,
            "ran out of host memory",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), 8, "host memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a.kv"), 7, "Cannot write a.kv: the disk is full."),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            KeyboardInterrupt("interrupted; nothing was written"),
            130,
            "error: interrupted; nothing was written\n",
        ),
        (ValueError("two\nlines"), 1, "internal error: ValueError: two lines; rerun with COMPACTOR_DEBUG=1"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "internal error: FileNotFoundError"),
        (typer.Exit(5), 5, ""),
    ],
)
def test_exception_becomes_one_sentence_and_an_exit_code(
    raised: BaseException, exit_code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise raised

    assert failures.exit_code_of(fail) == exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == (1 if words else 0)
    assert "Traceback" not in err


def test_out_of_gpu_memory_of_torch_itself_says_what_to_lower() -> None:
    import torch

    sentence, exit_code = failures.failure_of(torch.OutOfMemoryError("CUDA out of memory."))
    assert exit_code == errors.MemoryShortError.exit_code
    for remedy in ("--prefill-chunk", "--chunk", "smaller model", "--dtype bfloat16"):
        assert remedy in sentence


def test_memory_that_the_machine_does_not_have_is_recognised() -> None:
    """The real message of torch's host allocator, not one made up here."""
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert failures.failure_of(caught.value).exit_code == errors.MemoryShortError.exit_code


def test_debug_variable_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPACTOR_DEBUG", "1")
    assert failures.exit_code_of(lambda: 1 // 0) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_every_error_has_an_exit_code_of_its_own_in_the_reference() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.CompactorError]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    table = reference.exit_codes()
    for kind in kinds:
        assert f"| {kind.exit_code} | {kind.__name__} |" in table
    assert "| 130 | interrupted |" in table


# ------------------------------------------------------------------------------------------------- streams


def test_full_disk_behind_stdout_is_an_output_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "compactor", "compact", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    assert done.returncode == 7
    assert done.stderr == "error: Cannot write the output: the disk is full.\n"


def test_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "compactor", "--help"],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    assert (done.returncode, done.stderr) == (failures.BROKEN_PIPE_EXIT_CODE, "")


REPORT = """
from compactor.console import ConsoleReporter
with ConsoleReporter().phase("prefill", 3, "tokens") as advance:
    for _ in range(3):
        advance(1)
"""


def test_progress_without_a_terminal_is_two_plain_lines() -> None:
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert re.fullmatch(r"prefill \(3 tokens\) \.\.\.\nprefill: \d+\.\d s\n", done.stderr)


@pytest.mark.parametrize(("variables", "coloured"), [({"NO_COLOR": "1"}, False), ({}, True)])
def test_progress_on_a_terminal_honours_no_color(variables: dict[str, str], coloured: bool) -> None:
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **variables}
    shown = on_terminal([sys.executable, "-c", REPORT], environment)
    assert "3/3" in shown
    assert bool(re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])[0-9;]*m", shown)) is coloured


def on_terminal(words: list[str], environment: dict[str, str]) -> str:
    """Run a command with a terminal as its stderr; return what it wrote there."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0
    return shown.decode()


def test_ctrl_c_while_standard_input_is_read_says_that_nothing_was_written(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "compactor", "compact", "-", "-o", "out.kv"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdin is not None
        # More than a pipe holds: when all is written, the command is reading.
        process.stdin.write(b"word " * 100_000)
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == "error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- small functions


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_649_000, "12.6 MB"),
        (999_600, "1.0 MB"),
        (4e9, "4.0 GB"),
    ],
)
def test_bytes_are_shown_in_decimal_units(count: float, shown: str) -> None:
    assert units.show_bytes(count) == shown


@pytest.mark.parametrize(
    ("elapsed_s", "shown"),
    [
        (0.309, "0.31 s"),
        (9.999, "10.0 s"),
        (99.97, "1 min 40 s"),
        (185.2, "3 min 05 s"),
        (7810, "2 h 10 min"),
    ],
)
def test_seconds_are_shown_for_people(elapsed_s: float, shown: str) -> None:
    assert units.show_seconds(elapsed_s) == shown


def test_estimate_is_shown_with_units() -> None:
    shown = compact.show_estimate({"peak_bytes": 2_000_000, "total_seconds": 75.0, "seconds": {"fit": 2.5}})
    assert shown.splitlines() == ["peak bytes  2.0 MB", "total       75.0 s", "phases      fit 2.50 s"]


def test_the_options_of_the_settings_reach_their_fields() -> None:
    taken: list[CompactSettings] = []

    @options.with_settings
    def take(*, settings: CompactSettings) -> None:
        taken.append(settings)

    app = typer.Typer()
    app.command()(take)
    given: dict[str, Any] = {
        "queries": "repeat, context", "chunk": 64, "keep_ratio": 0.3, "min_log_bias": -1.0, "system": "Be brief.",
    }  # fmt: skip
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    for arguments in ([], [*words, "--keep-curves", "--no-certify"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    plain, told = taken
    assert plain == CompactSettings()
    given["queries"] = ("repeat", "context")
    assert told == CompactSettings(**given, keep_curves=True, certify=False)
    assert isinstance(CliRunner().invoke(app, ["--method=h2o", "--chunk=64"]).exception, errors.SettingsError)


def test_library_call_refuses_settings_and_options_together() -> None:
    with pytest.raises(errors.SettingsError, match="either settings or seed"):
        compactor.compact("text", settings=options.COMPACT_DEFAULTS, seed=1)
    with pytest.raises(errors.SettingsError, match="keep_ration"):
        compactor.compact("text", keep_ration=0.5)


# ------------------------------------------------------------------------------------------------ reference


def test_reference_is_current() -> None:
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == reference.reference(), "run `make docs`"


def test_reference_names_every_command_and_option() -> None:
    text = reference.reference()
    for name in COMMANDS:
        assert f"compactor {name}" in text
    for option in (
        "-o, --output FILE",
        "--self-study-tokens N",
        "--max-new-tokens N",
        "--verify",
        "--pattern GLOB",
    ):
        assert option in text


def test_stale_reference_is_found(tmp_path: Path) -> None:
    path = tmp_path / "cli.md"
    assert reference.main([str(path)]) == 0
    assert reference.main(["--check", str(path)]) == 0
    path.write_text(path.read_text() + "more\n")
    assert reference.main(["--check", str(path)]) == 1
