"""Knows what was asked about one document: its full cache, the reference segments, and the passes over them. Everything
is computed once and shared by every method and every size. Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import torch

from compactor import prompt as prompts
from compactor.job import Job, keeps_everything
from compactor.packed import Packed, PackedLayer, WindowLayer, groups, pack, run_packed
from compactor.prefill import CONTEXT_SPAN, Prefilled, prefill
from compactor.reference_queries import repeat_segments, self_study_segments
from compactor.solve.fit import FitInputs, FitLayer
from compactor.solve.scores import ScoreLayer, value_distances
from compactor.solve.select import Selection
from compactor.types import Advance, LayerCache, Segment

SCORE_ROWS = 8192  # packed rows of one score pass; bounds its memory at any document length

Statistic = TypeVar("Statistic")
MakeLayer = Callable[[int, LayerCache, Packed, Advance], PackedLayer]


@dataclass
class Study:
    """A prefilled document and what its reference queries said of it."""

    job: Job
    full: Prefilled
    statistics: dict[Hashable, object] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Statistic]) -> Statistic:
        """Return the statistic ``key``, made by ``make`` the first time: several methods and sizes share it."""
        if key not in self.statistics:
            self.statistics[key] = make()
        return cast(Statistic, self.statistics[key])

    @cached_property
    def segments(self) -> list[Segment]:
        """The reference segments that follow the document: repeat pass and self-study, as the settings ask."""
        with self.job.timed("ask"):
            return [] if keeps_everything(self.job) else ask(self.job, self.full)

    def segments_of(self, *sources: str) -> list[Segment]:
        """Return the segments of some sources."""
        return [segment for segment in self.segments if segment.source in sources]

    def run_layers(self, segments: Sequence[Segment], phase: str, make: MakeLayer, max_rows: int | None = None) -> None:
        """Send segments through the model side by side, in groups of at most ``max_rows`` tokens.

        ``make(layer index, full layer, packed, advance)`` gives the layer of each full-attention layer; sliding layers
        attend exactly. Every segment begins right after the document.
        """
        loaded, full = self.job.loaded, self.full
        batches = [list(segments)] if max_rows is None else groups(segments, max_rows)
        with self.job.reporter.phase(phase, len(batches) * loaded.num_layers, "layers") as advance:
            for batch in batches:
                packed = pack(batch, full.logical_length)
                layers = [
                    make(i, layer, packed, advance)
                    if layer.sliding_window is None
                    else WindowLayer(layer, packed, full.logical_length, advance)
                    for i, layer in enumerate(full.layers)
                ]
                run_packed(loaded, packed, layers)


def prefill_document(job: Job) -> Prefilled:
    """Run prefix and document through the model; the document's own queries score its keys if they are wanted.

    They are fitted only where the repeat pass is left out: beside it they nearly double the rows and change nothing.
    """
    loaded, settings = job.loaded, job.settings
    with job.timed("prefill"):
        observe = "context" in settings.queries and not keeps_everything(job)
        gains = job.head_gains if observe else None
        return prefill(
            loaded,
            list(job.prompt.prefix_ids),
            job.document_ids,
            prefill_chunk=settings.prefill_chunk,
            head_gains=gains,
            reporter=job.reporter,
            keep_queries="repeat" not in settings.queries,
        )


def ask(job: Job, full: Prefilled) -> list[Segment]:
    """Return the reference segments that follow the document.

    Where the sources that were asked for give no row at all (a document of one context span, a window without room for
    self-study) the repeat pass takes their place: without queries every choice of keys would be arbitrary.
    """
    settings, room = job.settings, job.room
    borders = prompts.chunk_borders(len(job.document_ids), settings.chunk)
    segments: list[Segment] = []
    if "repeat" in settings.queries:
        segments += repeat_segments(job.prompt, job.document_ids, borders, room)
    if "self-study" in settings.queries:
        segments += self_study_segments(
            job.loaded,
            full,
            job.prompt,
            total_tokens=job.self_study_tokens,
            room=room,
            seed=settings.seed,
            reporter=job.reporter,
        )
    observed = "context" in settings.queries and len(job.document_ids) > CONTEXT_SPAN
    if not segments and not observed:
        job.reporter.note(f"--queries {','.join(settings.queries)} gives no query here; repeat is used instead.")
        segments = repeat_segments(job.prompt, job.document_ids, borders, room)
    return segments


def source_weights(job: Job, segments: Sequence[Segment]) -> dict[str, float]:
    """Return the weight of a row of each source: every source weighs as much as one row per document token."""
    rows = {"context": max(1, len(job.document_ids) - CONTEXT_SPAN)}
    for segment in segments:
        rows[segment.source] = rows.get(segment.source, 0) + len(segment.token_ids)
    return {source: len(job.document_ids) / count for source, count in rows.items()}


def squared_scores(study: Study, segments: list[Segment], weights: dict[str, float]) -> torch.Tensor:
    """Return squared scores in common currency, (compacted layers, num_kv_heads, num_document) float32 on the host."""
    job, full = study.job, study.full
    shape = (job.loaded.num_kv_heads, len(job.document_ids))
    totals = {i: torch.zeros(shape, device=full.layers[i].keys.device) for i in full.full_layers}
    if "context" in weights:
        for i, context in full.context_scores.items():
            totals[i] += weights["context"] * context
    gains = job.head_gains
    sums = {(i, s.source): torch.zeros_like(totals[i]) for i in full.full_layers for s in segments}

    def make(i: int, layer: LayerCache, packed: Packed, advance: Advance) -> ScoreLayer:
        own = {source: sums[i, source] for source in packed.sources}
        return ScoreLayer(
            layer,
            packed,
            full.logical_length,
            advance,
            prefix_length=full.prefix_length,
            head_gains=gains[i],
            scores=own,
        )

    if segments:
        study.run_layers(segments, "score", make, SCORE_ROWS)
    for (i, source), part in sums.items():
        totals[i] += weights[source] * part
    return torch.stack(
        [
            (totals[i] * value_distances(full.layers[i], full.prefix_length) / full.residual_norms[i] ** 2).cpu()
            for i in full.full_layers
        ]
    )


def fit(
    study: Study, segments: list[Segment], weights: dict[str, float], selection: Selection, counts: torch.Tensor
) -> dict[int, FitLayer]:
    """Fit all layers in one on-policy pass; returns the fitted layer of each compacted index."""
    job, full = study.job, study.full
    # Without segments (context queries alone) one token of suffix carries the pass through the layers.
    carried = segments or [Segment(tuple(job.prompt.question_ids("")[:1]), "carrier")]
    fits: dict[int, FitLayer] = {}

    def make(i: int, layer: LayerCache, packed: Packed, advance: Advance) -> FitLayer:
        row = len(fits)
        inputs = FitInputs(
            prefix_length=full.prefix_length,
            order=selection.order[row],
            counts=counts[row].tolist(),
            head_gains=job.head_gains[i],
            source_weights={"carrier": 0.0, **weights},
            context_queries=full.context_queries.get(i),
            storage_dtype=job.storage_dtype,
            settings=job.settings,
        )
        fits[i] = FitLayer(layer, packed, full.logical_length, advance, inputs)
        return fits[i]

    study.run_layers(carried, "fit", make)
    return fits


def stored(layer: LayerCache, dtype: torch.dtype) -> LayerCache:
    """Return the layer with keys and values in the storage type."""
    from compactor.attach import move_layer

    return move_layer(layer, layer.keys.device, dtype)


def to_host(layer: LayerCache) -> LayerCache:
    """Return the layer in host memory."""
    from compactor.attach import move_layer

    return move_layer(layer, torch.device("cpu"), layer.keys.dtype)
