"""Knows SnapKV's choice (arXiv 2404.14469): what the document's last tokens look at, pooled. Knows no passes.

    score_j = max over j' within 3 of j of the mean over window rows i and the group's query heads of A_ij'

The window is the end of the document, since no question is known when the document is compacted.
"""

from __future__ import annotations

import torch

from compactor.methods import Compacted
from compactor.methods.document_attention import WINDOW, document_attention
from compactor.methods.keeping import keep_uniformly
from compactor.study import Study

SUMMARY = "keys that the document's last tokens look at, pooled over neighbours, and these tokens (SnapKV)"
KERNEL = 7  # keys that the pooling joins: a chosen key brings its neighbours along


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep the observation window and the keys that it looks at, equally many keys in every head."""
    received = document_attention(study)
    return keep_uniformly(
        study, num_kept, lambda layer, head, count: window_and_past(received[layer].window_rows[head], count)
    )


def window_and_past(received: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` indices: the last `WINDOW` tokens (fewer if there is no room), then the best before the window.

    received: (T,) attention from the window, summed; a sum ranks as the mean does.
    """
    num_document, window = len(received), min(WINDOW, count)
    first = num_document - min(WINDOW, num_document)
    past = received[:first]
    if count > window and first:
        pooled = torch.nn.functional.max_pool1d(past.view(1, 1, -1), KERNEL, stride=1, padding=KERNEL // 2).view(-1)
        best = pooled.sort(descending=True, stable=True).indices[: count - window]
    else:
        best = torch.empty(0, dtype=torch.int64, device=received.device)
    return torch.cat([best, torch.arange(num_document - min(window, num_document), num_document, device=best.device)])
