"""Knows how a batch of prompts is answered after one document, some seeing all of it and some one section. Knows no
prompts and no solver.

Rows of the batch share the document's keys; only the tail of new tokens is their own. A row that is given a section
attends to the template's prefix, that section and its own tokens: short attention, whatever the document's length, with
keys that have seen the whole text before them. Rope positions are those of a question after the whole document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from compactor import attention
from compactor.attach import AttendingCacheLayer, dense_heads, window_visibility
from compactor.reference_queries import left_pad, pad_token_id, stop_token_ids
from compactor.types import LayerCache

if TYPE_CHECKING:
    from compactor.model import LoadedModel
    from compactor.prefill import Prefilled

TOP_K = 64  # tokens that sampling chooses from at most; a partial sort of the vocabulary is enough
LOOK_EVERY = 8  # steps between two looks at which rows have ended: each look waits for the device


@dataclass(frozen=True)
class Sections:
    """A document cut into equally long sections that overlap by a few tokens and cover it."""

    count: int
    step: int  # tokens between two starts
    size: int  # tokens of each

    @classmethod
    def of(cls, num_document: int, count: int) -> Sections:
        """Cut ``num_document`` tokens into ``count`` sections."""
        step = num_document // count
        return cls(count, step, num_document - (count - 1) * step)


class SharedLayer(AttendingCacheLayer):
    """One layer of a batch: the document, shared, and a preallocated tail per row."""

    def __init__(
        self,
        full: LayerCache,
        logical_length: int,
        prefix_length: int,
        sections: Sections,
        rows_per_section: int,
        padding: torch.Tensor,
        capacity: int,
    ) -> None:
        """The first ``sections.count * rows_per_section`` rows see their section, the others the whole document;
        padding: (batch,) int64, tokens at the start of each row's tail that nobody sees."""
        super().__init__()
        self.full, self.logical_length, self.prefix_length = full, logical_length, prefix_length
        self.is_sliding = full.sliding_window is not None
        self.padding, self.capacity, self.length = padding, capacity, 0
        self.sections, self.rows_per_section = sections, rows_per_section
        self.num_section_rows = 0 if self.is_sliding else sections.count * rows_per_section
        if self.num_section_rows:
            keys, values = (part[0] for part in dense_heads(full))
            self.prefix = keys[:, :prefix_length], values[:, :prefix_length]
            self.section_keys, self.section_values = (
                part[:, prefix_length:].unfold(1, sections.size, sections.step).transpose(2, 3).flatten(0, 1)
                for part in (keys, values)
            )  # (num_kv_heads * count, size, head_dim)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values (batch, num_kv_heads, q_len, head_dim); return the tagged tail."""
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
        q_len, tail_len = query.shape[2], key.shape[2]
        columns = torch.arange(tail_len, device=query.device)
        own = columns <= torch.arange(tail_len - q_len, tail_len, device=query.device).unsqueeze(-1)
        visible = (own & (columns >= self.padding.view(-1, 1, 1))).unsqueeze(1)  # (batch, 1, q_len, tail_len)
        if self.is_sliding:
            return self._attend_window(query, key, value, visible, scaling, position_ids)
        out, lse = attention.tail_attention(query, key, value, mask=visible, scaling=scaling)
        split = self.num_section_rows
        parts = []
        if split:
            parts.append(self._attend_sections(query[:split], scaling))
        if split < len(query):
            kept = self.full
            parts.append(
                attention.document_attention(
                    query[split:],
                    kept.keys,
                    kept.values,
                    kept.biases,
                    kept.offsets,
                    scaling=scaling,
                    max_head_length=self.logical_length,
                )
            )
        document, document_lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return attention.merge(document, document_lse, out, lse)[0]

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
        batch, tail_len, window = query.shape[0], key.shape[2], self.full.sliding_window or 0
        assert position_ids is not None
        positions = self.logical_length + torch.arange(tail_len, device=key.device) - self.padding.unsqueeze(-1)
        near = position_ids.unsqueeze(-1) - positions.unsqueeze(1) < window
        seen = window_visibility(self.full, position_ids, tail_len, visible & near.unsqueeze(1))
        keys, values = dense_heads(self.full)
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            torch.cat([keys.expand(batch, -1, -1, -1), key], dim=2),
            torch.cat([values.expand(batch, -1, -1, -1), value], dim=2),
            attn_mask=seen,
            scale=scaling,
            enable_gqa=True,
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the tail after the next update, and the position at which it begins."""
        return self.length + query_length, self.logical_length

    def get_max_length(self) -> int:
        """Return the longest sequence that fits."""
        return self.logical_length + self.capacity


@torch.no_grad()
def sample_answers(
    loaded: LoadedModel,
    full: Prefilled,
    section_prompts: Sequence[Sequence[list[int]]],
    whole_prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    seed: int,
    top_p: float = 0.95,
    on_step: Callable[[int], None] = lambda _steps: None,
) -> list[list[int]]:
    """Answer all prompts as one sampled batch over the full cache; answers come without their stop token.

    section_prompts: for every section of `Sections.of` the same number of prompts (token ids after the document);
    whole_prompts: prompts that see the whole document. Answers come in the order section by section, then whole.
    Equal seeds give equal answers on one machine. The caller checks that prompt and answer fit the window.
    """
    prompts = [prompt for section in section_prompts for prompt in section] + list(whole_prompts)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device, length = loaded.device, full.logical_length
    input_ids, mask = left_pad(prompts, pad_id=pad_token_id(loaded))
    input_ids, padding = input_ids.to(device), (mask == 0).sum(1).to(device)
    sections = Sections.of(len(full.document_ids), max(1, len(section_prompts)))
    rows_per_section = len(section_prompts[0]) if section_prompts else 0
    layers = [
        SharedLayer(
            layer, length, full.prefix_length, sections, rows_per_section, padding, input_ids.shape[1] + max_new_tokens
        )
        for layer in full.layers
    ]
    cache = Cache(layers=list(layers))
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # the layers mask; 4-d masks are passed on
    generator = torch.Generator(device=device).manual_seed(seed)
    stops = torch.tensor(sorted(stop_token_ids(loaded)), device=device)
    positions = (torch.arange(input_ids.shape[1], device=device) - padding.unsqueeze(-1)).clamp_min(0) + length
    answers = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        logits = loaded.model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=no_mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token = sample(logits.float(), top_p, generator)
        ended |= torch.isin(token, stops)
        answers[:, step] = torch.where(ended, -1, token)
        on_step(1)
        if step % LOOK_EVERY == LOOK_EVERY - 1 and bool(ended.all()):
            break
        input_ids, positions = token.unsqueeze(-1), positions[:, -1:] + 1
    return [[token for token in row if token >= 0] for row in answers.tolist()]


def sample(logits: torch.Tensor, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """Sample one token per row from the nucleus (Holtzman et al. 2020) of the `TOP_K` most likely.

    logits: (rows, vocabulary) float32; returns (rows,) int64.
    """
    best = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    probs = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
    outside = probs.cumsum(-1) - probs >= top_p  # the first token is always inside
    choice = torch.multinomial(probs.masked_fill(outside, 0.0), 1, generator=generator)
    return best.indices.gather(-1, choice).squeeze(-1)
