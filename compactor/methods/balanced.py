"""The default: repeat pass, self-study and the document's own queries; greedy selection, fitted on-policy."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve
from compactor.study import Study, choose_keys, picks_per_chunk, source_weights

SUMMARY = "repeat pass and self-study, greedy selection, one budget over all heads, fitted on-policy"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    segments = study.segments
    weights = source_weights(study.job, segments)
    with study.job.timed("select"):
        selection = study.once(
            ("selection", picks_per_chunk(study, num_kept)), lambda: choose_keys(study, segments, weights, num_kept)
        )
    return solve(study, num_kept, selection, segments, weights)
