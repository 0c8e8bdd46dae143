"""Knows the non-negative least squares problem of the biases. Knows no queries: only Gram matrices.

Minimises sum_i w_i (A_S b - m)_i^2 over lower <= b <= upper, where m_i is row i's attention mass on the whole document
and A_S its attention to the kept keys; the bias of a key is log b. In Gram form, with G = A_S^T W A_S, r = A_S^T W m:

    f(b) = b^T G b / 2 - r^T b
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compactor.errors import NumericalError

JITTER_32 = 1e-7  # the same for float32 factors
JITTER = 1e-12  # of the mean diagonal, added to Cholesky factors of singular blocks; raised tenfold on failure
TOLERANCE = 1e-9  # default, on the projected gradient, relative to the largest |r|


@dataclass(frozen=True)
class BoxFit:
    """Solution of one box-constrained least squares problem."""

    solution: torch.Tensor  # (num_keys,) float64
    iterations: int
    converged: bool
    optimality: float  # largest entry of the projected gradient, relative to the largest |r|


def solve_box_nnls(
    gram: torch.Tensor,
    rhs: torch.Tensor,
    *,
    lower: float | torch.Tensor,
    upper: float | torch.Tensor,
    start: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 200,
) -> BoxFit:
    """Solve min b^T gram b / 2 - rhs^T b over the box by projected Newton steps (Bertsekas 1982, section 1.5).

    gram: (n, n) symmetric positive semi-definite, rhs: (n,), both converted to float64; ``lower`` and ``upper`` are
    numbers or (n,). Each step solves the free variables exactly by Cholesky and searches along the projection arc, so
    the free set settles in a few steps; it stops when the projected gradient is below ``tolerance``. Columns are scaled
    to unit diagonal first. Singular input is no error: unseen keys (zero columns) stay at ``start`` (default 1).
    """
    gram, rhs = gram.double(), rhs.double()
    scale = gram.diagonal().clamp_min(0).sqrt()
    seen = scale > 0
    scale = torch.where(seen, scale, 1.0)
    gram, rhs = gram / scale / scale.unsqueeze(-1), torch.where(seen, rhs / scale, 0.0)
    low = torch.as_tensor(lower, dtype=torch.float64, device=rhs.device) * scale
    high = torch.as_tensor(upper, dtype=torch.float64, device=rhs.device) * scale
    x = torch.ones_like(rhs) if start is None else start.double()
    x = (x * scale).clamp(low, high)
    reference = float(rhs.abs().max().clamp_min(1e-300)) if rhs.numel() else 1.0

    iterations, optimality = 0, float("inf")
    gradient = gram @ x - rhs
    while True:
        pinned = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)) | ~seen
        projected = torch.where(pinned, 0.0, gradient)
        optimality = float(projected.abs().max()) / reference if rhs.numel() else 0.0
        if optimality <= tolerance or iterations >= max_iterations:
            break
        iterations += 1
        x, moved = _projected_newton_step(gram, gradient, x, ~pinned, low, high)
        gradient = gram @ x - rhs
        if not moved:
            break
    return BoxFit(x / scale, iterations, optimality <= tolerance, optimality)


def _projected_newton_step(
    gram: torch.Tensor,
    gradient: torch.Tensor,
    x: torch.Tensor,
    free: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> tuple[torch.Tensor, bool]:
    index = free.nonzero().squeeze(-1)
    direction = torch.zeros_like(x)
    block = gram if len(index) == len(x) else gram.index_select(0, index).index_select(1, index)
    if block.is_cuda:  # a direction needs no float64: the gradient that steers it is exact
        block = block.float()
    direction[index] = -cholesky_solve(block, gradient[index].unsqueeze(-1).to(block.dtype)).squeeze(-1).to(x.dtype)
    for step_direction in (direction, -torch.where(free, gradient, 0.0)):  # Newton first, then steepest descent
        step = 1.0
        while step > 1e-12:
            candidate = (x + step * step_direction).clamp(low, high)
            change = candidate - x
            decrease = -(gradient @ change + 0.5 * (change @ (gram @ change)))
            slope = -(gradient @ change)
            if decrease > 0 and decrease >= 1e-4 * slope:
                return candidate, True
            step *= 0.5
    return x, False


def cholesky_solve(gram: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Solve gram X = rhs for symmetric positive semi-definite ``gram`` (n, n); see `cholesky_factor`."""
    return torch.cholesky_solve(rhs, cholesky_factor(gram))


def cholesky_factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the lower factor of symmetric positive semi-definite ``gram`` (n, n); a singular one gets the least jitter
    that factors, from `JITTER` of the mean diagonal upwards. Raises NumericalError where that is more than the mean."""
    mean = gram.diagonal().mean().clamp_min(1e-30) if gram.numel() else gram.new_tensor(1.0)
    jitter = JITTER if gram.dtype == torch.float64 else JITTER_32
    while True:
        factor, info = torch.linalg.cholesky_ex(add_diagonal(gram, jitter * mean))
        if int(info) == 0:
            return torch.as_tensor(factor)
        if jitter > 1.0:
            raise NumericalError(f"The equations of {len(gram)} keys cannot be solved; {NumericalError.REMEDY}.")
        jitter *= 10.0


def require_finite(*tensors: torch.Tensor) -> None:
    """Raise NumericalError where a number is not finite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NumericalError(f"Numbers of the fit are not finite; {NumericalError.REMEDY}.")


def add_diagonal(gram: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Return gram + amount * I."""
    shifted = gram.clone()
    shifted.diagonal().add_(amount)
    return shifted
