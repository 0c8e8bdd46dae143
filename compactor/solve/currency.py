"""Knows how to make errors of different heads and layers comparable. Knows no keys and no queries.

An error of head h reaches the residual stream through the output projection, and matters relative to the stream's size:

    weight of a row of head h in layer l = (||W_O,h||_F / sqrt(head_dim))^2 / median_norm_l^2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def output_gains(model: PreTrainedModel, num_heads: int, head_dim: int) -> torch.Tensor:
    """Return ||W_O,h||_F / sqrt(head_dim) as (num_layers, num_heads) float32 on the CPU.

    The projection is applied to unit vectors instead of read, so that quantised weights work as they load. Where a norm
    follows the projection (Gemma-3), its weight and the projection's own scale replace each other: the gain is then
    relative to the projection's root-mean-square response.
    """
    gains = []
    for block in model.get_decoder().layers:
        projection = block.self_attn.o_proj
        parameter = next(block.parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else model.dtype
        width = num_heads * head_dim
        unit = torch.eye(width, dtype=dtype, device=parameter.device)
        response = (projection(unit) - projection(torch.zeros_like(unit[:1]))).float()  # (width, hidden)
        if hasattr(block, "pre_feedforward_layernorm"):
            norm = block.post_attention_layernorm
            response = response * (norm(torch.ones_like(response[:1], dtype=dtype)).float())
            response = response / response.square().sum().div(width).sqrt().clamp_min(1e-12) * response.shape[-1] ** 0.5
        per_head = response.view(num_heads, -1).norm(dim=-1) / head_dim**0.5
        gains.append(per_head.cpu())
    return torch.stack(gains)
