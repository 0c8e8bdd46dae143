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
from compactor.packed import Packed, PackedLayer, attend_blocks
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
        """Attend block by block; see `PackedLayer.attend_packed` for shapes."""
        num_kv_heads, prefix, length = keys.shape[0], self.prefix_length, self.logical_length
        gains = self.head_gains.to(queries.device).square().view(num_kv_heads, -1, 1)
        out = torch.empty(num_kv_heads, gains.shape[1], *queries.shape[1:], device=queries.device)
        weights = {
            s: self.packed.row_weights({o: float(o == s) for o in self.scores}, queries.device) for s in self.scores
        }
        for seen in attend_blocks(self, queries, keys, values, scaling):
            rows = seen.block.rows
            out[:, :, rows] = attention.weigh_values(seen.probs, seen.values)
            squares = seen.probs[..., prefix:length].square_()
            for source, member in weights.items():
                self.scores[source] += torch.einsum("kgrt,kgr->kt", squares, gains * member[rows])
        return out.view(queries.shape)


def value_distances(full: LayerCache, prefix_length: int) -> torch.Tensor:
    """Return ||v_j - mean v||^2 over the document's keys, (num_kv_heads, num_document) float32."""
    values = dense_heads(full)[1][0, :, prefix_length:].float()
    return (values - values.mean(dim=1, keepdim=True)).square().sum(-1)
