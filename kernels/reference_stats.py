"""Knows the mathematics of attention statistics in plain torch, on any device. Knows no Triton.

The twin of `attention_stats`: the definition that the kernel is tested against.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

SCORE_ELEMENTS = 1 << 24  # scores held at once: 64 MiB in float32


class AttentionStats(NamedTuple):
    """What each key receives, (num_kv_heads, kv_len); None where it was not asked for. A key no row sees has 0."""

    squares: torch.Tensor | None  # sum over rows of a^2
    shares: torch.Tensor | None  # sum over rows of a
    peaks: torch.Tensor | None  # largest a


def attention_stats_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    row_shift: torch.Tensor,
    *,
    scaling: float,
    stops: torch.Tensor | None = None,
    squares: bool = True,
    shares: bool = False,
    peaks: bool = False,
) -> AttentionStats:
    """Return what each key receives from the rows that see it; twin of `attention_stats`.

        a_ij = exp(scaling q_i.k_j + row_shift_i),   squares_j = sum_i a_ij^2,   shares_j = sum_i a_ij,
        peaks_j = max_i a_ij

    queries: (num_heads, num_rows, head_dim), keys: (num_kv_heads, kv_len, head_dim), any floating type and strides;
    query head h belongs to KV head h // (num_heads // num_kv_heads). row_shift: (num_heads, num_rows), natural
    logarithm; -inf takes a row out. stops: (num_rows,) integers: row i of every head sees the keys before stops[i];
    None: every row sees every key.

    Everything is computed and returned in float32, in float64 where the queries are float64.
    """
    num_kv_heads, kv_len, _ = keys.shape
    exact = torch.promote_types(queries.dtype, torch.float32)
    grouped = queries.unflatten(0, (num_kv_heads, -1))  # (num_kv_heads, group, num_rows, head_dim)
    shift = row_shift.to(exact).unflatten(0, (num_kv_heads, -1)).unsqueeze(-1)
    positions = torch.arange(kv_len, device=keys.device)
    transposed = keys.to(exact).mT
    sums, totals, largest = (torch.zeros(num_kv_heads, kv_len, dtype=exact, device=keys.device) for _ in range(3))
    step = max(1, SCORE_ELEMENTS // max(1, len(queries) * kv_len))
    for start in range(0, queries.shape[1], step):
        rows = slice(start, start + step)
        block = grouped[:, :, rows].to(exact)
        scores = torch.bmm(block.flatten(1, 2), transposed).view(*block.shape[:3], kv_len)
        logs = scores.mul_(scaling).add_(shift[:, :, rows])  # (num_kv_heads, group, rows, kv_len)
        if stops is not None:
            logs.masked_fill_(positions >= stops[rows].unsqueeze(-1), -math.inf)
        powers = logs.exp_().flatten(1, 2)
        if peaks and powers.shape[1]:
            largest = torch.maximum(largest, powers.amax(1))
        totals += powers.sum(1)
        sums += powers.square_().sum(1)
    return AttentionStats(sums if squares else None, totals if shares else None, largest if peaks else None)
