"""Knows the end of a decoding step's attention in plain torch, on any device. Knows no Triton.

The definition that the kernel `step_decode` is tested against.
"""

from __future__ import annotations

import torch

from compactor_kernels.reference_tail import tail_decode_reference


def step_decode_reference(
    queries: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    tail_end: torch.Tensor,
    document: tuple[torch.Tensor, torch.Tensor],
    *,
    scaling: float,
) -> torch.Tensor:
    """Append one token to every tail, and attend to tail and kept keys; twin of `step_decode`.

    ``document``: out (batch, num_heads, 1, head_dim) and lse (batch, num_heads, 1) float32 over the kept keys; the rest
    as in the kernel. Writes column ``tail_end`` of the buffers. Returns (batch, num_heads, 1, head_dim) float32.
    """
    keys.index_copy_(2, tail_end, new_keys)
    values.index_copy_(2, tail_end, new_values)
    return tail_decode_reference(queries, keys, values, padding, tail_end, scaling=scaling, document=document).out
