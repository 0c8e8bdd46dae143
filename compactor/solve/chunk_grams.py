"""Knows how the reference rows' attention becomes one Gram matrix per chunk of the document. Knows no greedy, no fit.

    G_c = A_c^T W A_c,   A_ij = exp(s q_i.k_j - lse_i) over the keys j of chunk c, all rows i, true denominators

Matrices are accumulated over blocks of rows; the attention matrix is never held. On a GPU the products take float16
inputs (A is below 1) and are summed in float32: the Gram matrix of a matrix within 2^-11 of A, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compactor import attention
from compactor.packed import Packed, PackedLayer, attend_blocks
from compactor.types import Advance, LayerCache


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
        sums = None if self.begin is None else self.begin()
        num_kv_heads, prefix, length = keys.shape[0], self.prefix_length, self.logical_length
        gains = self.head_gains.to(queries.device).view(num_kv_heads, -1, 1)
        roots = gains * self.packed.row_weights(self.source_weights, queries.device).sqrt()
        out = torch.empty(*roots.shape, queries.shape[-1], device=queries.device)
        for seen in attend_blocks(self, queries, keys, values, scaling):
            rows = seen.block.rows
            document = seen.probs[..., prefix:length]
            part = attention.weigh_values(document, seen.values[:, prefix:length])
            rest = attention.weigh_values(seen.probs[..., :prefix], seen.values[:, :prefix])
            rest += attention.weigh_values(seen.probs[..., length:], seen.values[:, length:])
            out[:, :, rows] = part + rest
            if sums is not None:
                add_rows(sums, document, part, out[:, :, rows], roots[:, :, rows])
        if self.done is not None:
            self.done()
        return out.view(queries.shape)


def add_rows(
    sums: ChunkGrams, probs: torch.Tensor, part: torch.Tensor, whole: torch.Tensor, root_weights: torch.Tensor
) -> None:
    """Add rows: probs (num_kv_heads, group, rows, num_document), their output and the whole output."""
    mass = probs.sum(-1)
    weighted = root_weights.square() * mass
    contrast = (part / mass.clamp_min(1e-12).unsqueeze(-1) - whole).square().sum(-1)
    sums.contrast += (weighted * contrast).sum((1, 2))
    sums.mass += weighted.sum((1, 2))
    num_kv_heads, num_chunks, size, _ = sums.gram.shape
    exact = probs.device.type != "cuda"
    rows = probs.new_zeros(
        num_kv_heads,
        probs.shape[1] * probs.shape[2],
        num_chunks * size,
        dtype=torch.float32 if exact else torch.float16,
    )
    scale = 1.0 if exact else float(root_weights.max().clamp_min(1e-30))  # keeps float16 in range
    rows[..., : probs.shape[-1]] = (probs * (root_weights / scale).unsqueeze(-1)).flatten(1, 2)
    for head in range(num_kv_heads):
        columns = rows[head].unflatten(-1, (num_chunks, size)).transpose(0, 1)  # (num_chunks, rows, size)
        if exact:
            sums.gram[head].baddbmm_(columns.mT, columns)
        else:
            product = torch.bmm(columns.mT, columns, out_dtype=torch.float32)
            sums.gram[head].add_(product, alpha=scale * scale)


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
