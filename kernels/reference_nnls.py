"""Knows projected Newton steps for least squares in a box in plain torch, on any device: the twin of `nnls`. Knows no
Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class BoxProblems(NamedTuple):
    """Least squares problems in a box, min x^T G x / 2 - r^T x, of n variables each, and where they begin."""

    gram: torch.Tensor  # (num_problems, n, n) float64, symmetric positive semi-definite with a diagonal of about 1
    rhs: torch.Tensor  # (num_problems, n) float64
    start: torch.Tensor  # the same, within the box
    low: torch.Tensor  # the same
    high: torch.Tensor  # the same
    seen: torch.Tensor  # the same, bool: the other variables are never moved
    reference: torch.Tensor  # (num_problems,) float64, positive: what a gradient is compared with


@dataclass(frozen=True)
class Search:
    """How the next point of a problem is looked for."""

    newton: tuple[float, int]  # 1, ratio, ratio^2, ... of the Newton direction: ratio and number of steps
    downhill: tuple[float, int]  # the same of the gradient
    sufficient: float  # of the decrease that the gradient promises: less makes a step shorter
    jitter: float  # the least that is added to the diagonal of a system; ten times more after each that does not factor
    hopeless: float  # the most

    def steps(self, device: torch.device) -> torch.Tensor:
        """Return all steps of both arcs, Newton first, (number,) float64; made on the device."""
        arcs = (
            ratio ** torch.arange(number, dtype=torch.float64, device=device)
            for ratio, number in (self.newton, self.downhill)
        )
        return torch.cat(list(arcs))


@dataclass(frozen=True)
class BoxPoints:
    """Where some problems have come to."""

    point: torch.Tensor  # (num_problems, n) float64; NaN where the equations have no solution
    iterations: torch.Tensor  # (num_problems,) int64
    optimality: torch.Tensor  # (num_problems,) float64: largest entry of the projected gradient over ``reference``


def box_newton_reference(problems: BoxProblems, *, tolerance: float, max_iterations: int, search: Search) -> BoxPoints:
    """Take projected Newton steps, one problem after the other, all in float64; twin of `nnls.box_newton`."""
    gram, rhs, start, low, high, seen, reference = problems
    steps, points = search.steps(gram.device), start.clone()
    iterations = torch.zeros(len(gram), dtype=torch.int64, device=gram.device)
    optimality = torch.zeros(len(gram), dtype=torch.float64, device=gram.device)
    for problem, matrix in enumerate(gram):
        x, lower, upper, jitter = points[problem], low[problem], high[problem], search.jitter
        for iteration in range(max_iterations + 1):
            gradient = matrix @ x - rhs[problem]
            held = ((x <= lower) & (gradient > 0)) | ((x >= upper) & (gradient < 0)) | ~seen[problem]
            downhill = torch.where(held, 0.0, -gradient)
            optimality[problem] = downhill.abs().max() / reference[problem]
            if iteration == max_iterations or not bool(optimality[problem] > tolerance):
                break
            iterations[problem] += 1
            system = torch.where(held.unsqueeze(1) | held, 0.0, matrix)
            system.diagonal().add_(torch.where(held, 1.0, jitter))
            factor, info = torch.linalg.cholesky_ex(system)
            failed = bool(info != 0)
            newton = downhill if failed else torch.cholesky_solve(downhill.unsqueeze(1), factor).squeeze(1)
            jitter *= 10.0 if failed else 1.0
            if jitter > search.hopeless:
                x.fill_(torch.nan)
                continue
            directions = torch.stack([newton] * search.newton[1] + [downhill] * search.downhill[1])
            candidates = (x + steps.unsqueeze(1) * directions).clamp(lower, upper)
            changes = candidates - x
            slope = -(changes @ gradient)
            decrease = slope - 0.5 * (changes * (changes @ matrix)).sum(1)
            good = (decrease > 0) & (decrease >= search.sufficient * slope)
            if not bool(good.any()):
                break
            x.copy_(candidates[int(good.byte().argmax())])
    return BoxPoints(points, iterations, optimality)
