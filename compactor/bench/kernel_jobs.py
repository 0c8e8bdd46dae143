"""Knows how the rows of a kernel are made: inputs, ways to do the same work on them, their errors. Knows no kernel.

The ways of a job get equal numbers. Calls visit several sets of inputs in turn, together larger than the cache of the
device, where one alone is not: none is found in the cache. Errors are those of the first call, against float64, on a
part of the result that every job says: norm of the difference over the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch

from compactor.bench.report import Row, Work
from compactor.bench.timing import Timing, measure, measure_small
from compactor.bench.workloads import KernelSettings
from compactor.types import Reporter

COLD_MULTIPLE = 4  # inputs visited in turn hold this many times the cache of the device
MOST_SETS = 512  # of inputs
LONGEST_S = 1.0  # that the repeats of a row may take together
INNER_MULTIPLE = 3.8  # of a layer's width: what its feed-forward part has inside, as in Qwen3-4B
CALLS, SMALL_BYTES = 32, 1 << 27  # calls of one graph on a GPU, if each reads less than so many bytes


class Way(NamedTuple):
    """One way to do the work."""

    name: str
    call: Callable[[Any], Any]  # what is timed: prepared inputs -> result
    prepare: Callable[[Any], Any] = lambda inputs: inputs  # not timed
    waits: bool = False  # for the device, so that its calls cannot be captured


@dataclass(frozen=True)
class Job:
    """A piece of work, whoever does it."""

    sizes: Mapping[str, int]
    work: Work  # its bytes also decide how many sets of inputs there are
    make: Callable[[Numbers], Any]  # draws inputs
    error: Callable[[Any, Any], float]  # of inputs and a result
    ways: Sequence[Way]


class Numbers:
    """Random numbers on a device; equal seeds give equal ones there."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return numbers with mean 0 and deviation 1."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def between(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Return float32 numbers of an interval, evenly."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low


def time_jobs(
    kernel: str, jobs: Sequence[Job], settings: KernelSettings, device: torch.device, reporter: Reporter
) -> list[Row]:
    """Return a row for every way of every job; what cannot run here is left out and told."""
    found: list[Row] = []
    with reporter.phase(kernel, sum(len(job.ways) for job in jobs), "ways") as advance:
        for job in jobs:
            numbers = Numbers(device, settings.seed)
            sets = [job.make(numbers) for _ in range(count_sets(job.work.bytes, device))]
            for way in job.ways:
                try:
                    found.append(time_way(job, way, sets, settings, device))
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as failure:
                    reason = " ".join(str(failure).split())[:200]
                    reporter.note(f"{way.name} cannot run here and is left out: {reason}")
                advance(1)
    return found


def time_way(job: Job, way: Way, sets: Sequence[Any], settings: KernelSettings, device: torch.device) -> Row:
    """Return the row of one way: small work is replayed as a CUDA graph of many calls."""
    calls = [partial(way.call, way.prepare(inputs)) for inputs in sets]
    error = job.error(sets[0], calls[0]())
    timing: Timing
    if device.type == "cuda" and job.work.bytes < SMALL_BYTES and not way.waits:
        count = max(len(calls), CALLS)
        timing = measure_small([calls[i % len(calls)] for i in range(count)], device, repeats=settings.repeats)
    else:
        turns = cycle(calls)
        timing = measure(lambda: next(turns)(), device, repeats=settings.repeats, longest_s=LONGEST_S)
    shared = {"heads": settings.heads, "kv_heads": settings.kv_heads, "head_dim": settings.head_dim}
    return Row(way.name, timing, {**shared, **job.sizes}, [job.work], {"relative_error": error})


def count_sets(work_bytes: float, device: torch.device) -> int:
    """Return how many sets of inputs hold together `COLD_MULTIPLE` times the cache, `MOST_SETS` at most."""
    return min(MOST_SETS, max(1, math.ceil(COLD_MULTIPLE * cache_bytes(device) / max(1.0, work_bytes))))


def cache_bytes(device: torch.device) -> int:
    """Return the size of an NVIDIA GPU's L2 cache; 0 elsewhere."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def relative(*pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the largest of the errors of results against float64, each as norm of the difference over the norm."""
    return max(float((found.double() - exact).norm() / exact.norm()) for found, exact in pairs)


def kept_sizes(settings: KernelSettings) -> tuple[int, int, int]:
    """Return keys, kept keys and query rows of a head, as `KernelSettings.on` has filled them in."""
    assert settings.keys is not None and settings.keep is not None and settings.rows is not None
    return settings.keys, settings.keep, settings.rows


def hidden_sizes(settings: KernelSettings) -> tuple[int, int]:
    """Return the width of a layer, as `KernelSettings.on` has filled it in, and that of its feed-forward part."""
    assert settings.hidden is not None
    return settings.hidden, max(1, round(INNER_MULTIPLE * settings.hidden))
