"""Knows how a batch of positive definite systems is solved in plain torch, on any device, and how the kernels of
`cholesky` keep their factors. Knows no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

MAX_SIZE = 1536  # rows of a system that the kernels take: larger ones are worth a library's factorisation, one by one


@dataclass(frozen=True)
class BlockFactors:
    """Lower factors L of some systems in tiles of 64, as `cholesky.cholesky_factors_batched` leaves them."""

    lower: torch.Tensor  # (num_systems, padded, padded) fp32: L below the tiles of the diagonal; the rest is used up
    diagonal: torch.Tensor  # (num_systems, padded, 64) fp32: these tiles, see `cholesky`
    failed: torch.Tensor  # (num_systems,) bool: a pivot was not positive
    size: int  # rows of a system; those past it are rows of the identity

    def masked_fill(self, mask: torch.Tensor, value: float) -> Self:
        """Return factors that give no number where mask (num_systems, 1, 1) is set and ``value`` is NaN."""
        return replace(self, diagonal=self.diagonal.masked_fill(mask, value))


def cholesky_solve_reference(
    systems: torch.Tensor, rhs: torch.Tensor, added: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A + added I)^-1 B of systems A (num_systems, n, n) and B (num_systems, n, num_rhs) in float64, and which
    of them have no factor (num_systems,) bool; twin of `cholesky_solve_batched`. NaN where there is none."""
    shifted = systems.double().clone()
    if added is not None:
        shifted.diagonal(dim1=-2, dim2=-1).add_(added.double().unsqueeze(-1))
    factors, info = torch.linalg.cholesky_ex(shifted)
    failed = info != 0
    solution = torch.cholesky_solve(rhs.double(), factors)
    return solution.masked_fill(failed.view(-1, 1, 1), torch.nan), failed
