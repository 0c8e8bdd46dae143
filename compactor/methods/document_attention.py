"""Knows how the document attends to itself, causally, row by row: what H2O and SnapKV score by. Knows no choice.

The document is read once more with explicit attention, and only when a method asks: the ordinary prefill stays as fast
as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compactor.prefill import prefill
from compactor.study import Study

WINDOW = 64  # last document tokens, the observation window of SnapKV


@dataclass
class DocumentAttention:
    """Attention that the document's keys of one layer receive, summed over query rows and the heads of a group."""

    prefix_length: int
    num_document: int
    all_rows: torch.Tensor  # (num_kv_heads, num_document) float32: from every document row
    window_rows: torch.Tensor  # the same, from the last `WINDOW` rows only

    def __call__(self, first: int, probs: torch.Tensor) -> None:
        """Add a block of attention whose first row is at position ``first``; see `prefill.GrowingLayer.attend`."""
        received = probs[..., self.prefix_length :]
        width = received.shape[-1]
        if width:  # rows of the prefix see no document key
            self.all_rows[:, :width] += received.sum((1, 2))
            start = max(0, self.prefix_length + self.num_document - WINDOW - first)
            self.window_rows[:, :width] += received[:, :, start:].sum((1, 2))


def document_attention(study: Study) -> dict[int, DocumentAttention]:
    """Return what each compacted layer's keys receive; the document is read again the first time."""
    return study.once("document attention", lambda: observe(study))


def observe(study: Study) -> dict[int, DocumentAttention]:
    """Read the document with explicit attention and sum it up."""
    job, full = study.job, study.full
    shape = (job.loaded.num_kv_heads, len(job.document_ids))
    sums = {
        i: DocumentAttention(
            full.prefix_length,
            shape[1],
            torch.zeros(shape, device=full.layers[i].keys.device),
            torch.zeros(shape, device=full.layers[i].keys.device),
        )
        for i in full.full_layers
    }
    with job.timed("observe"):
        prefill(
            job.loaded,
            list(job.prompt.prefix_ids),
            job.document_ids,
            prefill_chunk=job.settings.prefill_chunk,
            head_gains=None,
            reporter=job.reporter,
            observers=sums,
        )
    return sums
