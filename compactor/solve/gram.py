"""Knows how Gram matrices are accumulated: products of blocks of rows, summed in float64.

Rows in float16 (attention on an NVIDIA GPU) are multiplied on the matrix units with float32 sums. Others are float32.

There, neighbouring rows look at the same few keys, so a block drops the columns that carry almost none of its energy.
With `DROPPED_ENERGY` e, each block X is replaced by X' with ||X - X'||_F <= sqrt(e) ||X||_F: in both sums alike, so
that the problem stays a least squares problem, of a matrix that near.
"""

from __future__ import annotations

import torch

from compactor.attention import half_product

LEAF = 256  # columns below which splitting a symmetric product no longer pays
DROPPED_ENERGY = 1e-6  # fraction of a block's squared Frobenius norm that may be left out
WORTH_DROPPING = 0.9  # of the columns: above it, gathering costs more than it saves


class GramSum:
    """Running sums of X^T X and X^T Y over blocks of rows, float64 on ``device``."""

    def __init__(self, num_columns: int, num_targets: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_columns, num_columns, dtype=torch.float64, device=device)
        self.rhs = torch.zeros(num_columns, num_targets, dtype=torch.float64, device=device)
        self._energy = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def energy(self) -> float:
        """Sum of squares of the targets."""
        return float(self._energy)

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a block: rows (n, num_columns) and targets (n, num_targets), already scaled by
        sqrt(weight); targets are float32, rows float32 or, on an NVIDIA GPU, float16."""
        if not rows.shape[0]:
            return
        self._energy += as_sum(targets.square().sum(dtype=sum_dtype(targets)), self._energy)
        if rows.dtype == torch.float16:
            self._add_half(rows, targets)
        else:
            self._add_active(rows, targets)

    def _add_half(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        self.gram += half_product(rows.T[None], rows[None])[0]
        self.rhs += rows.float().T @ targets

    def _add_active(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        active = active_columns(rows)
        if len(active) > WORTH_DROPPING * rows.shape[1]:
            add_symmetric_product(self.gram, rows)
            self.rhs += as_sum(rows.T @ targets, self.rhs)
        elif len(active):
            rows = rows[:, active]
            product = rows.new_zeros(len(active), len(active))
            add_symmetric_product(product, rows)
            active = active.to(self.gram.device)
            self.rhs.index_add_(0, active, as_sum(rows.T @ targets, self.rhs))
            self.gram.view(-1).index_add_(
                0, (active.unsqueeze(1) * self.gram.shape[1] + active).view(-1), as_sum(product, self.gram).view(-1)
            )


def sum_dtype(rows: torch.Tensor) -> torch.dtype:
    """Return the type in which sums over rows are taken: float64 where the device has it."""
    return torch.float32 if rows.device.type == "mps" else torch.float64


def as_sum(product: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return a product on the device and in the type of ``total``; it is moved first, since MPS has no float64."""
    return product.to(total.device).to(total.dtype)


def energy_of(rows: torch.Tensor) -> float:
    """Return the sum of squares, in float64 where the device has it."""
    return float(rows.square().sum(dtype=sum_dtype(rows)))


def active_columns(rows: torch.Tensor) -> torch.Tensor:
    """Return the indices of the columns that carry all but `DROPPED_ENERGY` of the block's energy, increasing."""
    energy = rows.square().sum(0)
    by_energy = energy.sort()
    spent = by_energy.values.double().cumsum(0) if energy.device.type != "mps" else by_energy.values.cumsum(0)
    return by_energy.indices[spent > DROPPED_ENERGY * spent[-1]].sort().values


def add_symmetric_product(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to ``total`` in place, computing each off-diagonal block once (half the arithmetic of a plain
    product)."""
    num_columns = rows.shape[1]
    if num_columns <= LEAF:
        total += as_sum(rows.T @ rows, total)
        return
    half = num_columns // 2
    left, right = rows[:, :half], rows[:, half:]
    add_symmetric_product(total[:half, :half], left)
    add_symmetric_product(total[half:, half:], right)
    cross = as_sum(left.T @ right, total)
    total[:half, half:] += cross
    total[half:, :half] += cross.T
