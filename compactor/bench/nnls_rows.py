"""Knows how to time the biases of a layer: Newton steps of least squares in a box. Knows no queries.

A step of n variables takes n^3 / 3 operations for the factor, in float32, and 2 n^2 for each of the gradient, the
solution and the points of both arcs that are tried; the Gram matrix of float64 is read once for all of them. The error
is that of the points after as many steps as a fit takes.
"""

from __future__ import annotations

import torch

from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.solve.biases import (
    DOWNHILL_STEPS,
    HOPELESS,
    JITTER_32,
    NEWTON_STEPS,
    SUFFICIENT,
    blocks_usable,
    by_kernels,
    by_torch,
)
from compactor.solve.fit import BIAS_STEPS
from compactor.types import Reporter
from compactor_kernels.reference_nnls import BoxPoints, Search, box_newton_reference

LOW, HIGH = 0.05, 2.0
SEARCH = Search(NEWTON_STEPS, DOWNHILL_STEPS, SUFFICIENT, JITTER_32, HOPELESS)

Vectors = torch.Tensor
Problems = tuple[torch.Tensor, Vectors, Vectors, Vectors, Vectors, Vectors, Vectors]  # as `box_newton` takes them


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and torch on a problem a KV head, as large as the head keeps keys on average."""
    return time_jobs("nnls", [_job(settings, device)], settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device) -> Job:
    _, size, _ = kept_sizes(settings)
    count = settings.kv_heads

    def make(numbers: Numbers) -> Problems:
        columns = numbers.between(0.0, 1.0, count, 3 * size, size) + numbers.normal(count, 3 * size, size)
        columns = (columns / columns.norm(dim=1, keepdim=True)).double()
        gram = columns.mT @ columns
        wanted = numbers.between(-1.5, 3.5, count, size, 1).double()  # some leave the box, at both ends
        rhs = (gram @ wanted).squeeze(-1)
        low, high = torch.full_like(rhs, LOW), torch.full_like(rhs, HIGH)
        return gram, rhs, torch.ones_like(rhs), low, high, rhs == rhs, rhs.abs().amax(-1)

    def twin(problems: Problems) -> BoxPoints:
        return box_newton_reference(*problems, tolerance=0.0, max_iterations=BIAS_STEPS, search=SEARCH)

    def torchs(problems: Problems) -> BoxPoints:
        return by_torch(*problems, 0.0, BIAS_STEPS)

    def kernels(problems: Problems) -> BoxPoints:
        return by_kernels(*problems, 0.0, BIAS_STEPS)

    def error(problems: Problems, found: BoxPoints) -> float:
        return relative((found.point, twin(problems).point))

    ways = [Way("nnls, twin", twin, waits=True)]
    if device.type == "cuda":
        ways.insert(0, Way("nnls, torch", torchs, waits=True))
    if blocks_usable(torch.empty(1, 1, 1, device=device).expand(count, size, size), "nnls"):
        ways.insert(0, Way("nnls", kernels))
    tried = NEWTON_STEPS[1] + DOWNHILL_STEPS[1]
    operations = BIAS_STEPS * (size**3 // 3 + 2 * size**2 * (2 + tried))
    work = Work(count * operations, "float32", count * 8 * (size**2 + 5 * size))
    return Job({"problems": count, "keys": size, "steps": BIAS_STEPS}, work, make, error, ways)
