"""Knows how queries score keys: share-weighted root-mean-square attention. Knows no budget and no fit.

    score_j^2 = ||v_j - mean v||^2 sum over rows i of w_i A_ij^2,   A_ij = exp(s q_i.k_j - lse_i)

The sum is Attention Matching's RMS selection (arXiv 2602.16284); the distance of the key's value from its head's mean
says what the attention delivers, so that heads whose values hardly differ do not take budget from the others.
lse_i runs over prefix, document and the row's own segment (the true denominator): a row that looks elsewhere has a
small share of the document and counts for little.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compactor import attention
from compactor.attach import dense_heads
from compactor.packed import Packed, PackedLayer
from compactor.types import LayerCache


class ScoreLayer(PackedLayer):
    """Exact attention over the full cache; adds each row's squared attention to the scores of its source."""

    def __init__(
        self,
        full: LayerCache,
        packed: Packed,
        logical_length: int,
        advance: Callable[[int], None],
        *,
        prefix_length: int,
        head_gains: torch.Tensor,
        scores: dict[str, torch.Tensor],
    ) -> None:
        super().__init__(full, packed, logical_length, advance)
        self.prefix_length = prefix_length
        self.head_gains = head_gains  # (num_heads,) float32
        self.scores = scores  # source -> (num_kv_heads, num_document) float32, added to in place

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend segment by segment; see `PackedLayer.attend_packed` for shapes."""
        num_heads, num_rows, head_dim = queries.shape
        num_kv_heads = keys.shape[0]
        grouped = queries.view(num_kv_heads, -1, num_rows, head_dim).float()
        document_keys, document_values = (part[0].float() for part in dense_heads(self.full))
        weights = self.head_gains.to(queries.device).square().view(num_kv_heads, -1, 1)
        out = torch.empty_like(grouped)
        for (first, last), source in zip(self.packed.bounds, self.packed.sources, strict=True):
            all_keys = torch.cat([document_keys, keys[:, first:last].float()], dim=1)
            all_values = torch.cat([document_values, values[:, first:last].float()], dim=1)
            kv_len = all_keys.shape[1]
            for start, stop in attention.row_blocks(last - first, kv_len, num_heads, queries.device):
                seen = kv_len - (last - first) + stop
                rows = slice(first + start, first + stop)
                probs = attention.causal_scores(grouped[:, :, rows], all_keys[:, :seen], scaling).softmax(-1)
                out[:, :, rows] = attention.weigh_values(probs, all_values[:, :seen])
                squares = probs[..., self.prefix_length : self.logical_length].square_().sum(2)
                self.scores[source] += (squares * weights).sum(1)
        return out.view(queries.shape)


def value_distances(full: LayerCache, prefix_length: int) -> torch.Tensor:
    """Return ||v_j - mean v||^2 over the document's keys, (num_kv_heads, num_document) float32."""
    values = dense_heads(full)[1][0, :, prefix_length:].float()
    return (values - values.mean(dim=1, keepdim=True)).square().sum(-1)
