"""Fixtures that several test modules share."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models gain nothing from threads, workers do

from compactor.cli import app

ROOT = Path(__file__).resolve().parent.parent
USER_VARIABLES = ("COMPACTOR_MODEL", "COMPACTOR_DEBUG", "NO_COLOR", "FORCE_COLOR", "PYTHONPATH")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's own settings out of the environment."""
    for name in USER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run ``compactor ARGUMENTS...`` in a process of its own, in ``tmp_path``."""

    def run(
        *arguments: str | Path, stdin: str | bytes = b"", environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        finished = subprocess.run(
            [sys.executable, "-m", "compactor", *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, **(environment or {})},
            timeout=600,
            check=False,
        )
        return subprocess.CompletedProcess(
            finished.args, finished.returncode, finished.stdout.decode(), finished.stderr.decode()
        )

    return run


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run ``compactor ARGUMENTS...`` in this process, in ``tmp_path``: what is already imported stays so."""

    def run(*arguments: str | Path, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        words = [str(argument) for argument in arguments]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            app.run("compactor", app.umbrella, words)
        out, err = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return subprocess.CompletedProcess(words, stopped.value.code, out, err)

    return run
