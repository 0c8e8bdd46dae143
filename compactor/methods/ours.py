"""Knows the steps that our methods share: select, budget, fit. Knows no passes and no prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compactor.budget_profile import allocate_by_shares, read_profile
from compactor.methods import Compacted
from compactor.solve.budget import allocate
from compactor.solve.fit import FitLayer
from compactor.solve.select import Selection
from compactor.solve.shrink import HeadCurve
from compactor.study import Study, choose_keys, fit, picks_per_chunk, reference_rows, source_weights, stored
from compactor.types import Segment

ERROR_ROUNDS = 5  # fits that look for the size of --max-error at most
CLOSE_ENOUGH = 0.05  # of the size: a bracket this narrow ends the search


def solve_greedily(study: Study, num_kept: int, name: str, segments: list[Segment]) -> Compacted:
    """Order all keys by the reference segments, the document's own queries beside them, and keep ``num_kept``; the
    order is shared by all sizes under ``name``."""
    weights = source_weights(study.job, segments)
    with study.job.timed("select"):
        selection = study.once(
            (name, "selection", picks_per_chunk(study, num_kept)),
            lambda: choose_keys(study, segments, weights, num_kept),
        )
    return solve(study, num_kept, selection, segments, weights)


def solve(
    study: Study, num_kept: int, selection: Selection, segments: Sequence[Segment], weights: dict[str, float]
) -> Compacted:
    """Keep ``num_kept`` document keys over all heads, or the fewest that `--max-error` allows."""
    bound = study.job.settings.max_error
    if bound is None:
        return solve_size(study, num_kept, selection, segments, weights)
    return solve_error(study, bound, selection, segments, weights)


def solve_size(
    study: Study, num_kept: int, selection: Selection, segments: Sequence[Segment], weights: dict[str, float]
) -> Compacted:
    """Keep ``num_kept`` document keys over all heads; shares of heads come from the ranking or from a given profile."""
    job = study.job
    with job.timed("budget"):
        counts = head_counts(study, selection, num_kept)
    with job.timed("fit"):
        fits = fit(study, list(segments), weights, selection, counts)
    layers = []
    for i, layer in enumerate(study.full.layers):
        fitted = fits[i].fitted if i in fits else None
        layers.append(stored(layer, job.storage_dtype) if fitted is None else fitted)
    curves = head_curves(study, fits) if job.settings.keep_curves else None
    rows = {"reference_rows": reference_rows(study, segments)}
    return Compacted(layers, study.full.logical_length, report(study, fits, segments, weights) | rows, curves)


def solve_error(
    study: Study, bound: float, selection: Selection, segments: Sequence[Segment], weights: dict[str, float]
) -> Compacted:
    """Find the fewest keys whose reconstruction error is at most ``bound``.

    The sum of the gains that are left out foretells how the squared error changes with the size; every fit corrects the
    forecast. At most `ERROR_ROUNDS` fits; the answer is a size that was fitted and holds, every key if none does.
    """
    num_heads = selection.gains.shape[0] * selection.gains.shape[1]
    left_out = remaining_gains(selection.gains)
    fewest, most = num_heads, selection.gains.numel()
    low, high, best = fewest - 1, most, None
    size = first_size(left_out, bound, fewest)
    for _ in range(ERROR_ROUNDS):
        made = solve_size(study, size, selection, segments, weights)
        error = float(made.report["reconstruction_error"])
        study.job.reporter.note(f"{size:,} keys: reconstruction error {error:.3g}, --max-error {bound:g}.")
        if error <= bound:
            high, best = size, made
        else:
            low = size
        if high - low <= max(1, CLOSE_ENOUGH * high):
            break
        wanted = left_out[size - 1] * (bound / max(error, 1e-9)) ** 2
        size = int((left_out > wanted).sum()) + 1
        size = min(max(size, low + max(1, (high - low) // 10)), high - max(1, (high - low) // 10))
    return best or solve_size(study, most, selection, segments, weights)


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
        "unconverged_heads": sum(not head.converged for layer in fits.values() for head in layer.heads),
    }


def relative_error(parts: list[tuple[float, float]]) -> float:
    """Return sqrt(sum of errors / sum of energies), 0 when there is no energy."""
    energy = sum(part[1] for part in parts)
    if energy != energy:  # not a number: say so instead of hiding it
        return float("nan")
    return (sum(part[0] for part in parts) / energy) ** 0.5 if energy > 0 else 0.0
