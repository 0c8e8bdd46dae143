"""Knows how to time the systems of the values of a layer: factors and solutions. Knows no queries.

A system of n kept keys and d components takes n^3 / 3 operations for its factor and 2 n^2 d for the solution, in
float32; it is read once, right-hand sides are read and solutions written. The error is that of the solutions.
"""

from __future__ import annotations

import torch

from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.solve.biases import add_diagonal, blocks_usable, factor_each, solve_factored
from compactor.types import Reporter
from compactor_kernels.reference_cholesky import cholesky_solve_reference

RIDGE = 0.1  # of the mean diagonal

Systems = tuple[torch.Tensor, torch.Tensor]  # (num_systems, n, n) and right-hand sides (num_systems, n, d)


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and torch's factors on a system a KV head, as large as the head keeps keys on average."""
    return time_jobs("cholesky", [_job(settings, device)], settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device) -> Job:
    _, size, _ = kept_sizes(settings)
    num_systems, num_rhs = settings.kv_heads, settings.head_dim

    def make(numbers: Numbers) -> Systems:
        columns = numbers.normal(num_systems, 2 * size, size)
        gram = columns.mT @ columns / (2 * size)
        added = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        return add_diagonal(gram, added), numbers.normal(num_systems, size, num_rhs)

    def twin(systems: Systems) -> torch.Tensor:
        return cholesky_solve_reference(*systems)[0]

    def by_torch(systems: Systems) -> torch.Tensor:
        return solve_factored(factor_each(systems[0])[0], systems[1])

    def kernel(systems: Systems) -> torch.Tensor:
        from compactor_kernels.cholesky import cholesky_solve_batched

        return cholesky_solve_batched(*systems)[0]

    def error(systems: Systems, found: torch.Tensor) -> float:
        return relative((found, cholesky_solve_reference(*systems)[0]))

    ways = [Way("cholesky, twin", twin, waits=True)]
    if device.type == "cuda":
        ways.insert(0, Way("cholesky, torch", by_torch, waits=True))
    if blocks_usable(torch.empty(1, 1, 1, device=device).expand(num_systems, size, size), "cholesky"):
        ways.insert(0, Way("cholesky", kernel))
    operations = num_systems * (size**3 // 3 + 2 * size**2 * num_rhs)
    work = Work(operations, "float32", 4 * num_systems * (size**2 + 2 * size * num_rhs))
    return Job({"systems": num_systems, "keys": size, "components": num_rhs}, work, make, error, ways)
