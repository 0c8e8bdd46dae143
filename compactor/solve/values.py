"""Knows the ridge regression of the values. Knows no queries: only Gram matrices.

Minimises sum_i w_i ||X_i v - y_i||^2 + ridge * d * ||v - v0||^2 over v, where X_i are row i's attention weights on the
kept keys (biases applied, true normaliser), y_i the part of the true output that they must deliver, v0 the original
values and d the mean diagonal of X^T W X. With the residual R = y - X v0, G = X^T W X and B = X^T W R:

    v = v0 + (G + ridge d I)^-1 B
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compactor.solve.biases import add_diagonal, cholesky_factor, cholesky_solve

FLOAT32_RIDGE = 1e-5  # from here on a GPU factors in float32 and refines once in float64
RIDGES = (1e-3, 1e-2, 1e-1)  # candidates when the ridge is chosen on held-out rows


@dataclass(frozen=True)
class RidgeStats:
    """Sufficient statistics of one set of rows: G (n, n), B (n, head_dim), and the energy of R, all float64."""

    gram: torch.Tensor
    rhs: torch.Tensor
    energy: float

    def error(self, change: torch.Tensor) -> float:
        """Weighted squared error of v0 + change on these rows."""
        cross = float((change * self.rhs).sum())
        quadratic = float((change * (self.gram @ change)).sum())
        return max(0.0, self.energy - 2.0 * cross + quadratic)

    def __add__(self, other: RidgeStats) -> RidgeStats:
        return RidgeStats(self.gram + other.gram, self.rhs + other.rhs, self.energy + other.energy)


@dataclass(frozen=True)
class ValueFit:
    """Change of the values, and how well it fits."""

    change: torch.Tensor  # (num_keys, head_dim) float64
    ridge: float
    error_before: float  # weighted squared error of the original values, on all rows
    error_after: float


def solve_ridge(stats: RidgeStats, ridge: float) -> torch.Tensor:
    """Return (G + ridge * mean diagonal * I)^-1 B, (num_keys, head_dim) float64."""
    diagonal = stats.gram.diagonal().mean().clamp_min(1e-300)
    system = add_diagonal(stats.gram, ridge * diagonal)
    if system.is_cuda and ridge >= FLOAT32_RIDGE:
        scale = diagonal.clamp_min(1e-30)  # keeps float32 in range
        factor = cholesky_factor((system / scale).float())
        change = torch.cholesky_solve((stats.rhs / scale).float(), factor).double()
        residual = stats.rhs - system @ change  # one step of refinement in float64
        return change + torch.cholesky_solve((residual / scale).float(), factor).double()
    return cholesky_solve(system, stats.rhs)


def fit_values(train: RidgeStats, held_out: RidgeStats, ridge: float | None) -> ValueFit:
    """Solve with the given ridge, or with the one of `RIDGES` that errs least on held-out rows; then fit all rows.

    When no candidate beats the original values on the held-out rows, the values stay as they are (ridge inf).
    """
    both = train + held_out
    if ridge is None:
        errors = {candidate: held_out.error(solve_ridge(train, candidate)) for candidate in reversed(RIDGES)}
        ridge = min(errors, key=lambda candidate: errors[candidate])  # of equals the strongest: there may be no rows
        if errors[ridge] > held_out.energy:
            return ValueFit(torch.zeros_like(both.rhs), float("inf"), both.energy, both.energy)
    change = solve_ridge(both, ridge)
    return ValueFit(change, ridge, both.energy, both.error(change))
