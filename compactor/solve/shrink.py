"""Knows how a fitted head gives up more keys without its queries. Knows no files and no passes.

The fit left G = sum_i w_i A_i A_i^T over the kept keys of each chunk of the document (`HeadCurve`). With it the kept
keys are the document: key j has the column X_j = b_j A_j and the value v_j. A chunk's surviving keys S must deliver
what all of its keys deliver now, and every product that this takes is an entry of G:

    biases   minimise over b'   sum_i w_i (A_S b' - X 1)_i^2                          in the box of the first fit
    values   minimise over v'   sum_i w_i ||A_S B' (v' - mu) - X (v - mu)||_i^2 + ridge * d * ||v' - v||^2

mu is the head's mean output: with it an error of the mass, which moves the normaliser, and an error of the values add
up to the error of the output. Products between chunks are not kept; a chunk that loses its last key is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from compactor.errors import SettingsError
from compactor.solve.biases import add_diagonal, cholesky_solve, solve_box_nnls
from compactor.solve.budget import FLOOR_FRACTION
from compactor.types import LayerCache

PRIOR = 1e-4  # pull of each b towards what it is, relative to its own diagonal entry
RIDGE = 1e-2  # weight of the pull towards the present values, relative to the head's mean diagonal
TOLERANCE = 1e-6  # stopping test of the biases; G is kept in float16


@dataclass(frozen=True)
class HeadCurve:
    """What a smaller size of one KV head needs; keys are the kept document keys, in order of position."""

    gains: torch.Tensor  # (num_kept,) float32, what each key is worth in the ranking over all heads and layers
    diagonals: torch.Tensor  # (num_kept,) float32, G_jj in common currency
    blocks: list[torch.Tensor]  # [c] of chunk c: (n_c, n_c) float16, G_ij / sqrt(G_ii G_jj); n_c may be 0

    @property
    def chunk_lengths(self) -> list[int]:
        """Number of kept keys of each chunk."""
        return [block.shape[0] for block in self.blocks]


@dataclass(frozen=True)
class ShrunkHead:
    """The keys that one KV head keeps of those it had."""

    kept: torch.Tensor  # (num_kept,) int64, indices into the former keys, increasing
    biases: torch.Tensor  # (num_kept,) float32
    values: torch.Tensor  # (num_kept, head_dim) float32
    curve: HeadCurve
    squared_error: float  # of what the chunks deliver, weighted, in common currency
    energy: float  # weighted squared norm of what they delivered


def chunk_blocks(
    gram: torch.Tensor, kept_positions: torch.Tensor, chunk: int, *, gains: torch.Tensor, currency: float = 1.0
) -> HeadCurve:
    """Cut the Gram matrix of a head's kept keys into the blocks of its chunks of ``chunk`` document tokens.

    gram: (num_kept, num_kept), sum_i w_i A_ia A_ib without biases, true denominators, on any device; kept_positions:
    (num_kept,) int64, document-relative, increasing, in the order of ``gram``; gains: (num_kept,), in the same order.
    ``currency`` multiplies G: 1 / r_l^2 makes it that of all layers. The result lies in host memory.
    """
    positions = kept_positions.cpu()
    diagonal = gram.diagonal().clamp_min(0)
    root = diagonal.sqrt()
    root = torch.where(root > 0, root, 1.0)
    last = int(positions[-1]) // chunk if len(positions) else -1
    borders = torch.searchsorted(positions, torch.arange(last + 2) * chunk).tolist()
    blocks = []
    for first, stop in pairwise(borders):
        inside = slice(first, stop)
        block = gram[inside, inside] / root[inside] / root[inside].unsqueeze(-1)
        blocks.append(block.to(torch.float16).cpu().fill_diagonal_(1.0))
    return HeadCurve(gains.float().cpu(), (diagonal * currency).float().cpu(), blocks)


def smaller_counts(curves: Sequence[Sequence[HeadCurve]], total: int) -> list[list[int]]:
    """Return how many keys each head of each layer keeps when all heads together keep ``total``.

    One ranking of the gains over all heads after each head has its floor, as in `budget.allocate`; a head that has
    fewer keys than the floor keeps them all. Raises SettingsError when ``total`` is below one key a head.
    """
    heads = [head for layer in curves for head in layer]
    lengths = [len(head.gains) for head in heads]
    check_total(total, sum(length > 0 for length in lengths))
    least = max(1, int(FLOOR_FRACTION * total / len(heads)))
    floors = [min(length, least) for length in lengths]
    ranked = [head.gains.sort(descending=True, stable=True).values[least:] for head in heads]
    owners = torch.repeat_interleave(torch.tensor([len(rest) for rest in ranked]))
    winners = torch.cat(ranked).sort(descending=True, stable=True).indices[: total - sum(floors)]
    counts = iter((torch.bincount(owners[winners], minlength=len(heads)) + torch.tensor(floors)).tolist())
    return [[next(counts) for _ in layer] for layer in curves]


def check_total(total: int, num_heads: int) -> None:
    """Raise SettingsError when ``total`` keys are less than one for each of ``num_heads`` heads."""
    if total < num_heads:
        raise SettingsError(
            f"The size target keeps {total} document keys over {num_heads} heads; raise it to at least one key a head."
        )


def shrink_head(
    curve: HeadCurve,
    biases: torch.Tensor,
    values: torch.Tensor,
    count: int,
    *,
    lower: float,
    upper: float,
    prior: float = PRIOR,
    ridge: float = RIDGE,
    fits: bool = True,
) -> ShrunkHead:
    """Keep the ``count`` best keys of a head; those that go leave their mass and value to the others of their chunk.

    biases (num_kept,) and values (num_kept, head_dim) are those of the document keys that ``curve`` describes;
    ``lower`` and ``upper`` bound b = exp(bias). A chunk that loses no key stays as it is, bit for bit; without ``fits``
    every key does.
    """
    order = curve.gains.sort(descending=True, stable=True).indices
    kept = order[:count].sort().values
    weights, old_values = biases.double().exp(), values.double()
    new_weights, new_values = weights.clone(), old_values.clone()
    grams = chunk_grams(curve)
    mean = mean_output(grams, weights, old_values)
    strength = ridge * mean_diagonal(curve, weights)
    error = energy = 0.0
    start = 0
    for gram in grams:
        mine = slice(start, start + len(gram))
        stays = kept[(kept >= mine.start) & (kept < mine.stop)] - start
        start = mine.stop
        delivered = weights[mine].unsqueeze(-1) * (old_values[mine] - mean)  # X (v - mu) = A times this
        chunk_energy = quadratic(gram, delivered)
        energy += chunk_energy
        if len(stays) == len(gram):
            continue
        if not len(stays):
            error += chunk_energy
            continue
        block, cross = gram[stays][:, stays], gram[stays]
        b, own = weights[mine][stays], old_values[mine][stays]
        if fits:
            b = solve_biases(block, cross @ weights[mine], b, lower, upper, prior)
            wanted = b.unsqueeze(-1) * (cross @ delivered - block @ (b.unsqueeze(-1) * (own - mean)))
            own = own + cholesky_solve(add_diagonal(block * b * b.unsqueeze(-1), strength), wanted)
        new_weights[mine.start + stays], new_values[mine.start + stays] = b, own
        delivered[stays] -= b.unsqueeze(-1) * (own - mean)
        error += quadratic(gram, delivered)
    new_biases = torch.where(new_weights == weights, biases.double(), new_weights.log())
    return ShrunkHead(
        kept, new_biases[kept].float(), new_values[kept].float(), keep_of_curve(curve, kept), error, energy
    )


def solve_biases(
    gram: torch.Tensor, rhs: torch.Tensor, present: torch.Tensor, lower: float, upper: float, prior: float
) -> torch.Tensor:
    """Return b' of the surviving keys of one chunk, in the box; see the module for the objective. All float64."""
    pull = prior * gram.diagonal()
    fit = solve_box_nnls(
        gram + torch.diag(pull),
        rhs + pull * present,
        lower=lower,
        upper=upper,
        start=present,
        tolerance=TOLERANCE,
    )
    return fit.solution


def chunk_grams(curve: HeadCurve) -> list[torch.Tensor]:
    """Return G of each chunk, (n_c, n_c) float64."""
    roots = curve.diagonals.double().sqrt().split(curve.chunk_lengths)
    return [block.double() * root * root.unsqueeze(-1) for block, root in zip(curve.blocks, roots, strict=True)]


def mean_output(grams: list[torch.Tensor], weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the mean of what the kept keys return, (head_dim,): each key counts by sum_i w_i m_i X_ij."""
    parts = weights.split([len(gram) for gram in grams])
    masses = torch.cat([gram @ own for gram, own in zip(grams, parts, strict=True)])
    counts = (weights * masses).clamp_min(0)
    return counts @ values / counts.sum().clamp_min(1e-300)


def mean_diagonal(curve: HeadCurve, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean diagonal of X^T W X over the head's keys."""
    return (curve.diagonals.double() * weights.square()).mean().clamp_min(1e-300)


def quadratic(gram: torch.Tensor, columns: torch.Tensor) -> float:
    """Return the sum over columns c of c^T gram c, at least 0."""
    return max(0.0, float((columns * (gram @ columns)).sum()))


def keep_of_curve(curve: HeadCurve, kept: torch.Tensor) -> HeadCurve:
    """Return the curve of the keys ``kept`` (increasing indices)."""
    blocks, start = [], 0
    for block in curve.blocks:
        stays = kept[(kept >= start) & (kept < start + len(block))] - start
        blocks.append(block[stays][:, stays])
        start += len(block)
    return HeadCurve(curve.gains[kept], curve.diagonals[kept], blocks)


def shrink_layer(
    layer: LayerCache,
    prefix_length: int,
    curves: Sequence[HeadCurve],
    counts: Sequence[int],
    *,
    lower: float,
    upper: float,
    prior: float = PRIOR,
    ridge: float = RIDGE,
    fits: bool = True,
) -> tuple[LayerCache, list[ShrunkHead]]:
    """Shrink every head of a compacted layer to its count of document keys; the prefix stays as it is. See
    `shrink_head`."""
    rows, biases, values, lengths, heads = [], [], [], [0], []
    borders = layer.offsets.tolist()
    for (start, stop), curve, count in zip(pairwise(borders), curves, counts, strict=True):
        document = slice(start + prefix_length, stop)
        head = shrink_head(
            curve,
            layer.biases[document],
            layer.values[document],
            count,
            lower=lower,
            upper=upper,
            prior=prior,
            ridge=ridge,
            fits=fits,
        )
        prefix = torch.arange(start, document.start)
        rows += [prefix, head.kept + document.start]
        biases += [layer.biases[prefix], head.biases]
        values += [layer.values[prefix], head.values.to(layer.values.dtype)]
        lengths.append(prefix_length + len(head.kept))
        heads.append(head)
    index = torch.cat(rows)
    smaller = LayerCache(
        keys=layer.keys[index],
        values=torch.cat(values),
        biases=torch.cat(biases),
        positions=layer.positions[index],
        offsets=torch.tensor(lengths).cumsum(0).to(torch.int32),
    )
    return smaller, heads
