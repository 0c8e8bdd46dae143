"""Knows the machine: what it is called, what is installed, and the two ceilings of its device. Knows no benchmark."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

import compactor
from compactor.bench.report import Ceilings
from compactor.bench.timing import measure

LIBRARIES = ("torch", "triton", "transformers")
COPY_BYTES = {"cuda": 1 << 30}  # far beyond any cache
MATRIX_SIZE = {"cuda": 8192}
CPU_COPY_BYTES, CPU_MATRIX_SIZE = 1 << 28, 1024


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """Return device, versions and commit; None where something is not installed, or the package lies in no checkout."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in LIBRARIES},
        "compactor": compactor.__version__,
        "commit": git_commit(Path(compactor.__file__).resolve().parent.parent),
    }


def device_name(device: torch.device) -> str:
    """Return what the maker calls the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def installed_version(name: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """Return the commit that is checked out in ``folder``, with "+" where tracked files were changed since.

    None where the folder is not the top of a checkout, or git does not answer.
    """
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changes else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure copy bandwidth and matrix rates.

    On a GPU bfloat16 and float32, on an NVIDIA one tf32 as well; on a CPU float32 alone.
    """
    rates = {"float32": matrix_rate(device, torch.float32)}
    if device.type != "cpu":
        rates["bfloat16"] = matrix_rate(device, torch.bfloat16)
    if device.type == "cuda":
        with float32_precision("high"):
            rates["tf32"] = matrix_rate(device, torch.float32)
    return Ceilings(copy_bandwidth(device), rates)


def copy_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Return bytes per second, read and written, of a copy of ``num_bytes`` on the device."""
    count = num_bytes or COPY_BYTES.get(device.type, CPU_COPY_BYTES)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * count / measure(lambda: target.copy_(source), device).median_s


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Return operations per second of a product of two square matrices."""
    side = size or MATRIX_SIZE.get(device.type, CPU_MATRIX_SIZE)
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / measure(lambda: left @ right, device).median_s


@contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """Let float32 products take their inputs in another precision inside: "high" is tf32 on an NVIDIA GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
