"""Knows forward orthogonal least squares on Gram matrices: which key to take next, and what it adds. Knows no queries.

One problem is a chunk of C keys of one head. Its columns a_j are the attention of all rows to key j, and its targets
A T the attention mass and the centred output of the whole chunk. The subset S that minimises

    min over X of ||A T - A_S X||_F^2

is grown greedily: the next key is the one whose column, orthogonalised against those already taken, removes most of
what is left (Chen, Billings and Luo 1989, orthogonal least squares; here for several targets at once). With G = A^T A
and B = G T this is a pivoted Cholesky factorisation with right-hand sides: a step costs O(C (k + targets)) and never
touches the rows again. All picks of a chunk are one program of the kernel `greedy`, or steps of its twin in torch.
"""

from __future__ import annotations

import torch

from compactor.kernel_trial import usable
from compactor_kernels.reference_greedy import Picks, greedy_picks_reference

REDUNDANT = 1e-5  # of a column's own energy: below it the column is a combination of those already taken
LOOK_EVERY = 32  # picks between two looks at which problems are finished


def forward_ols(gram: torch.Tensor, targets: torch.Tensor, num_picks: int, stop: float = 0.0) -> Picks:
    """Order the keys of each problem by greedy orthogonal least squares.

    gram: (num_problems, num_keys, num_keys) float32 or float64, symmetric; targets: (num_problems, num_keys,
    num_targets), T above; ``num_picks`` steps are made, fewer for a problem whose best gain falls below ``stop`` of its
    energy. What is never picked follows in the order of its own gain given the picks.
    """
    run = greedy_picks_reference
    if _kernel_takes(gram, targets):
        from compactor_kernels.greedy import greedy_picks

        run, gram = greedy_picks, gram.contiguous()
    return run(gram, targets, num_picks, stop=stop, redundant=REDUNDANT, look_every=LOOK_EVERY)


def _kernel_takes(gram: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether the kernel runs, and runs rightly, for problems like these."""
    if gram.dtype != torch.float32 or not usable("greedy", gram.device, gram.dtype, targets.shape[2]):
        return False
    from compactor_kernels.greedy import MAX_KEYS

    return gram.shape[1] <= MAX_KEYS


def pool_violators(gains: torch.Tensor) -> torch.Tensor:
    """Make each row not increasing by pooling adjacent violators (isotonic regression; sums are kept).

    gains: (num_problems, num_keys). Returns the same shape and type: the slopes of the least concave majorant of the
    row's cumulative sum. Sequential, so SciPy does it on the host, in float64.
    """
    from scipy.optimize import isotonic_regression

    pooled = gains.cpu().double().clone()
    for row in pooled.numpy():
        row[:] = isotonic_regression(row, increasing=False).x
    return pooled.to(gains.dtype).to(gains.device)
