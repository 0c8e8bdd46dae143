"""Knows Attention Matching's cheaper selection (arXiv 2602.16284, "highest attention keys"). Knows no passes.

    score_j = sqrt(mean over rows i of A_ij^2),   A_i = softmax(s q_i.K) over the document alone

Biases from box-constrained non-negative least squares, solved to convergence (the published program takes two projected
gradient steps).
"""

from __future__ import annotations

import math

import torch

from compactor.methods import Compacted
from compactor.methods.attention_matching import Head, MatchLayer, Rows, mass_system, match, read_rows
from compactor.solve.biases import solve_box_nnls
from compactor.study import Study

SUMMARY = "published Attention Matching: keys by root-mean-square attention, biases and values fitted"
LOG_BIAS = 3.0  # biases lie in [-3, 3]
BIAS_TOLERANCE = 1e-6  # of the solver; the data are float32


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys, equally many in every head."""
    return match(study, num_kept, RmsLayer)


class RmsLayer(MatchLayer):
    """Keeps the keys with the largest root-mean-square attention."""

    def choose(self, head: Head, count: int) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """Return keys by score, best first; see `MatchLayer.choose`."""
        squares = torch.zeros(len(head.keys), device=head.keys.device)

        def see(features: torch.Tensor, mass: torch.Tensor) -> None:
            squares.add_(features.div_(mass).square_().sum(0))

        rows = read_rows(head, see)
        kept = squares.sort(descending=True, stable=True).indices[:count]
        return kept, fit_biases(*mass_system(head, rows, kept)).to(head.keys.device), rows


def fit_biases(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the biases (n,) float32 that match the mass within the box."""
    fit = solve_box_nnls(gram, target, lower=math.exp(-LOG_BIAS), upper=math.exp(LOG_BIAS), tolerance=BIAS_TOLERANCE)
    return fit.solution.log().float()
