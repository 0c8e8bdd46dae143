"""Knows how to time the scores of keys: the squares of what each receives from many queries. Knows no model.

With limits the rows are the last of the document itself, which see the keys before their own span. The work counts a
product of every row with every key that it sees; keys, queries and shifts are read once, a number a key is written.
"""

from __future__ import annotations

import math

import torch

from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.prefill import CONTEXT_SPAN
from compactor.types import Reporter
from compactor_kernels.reference_stats import AttentionStats, attention_stats_reference

CHECKED = 256  # keys whose squares are compared

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and shifts


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernel and its twin on rows that see every key, and on rows with limits."""
    keys, _, num_rows = kept_sizes(settings)
    last = torch.arange(max(0, keys - num_rows), keys)[:num_rows] // CONTEXT_SPAN * CONTEXT_SPAN
    jobs = [_job(settings, device, None), _job(settings, device, last.to(torch.int32))]
    return time_jobs("attention_stats", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, stops: torch.Tensor | None) -> Job:
    keys, _, num_rows = kept_sizes(settings)
    num_rows = num_rows if stops is None else len(stops)
    pairs = num_rows * keys if stops is None else int(stops.sum())
    limits = None if stops is None else stops.to(device)
    heads, kv_heads, head_dim, dtype = settings.heads, settings.kv_heads, settings.head_dim, model_dtype(device)
    scaling = head_dim**-0.5

    def make(numbers: Numbers) -> Inputs:
        queries = numbers.normal(heads, num_rows, head_dim, dtype=dtype)
        shift = 0.1 * numbers.normal(heads, num_rows) - math.log(keys) - 0.5  # scores have deviation 1
        return queries, numbers.normal(kv_heads, keys, head_dim, dtype=dtype), shift

    def twin(inputs: Inputs) -> AttentionStats:
        return attention_stats_reference(*inputs, scaling=scaling, stops=limits)

    def kernel(inputs: Inputs) -> AttentionStats:
        from compactor_kernels.attention_stats import attention_stats

        return attention_stats(*inputs, scaling=scaling, stops=limits)

    def error(inputs: Inputs, found: AttentionStats) -> float:
        queries, first_keys, shift = (part[: 1 if part is inputs[1] else heads // kv_heads] for part in inputs)
        own = queries.double(), first_keys[:, :CHECKED].double(), shift.double()
        exact = attention_stats_reference(*own, scaling=scaling, stops=limits).squares
        assert found.squares is not None and exact is not None
        seen = exact > 0
        return relative((found.squares[:1, :CHECKED][seen], exact[seen])) if bool(seen.any()) else 0.0

    name = "attention_stats" if stops is None else "attention_stats, limits"
    ways = [Way(f"{name}, twin", twin)]
    if usable("attention_stats", device, dtype, head_dim):
        ways.insert(0, Way(name, kernel))
    inputs_bytes = (heads * num_rows + kv_heads * keys) * head_dim * dtype.itemsize + 4 * heads * num_rows
    work = Work(2.0 * heads * pairs * head_dim, precision_of(dtype), inputs_bytes + 4 * kv_heads * keys)
    return Job({"keys": keys, "rows": num_rows}, work, make, error, ways)
