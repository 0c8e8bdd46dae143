"""Knows Attention Matching's better selection (arXiv 2602.16284, algorithms 1 and 2): orthogonal matching pursuit on
the mass. Knows no passes.

Repeatedly take the keys whose features correlate most with what the mass still lacks, r = m - F_S b, and refit b >= 0.
Everything is done on the Gram matrix G = F^T F of the whole document, in which F^T m is the row sum:

    correlations F^T r = G 1 - G_S b        b from G_SS and (G 1)_S

so that a step never touches the rows again. How many keys are taken per refit follows the published program's schedule
(`SCHEDULE`: one by one at first, then 2 x 2, then 4 x 2, the last being the paper's "fast" variant). Once all keys are
there, keys with a bias under `LEAST_LOG_BIAS` are dropped for good and replaced, at most `REPLACEMENTS` times. The
refit is exact (the program clamps an unconstrained solution).
"""

from __future__ import annotations

import math

import torch

from compactor.errors import NumericalError
from compactor.methods import Compacted
from compactor.methods.attention_matching import Head, MatchLayer, Rows, match, read_rows, zero_sums
from compactor.solve.biases import solve_box_nnls
from compactor.solve.gram import add_symmetric_product
from compactor.study import Study

SUMMARY = "published Attention Matching: keys by matching pursuit on the mass, biases and values fitted"
SCHEDULE = ((300, 1), (1500, 4))  # until so many keys are picked, keys per refit; `LATER` afterwards
LATER = 8
MOST_LOG_BIAS, LEAST_LOG_BIAS = 7.0, -7.0
REPLACEMENTS = 3
SMALLEST = 1e-12  # of a bias's exponential: where nothing is left to replace a key
TOLERANCE = 1e-6  # of the refit, relative to the largest right-hand side; the data are float32
JITTER = 1e-10  # first diagonal tried where a new column depends on the old ones, relative to its own entry


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys, equally many in every head."""
    return match(study, num_kept, PursuitLayer)


class PursuitLayer(MatchLayer):
    """Keeps the keys that orthogonal matching pursuit picks."""

    def choose(self, head: Head, count: int) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """Return keys in the order in which they were picked; see `MatchLayer.choose`."""
        gram = zero_sums(len(head.keys), 0, head.keys.device)[0]
        rows = read_rows(head, lambda features, _mass: add_symmetric_product(gram, features))
        kept, weights = pursue(gram, count)
        return kept.to(head.keys.device), weights.clamp_min(SMALLEST).log().float().to(head.keys.device), rows


def pursue(gram: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick ``count`` keys (fewer where too many are dropped); return them, int64, and b = exp(bias), float64.

    gram: F^T F over all keys, (num_document, num_document) float64.
    """
    fit = MassFit(gram, count)
    available = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for round_ in range(REPLACEMENTS + 1):
        while len(fit.picked) < count:
            step = min(keys_per_refit(len(fit.picked)), count - len(fit.picked), int(available.sum()))
            if not step:
                break
            lacking = fit.correlations().masked_fill_(~available, -math.inf)
            keys = lacking.topk(step).indices
            available[keys] = False
            fit.add(keys)
        strong = fit.weights >= math.exp(LEAST_LOG_BIAS)
        if round_ == REPLACEMENTS or bool(strong.all()):
            break
        fit.keep(strong)
    return fit.picked, fit.weights


def keys_per_refit(num_picked: int) -> int:
    """Return how many keys are taken together when ``num_picked`` are there."""
    return next((keys for until, keys in SCHEDULE if num_picked < until), LATER)


class MassFit:
    """The best 0 <= b <= e^7 of the picked keys, kept up to date while keys are added.

    The Cholesky factor of the keys strictly inside the box grows with them. Only where a weight leaves the box, or one
    on its border wants in, is the whole problem solved afresh.
    """

    def __init__(self, gram: torch.Tensor, most: int) -> None:
        self.gram = gram
        self.target = gram.sum(1)  # F^T m
        self.rows = gram.new_empty(most, len(gram))  # rows of the picked keys
        self.factor = gram.new_zeros(most, most)  # lower Cholesky factor of the free keys, in the order of `free`
        self.picked = torch.empty(0, dtype=torch.int64, device=gram.device)
        self.weights = gram.new_empty(0)
        self.free = self.picked  # positions in `picked`
        self.resolved = 0  # how often the whole problem was solved

    def correlations(self) -> torch.Tensor:
        """Return what each key's features have in common with the mass that is missing, (num_document,)."""
        return self.target - self.weights @ self.rows[: len(self.picked)]

    def add(self, keys: torch.Tensor) -> None:
        """Pick some more keys and refit."""
        first = len(self.picked)
        self.rows[first : first + len(keys)] = self.gram[keys]
        self.picked = torch.cat([self.picked, keys])
        self.weights = torch.cat([self.weights, self.weights.new_zeros(len(keys))])
        self._extend(torch.arange(first, len(self.picked), device=keys.device))
        self._refit()

    def keep(self, strong: torch.Tensor) -> None:
        """Forget the picked keys that are not ``strong`` (num_picked,) bool, and refit."""
        staying = strong.nonzero().squeeze(-1)
        self.rows[: len(staying)] = self.rows[staying]
        self.picked, self.weights = self.picked[staying], self.weights[staying]
        self._resolve()

    def _extend(self, new: torch.Tensor) -> None:
        """Append columns to the factor: [L 0; C D] with C = G_new,free L^-T and D D^T = G_new,new - C C^T."""
        old, size = len(self.free), len(self.free) + len(new)
        rows = self.rows[new]
        cross = torch.linalg.solve_triangular(
            self.factor[:old, :old], rows[:, self.picked[self.free]].T, upper=False
        ).T  # (new, old)
        own = rows[:, self.picked[new]]
        self.factor[old:size, :old] = cross
        self.factor[old:size, old:size] = cholesky(own - cross @ cross.T, own.diagonal())
        self.free = torch.cat([self.free, new])

    def _refit(self) -> None:
        at_top = self.weights * (self.weights >= math.exp(MOST_LOG_BIAS))
        missing = (self.target - at_top @ self.rows[: len(self.picked)])[self.picked[self.free]]
        size = len(self.free)
        inside = torch.cholesky_solve(missing.unsqueeze(-1), self.factor[:size, :size]).squeeze(-1)
        weights = at_top.index_put((self.free,), inside)
        lacking = (self.target - weights @ self.rows[: len(self.picked)])[self.picked]
        bound = TOLERANCE * self.target[self.picked].max()
        outside = (weights < 0) | (weights > math.exp(MOST_LOG_BIAS))
        wants_in = torch.where(at_top > 0, lacking < -bound, (weights == 0) & (lacking > bound))
        if bool((outside | wants_in).any()):
            self._resolve()
        else:
            self.weights = weights

    def _resolve(self) -> None:
        """Solve the whole problem from where it stands, and factor the keys that are then inside the box."""
        self.resolved += 1
        gram = self.rows[: len(self.picked)][:, self.picked]
        high = math.exp(MOST_LOG_BIAS)
        fit = solve_box_nnls(
            gram, self.target[self.picked], lower=0.0, upper=high, start=self.weights, tolerance=TOLERANCE
        )
        self.weights = fit.solution.clamp(0.0, high)
        self.free = ((self.weights > 0) & (self.weights < high)).nonzero().squeeze(-1)
        size = len(self.free)
        inner = gram[self.free][:, self.free]
        self.factor[:size, :size] = cholesky(inner, inner.diagonal())


def cholesky(matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a lower Cholesky factor of ``matrix`` plus the least multiple of diag(``scale``) that lets it factor."""
    jitter, scale = 0.0, scale.clamp_min(1e-30)  # a key that no row sees has a zero column
    factor: torch.Tensor
    while True:
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag(jitter * scale))
        if int(info) == 0:
            return factor
        if jitter > 1.0:
            raise NumericalError(f"The equations of {len(matrix)} keys cannot be solved; {NumericalError.REMEDY}.")
        jitter = max(JITTER, 10.0 * jitter)
