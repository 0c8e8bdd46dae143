"""Knows StreamingLLM's cache (arXiv 2309.17453): the first tokens and the last ones. Knows no queries.

Kept keys stay at the positions that they have in the document; the paper moves them together, which only matters beyond
the model's window.
"""

from __future__ import annotations

import torch

from compactor.methods import Compacted
from compactor.methods.keeping import keep_uniformly
from compactor.study import Study

SUMMARY = "attention sinks and the last tokens of the document (StreamingLLM)"
SINKS = 4  # first document tokens; the template before the document is kept anyway


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep the first `SINKS` document tokens and the last ones, equally many keys in every head."""
    num_document = len(study.job.document_ids)
    return keep_uniformly(study, num_kept, lambda _layer, _head, count: sinks_and_window(num_document, count))


def sinks_and_window(num_document: int, count: int) -> torch.Tensor:
    """Return the indices of ``count`` tokens: at most `SINKS` first ones, the others from the end."""
    sinks = min(SINKS, count)
    return torch.cat([torch.arange(sinks), torch.arange(num_document - (count - sinks), num_document)])
