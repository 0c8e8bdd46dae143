"""Reads like the data flow: prefill, ask, score, select, budget, fit. Knows the order of the steps, not the insides."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from compactor import __version__
from compactor import prompt as prompts
from compactor.attach import CompactedCache
from compactor.config import CompactSettings
from compactor.document import Document
from compactor.packed import PackedLayer, WindowLayer, groups, pack, run_packed
from compactor.prefill import CONTEXT_SPAN, Prefilled, prefill
from compactor.reference_queries import repeat_segments, self_study_segments
from compactor.solve.budget import BYTES_PER_OFFSET, allocate, key_bytes, total_from_bytes
from compactor.solve.currency import output_gains
from compactor.solve.fit import FitInputs, FitLayer
from compactor.solve.scores import ScoreLayer, value_distances
from compactor.solve.select import Selection, select_keys
from compactor.types import CacheMetadata, LayerCache, Reporter, Segment, SilentReporter

if TYPE_CHECKING:
    from compactor.model import LoadedModel

SCORE_ROWS = 8192  # packed rows of one score pass; bounds its memory at any document length


@dataclass
class Job:
    """One document on its way through the steps."""

    document: Document
    loaded: LoadedModel
    settings: CompactSettings
    prompt: prompts.Prompt
    document_ids: list[int]
    reporter: Reporter
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[step]``."""
        started = time.perf_counter()
        yield
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    @cached_property
    def head_gains(self) -> torch.Tensor:
        """Gain of each head's errors, (num_layers, num_heads) float32."""
        return output_gains(self.loaded.model, self.loaded.num_heads, self.loaded.head_dim)

    @property
    def room(self) -> int:
        """Tokens of the model's window that follow the document."""
        return self.loaded.window - len(self.prompt.prefix_ids) - len(self.document_ids)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Type of keys and values in the file."""
        if self.settings.cache_dtype != "auto":
            return getattr(torch, self.settings.cache_dtype)  # type: ignore[no-any-return]
        return torch.bfloat16 if self.loaded.dtype == torch.float32 else self.loaded.dtype


def compact(
    document: Document, loaded: LoadedModel, settings: CompactSettings, reporter: Reporter | None = None
) -> CompactedCache:
    """Compact one document. Raises DocumentError when it does not fit the model's window, SettingsError when the size
    target is too small for the model."""
    job = prepare(document, loaded, settings, reporter)
    return compact_prefilled(job, prefill_document(job))


def prepare(
    document: Document, loaded: LoadedModel, settings: CompactSettings, reporter: Reporter | None = None
) -> Job:
    """Tokenize the document and check everything that can be checked before the model runs."""
    prompt = prompts.build_prompt(loaded.tokenizer, system=settings.system, thinking=settings.thinking)
    document_ids = prompts.encode_plain(loaded.tokenizer, document.text)
    prompts.check_window(
        len(prompt.prefix_ids),
        len(document_ids),
        window=loaded.window,
        reserve=settings.reserve,
        name=document.name,
    )
    job = Job(document, loaded, settings, prompt, document_ids, reporter or SilentReporter())
    target_total(job)  # raises when the size target is too small
    return job


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


def compact_prefilled(job: Job, full: Prefilled) -> CompactedCache:
    """Ask, score, select, budget and fit on a prefilled document."""
    with job.timed("ask"):
        segments = [] if keeps_everything(job) else ask(job, full)
    weights = source_weights(job, segments)
    with job.timed("score"):
        selection = select_keys(score(job, full, segments, weights))
    with job.timed("budget"):
        counts = allocate(selection.gains, target_total(job))
    with job.timed("fit"):
        fits = fit(job, full, segments, weights, selection, counts)
    layers = []
    for index, layer in enumerate(full.layers):
        fitted = fits[index].fitted if index in fits else None
        layers.append(stored(layer, job.storage_dtype) if fitted is None else fitted)
    return CompactedCache([to_host(layer) for layer in layers], metadata(job, full, layers, segments, fits))


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
            total_tokens=settings.self_study_tokens,
            room=room,
            seed=settings.seed,
            reporter=job.reporter,
        )
    observed = "context" in settings.queries and len(job.document_ids) > CONTEXT_SPAN
    if not segments and not observed:
        job.reporter.note(f"--queries {','.join(settings.queries)} gives no query here; repeat is used instead.")
        segments = repeat_segments(job.prompt, job.document_ids, borders, room)
    return segments


def source_weights(job: Job, segments: list[Segment]) -> dict[str, float]:
    """Return the weight of a row of each source: every source weighs as much as one row per document token."""
    rows = {"context": max(1, len(job.document_ids) - CONTEXT_SPAN)}
    for segment in segments:
        rows[segment.source] = rows.get(segment.source, 0) + len(segment.token_ids)
    return {source: len(job.document_ids) / count for source, count in rows.items()}


def score(job: Job, full: Prefilled, segments: list[Segment], weights: dict[str, float]) -> torch.Tensor:
    """Return squared scores in common currency, (compacted layers, num_kv_heads, num_document) float32 on the host."""
    loaded = job.loaded
    shape = (loaded.num_kv_heads, len(job.document_ids))
    totals = {i: torch.zeros(shape, device=full.layers[i].keys.device) for i in full.full_layers}
    for i, context in full.context_scores.items():
        totals[i] += weights["context"] * context
    batches = groups(segments, SCORE_ROWS)
    if batches:
        gains = job.head_gains
        with job.reporter.phase("score", len(batches) * loaded.num_layers, "layers") as advance:
            for batch in batches:
                packed = pack(batch, full.logical_length)
                sums = {i: {s: torch.zeros_like(totals[i]) for s in packed.sources} for i in full.full_layers}
                layers = [
                    ScoreLayer(
                        layer,
                        packed,
                        full.logical_length,
                        advance,
                        prefix_length=full.prefix_length,
                        head_gains=gains[i],
                        scores=sums[i],
                    )
                    if layer.sliding_window is None
                    else WindowLayer(layer, packed, full.logical_length, advance)
                    for i, layer in enumerate(full.layers)
                ]
                run_packed(loaded, packed, layers)
                for i, by_source in sums.items():
                    for source, part in by_source.items():
                        totals[i] += weights[source] * part
    return torch.stack(
        [
            (totals[i] * value_distances(full.layers[i], full.prefix_length) / full.residual_norms[i] ** 2).cpu()
            for i in full.full_layers
        ]
    )


def fit(
    job: Job,
    full: Prefilled,
    segments: list[Segment],
    weights: dict[str, float],
    selection: Selection,
    counts: torch.Tensor,
) -> dict[int, FitLayer]:
    """Fit all layers in one on-policy pass; returns the fitted layer of each compacted index."""
    loaded = job.loaded
    gains = job.head_gains
    # Without segments (context queries alone) one token of suffix carries the pass through the layers.
    carried = segments or [Segment(tuple(job.prompt.question_ids("")[:1]), "carrier")]
    packed = pack(carried, full.logical_length)
    fits: dict[int, FitLayer] = {}
    with job.reporter.phase("fit", loaded.num_layers, "layers") as advance:
        layers: list[PackedLayer] = []
        for i, layer in enumerate(full.layers):
            if layer.sliding_window is not None:
                layers.append(WindowLayer(layer, packed, full.logical_length, advance))
                continue
            row = len(fits)
            inputs = FitInputs(
                prefix_length=full.prefix_length,
                order=selection.order[row],
                counts=counts[row].tolist(),
                head_gains=gains[i],
                source_weights={"carrier": 0.0, **weights},
                context_queries=full.context_queries.get(i),
                storage_dtype=job.storage_dtype,
                settings=job.settings,
            )
            fits[i] = FitLayer(layer, packed, full.logical_length, advance, inputs)
            layers.append(fits[i])
        run_packed(loaded, packed, layers)
    return fits


def num_compacted(loaded: LoadedModel) -> int:
    """Number of layers that see the whole document."""
    return sum(window is None for window in loaded.sliding_windows)


def target_total(job: Job) -> int:
    """Return how many document keys to keep over all heads, from whichever size target was given."""
    settings, loaded, num_document = job.settings, job.loaded, len(job.document_ids)
    num_heads = num_compacted(loaded) * loaded.num_kv_heads
    if settings.max_bytes is not None:
        return total_from_bytes(
            settings.max_bytes,
            fixed_bytes=fixed_bytes(job),
            num_layers=num_compacted(loaded),
            num_kv_heads=loaded.num_kv_heads,
            num_document=num_document,
            bytes_per_key=key_bytes(loaded.head_dim, job.storage_dtype.itemsize),
        )
    if settings.target_tokens is not None:
        return min(settings.target_tokens, num_document) * num_heads
    assert settings.keep_ratio is not None
    return max(num_heads, round(settings.keep_ratio * num_document * num_heads))


def keeps_everything(job: Job) -> bool:
    """Whether the size target leaves nothing to choose: then no reference query is needed."""
    return target_total(job) >= num_compacted(job.loaded) * job.loaded.num_kv_heads * len(job.document_ids)


def fixed_bytes(job: Job) -> int:
    """Bytes that do not depend on the size target: prefix, sliding layers, offsets."""
    loaded, prefix_length = job.loaded, len(job.prompt.prefix_ids)
    per_key = key_bytes(loaded.head_dim, job.storage_dtype.itemsize)
    total = prefix_length + len(job.document_ids)
    kept = [prefix_length if window is None else min(total, window - 1) for window in loaded.sliding_windows]
    return sum(loaded.num_kv_heads * keys * per_key + (loaded.num_kv_heads + 1) * BYTES_PER_OFFSET for keys in kept)


def full_bytes(job: Job) -> int:
    """Bytes of keys and values of the uncompacted cache in the storage type."""
    loaded, total = job.loaded, len(job.prompt.prefix_ids) + len(job.document_ids)
    kept = [total if window is None else min(total, window - 1) for window in loaded.sliding_windows]
    return sum(kept) * loaded.num_kv_heads * 2 * loaded.head_dim * job.storage_dtype.itemsize


def stored(layer: LayerCache, dtype: torch.dtype) -> LayerCache:
    """Return the layer with keys and values in the storage type."""
    from compactor.attach import move_layer

    return move_layer(layer, layer.keys.device, dtype)


def to_host(layer: LayerCache) -> LayerCache:
    """Return the layer in host memory."""
    from compactor.attach import move_layer

    return move_layer(layer, torch.device("cpu"), layer.keys.dtype)


def metadata(
    job: Job, full: Prefilled, layers: list[LayerCache], segments: list[Segment], fits: dict[int, FitLayer]
) -> CacheMetadata:
    """Return what the file says of itself."""
    return CacheMetadata(
        model=job.loaded.identity(),
        dtype=str(job.storage_dtype).removeprefix("torch."),
        logical_length=full.logical_length,
        prefix_length=full.prefix_length,
        position_scheme="contiguous",
        sliding_windows=list(job.loaded.sliding_windows),
        system=job.settings.system,
        thinking=job.settings.thinking,
        document_name=job.document.name,
        document_sha256=job.document.sha256,
        document_tokens=len(job.document_ids),
        settings=job.settings.to_json(),
        seed=job.settings.seed,
        tool_version=__version__,
        report=report(job, full, layers, segments, fits),
    )


def report(
    job: Job, full: Prefilled, layers: list[LayerCache], segments: list[Segment], fits: dict[int, FitLayer]
) -> dict[str, Any]:
    """Return sizes, seconds and errors of the run.

    Errors are relative, sqrt(sum w |o' - o|^2 / sum w |o|^2), with the weights of the common currency; heads that keep
    every key take no part.
    """
    fitted, unfitted = [], []
    for i, layer in fits.items():
        currency = float(full.residual_norms[i]) ** -2
        fitted += [(h.squared_error * currency, h.energy * currency) for h in layer.heads]
        unfitted += [(h.unfitted_error * currency, h.energy * currency) for h in layer.heads]
    every = [head for layer in fits.values() for head in layer.heads]
    kept = sum(len(head.kept) for head in every)
    document_keys = len(every) * len(job.document_ids)
    errors = {i: relative_error([(h.squared_error, h.energy) for h in layer.heads]) for i, layer in fits.items()}
    rows: dict[str, int] = {"context": max(0, len(job.document_ids) - CONTEXT_SPAN)} if full.context_scores else {}
    for segment in segments:
        rows[segment.source] = rows.get(segment.source, 0) + len(segment.token_ids)
    return {
        "document_keys": document_keys,
        "kept_keys": kept,
        "kept_ratio": kept / document_keys,
        "full_bytes": full_bytes(job),
        "tensor_bytes": sum(layer.nbytes for layer in layers),
        "reference_rows": rows,
        "reconstruction_error": relative_error(fitted),
        "reconstruction_error_before_values": relative_error(unfitted),
        "reconstruction_error_per_layer": {str(i): error for i, error in errors.items()},
        "unconverged_heads": sum(not head.converged for head in every),
        "seconds": {step: round(value, 3) for step, value in job.seconds.items()},
    }


def relative_error(parts: list[tuple[float, float]]) -> float:
    """Return sqrt(sum of errors / sum of energies), 0 when there is no energy."""
    energy = sum(part[1] for part in parts)
    return (sum(part[0] for part in parts) / energy) ** 0.5 if energy > 0 else 0.0
