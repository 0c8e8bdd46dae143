"""Knows how Gram matrices of some heads are accumulated: products of blocks of rows, summed in float64.

Rows in float16 (attention on an NVIDIA GPU) are multiplied on the matrix units with float32 sums, by a kernel that adds
spans of a few thousand rows in float64, or by torch. Others are float32.

There, neighbouring rows look at the same few keys, so a block of one head drops the columns that carry almost none of
its energy; blocks of several heads, which hold more rows, drop none.
With `DROPPED_ENERGY` e, each block X is replaced by X' with ||X - X'||_F <= sqrt(e) ||X||_F: in both sums alike, so
that the problem stays a least squares problem, of a matrix that near.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compactor.attention import half_product
from compactor.kernel_trial import usable
from compactor_kernels.reference_targets import SECOND_HALF

LEAF = 256  # columns below which splitting a symmetric product no longer pays
DROPPED_ENERGY = 1e-6  # fraction of a block's squared Frobenius norm that may be left out
TRIED_COLUMNS = 64  # the kernel is tried once, not for every number of columns
WORTH_DROPPING = 0.9  # of the columns: above it, gathering costs more than it saves


class GramSum:
    """Running sums of X^T X and X^T Y over blocks of rows of some heads, float64 on ``device``."""

    def __init__(self, num_heads: int, num_columns: int, num_targets: int, device: torch.device) -> None:
        self.gram = torch.zeros(num_heads, num_columns, num_columns, dtype=torch.float64, device=device)
        self.rhs = torch.zeros(num_heads, num_columns, num_targets, dtype=torch.float64, device=device)
        self.energy = torch.zeros(num_heads, dtype=torch.float64, device=device)  # sum of squares of the targets

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a block: rows (num_heads, n, num_columns) and targets (num_heads, n, num_targets), already scaled by
        sqrt(weight); targets are float32, rows float32 or, on an NVIDIA GPU, float16."""
        if not rows.shape[1]:
            return
        self.energy += as_sum(energies_of(targets), self.energy)
        if rows.dtype == torch.float16:
            add_half_gram(self.gram, rows)
            self.rhs += half_times_float(rows, targets)
        elif len(rows) == 1:
            self._add_active(self.gram[0], self.rhs[0], rows[0], targets[0])
        else:
            add_symmetric_product(self.gram, rows)
            self.rhs += as_sum(rows.mT @ targets, self.rhs)

    def add_halves(self, rows: torch.Tensor, halves: torch.Tensor, units: torch.Tensor, energy: torch.Tensor) -> None:
        """Add a block whose targets are given as two float16 numbers: rows (num_heads, n, num_columns) float16; halves
        (num_heads, n, 2 num_targets), the first halves before the second, in the units (num_heads,) of the heads (see
        `compactor_kernels.value_targets`); energy (num_heads,): sum of squares of the targets."""
        if not rows.shape[1]:
            return
        self.energy += as_sum(energy, self.energy)
        add_half_gram(self.gram, rows)
        self.rhs += as_sum(times_halves(rows, halves) * units.view(-1, 1, 1), self.rhs)

    @staticmethod
    def _add_active(gram: torch.Tensor, rhs: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> None:
        active = active_columns(rows)
        if len(active) > WORTH_DROPPING * rows.shape[1]:
            add_symmetric_product(gram, rows)
            rhs += as_sum(rows.T @ targets, rhs)
        elif len(active):
            rows = rows[:, active]
            product = rows.new_zeros(len(active), len(active))
            add_symmetric_product(product, rows)
            active = active.to(gram.device)
            rhs.index_add_(0, active, as_sum(rows.T @ targets, rhs))
            gram.view(-1).index_add_(
                0, (active.unsqueeze(1) * gram.shape[1] + active).view(-1), as_sum(product, gram).view(-1)
            )


def add_half_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to ``total`` (num_heads, n, n) in place: rows (num_heads, num_rows, n) float16."""
    if kernel_runs(rows):
        from compactor_kernels.gram import add_gram

        add_gram(total, rows)
    else:
        total += half_product(rows.mT, rows)


def half_times_float(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return rows^T targets, summed on the matrix units in float32 or, by the kernel, in float64: rows (num_heads, n,
    a) float16; targets (num_heads, n, b) float32, each column as the sum of two float16 of 11 bits."""
    unit = targets.abs().amax(1, keepdim=True).clamp_min(1e-30)
    scaled = targets / unit
    high = scaled.half()
    low = (scaled - high.float()).mul_(SECOND_HALF).half()
    halves = torch.cat([high, low], dim=-1)
    if kernel_runs(rows):
        from compactor_kernels.gram import ALIGNMENT

        num_halves = halves.shape[-1]
        halves = torch.nn.functional.pad(halves, (0, -num_halves % ALIGNMENT))[..., :num_halves]
    return times_halves(rows, halves) * unit


def times_halves(rows: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """Return rows^T (first + second / SECOND_HALF), (num_heads, a, b), float32 or, by the kernel, float64, for rows
    (num_heads, n, a) and halves (num_heads, n, 2 b) float16, the first ones before the second."""
    if kernel_runs(rows):
        from compactor_kernels.gram import add_product

        shape = len(rows), rows.shape[-1], halves.shape[-1]
        products = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        add_product(products, rows, halves)
    else:
        products = half_product(rows.mT, halves)
    first, second = products.chunk(2, dim=-1)
    return first + second / SECOND_HALF


def kernel_runs(rows: torch.Tensor) -> bool:
    """Whether the kernel of Gram matrices runs, and runs rightly, for float16 rows on this device."""
    return usable("gram", rows.device, torch.float16, TRIED_COLUMNS)


def sum_dtype(rows: torch.Tensor) -> torch.dtype:
    """Return the type in which sums over rows are taken: float64 where the device has it."""
    return torch.float32 if rows.device.type == "mps" else torch.float64


def as_sum(product: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return a product on the device and in the type of ``total``; it is moved first, since MPS has no float64."""
    return product.to(total.device).to(total.dtype)


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return numbers as a tensor on a device, as `torch.tensor` does, but the host does not wait for an NVIDIA GPU to
    get them."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=device.type == "cuda")


def energy_of(rows: torch.Tensor) -> float:
    """Return the sum of squares, in float64 where the device has it."""
    return float(rows.square().sum(dtype=sum_dtype(rows)))


def energies_of(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each head, (num_heads,), in float64 where the device has it."""
    return rows.square().flatten(1).sum(1, dtype=sum_dtype(rows))


def active_columns(rows: torch.Tensor) -> torch.Tensor:
    """Return the indices of the columns that carry all but `DROPPED_ENERGY` of the block's energy, increasing."""
    energy = rows.square().sum(0)
    by_energy = energy.sort()
    spent = by_energy.values.double().cumsum(0) if energy.device.type != "mps" else by_energy.values.cumsum(0)
    return by_energy.indices[spent > DROPPED_ENERGY * spent[-1]].sort().values


def add_symmetric_product(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to ``total`` (..., n, n) in place, computing each off-diagonal block once (half the arithmetic of
    a plain product)."""
    num_columns = rows.shape[-1]
    if num_columns <= LEAF:
        total += as_sum(rows.mT @ rows, total)
        return
    half = num_columns // 2
    left, right = rows[..., :half], rows[..., half:]
    add_symmetric_product(total[..., :half, :half], left)
    add_symmetric_product(total[..., half:, half:], right)
    cross = as_sum(left.mT @ right, total)
    total[..., :half, half:] += cross
    total[..., half:, :half] += cross.mT
