"""Knows a layer in which the rows of a batch share one document: all of it, or a section each. Knows no prompts.

Only the tail of new tokens is a row's own. A row that is given a section attends to the template's prefix, that
section and its own tokens: short attention, whatever the document's length, with keys that have seen the whole text
before them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from compactor import attention
from compactor.attach import AttendingCacheLayer, dense_heads, window_visibility
from compactor.types import LayerCache

OVERLAP = 48  # tokens: a passage that begins in a section ends in it
STEP_ROWS = 8  # sequences of a step up to which every query head reads the tail by itself


@dataclass(frozen=True)
class Sections:
    """A document cut into equally long sections that overlap and cover it; or a run of them."""

    count: int
    step: int  # tokens between two starts
    size: int  # tokens of each
    first: int = 0  # index of the first of the run

    @classmethod
    def of(cls, num_document: int, count: int) -> Sections:
        """Cut ``num_document`` tokens into ``count`` sections, each of which holds `OVERLAP` tokens of the next where
        there are that many."""
        step = max(1, (num_document - min(OVERLAP, num_document // (2 * count))) // count)
        return cls(count, step, num_document - (count - 1) * step)

    def run(self, first: int, count: int) -> Sections:
        """Return ``count`` neighbours from section ``first`` on."""
        return replace(self, first=self.first + first, count=count)


class SharedLayer(AttendingCacheLayer):
    """One layer of a batch: the document, full or compacted, shared, and a preallocated tail per row."""

    def __init__(
        self,
        document: LayerCache,
        logical_length: int,
        padding: torch.Tensor,
        capacity: int,
        *,
        prefix_length: int = 0,
        sections: Sections | None = None,
        rows_per_section: int = 0,
    ) -> None:
        """The first ``sections.count * rows_per_section`` rows see their section of a full layer, the others the whole
        document; padding: (batch,) int64, tokens at the start of each row's tail that nobody sees."""
        super().__init__()
        self.document, self.logical_length = document, logical_length
        self.max_head_length = max(document.head_lengths)
        self.is_sliding = document.sliding_window is not None
        self.padding, self.capacity, self.length = padding, capacity, 0
        self.tail_end: torch.Tensor | None = None
        self.key_buffer = self.value_buffer = torch.empty(0)
        self.pending = False
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None  # of a step, until `attend` writes them
        self.sections, self.rows_per_section = sections or Sections(0, 0, 0), rows_per_section
        self.num_section_rows = 0 if self.is_sliding else self.sections.count * rows_per_section
        if sections is not None and self.num_section_rows:
            keys, values = (part[0] for part in dense_heads(document))
            self.prefix = keys[:, :prefix_length], values[:, :prefix_length]
            run = slice(sections.first, sections.first + sections.count)
            self.section_keys, self.section_values = (
                part[:, prefix_length:].unfold(1, sections.size, sections.step)[:, run].transpose(2, 3).flatten(0, 1)
                for part in (keys, values)
            )  # (num_kv_heads * count, size, head_dim)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values (batch, num_kv_heads, q_len, head_dim); return the tagged tail, all of the buffer
        once shapes are fixed."""
        attention.require_consumed(self.pending, "same layer, previous call")
        self.pending = True
        if self.tail_end is not None:
            if self._ends_in_one_launch(key_states):
                self.new = key_states, value_states
                return attention.tag(self.key_buffer, self), self.value_buffer
            self.key_buffer.index_copy_(2, self.tail_end, key_states)
            self.value_buffer.index_copy_(2, self.tail_end, value_states)
            return attention.tag(self.key_buffer, self), self.value_buffer
        if not self.length:
            batch, num_kv_heads, _, head_dim = key_states.shape
            self.key_buffer = key_states.new_zeros(batch, num_kv_heads, self.capacity, head_dim)
            self.value_buffer = torch.zeros_like(self.key_buffer)
        stop = self.length + key_states.shape[2]
        self.key_buffer[:, :, self.length : stop] = key_states
        self.value_buffer[:, :, self.length : stop] = value_states
        self.length = stop
        return attention.tag(self.key_buffer[:, :, :stop], self), self.value_buffer[:, :, :stop]

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
        """Attend to the section or the document, and to the row's own tail; shapes as `attention.attention_forward`."""
        self.pending = False
        if self.is_sliding:
            return self._attend_window(query, key, value, self._visible(query, key), scaling, position_ids)
        if self.new is not None:
            return self._end_step(query, scaling)
        document, document_lse = self._attend_shared(query, scaling)
        if attention.kernel_usable("tail_decode", query):
            from compactor_kernels.tail_decode import tail_decode

            return tail_decode(
                query,
                key,
                value,
                self.padding,
                key.shape[2] - query.shape[2] if self.tail_end is None else self.tail_end,
                scaling=scaling,
                document=(document, document_lse),
                out_type=query.dtype,
            ).out
        out, lse = attention.tail_attention(query, key, value, mask=self._visible(query, key), scaling=scaling)
        return attention.merge(document, document_lse, out, lse)[0]

    def _ends_in_one_launch(self, key_states: torch.Tensor) -> bool:
        """Whether `step_decode` writes the new keys, attends to the tail and merges all parts: for a batch of which
        every row sees the document, small enough that the heads of a group may each read the tail."""
        small = len(key_states) <= STEP_ROWS and not self.is_sliding and not self.num_section_rows
        return small and all(attention.kernel_usable(name, key_states) for name in ("biased_decode", "step_decode"))

    def _end_step(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        from compactor_kernels.biased_decode import attend_splits
        from compactor_kernels.step_decode import step_decode

        assert self.new is not None and self.tail_end is not None
        kept, new, self.new = self.document, self.new, None
        splits = attend_splits(
            query,
            kept.keys,
            kept.values,
            kept.biases,
            kept.offsets,
            scaling=scaling,
            max_head_length=self.max_head_length,
            settled=True,
        )
        buffers = self.key_buffer, self.value_buffer
        return step_decode(query, *new, *buffers, self.padding, self.tail_end, splits, scaling=scaling)

    def _visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return bool (batch, 1, q_len, tail_len): what each row sees of its own tail."""
        q_len, tail_len = query.shape[2], key.shape[2]
        columns = torch.arange(tail_len, device=query.device)
        rows = columns[tail_len - q_len :] if self.tail_end is None else self.tail_end
        own = columns <= rows.unsqueeze(-1)
        return (own & (columns >= self.padding.view(-1, 1, 1))).unsqueeze(1)

    def _attend_shared(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to the section or the document; float32 out (query's shape) and lse (batch, num_heads, q_len)."""
        split = self.num_section_rows
        parts = []
        if split:
            parts.append(self._attend_sections(query[:split], scaling))
        if split < len(query):
            kept = self.document
            parts.append(
                attention.document_attention(
                    query[split:],
                    kept.keys,
                    kept.values,
                    kept.biases,
                    kept.offsets,
                    scaling=scaling,
                    max_head_length=self.max_head_length,
                )
            )
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, lse

    def _attend_sections(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, num_heads, q_len, head_dim = query.shape
        num_kv_heads = self.prefix[0].shape[0]
        by_head = query.view(self.sections.count, self.rows_per_section, num_kv_heads, -1, q_len, head_dim)
        by_head = by_head.permute(2, 0, 1, 3, 4, 5)  # (num_kv_heads, sections, rows, group, q_len, head_dim)
        shape = by_head.shape
        per_section = by_head.reshape(num_kv_heads * self.sections.count, -1, head_dim)
        section = attention.dense_attention(per_section, self.section_keys, self.section_values, scaling)
        prefix = attention.dense_attention(by_head.reshape(num_kv_heads, -1, head_dim), *self.prefix, scaling)
        out, lse = attention.merge(
            section[0].view(shape), section[1].view(shape[:-1]), prefix[0].view(shape), prefix[1].view(shape[:-1])
        )
        out = out.permute(1, 2, 0, 3, 4, 5).reshape(num_rows, num_heads, q_len, head_dim)
        return out, lse.permute(1, 2, 0, 3, 4).reshape(num_rows, num_heads, q_len)

    def _attend_window(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor,
        scaling: float,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, tail_len, window = query.shape[0], key.shape[2], self.document.sliding_window or 0
        assert position_ids is not None
        positions = self.logical_length + torch.arange(tail_len, device=key.device) - self.padding.unsqueeze(-1)
        near = position_ids.unsqueeze(-1) - positions.unsqueeze(1) < window
        seen = window_visibility(self.document, position_ids, tail_len, visible & near.unsqueeze(1))
        keys, values = dense_heads(self.document)
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            torch.cat([keys.expand(batch, -1, -1, -1), key], dim=2),
            torch.cat([values.expand(batch, -1, -1, -1), value], dim=2),
            attn_mask=seen,
            scale=scaling,
            enable_gqa=True,
        )

    def fix_shapes(self, tail_end: torch.Tensor) -> None:
        """From now on take one token a step, at the place ``tail_end`` of the tail: (1,) int64 on the device, shared by
        all layers. No shape depends on how many tokens there are any more."""
        self.tail_end = tail_end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the tail after the next update, and the position at which it begins."""
        return self.length + query_length, self.logical_length

    def get_max_length(self) -> int:
        """Return the longest sequence that fits."""
        return self.logical_length + self.capacity
