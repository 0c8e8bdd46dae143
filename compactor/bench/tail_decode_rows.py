"""Knows how to time attention of new tokens to the tail of their sequence, merged with the document's. Knows no cache.

The tail is as in self-study: a buffer of which the first new token sees `VISIBLE` columns. The work counts keys and
values that some row sees, read once; queries and the document's part are read, outputs and log-sum-exps written.
"""

from __future__ import annotations

import torch

from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.types import Reporter
from compactor_kernels.reference import PartialAttention
from compactor_kernels.reference_tail import tail_decode_reference

VISIBLE, SPARE = 101, 29  # columns that the first new token sees, its own included, and columns that none sees yet

Inputs = tuple[torch.Tensor, ...]  # queries, keys, values, padding, tail_end, the document's output and log-sum-exp


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin at every batch size."""
    jobs = [_job(settings, device, batch) for batch in settings.batches]
    return time_jobs("tail_decode", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, batch: int) -> Job:
    heads, kv_heads, head_dim, q_len = settings.heads, settings.kv_heads, settings.head_dim, settings.q_len
    dtype, scaling, seen = model_dtype(device), head_dim**-0.5, VISIBLE + q_len - 1

    def make(numbers: Numbers) -> Inputs:
        shape = batch, heads, q_len
        keys, values = (numbers.normal(batch, kv_heads, seen + SPARE, head_dim, dtype=dtype) for _ in range(2))
        padding, end = (torch.full((n,), at, device=device) for n, at in ((batch, 0), (1, VISIBLE - 1)))
        queries = numbers.normal(*shape, head_dim, dtype=dtype)
        return queries, keys, values, padding, end, numbers.normal(*shape, head_dim), numbers.normal(*shape) + 5.0

    def twin(inputs: Inputs) -> PartialAttention:
        return tail_decode_reference(*inputs[:5], scaling=scaling, document=(inputs[5], inputs[6]))

    def kernel(inputs: Inputs) -> PartialAttention:
        from compactor_kernels.tail_decode import tail_decode

        document = inputs[5], inputs[6]
        return tail_decode(*inputs[:5], scaling=scaling, document=document, out_type=dtype)

    def error(inputs: Inputs, found: PartialAttention) -> float:
        first = tuple(part[:1].double() if part.is_floating_point() else part[:1] for part in inputs)
        exact = twin(first)
        return relative((found.out[:1], exact.out), (found.lse[:1], exact.lse))

    ways = [Way("tail_decode, twin", twin)]
    if usable("tail_decode", device, dtype, head_dim):
        ways.insert(0, Way("tail_decode", kernel))
    num_rows, size = batch * heads * q_len, dtype.itemsize
    pairs = batch * heads * sum(range(VISIBLE, VISIBLE + q_len))
    num_bytes = 2 * batch * kv_heads * seen * head_dim * size + num_rows * (head_dim * (2 * size + 4) + 2 * 4)
    work = Work(4.0 * pairs * head_dim, precision_of(dtype), num_bytes)
    return Job({"batch": batch, "q_len": q_len, "keys": VISIBLE}, work, make, error, ways)
