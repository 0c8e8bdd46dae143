"""The slower method: `balanced` with four times the self-study."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve
from compactor.study import Study, choose_keys, picks_per_chunk, source_weights

SUMMARY = "as balanced, with four times the self-study"
SELF_STUDY_FACTOR = 4


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    segments = study.more_segments(SELF_STUDY_FACTOR)
    weights = source_weights(study.job, segments)
    with study.job.timed("select"):
        selection = study.once(
            ("best selection", picks_per_chunk(study, num_kept)),
            lambda: choose_keys(study, segments, weights, num_kept),
        )
    return solve(study, num_kept, selection, segments, weights)
