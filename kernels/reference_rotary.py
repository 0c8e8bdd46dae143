"""Knows rotary position embedding in plain torch, on any device. Knows no Triton.

The definition that the kernel `rotary` is tested against.
"""

from __future__ import annotations

import torch


def rotate_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    epsilon: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys turned by the angles of their rows; twin of `rotate`.

    queries: (batch, num_heads, num_rows, head_dim), keys: (batch, num_kv_heads, num_rows, head_dim) of any floating
    type; cos, sin: (batch or 1, num_rows, head_dim). Every operation is rounded to that type. ``norm_weights``: RMS
    norms of queries and of keys that come first, (head_dim,) each, computed in float32 at least.
    """
    if norm_weights is not None:
        exact = torch.promote_types(queries.dtype, torch.float32)
        queries, keys = (
            torch.nn.functional.rms_norm(part.to(exact), weight.shape, weight.to(exact), epsilon).to(part.dtype)
            for part, weight in zip((queries, keys), norm_weights, strict=True)
        )
    turned = [
        part * cos.unsqueeze(1)
        + torch.cat([-part[..., part.shape[-1] // 2 :], part[..., : part.shape[-1] // 2]], -1) * sin.unsqueeze(1)
        for part in (queries, keys)
    ]
    return turned[0], turned[1]
