"""best: see SUMMARY."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve
from compactor.study import Study

SUMMARY = "as balanced, with the greedy selection on all rows in full precision"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    return solve(study, num_kept)
