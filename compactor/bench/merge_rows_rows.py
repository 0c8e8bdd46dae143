"""Knows how to time the merges of attention parts: alone, with the scores' sums, and with errors. Knows no keys.

The parts are own segment, prefix and document; the merge that measures takes near part and document in float32. The
work counts every number read and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.types import Reporter
from compactor_kernels.reference_merge import (
    merge_measured_reference,
    merge_rows_reference,
    merge_scored_reference,
)

STEP = 2  # rows of the error that thinned least squares see

Inputs = tuple[torch.Tensor, ...]  # outputs and log-sum-exps of the parts in turn, exact outputs, root weights
Merge = Callable[[Inputs], tuple[torch.Tensor, ...]]


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the three kernels and their twins."""
    dtype, kernels = model_dtype(device), dict[str, Merge]()
    if usable("merge_rows", device, dtype, settings.head_dim):
        kernels = _kernels(dtype)
    jobs = [_job(settings, device, name, kernels.get(name)) for name in TWINS]
    return time_jobs("merge_rows", jobs, settings, device, reporter)


def _near_and_document(inputs: Inputs) -> tuple[list[Any], Any]:
    return [inputs[0:2], inputs[2:4]], inputs[4:6]


TWINS: dict[str, Merge] = {
    "merge_rows": lambda inputs: merge_rows_reference(*_near_and_document(inputs)),
    "merge_scored": lambda inputs: merge_scored_reference(*_near_and_document(inputs), inputs[6]),
    "merge_measured": lambda inputs: merge_measured_reference(
        (inputs[0], inputs[1]), (inputs[2], inputs[3]), inputs[4], inputs[5], step=STEP
    ),
}


def _kernels(dtype: torch.dtype) -> dict[str, Merge]:
    from compactor_kernels.merge_rows import merge_measured, merge_rows, merge_scored

    return {
        "merge_rows": lambda inputs: merge_rows(*_near_and_document(inputs)),
        "merge_scored": lambda inputs: merge_scored(*_near_and_document(inputs), inputs[6]),
        "merge_measured": lambda inputs: merge_measured(
            (inputs[0], inputs[1]), (inputs[2], inputs[3]), inputs[4], inputs[5], step=STEP, out_type=dtype
        ),
    }


def _job(settings: KernelSettings, device: torch.device, name: str, kernel: Merge | None) -> Job:
    kv_heads, head_dim, dtype = settings.kv_heads, settings.head_dim, model_dtype(device)
    shape = kv_heads, settings.heads // kv_heads, kept_sizes(settings)[2]
    measures = name == "merge_measured"

    def make(numbers: Numbers) -> Inputs:
        inputs: list[torch.Tensor] = []
        of_parts = torch.float32 if measures else dtype
        for _ in range(2 if measures else 3):
            inputs += numbers.normal(*shape, head_dim, dtype=of_parts), numbers.normal(*shape)
        if measures:
            inputs.append(numbers.normal(*shape, head_dim))
        return *inputs, numbers.between(0.5, 1.5, *shape)

    def error(inputs: Inputs, found: tuple[torch.Tensor, ...]) -> float:
        exact = TWINS[name](tuple(part[:1].double() for part in inputs))
        return relative(*((a[:1], b) for a, b in zip(found, exact, strict=True)))

    ways = [Way(f"{name}, twin", TWINS[name])]
    if kernel is not None:
        ways.insert(0, Way(name, kernel))
    size = dtype.itemsize
    per_row = {
        "merge_rows": 3 * (head_dim * size + 4) + 2 * (head_dim * 4 + 4),
        "merge_scored": 3 * (head_dim * size + 4) + 4 + head_dim * size + 4,
        "merge_measured": 2 * (head_dim * 4 + 4) + head_dim * 4 + 4 + head_dim * size,
    }[name]
    per_head = {"merge_rows": 0, "merge_scored": 4 * (head_dim + 3), "merge_measured": 2 * 8}[name]
    num_bytes = shape[0] * shape[1] * shape[2] * per_row + kv_heads * per_head
    return Job({"rows": shape[2]}, Work(0.0, precision_of(dtype), num_bytes), make, error, ways)
