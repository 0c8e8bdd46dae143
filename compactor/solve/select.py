"""Knows in which order keys are worth keeping, per head. Knows no counts: those are the budget's.

The contract of every selector is a prefix property: one order and one curve of gains serve every ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """Keys of each head, best first, with what each adds."""

    order: torch.Tensor  # (num_layers, num_kv_heads, num_document) int64, document-relative, best first
    gains: torch.Tensor  # same shape, float32, not increasing: squared error that the key removes, in common currency


def select_keys(squared_scores: torch.Tensor) -> Selection:
    """Order keys by share-weighted RMS attention (Attention Matching's selection, with true denominators).

    squared_scores: (num_layers, num_kv_heads, num_document) float32 in common currency. Ties keep document order.
    """
    gains, order = squared_scores.sort(dim=-1, descending=True, stable=True)
    return Selection(order, gains)
