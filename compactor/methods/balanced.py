"""The default method: repeat pass, self-study and the document's own queries; keys by share and value, one budget over
all heads, fitted on-policy."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.methods.ours import solve
from compactor.study import Study

SUMMARY = "repeat pass and self-study, one budget over all heads, biases and values fitted on-policy"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; see docs/algorithm.md."""
    return solve(study, num_kept)
