"""Runs the tests of a kernel in Triton's interpreter, in a process of its own: it is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys


def assert_passes_interpreted(file: str, selection: str) -> None:
    """Run the tests of ``file`` that `pytest -k selection` chooses with TRITON_INTERPRET=1; all must pass."""
    paths = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
