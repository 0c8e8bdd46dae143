"""Knows how reference segments run side by side after one document. Knows no prompts and no solver.

All segments are packed into one sequence; each starts at the position after the document, sees the document and,
causally, itself. Attention is computed segment by segment inside the cache layers, so no mask is ever built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from compactor import attention
from compactor.attach import AttendingCacheLayer, dense_heads, window_visibility
from compactor.errors import NumericalError
from compactor.types import LayerCache, Segment

if TYPE_CHECKING:
    from compactor.model import LoadedModel
    from compactor_kernels.reference_merge import Part


LOCAL_ROWS = 1024  # rows of a block at most: short segments share a block, and see only themselves in it


@dataclass(frozen=True)
class Packed:
    """Segments laid one after another: rows ``bounds[s]`` of the packed sequence belong to segment s."""

    token_ids: torch.Tensor  # (1, num_rows) int64
    position_ids: torch.Tensor  # (1, num_rows) int64
    bounds: list[tuple[int, int]]
    sources: list[str]
    weights: dict[tuple[torch.device, tuple[float, ...]], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """Number of packed tokens."""
        return int(self.token_ids.shape[1])

    def row_weights(self, weights: dict[str, float], device: torch.device) -> torch.Tensor:
        """Return the weight of each row by its source, (num_rows,) float32; the same tensor for every layer."""
        spans = tuple(weights[source] for source in self.sources)
        if (device, spans) not in self.weights:
            lengths = torch.tensor([last - first for first, last in self.bounds])
            self.weights[device, spans] = torch.tensor(spans).repeat_interleave(lengths).to(device)
        return self.weights[device, spans]

    def blocks(self, num_heads: int, device: torch.device, prefix_length: int) -> Iterator[Block]:
        """Cut the rows into blocks whose scores on prefix and local keys stay within the device's block size.

        A block may hold many short segments, or a piece of a long one; its rows see the document and their own segment
        only, causally.
        """
        step = max(1, attention.block_elements(device) // (num_heads * (prefix_length + LOCAL_ROWS)))
        step = min(step, LOCAL_ROWS)
        starts = torch.tensor([first for first, _ in self.bounds])
        own = torch.arange(len(starts)).repeat_interleave(torch.tensor([b - a for a, b in self.bounds])).to(device)
        for first in range(0, self.num_rows, step):
            last = min(first + step, self.num_rows)
            local_first = int(starts[int((starts <= first).sum()) - 1])
            rows = torch.arange(first, last, device=device).unsqueeze(-1)
            columns = torch.arange(local_first, last, device=device)
            hidden = (columns > rows) | (own[columns] != own[rows])
            yield Block(first, last, local_first, hidden)


@dataclass(frozen=True)
class Block:
    """Some packed rows, and the packed rows that they may see."""

    first: int
    last: int
    local_first: int  # local keys are the packed rows local_first .. last
    hidden: torch.Tensor  # (last - first, last - local_first) bool: other segments and later tokens

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.first, self.last)

    @property
    def locals(self) -> slice:
        """The local keys as a slice."""
        return slice(self.local_first, self.last)


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


class PackedLayer(AttendingCacheLayer):
    """One layer of a packed pass; subclasses say what attention returns and what is learnt from the queries."""

    index = -1  # of the layer in the model; `run_packed` sets it

    def __init__(self, full: LayerCache, packed: Packed, logical_length: int, advance: Callable[[int], None]) -> None:
        super().__init__()
        self.full = full
        self.packed = packed
        self.logical_length = logical_length
        self.advance = advance
        self.is_sliding = full.sliding_window is not None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the packed keys and values through, tagged; none is stored."""
        return attention.tag(key_states, self), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the packed length and the document's."""
        return query_length, self.logical_length

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

    @contextmanager
    def naming(self, head: int) -> Iterator[None]:
        """Put layer and KV head before the sentence of a NumericalError that is raised inside."""
        try:
            yield
        except NumericalError as error:
            raise NumericalError(f"Layer {self.index}, KV head {head}: {error}") from error


@dataclass(frozen=True)
class ExactParts:
    """Exact attention of all packed rows, not merged yet.

    Of each part the output (num_kv_heads, group, num_rows, head_dim), normalised by itself, with any strides but a
    contiguous last dimension; and its log-sum-exp (num_kv_heads, group, num_rows) float32.
    """

    near: list[Part]  # own segment and, where there is one, prefix; or both as one part
    document: Part


@dataclass(frozen=True)
class ExactRows:
    """Exact attention of all packed rows over prefix, document and own segment, float32, per KV head and query head.

    Leading dimensions are (num_kv_heads, group, num_rows).
    """

    lse: torch.Tensor  # over all keys
    document: torch.Tensor  # (..., head_dim): the output of the document's keys alone, normalised among themselves
    document_lse: torch.Tensor
    near: torch.Tensor  # (..., head_dim): the output of prefix and local keys alone, normalised among themselves
    near_lse: torch.Tensor
    out: torch.Tensor  # (..., head_dim): the whole output


def exact_rows(
    layer: PackedLayer,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    prefix_length: int,
) -> ExactRows:
    """Attend exactly; shapes as `PackedLayer.attend_packed`."""
    parts = exact_parts(layer, queries, keys, values, scaling, prefix_length)
    near, near_lse = merged(parts.near)
    out, lse = attention.merge(near, near_lse, *parts.document)
    return ExactRows(lse, *parts.document, near, near_lse, out)


def exact_parts(
    layer: PackedLayer,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    prefix_length: int,
    *,
    out_type: torch.dtype = torch.float32,
) -> ExactParts:
    """Attend exactly; shapes as `PackedLayer.attend_packed`. ``out_type``: float32, or the type of the queries where
    `attention.is_fast`."""
    num_heads, num_rows, head_dim = queries.shape
    num_kv_heads = keys.shape[0]
    shape = (num_kv_heads, num_heads // num_kv_heads, num_rows)
    grouped = queries.view(*shape, head_dim)
    all_keys, all_values = (part[0] for part in dense_heads(layer.full))
    document, document_lse = attention.dense_attention(
        grouped.flatten(1, 2), all_keys[:, prefix_length:], all_values[:, prefix_length:], scaling, out_type=out_type
    )
    prefix = all_keys[:, :prefix_length], all_values[:, :prefix_length]
    if attention.is_fast(queries):
        near = near_parts(layer.packed, grouped, keys, values, prefix, scaling, out_type=out_type)
    else:
        near = [near_exact(layer.packed, grouped, keys, values, prefix, scaling)]
    return ExactParts(near, (document.view(*shape, head_dim), document_lse.reshape(shape)))


def merged(near: list[Part]) -> Part:
    """Merge one or two parts into one."""
    return near[0] if len(near) == 1 else attention.merge(*near[0], *near[1])


def near_exact(
    packed: Packed,
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to prefix and own segment in float32, block by block.

    grouped (num_kv_heads, group, num_rows, head_dim); keys, values (num_kv_heads, num_rows, head_dim); prefix: keys and
    values, (num_kv_heads, prefix_length, head_dim). Returns output and log-sum-exp, float32, by row of ``grouped``.
    """
    shape, (prefix_keys, prefix_values) = grouped.shape[:3], prefix
    prefix_length = prefix_keys.shape[1]
    near = torch.empty(grouped.shape, device=grouped.device)
    near_lse = torch.empty(shape, device=grouped.device)
    for block in packed.blocks(shape[0] * shape[1], grouped.device, prefix_length):
        own_keys = torch.cat([prefix_keys, keys[:, block.locals]], dim=1).float()
        own_values = torch.cat([prefix_values, values[:, block.locals]], dim=1).float()
        rows = (grouped[:, :, block.rows].float() * scaling).flatten(1, 2)
        scores = torch.bmm(rows, own_keys.mT).view(*shape[:2], block.last - block.first, -1)
        scores[..., prefix_length:].masked_fill_(block.hidden, -math.inf)
        lse = scores.logsumexp(-1)
        near[:, :, block.rows] = attention.weigh_values(scores.sub_(lse.unsqueeze(-1)).exp_(), own_values)
        near_lse[:, :, block.rows] = lse
    return near, near_lse


def near_fused(
    packed: Packed,
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through PyTorch's fused attention, which takes all segments in one call; for `attention.is_fast`."""
    return merged(near_parts(packed, grouped, keys, values, prefix, scaling))


def near_parts(
    packed: Packed,
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
    *,
    out_type: torch.dtype = torch.float32,
) -> list[Part]:
    """Return own segment and, where there is one, prefix as the parts that `near_fused` merges; see `ExactParts`."""
    starts = torch.tensor([0, *(last for _, last in packed.bounds)], dtype=torch.int32, device=grouped.device)
    longest = max(last - first for first, last in packed.bounds)
    flat = grouped.flatten(0, 1)
    parts = [attention.fused_segments(flat, keys, values, scaling, starts, longest, out_type=out_type)]
    if prefix[0].shape[1]:
        parts.append(attention.dense_attention(grouped.flatten(1, 2), *prefix, scaling, out_type=out_type))
    return [(out.view(grouped.shape), lse.reshape(grouped.shape[:3])) for out, lse in parts]


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
    for index, layer in enumerate(layers):
        layer.index = index
    loaded.model.get_decoder()(
        input_ids=packed.token_ids.to(loaded.device),
        position_ids=packed.position_ids.to(loaded.device),
        attention_mask=no_mask,
        past_key_values=Cache(layers=list(layers)),
        use_cache=True,
    )
