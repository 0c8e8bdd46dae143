"""The slower method: keys chosen greedily, two questions about every passage, twice the refinement."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve_segments
from compactor.study import Study, greedily

SUMMARY = "as balanced, with greedy selection, two questions about every passage and twice the refinement"
SELF_STUDY_ROUNDS = 2
REFINE_STEPS = 300


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    return solve_segments(study, num_kept, "best", study.more_segments(SELF_STUDY_ROUNDS), greedily, REFINE_STEPS)
