"""Knows the steps that our methods share: select, budget, fit. Knows no passes and no prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from compactor.budget_profile import allocate_by_shares, read_profile
from compactor.methods import Compacted
from compactor.solve.budget import allocate
from compactor.solve.fit import FitLayer
from compactor.solve.select import Selection
from compactor.solve.shrink import HeadCurve
from compactor.study import (
    Choose,
    Study,
    choose_keys,
    fit,
    greedily,
    picks_per_chunk,
    reference_rows,
    source_weights,
    stored,
)
from compactor.types import Segment

ERROR_ROUNDS = 5  # fits that look for the size of --max-error at most
CLOSE_ENOUGH = 0.05  # of the size: a bracket this narrow ends the search


def solve_segments(
    study: Study, num_kept: int, name: str, segments: list[Segment], choose: Choose, refine_steps: int
) -> Compacted:
    """Order all keys by ``choose`` on the reference segments, keep ``num_kept``; all sizes share the order ``name``,
    except that the greedy search goes no deeper in long documents than a size needs."""
    weights = source_weights(study.job, segments)
    depth = picks_per_chunk(study, num_kept) if choose is greedily else None
    with study.job.timed("select"):
        selection = study.once(
            (name, "selection", depth),
            lambda: choose_keys(study, segments, weights, num_kept, choose),
        )
    return solve(study, num_kept, selection, segments, weights, refine_steps)


def solve(
    study: Study,
    num_kept: int,
    selection: Selection,
    segments: Sequence[Segment],
    weights: dict[str, float],
    refine_steps: int | None,
) -> Compacted:
    """Keep ``num_kept`` document keys over all heads, or the fewest that `--max-error` allows.

    ``refine_steps`` are the method's, for settings that name none; None: nothing is fitted, the keys stay as they are.
    """
    steps, fits = 0, refine_steps is not None
    if refine_steps is not None:
        asked = study.job.settings.refine_steps
        steps = refine_steps if asked is None else asked
    make = partial(
        solve_size, study, selection=selection, segments=segments, weights=weights, refine_steps=steps, fits=fits
    )
    bound = study.job.settings.max_error
    return make(num_kept) if bound is None else solve_error(study, bound, selection, make)


def solve_size(
    study: Study,
    num_kept: int,
    selection: Selection,
    segments: Sequence[Segment],
    weights: dict[str, float],
    refine_steps: int,
    fits: bool,
) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; shares of heads come from the ranking or from a given profile."""
    job = study.job
    with job.timed("budget"):
        counts = head_counts(study, selection, num_kept)
    with job.timed("fit"):
        made = fit(study, list(segments), weights, selection, counts, refine_steps, fits=fits)
    layers = []
    for i, layer in enumerate(study.full.layers):
        fitted = made[i].fitted if i in made else None
        layers.append(stored(layer, job.storage_dtype) if fitted is None else fitted)
    curves = head_curves(study, made) if job.settings.keep_curves else None
    rows = {"reference_rows": reference_rows(study, segments)}
    return Compacted(layers, study.full.logical_length, report(study, made, segments, weights) | rows, curves)


def solve_error(study: Study, bound: float, selection: Selection, make: Callable[[int], Compacted]) -> Compacted:
    """Find the fewest keys whose reconstruction error is at most ``bound``.

    The sum of the gains that are left out foretells the first size; from then on the fits themselves do. At most
    `ERROR_ROUNDS` fits; the answer is a size that was fitted and holds, every key if none does.
    """
    num_heads = selection.gains.shape[0] * selection.gains.shape[1]
    fewest, most = num_heads, selection.gains.numel()
    low, high, best = fewest - 1, most, None
    size = first_size(remaining_gains(selection.gains), bound, fewest)
    tried: dict[int, float] = {}
    for _ in range(ERROR_ROUNDS):
        made = make(size)
        tried[size] = float(made.report["reconstruction_error"])
        study.job.reporter.note(f"{size:,} keys: reconstruction error {tried[size]:.3g}, --max-error {bound:g}.")
        if tried[size] <= bound:
            high, best = size, made
        else:
            low = size
        if high - low <= max(1, CLOSE_ENOUGH * high):
            break
        margin = max(1, (high - low) // 10)
        size = min(max(next_size(tried, size, low, high, bound), low + margin), high - margin)
    return best or make(most)


def next_size(tried: dict[int, float], size: int, low: int, high: int, bound: float) -> int:
    """Return the size at which a power law meets the bound: through the sizes around it, or through the last one as if
    the error fell with the number of keys. ``tried``: error of each size."""
    if low in tried and high in tried and tried[low] > tried[high] > 0.0:
        share = math.log(tried[low] / bound) / math.log(tried[low] / tried[high])
        return int(low * (high / low) ** (0.5 * (share + 0.5)))  # half way to bisection: one end must not stand still
    return int(size * max(tried[size], 1e-9) / bound)


def remaining_gains(gains: torch.Tensor) -> torch.Tensor:
    """Return the sum of all gains beyond the n largest, for n = 1 .. all: float64, falling."""
    ranked = gains.flatten().double().sort(descending=True).values
    return ranked.sum() - ranked.cumsum(0)


def first_size(left_out: torch.Tensor, bound: float, fewest: int) -> int:
    """Return the size at which what is left out is ``bound`` squared of everything, at least ``fewest``."""
    wanted = float(left_out[0]) * min(1.0, bound) ** 2
    return min(len(left_out), max(fewest, int((left_out > wanted).sum()) + 1))


def head_counts(study: Study, selection: Selection, num_kept: int) -> torch.Tensor:
    """Return the number of keys of each head, (compacted layers, num_kv_heads) int64."""
    job = study.job
    if job.settings.budget is None:
        return allocate(selection.gains, num_kept)
    shares = read_profile(job.settings.budget, job.loaded.identity())
    return allocate_by_shares(shares, num_kept, len(job.document_ids))


def head_curves(study: Study, fits: dict[int, FitLayer]) -> list[list[HeadCurve] | None]:
    """Return what `compactor recompact` needs: per layer and head the kept keys' gains and chunk Gram matrices."""
    return [
        [head.curve for head in fits[i].heads if head.curve is not None] if i in fits else None
        for i in range(len(study.full.layers))
    ]


def report(
    study: Study, fits: dict[int, FitLayer], segments: Sequence[Segment], weights: dict[str, float]
) -> dict[str, object]:
    """Return the errors of the fit.

    Errors are relative, sqrt(sum w |o' - o|^2 / sum w |o|^2), with the weights of the common currency; heads that
    keep every key take no part. ``predicted_damage`` is the squared error itself, in common currency, per unit of row
    weight: what the joint fit leaves, summed over layers and heads.
    """
    fitted, unfitted = [], []
    for i, layer in fits.items():
        currency = float(study.full.residual_norms[i]) ** -2
        fitted += [(h.squared_error * currency, h.energy * currency) for h in layer.heads]
        unfitted += [(h.unfitted_error * currency, h.energy * currency) for h in layer.heads]
    errors = {i: relative_error([(h.squared_error, h.energy) for h in layer.heads]) for i, layer in fits.items()}
    fitted_sources = {segment.source for segment in segments}
    if "context" in weights and study.full.context_queries:
        fitted_sources.add("context")
    total_weight = len(study.job.document_ids) * max(1, len(fitted_sources))  # a source weighs a row per document token
    return {
        "reconstruction_error": relative_error(fitted),
        "reconstruction_error_before_values": relative_error(unfitted),
        "reconstruction_error_per_layer": {str(i): error for i, error in errors.items()},
        "predicted_damage": sum(error for error, _ in fitted) / total_weight,
    }


def relative_error(parts: list[tuple[float, float]]) -> float:
    """Return sqrt(sum of errors / sum of energies), 0 when there is no energy."""
    energy = sum(part[1] for part in parts)
    if energy != energy:  # not a number: say so instead of hiding it
        return float("nan")
    return (sum(part[0] for part in parts) / energy) ** 0.5 if energy > 0 else 0.0
