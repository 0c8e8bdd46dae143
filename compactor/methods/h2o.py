"""Knows H2O's choice (arXiv 2306.14048), made once after prefill: heavy hitters and recent tokens. Knows no passes.

    score_j = sum over all document rows i >= j and the query heads of the group of A_ij

The paper evicts while it reads; made once, the choice sees all rows, which can only help it.
"""

from __future__ import annotations

import torch

from compactor.methods import Compacted
from compactor.methods.document_attention import document_attention
from compactor.methods.keeping import keep_uniformly
from compactor.study import Study

SUMMARY = "half the keys by accumulated attention of the document's own rows, half the last ones (H2O)"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep heavy hitters and recent tokens, half each, equally many keys in every head."""
    received = document_attention(study)
    return keep_uniformly(
        study, num_kept, lambda layer, head, count: heavy_and_recent(received[layer].all_rows[head], count)
    )


def heavy_and_recent(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` indices: the last ``count // 2`` tokens, and the best of the others by ``scores`` (T,)."""
    first_recent = len(scores) - count // 2
    heavy = scores[:first_recent].sort(descending=True, stable=True).indices[: count - count // 2]
    return torch.cat([heavy, torch.arange(first_recent, len(scores), device=scores.device)])
