"""Knows how the reference rows' attention becomes one Gram matrix per chunk of the document. Knows no greedy, no fit.

    G_c = A_c^T W A_c,   A_ij = exp(s q_i.k_j - lse_i) over the keys j of chunk c, all rows i, true denominators

Matrices are accumulated over blocks of rows; the attention matrix is never held. On an NVIDIA GPU the products take
float16 inputs (A is below 1) and are summed in float32: the Gram matrix of a matrix within 2^-11 of A, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compactor import attention
from compactor.attach import dense_heads
from compactor.packed import ExactRows, Packed, PackedLayer, exact_rows
from compactor.types import Advance, LayerCache

LEAST_ROOT = 1e-6  # of the largest root weight: a row that weighs nothing adds this at most


@dataclass
class ChunkGrams:
    """Sums over rows of one layer; chunks are equally long, the last one padded with keys that nobody sees."""

    gram: torch.Tensor  # (num_kv_heads, num_chunks, chunk, chunk) float32
    contrast: torch.Tensor  # (num_kv_heads,) float32: sum of w m ||o_document - o||^2
    mass: torch.Tensor  # (num_kv_heads,) float32: sum of w m

    @classmethod
    def empty(cls, num_kv_heads: int, num_document: int, chunk: int, device: torch.device) -> ChunkGrams:
        """Return zero sums; ``chunk`` is the longest chunk."""
        num_chunks = -(-num_document // chunk)
        size = -(-num_document // num_chunks)
        return cls(
            torch.zeros(num_kv_heads, num_chunks, size, size, device=device),
            torch.zeros(num_kv_heads, device=device),
            torch.zeros(num_kv_heads, device=device),
        )


class GramLayer(PackedLayer):
    """Exact attention over the full cache; adds each row's attention to the chunk Gram matrices."""

    def __init__(
        self,
        full: LayerCache,
        packed: Packed,
        logical_length: int,
        advance: Advance,
        *,
        prefix_length: int,
        head_gains: torch.Tensor,
        source_weights: dict[str, float],
        begin: Callable[[], ChunkGrams] | None,
        done: Callable[[], None] | None,
    ) -> None:
        """``begin`` gives the sums when the pass reaches the layer, ``done`` is called when its rows are added; with
        None nothing is learnt."""
        super().__init__(full, packed, logical_length, advance)
        self.begin, self.done = begin, done
        self.prefix_length = prefix_length
        self.head_gains = head_gains  # (num_heads,) float32
        self.source_weights = source_weights

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend block by block; see `PackedLayer.attend_packed` for shapes."""
        num_kv_heads = keys.shape[0]
        exact = exact_rows(self, queries, keys, values, scaling, self.prefix_length)
        if self.begin is not None:
            gains = self.head_gains.to(queries.device).view(num_kv_heads, -1, 1)
            roots = gains * self.packed.row_weights(self.source_weights, queries.device).sqrt()
            grouped = queries.reshape(num_kv_heads, -1, queries.shape[-1])  # (num_kv_heads, group * rows, head_dim)
            document = dense_heads(self.full)[0][0, :, self.prefix_length :]
            add_rows(self.begin(), grouped, document, scaling, exact, roots)
        if self.done is not None:
            self.done()
        return exact.out.view(queries.shape)


def add_rows(
    sums: ChunkGrams,
    queries: torch.Tensor,
    document_keys: torch.Tensor,
    scaling: float,
    exact: ExactRows,
    root_weights: torch.Tensor,
) -> None:
    """Add rows: queries (num_kv_heads, group * rows, head_dim), document_keys (num_kv_heads, num_document, head_dim),
    root_weights (num_kv_heads, group, rows), the square roots of the row weights."""
    weighted = root_weights.square() * (exact.document_lse - exact.lse).exp()
    sums.contrast += (weighted * (exact.document - exact.out).square().sum(-1)).sum((1, 2))
    sums.mass += weighted.sum((1, 2))
    num_kv_heads, num_chunks, size, _ = sums.gram.shape
    num_document = document_keys.shape[1]
    keys = document_keys.new_zeros(num_kv_heads, num_chunks * size, document_keys.shape[-1])
    keys[:, :num_document] = document_keys
    scale = root_weights.amax().clamp_min(1e-30)  # keeps float16 in range
    shift = ((root_weights / scale).clamp_min(LEAST_ROOT).log() - exact.lse).flatten(1)
    for head in range(num_kv_heads):
        for start, stop in attention.row_blocks(queries.shape[1], keys.shape[1], 1, queries.device):
            own, row_shift = queries[head : head + 1, start:stop], shift[head : head + 1, start:stop]
            shares = attention.exponentials(own, keys[head : head + 1], scaling, row_shift)[0]
            shares[:, num_document:] = 0.0
            columns = shares.unflatten(-1, (num_chunks, size)).transpose(0, 1)  # (num_chunks, rows, size)
            sums.gram[head] += attention.multiply(columns.mT, columns) * scale.square()


def add_diagonal(sums: ChunkGrams, share: float, scores: torch.Tensor) -> None:
    """Add to each key's diagonal entry ``share`` of itself, and ``scores`` (num_kv_heads, num_document): rows in which
    the key is alone. Such rows cannot be explained by other keys, so the greedy search trusts linear combinations of
    the reference rows less, and single scores more.
    """
    num_kv_heads, num_chunks, size, _ = sums.gram.shape
    diagonal = sums.gram.diagonal(dim1=2, dim2=3)
    diagonal.mul_(1.0 + share)
    padded = diagonal.new_zeros(num_kv_heads, num_chunks * size)
    padded[:, : scores.shape[-1]] = scores
    diagonal.add_(padded.view(num_kv_heads, num_chunks, size))
