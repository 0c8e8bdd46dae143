"""Knows the non-negative least squares problem of the biases. Knows no queries: only Gram matrices.

Minimises sum_i w_i (A_S b - m)_i^2 over lower <= b <= upper, where m_i is row i's attention mass on the whole document
and A_S its attention to the kept keys; the bias of a key is log b. In Gram form, with G = A_S^T W A_S, r = A_S^T W m:

    f(b) = b^T G b / 2 - r^T b

The problems of several heads are solved as one batch whose shapes do not depend on the data, so that a GPU is asked to
stop only now and then; on an NVIDIA GPU by kernels (`by_kernels`). A problem alone works on its free variables only,
which is less arithmetic and suits a CPU, and says when its equations have no solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from compactor.errors import NumericalError
from compactor.kernel_trial import usable
from compactor_kernels.reference_cholesky import MAX_SIZE, BlockFactors
from compactor_kernels.reference_nnls import BoxPoints, BoxProblems, Search

JITTER_32 = 1e-7  # the same for float32 factors
JITTER = 1e-12  # of the mean diagonal, added to Cholesky factors of singular blocks; raised tenfold on failure
TOLERANCE = 1e-9  # default, on the projected gradient, relative to the largest |r|
CHECK_EVERY = 3  # iterations of a batch between two looks at whether all problems have stopped
NEWTON_STEPS = (0.5, 6)  # 1, 1/2, ... of the Newton direction: ratio and number, all tried at once by a batch
DOWNHILL_STEPS = (0.25, 8)  # the same of the gradient: one is below 1 / (largest eigenvalue)
SUFFICIENT = 1e-4  # of the decrease that the gradient promises: less makes a step shorter
LARGE = 1024  # variables above which a GPU factors one matrix after another
LARGE_ALONE = 512  # rows up to which one system alone is factored in tiles
QUEUED = 6  # iterations at most that the kernels take without a look at whether all problems have stopped
TRIED = 128  # variables, or right-hand sides, of the trial of these kernels: two tiles
HOPELESS = 1.0  # jitter above which equations have no solution

Factors = TypeVar("Factors", torch.Tensor, BlockFactors)


@dataclass(frozen=True)
class BoxFit:
    """Solution of one box-constrained least squares problem."""

    solution: torch.Tensor  # (num_keys,) float64
    iterations: int
    converged: bool
    optimality: float  # largest entry of the projected gradient, relative to the largest |r|


@dataclass(frozen=True)
class BoxFits:
    """Solutions of several such problems."""

    solution: torch.Tensor  # (num_heads, num_keys) float64; NaN where the equations have no solution
    iterations: torch.Tensor  # (num_heads,) int64
    converged: torch.Tensor  # (num_heads,) bool
    optimality: torch.Tensor  # (num_heads,) float64


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
    """Solve one problem: gram (n, n), rhs and start (n,); see `solve_box_nnls_batched`. Raises NumericalError where the
    equations have no solution."""
    fits = solve_box_nnls_batched(
        gram[None],
        rhs[None],
        lower=lower,
        upper=upper,
        start=None if start is None else start[None],
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    if not bool(torch.isfinite(fits.solution).all()):
        raise unsolvable(len(rhs))
    return BoxFit(fits.solution[0], int(fits.iterations), bool(fits.converged), float(fits.optimality))


def solve_box_nnls_batched(
    gram: torch.Tensor,
    rhs: torch.Tensor,
    *,
    lower: float | torch.Tensor,
    upper: float | torch.Tensor,
    start: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 200,
) -> BoxFits:
    """Solve min b^T gram b / 2 - rhs^T b over the box by projected Newton steps (Bertsekas 1982, section 1.5).

    gram: (num_heads, n, n) symmetric positive semi-definite, rhs: (num_heads, n), both converted to float64; ``lower``
    and ``upper`` are numbers or (n,). Each step solves the free variables exactly by Cholesky and searches along the
    projection arc, so the free set settles in a few steps; a problem stops when its projected gradient is below
    ``tolerance``. Columns are scaled to unit diagonal first. Singular input is no error: unseen keys (zero columns, of
    which padding is made) stay at ``start`` (default 1).
    """
    gram, rhs = gram.double(), rhs.double()
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    seen = scale > 0
    scale = torch.where(seen, scale, 1.0)
    gram = (gram / scale.unsqueeze(-2)).div_(scale.unsqueeze(-1))
    rhs = torch.where(seen, rhs / scale, 0.0)
    low, high = (scale * (bound.to(scale) if isinstance(bound, torch.Tensor) else bound) for bound in (lower, upper))
    x = torch.ones_like(rhs) if start is None else start.double()
    x = (x * scale).clamp(low, high)
    reference = largest(rhs).clamp_min(1e-300)
    run = by_kernels if len(gram) > 1 and blocks_usable(gram, "nnls") else by_torch
    problems = BoxProblems(gram, rhs, x, low, high, seen, reference)
    found = run(problems, tolerance=tolerance, max_iterations=max_iterations)
    x = found.point
    solution = torch.where(x <= low, lower, torch.where(x >= high, upper, x / scale))  # no rounding off the bounds
    return BoxFits(solution, found.iterations, found.optimality <= tolerance, found.optimality)


def by_torch(problems: BoxProblems, *, tolerance: float, max_iterations: int) -> BoxPoints:
    """Take the steps of `_JointSearch`, or of `_AloneSearch`, until all problems have stopped."""
    gram, rhs, x, low, high, seen, reference = problems
    search = _AloneSearch(gram, low, high) if len(gram) == 1 else _JointSearch(gram, low, high)
    running = torch.ones(len(gram), dtype=torch.bool, device=rhs.device)
    iterations = torch.zeros(len(gram), dtype=torch.int64, device=rhs.device)
    for iteration in range(max_iterations + 1):
        gradient = (gram @ x.unsqueeze(-1)).squeeze(-1) - rhs
        pinned = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)) | ~seen
        optimality = largest(torch.where(pinned, 0.0, gradient)) / reference
        running &= optimality > tolerance
        looks = iteration % search.check_every == 0 and iteration >= search.check_every - 1
        if iteration == max_iterations or (looks and not bool(running.any())):
            break
        iterations += running
        found, moved = search.step(gradient, x, ~pinned)
        running &= moved
        x = torch.where(running.unsqueeze(-1), found, x)
    return BoxPoints(x, iterations, optimality)


def by_kernels(problems: BoxProblems, *, tolerance: float, max_iterations: int) -> BoxPoints:
    """Take the steps of `_JointSearch` by kernels; up to `QUEUED` iterations are launched without waiting for any."""
    from compactor_kernels.nnls import box_newton

    return box_newton(
        problems._replace(gram=problems.gram.contiguous()),
        tolerance=tolerance,
        max_iterations=max_iterations,
        search=joint_search(),
        look_every=None if max_iterations <= QUEUED else CHECK_EVERY,
    )


def joint_search() -> Search:
    """Return how the kernels look for the next point: as `_JointSearch` does on a GPU."""
    return Search(NEWTON_STEPS, DOWNHILL_STEPS, SUFFICIENT, JITTER_32, HOPELESS)


def blocks_usable(systems: torch.Tensor, name: str) -> bool:
    """Whether the kernel ``name`` of `kernel_trial.TRIALS`, which factors in tiles, takes systems (num_heads, n, n) and
    runs rightly: several, or a small one, none of which is so large that a library factors it faster."""
    num_systems, size = systems.shape[:2]
    wanted = 0 < size <= (MAX_SIZE if num_systems > 1 else LARGE_ALONE)
    return wanted and usable(name, systems.device, torch.float32, TRIED)


class _AloneSearch:
    """Steps of one problem, on its free variables only; every decision is taken on the host."""

    check_every = 1

    def __init__(self, gram: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        self.gram, self.low, self.high = gram[0], low[0], high[0]

    def step(
        self, gradients: torch.Tensor, points: torch.Tensor, free: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next point (1, n), NaN where there is none, and whether it is another one (1,)."""
        gradient, x, index = gradients[0], points[0], free[0].nonzero().squeeze(-1)
        block = self.gram if len(index) == len(x) else self.gram.index_select(0, index).index_select(1, index)
        factor = cholesky_factors(block.to(direction_type(block.device))[None])
        newton = torch.zeros_like(x)
        newton[index] = (
            -torch.cholesky_solve(gradient[index].unsqueeze(-1).to(factor.dtype), factor[0]).squeeze(-1).to(x.dtype)
        )
        if not bool(torch.isfinite(newton).all()):
            return torch.full_like(points, torch.nan), torch.ones_like(free[:, 0])
        for direction in (newton, -torch.where(free[0], gradient, 0.0)):  # Newton first, then steepest descent
            step = 1.0
            while step > 1e-12:
                candidate = (x + step * direction).clamp(self.low, self.high)
                change = candidate - x
                slope = -(gradient @ change)
                decrease = slope - 0.5 * (change @ (self.gram @ change))
                if bool((decrease > 0) & (decrease >= SUFFICIENT * slope)):
                    return candidate[None], torch.ones_like(free[:, 0])
                step *= 0.5
        return points, torch.zeros_like(free[:, 0])


class _JointSearch:
    """Steps of several problems at once: variables that are not free are rows of the identity, and each problem takes
    the first good step of some along its Newton and its gradient arc. No decision is taken on the host."""

    check_every = CHECK_EVERY

    def __init__(self, gram: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        self.gram, self.low, self.high = gram, low.unsqueeze(1), high.unsqueeze(1)
        self.systems = gram.to(direction_type(gram.device))
        self.jitter = gram.new_full((len(gram), 1), first_jitter(self.systems.dtype))
        self.steps = [
            ratio ** torch.arange(number, dtype=gram.dtype, device=gram.device).view(1, -1, 1)
            for ratio, number in (NEWTON_STEPS, DOWNHILL_STEPS)
        ]

    def step(self, gradient: torch.Tensor, x: torch.Tensor, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next points (num_heads, n), NaN where there is none, and which are other ones (num_heads,)."""
        downhill = torch.where(free, -gradient, 0.0)
        systems = torch.where(free.unsqueeze(-1) & free.unsqueeze(-2), self.systems, 0.0)
        systems.diagonal(dim1=-2, dim2=-1).add_(torch.where(free, self.jitter, 1.0))
        factor, failed = factor_each(systems)
        newton = solve_factored(factor, downhill.unsqueeze(-1).to(factor.dtype)).squeeze(-1).to(x.dtype)
        newton = torch.where(failed.unsqueeze(-1), downhill, newton)  # and with more jitter next time
        self.jitter = torch.where(failed.unsqueeze(-1), 10.0 * self.jitter, self.jitter)
        arcs = [direction.unsqueeze(1) * steps for direction, steps in zip((newton, downhill), self.steps, strict=True)]
        candidates = (x.unsqueeze(1) + torch.cat(arcs, dim=1)).clamp(self.low, self.high)  # (num_heads, steps, n)
        changes = candidates - x.unsqueeze(1)
        slope = -(changes * gradient.unsqueeze(1)).sum(-1)
        decrease = slope - 0.5 * (changes * (changes @ self.gram)).sum(-1)
        good = (decrease > 0) & (decrease >= SUFFICIENT * slope)
        first = good.byte().argmax(1)
        found = candidates.take_along_dim(first.view(-1, 1, 1), 1).squeeze(1)
        hopeless = self.jitter > HOPELESS
        return found.masked_fill(hopeless, torch.nan), good.any(1) | hopeless.squeeze(-1)


def direction_type(device: torch.device) -> torch.dtype:
    """Return the type in which Newton directions are solved: the gradient that steers them is exact, so that a GPU
    takes float32."""
    return torch.float32 if device.type == "cuda" else torch.float64


def first_jitter(dtype: torch.dtype) -> float:
    """Return the least jitter that is tried, relative to the mean diagonal."""
    return JITTER if dtype == torch.float64 else JITTER_32


def largest(vectors: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each vector (num_heads, n), (num_heads,); 0 where there is no entry."""
    return vectors.abs().amax(-1) if vectors.shape[-1] else vectors.new_zeros(len(vectors))


def cholesky_solve(gram: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Solve gram X = rhs for symmetric positive semi-definite ``gram`` (n, n); see `cholesky_factor`."""
    return torch.cholesky_solve(rhs, cholesky_factor(gram))


def cholesky_factor(gram: torch.Tensor) -> torch.Tensor:
    """Return the lower factor of symmetric positive semi-definite ``gram`` (n, n); a singular one gets the least jitter
    that factors, from `JITTER` of the mean diagonal upwards. Raises NumericalError where that is more than the mean."""
    factor = cholesky_factors(gram[None])[0]
    if not bool(torch.isfinite(factor).all()):
        raise unsolvable(len(gram))
    return factor


def cholesky_factors(grams: torch.Tensor) -> torch.Tensor:
    """Return the lower factors of several such matrices (num_heads, n, n), each with its own jitter; NaN where there is
    none. The host looks once per amount of jitter, once in all where the first one suffices."""
    return with_jitter(grams, lambda systems, added: factor_each(add_diagonal(systems, added)))


def solving_factors(grams: torch.Tensor) -> torch.Tensor | BlockFactors:
    """Return the same for `solve_factored` alone, from float32 ``grams`` by a kernel where there is one."""
    return with_jitter(grams, factor_blocks) if blocks_usable(grams, "cholesky") else cholesky_factors(grams)


def with_jitter(
    grams: torch.Tensor, factor: Callable[[torch.Tensor, torch.Tensor], tuple[Factors, torch.Tensor]]
) -> Factors:
    """Return what ``factor`` makes of matrices and what is added to the diagonal of each (num_heads,), with the least
    jitter that each needs; see `cholesky_factors`."""
    mean = grams.diagonal(dim1=-2, dim2=-1).sum(-1).div(max(1, grams.shape[-1])).clamp_min(1e-30)
    jitter = torch.full_like(mean, first_jitter(grams.dtype))
    hopeless = torch.zeros_like(mean, dtype=torch.bool)
    raised = False
    while True:
        factors, failed = factor(grams, jitter * mean)
        failed = failed & ~hopeless
        if not bool(failed.any()):
            return factors.masked_fill(hopeless.view(-1, 1, 1), torch.nan) if raised else factors
        hopeless |= failed & (jitter > HOPELESS)
        jitter, raised = torch.where(failed, 10.0 * jitter, jitter), True


def factor_blocks(grams: torch.Tensor, added: torch.Tensor) -> tuple[BlockFactors, torch.Tensor]:
    """Return the factors in tiles of float32 matrices (num_heads, n, n) with ``added`` (num_heads,) on their diagonals,
    and which of them failed (num_heads,) bool."""
    from compactor_kernels.cholesky import cholesky_factors_batched

    factors = cholesky_factors_batched(grams.contiguous(), added=added)
    return factors, factors.failed


def factor_each(grams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lower Cholesky factors (num_heads, n, n) and which of them failed (num_heads,) bool."""
    if grams.is_cuda and len(grams) > 1 and grams.shape[-1] > LARGE:
        parts = [torch.linalg.cholesky_ex(gram) for gram in grams]
        return torch.stack([part.L for part in parts]), torch.stack([part.info for part in parts]) != 0
    factors, info = torch.linalg.cholesky_ex(grams)
    return factors, info != 0


def solve_factored(factors: torch.Tensor | BlockFactors, rhs: torch.Tensor) -> torch.Tensor:
    """Solve L L^T X = rhs for factors L (num_heads, n, n) and rhs (num_heads, n, m)."""
    if isinstance(factors, BlockFactors):
        from compactor_kernels.cholesky import cholesky_solve_factored

        return cholesky_solve_factored(factors, rhs.contiguous())
    if factors.is_cuda and len(factors) > 1:  # a loop over the batch, if left to cholesky_solve
        half = torch.linalg.solve_triangular(factors, rhs, upper=False)
        return torch.as_tensor(torch.linalg.solve_triangular(factors.mT, half, upper=True))
    return torch.as_tensor(torch.cholesky_solve(rhs, factors))


def unsolvable(num_keys: int) -> NumericalError:
    """Return the error of equations that have no solution."""
    return NumericalError(f"The equations of {num_keys} keys cannot be solved; {NumericalError.REMEDY}.")


def require_finite(*tensors: torch.Tensor) -> None:
    """Raise NumericalError where a number is not finite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise not_finite()


def not_finite() -> NumericalError:
    """Return the error of a fit that is not finite."""
    return NumericalError(f"Numbers of the fit are not finite; {NumericalError.REMEDY}.")


def add_diagonal(gram: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Return gram + amount * I for gram (..., n, n) and amount (...)."""
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(amount.unsqueeze(-1))
    return shifted
