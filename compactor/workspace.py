"""Knows how much memory a compaction may take beside weights and full cache. Knows no step.

Most of it is a matter of how much is done at once: blocks of scores, rows of a pass, Gram matrices that wait for their
greedy search, sequences of self-study that grow side by side. Each has a usual size, and under a bound a share of that
at most. Results stay the same up to rounding, but that a step of the refinement may look at fewer rows. What the last
pass holds for every reference row does not shrink.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from compactor.errors import SettingsError

# Shares of a bound; what is large at different times overlaps. Three blocks are held at once.
BLOCK_SHARE, PASS_SHARE, GRAM_SHARE, TAIL_SHARE = 1 / 16, 1 / 2, 1 / 4, 1 / 3
LEAST_BYTES = 250_000_000

_bound: ContextVar[int | None] = ContextVar("workspace", default=None)


@contextmanager
def bounded(num_bytes: int | None) -> Iterator[None]:
    """Bound the workspace inside; None is no bound. Raises SettingsError where it is too small to work in."""
    if num_bytes is not None and num_bytes < LEAST_BYTES:
        raise SettingsError(f"--workspace is {num_bytes:,} bytes; the least is {LEAST_BYTES:,}.")
    token = _bound.set(num_bytes)
    try:
        yield
    finally:
        _bound.reset(token)


def bound() -> int | None:
    """Return the bytes that the workspace may have, None for no bound."""
    return _bound.get()


def within(usual: int, share: float) -> int:
    """Return a usual number of bytes, under a bound its share of that at most."""
    num_bytes = _bound.get()
    return usual if num_bytes is None else min(usual, int(num_bytes * share))
