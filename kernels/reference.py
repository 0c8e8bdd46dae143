"""Knows the mathematics of kernels in plain torch, on any device; that of others is in reference_*.py. Knows no Triton.

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


class FitRows(NamedTuple):
    """Rows of the KV heads of a layer, their groups flattened, and their exact attention; float32 but for queries."""

    queries: torch.Tensor  # (num_heads, num_rows, head_dim)
    weights: torch.Tensor  # (num_heads, num_rows)
    lse: torch.Tensor  # (num_heads, num_rows): what scores are counted from
    near_share: torch.Tensor  # (num_heads, num_rows): the score of what a row sees besides; -inf where that is nothing
    near: torch.Tensor  # (num_heads, num_rows, head_dim): its output
    out: torch.Tensor  # (num_heads, num_rows, head_dim): the output to be reproduced


class Gradients(NamedTuple):
    """Gradients with respect to the padded keys, biases and values of a layer; 0 where there is no key."""

    by_key: torch.Tensor  # (num_heads, longest, head_dim)
    by_bias: torch.Tensor  # (num_heads, longest)
    by_value: torch.Tensor  # (num_heads, longest, head_dim)


def biased_attention_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    biases: torch.Tensor,
    offsets: torch.Tensor | Sequence[int],
    *,
    scaling: float,
    num_documents: int = 1,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> PartialAttention:
    """Attend to ragged kept keys that the sequences of a batch share; twin of `biased_decode`.

        lse_i = log sum_j exp(scaling q_i.k_j + b_j),   out_i = sum_j exp(scaling q_i.k_j + b_j - lse_i) v_j

    queries: (batch, num_heads, q_len, head_dim), any floating type and strides; keys, values:
    (num_kept, head_dim), the KV heads one after another, head h owns rows offsets[h]:offsets[h + 1];
    biases: (num_kept,), natural logarithm, added to the scaled score (-inf hides a key); offsets:
    (num_kv_heads + 1,) int32, or the same numbers on the host, which saves a device sync. Query head h
    reads KV head h // (num_heads // num_kv_heads). There is no causal mask: the document precedes every
    query. ``num_documents`` and ``scales`` as in the kernel.

    Everything is computed and returned in float32, in float64 where the queries are float64.
    """
    batch, num_heads, q_len, head_dim = queries.shape
    bounds = offsets.tolist() if isinstance(offsets, torch.Tensor) else list(offsets)
    if num_documents > 1:
        heads = (len(bounds) - 1) // num_documents
        parts = [
            biased_attention_reference(
                own, keys, values, biases, bounds[i * heads : (i + 1) * heads + 1], scaling=scaling, scales=scales
            )
            for i, own in enumerate(queries.chunk(num_documents))
        ]
        return PartialAttention(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))
    num_kv_heads = len(bounds) - 1
    exact = torch.promote_types(queries.dtype, torch.float32)
    if scales is not None:
        keys, values = (part.to(exact) * scale.unsqueeze(1) for part, scale in zip((keys, values), scales, strict=True))
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


def quantise(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors as int8, and the factor of each: symmetric, to the nearest, the largest component 127.

    vectors: (num_kept, head_dim), any floating type. Returns (num_kept, head_dim) int8 and (num_kept,) float32; a
    component is at most half a factor off. A vector of zeros has factor 1.
    """
    largest = vectors.float().abs().amax(-1)
    scales = torch.where(largest > 0, largest / 127.0, 1.0)
    return (vectors.float() / scales.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scales


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


def refine_gradients_reference(
    rows: FitRows,
    index: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | Sequence[int],
    scales: torch.Tensor,
    *,
    scaling: float,
) -> Gradients:
    """Gradients of half the weighted squared error of attention's output on some rows; twin of what
    the kernels of refine_gradients.py compute.

        S_ij = s q_i.k_j + b_j - lse_i,   shift_i = log(exp(near_share_i) + sum_j exp(S_ij))
        P_ij = exp(S_ij - shift_i)
        out'_i = exp(near_share_i - shift_i) near_i + sum_j P_ij v_j,   e_i = w_i (out'_i - out_i)
        dV = P^T e,   dS_ij = P_ij (e_i.v_j - e_i.out'_i),   dK = s dS^T Q,   db_j = sum_i dS_ij

    index: (num_drawn,) int64, row numbers, repeats counted as often as they come; keys, values: (num_heads, longest,
    head_dim), of which head h owns the first ``lengths[h]``; biases: (num_heads, longest); scales: (3, num_heads), what
    the gradients with respect to keys, biases and values are multiplied by.

    Keys are rounded to the type of the queries; everything else is computed and returned in float32, in float64 where
    the queries are float64.
    """
    exact = torch.promote_types(rows.queries.dtype, torch.float32)
    keys = keys.to(rows.queries.dtype)
    gradients = Gradients(*(torch.zeros_like(part, dtype=exact) for part in (keys, biases, values)))
    for head, count in enumerate(lengths.tolist() if isinstance(lengths, torch.Tensor) else lengths):
        own_keys, own_biases, own_values = (part[head, :count].to(exact) for part in (keys, biases, values))
        for drawn in index.split(max(1, SCORE_ELEMENTS // max(1, count))):
            own = FitRows(*(part[head, drawn].to(exact) for part in rows))
            parts = _head_gradients(own, own_keys, own_biases, own_values, scaling)
            for total, part in zip(gradients, parts, strict=True):
                total[head, :count] += part
    by_key, by_bias, by_value = gradients
    of_keys, of_biases, of_values = scales.to(exact).unsqueeze(-1)
    return Gradients(by_key * of_keys.unsqueeze(-1), by_bias * of_biases, by_value * of_values.unsqueeze(-1))


def _head_gradients(
    rows: FitRows, keys: torch.Tensor, biases: torch.Tensor, values: torch.Tensor, scaling: float
) -> Gradients:
    """Return the gradients of one head on all of ``rows``: (num_rows, ...) each."""
    scores = scaling * (rows.queries @ keys.T) - rows.lse.unsqueeze(-1) + biases  # (num_rows, num_kept)
    shift = torch.logaddexp(scores.logsumexp(-1), rows.near_share)
    shares = (scores - shift.unsqueeze(-1)).exp()
    out = shares @ values + (rows.near_share - shift).exp().unsqueeze(-1) * rows.near
    error = (out - rows.out) * rows.weights.unsqueeze(-1)
    by_score = shares * (error @ values.T - (error * out).sum(-1, keepdim=True))
    return Gradients(scaling * (by_score.T @ rows.queries), by_score.sum(0), shares.T @ error)


def kept_shares_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    row_shift: torch.Tensor,
    *,
    scaling: float,
    near_share: torch.Tensor | None = None,
    root_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weighted attention of rows to kept keys, and the rest; twin of `kept_shares`, shapes as there.

    Everything is computed and returned in float32, in float64 where the queries are float64.
    """
    exact = torch.promote_types(queries.dtype, torch.float32)
    scores = scaling * torch.bmm(queries.to(exact), keys.to(exact).mT)
    scores += biases.to(exact).unsqueeze(1) + row_shift.to(exact).unsqueeze(-1)
    rest = None
    if near_share is not None:
        near = near_share.to(exact)
        normaliser = torch.logaddexp(scores.logsumexp(-1), near)
        scores -= normaliser.unsqueeze(-1)
        rest = (near - normaliser).exp()
    shares = scores.exp_()
    return shares if root_weights is None else shares * root_weights.to(exact).unsqueeze(-1), rest
