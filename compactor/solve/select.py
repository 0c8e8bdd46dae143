"""Knows in which order keys are worth keeping, per head. Knows no counts: those are the budget's.

The contract of every selector is a prefix property: one order and one curve of gains serve every ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compactor.attach import dense_heads
from compactor.solve.chunk_grams import ChunkGrams
from compactor.solve.greedy import forward_ols, pool_violators
from compactor.types import LayerCache

CONTRAST_FLOOR = 1e-2  # of the values' own spread: the least weight of the mass among the targets


@dataclass(frozen=True)
class Selection:
    """Keys of each head, best first, with what each adds."""

    order: torch.Tensor | None  # (num_layers, num_kv_heads, num_document) int64, document-relative, best first; None
    # where the fit orders the keys of each layer by its own rows, and ``gains`` only says how many each layer keeps
    gains: torch.Tensor  # same shape, float32, not increasing: squared error that the key removes, in common currency

    def by_position(self) -> torch.Tensor | None:
        """Return the gains in the order of the document, where the keys have an order."""
        return None if self.order is None else torch.empty_like(self.gains).scatter_(-1, self.order, self.gains)


def select_keys(squared_scores: torch.Tensor) -> Selection:
    """Order keys by share-weighted RMS attention (Attention Matching's selection, with true denominators).

    squared_scores: (num_layers, num_kv_heads, num_document) float32 in common currency. Ties keep document order.
    """
    gains, order = squared_scores.sort(dim=-1, descending=True, stable=True)
    return Selection(order, gains)


@dataclass(frozen=True)
class LayerCurves:
    """Greedy orders of one layer, all chunks of a head merged by gain."""

    order: torch.Tensor  # (num_kv_heads, num_document) int64
    gains: torch.Tensor  # (num_kv_heads, num_document) float32, not increasing


def greedy_curves(
    sums: Sequence[ChunkGrams], layers: Sequence[LayerCache], prefix_length: int, num_picks: int, stop: float
) -> list[LayerCurves]:
    """Order the keys of some layers by forward orthogonal least squares per chunk, then merge the chunks of each head.

    The targets of a chunk are its attention mass times lambda, and its output with the values centred: Y_i = sum_j A_ij
    (v_j - mu), mu the mean output of the head. Since both are combinations of the columns themselves, the Gram matrix
    says all: targets T = [lambda 1, v - mu]. lambda is the root-mean-square distance between the document's output and
    the whole output: what a wrong mass costs. Gains are made not increasing within a chunk and ranked over chunks. All
    chunks of all heads and layers are one batch. Beyond ``num_picks`` keys of a chunk, the rest follow by what each
    would add alone.
    """
    targets = torch.cat([chunk_targets(one, layer, prefix_length) for one, layer in zip(sums, layers, strict=True)])
    grams = torch.cat([one.gram.flatten(0, 1) for one in sums])
    picks = forward_ols(grams, targets, num_picks, stop)
    pooled = pool_violators(picks.gains[:, :num_picks])
    pooled = torch.cat([pooled, picks.gains[:, num_picks:].minimum(pooled[:, -1:])], dim=1)
    num_kv_heads, num_chunks, size, _ = sums[0].gram.shape
    num_document = layers[0].head_lengths[0] - prefix_length
    first = torch.arange(num_chunks, device=pooled.device).view(1, -1, 1) * size
    curves = []
    for layer in range(len(sums)):
        rows = slice(layer * num_kv_heads * num_chunks, (layer + 1) * num_kv_heads * num_chunks)
        order = (picks.order[rows].view(num_kv_heads, num_chunks, size) + first).flatten(1)
        gains = pooled[rows].view(num_kv_heads, -1)
        ranked = torch.where(order < num_document, gains, -1.0).sort(dim=-1, descending=True, stable=True)
        best = ranked.indices[:, :num_document]  # padding comes last
        curves.append(LayerCurves(order.gather(1, best), ranked.values[:, :num_document].clamp_min(0.0)))
    return curves


def chunk_targets(sums: ChunkGrams, layer: LayerCache, prefix_length: int) -> torch.Tensor:
    """Return T = [lambda 1, v - mu] of every chunk, (num_kv_heads * num_chunks, chunk, 1 + head_dim) float32."""
    num_kv_heads, num_chunks, size, _ = sums.gram.shape
    values = dense_heads(layer)[1][0, :, prefix_length:].float()
    num_document, head_dim = values.shape[1:]
    padded = values.new_zeros(num_kv_heads, num_chunks * size, head_dim)
    padded[:, :num_document] = values
    by_chunk = padded.view(num_kv_heads, num_chunks, size, head_dim)
    columns = sums.gram.sum(-1)  # G 1: weight of each key in the mean output
    mean = (columns.unsqueeze(-1) * by_chunk).sum((1, 2)) / columns.sum((1, 2)).clamp_min(1e-30).unsqueeze(-1)
    spread = (values - mean.unsqueeze(1)).square().sum(-1).mean(-1)
    contrast = (sums.contrast / sums.mass.clamp_min(1e-30)).maximum(CONTRAST_FLOOR * spread).sqrt()
    ones = contrast.view(-1, 1, 1, 1).expand(-1, num_chunks, size, 1)
    return torch.cat([ones, by_chunk - mean.view(num_kv_heads, 1, 1, head_dim)], dim=-1).flatten(0, 1)
