"""Knows how to time RMS norms of the new tokens of a batch, alone and after a residual's sum. Knows no model.

The twin is PyTorch's own. Every number is read and written once.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from compactor.bench.kernel_jobs import Job, Numbers, Way, hidden_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.types import Reporter

EPSILON = 1e-6

Inputs = tuple[torch.Tensor, ...]  # weight, rows, and what is added to them


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin at every batch size, without and with a sum."""
    counts = dict.fromkeys(batch * settings.q_len for batch in settings.batches)
    jobs = [_job(settings, device, num_rows, is_sum) for num_rows in counts for is_sum in (False, True)]
    return time_jobs("rms_norm", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, num_rows: int, is_sum: bool) -> Job:
    size, dtype = hidden_sizes(settings)[0], model_dtype(device)

    def make(numbers: Numbers) -> Inputs:
        weight = numbers.between(0.5, 1.5, size).to(dtype)
        return weight, *(numbers.normal(num_rows, size, dtype=dtype) for _ in range(1 + is_sum))

    def twin(inputs: Inputs) -> Inputs:
        total = inputs[1] + inputs[2] if is_sum else inputs[1]
        return functional.rms_norm(total, (size,), inputs[0], EPSILON), *([total] if is_sum else [])

    def kernel(inputs: Inputs) -> Inputs:
        from compactor_kernels.rms_norm import rms_norm

        weight, given, *addend = inputs
        if not is_sum:
            return (rms_norm(given, weight, EPSILON),)
        total = torch.empty_like(given)
        return rms_norm(given, weight, EPSILON, addend=addend[0], total=total), total

    def error(inputs: Inputs, found: Inputs) -> float:
        return relative(*zip(found, twin(tuple(part.double() for part in inputs)), strict=True))

    name = "rms_norm, sum" if is_sum else "rms_norm"
    ways = [Way(f"{name}, twin", twin)]
    if usable("rms_norm", device, dtype, size):
        ways.insert(0, Way(name, kernel))
    vectors = 1 + num_rows * (4 if is_sum else 2)
    return Job({"rows": num_rows, "inputs": size}, Work(bytes=vectors * size * dtype.itemsize), make, error, ways)
