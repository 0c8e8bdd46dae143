"""Knows how the document's own queries score its keys: share-weighted root-mean-square attention and value distance.

    score_j^2 = ||v_j - mean v||^2 sum over rows i of w_i A_ij^2,   A_ij = exp(s q_i.k_j - lse_i)

The sum is Attention Matching's RMS selection (arXiv 2602.16284); the distance of the key's value from its head's mean
says what the attention delivers, so that heads whose values hardly differ do not take budget from the others.
"""

from __future__ import annotations

import torch

from compactor.attach import dense_heads
from compactor.types import LayerCache


def value_distances(full: LayerCache, prefix_length: int) -> torch.Tensor:
    """Return ||v_j - mean v||^2 over the document's keys, (num_kv_heads, num_document) float32."""
    values = dense_heads(full)[1][0, :, prefix_length:].float()
    return (values - values.mean(dim=1, keepdim=True)).square().sum(-1)
