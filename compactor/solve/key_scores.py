"""Knows what each document key alone is worth to the reference rows. Knows no combination of keys.

    score_j = (lambda^2 + ||v_j - mu||^2) sum over rows i of w_i A_ij^2,   A_ij = exp(s q_i.k_j - lse_i)

The sum is Attention Matching's RMS selection (arXiv 2602.16284) with true denominators. The factor says what attention
to the key delivers: mu is the head's mean output of the document, and lambda the root-mean-square distance between the
document's output and the whole output, which is what a wrong mass costs. It is the gain of a key as the first pick of
orthogonal least squares (greedy.py) if it overlaps with no other. One stream over the scores; nothing of the size
rows x keys is held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compactor import attention
from compactor.attach import dense_heads
from compactor.packed import ExactParts, ExactRows, Packed, PackedLayer, exact_parts, exact_rows
from compactor.prefill import has_stats_kernel, squared_attention
from compactor.solve.chunk_grams import LEAST_ROOT
from compactor.solve.select import CONTRAST_FLOOR
from compactor.types import Advance, LayerCache


@dataclass
class KeySums:
    """Sums over the rows of one layer, float32."""

    squares: torch.Tensor  # (num_kv_heads, num_document): sum of w A_ij^2
    centre: torch.Tensor  # (num_kv_heads, head_dim): sum of w m^2 o_document, m the mass on the document
    centre_weight: torch.Tensor  # (num_kv_heads,): sum of w m^2
    contrast: torch.Tensor  # (num_kv_heads,): sum of w m ||o_document - o||^2
    mass: torch.Tensor  # (num_kv_heads,): sum of w m

    @classmethod
    def empty(cls, num_kv_heads: int, num_document: int, head_dim: int, device: torch.device) -> KeySums:
        """Return zero sums."""
        heads = (torch.zeros(num_kv_heads, device=device) for _ in range(3))
        squares = torch.zeros(num_kv_heads, num_document, device=device)
        return cls(squares, torch.zeros(num_kv_heads, head_dim, device=device), *heads)

    def add(
        self,
        queries: torch.Tensor,
        document_keys: torch.Tensor,
        scaling: float,
        exact: ExactRows,
        root_weights: torch.Tensor,
    ) -> None:
        """Add rows: queries (num_kv_heads, group * rows, head_dim), document_keys (num_kv_heads, num_document,
        head_dim), root_weights (num_kv_heads, group, rows), the square roots of the row weights."""
        mass = (exact.document_lse - exact.lse).exp()
        weighted = root_weights.square() * mass
        self.contrast += (weighted * (exact.document - exact.out).square().sum(-1)).sum((1, 2))
        self.mass += weighted.sum((1, 2))
        by_mass = weighted * mass
        self.centre += (by_mass.unsqueeze(-1) * exact.document).sum((1, 2))
        self.centre_weight += by_mass.sum((1, 2))
        self._add_squares(queries, document_keys, scaling, exact.lse, root_weights)

    def add_parts(
        self,
        queries: torch.Tensor,
        document_keys: torch.Tensor,
        scaling: float,
        parts: ExactParts,
        root_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Merge the parts of the same rows, add them, and return the whole outputs, (num_kv_heads, group, rows,
        head_dim) in the type of the queries, where `attention.merges_in_one_pass`."""
        from compactor_kernels.merge_rows import merge_scored

        merged = merge_scored(parts.near, parts.document, root_weights)
        for name in ("contrast", "mass", "centre", "centre_weight"):
            getattr(self, name).add_(getattr(merged, name))
        self._add_squares(queries, document_keys, scaling, merged.lse, root_weights)
        return merged.out

    def _add_squares(
        self,
        queries: torch.Tensor,
        document_keys: torch.Tensor,
        scaling: float,
        lse: torch.Tensor,
        root_weights: torch.Tensor,
    ) -> None:
        scale = root_weights.amax().clamp_min(1e-30)  # keeps float16 in range
        shift = ((root_weights / scale).clamp_min(LEAST_ROOT).log() - lse).flatten(1)
        if has_stats_kernel(queries):
            self.squares += squared_attention(queries, document_keys, scaling, shift) * scale.square()
            return
        for head in range(len(self.squares)):
            own = slice(head, head + 1)
            for start, stop in attention.row_blocks(queries.shape[1], document_keys.shape[1], 1, queries.device):
                shares = attention.exponentials(
                    queries[own, start:stop], document_keys[own], scaling, shift[own, start:stop]
                )
                norms = torch.linalg.vector_norm(shares[0], dim=0, dtype=torch.float32)
                self.squares[head] += norms.square() * scale.square()

    def scores(self, layer: LayerCache, prefix_length: int, more_squares: torch.Tensor | None = None) -> torch.Tensor:
        """Return score_j of every key, (num_kv_heads, num_document) float32; ``more_squares`` are further sums of
        w A_ij^2 of that shape."""
        values = dense_heads(layer)[1][0, :, prefix_length:].float()
        centre = self.centre / self.centre_weight.clamp_min(1e-30).unsqueeze(-1)
        distances = (values - centre.unsqueeze(1)).square().sum(-1)
        spread = (values - values.mean(1, keepdim=True)).square().sum(-1).mean(-1)
        contrast = (self.contrast / self.mass.clamp_min(1e-30)).maximum(CONTRAST_FLOOR * spread)
        squares = self.squares if more_squares is None else self.squares + more_squares
        return squares * (distances + contrast.unsqueeze(-1))


class ScoreLayer(PackedLayer):
    """Exact attention over the full cache; adds each row's attention to the sums of its layer."""

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
        sums: Callable[[int, torch.device], KeySums],
    ) -> None:
        """``sums`` gives the layer's sums for a head dimension and a device; head_gains: (num_heads,) float32."""
        super().__init__(full, packed, logical_length, advance)
        self.prefix_length, self.head_gains, self.source_weights = prefix_length, head_gains, source_weights
        self.sums = sums

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend block by block; see `PackedLayer.attend_packed` for shapes."""
        num_kv_heads, head_dim = keys.shape[0], queries.shape[-1]
        gains = self.head_gains.to(queries.device).view(num_kv_heads, -1, 1)
        roots = gains * self.packed.row_weights(self.source_weights, queries.device).sqrt()
        grouped = queries.reshape(num_kv_heads, -1, head_dim)
        document = dense_heads(self.full)[0][0, :, self.prefix_length :]
        sums, given = self.sums(head_dim, queries.device), (self, queries, keys, values, scaling, self.prefix_length)
        if attention.merges_in_one_pass(queries):
            parts = exact_parts(*given, out_type=queries.dtype)
            return sums.add_parts(grouped, document, scaling, parts, roots).view(queries.shape)
        exact = exact_rows(*given)
        sums.add(grouped, document, scaling, exact, roots)
        return exact.out.view(queries.shape)
