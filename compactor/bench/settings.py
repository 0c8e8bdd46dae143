"""Knows the settings of benchmarks, their defaults and their limits. Knows no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compactor.errors import SettingsError

PUBLISHED = "attention-matching-"
SOLVER_METHODS = ("best", f"{PUBLISHED}omp", f"{PUBLISHED}omp-fast", f"{PUBLISHED}rms")
HELD_OUT_FRACTION = 4  # one extra row for so many rows of the fit


@dataclass(frozen=True)
class SolverSettings:
    """Settings of ``compactor bench solver``. Raises SettingsError when a value is out of range.

    ``attention-matching-`` may be left out of a method's name.
    """

    heads: int = 8  # KV heads of a layer
    keys: int = 8192  # document keys of a head
    rows: int = 8192  # query rows of a head that the fit sees
    head_dim: int = 128
    keep: int = 164  # keys kept per head, on average
    layers: int = 1  # layers that ours solves as one batch
    methods: tuple[str, ...] = SOLVER_METHODS
    repeats: int = 3  # timed runs of a method
    picks: int | None = None  # keys of a chunk that are picked greedily; None is what compact does
    refine_steps: int = 300  # as `best` takes
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("heads", 1), ("keys", 32), ("rows", 32), ("head_dim", 16), ("keep", 1), ("layers", 1),
                          ("repeats", 1), ("picks", 1), ("refine_steps", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < low:
                raise SettingsError(f"--{name.replace('_', '-')} is {value}; the least is {low}.")
        if self.keep >= self.keys:
            raise SettingsError(f"--keep {self.keep} of --keys {self.keys} leaves nothing to choose; keep fewer.")
        if not 0 <= self.seed < 2**31:
            raise SettingsError(f"--seed is {self.seed}; give a whole number from 0 to 2**31 - 1.")
        names = [PUBLISHED + name if PUBLISHED + name in SOLVER_METHODS else name for name in self.methods]
        unknown = [name for name in names if name not in SOLVER_METHODS]
        if unknown or not names:
            what = f"does not know {', '.join(map(repr, unknown))}" if unknown else "is empty"
            raise SettingsError(f"--methods {what}; give a comma-separated subset of {','.join(SOLVER_METHODS)}.")
        object.__setattr__(self, "methods", tuple(name for name in SOLVER_METHODS if name in names))

    @property
    def held_out_rows(self) -> int:
        """Rows of a head that no fit sees."""
        return self.rows // HELD_OUT_FRACTION

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {**asdict(self), "methods": list(self.methods)}
