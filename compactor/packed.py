"""Knows how reference segments run side by side after one document. Knows no prompts and no solver.

All segments are packed into one sequence; each starts at the position after the document, sees the document and,
causally, itself. Attention is computed segment by segment inside the cache layers, so no mask is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from compactor import attention
from compactor.attach import dense_heads, window_visibility
from compactor.types import LayerCache, Segment

if TYPE_CHECKING:
    from compactor.model import LoadedModel


@dataclass(frozen=True)
class Packed:
    """Segments laid one after another: rows ``bounds[s]`` of the packed sequence belong to segment s."""

    token_ids: torch.Tensor  # (1, num_rows) int64
    position_ids: torch.Tensor  # (1, num_rows) int64
    bounds: list[tuple[int, int]]
    sources: list[str]

    @property
    def num_rows(self) -> int:
        """Number of packed tokens."""
        return int(self.token_ids.shape[1])


def pack(segments: Sequence[Segment], logical_length: int) -> Packed:
    """Pack segments; each one's positions start at ``logical_length``."""
    bounds, positions, start = [], [], 0
    for segment in segments:
        stop = start + len(segment.token_ids)
        bounds.append((start, stop))
        positions.append(torch.arange(logical_length, logical_length + stop - start))
        start = stop
    tokens = torch.tensor([token for segment in segments for token in segment.token_ids])
    return Packed(
        tokens.unsqueeze(0), torch.cat(positions).unsqueeze(0), bounds, [segment.source for segment in segments]
    )


def groups(segments: Sequence[Segment], max_rows: int) -> list[list[Segment]]:
    """Split segments into runs of at most ``max_rows`` tokens (a longer segment is alone)."""
    result: list[list[Segment]] = []
    rows = 0
    for segment in segments:
        if not result or rows + len(segment.token_ids) > max_rows:
            result.append([])
            rows = 0
        result[-1].append(segment)
        rows += len(segment.token_ids)
    return result


class PackedLayer(CacheLayerMixin):
    """One layer of a packed pass; subclasses say what attention returns and what is learnt from the queries."""

    supports_early_init = False

    def __init__(self, full: LayerCache, packed: Packed, logical_length: int, advance: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.full = full
        self.packed = packed
        self.logical_length = logical_length
        self.advance = advance
        self.is_sliding = full.sliding_window is not None
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: a packed pass stores no new keys."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the packed keys and values through, tagged."""
        return attention.tag(key_states, self), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the packed length and the document's."""
        return query_length, self.logical_length

    def get_seq_length(self) -> int:
        """Return the document's logical length."""
        return self.logical_length

    def get_max_length(self) -> int:
        """Return -1: no maximum."""
        return -1

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scaling: float,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend to document and own segment."""
        out = self.attend_packed(query[0], key[0], value[0], scaling).unsqueeze(0)
        self.advance(1)
        return out

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Map (num_heads, num_rows, head_dim) queries and (num_kv_heads, num_rows, head_dim) local keys and values to
        outputs of the queries' shape."""
        raise TypeError(f"{type(self).__name__} does not define attend_packed")


class WindowLayer(PackedLayer):
    """A sliding-window layer of a packed pass: nothing is learnt, attention is exact."""

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attend to the document's last tokens and to the own segment, within the window."""
        out = torch.empty_like(queries)
        document_keys, document_values = dense_heads(self.full)
        for start, stop in self.packed.bounds:
            rows = slice(start, stop)
            positions = self.packed.position_ids[:, rows].to(queries.device)
            visible = window_visibility(self.full, positions, stop - start, None)
            out[:, rows] = torch.nn.functional.scaled_dot_product_attention(
                queries[None, :, rows],
                torch.cat([document_keys, keys[None, :, rows]], dim=2),
                torch.cat([document_values, values[None, :, rows]], dim=2),
                attn_mask=visible,
                scale=scaling,
                enable_gqa=True,
            )[0]
        return out


@torch.no_grad()
def run_packed(loaded: LoadedModel, packed: Packed, layers: Sequence[PackedLayer]) -> None:
    """Run the packed segments through the decoder; what is learnt stays in ``layers``. No logits are formed."""
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=loaded.device)  # 4-d masks are passed on untouched
    loaded.model.get_decoder()(
        input_ids=packed.token_ids.to(loaded.device),
        position_ids=packed.position_ids.to(loaded.device),
        attention_mask=no_mask,
        past_key_values=Cache(layers=list(layers)),
        use_cache=True,
    )
