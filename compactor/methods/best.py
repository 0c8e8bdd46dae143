"""The slower method: `balanced` with four times the self-study."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve_greedily
from compactor.study import Study

SUMMARY = "as balanced, with four times the self-study"
SELF_STUDY_FACTOR = 4


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    return solve_greedily(study, num_kept, "best", study.more_segments(SELF_STUDY_FACTOR))
