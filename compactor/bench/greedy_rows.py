"""Knows how to time the greedy search in all chunks of a layer. Knows no queries.

The work of a problem is that of its factorisation, 2 C^2 (d + 1) + C K^2 + 4 C K (d + 1) operations in float32 for K
picks of C keys with d + 1 targets; Gram matrix and targets are read once, order and gains written. The error is that of
what the picks explain together, pick by pick: orders may differ in near ties.
"""

from __future__ import annotations

from typing import Any

import torch

from compactor import study
from compactor.bench.contestants import chunk_size
from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.solve.greedy import LOOK_EVERY, REDUNDANT
from compactor.types import Reporter
from compactor_kernels.reference_greedy import Picks, greedy_picks_reference

CHECKED = 2  # problems that are compared

Problems = tuple[torch.Tensor, torch.Tensor]  # Gram matrices and targets


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin with as many picks as `compact` makes in a long document."""
    return time_jobs("greedy", [_job(settings, device)], settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device) -> Job:
    keys, keep, _ = kept_sizes(settings)
    size, num_targets = chunk_size(keys), settings.head_dim + 1
    num_problems = settings.kv_heads * -(-keys // size)
    picks = min(size, round(study.DEPTH * keep * size / keys) + study.LEAST_PICKS)
    limits: dict[str, Any] = {"stop": 0.0, "redundant": REDUNDANT, "look_every": LOOK_EVERY}

    def make(numbers: Numbers) -> Problems:
        columns = numbers.normal(num_problems, 2 * size, size)
        return columns.mT @ columns, numbers.normal(num_problems, size, num_targets)

    def twin(problems: Problems) -> Picks:
        return greedy_picks_reference(*problems, picks, **limits)

    def kernel(problems: Problems) -> Picks:
        from compactor_kernels.greedy import greedy_picks

        return greedy_picks(*problems, picks, **limits)

    def error(problems: Problems, found: Picks) -> float:
        gram, targets = (part[:CHECKED].double() for part in problems)
        exact = greedy_picks_reference(gram, targets, picks, **limits)
        mine, theirs = (one.gains[:CHECKED, :picks].double().cumsum(1) for one in (found, exact))
        return relative((mine, theirs))

    ways = [Way("greedy, twin", twin, waits=True)]
    if usable("greedy", device, torch.float32, num_targets):
        ways.insert(0, Way("greedy", kernel))
    one = 2 * size**2 * num_targets + size * picks**2 + 4 * size * picks * num_targets
    num_bytes = num_problems * (4 * size * (size + num_targets) + 12 * size + 4)
    work = Work(float(num_problems * one), "float32", num_bytes)
    return Job({"keys": size, "problems": num_problems, "picks": picks}, work, make, error, ways)
