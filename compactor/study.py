"""Knows what was asked about one document: its full cache, the reference segments, and the passes over them. Everything
is computed once and shared by every method and every size. Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar, cast

import torch

from compactor import prompt as prompts
from compactor import workspace
from compactor.config import OUR_METHODS
from compactor.job import Job, keeps_everything
from compactor.packed import Packed, PackedLayer, WindowLayer, groups, pack, run_packed
from compactor.prefill import CONTEXT_SPAN, Prefilled, prefill
from compactor.reference_queries import repeat_segments
from compactor.self_study import make_plan, self_study_segments
from compactor.solve.chunk_grams import ChunkGrams, GramLayer, add_diagonal
from compactor.solve.fit import FitInputs, FitLayer
from compactor.solve.key_scores import KeySums, ScoreLayer
from compactor.solve.refine import Refiner
from compactor.solve.scores import value_distances
from compactor.solve.select import LayerCurves, Selection, greedy_curves, select_keys
from compactor.types import Advance, LayerCache, Segment

GRAM_ROWS = 65536  # packed rows of one pass; up to here a layer's Gram matrices are gone before the next's begin
LEAST_ROWS = 512  # the same, however small the workspace
GRAM_BYTES = 4 << 30  # of Gram matrices held at once where one pass is not enough
DEEP_TOKENS = 16384  # documents up to here are ordered greedily to the last key
DEPTH, LEAST_PICKS = 6, 32  # in longer ones: so many times the average count of a chunk, and some more
GREEDY_CHUNK = 512  # document keys of one greedy problem at most
OWN_SHARE = 1.0  # of its own energy that a key counts as unlike any other: 0 is plain greedy, infinity single scores
CONTEXT_SHARE = 0.5  # of the weight of context rows in the Gram diagonals
STOP = 1e-4  # of a chunk's energy: a smaller gain ends its greedy search

Statistic = TypeVar("Statistic")
MakeLayer = Callable[[int, LayerCache, Packed, Advance], PackedLayer]


@dataclass
class Study:
    """A prefilled document and what its reference queries said of it."""

    job: Job
    full: Prefilled
    statistics: dict[Hashable, object] = field(default_factory=dict)
    asked: set[tuple[int, ...]] = field(default_factory=set)  # the questions of all segments that were made

    def once(self, key: Hashable, make: Callable[[], Statistic]) -> Statistic:
        """Return the statistic ``key``, made by ``make`` the first time: several methods and sizes share it."""
        if key not in self.statistics:
            self.statistics[key] = make()
        return cast(Statistic, self.statistics[key])

    @cached_property
    def segments(self) -> list[Segment]:
        """The reference segments that follow the document: repeat pass and self-study, as the settings ask."""
        with self.job.timed("ask"):
            return [] if keeps_everything(self.job) else self._ask(1)

    def more_segments(self, rounds: int) -> list[Segment]:
        """Return the same with ``rounds`` questions about every passage."""

        def make() -> list[Segment]:
            with self.job.timed("ask"):
                return self._ask(rounds)

        return [] if keeps_everything(self.job) else self.once(("segments", rounds), make)

    def _ask(self, rounds: int) -> list[Segment]:
        segments = ask(self.job, self.full, rounds)
        self.asked.update(segment.token_ids[: segment.answer_start] for segment in segments)
        return segments

    def run_layers(self, segments: Sequence[Segment], phase: str, make: MakeLayer) -> None:
        """Send segments through the model side by side.

        ``make(layer index, full layer, packed, advance)`` gives the layer of each full-attention layer; sliding layers
        attend exactly. Every segment begins right after the document.
        """
        loaded, full = self.job.loaded, self.full
        packed = pack(segments, full.logical_length)
        with self.job.reporter.phase(phase, loaded.num_layers, "layers") as advance:
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
        observe = settings.method in OUR_METHODS and "context" in settings.queries and not keeps_everything(job)
        gains = job.head_gains if observe else None
        return prefill(
            loaded,
            list(job.prompt.prefix_ids),
            job.document_ids,
            prefill_chunk=settings.prefill_chunk,
            head_gains=gains,
            reporter=job.reporter,
            keep_queries="repeat" not in settings.queries and settings.method != "fast",
        )


def ask(job: Job, full: Prefilled, rounds: int = 1) -> list[Segment]:
    """Return the reference segments that follow the document; ``rounds``: questions about every passage.

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
            plan=make_plan(len(job.document_ids), rounds * job.self_study_tokens, rounds),
            room=room,
            seed=settings.seed,
            reporter=job.reporter,
        )
    observed = "context" in settings.queries and len(job.document_ids) > CONTEXT_SPAN
    if not segments and not observed:
        job.reporter.note(f"--queries {','.join(settings.queries)} gives no query here; repeat is used instead.")
        segments = repeat_segments(job.prompt, job.document_ids, borders, room)
    return segments


def reference_rows(study: Study, segments: Sequence[Segment]) -> dict[str, int]:
    """Return how many query rows each source gave: the document's own, and those of ``segments``."""
    rows = {"context": max(0, len(study.job.document_ids) - CONTEXT_SPAN)} if study.full.context_scores else {}
    for segment in segments:
        rows[segment.source] = rows.get(segment.source, 0) + len(segment.token_ids)
    return rows


def source_weights(job: Job, segments: Sequence[Segment]) -> dict[str, float]:
    """Return the weight of a row of each source: every source weighs as much as one row per document token."""
    rows = {"context": max(1, len(job.document_ids) - CONTEXT_SPAN)}
    for segment in segments:
        rows[segment.source] = rows.get(segment.source, 0) + len(segment.token_ids)
    return {source: len(job.document_ids) / count for source, count in rows.items()}


Choose = Callable[[Study, list[Segment], dict[str, float], int], Selection]


def choose_keys(
    study: Study, segments: list[Segment], weights: dict[str, float], num_kept: int, choose: Choose
) -> Selection:
    """Order all keys by ``choose``; where no reference segment follows the document, by the document's own queries."""
    if segments:
        return choose(study, segments, weights, num_kept)
    if study.full.context_scores:
        return context_selection(study)
    num_document, num_kv_heads = len(study.job.document_ids), study.job.loaded.num_kv_heads
    return select_keys(torch.zeros(len(study.full.full_layers), num_kv_heads, num_document))


def by_score(study: Study, segments: list[Segment], weights: dict[str, float], num_kept: int) -> Selection:
    """Order all keys by what each alone is worth (solve/key_scores.py), for any size."""
    return scored_selection(study, segments, weights)


def greedily(study: Study, segments: list[Segment], weights: dict[str, float], num_kept: int) -> Selection:
    """Order all keys greedily (solve/greedy.py), as deep as ``num_kept`` needs."""
    return greedy_selection(study, segments, weights, picks_per_chunk(study, num_kept))


def scored_selection(study: Study, segments: list[Segment], weights: dict[str, float]) -> Selection:
    """Order all keys by their single scores."""
    return select_keys(key_scores(study, segments, weights).cpu())


def key_scores(study: Study, segments: list[Segment], weights: dict[str, float]) -> torch.Tensor:
    """Return the single scores of all keys, (num_layers, num_kv_heads, num_document) float32 in common currency; the
    document's own queries add theirs."""
    full, num_kv_heads = study.full, study.job.loaded.num_kv_heads
    sums: dict[int, KeySums] = {}

    def sums_of(i: int, head_dim: int, device: torch.device) -> KeySums:
        if i not in sums:
            sums[i] = KeySums.empty(num_kv_heads, len(study.job.document_ids), head_dim, device)
        return sums[i]

    def make(i: int, layer: LayerCache, packed: Packed, advance: Advance) -> ScoreLayer:
        return ScoreLayer(
            layer,
            packed,
            full.logical_length,
            advance,
            prefix_length=full.prefix_length,
            head_gains=study.job.head_gains[i],
            source_weights=weights,
            sums=partial(sums_of, i),
        )

    for batch in groups(segments, pass_rows(study)):
        study.run_layers(batch, "select", make)
    own = context_squares(full, weights)
    scores = [
        sums[i].scores(full.layers[i], full.prefix_length, own.get(i)) / full.residual_norms[i] ** 2
        for i in full.full_layers
    ]
    return torch.stack([one.to(scores[0].device) for one in scores])


def context_squares(full: Prefilled, weights: dict[str, float]) -> dict[int, torch.Tensor]:
    """Return what the document's own queries add to the sums of w A_ij^2 of each layer, where they were observed."""
    return {i: scores * weights["context"] for i, scores in full.context_scores.items() if "context" in weights}


def context_selection(study: Study) -> Selection:
    """Order all keys by the scores that the document's own queries gave them during prefill, in common currency."""
    full = study.full
    return select_keys(
        torch.stack(
            [
                (
                    full.context_scores[i]
                    * value_distances(full.layers[i], full.prefix_length)
                    / full.residual_norms[i] ** 2
                ).cpu()
                for i in full.full_layers
            ]
        )
    )


def picks_per_chunk(study: Study, num_kept: int) -> int:
    """Return how many keys of a chunk are picked greedily when ``num_kept`` are kept over all heads.

    All of them in documents of up to `DEEP_TOKENS` tokens, whatever the size: one order serves every size. In longer
    ones `DEPTH` times the average, and some more.
    """
    num_document = len(study.job.document_ids)
    size = -(-num_document // -(-num_document // GREEDY_CHUNK))
    if num_document <= DEEP_TOKENS:
        return size
    average = num_kept * size / (len(study.full.full_layers) * study.job.loaded.num_kv_heads * num_document)
    return min(size, round(DEPTH * average) + LEAST_PICKS)


def greedy_selection(study: Study, segments: list[Segment], weights: dict[str, float], num_picks: int) -> Selection:
    """Order all keys by forward orthogonal least squares per chunk (solve/greedy.py), in common currency.

    Context rows take part by the diagonal of the Gram matrices alone: each key's own squared attention.
    """
    full = study.full
    batches = groups(segments, pass_rows(study))
    curves: dict[int, LayerCurves] = {}
    if len(batches) == 1:  # a layer is finished before the next begins
        GramPass(study, weights, full.full_layers, curves, num_picks).run(batches)
    else:
        at_once = max(1, held_bytes() // gram_bytes(study))
        for start in range(0, len(full.full_layers), at_once):
            GramPass(study, weights, full.full_layers[start : start + at_once], curves, num_picks).run(batches)
    norms = {i: float(full.residual_norms[i]) ** -2 for i in full.full_layers}
    return Selection(
        torch.stack([curves[i].order.cpu() for i in full.full_layers]),
        torch.stack([(curves[i].gains * norms[i]).cpu() for i in full.full_layers]),
    )


def pass_rows(study: Study) -> int:
    """Return how many packed rows one pass takes."""
    per_row = row_bytes(study.job)
    share = workspace.within(GRAM_ROWS * per_row, workspace.PASS_SHARE) // per_row
    return min(GRAM_ROWS, max(LEAST_ROWS, share))


def row_bytes(job: Job) -> int:
    """Return the bytes that a packed row holds of one layer: queries, what attention gives them, and, before them and
    after, the widest activations of the model."""
    loaded = job.loaded
    attention_bytes = 6 * 4 * loaded.num_heads * loaded.head_dim
    config = loaded.model.config.get_text_config()
    widest = max(int(getattr(config, "intermediate_size", 0) or 0), int(config.hidden_size))
    return max(attention_bytes, 3 * loaded.dtype.itemsize * widest) + 4 * loaded.dtype.itemsize * int(
        config.hidden_size
    )


def held_bytes() -> int:
    """Return the bytes of Gram matrices that are held at once where one pass is not enough."""
    return workspace.within(GRAM_BYTES, workspace.GRAM_SHARE)


def gram_bytes(study: Study) -> int:
    """Bytes of one layer's chunk Gram matrices."""
    num_document = len(study.job.document_ids)
    return 4 * study.job.loaded.num_kv_heads * num_document * min(GREEDY_CHUNK, num_document)


class GramPass:
    """One pass over all reference rows that accumulates some layers' Gram matrices and orders their keys."""

    def __init__(
        self,
        study: Study,
        weights: dict[str, float],
        members: list[int],
        curves: dict[int, LayerCurves],
        num_picks: int,
    ) -> None:
        self.study, self.weights, self.curves, self.num_picks = study, weights, curves, num_picks
        loaded, num_document = study.job.loaded, len(study.job.document_ids)
        self.make_sums = {
            i: partial(
                ChunkGrams.empty, loaded.num_kv_heads, num_document, GREEDY_CHUNK, study.full.layers[i].keys.device
            )
            for i in members
        }
        self.sums: dict[int, ChunkGrams] = {}
        self.finished: list[int] = []
        self.last = False

    def run(self, batches: list[list[Segment]]) -> None:
        """Send all batches through the model; `curves` holds the members' orders afterwards."""
        for number, batch in enumerate(batches):
            self.last = number == len(batches) - 1
            self.study.run_layers(batch, "select", self.make_layer)
        self.order_keys()

    def make_layer(self, i: int, layer: LayerCache, packed: Packed, advance: Advance) -> GramLayer:
        """Return layer ``i`` of the pass; it begins its sums when the pass reaches it."""
        full = self.study.full
        return GramLayer(
            layer,
            packed,
            full.logical_length,
            advance,
            prefix_length=full.prefix_length,
            head_gains=self.study.job.head_gains[i],
            source_weights=self.weights,
            begin=partial(self.begin, i) if i in self.make_sums else None,
            done=partial(self.done, i) if i in self.make_sums else None,
        )

    def begin(self, i: int) -> ChunkGrams:
        """Return the sums of layer ``i``."""
        if i not in self.sums:
            self.sums[i] = self.make_sums[i]()
        return self.sums[i]

    def done(self, i: int) -> None:
        """Take note that a batch has passed layer ``i``; order the keys where enough layers wait for it."""
        if not self.last:
            return
        scores = self.study.full.context_scores.get(i)
        if scores is None or "context" not in self.weights:
            scores = torch.zeros(1, device=self.sums[i].gram.device)
        add_diagonal(self.sums[i], OWN_SHARE, self.weights.get("context", 0.0) * CONTEXT_SHARE * scores)
        self.finished.append(i)
        if (len(self.finished) + 1) * gram_bytes(self.study) * 3 > held_bytes():  # the greedy search holds two more
            self.order_keys()

    def order_keys(self) -> None:
        """Order the keys of the finished layers as one batch."""
        full, self.finished, finished = self.study.full, [], self.finished
        if finished:
            sums, layers = [self.sums.pop(i) for i in finished], [full.layers[i] for i in finished]
            self.curves.update(
                zip(finished, greedy_curves(sums, layers, full.prefix_length, self.num_picks, STOP), strict=True)
            )


def fit(
    study: Study,
    segments: list[Segment],
    weights: dict[str, float],
    selection: Selection,
    counts: torch.Tensor,
    refine_steps: int = 0,
    *,
    fits: bool = True,
) -> dict[int, FitLayer]:
    """Fit all layers in one on-policy pass, or only measure them; returns the layer of each compacted index. Where the
    selection has no order, the rows of the pass choose the keys of each layer, as many as ``counts`` has."""
    job, full = study.job, study.full
    # Without segments (context queries alone) one token of suffix carries the pass through the layers.
    carried = segments or [Segment(tuple(job.prompt.question_ids("")[:1]), "carrier")]
    made: dict[int, FitLayer] = {}
    refiner = Refiner(refine_steps, job.settings.seed) if refine_steps and fits else None
    gains = selection.by_position() if job.settings.keep_curves else None
    own = context_squares(full, weights) if selection.order is None else {}

    def make(i: int, layer: LayerCache, packed: Packed, advance: Advance) -> FitLayer:
        row = len(made)
        inputs = FitInputs(
            prefix_length=full.prefix_length,
            order=None if selection.order is None else selection.order[row],
            counts=counts[row].tolist(),
            head_gains=job.head_gains[i],
            source_weights={"carrier": 0.0, **weights},
            context_queries=full.context_queries.get(i) if "context" in weights else None,
            storage_dtype=job.storage_dtype,
            settings=job.settings,
            curve_gains=None if gains is None else gains[row],
            curve_chunk=GREEDY_CHUNK,
            refiner=refiner,
            currency=float(full.residual_norms[i]) ** -2,
            fits=fits,
            context_squares=own.get(i),
            shares_given=job.settings.budget is not None,
        )
        made[i] = FitLayer(layer, packed, full.logical_length, advance, inputs)
        return made[i]

    study.run_layers(carried, "fit", make)
    return made


def stored(layer: LayerCache, dtype: torch.dtype) -> LayerCache:
    """Return the layer with keys and values in the storage type."""
    from compactor.attach import move_layer

    return move_layer(layer, layer.keys.device, dtype)


def to_host(layer: LayerCache) -> LayerCache:
    """Return the layer in host memory."""
    from compactor.attach import move_layer

    return move_layer(layer, torch.device("cpu"), layer.keys.dtype)
