"""Knows KVzip (arXiv 2505.23416): a key is worth the most attention that it gets while the model repeats the document.
Knows no fit.

    score_j = max over rows i of the piece's repetition and the group's query heads of A_ij

where A is the softmax over prefix, the keys of the piece that is being repeated, and the segment's own tokens. The
best keys over all layers and heads are kept ("pair" level: heads get as many as their scores earn, without a floor).
The repeat pass is cut in pieces of `PIECE` tokens, as published; nothing is biased or refitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compactor import attention
from compactor.attach import dense_heads
from compactor.methods import Compacted
from compactor.methods.keeping import keep_chosen
from compactor.packed import Packed, PackedLayer, groups
from compactor.prompt import chunk_borders
from compactor.reference_queries import REPEAT_FIRST, REPEAT_LATER, REPEAT_OVERLAP, repeat_segments
from compactor.study import Study
from compactor.types import Advance, LayerCache, Segment

SUMMARY = "keys by the most attention they get while the document is repeated, one ranking over all heads (KVzip)"
PIECE = 2000  # document tokens of one piece of the repetition
PASS_ROWS = 8192  # packed rows of one pass; bounds its memory at any document length


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep the ``num_kept`` best keys over all layers and heads, unchanged."""
    scores = study.once("kvzip scores", lambda: repeat_scores(study))
    layers, num_kv_heads, num_document = scores.shape
    best = scores.flatten().sort(descending=True, stable=True).indices[:num_kept]
    kept = torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, best, True)
    kept = kept.view(layers, num_kv_heads, num_document)
    rows = {i: row for row, i in enumerate(study.full.full_layers)}
    return keep_chosen(study, lambda i, head: kept[rows[i], head].nonzero().squeeze(-1))


def repeat_scores(study: Study) -> torch.Tensor:
    """Return the scores of all document keys, (compacted layers, num_kv_heads, num_document) float32 on the host."""
    job, full = study.job, study.full
    shape = (job.loaded.num_kv_heads, len(job.document_ids))
    scores = {i: torch.zeros(shape, device=full.layers[i].keys.device) for i in full.full_layers}
    segments = repeat_segments(job.prompt, job.document_ids, chunk_borders(shape[1], PIECE), job.room)
    pieces = iter(pieces_of(study, segments))
    with job.timed("repeat"):
        for batch in groups(segments, PASS_ROWS):
            own_pieces = [next(pieces) for _ in batch]

            def make(
                i: int, layer: LayerCache, packed: Packed, advance: Advance, own: list[tuple[int, int]] = own_pieces
            ) -> RepeatLayer:
                return RepeatLayer(layer, packed, full.logical_length, advance, full.prefix_length, own, scores[i])

            study.run_layers(batch, "repeat", make)
    return torch.stack([scores[i].cpu() for i in full.full_layers])


def pieces_of(study: Study, segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Return which document tokens each segment of the repeat pass forces: all that follows its question."""
    prompt = study.job.prompt
    first, later = len(prompt.question_ids(REPEAT_FIRST)), len(prompt.question_ids(REPEAT_LATER))
    pieces, start = [], 0
    for segment in segments:
        question = later + min(REPEAT_OVERLAP, start) if start else first
        stop = start + len(segment.token_ids) - question
        pieces.append((start, stop))
        start = stop
    return pieces


class RepeatLayer(PackedLayer):
    """Exact attention over the full cache; raises the score of each piece's keys to the most attention they get."""

    def __init__(
        self,
        full: LayerCache,
        packed: Packed,
        logical_length: int,
        advance: Advance,
        prefix_length: int,
        pieces: list[tuple[int, int]],
        scores: torch.Tensor,
    ) -> None:
        super().__init__(full, packed, logical_length, advance)
        self.prefix_length = prefix_length
        self.pieces = pieces  # of the packed segments
        self.scores = scores  # (num_kv_heads, num_document) float32, raised in place

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend segment by segment; see `PackedLayer.attend_packed` for shapes."""
        num_heads, num_rows, head_dim = queries.shape
        num_kv_heads = keys.shape[0]
        grouped = queries.view(num_kv_heads, -1, num_rows, head_dim).float()
        document_keys, document_values = (part[0].float() for part in dense_heads(self.full))
        out = torch.empty_like(grouped)
        for (first, last), piece in zip(self.packed.bounds, self.pieces, strict=True):
            all_keys = torch.cat([document_keys, keys[:, first:last].float()], dim=1)
            all_values = torch.cat([document_values, values[:, first:last].float()], dim=1)
            kv_len = all_keys.shape[1]
            for start, stop in attention.row_blocks(last - first, kv_len, num_heads, queries.device):
                seen = kv_len - (last - first) + stop
                rows = slice(first + start, first + stop)
                scores = attention.causal_scores(grouped[:, :, rows], all_keys[:, :seen], scaling)
                self._raise(scores, piece)
                out[:, :, rows] = attention.weigh_values(scores.softmax(-1), all_values[:, :seen])
        return out.view(queries.shape)

    def _raise(self, scores: torch.Tensor, piece: tuple[int, int]) -> None:
        """Take scaled scores (num_kv_heads, group, rows, keys) of rows that repeat ``piece`` into account."""
        start, stop = (border + self.prefix_length for border in piece)
        own = scores[..., start:stop]
        seen = torch.cat([scores[..., : self.prefix_length], own, scores[..., self.logical_length :]], dim=-1)
        most = (own - seen.logsumexp(-1, keepdim=True)).amax((1, 2)).exp()
        kept = self.scores[:, piece[0] : piece[1]]
        torch.maximum(kept, most, out=kept)
