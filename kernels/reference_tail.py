"""Knows the mathematics of attention to the tails of a batch in plain torch, on any device. Knows no Triton."""

from __future__ import annotations

import math

import torch

from compactor_kernels.reference import PartialAttention


def tail_decode_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    tail_end: int | torch.Tensor,
    *,
    scaling: float,
    document: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> PartialAttention:
    """Attend to each sequence's own tail and merge with a given attention; twin of `tail_decode`, shapes as there.

    What is given counts as one more key, whose score is its log-sum-exp and whose value is its output. Everything is
    computed and returned in float32, in float64 where the queries are float64.
    """
    batch, num_heads, q_len = queries.shape[:3]
    num_kv_heads, tail_len = keys.shape[1:3]
    exact = torch.promote_types(queries.dtype, torch.float32)
    grouped = queries.unflatten(1, (num_kv_heads, num_heads // num_kv_heads)).to(exact)
    scores = scaling * torch.matmul(grouped, keys.to(exact).unsqueeze(2).mT)
    columns = torch.arange(tail_len, device=queries.device)
    last = tail_end + torch.arange(q_len, device=queries.device).unsqueeze(-1)
    visible = (columns <= last) & (columns >= padding.view(-1, 1, 1))  # (batch, q_len, tail_len)
    scores.masked_fill_(~visible.view(batch, 1, 1, q_len, tail_len), -math.inf)
    given_lse = torch.full(grouped.shape[:-1], -math.inf, dtype=exact, device=queries.device)
    given_out = torch.zeros_like(grouped)
    if document is not None:
        given_out, given_lse = document[0].to(exact).view(grouped.shape), document[1].to(exact).view(given_lse.shape)
    lse = torch.logaddexp(scores.logsumexp(-1), given_lse)
    shift = torch.where(lse.isinf(), 0.0, lse)  # a row that sees nothing: out 0
    out = torch.matmul((scores - shift.unsqueeze(-1)).exp(), values.to(exact).unsqueeze(2))
    out += (given_lse - shift).exp().unsqueeze(-1) * given_out
    return PartialAttention(out.flatten(1, 2), lse.flatten(1, 2))
