"""Knows what a method cost by itself and what it shares with other methods of the same study. Knows no method."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from compactor.evaluate.asking import synchronize
from compactor.study import Study
from compactor.types import Segment

SEGMENTS = "reference segments"

Statistic = TypeVar("Statistic")


@dataclass
class _Call:
    """A computation at work: what it used, and the seconds of what others can use too."""

    used: set[Hashable] = field(default_factory=set)
    shared_s: float = 0.0


@dataclass
class Cost:
    """Seconds of a method."""

    own_s: float = 0.0  # what another method or size would have to do again
    shared_s: float = 0.0  # everything shared that it uses, whoever came first and paid for it


@dataclass
class MeteredStudy(Study):
    """A study that remembers who used which statistic, and how long each took to make."""

    seconds: dict[Hashable, float] = field(default_factory=dict)
    uses: dict[Hashable, set[Hashable]] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)

    @property
    def segments(self) -> list[Segment]:
        """The reference segments; who asks for them first waits for them."""
        return self._metered(SEGMENTS, SEGMENTS in self.seconds, lambda: super(MeteredStudy, self).segments)

    def once(self, key: Hashable, make: Callable[[], Statistic]) -> Statistic:
        """Return the statistic ``key``; the seconds that ``make`` takes are shared, not the caller's own."""
        return self._metered(key, key in self.statistics, lambda: super(MeteredStudy, self).once(key, make))

    def measure(self, run: Callable[[], Statistic]) -> tuple[Statistic, Cost]:
        """Run a method; return its result and its cost."""
        call, elapsed_s, result = self._run(run)
        shared = self._closure(call.used)
        return result, Cost(elapsed_s - call.shared_s, sum(self.seconds[key] for key in shared))

    def _metered(self, key: Hashable, is_there: bool, get: Callable[[], Statistic]) -> Statistic:
        if is_there:
            result = get()
        else:
            call, elapsed_s, result = self._run(get)
            self.seconds[key], self.uses[key] = elapsed_s - call.shared_s, call.used
            if self.calls:
                self.calls[-1].shared_s += elapsed_s
        if self.calls:
            self.calls[-1].used.add(key)
        return result

    def _run(self, run: Callable[[], Statistic]) -> tuple[_Call, float, Statistic]:
        device = self.job.loaded.device
        self.calls.append(_Call())
        synchronize(device)
        started = time.perf_counter()
        try:
            result = run()
            synchronize(device)
        finally:
            call = self.calls.pop()
        return call, time.perf_counter() - started, result

    def _closure(self, keys: set[Hashable]) -> set[Hashable]:
        """Return ``keys`` and everything that they were made from."""
        found: set[Hashable] = set()
        rest = list(keys)
        while rest:
            key = rest.pop()
            if key not in found:
                found.add(key)
                rest += self.uses.get(key, ())
        return found
