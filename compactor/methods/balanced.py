"""The default: repeat pass, self-study and the document's own queries; single scores, fitted and refined on-policy."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve_segments
from compactor.methods.sampled import by_sample
from compactor.study import Study

SUMMARY = "repeat pass and self-study, keys by single scores, one budget over all heads, fitted and refined on-policy"
REFINE_STEPS = 150


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    return solve_segments(study, num_kept, "balanced", study.segments, by_sample, REFINE_STEPS)
