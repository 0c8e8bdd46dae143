"""Knows the mathematics of merging attention parts row by row in plain torch, on any device. Knows no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Part = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp of attention to some keys


class MergedRows(NamedTuple):
    """Attention of rows to all their keys, and to the near ones alone; leading dimensions as those of the parts."""

    near: torch.Tensor  # (num_kv_heads, group, num_rows, head_dim) float32, normalised among themselves
    near_lse: torch.Tensor  # (num_kv_heads, group, num_rows) float32
    out: torch.Tensor  # (num_kv_heads, group, num_rows, head_dim) float32
    lse: torch.Tensor  # (num_kv_heads, group, num_rows) float32


class ScoredRows(NamedTuple):
    """Attention of rows to all their keys, and what the document gives to it, summed up by KV head."""

    out: torch.Tensor  # (num_kv_heads, group, num_rows, head_dim), the type of the parts
    lse: torch.Tensor  # (num_kv_heads, group, num_rows) float32
    contrast: torch.Tensor  # (num_kv_heads,) float32: sum of w m ||o_document - o||^2, m the mass on the document
    mass: torch.Tensor  # (num_kv_heads,) float32: sum of w m
    centre: torch.Tensor  # (num_kv_heads, head_dim) float32: sum of w m^2 o_document
    centre_weight: torch.Tensor  # (num_kv_heads,) float32: sum of w m^2


class MeasuredRows(NamedTuple):
    """Attention of rows to compacted heads, and how far it is from the exact one."""

    out: torch.Tensor  # (num_kv_heads, group, num_rows, head_dim)
    errors: torch.Tensor  # (num_kv_heads,) float64: sum of w ||out - exact||^2
    thinned_errors: torch.Tensor  # (num_kv_heads,) float64: the same of one row in so many, times their number


def merge_rows_reference(near: Sequence[Part], document: Part) -> MergedRows:
    """Merge one or two near parts and the document's; twin of `merge_rows`, shapes as there.

    Everything is computed and returned in float32, in float64 where the outputs are float64.
    """
    near_out, near_lse = _exact(near[0])
    for part in near[1:]:
        near_out, near_lse, _ = _merge(near_out, near_lse, *_exact(part))
    out, lse, _ = _merge(near_out, near_lse, *_exact(document))
    return MergedRows(near_out, near_lse, out, lse)


def merge_scored_reference(near: Sequence[Part], document: Part, root_weights: torch.Tensor) -> ScoredRows:
    """Merge for the scores of keys; twin of `merge_scored`, shapes as there; types as `merge_rows_reference`."""
    merged = merge_rows_reference(near, document)
    document_out, document_lse = _exact(document)
    _, _, mass = _merge(merged.near, merged.near_lse, document_out, document_lse)
    weighted = root_weights.to(mass.dtype).square() * mass
    by_mass = weighted * mass
    return ScoredRows(
        merged.out,
        merged.lse,
        (weighted * (document_out - merged.out).square().sum(-1)).sum((1, 2)),
        weighted.sum((1, 2)),
        (by_mass.unsqueeze(-1) * document_out).sum((1, 2)),
        by_mass.sum((1, 2)),
    )


def merge_measured_reference(
    document: Part, near: Part, exact: torch.Tensor, root_weights: torch.Tensor, *, step: int = 1
) -> MeasuredRows:
    """Merge and measure; twin of `merge_measured`, shapes as there; outputs as `merge_rows_reference`."""
    out, _, _ = _merge(*_exact(document), *_exact(near))
    distances = ((out - exact).square().sum(-1) * root_weights.to(out.dtype).square()).double()
    return MeasuredRows(out, distances.sum((1, 2)), step * distances[:, :, ::step].sum((1, 2)))


def _exact(part: Part) -> Part:
    out, lse = part
    exact = torch.promote_types(out.dtype, torch.float32)
    return out.to(exact), lse.to(exact)


def _merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp of two parts, and the weight of the second; a row that sees nothing gives 0, -inf
    and 0."""
    lse = torch.logaddexp(lse_a, lse_b)
    shift = torch.where(lse.isinf(), 0.0, lse)
    weight_a, weight_b = (lse_a - shift).exp(), (lse_b - shift).exp()
    return out_a * weight_a.unsqueeze(-1) + out_b * weight_b.unsqueeze(-1), lse, weight_b
