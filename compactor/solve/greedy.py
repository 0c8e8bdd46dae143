"""Knows forward orthogonal least squares on Gram matrices: which key to take next, and what it adds. Knows no queries.

One problem is a chunk of C keys of one head. Its columns a_j are the attention of all rows to key j, and its targets
A T the attention mass and the centred output of the whole chunk. The subset S that minimises

    min over X of ||A T - A_S X||_F^2

is grown greedily: the next key is the one whose column, orthogonalised against those already taken, removes most of
what is left (Chen, Billings and Luo 1989, orthogonal least squares; here for several targets at once). With G = A^T A
and B = G T this is a pivoted Cholesky factorisation with right-hand sides: a step costs O(C (k + targets)) and never
touches the rows again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

REDUNDANT = 1e-5  # of a column's own energy: below it the column is a combination of those already taken
LOOK_EVERY = 32  # picks between two looks at which problems are finished


@dataclass(frozen=True)
class Picks:
    """Greedy orders of a batch of problems; prefixes are the answers for every smaller count."""

    order: torch.Tensor  # (num_problems, num_keys) int64: picked keys, then the others by what each would add
    gains: (
        torch.Tensor
    )  # (num_problems, num_keys) float32: squared error removed; for those not picked, what each would add to the picks
    energy: torch.Tensor  # (num_problems,) float32: squared norm of the targets


def forward_ols(gram: torch.Tensor, targets: torch.Tensor, num_picks: int, stop: float = 0.0) -> Picks:
    """Order the keys of each problem by greedy orthogonal least squares.

    gram: (num_problems, num_keys, num_keys) float32 or float64, symmetric; targets: (num_problems, num_keys,
    num_targets), T above; ``num_picks`` steps are made, fewer for a problem whose best gain falls below ``stop`` of its
    energy. What is never picked follows in the order of its own gain given the picks.
    """
    num_problems, num_keys, _ = gram.shape
    num_picks = min(num_picks, num_keys)
    left = torch.bmm(gram, targets)
    energy = (targets * left).sum((1, 2)).clamp_min(0.0)
    order = torch.empty(num_problems, num_keys, dtype=torch.int64, device=gram.device)
    gains = torch.zeros(num_problems, num_keys, dtype=gram.dtype, device=gram.device)
    if not num_problems:
        return Picks(order, gains.float(), energy.float())
    active = torch.arange(num_problems, device=gram.device)
    state = _State(gram, left, num_picks)
    taken = 0
    while taken < num_picks and len(active):
        steps = min(LOOK_EVERY, num_picks - taken)
        for _ in range(steps):
            state.pick()
        taken += steps
        finished = state.gains[:, taken - 1] <= stop * energy[active]
        if taken == num_picks:
            finished = torch.ones_like(finished)
        if bool(finished.any()):
            done = finished.nonzero().squeeze(-1)
            order[active[done]], gains[active[done]] = state.ranking(done)
            keep = (~finished).nonzero().squeeze(-1)
            active = active[keep]
            state.select(keep)
    return Picks(order, gains.float(), energy.float())


class _State:
    """The factorisation of a batch after some picks."""

    def __init__(self, gram: torch.Tensor, left: torch.Tensor, num_picks: int) -> None:
        num_problems, num_keys, _ = gram.shape
        self.gram, self.left = gram, left.clone()
        self.own = gram.diagonal(dim1=1, dim2=2).clone()  # energy of each column that is not yet explained
        self.least = REDUNDANT * self.own
        self.factor = gram.new_zeros(num_problems, num_picks, num_keys)
        self.picked = torch.zeros(num_problems, num_picks, dtype=torch.int64, device=gram.device)
        self.gains = gram.new_zeros(num_problems, num_picks)
        self.free = torch.ones(num_problems, num_keys, dtype=torch.bool, device=gram.device)
        self.count = 0

    def candidate_gains(self) -> torch.Tensor:
        """Return what each key would add, (num_problems, num_keys); 0 for redundant keys, -1 for those taken."""
        useful = self.own > self.least
        gains = self.left.square().sum(-1) / torch.where(useful, self.own, 1.0)
        return torch.where(self.free, torch.where(useful, gains, 0.0), -1.0)

    def pick(self) -> None:
        """Take the best key of every problem."""
        gain, best = self.candidate_gains().max(dim=1)
        index = best.unsqueeze(-1)
        step, problems = self.count, torch.arange(len(best), device=best.device)
        own = self.own.gather(1, index)
        scale = torch.where(
            (gain > 0).unsqueeze(-1), own.clamp_min(1e-30).rsqrt(), 0.0
        )  # a redundant key changes nothing
        column = self.gram[problems, best]
        if step:
            before = self.factor[problems, :step, best]
            column = torch.baddbmm(column.unsqueeze(1), before.unsqueeze(1), self.factor[:, :step], alpha=-1).squeeze(1)
        column = column * scale
        target = self.left[problems, best] * scale
        self.left.baddbmm_(column.unsqueeze(-1), target.unsqueeze(1), alpha=-1)
        self.own -= column.square()
        self.factor[:, step] = column
        self.picked[:, step], self.gains[:, step] = best, gain
        self.free.scatter_(1, index, False)
        self.count += 1

    def ranking(self, problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return order and gains of all keys of some problems: the picks, then the rest by what each would add."""
        rest = self.candidate_gains()[problems].sort(dim=1, descending=True, stable=True)
        kept = rest.indices.shape[1] - self.count
        order = torch.cat([self.picked[problems, : self.count], rest.indices[:, :kept]], dim=1)
        return order, torch.cat([self.gains[problems, : self.count], rest.values[:, :kept]], dim=1)

    def select(self, problems: torch.Tensor) -> None:
        """Go on with some problems only."""
        for name in ("gram", "left", "own", "least", "factor", "picked", "gains", "free"):
            setattr(self, name, getattr(self, name)[problems])


def pool_violators(gains: torch.Tensor) -> torch.Tensor:
    """Make each row not increasing by pooling adjacent violators (isotonic regression; sums are kept).

    gains: (num_problems, num_keys). Returns the same shape: the slopes of the least concave majorant of the row's
    cumulative sum.
    """
    given, gains = gains, gains.cpu()  # small, sequential, and in float64, which Apple GPUs lack
    num_problems, num_keys = gains.shape
    sums = torch.zeros(num_problems, num_keys, dtype=torch.float64, device=gains.device)
    sizes = torch.zeros_like(sums)
    top = torch.full((num_problems,), -1, dtype=torch.int64, device=gains.device)
    every = torch.arange(num_problems, device=gains.device)
    for step in range(num_keys):
        top = top + 1
        sums[every, top] = gains[:, step].double()
        sizes[every, top] = 1.0
        while True:
            below = (top - 1).clamp_min(0)
            violates = (top > 0) & (sums[every, top] * sizes[every, below] > sums[every, below] * sizes[every, top])
            rows = violates.nonzero().squeeze(-1)
            if not len(rows):
                break
            sums[rows, below[rows]] += sums[rows, top[rows]]
            sizes[rows, below[rows]] += sizes[rows, top[rows]]
            sums[rows, top[rows]] = 0.0
            sizes[rows, top[rows]] = 0.0
            top[rows] -= 1
    means = (sums / sizes.clamp_min(1.0)).flatten()
    return means.repeat_interleave(sizes.flatten().long()).view(num_problems, num_keys).to(given.dtype).to(given.device)
