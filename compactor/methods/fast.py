"""fast: see SUMMARY."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve
from compactor.study import Study

SUMMARY = "the document's own queries score the keys; no further pass over the document"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    return solve(study, num_kept)
