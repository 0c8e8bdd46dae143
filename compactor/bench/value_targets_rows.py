"""Knows how to time the targets of the least squares of the values, written as two halves. Knows no fit.

Rows are those that the fit sees: spans are held out. The work counts vectors and weights of these rows, read once, and
the two float16 halves of every target, written once.
"""

from __future__ import annotations

import torch

from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.solve.rows import held_out_rows
from compactor.types import Reporter
from compactor_kernels.reference_targets import SECOND_HALF, ValueTargets, value_targets_reference

UNIT = 2.0**-10  # of the targets

Inputs = tuple[torch.Tensor, ...]  # product, out, near, near weights, root weights, units, rows


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin."""
    return time_jobs("value_targets", [_job(settings, device)], settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device) -> Job:
    kv_heads, head_dim, num_all = settings.kv_heads, settings.head_dim, kept_sizes(settings)[2]
    group, is_fitted = settings.heads // kv_heads, torch.ones(num_all, dtype=torch.bool)
    is_fitted[held_out_rows(num_all, torch.device("cpu"))] = False
    fitted = is_fitted.nonzero().squeeze(1)
    num_rows = group * len(fitted)

    def make(numbers: Numbers) -> Inputs:
        out, near = (numbers.normal(kv_heads, group, num_all, head_dim) for _ in range(2))
        weights, roots = numbers.between(0.0, 1.0, kv_heads, num_rows), numbers.between(0.5, 1.5, kv_heads, num_rows)
        units = torch.full((kv_heads,), UNIT, device=device)
        return numbers.normal(kv_heads, num_rows, head_dim), out, near, weights, roots, units, fitted.to(device)

    def twin(inputs: Inputs) -> ValueTargets:
        return value_targets_reference(*inputs[:6], rows=inputs[6])

    def kernel(inputs: Inputs) -> ValueTargets:
        from compactor_kernels.value_targets import value_targets

        return value_targets(*inputs[:6], rows=inputs[6])

    def error(inputs: Inputs, found: ValueTargets) -> float:
        product, out, near, weights, roots, units = (part[0].double() for part in inputs[:6])
        wanted, others = (part[:, inputs[6]].flatten(0, 1) for part in (out, near))
        targets = (wanted - weights.unsqueeze(1) * others) * roots.unsqueeze(1) - product
        first, second = found.halves[0].double().chunk(2, dim=1)
        return relative((units * (first + second / SECOND_HALF), targets), (found.energy[0], targets.square().sum()))

    ways = [Way("value_targets, twin", twin)]
    if usable("value_targets", device, model_dtype(device), head_dim):
        ways.insert(0, Way("value_targets", kernel))
    num_bytes = kv_heads * num_rows * (3 * 4 * head_dim + 2 * 4 + 2 * 2 * head_dim) + kv_heads * 12 + 8 * len(fitted)
    return Job({"rows": num_rows}, Work(bytes=num_bytes), make, error, ways)
