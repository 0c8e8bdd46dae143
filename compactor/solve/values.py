"""Knows the ridge regression of the values. Knows no queries: only Gram matrices.

Minimises sum_i w_i ||X_i v - y_i||^2 + ridge * d * ||v - v0||^2 over v, where X_i are row i's attention weights on the
kept keys (biases applied, true normaliser), y_i the part of the true output that they must deliver, v0 the original
values and d the mean diagonal of X^T W X. With the residual R = y - X v0, G = X^T W X and B = X^T W R:

    v = v0 + (G + ridge d I)^-1 B

Some heads are solved as one batch, padded with zero columns to the one that keeps most keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compactor.solve.biases import add_diagonal, cholesky_factors, solve_factored, solving_factors, unsolvable
from compactor.solve.gram import GramSum, on_device

FLOAT32_RIDGE = 1e-5  # from here on a GPU factors in float32 and refines once in float64
RIDGES = (1e-3, 1e-2, 1e-1)  # candidates when the ridge is chosen on held-out rows
STRONGEST_FIRST = RIDGES[::-1]


@dataclass(frozen=True)
class RidgeStats:
    """Sufficient statistics of one head's rows: G (n, n), B (n, head_dim), and the energy of R, all float64."""

    gram: torch.Tensor
    rhs: torch.Tensor
    energy: float

    def error(self, change: torch.Tensor) -> float:
        """Weighted squared error of v0 + change on these rows."""
        energy = self.rhs.new_tensor([self.energy])
        return float(squared_errors(self.gram[None], self.rhs[None], energy, change[None]))


@dataclass(frozen=True)
class ValueFit:
    """Changes of some heads' values, and how well they fit."""

    change: torch.Tensor  # (num_heads, num_keys, head_dim) float64; NaN where the equations have no solution
    ridge: torch.Tensor  # (num_heads,) float64; infinite where the values stay
    error_before: torch.Tensor  # (num_heads,) float64: weighted squared error of the original values, on all rows
    error_after: torch.Tensor  # (num_heads,) float64


def squared_errors(gram: torch.Tensor, rhs: torch.Tensor, energy: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Return the weighted squared errors of v0 + change, (num_heads,), on rows of statistics G (num_heads, n, n), B
    (num_heads, n, head_dim) and energy (num_heads,)."""
    cross = (change * rhs).sum((-2, -1))
    quadratic = (change * (gram @ change)).sum((-2, -1))
    return (energy - 2.0 * cross + quadratic).clamp_min(0.0)


def solve_ridge(stats: RidgeStats, ridge: float) -> torch.Tensor:
    """Return (G + ridge * mean diagonal * I)^-1 B of one head, (num_keys, head_dim) float64. Raises NumericalError
    where the equations have no solution."""
    counts = torch.full((1,), len(stats.gram), device=stats.gram.device)
    change = solve_ridges(stats.gram[None], stats.rhs[None], counts, ridge)[0]
    if not bool(torch.isfinite(change).all()):
        raise unsolvable(len(stats.gram))
    return change


def solve_ridges(
    gram: torch.Tensor, rhs: torch.Tensor, counts: torch.Tensor, ridge: float | torch.Tensor
) -> torch.Tensor:
    """Return (G + ridge * mean diagonal * I)^-1 B of some heads, (num_heads, n, head_dim) float64.

    gram (num_heads, n, n) and rhs (num_heads, n, head_dim), float64; counts (num_heads,): their keys, the other columns
    are zero; ``ridge`` a number, or a tensor (num_heads,) of numbers from `FLOAT32_RIDGE` on.
    """
    mean = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) / counts).clamp_min(1e-300)
    if gram.is_cuda and (isinstance(ridge, torch.Tensor) or ridge >= FLOAT32_RIDGE):
        return solve_in_float32(gram, rhs, mean, ridge)
    return solve_factored(cholesky_factors(add_diagonal(gram, ridge * mean)), rhs)


def solve_in_float32(
    gram: torch.Tensor, rhs: torch.Tensor, mean: torch.Tensor, ridge: float | torch.Tensor
) -> torch.Tensor:
    """Solve (G + ridge * mean * I) X = B by float32 factors and one step of refinement in float64."""
    scale = mean.clamp_min(1e-30).view(-1, 1, 1)  # keeps float32 in range
    strength = ridge * mean
    factors = solving_factors(add_diagonal((gram / scale).float(), (strength / scale.view(-1)).float()))
    change = solve_factored(factors, (rhs / scale).float()).double()
    residual = rhs - gram @ change - strength.view(-1, 1, 1) * change
    return change + solve_factored(factors, (residual / scale).float()).double()


def fit_values(train: GramSum, held_out: GramSum, counts: torch.Tensor, ridge: float | None) -> ValueFit:
    """Solve with the given ridge, or with the one of `RIDGES` that errs least on held-out rows; then fit all rows.

    When no candidate beats the original values on the held-out rows, the values stay as they are (ridge inf). Each of
    the heads chooses for itself; ``counts`` (num_heads,) int64 are their keys.
    """
    gram, rhs, energy = train.gram + held_out.gram, train.rhs + held_out.rhs, train.energy + held_out.energy
    if ridge is not None:
        change, ridges = solve_ridges(gram, rhs, counts, ridge), torch.full_like(energy, ridge)
    else:
        errors = held_out_errors(train, held_out, counts)
        best = errors.argmin(0)  # of equals the first: there may be no rows
        stays = errors.amin(0) > held_out.energy
        chosen = on_device(STRONGEST_FIRST, errors.device, errors.dtype).take(best)
        change = solve_ridges(gram, rhs, counts, chosen).masked_fill(stays.view(-1, 1, 1), 0.0)
        ridges = chosen.masked_fill(stays, torch.inf)
    return ValueFit(change, ridges, energy, squared_errors(gram, rhs, energy, change))


def held_out_errors(train: GramSum, held_out: GramSum, counts: torch.Tensor) -> torch.Tensor:
    """Return the errors of the candidates on held-out rows, strongest ridge first, (candidates, num_heads)."""
    num_heads, most, head_dim = train.rhs.shape
    if num_heads == 1:  # large, or on a CPU: a candidate at a time
        changes = [solve_ridges(train.gram, train.rhs, counts, ridge) for ridge in STRONGEST_FIRST]
    else:
        times = len(STRONGEST_FIRST)
        ridges = on_device(STRONGEST_FIRST, train.rhs.device, train.rhs.dtype).repeat_interleave(num_heads)
        gram, rhs, sizes = (part.repeat(times, *[1] * (part.dim() - 1)) for part in (train.gram, train.rhs, counts))
        changes = list(solve_ridges(gram, rhs, sizes, ridges).view(times, num_heads, most, head_dim))
    return torch.stack([squared_errors(held_out.gram, held_out.rhs, held_out.energy, change) for change in changes])
