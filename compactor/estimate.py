"""Knows what a compaction will cost before it runs: arithmetic counted, rates measured on this machine.

An estimate, not a promise: it counts matrix products and the reads of self-study, and assumes `EFFICIENCY` of the
measured matrix rate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from compactor.attention import block_elements
from compactor.job import fixed_bytes, full_bytes, keeps_everything, num_compacted, prepare, target_total
from compactor.self_study import make_plan
from compactor.solve.budget import key_bytes

if TYPE_CHECKING:
    from compactor.config import CompactSettings
    from compactor.document import Document
    from compactor.job import Job
    from compactor.model import LoadedModel

EFFICIENCY = 0.5  # of the rate of one large matrix product, over whole phases
STEP_SECONDS_PER_LAYER = 4e-3  # of generation, beside the reads: 2.7 ms measured on an H100, 6 ms on two CPU cores
SPREAD = 1.6  # mean of the squared count per head over the squared mean: budgets differ between heads
PROBE_SIZE = {"cpu": 1024, "mps": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Estimate:
    """What to expect."""

    document_tokens: int
    full_bytes: int  # the uncompacted cache, in the storage type
    tensor_bytes: int  # the file without its header
    peak_bytes: int  # weights, full cache and workspace
    total_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)


def estimate(document: Document, loaded: LoadedModel, settings: CompactSettings) -> Estimate:
    """Return expected bytes and seconds. Raises what `job.prepare` raises; runs no layer of the model."""
    job = prepare(document, loaded, settings)
    num_document = len(job.document_ids)
    kept_bytes = target_total(job) * key_bytes(loaded.head_dim, job.storage_dtype.itemsize)
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    cache = full_bytes(job) * loaded.dtype.itemsize // job.storage_dtype.itemsize
    seconds = phase_seconds(job, weights)
    longest_gram = min(num_document, round(4 * target_total(job) / (num_compacted(loaded) * loaded.num_kv_heads)))
    workspace = (
        3 * 4 * block_elements(loaded.device)
        + 3 * 8 * longest_gram**2
        + 2 * 4 * num_document * loaded.num_kv_heads * loaded.head_dim
    )
    return Estimate(
        document_tokens=num_document,
        full_bytes=full_bytes(job),
        tensor_bytes=fixed_bytes(job) + kept_bytes,
        peak_bytes=weights + cache + workspace,
        total_seconds=round(sum(seconds.values()), 1),
        seconds={phase: round(value, 1) for phase, value in seconds.items()},
    )


def phase_seconds(job: Job, weights: int) -> dict[str, float]:
    """Return expected seconds of each phase."""
    loaded, settings, num_document = job.loaded, job.settings, len(job.document_ids)
    rate, bandwidth = EFFICIENCY * matrix_rate(loaded.device, loaded.dtype), copy_rate(loaded.device)
    parameters = sum(p.numel() for name, p in loaded.model.named_parameters() if "embed" not in name)
    layers, width = num_compacted(loaded), loaded.num_heads * loaded.head_dim
    length = len(job.prompt.prefix_ids) + num_document
    context = "context" in settings.queries
    seconds = {"prefill": (2 * parameters * length + 2 * layers * width * length**2 * (2 if context else 1)) / rate}
    if keeps_everything(job):
        return seconds
    segment_rows = num_document if "repeat" in settings.queries else 0
    if "self-study" in settings.queries:
        segment_rows += job.self_study_tokens
        steps = make_plan(num_document, job.self_study_tokens).answer_tokens
        reads = (weights + full_bytes(job)) / bandwidth
        seconds["ask"] = steps * (reads + STEP_SECONDS_PER_LAYER * loaded.num_layers)
    attend = 4 * layers * width * length
    seconds["score"] = segment_rows * (2 * parameters + attend) / rate
    rows = segment_rows + (num_document if context and "repeat" not in settings.queries else 0)
    kept = target_total(job) / (layers * loaded.num_kv_heads)
    gram = 2 * layers * loaded.num_heads * rows * kept**2 * SPREAD
    seconds["fit"] = (segment_rows * 2 * parameters + 2 * rows * attend + gram) / rate
    return seconds


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured floating-point operations per second of one large square product."""
    size = PROBE_SIZE.get(device.type, 1024)
    matrix = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _seconds(lambda: matrix @ matrix, device)


def copy_rate(device: torch.device) -> float:
    """Measured bytes per second of reading a buffer larger than caches."""
    buffer = torch.ones(1 << (26 if device.type == "cpu" else 28), device=device)
    return buffer.nbytes / _seconds(lambda: buffer.sum(), device)


def _seconds(run: object, device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        result = run()  # type: ignore[operator]
        float(result.flatten()[0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best
