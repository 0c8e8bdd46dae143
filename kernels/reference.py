"""Knows the mathematics of every kernel in plain torch, on any device. Knows no Triton.

Each function is the twin of one kernel: the definition that the kernel is tested against, and what the
product runs where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

SCORE_ELEMENTS = 1 << 24  # scores held at once: 64 MiB in float32


class PartialAttention(NamedTuple):
    """Attention over a part of the keys; two parts are merged by their log-sum-exps."""

    out: torch.Tensor  # (batch, num_heads, q_len, head_dim); 0 where there is no key
    lse: torch.Tensor  # (batch, num_heads, q_len), natural logarithm; -inf where there is no key


def biased_attention_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    biases: torch.Tensor,
    offsets: torch.Tensor | Sequence[int],
    *,
    scaling: float,
) -> PartialAttention:
    """Attend to ragged kept keys that all sequences of a batch share; twin of `biased_decode`.

        lse_i = log sum_j exp(scaling q_i.k_j + b_j),   out_i = sum_j exp(scaling q_i.k_j + b_j - lse_i) v_j

    queries: (batch, num_heads, q_len, head_dim), any floating type and strides; keys, values:
    (num_kept, head_dim), the KV heads one after another, head h owns rows offsets[h]:offsets[h + 1];
    biases: (num_kept,), natural logarithm, added to the scaled score (-inf hides a key); offsets:
    (num_kv_heads + 1,) int32, or the same numbers on the host, which saves a device sync. Query head h
    reads KV head h // (num_heads // num_kv_heads). There is no causal mask: the document precedes every
    query.

    Everything is computed and returned in float32, in float64 where the queries are float64.
    """
    batch, num_heads, q_len, head_dim = queries.shape
    bounds = offsets.tolist() if isinstance(offsets, torch.Tensor) else list(offsets)
    num_kv_heads = len(bounds) - 1
    exact = torch.promote_types(queries.dtype, torch.float32)
    # the rows of a group, for all sequences, share their keys: (num_kv_heads, batch, group, q_len, head_dim)
    grouped = queries.unflatten(1, (num_kv_heads, num_heads // num_kv_heads)).transpose(0, 1)
    out = torch.zeros(grouped.shape, dtype=exact, device=queries.device)
    lse = torch.full(grouped.shape[:-1], -math.inf, dtype=exact, device=queries.device)
    for head, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            head_out, head_lse = _attend_head(
                grouped[head].reshape(-1, head_dim).to(exact),
                keys[start:stop].to(exact),
                values[start:stop].to(exact),
                biases[start:stop].to(exact),
                scaling,
            )
            out[head] = head_out.view(grouped.shape[1:])
            lse[head] = head_lse.view(grouped.shape[1:-1])
    return PartialAttention(
        out.transpose(0, 1).reshape(batch, num_heads, q_len, head_dim),
        lse.transpose(0, 1).reshape(batch, num_heads, q_len),
    )


def _attend_head(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, biases: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (num_rows, head_dim) and lse (num_rows,) of one KV head, a block of rows at a time."""
    block = max(1, SCORE_ELEMENTS // keys.shape[0])
    parts = [_attend_rows(part, keys, values, biases, scaling) for part in rows.split(block)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend_rows(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, biases: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.addmm(biases, rows, keys.T, alpha=scaling)  # (num_rows, num_kept)
    # clamped so that a row whose biases are all -inf gives weights 0, not NaN
    peak = scores.detach().amax(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = scores.sub_(peak).exp_()
    mass = weights.sum(dim=1, keepdim=True)
    out = (weights @ values) / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    return out, (peak + mass.log()).squeeze(1)
