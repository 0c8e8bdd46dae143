"""Knows products of a few rows with weight matrices in plain torch, on any device. Knows no Triton.

The definitions that the kernels of `gemv` are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gemv_reference(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Return W x + b of every row x, computed in float32 at least; twin of `gemv`.

    rows: (num_rows, num_inputs), weights: (size, num_inputs) each.
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    given = [None] * len(weights) if biases is None else [bias.to(exact) for bias in biases]
    linear = torch.nn.functional.linear
    x = rows.to(exact)
    return [linear(x, weight.to(exact), bias).to(rows.dtype) for weight, bias in zip(weights, given, strict=True)]


def gated_gemv_reference(rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, activation: str) -> torch.Tensor:
    """Return act(G x) * (U x) of every row x, computed in float32 at least; twin of `gated_gemv`."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    score, factor = gemv_reference(rows.to(exact), [gate.to(exact), up.to(exact)])
    functional = torch.nn.functional
    shaped = functional.silu(score) if activation == "silu" else functional.gelu(score, approximate="tanh")
    return (shaped * factor).to(rows.dtype)
