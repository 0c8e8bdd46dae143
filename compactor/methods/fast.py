"""The quick method: the document's own queries choose the keys, which stay as they are; nothing is fitted.

A thin sample of the repeat pass measures the error: too few rows to fit values or biases to (docs/log.md).
"""

from __future__ import annotations

from compactor import prompt as prompts
from compactor.methods import Compacted
from compactor.methods.ours import solve
from compactor.prefill import CONTEXT_SPAN
from compactor.reference_queries import repeat_segments
from compactor.solve.select import Selection
from compactor.study import Study, context_selection, greedy_selection, picks_per_chunk
from compactor.types import Segment

SUMMARY = "the document's own queries choose the keys under one budget over all heads; nothing is fitted"
PIECE = 64  # document tokens repeated at once
EVERY = 64  # one piece in so many is repeated, but at least LEAST_PIECES are
LEAST_PIECES = 4


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    segments = sample_pieces(study)
    rows = sum(len(segment.token_ids) for segment in segments)
    weights = {"repeat": len(study.job.document_ids) / rows}
    with study.job.timed("select"):
        selection = study.once(
            ("fast selection", picks_per_chunk(study, num_kept)),
            lambda: order_keys(study, segments, weights, num_kept),
        )
    return solve(study, num_kept, selection, segments, weights, refine_steps=None)


def order_keys(study: Study, segments: list[Segment], weights: dict[str, float], num_kept: int) -> Selection:
    """Order all keys by the document's own queries; greedily by the sample where these were not observed or, in a
    document of one span, score nothing."""
    if study.full.context_scores and len(study.job.document_ids) > CONTEXT_SPAN:
        return context_selection(study)
    return greedy_selection(study, segments, weights, picks_per_chunk(study, num_kept))


def sample_pieces(study: Study) -> list[Segment]:
    """Return a few short segments of the repeat pass, spread evenly over the document."""
    job = study.job
    borders = prompts.chunk_borders(len(job.document_ids), PIECE)
    step = max(1, min(EVERY, len(borders) // LEAST_PIECES))
    return repeat_segments(job.prompt, job.document_ids, borders[step // 2 :: step], job.room)
