"""The quick method: the document's own queries score the keys, and a thin sample of the repeat pass is fitted."""

from __future__ import annotations

from compactor import prompt as prompts
from compactor.methods import Compacted
from compactor.methods.ours import solve
from compactor.reference_queries import repeat_segments
from compactor.study import Study, context_selection
from compactor.types import Segment

SUMMARY = "the document's own queries choose the keys, a thin sample of the repeat pass fits them"
PIECE = 64  # document tokens repeated at once
EVERY = 16  # one piece in so many is repeated, but at least LEAST_PIECES are
LEAST_PIECES = 4


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    with study.job.timed("select"):
        selection = study.once("context selection", lambda: context_selection(study))
    segments = sample_pieces(study)
    return solve(study, num_kept, selection, segments, {"repeat": 1.0})


def sample_pieces(study: Study) -> list[Segment]:
    """Return a few short segments of the repeat pass, spread evenly over the document."""
    job = study.job
    borders = prompts.chunk_borders(len(job.document_ids), PIECE)
    step = max(1, min(EVERY, len(borders) // LEAST_PIECES))
    return repeat_segments(job.prompt, job.document_ids, borders[step // 2 :: step], job.room)
