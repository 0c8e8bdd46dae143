"""The default: repeat pass, self-study and the document's own queries; greedy selection, fitted on-policy."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve_greedily
from compactor.study import Study

SUMMARY = "repeat pass and self-study, greedy selection, one budget over all heads, fitted on-policy"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    return solve_greedily(study, num_kept, "balanced", study.segments)
