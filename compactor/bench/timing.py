"""Knows how to time a piece of work on any device. Knows no work and no ceilings.

Every benchmark reports the median of several runs after a warm-up, with the 10th and the 90th percentile as spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")
Call = Callable[[], object]

REPEATS, WARMUP = 10, 3
LEAST_REPEATS = 2  # whatever they take
GRAPH_REPLAYS = 30


@dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work over several runs."""

    median_s: float
    p10_s: float
    p90_s: float
    runs: int

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Timing:
        """Summarise the seconds of at least one run; percentiles are interpolated between runs."""
        if len(times_s) == 1:
            return cls(times_s[0], times_s[0], times_s[0], 1)
        deciles = statistics.quantiles(times_s, n=10, method="inclusive")
        return cls(statistics.median(times_s), deciles[0], deciles[-1], len(times_s))


def measure(
    run: Call, device: torch.device, *, repeats: int = REPEATS, warmup: int = WARMUP, longest_s: float | None = None
) -> Timing:
    """Time ``run``: by CUDA events on an NVIDIA GPU, elsewhere by the clock, the device synchronised at both ends.

    ``longest_s``: the repeats end when they have taken so long together, after two at least.
    """
    for _ in range(warmup):
        run()
    if device.type == "cuda":
        with torch.cuda.device(device):
            return Timing.of(_repeated(lambda: _event_seconds(run), repeats, longest_s))
    return Timing.of(_repeated(lambda: timed(run, device)[1], repeats, longest_s))


def _repeated(seconds: Callable[[], float], repeats: int, longest_s: float | None) -> list[float]:
    times: list[float] = []
    while len(times) < repeats:
        times.append(seconds())
        if longest_s is not None and len(times) >= LEAST_REPEATS and sum(times) >= longest_s:
            break
    return times


def measure_small(calls: Sequence[Call], device: torch.device, *, repeats: int = GRAPH_REPLAYS) -> Timing:
    """Time calls that are shorter than their own launch: seconds per call, all ``calls`` made in turn.

    On an NVIDIA GPU they are captured as one CUDA graph, and its replays are timed: a call must not wait for the GPU,
    nor move data to the host. Let calls read different tensors where none should be found in the cache. Elsewhere they
    are called one after another.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            whole = measure(_capture(calls).replay, device, repeats=repeats)
    else:
        whole = measure(lambda: [call() for call in calls], device, repeats=repeats)
    count = len(calls)
    return Timing(whole.median_s / count, whole.p10_s / count, whole.p90_s / count, whole.runs)


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Call ``run`` once; return its result and the seconds until the device has finished."""
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - started


class Stages:
    """A clock for work in several stages: ``seconds`` adds up what each took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside to a stage; the device is synchronised at both ends."""
        synchronize(self.device)
        started = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _event_seconds(run: Call) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """Return a graph of all calls; each is made once before, since what compiles or allocates cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
