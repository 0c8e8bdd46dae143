"""Knows how a compacted cache becomes a transformers Cache. Knows no fitting and no file format.

A `DocumentLayer` holds the frozen kept keys of one layer (ragged, shared by all sequences of a batch) and a dense tail
of new tokens. It reports the logical length, so that rope positions continue after the document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from compactor import attention
from compactor.output import AnyPath
from compactor.types import CacheMetadata, LayerCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compactor.cache_file import FileSizes


class AttendingCacheLayer(CacheLayerMixin):
    """What all layers share that attend by themselves: transformers asks them for lengths only."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the first update brings the shapes."""

    def get_seq_length(self) -> int:
        """Return how many tokens there are, those of the document included."""
        return sum(self.get_mask_sizes(0))

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1


class DocumentLayer(AttendingCacheLayer):
    """Frozen kept keys of one layer and the dense tail of the tokens that came after the document."""

    is_croppable = True

    def __init__(self, layer: LayerCache, logical_length: int, previous: DocumentLayer | None = None) -> None:
        super().__init__()
        self.document = layer
        self.logical_length = logical_length
        self.max_head_length = max(layer.head_lengths)
        self.is_sliding = layer.sliding_window is not None
        self.previous = previous
        self.pending = False
        self.reset()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values (batch, num_kv_heads, q_len, head_dim) to the tail; return the tagged tail."""
        attention.require_consumed(self.pending, "same layer, previous call")
        if self.previous is not None:
            attention.require_consumed(self.previous.pending, "previous layer")
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        self.pending = True
        return attention.tag(self.keys, self), self.values

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
        """Attend to the document and to the tail; see `attention.attention_forward` for the shapes."""
        self.pending = False
        if self.document.sliding_window is not None:
            return self._attend_window(query, key, value, mask, scaling, position_ids)
        kept = self.document
        out, lse = attention.document_attention(
            query,
            kept.keys,
            kept.values,
            kept.biases,
            kept.offsets,
            scaling=scaling,
            max_head_length=self.max_head_length,
        )
        tail_out, tail_lse = attention.tail_attention(query, key, value, mask=mask, scaling=scaling)
        return attention.merge(out, lse, tail_out, tail_lse)[0]

    def _attend_window(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, _, q_len, _ = query.shape
        tail_len = key.shape[2]
        if position_ids is None:
            first = self.logical_length + tail_len - q_len
            position_ids = torch.arange(first, first + q_len, device=query.device).unsqueeze(0)
        visible = window_visibility(self.document, position_ids, tail_len, mask).expand(batch, 1, q_len, -1)
        keys, values = dense_heads(self.document)
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            torch.cat([keys.expand(batch, -1, -1, -1).to(key.dtype), key], dim=2),
            torch.cat([values.expand(batch, -1, -1, -1).to(value.dtype), value], dim=2),
            attn_mask=visible,
            scale=scaling,
            enable_gqa=True,
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the tail after the next update, and the position at which it begins."""
        return self.tail_length + query_length, self.logical_length

    @property
    def tail_length(self) -> int:
        """Number of tokens after the document."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def reset(self) -> None:
        """Forget the tail."""
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of the tail (a negative count, as transformers passes it)."""
        remaining = self.tail_length - abs(tokens_to_remove)
        if remaining < 0:
            raise ValueError(
                f"Cannot remove {abs(tokens_to_remove)} tokens: only {self.tail_length} follow the document."
            )
        if remaining == 0:
            self.reset()
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :remaining, :], self.values[..., :remaining, :]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences of the tail; the document is shared by all."""
        self._map_tail(lambda tail: tail.index_select(0, beam_idx.to(tail.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the tail ``repeats`` times."""
        self._map_tail(lambda tail: tail.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences ``indices`` of the tail."""
        self._map_tail(lambda tail: tail[indices, ...])

    def _map_tail(self, change: Any) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)


def dense_heads(layer: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """View a layer whose heads keep equally many keys as (1, num_kv_heads, num_kept, head_dim)."""
    shape = (1, layer.num_kv_heads, -1, layer.keys.shape[-1])
    return layer.keys.view(shape), layer.values.view(shape)


def window_visibility(
    layer: LayerCache, position_ids: torch.Tensor, tail_len: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return bool (batch, 1, q_len, num_kept + tail_len): what a sliding layer's queries see of document and tail.

    A key at position p is visible to a query at position t when t - p < sliding_window. ``mask`` is what transformers
    made for the tail (bool, window included), or None.
    """
    window = layer.sliding_window or 0
    kept = layer.positions[: layer.head_lengths[0]]
    document = (position_ids.unsqueeze(-1) - kept) < window  # (batch, q_len, num_kept)
    batch, q_len = position_ids.shape
    if mask is None:
        rows = torch.arange(tail_len - q_len, tail_len, device=position_ids.device).unsqueeze(-1)
        columns = torch.arange(tail_len, device=position_ids.device)
        tail = ((columns <= rows) & (rows - columns < window)).expand(batch, q_len, tail_len)
    else:
        visible = mask if mask.dtype == torch.bool else mask > -1.0
        tail = visible[:, 0, :, -tail_len:]
        document = document.expand(tail.shape[0], -1, -1)
    return torch.cat([document, tail], dim=-1).unsqueeze(1)


class AttachedCache(Cache):
    """A transformers Cache over a compacted document: give it to ``model.generate`` with an attention mask that covers
    ``cache.logical_length`` document tokens plus the new ones."""

    def __init__(self, layers: list[LayerCache], logical_length: int) -> None:
        document_layers: list[DocumentLayer] = []
        for layer in layers:
            document_layers.append(
                DocumentLayer(layer, logical_length, document_layers[-1] if document_layers else None)
            )
        super().__init__(layers=list(document_layers))
        self.document_layers = document_layers
        self.logical_length = logical_length

    def forget_tail(self) -> None:
        """Drop every token after the document, so that the next question starts afresh."""
        for layer in self.document_layers:
            layer.pending = False
            layer.reset()

    def attention_mask(self, new_mask: torch.Tensor) -> torch.Tensor:
        """Put ones for the document before ``new_mask`` (batch, new_tokens), as ``generate`` wants it."""
        ones = new_mask.new_ones(new_mask.shape[0], self.logical_length)
        return torch.cat([ones, new_mask], dim=-1)


def attach_layers(model: PreTrainedModel, layers: list[LayerCache], logical_length: int) -> AttachedCache:
    """Bind ``model`` to compactor's attention; return a cache over ``layers``, moved to each decoder layer's device."""
    attention.register(model)
    placed = [
        move_layer(layer, next(block.parameters()).device, model.dtype)
        for layer, block in zip(layers, model.get_decoder().layers, strict=True)
    ]
    return AttachedCache(placed, logical_length)


def move_layer(layer: LayerCache, device: torch.device, dtype: torch.dtype) -> LayerCache:
    """Return the layer on ``device`` with keys and values in ``dtype``; without a copy where nothing changes."""
    return replace(
        layer,
        keys=layer.keys.to(device, dtype),
        values=layer.values.to(device, dtype),
        biases=layer.biases.to(device),
        positions=layer.positions.to(device),
        offsets=layer.offsets.to(device),
    )


@dataclass(frozen=True)
class CompactedCache:
    """A compacted document: the kept keys of every layer, and what the file says of itself."""

    layers: list[LayerCache]
    metadata: CacheMetadata
    save_sidecar: Callable[[AnyPath, bool], None] | None = None  # called after saving, with path and force

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: keys, values, biases, positions and offsets."""
        return sum(layer.nbytes for layer in self.layers)

    def attach(self, model: PreTrainedModel, *, check: bool = True) -> AttachedCache:
        """Return a transformers Cache for ``model.generate``; the model is bound to compactor's attention.

        Raises MismatchError when the model is not the one that made the cache (``check=False`` skips the comparison of
        the weights, for a caller that has made it).
        """
        if check:
            from compactor.model import check_identity, identify

            check_identity(self.metadata.model, identify(model, None, name=self.metadata.model.name))
        return attach_layers(model, self.layers, self.metadata.logical_length)

    def save(self, path: AnyPath, *, force: bool = False) -> FileSizes:
        """Write the cache atomically, and its sidecar where there is one. Raises OutputError; an existing file is
        refused without ``force``."""
        from compactor.cache_file import save_cache

        sizes = save_cache(path, self.layers, without_timings(self.metadata), force=force)
        if self.save_sidecar is not None:
            self.save_sidecar(path, force)
        return sizes


def without_timings(metadata: CacheMetadata) -> CacheMetadata:
    """Leave the seconds of the run out of the report: equal runs give equal files."""
    report = {name: value for name, value in metadata.report.items() if name != "seconds"}
    if isinstance(report.get("fidelity"), dict):
        report["fidelity"] = {name: value for name, value in report["fidelity"].items() if name != "seconds"}
    return replace(metadata, report=report)


def load(path: str | Path) -> CompactedCache:
    """Read a compacted cache, every checksum verified. Raises CacheFileError on a damaged or foreign file."""
    from compactor.cache_file import load_cache

    layers, metadata = load_cache(Path(path))
    return CompactedCache(layers, metadata)
