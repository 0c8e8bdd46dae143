"""Knows how to time rotary embeddings: of the new tokens of a batch, and of many rows of one sequence. Knows no model.

The twin is what transformers does. Every number is read and written once.
"""

from __future__ import annotations

import torch

from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.types import Reporter
from compactor_kernels.reference_rotary import rotate_reference

Turned = tuple[torch.Tensor, torch.Tensor]


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin at every batch size, and on the rows of a prefill."""
    shapes = [*((batch, settings.q_len) for batch in settings.batches), (1, kept_sizes(settings)[2])]
    jobs = [_job(settings, device, *shape) for shape in dict.fromkeys(shapes)]
    return time_jobs("rotary", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, batch: int, num_rows: int) -> Job:
    heads, kv_heads, head_dim, dtype = settings.heads, settings.kv_heads, settings.head_dim, model_dtype(device)

    def make(numbers: Numbers) -> tuple[torch.Tensor, ...]:
        # as projections leave them: heads of a row side by side
        queries, keys = (numbers.normal(batch, num_rows, n, head_dim, dtype=dtype) for n in (heads, kv_heads))
        angles = numbers.between(0.0, 6.0, batch, num_rows, head_dim)
        return queries.transpose(1, 2), keys.transpose(1, 2), angles.cos().to(dtype), angles.sin().to(dtype)

    def twin(inputs: tuple[torch.Tensor, ...]) -> Turned:
        return rotate_reference(*inputs)

    def kernel(inputs: tuple[torch.Tensor, ...]) -> Turned:
        from compactor_kernels.rotary import rotate

        return rotate(*inputs)

    def error(inputs: tuple[torch.Tensor, ...], found: Turned) -> float:
        queries, keys, cos, sin = (part[:1].double() for part in inputs)
        exact = rotate_reference(queries[:, :1], keys[:, :1], cos, sin)
        return relative(*((a[:1, :1], b) for a, b in zip(found, exact, strict=True)))

    ways = [Way("rotary, twin", twin)]
    if usable("rotary", device, dtype, head_dim):
        ways.insert(0, Way("rotary", kernel))
    vectors = batch * num_rows * (2 * (heads + kv_heads) + 2)
    return Job({"batch": batch, "rows": num_rows}, Work(bytes=vectors * head_dim * dtype.itemsize), make, error, ways)
