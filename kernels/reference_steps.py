"""Knows the steps of a layer's refinement in plain torch, on any device. Knows no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from compactor_kernels.reference import FitRows, refine_gradients_reference

EPSILON = 1e-8  # of Adam


class Moving(NamedTuple):
    """The padded keys, biases and values of a layer, or a number for each of theirs."""

    keys: torch.Tensor  # (num_heads, longest, head_dim)
    biases: torch.Tensor  # (num_heads, longest)
    values: torch.Tensor  # (num_heads, longest, head_dim)


@dataclass(frozen=True)
class Steps:
    """Where a descent is; a step changes the tensors of the first four fields in place."""

    moving: Moving
    first: Moving  # running means of the gradients
    second: Moving  # running means of their squares
    number: torch.Tensor  # (1,) int64: of the next step
    units: torch.Tensor  # (3, num_heads): what a change of 1 moves keys, biases and values of a head by
    drawn: torch.Tensor  # (steps, num_drawn) int64: row numbers of all steps
    rates: torch.Tensor  # (steps,)
    betas: tuple[float, float]


def begin_steps_reference(
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    units: torch.Tensor,
    drawn: torch.Tensor,
    rates: torch.Tensor,
    betas: tuple[float, float],
) -> Steps:
    """Return a descent that has taken no step yet, from copies of keys, biases and values; shapes as in `Steps`."""
    start = (keys, biases, values)
    first, second = (Moving(*(torch.zeros_like(part) for part in start)) for _ in range(2))
    number = torch.zeros(1, dtype=torch.int64, device=keys.device)
    return Steps(Moving(*(part.clone() for part in start)), first, second, number, units, drawn, rates, betas)


def take_step_reference(
    rows: FitRows, lengths: torch.Tensor | Sequence[int], scales: torch.Tensor, steps: Steps, *, scaling: float
) -> None:
    """Take the next step of Adam (Kingma and Ba 2015, algorithm 1); twin of `take_step`.

        m = beta_1 m + (1 - beta_1) g,   v = beta_2 v + (1 - beta_2) g^2
        x = x - unit rate (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + EPSILON)

    in step t, counted from 1. g are the gradients that `refine_gradients_reference` gives on the step's rows: with
    ``scales`` that contain the units, those with respect to changes in these units.
    """
    number = int(steps.number)
    gradients = refine_gradients_reference(rows, steps.drawn[number], *steps.moving, lengths, scales, scaling=scaling)
    beta_1, beta_2 = steps.betas
    for part, first, second, gradient, unit in zip(
        steps.moving, steps.first, steps.second, gradients, steps.units, strict=True
    ):
        first.mul_(beta_1).add_((1.0 - beta_1) * gradient)
        second.mul_(beta_2).add_((1.0 - beta_2) * gradient.square())
        mean = first / (1.0 - beta_1 ** (number + 1))
        spread = (second / (1.0 - beta_2 ** (number + 1))).sqrt() + EPSILON
        part -= unit.view(-1, *[1] * (part.dim() - 1)) * steps.rates[number] * mean / spread
    steps.number.add_(1)
