"""Knows how to time the end of a step's attention: a token is appended to every tail and attends to it, and the splits
of attention over the document are merged with that. Knows no cache.

The tail is as in `tail_decode_rows`, the splits are as many as a document of a few thousand kept keys has. The work
counts keys and values that some row sees, read once, the new ones written too; queries and splits are read, outputs
written.
"""

from __future__ import annotations

import torch

from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.tail_decode_rows import SPARE, VISIBLE
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.types import Reporter
from compactor_kernels.reference_step import step_decode_reference

SPLITS, KEYS_PER_SPLIT = 32, 64

Inputs = tuple[torch.Tensor, ...]  # queries, new keys and values, buffers, padding, tail_end; splits: out, lse, offsets


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin at every batch size."""
    jobs = [_job(settings, device, batch) for batch in settings.batches]
    return time_jobs("step_decode", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, batch: int) -> Job:
    heads, kv_heads, head_dim = settings.heads, settings.kv_heads, settings.head_dim
    dtype, scaling = model_dtype(device), head_dim**-0.5

    def make(numbers: Numbers) -> Inputs:
        queries = numbers.normal(batch, heads, 1, head_dim, dtype=dtype)
        new = (numbers.normal(batch, kv_heads, 1, head_dim, dtype=dtype) for _ in range(2))
        buffers = (numbers.normal(batch, kv_heads, VISIBLE + SPARE, head_dim, dtype=dtype) for _ in range(2))
        padding, end = (torch.full((n,), at, device=device) for n, at in ((batch, 0), (1, VISIBLE - 1)))
        offsets = torch.arange(kv_heads + 1, dtype=torch.int32, device=device) * (SPLITS * KEYS_PER_SPLIT)
        lse = numbers.normal(SPLITS, batch, heads, 1) + 1.0
        return queries, *new, *buffers, padding, end, numbers.normal(SPLITS, *queries.shape), lse, offsets

    def twin(inputs: Inputs) -> torch.Tensor:
        queries, new_keys, new_values, keys, values, padding, end, out, lse, _ = inputs
        merged = lse.logsumexp(0)
        document = ((lse - merged).exp().unsqueeze(-1) * out).sum(0), merged
        new, at = (new_keys, new_values), (padding, end)
        return step_decode_reference(queries, *new, keys, values, *at, document, scaling=scaling)

    def kernel(inputs: Inputs) -> torch.Tensor:
        from compactor_kernels.biased_decode import Splits
        from compactor_kernels.step_decode import step_decode

        queries, new_keys, new_values, keys, values, padding, end, out, lse, offsets = inputs
        splits = Splits(out, lse, offsets, KEYS_PER_SPLIT)
        return step_decode(queries, new_keys, new_values, keys, values, padding, end, splits, scaling=scaling)

    def error(inputs: Inputs, found: torch.Tensor) -> float:
        exact = tuple(part.double() if part.is_floating_point() else part for part in inputs)  # buffers of its own
        return relative((found, twin(exact)))

    ways = [Way("step_decode, twin", twin)]
    if usable("step_decode", device, dtype, head_dim):
        ways.insert(0, Way("step_decode", kernel))
    vectors = batch * (2 * kv_heads * (VISIBLE + 1) + 2 * heads)  # the new key is read and written
    num_bytes = vectors * head_dim * dtype.itemsize + SPLITS * batch * heads * (head_dim + 1) * 4
    work = Work(4.0 * batch * heads * VISIBLE * head_dim, precision_of(dtype), num_bytes)
    return Job({"batch": batch, "keys": VISIBLE, "splits": SPLITS}, work, make, error, ways)
