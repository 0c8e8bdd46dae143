"""Knows how Gram matrices are accumulated: float32 products of blocks of rows, summed in float64."""

from __future__ import annotations

import torch

LEAF = 256  # columns below which splitting a symmetric product no longer pays


class GramSum:
    """Running sums of X^T X and X^T Y over blocks of rows, float64 on ``device``."""

    def __init__(self, num_columns: int, num_targets: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_columns, num_columns, dtype=torch.float64, device=device)
        self.rhs = torch.zeros(num_columns, num_targets, dtype=torch.float64, device=device)
        self.energy = 0.0

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a block: rows (n, num_columns) and targets (n, num_targets), float32, already scaled by sqrt(weight)."""
        if rows.shape[0]:
            add_symmetric_product(self.gram, rows)
            self.rhs += (rows.T @ targets).to(self.rhs)
            self.energy += float(targets.double().square().sum())


def add_symmetric_product(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to ``total`` in place, computing each off-diagonal block once (half the arithmetic of a plain
    product)."""
    num_columns = rows.shape[1]
    if num_columns <= LEAF:
        total += (rows.T @ rows).to(total)
        return
    half = num_columns // 2
    left, right = rows[:, :half], rows[:, half:]
    add_symmetric_product(total[:half, :half], left)
    add_symmetric_product(total[half:, half:], right)
    cross = (left.T @ right).to(total)
    total[:half, half:] += cross
    total[half:, :half] += cross.T
