"""Knows how to time a step of the refinement on heads of ragged lengths. Knows no schedule.

A call sets the number of the step back to 0 and takes the step; keys go on moving. The work of a step on r rows and n
keys of a head is 10 r n d operations: scores, outputs and three gradients. Drawn rows, and keys, biases and values with
their moments, are read once; the latter are written once. The error is that of the first step's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings, ragged_lengths
from compactor.kernel_trial import usable
from compactor.solve.refine import BETAS, rows_of_step
from compactor.types import Reporter
from compactor_kernels.reference import FitRows, refine_gradients_reference
from compactor_kernels.reference_steps import Steps, begin_steps_reference, take_step_reference

RATE = 1e-4  # small: what is timed thousands of times should stay what it is

Start = tuple[FitRows, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# rows, keys, biases, values, scales (which are the units too), drawn row numbers


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time the kernels and their twin."""
    return time_jobs("refine_steps", [_job(settings, device)], settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device) -> Job:
    keys, keep, per_head = kept_sizes(settings)
    kv_heads, head_dim, dtype = settings.kv_heads, settings.head_dim, model_dtype(device)
    lengths, num_rows = ragged_lengths(keep, settings.spread, kv_heads, keys), per_head * settings.heads // kv_heads
    num_drawn, scaling = min(num_rows, rows_of_step(device)), head_dim**-0.5

    def make(numbers: Numbers) -> Start:
        of_rows, of_keys = (kv_heads, num_rows), (kv_heads, max(lengths))
        lse = 0.1 * numbers.normal(*of_rows) + math.log(keep) + 1.0
        near, out = (0.3 * numbers.normal(*of_rows, head_dim) for _ in range(2))
        queries = numbers.normal(*of_rows, head_dim, dtype=dtype)
        fit_rows = FitRows(queries, numbers.between(0.5, 1.5, *of_rows), lse, lse.new_full(of_rows, -1.0), near, out)
        moving = numbers.normal(*of_keys, head_dim), numbers.between(-1.0, 1.0, *of_keys)
        drawn = torch.randperm(num_rows, generator=numbers.generator, device=device)[:num_drawn]
        values = numbers.normal(*of_keys, head_dim)
        return fit_rows, *moving, values, torch.ones(3, kv_heads, device=device), drawn.unsqueeze(0)

    def begin(start: Start) -> tuple[Any, ...]:
        _, *moving, scales, drawn = start
        return *moving, scales, drawn, torch.full((1,), RATE, device=device), BETAS

    def prepare_twin(start: Start) -> tuple[Steps, Callable[[], None]]:
        steps = begin_steps_reference(*begin(start))
        return steps, lambda: take_step_reference(start[0], lengths, start[4], steps, scaling=scaling)

    def prepare_kernel(start: Start) -> tuple[Steps, Callable[[], None]]:
        from compactor_kernels.refine_gradients import plan_gradients
        from compactor_kernels.refine_steps import begin_steps, take_step

        plan = plan_gradients(start[0], lengths, start[4], scaling=scaling)
        steps = begin_steps(plan, *begin(start))
        return steps, lambda: take_step(plan, steps)

    def call(prepared: tuple[Steps, Callable[[], None]]) -> Steps:
        steps, take = prepared
        steps.number.zero_()
        take()
        return steps

    def error(start: Start, found: Steps) -> float:
        fit_rows, all_keys, biases, values, scales, drawn = start
        shortest, count = 0, lengths[0]
        own = FitRows(*(part[shortest, drawn[0]].unsqueeze(0).double() for part in fit_rows))
        moving = (part[shortest : shortest + 1, :count] for part in (all_keys.to(dtype), biases, values))
        index = torch.arange(num_drawn, device=device)
        first_keys, first_biases, first_values = (part.double() for part in moving)
        given = own, index, first_keys, first_biases, first_values, [count], scales[:, :1].double()
        exact = refine_gradients_reference(*given, scaling=scaling)
        gradients = (part[shortest : shortest + 1, :count] / (1.0 - BETAS[0]) for part in found.first)
        return relative(*zip(gradients, exact, strict=True))

    ways = [Way("refine_steps, twin", call, prepare_twin, waits=True)]
    if usable("refine_steps", device, dtype, head_dim):
        ways.insert(0, Way("refine_steps", call, prepare_kernel))
    per_row, per_key = head_dim * dtype.itemsize + 4 * (2 * head_dim + 3), 3 * 2 * 4 * (2 * head_dim + 1)
    num_bytes = kv_heads * num_drawn * per_row + sum(lengths) * per_key + 8 * num_drawn
    work = Work(10.0 * num_drawn * sum(lengths) * head_dim, precision_of(dtype), num_bytes)
    return Job({"keys": round(sum(lengths) / kv_heads), "rows": num_drawn}, work, make, error, ways)
