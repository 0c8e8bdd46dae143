"""Knows the steps that our methods share: score, select, budget, fit. Knows no passes and no prompts."""

from __future__ import annotations

from compactor.methods import Compacted
from compactor.solve.budget import allocate
from compactor.solve.fit import FitLayer
from compactor.study import Study, fit, greedy_selection, source_weights, stored


def solve(study: Study, num_kept: int) -> Compacted:
    """Keep ``num_kept`` document keys over all heads."""
    job, segments = study.job, study.segments
    weights = source_weights(job, segments)
    with job.timed("select"):
        selection = study.once("greedy", lambda: greedy_selection(study, segments, weights))
    with job.timed("budget"):
        counts = allocate(selection.gains, num_kept)
    with job.timed("fit"):
        fits = fit(study, segments, weights, selection, counts)
    layers = []
    for i, layer in enumerate(study.full.layers):
        fitted = fits[i].fitted if i in fits else None
        layers.append(stored(layer, job.storage_dtype) if fitted is None else fitted)
    return Compacted(layers, study.full.logical_length, report(study, fits))


def report(study: Study, fits: dict[int, FitLayer]) -> dict[str, object]:
    """Return the errors of the fit.

    Errors are relative, sqrt(sum w |o' - o|^2 / sum w |o|^2), with the weights of the common currency; heads that keep
    every key take no part.
    """
    fitted, unfitted = [], []
    for i, layer in fits.items():
        currency = float(study.full.residual_norms[i]) ** -2
        fitted += [(h.squared_error * currency, h.energy * currency) for h in layer.heads]
        unfitted += [(h.unfitted_error * currency, h.energy * currency) for h in layer.heads]
    errors = {i: relative_error([(h.squared_error, h.energy) for h in layer.heads]) for i, layer in fits.items()}
    return {
        "reconstruction_error": relative_error(fitted),
        "reconstruction_error_before_values": relative_error(unfitted),
        "reconstruction_error_per_layer": {str(i): error for i, error in errors.items()},
        "unconverged_heads": sum(not head.converged for layer in fits.values() for head in layer.heads),
    }


def relative_error(parts: list[tuple[float, float]]) -> float:
    """Return sqrt(sum of errors / sum of energies), 0 when there is no energy."""
    energy = sum(part[1] for part in parts)
    return (sum(part[0] for part in parts) / energy) ** 0.5 if energy > 0 else 0.0
