"""Knows how token ids become the full KV cache, chunk by chunk. Knows no question, no budget, no file.

While it runs it can also observe the document's own queries (the `context` reference queries): their squared attention
is added to the scores of earlier keys, so that they cost no pass of their own. Where no other source is there to be
fitted, the queries themselves are kept in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from compactor import attention
from compactor.attach import AttendingCacheLayer
from compactor.errors import NumericalError
from compactor.types import LayerCache, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compactor.model import LoadedModel


CONTEXT_SPAN = 256  # document tokens; a context row's own span counts as local, not as document

Observer = Callable[[int, torch.Tensor], None]  # (position of the first row, attention): see `GrowingLayer.attend`


@dataclass
class Prefilled:
    """The full cache of ``prefix | document`` and what the prefill observed."""

    layers: list[LayerCache]  # every key of full layers, the last window - 1 of sliding layers
    prefix_length: int
    document_ids: list[int]
    residual_norms: torch.Tensor  # (num_layers,) float32: median norm of the residual stream after each layer
    context_scores: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (num_kv_heads, num_document)
    context_queries: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # layer -> (num_heads, num_document, head_dim)

    @property
    def logical_length(self) -> int:
        """Tokens of prefix and document."""
        return self.prefix_length + len(self.document_ids)

    @property
    def full_layers(self) -> list[int]:
        """Indices of the layers that see the whole document: the ones to compact."""
        return [i for i, layer in enumerate(self.layers) if layer.sliding_window is None]


class GrowingLayer(AttendingCacheLayer):
    """A full-attention layer during prefill: a preallocated dense cache that may observe the document's queries."""

    is_sliding = False

    def __init__(
        self,
        capacity: int,
        prefix_length: int,
        head_gains: torch.Tensor | None,
        keep_queries: bool = False,
        observer: Observer | None = None,
    ) -> None:
        super().__init__()
        self.is_initialized = False  # until `lazy_initialization`
        self.keep_queries = keep_queries
        self.observer = observer
        self.capacity = capacity
        self.prefix_length = prefix_length
        self.head_gains = head_gains  # (num_heads,) float32, or None to observe nothing
        self.length = 0
        self.scores: torch.Tensor | None = None
        self.observed: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate room for the whole sequence."""
        _, num_kv_heads, _, head_dim = key_states.shape
        self.key_buffer = key_states.new_empty(1, num_kv_heads, self.capacity, head_dim)
        self.value_buffer = torch.empty_like(self.key_buffer)
        self.scores = torch.zeros(num_kv_heads, self.capacity, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chunk; return all keys and values so far, tagged if queries are observed."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.length + key_states.shape[-2]
        self.key_buffer[:, :, self.length : stop] = key_states
        self.value_buffer[:, :, self.length : stop] = value_states
        self.length = stop
        keys, values = self.key_buffer[:, :, :stop], self.value_buffer[:, :, :stop]
        watched = self.head_gains is not None or self.observer is not None
        return (attention.tag(keys, self) if watched else keys), values

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
        """Attend causally and add each document row's squared attention to the scores of earlier spans' keys.

        An observer gets each block of attention, (num_kv_heads, group, rows, keys up to the last row) float32.
        """
        _, num_heads, q_len, head_dim = query.shape
        num_kv_heads, kv_len = key.shape[1], key.shape[2]
        if attention.is_fast(query) and self.observer is None:
            return self._attend_fused(query[0], key[0], value[0], scaling)
        grouped = query[0].view(num_kv_heads, -1, q_len, head_dim).float()
        keys, values = key[0].float(), value[0].float()
        out = torch.empty_like(grouped)
        first = kv_len - q_len
        for start, stop in attention.row_blocks(q_len, kv_len, num_heads, query.device):
            seen = first + stop
            probs = attention.causal_scores(grouped[:, :, start:stop], keys[:, :seen], scaling).softmax(-1)
            out[:, :, start:stop] = attention.weigh_values(probs, values[:, :seen])
            if self.observer is not None:
                self.observer(first + start, probs)
            if self.head_gains is not None:
                self._score(first + start, probs, self.head_gains)
        self._keep(query[0], first)
        return out.view(1, num_heads, q_len, head_dim)

    def _keep(self, queries: torch.Tensor, first: int) -> None:
        """Keep the document's queries (num_heads, q_len, head_dim) in host memory where they are wanted."""
        if self.keep_queries:
            self.observed.append(queries[:, max(0, self.prefix_length - first) :].to("cpu"))

    def _attend_fused(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Do the same with fused attention and scores of rounded inputs; the batch dimension is dropped."""
        assert self.head_gains is not None
        num_heads, q_len, head_dim = queries.shape
        num_kv_heads, first = keys.shape[0], keys.shape[1] - q_len
        group = num_heads // num_kv_heads
        own_keys, own_values = (part[:, first:].repeat_interleave(group, dim=0) for part in (keys, values))
        out, lse = attention.fused_attention(queries, own_keys, own_values, scaling, causal=True)
        if first:
            rows = queries.reshape(num_kv_heads, -1, head_dim)
            past, past_lse = attention.dense_attention(rows, keys[:, :first], values[:, :first], scaling)
            out, lse = attention.merge(out, lse, past.view(out.shape), past_lse.reshape(lse.shape))
        gains = self.head_gains.to(queries.device)
        largest = gains.max().clamp_min(1e-30)
        shift = (gains / largest).clamp_min(1e-6).log().unsqueeze(-1) - lse
        self._score_fused(queries, keys, scaling, shift, largest)
        self._keep(queries, first)
        return out.unsqueeze(0)

    def _score_fused(
        self, queries: torch.Tensor, keys: torch.Tensor, scaling: float, shift: torch.Tensor, largest: torch.Tensor
    ) -> None:
        """Add largest^2 exp(s q_i.k_j + shift_i)^2 of the rows to the keys before their own spans; shift: (num_heads,
        q_len) float32."""
        assert self.scores is not None
        num_kv_heads, stop, head_dim = keys.shape
        first = stop - queries.shape[1]
        if has_stats_kernel(queries):
            stops = context_stops(first, stop, self.prefix_length, queries.device)
            past = max(0, stop - 1 - self.prefix_length) // CONTEXT_SPAN * CONTEXT_SPAN  # the last row's
            document = keys[:, self.prefix_length : self.prefix_length + past]
            squares = squared_attention(queries, document, scaling, shift, stops)
            self.scores[:, self.prefix_length : self.prefix_length + past] += squares * largest.square()
            return
        for row, last, span in context_spans(first, stop, self.prefix_length):
            own = slice(row - first, last - first)
            rows = queries[:, own].reshape(num_kv_heads, -1, head_dim)
            row_shift = shift[:, own].reshape(num_kv_heads, -1)
            probs = attention.exponentials(rows, keys[:, self.prefix_length : span], scaling, row_shift)
            norms = torch.linalg.vector_norm(probs, dim=1, dtype=torch.float32)
            self.scores[:, self.prefix_length : span] += (norms * largest).square()

    def _score(self, first: int, probs: torch.Tensor, head_gains: torch.Tensor) -> None:
        """Add the squares of a block of attention, which are formed in place."""
        assert self.scores is not None
        weights = head_gains.to(probs.device).square().view(probs.shape[0], -1, 1)
        for row, last, past in context_spans(first, first + probs.shape[2], self.prefix_length):
            squares = probs[:, :, row - first : last - first, self.prefix_length : past].square_().sum(2)
            self.scores[:, self.prefix_length : past] += (squares * weights).sum(1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length after the next update, and offset 0."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return the allocated length."""
        return self.capacity

    def finish(self) -> LayerCache:
        """Return the layer as a LayerCache in which every head keeps every key; views, no copies."""
        keys, values = self.key_buffer[0, :, : self.length], self.value_buffer[0, :, : self.length]
        return dense_layer(keys, values, first_position=0)


def dense_layer(
    keys: torch.Tensor, values: torch.Tensor, *, first_position: int, sliding_window: int | None = None
) -> LayerCache:
    """Wrap dense keys and values (num_kv_heads, num_tokens, head_dim) as a LayerCache with biases 0."""
    num_kv_heads, num_tokens, head_dim = keys.shape
    positions = torch.arange(first_position, first_position + num_tokens, dtype=torch.int32, device=keys.device)
    return LayerCache(
        keys=keys.reshape(-1, head_dim),
        values=values.reshape(-1, head_dim),
        biases=torch.zeros(num_kv_heads * num_tokens, device=keys.device),
        positions=positions.repeat(num_kv_heads),
        offsets=torch.arange(num_kv_heads + 1, dtype=torch.int32, device=keys.device) * num_tokens,
        sliding_window=sliding_window,
    )


def context_spans(start: int, stop: int, prefix_length: int) -> Iterator[tuple[int, int, int]]:
    """Cut token positions ``start .. stop`` into pieces of one span of the document each: (first, last, span start).

    The keys of its own span are local to a context row, as a segment's own tokens are to a segment: questions asked
    after the document have no such neighbourhood. Rows of the prefix and of the first span are left out.
    """
    first = max(start, prefix_length + CONTEXT_SPAN)
    while first < stop:
        past = prefix_length + (first - prefix_length) // CONTEXT_SPAN * CONTEXT_SPAN
        last = min(stop, past + CONTEXT_SPAN)
        yield first, last, past
        first = last


def context_stops(start: int, stop: int, prefix_length: int, device: torch.device) -> torch.Tensor:
    """Return for the rows at token positions ``start .. stop`` how many of the document's keys come before their own
    span, (stop - start,) int32: what `context_spans` says row by row."""
    positions = torch.arange(start - prefix_length, stop - prefix_length, dtype=torch.int32, device=device)
    return positions.clamp_(min=0).div_(CONTEXT_SPAN, rounding_mode="floor").mul_(CONTEXT_SPAN)


def has_stats_kernel(queries: torch.Tensor) -> bool:
    """Whether `squared_attention` runs: half-precision queries on an NVIDIA GPU where the Triton kernel does."""
    return attention.is_fast(queries) and attention.kernel_usable("attention_stats", queries)


def squared_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    row_shift: torch.Tensor,
    stops: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return sum over rows i of exp(s q_i.k_j + row_shift_i)^2, (num_kv_heads, kv_len) float32, by the Triton kernel.

    queries (num_heads, rows, head_dim); keys (num_kv_heads, kv_len, head_dim); row_shift (num_heads, rows) float32;
    stops (rows,) int32 ascending: row i sees the keys before stops[i].
    """
    from compactor_kernels.attention_stats import attention_stats

    found = attention_stats(queries, keys.to(queries.dtype), row_shift.contiguous(), scaling=scaling, stops=stops)
    assert found.squares is not None
    return found.squares


@contextmanager
def residual_norms(model: PreTrainedModel) -> Iterator[Callable[[], torch.Tensor]]:
    """Record the residual stream after each decoder layer; the bound function returns median norms (num_layers,)."""
    blocks = model.get_decoder().layers
    records: list[list[torch.Tensor]] = [[] for _ in blocks]

    def watch(index: int) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            records[index].append(torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=torch.float32).flatten())

        return hook

    handles = [block.register_forward_hook(watch(i)) for i, block in enumerate(blocks)]
    try:
        yield lambda: torch.stack([torch.cat(norms).median().cpu() for norms in records])
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prefill(
    loaded: LoadedModel,
    prefix_ids: list[int],
    document_ids: list[int],
    *,
    prefill_chunk: int,
    head_gains: torch.Tensor | None,
    reporter: Reporter,
    keep_queries: bool = False,
    observers: Mapping[int, Observer] | None = None,
) -> Prefilled:
    """Run ``prefix | document`` through the model in chunks of ``prefill_chunk`` tokens.

    head_gains: (num_layers, num_heads) float32 to score keys by the document's own queries, or None; ``keep_queries``
    keeps these queries too. observers: per full-attention layer, what to show the attention of every row (this takes
    the explicit attention of `GrowingLayer.attend`). Logits are never formed. Raises NumericalError where keys or
    values are not finite.
    """
    model = loaded.model
    attention.register(model)
    tokens = torch.tensor([*prefix_ids, *document_ids]).unsqueeze(0)
    layers: list[Any] = [
        GrowingLayer(
            tokens.shape[1],
            len(prefix_ids),
            None if head_gains is None else head_gains[i],
            keep_queries,
            (observers or {}).get(i),
        )
        if window is None
        else DynamicSlidingWindowLayer(sliding_window=window)
        for i, window in enumerate(loaded.sliding_windows)
    ]
    cache = Cache(layers=layers)
    with residual_norms(model) as norms, reporter.phase("prefill", tokens.shape[1], "tokens") as advance:
        for chunk in tokens.split(prefill_chunk, dim=1):
            model.get_decoder()(input_ids=chunk.to(loaded.device), past_key_values=cache, use_cache=True)
            advance(chunk.shape[1])
        medians = norms()
    result = Prefilled([], len(prefix_ids), list(document_ids), medians)
    for i, (layer, window) in enumerate(zip(layers, loaded.sliding_windows, strict=True)):
        if window is not None:
            kept = layer.keys.shape[-2]
            first = tokens.shape[1] - kept
            result.layers.append(
                dense_layer(layer.keys[0], layer.values[0], first_position=first, sliding_window=window)
            )
        else:
            result.layers.append(layer.finish())
            if head_gains is not None:
                result.context_scores[i] = layer.scores[:, len(prefix_ids) :]
                if keep_queries:
                    result.context_queries[i] = torch.cat(layer.observed, dim=1)
    check_finite(result.layers)
    return result


def check_finite(layers: Sequence[LayerCache]) -> None:
    """Raise NumericalError where a key or value of the full cache is not finite."""
    finite = torch.stack([torch.isfinite(part).all().cpu() for one in layers for part in (one.keys, one.values)])
    if not bool(finite.all()):
        index = int(finite.logical_not().nonzero()[0]) // 2
        raise NumericalError(f"Layer {index}: the model's keys or values are not finite; {NumericalError.REMEDY}.")
