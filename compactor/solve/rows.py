"""Knows reference rows of a layer with their exact attention, and their attention to kept keys. Knows no fit.

A row is a query of one token. What prefix and local keys give to it does not change when the document is compacted,
except for the normaliser: with their log-sum-exp and output known, a row needs only its scores on the kept keys:

    lse' = log(exp(near_lse) + sum over kept j of exp(s q_i.k_j + beta_j))
    out'_i = exp(near_lse - lse') near_i + sum over kept j of exp(s q_i.k_j + beta_j - lse') v'_j
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from compactor import attention
from compactor.solve.gram import sum_dtype

HELD_OUT_SPAN, HELD_OUT_EVERY = 32, 5  # one span of 32 rows in five chooses the ridge
CPU_GRAM_ROWS = 512  # query positions of one Gram block on a CPU: few enough that they look at some of the keys only

Heads = slice | torch.Tensor  # which KV heads: a range of them, or their int64 indices
ALL_HEADS = slice(None)


@dataclass(frozen=True)
class Rows:
    """Reference rows of some KV heads and their exact attention."""

    queries: torch.Tensor  # (num_heads, group, num_rows, head_dim), the model's type
    scaling: float
    root_weights: torch.Tensor  # (num_heads, group, num_rows) float32: square roots of the row weights
    lse: torch.Tensor  # (num_heads, group, num_rows) float32: over prefix, document and local keys
    near_share: torch.Tensor  # (num_heads, group, num_rows) float32: logarithm of the attention on prefix, local keys
    near: torch.Tensor  # (num_heads, group, num_rows, head_dim) float32: their output, normalised among themselves
    out: torch.Tensor  # (num_heads, group, num_rows, head_dim) float32: the whole output
    held_out: torch.Tensor  # int64, increasing: the rows that choose the ridge instead of being fitted
    document_stop: torch.Tensor | None = None  # (num_rows,) int64: document keys that the row sees; None is all

    @cached_property
    def fitted(self) -> torch.Tensor:
        """The rows that are not held out, int64, increasing."""
        count = self.lse.shape[2]
        later = torch.zeros(count, dtype=torch.uint8, device=self.lse.device).index_fill_(0, self.held_out, 1)
        return later.sort(stable=True).indices[: count - len(self.held_out)]

    @cached_property
    def out_norms(self) -> torch.Tensor:
        """Norms of the exact outputs, (num_heads, group, num_rows) float32."""
        return torch.as_tensor(torch.linalg.vector_norm(self.out, dim=-1))

    def head(self, index: int) -> Rows:
        """Return the rows of one KV head, which keep their leading dimension."""
        own = {
            name: getattr(self, name)[index : index + 1]
            for name in ("queries", "root_weights", "lse", "near_share", "near", "out")
        }
        return replace(self, **own)

    def every(self, step: int) -> Rows:
        """Return one row in ``step``, with so many times its weight."""
        if step == 1:
            return self
        own = {name: getattr(self, name)[:, :, ::step] for name in ("queries", "lse", "near_share", "near", "out")}
        count = own["lse"].shape[2]
        return replace(
            self,
            **own,
            root_weights=self.root_weights[:, :, ::step] * step**0.5,
            held_out=held_out_rows(count, self.lse.device),
            document_stop=None if self.document_stop is None else self.document_stop[::step],
        )

    def blocks(self, num_columns: int, heads: Heads = ALL_HEADS, chosen: torch.Tensor | None = None) -> Iterator[Block]:
        """Cut the rows of some heads, all or the ``chosen`` (int64), such that ``num_columns`` scores a row of a head
        stay within the device's block size."""
        device, (num_all, group, num_rows) = self.lse.device, self.lse.shape
        num_heads = len(range(num_all)[heads]) if isinstance(heads, slice) else len(heads)
        count = num_rows if chosen is None else len(chosen)
        most = -(-CPU_GRAM_ROWS * count // max(1, num_rows)) if device.type == "cpu" else count
        step = max(1, min(most, attention.block_elements(device) // (num_heads * group * max(1, num_columns))))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            yield self._block(heads, rows if chosen is None else chosen[rows])

    def _block(self, heads: Heads, rows: slice | torch.Tensor) -> Block:
        parts = (self.queries, self.root_weights, self.lse, self.near_share)
        queries, roots, lse, near_share = (gather(part, heads, rows) for part in parts)
        stops = None if self.document_stop is None else self.document_stop[rows].repeat(self.lse.shape[1])
        return Block(self, heads, rows, queries, self.scaling, roots, lse, near_share, stops)


@dataclass(frozen=True)
class Block:
    """Some rows of some KV heads; the group of query heads is flattened into the rows. See `Rows`. Outputs are gathered
    when they are asked for, and are not kept."""

    whole: Rows
    heads: Heads  # of ``whole``
    chosen: slice | torch.Tensor  # its rows: a range of them, or int64
    queries: torch.Tensor  # (num_heads, num_rows, head_dim)
    scaling: float
    root_weights: torch.Tensor  # (num_heads, num_rows)
    lse: torch.Tensor
    near_share: torch.Tensor
    document_stop: torch.Tensor | None  # (num_rows,)

    @property
    def near(self) -> torch.Tensor:
        """Output of prefix and local keys among themselves, (num_heads, num_rows, head_dim) float32."""
        return gather(self.whole.near, self.heads, self.chosen)

    @property
    def out(self) -> torch.Tensor:
        """The whole output, (num_heads, num_rows, head_dim) float32."""
        return gather(self.whole.out, self.heads, self.chosen)


def gather(part: torch.Tensor, heads: Heads, rows: slice | torch.Tensor) -> torch.Tensor:
    """Return some rows of some heads of a tensor (num_heads, group, num_rows, ...), the group flattened into the rows:
    (num_heads, group * rows, ...); copied once at most."""
    if isinstance(heads, slice):
        own = part[heads][:, :, rows]
    elif isinstance(rows, slice):
        own = part[:, :, rows][heads]
    else:
        own = part[heads.view(-1, 1, 1), torch.arange(part.shape[1], device=part.device).unsqueeze(-1), rows]
    return own.flatten(1, 2)


def squared_error(rows: Rows, output: torch.Tensor) -> float:
    """Return the weighted squared distance of outputs (num_heads, group, num_rows, head_dim) from the exact ones."""
    return float(squared_errors(rows, output).sum())


def energies(rows: Rows, heads: Heads = ALL_HEADS) -> torch.Tensor:
    """Return the weighted squared norms of the exact outputs of some heads, (num_heads,); the outputs of all heads are
    read once, whatever is asked for."""
    return _weighed(rows.out_norms[heads], rows.root_weights[heads])


def squared_errors(rows: Rows, output: torch.Tensor) -> torch.Tensor:
    """Return the same of each head, (num_heads,)."""
    parts = zip(output, rows.out, strict=True)  # head by head: the differences of one are enough to hold
    distances = torch.stack([torch.linalg.vector_norm(made - exact, dim=-1) for made, exact in parts])
    return _weighed(distances, rows.root_weights)


def _weighed(norms: torch.Tensor, root_weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of w norm^2 of each head, (num_heads,), in float64 where the device has it."""
    return (norms * root_weights).square().sum((1, 2), dtype=sum_dtype(norms))


def held_out_rows(count: int, device: torch.device) -> torch.Tensor:
    """Return which of so many rows choose the ridge instead of being fitted, int64, increasing: the last span of each
    `HELD_OUT_EVERY`. The host does not wait for the device."""
    period, first = HELD_OUT_SPAN * HELD_OUT_EVERY, HELD_OUT_SPAN * (HELD_OUT_EVERY - 1)
    periods, rest = divmod(count, period)
    places = torch.arange(periods * HELD_OUT_SPAN + max(0, rest - first), device=device)
    return places // HELD_OUT_SPAN * period + first + places % HELD_OUT_SPAN


def attention_rows(
    rows: Block,
    keys: torch.Tensor,
    positions: torch.Tensor,
    biases: torch.Tensor | None = None,
    *,
    weighted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a least squares problem: attention to document keys, multiplied by the root weights where
    ``weighted``, (num_heads, rows, num_keys); and the attention that is left to prefix and local keys, (num_heads,
    rows). With biases under the compacted normaliser (`fitted_attention`), without under the full one
    (`kept_attention`); shapes as there. Half-precision rows that see all keys go through a kernel that writes them at
    once.
    """
    if (
        rows.document_stop is None
        and attention.is_fast(rows.queries)
        and attention.kernel_usable("kept_shares", rows.queries)
    ):
        return _rows_by_kernel(rows, *for_each(rows, keys, biases), weighted)
    if biases is None:
        shares, near_weights = kept_attention(rows, keys, positions), rows.near_share.exp()
    else:
        shares, near_weights = fitted_attention(rows, keys, biases, positions)
    return shares * rows.root_weights.unsqueeze(-1).to(shares.dtype) if weighted else shares, near_weights


def _rows_by_kernel(
    rows: Block, keys: torch.Tensor, biases: torch.Tensor | None, weighted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from compactor_kernels.kept_shares import kept_shares

    shares, rest = kept_shares(
        rows.queries,
        keys.to(rows.queries.dtype).contiguous(),
        (keys.new_zeros(keys.shape[:2]) if biases is None else biases).float().contiguous(),
        (-rows.lse).contiguous(),
        scaling=rows.scaling,
        near_share=None if biases is None else rows.near_share.contiguous(),
        root_weights=rows.root_weights.contiguous() if weighted else None,
    )
    return shares, rows.near_share.exp() if rest is None else rest


def fitted_attention(
    rows: Block, kept_keys: torch.Tensor, biases: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention to the kept keys under the compacted normaliser, (num_heads, rows, num_kept), and the attention
    that is left to prefix and local keys together, (num_heads, rows).

    kept_keys (num_heads, num_kept, head_dim), biases and kept (num_heads, num_kept), or all without heads. Taken in
    logarithms: a row that looked at one key which is not kept may have nothing else within range of a float.
    """
    scores = attention.shifted_scores(rows.queries, *for_each(rows, kept_keys, biases), rows.scaling, -rows.lse)
    hide_later(scores, rows, kept, -math.inf)
    shift = torch.logaddexp(scores.logsumexp(-1), rows.near_share)  # lse' - lse
    scores -= shift.unsqueeze(-1)
    return attention.exponential_of(scores, rows.queries), (rows.near_share - shift).exp()


def kept_attention(rows: Block, stored_keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Attention of a block of rows to some document keys under the full normaliser.

    stored_keys: (num_heads, num_keys, head_dim); positions: (num_heads, num_keys) int64; or both without heads. Returns
    (num_heads, rows, num_keys), float16 where `attention.is_fast`, else float32.
    """
    keys, _ = for_each(rows, stored_keys, None)
    shares = attention.exponentials(rows.queries, keys, rows.scaling, -rows.lse)
    hide_later(shares, rows, positions, 0.0)
    return shares


def for_each(rows: Block, keys: torch.Tensor, biases: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Repeat keys (num_keys, head_dim) and biases (num_keys,) for all heads of the rows, without a copy; those that are
    given for each head stay as they are."""
    count = len(rows.queries)
    return keys.expand(count, -1, -1), None if biases is None else biases.expand(count, -1)


def hide_later(scores: torch.Tensor, rows: Block, positions: torch.Tensor, value: float) -> None:
    """Fill the entries of document keys, at positions (num_heads, num_keys) or (num_keys,), that a row does not see."""
    if rows.document_stop is not None:
        scores.masked_fill_(positions.unsqueeze(-2) >= rows.document_stop.unsqueeze(-1), value)


def fitted_output(
    rows: Rows,
    kept_keys: torch.Tensor,
    kept_values: torch.Tensor,
    biases: torch.Tensor,
    kept: torch.Tensor,
    heads: Heads = ALL_HEADS,
) -> torch.Tensor:
    """Return attention of the rows of some heads over their compacted selves, (num_heads, group, num_rows, head_dim);
    shapes as `fitted_attention`."""
    out = torch.empty(rows.out[heads].shape, device=rows.out.device)
    stop = 0
    for block in rows.blocks(biases.shape[-1], heads):
        shares, near_weights = attention_rows(block, kept_keys, kept, biases, weighted=False)
        part = attention.multiply(shares, for_each(block, kept_values, None)[0])
        part += near_weights.unsqueeze(-1) * block.near
        start, stop = stop, stop + part.shape[1] // out.shape[1]
        out[:, :, start:stop] = part.view(len(out), out.shape[1], -1, out.shape[-1])
    return out
