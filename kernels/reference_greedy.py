"""Knows greedy orthogonal least squares on Gram matrices in plain torch, on any device. Knows no Triton.

The definition that the kernel `greedy` is tested against, and what the product runs where there is no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Picks(NamedTuple):
    """Greedy orders of a batch of problems; prefixes are the answers for every smaller count."""

    order: torch.Tensor  # (num_problems, num_keys) int64: picked keys, then the others by what each would add
    gains: (
        torch.Tensor
    )  # (num_problems, num_keys) float32: squared error removed; for those not picked, what each would add to the picks
    energy: torch.Tensor  # (num_problems,) float32: squared norm of the targets


def greedy_picks_reference(
    gram: torch.Tensor,
    targets: torch.Tensor,
    num_picks: int,
    *,
    stop: float,
    redundant: float,
    look_every: int,
) -> Picks:
    """Order the keys of each problem by greedy orthogonal least squares; twin of `greedy_picks`.

    With L = G T, the pick j is the free key of the largest gain ||l_j||^2 / g_jj, the first of equals, and then

        c = G_j / sqrt(g_jj),   L -= c (l_j / sqrt(g_jj))^T,   g_ii -= c_i^2,   G -= c c^T

    where of G only the row of the pick is ever made. A key gains nothing once g_jj is at most ``redundant`` of what it
    was. gram: (num_problems, num_keys, num_keys) float32 or float64, symmetric; targets T: (num_problems, num_keys,
    num_targets) of the same type. ``num_picks`` keys are picked, at least 1, at most all; every ``look_every`` picks
    the problems whose last gain is at most ``stop`` of their energy end. What is never picked follows in the order of
    its own gain given the picks.
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
    state = _State(gram, left, num_picks, redundant)
    taken = 0
    while taken < num_picks and len(active):
        steps = min(look_every, num_picks - taken)
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

    def __init__(self, gram: torch.Tensor, left: torch.Tensor, num_picks: int, redundant: float) -> None:
        num_problems, num_keys, _ = gram.shape
        self.gram, self.left = gram, left.clone()
        self.own = gram.diagonal(dim1=1, dim2=2).clone()  # energy of each column that is not yet explained
        self.least = redundant * self.own
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
