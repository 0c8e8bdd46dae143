"""Knows what a benchmark reports: machine, ceilings, settings, and rows with times and fractions. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compactor.bench.timing import Timing


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to do at most, in the same run."""

    copy_bytes_per_s: float  # of a large copy on the device, bytes read and bytes written
    operations_per_s: Mapping[str, float]  # of large matrix products, by precision: bfloat16, tf32, float32


@dataclass(frozen=True)
class Work:
    """The least that a piece of work needs: inputs read once, results written once; a multiplication and an addition
    are two operations."""

    operations: float = 0.0
    precision: str = "float32"  # of the inputs: bfloat16 (float16 as well), tf32 or float32
    bytes: float = 0.0

    def least_s(self, ceilings: Ceilings) -> float:
        """Return the seconds at the ceiling that binds: copy bandwidth or matrix rate."""
        rate = ceilings.operations_per_s[self.precision]
        return max(self.bytes / ceilings.copy_bytes_per_s, self.operations / rate)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    timing: Timing
    sizes: Mapping[str, int] = field(default_factory=dict)
    work: Sequence[Work] = ()  # done one after another; empty where it is not counted
    figures: Mapping[str, float] = field(default_factory=dict)  # whatever else was measured, such as errors
    part_of: str | None = None  # the row of which this one is a stage

    def fraction(self, ceilings: Ceilings) -> float | None:
        """Return the time at the ceilings over the median time; None without counted work."""
        least_s = sum(work.least_s(ceilings) for work in self.work)
        return least_s / self.timing.median_s if self.work and self.timing.median_s > 0 else None

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """Return the row as plain JSON values; times in seconds, what was not counted is null."""
        return {
            "name": self.name,
            "part_of": self.part_of,
            "sizes": dict(self.sizes),
            **asdict(self.timing),
            "operations": sum(work.operations for work in self.work) or None,
            "bytes": sum(work.bytes for work in self.work) or None,
            "fraction": self.fraction(ceilings),
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Report:
    """The result of one benchmark."""

    bench: str  # name of the subcommand
    machine: Mapping[str, str | int | None]
    ceilings: Ceilings
    settings: Mapping[str, Any]
    rows: Sequence[Row]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "bench": self.bench,
            "machine": dict(self.machine),
            "ceilings": {
                "copy_bytes_per_s": self.ceilings.copy_bytes_per_s,
                "operations_per_s": dict(self.ceilings.operations_per_s),
            },
            "settings": dict(self.settings),
            "rows": [row.to_json(self.ceilings) for row in self.rows],
        }
