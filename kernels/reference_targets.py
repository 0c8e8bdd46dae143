"""Knows the targets of the least squares of the values in plain torch, on any device. Knows no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

SECOND_HALF = 2048.0  # what the second of two float16 numbers is multiplied by
LARGEST_HALF = 65504.0  # of float16
ALIGNMENT = 8  # columns: rows of the result begin at multiples of 16 bytes, as the matrix units like them


class ValueTargets(NamedTuple):
    """Targets of some heads as float16 numbers, and their sums of squares."""

    halves: torch.Tensor  # (num_heads, n, 2 head_dim): first halves, then second halves times `SECOND_HALF`
    energy: torch.Tensor  # (num_heads,) float64


def value_targets_reference(
    product: torch.Tensor,
    out: torch.Tensor,
    near: torch.Tensor,
    near_weights: torch.Tensor,
    root_weights: torch.Tensor,
    units: torch.Tensor,
    *,
    heads: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> ValueTargets:
    """Return what kept keys with their own values leave to be explained; twin of `value_targets`, shapes as there.

    Targets are computed in float32, in float64 where ``out`` is float64.
    """
    exact = torch.promote_types(out.dtype, torch.float32)
    wanted, others = (_chosen(part, heads, rows).to(exact) for part in (out, near))
    targets = (wanted - near_weights.unsqueeze(-1) * others) * root_weights.unsqueeze(-1) - product.to(exact)
    scaled = (targets / units.view(-1, 1, 1)).clamp(-LARGEST_HALF, LARGEST_HALF)
    scaled = scaled.masked_fill(targets.isinf(), torch.nan)
    num_heads, num_rows, head_dim = targets.shape
    width = -(-2 * head_dim // ALIGNMENT) * ALIGNMENT
    halves = torch.zeros(num_heads, num_rows, width, dtype=torch.float16, device=targets.device)
    first, second = halves[..., :head_dim], halves[..., head_dim : 2 * head_dim]
    first.copy_(scaled)
    second.copy_((scaled - first.to(exact)) * SECOND_HALF)
    return ValueTargets(halves[..., : 2 * head_dim], targets.double().square().sum((1, 2)))


def _chosen(part: torch.Tensor, heads: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    own = part if heads is None else part[heads]
    return (own if rows is None else own[:, :, rows]).flatten(1, 2)
