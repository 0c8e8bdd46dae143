"""Knows what this machine offers and lacks, and which model suits it. Changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

import typer

from compactor import console
from compactor.cli.options import Json
from compactor.cli.units import show_bytes
from compactor.registry import DEFAULT_MODEL, KNOWN_MODELS, KnownModel, cache_folder, cached_at, find_known

DISTRIBUTION = "kv-compactor"
OLDEST_PYTHON = (3, 11)
NECESSARY = ("torch", "transformers", "tokenizers", "safetensors", "xxhash")
CONVERSION = ("gguf", "accelerate")  # for GGUF files, and so for the default model the first time
EXTRAS = ("documents", "plots")
DOCUMENT_TOKENS = 16_384  # a model is recommended with room for this much text in full
WORK_BYTES = 2 * 10**9  # activations, reference queries and the libraries themselves
DEFAULT_MODEL_BYTES = 10**9  # of disk while the default model is fetched and converted
CPU_PARAMETERS_PER_CORE = 50_000_000  # beyond it a compaction on the CPU takes long


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state`` is "ok", "note" (works, but) or "broken" (nothing works so)."""

    name: str
    value: str
    state: str = "ok"
    remedy: str = ""


def doctor(json: Json = False) -> None:
    """Report Python, libraries, GPU, memory and cache folder, and recommend a model for this machine.

    The exit code is 1 when something is broken that every command needs.
    """
    findings = list(_findings())
    model, why = recommend(*machine_memory())
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if json:
        console.answer_json(
            {
                "ok": not broken,
                "findings": [asdict(finding) for finding in findings],
                "recommended": {"name": model.name, "hub_id": model.hub_id, "why": why},
            }
        )
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = {"ok": "ok    ", "note": "note  ", "broken": "BROKEN"}[finding.state]
            remedy = f" ({finding.remedy})" if finding.remedy else ""
            console.answer(f"{mark}  {finding.name:<{width}}  {finding.value}{remedy}")
        console.answer(f"\nRecommended here: compact -m {model.name} ({why})")
    if broken:
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    yield _python()
    yield from (_library(name, "broken") for name in NECESSARY)
    yield from (_library(name, "note") for name in CONVERSION)
    yield _gpu()
    yield _attention()
    yield _full_attention()
    total, available = host_memory()
    yield Finding("host memory", f"{show_bytes(total)}, {show_bytes(available)} available")
    yield Finding("CPU cores", str(usable_cores()))
    yield _cache_folder()
    yield _default_model()
    yield from map(_extra, EXTRAS)


def _python() -> Finding:
    value = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return Finding("Python", value)
    return Finding("Python", value, "broken", "Python 3.11 or newer is needed")


def _library(name: str, state_if_missing: str) -> Finding:
    try:
        import_module(name)
    except Exception as error:  # a broken installation can raise anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        return Finding(name, f"does not import: {reason}", state_if_missing, f"pip install --upgrade {name}")
    return Finding(name, _version(name) or "of unknown version")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> Finding:
    with suppress(Exception):  # a missing or broken torch has its own line
        import torch

        if torch.cuda.is_available():
            names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            return Finding("GPU", ", ".join(f"{one.name} ({show_bytes(one.total_memory)})" for one in names))
        if torch.backends.mps.is_available():
            return Finding("GPU", "Apple GPU through MPS, sharing the host's memory")
        built_for = torch.version.cuda or torch.version.hip
        if built_for:
            return Finding("GPU", f"none found; this PyTorch is built for {built_for}", "note", "look at its driver")
    return Finding("GPU", "none; models run on the CPU", "note")


def _attention() -> Finding:
    """Say which attention reads compacted caches here, and why."""
    has_cuda = False
    with suppress(Exception):
        import torch

        has_cuda = torch.cuda.is_available()
    triton = None
    with suppress(Exception):
        triton = getattr(import_module("triton"), "__version__", "of unknown version")
    if not has_cuda:
        return Finding("attention", "PyTorch, because Triton kernels need a CUDA GPU")
    if triton is None:
        return Finding(
            "attention", "PyTorch, because triton is not installed", "note", "pip install 'kv-compactor[gpu]'"
        )
    failures = _kernel_failures()
    if failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        return Finding(
            "attention",
            f"PyTorch in place of {len(failures)} of Triton {triton}'s kernels ({told})",
            "note",
            "another version of triton may compile them",
        )
    return Finding("attention", f"Triton {triton} kernels, all as exact as PyTorch on this GPU")


def _kernel_failures() -> dict[str, str]:
    """Try every kernel on the GPU, at the commonest head size; return what is wrong by its name."""
    import torch

    from compactor.kernel_trial import TRIALS, failure, kernel_available

    device = torch.device("cuda", torch.cuda.current_device())
    if not kernel_available(device):
        return dict.fromkeys(TRIALS, "the GPU is older than Ampere")
    found = {name: failure(name, device, torch.bfloat16, 128) for name in TRIALS}
    return {name: reason for name, reason in found.items() if reason is not None}


def _full_attention() -> Finding:
    """Say which attention reads full caches of half precision here, and why."""
    with suppress(Exception):  # a missing or broken torch has its own line
        import torch

        from compactor import attention

        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            if attention.fused_available(device):
                reason = attention.cudnn_failure(device, torch.bfloat16, 128)
                if reason is None:
                    return Finding("full attention", "cuDNN's where it is large, else FlashAttention-2")
                state = "ok" if reason == attention.BEFORE_HOPPER else "note"
                return Finding("full attention", f"FlashAttention-2, because of cuDNN's: {reason}", state)
    return Finding("full attention", "products in float32, because fused ones need an NVIDIA GPU, Ampere or newer")


def _cache_folder() -> Finding:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = show_bytes(shutil.disk_usage(existing).free)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("cache folder", f"{folder}, not writable", "note", "set COMPACTOR_CACHE_DIR")
    if shutil.disk_usage(existing).free < DEFAULT_MODEL_BYTES:
        return Finding("cache folder", f"{folder}, only {free} free", "note", "set COMPACTOR_CACHE_DIR")
    return Finding("cache folder", f"{folder}, {free} free")


def _default_model() -> Finding:
    known = find_known(DEFAULT_MODEL)
    if known is not None and cached_at(known):
        return Finding("default model", f"{DEFAULT_MODEL}, ready")
    return Finding("default model", f"{DEFAULT_MODEL}, fetched when it is first used (93 MB)")


def _extra(extra: str) -> Finding:
    name = f"extra [{extra}]"
    try:
        wanted = [line for line in metadata.requires(DISTRIBUTION) or [] if _belongs(line, extra)]
    except metadata.PackageNotFoundError:
        return Finding(name, "unknown, because compactor is not installed as a package", "note")
    packages = [_distribution_name(line) for line in wanted]
    missing = [package for package in packages if _version(package) is None]
    if missing:
        remedy = f"pip install '{DISTRIBUTION}[{extra}]'"
        return Finding(name, f"{', '.join(missing)} not installed", "note", remedy)
    return Finding(name, ", ".join(f"{package} {_version(package)}" for package in packages))


def _belongs(requirement: str, extra: str) -> bool:
    marker = requirement.partition(";")[2].replace("'", '"')
    return f'extra == "{extra}"' in marker and not requirement.startswith(DISTRIBUTION)


def _distribution_name(requirement: str) -> str:
    letters = requirement.strip()
    end = next((at for at, letter in enumerate(letters) if not (letter.isalnum() or letter in "-_.")), None)
    return letters[:end]


def recommend(kind: str, memory_bytes: int, cores: int) -> tuple[KnownModel, str]:
    """Return the largest known model that runs well on "cuda", "mps" or "cpu" with that memory, and why.

    Gated models are left out: not everyone can fetch them.
    """
    fitting = [known for known in KNOWN_MODELS if not known.gated and _needs_bytes(known, kind) <= memory_bytes]
    if kind == "cpu":
        fitting = [known for known in fitting if known.parameters <= cores * CPU_PARAMETERS_PER_CORE]
    best = max(fitting, key=lambda known: known.parameters, default=KNOWN_MODELS[0])
    where = {
        "cuda": "of GPU memory",
        "mps": "of memory for the GPU",
        "cpu": f"of memory and {cores} CPU cores",
    }
    needs = f"it needs about {show_bytes(_needs_bytes(best, kind))} for {DOCUMENT_TOKENS:,} tokens"
    return best, f"{needs}; there are {show_bytes(memory_bytes)} {where[kind]}"


def _needs_bytes(known: KnownModel, kind: str) -> int:
    """Return weights, the full cache twice (as it is, and while it is compacted) and room to work."""
    value_bytes = 2 if kind == "cpu" else 1  # float32 on the CPU, bfloat16 elsewhere
    cache = 2 * known.kv_bytes_per_token * min(DOCUMENT_TOKENS, known.window)
    return value_bytes * (known.weight_bytes + cache) + WORK_BYTES


def machine_memory() -> tuple[str, int, int]:
    """Return where models run here ("cuda", "mps" or "cpu"), the bytes of memory there, and the CPU cores."""
    total, available = host_memory()
    with suppress(Exception):
        import torch

        if torch.cuda.is_available():
            sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
            return "cuda", max(sizes), usable_cores()
        if torch.backends.mps.is_available():
            return "mps", total * 7 // 10, usable_cores()
    return "cpu", available, usable_cores()


def host_memory() -> tuple[int, int]:
    """Return total and available bytes of host memory, a container's limit included; 0 where unknown."""
    total = available = 0
    with suppress(Exception):
        import psutil  # type: ignore[import-untyped]

        memory = psutil.virtual_memory()
        total, available = memory.total, memory.available
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, limit - used)
    return total, available


def usable_cores() -> int:
    """Return the number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
