"""Knows how to time the projected Newton steps of a layer's biases. Knows no queries.

As many steps are taken as a fit takes at most, and no problem stops before. The work of a step is that of its
direction, n^3 / 3 operations of a factor (half of them multiplications) and 2 n^2 of both substitutions, float32; the
gradient and what the tried points take, of order n^2 in float64, are not counted. One half of the symmetric matrix,
the vectors and the box are read once, results written once. Beside the kernel, on a GPU, the same steps of torch. The
error is that of the points against the same steps in float64.
"""

from __future__ import annotations

from typing import Any

import torch

from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.solve.biases import TRIED, by_kernels, by_torch, joint_search
from compactor.solve.fit import BIAS_STEPS
from compactor.types import Reporter
from compactor_kernels.reference_cholesky import MAX_SIZE
from compactor_kernels.reference_nnls import BoxPoints, BoxProblems, box_newton_reference

LOW, HIGH = 0.05, 2.0
CHECKED = 2  # problems that are compared


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernels, their twin and the steps of torch; the kernels are left out where they take no such size."""
    return time_jobs("nnls", [_job(settings, device)], settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device) -> Job:
    size, num_problems = kept_sizes(settings)[1], settings.kv_heads
    limits: dict[str, Any] = {"tolerance": 0.0, "max_iterations": BIAS_STEPS}

    def make(numbers: Numbers) -> BoxProblems:
        columns = (numbers.normal(num_problems, 2 * size, size) + 0.5).double()
        columns /= columns.norm(dim=1, keepdim=True)
        wanted = numbers.between(-1.5, 3.5, num_problems, size, 1).double()  # outside of the box at both ends
        gram = columns.mT @ columns
        rhs = (gram @ wanted).squeeze(-1)
        low, high = torch.full_like(rhs, LOW), torch.full_like(rhs, HIGH)
        seen = torch.ones_like(rhs, dtype=torch.bool)
        return BoxProblems(gram, rhs, torch.ones_like(rhs), low, high, seen, rhs.abs().amax(-1))

    def twin(problems: BoxProblems) -> BoxPoints:
        return box_newton_reference(problems, search=joint_search(), **limits)

    def kernel(problems: BoxProblems) -> BoxPoints:
        return by_kernels(problems, **limits)

    def torchs(problems: BoxProblems) -> BoxPoints:
        return by_torch(problems, **limits)

    def error(problems: BoxProblems, found: BoxPoints) -> float:
        exact = twin(BoxProblems(*(part[:CHECKED] for part in problems)))
        return relative((found.point[:CHECKED], exact.point))

    ways = [Way("nnls, twin", twin, waits=True)]
    if device.type == "cuda":
        ways.insert(0, Way("nnls, torch", torchs, waits=True))
    if size <= MAX_SIZE and usable("nnls", device, torch.float32, TRIED):
        ways.insert(0, Way("nnls", kernel))
    operations = BIAS_STEPS * (size**3 / 3 + 2 * size**2)
    num_bytes = 8 * (size * (size + 1) // 2 + 5 * size + 3) + size
    work = Work(num_problems * operations, "float32", num_problems * num_bytes)
    return Job({"keys": size, "problems": num_problems, "steps": BIAS_STEPS}, work, make, error, ways)
