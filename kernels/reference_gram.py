"""Knows X^T X and X^T Y of many rows in plain torch, on any device: the twins of `gram`. Knows no Triton."""

from __future__ import annotations

import torch

PART_ELEMENTS = 1 << 24  # numbers of rows that are converted at once: 128 MiB in float64


def add_gram_reference(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X^T X to ``total`` in place and mirror its lower half to the upper; twin of `add_gram`, shapes as there.

    rows: any floating type. Everything is computed in the type of ``total``, float32 or float64.
    """
    add_product_reference(total, rows, rows)
    total.copy_(total.tril() + total.tril(-1).mT)


def add_product_reference(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add X^T Y to ``total`` in place; twin of `add_product`, shapes as there, types as in `add_gram_reference`."""
    per_row = left.shape[0] * max(left.shape[2], right.shape[2])
    step = max(1, PART_ELEMENTS // max(1, per_row))
    for x, y in zip(left.split(step, dim=1), right.split(step, dim=1), strict=True):
        total += torch.bmm(x.to(total.dtype).mT, y.to(total.dtype))
