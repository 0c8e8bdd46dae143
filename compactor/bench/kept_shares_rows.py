"""Knows how to time the rows of the least squares problems: attention to kept keys, written out. Knows no fit.

Once as the biases take them, under a normaliser that is known, and once as the values do, where it is summed first. The
work counts one product of every row with every kept key; float16 shares are written once, all else is read once.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.types import Reporter
from compactor_kernels.reference import kept_shares_reference

CHECKED = 512  # rows of one head that are compared

Inputs = tuple[torch.Tensor, ...]  # queries, keys, biases, shifts, near shares and root weights
Shares = tuple[torch.Tensor, torch.Tensor | None]


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin for biases and for values."""
    jobs = [_job(settings, device, summed=summed) for summed in (False, True)]
    return time_jobs("kept_shares", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, *, summed: bool) -> Job:
    _, keep, per_head = kept_sizes(settings)
    kv_heads, head_dim, dtype = settings.kv_heads, settings.head_dim, model_dtype(device)
    num_rows, scaling = per_head * settings.heads // kv_heads, head_dim**-0.5

    def make(numbers: Numbers) -> Inputs:
        shape = kv_heads, num_rows
        queries, keys = (numbers.normal(kv_heads, n, head_dim, dtype=dtype) for n in (num_rows, keep))
        shift = 0.1 * numbers.normal(*shape) - math.log(keep) - 2.0
        biases, roots = numbers.between(-1.0, 1.0, kv_heads, keep), numbers.between(0.5, 1.5, *shape)
        return queries, keys, biases, shift, numbers.between(-3.0, -1.0, *shape), roots

    def options(inputs: Inputs) -> dict[str, Any]:
        return {"scaling": scaling, "near_share": inputs[4] if summed else None, "root_weights": inputs[5]}

    def twin(inputs: Inputs) -> Shares:
        return kept_shares_reference(*inputs[:4], **options(inputs))

    def kernel(inputs: Inputs) -> Shares:
        from compactor_kernels.kept_shares import kept_shares

        return kept_shares(*inputs[:4], **options(inputs))

    def error(inputs: Inputs, found: Shares) -> float:
        queries, keys, biases, *of_rows = (part[:1].double() for part in inputs)
        exact, rest = twin((queries[:, :CHECKED], keys, biases, *(part[:, :CHECKED] for part in of_rows)))
        pairs = [(found[0][:1, :CHECKED], exact)]
        if rest is not None and found[1] is not None:
            pairs.append((found[1][:1, :CHECKED], rest))
        return relative(*pairs)

    name = f"kept_shares, {'values' if summed else 'biases'}"
    ways = [Way(f"{name}, twin", twin)]
    if usable("kept_shares", device, dtype, head_dim):
        ways.insert(0, Way(name, kernel))
    inputs_bytes = (num_rows + keep) * head_dim * dtype.itemsize + 4 * (keep + (4 if summed else 2) * num_rows)
    work = Work(
        2.0 * kv_heads * num_rows * keep * head_dim,
        precision_of(dtype),
        kv_heads * (inputs_bytes + 2 * num_rows * keep),
    )
    return Job({"keys": keep, "rows": num_rows}, work, make, error, ways)
