"""Knows how to time the systems of a layer's values, factored and solved. Knows no least squares.

A system has a row for each kept key and a right-hand side for each of a head's d numbers. Its work is n^3 / 3
operations of the factor (half of them multiplications) and 2 n^2 d of both substitutions, float32; one half of the
symmetric matrix and the right-hand sides are read once, solutions written once. Beside the kernel, on a GPU, torch's
factorisation and triangular solves.
"""

from __future__ import annotations

import torch

from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.solve.biases import TRIED, factor_each, solve_factored
from compactor.types import Reporter
from compactor_kernels.reference_cholesky import MAX_SIZE, cholesky_solve_reference

CHECKED = 2  # systems that are compared

Equations = tuple[torch.Tensor, torch.Tensor]  # systems and right-hand sides


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel, its twin and torch's functions; the kernel is left out where it takes no system of that size."""
    return time_jobs("cholesky", [_job(settings, device)], settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device) -> Job:
    size, num_systems, num_rhs = kept_sizes(settings)[1], settings.kv_heads, settings.head_dim

    def make(numbers: Numbers) -> Equations:
        columns = numbers.normal(num_systems, 2 * size, size)
        return columns.mT @ columns / (2 * size), numbers.normal(num_systems, size, num_rhs)

    def twin(equations: Equations) -> torch.Tensor:
        return cholesky_solve_reference(*equations)[0]

    def kernel(equations: Equations) -> torch.Tensor:
        from compactor_kernels.cholesky import cholesky_solve_batched

        return cholesky_solve_batched(*equations)[0]

    def by_torch(equations: Equations) -> torch.Tensor:
        systems, rhs = equations
        return solve_factored(factor_each(systems)[0], rhs)

    def error(equations: Equations, found: torch.Tensor) -> float:
        systems, rhs = (part[:CHECKED].double() for part in equations)
        return relative((found[:CHECKED], torch.linalg.solve(systems, rhs)))

    ways = [Way("cholesky, twin", twin, waits=True)]
    if device.type == "cuda":
        ways.insert(0, Way("cholesky, torch", by_torch, waits=True))
    if size <= MAX_SIZE and usable("cholesky", device, torch.float32, TRIED):
        ways.insert(0, Way("cholesky", kernel))
    operations = size**3 / 3 + 2 * size**2 * num_rhs
    num_bytes = 4 * (size * (size + 1) // 2 + 2 * size * num_rhs)
    work = Work(num_systems * operations, "float32", num_systems * num_bytes)
    return Job({"keys": size, "problems": num_systems}, work, make, error, ways)
