"""Reads like the data flow: prepare, prefill, compact by a method, describe. Knows the order, not the insides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compactor import __version__
from compactor.attach import CompactedCache
from compactor.config import CompactSettings
from compactor.document import Document
from compactor.job import Job, full_bytes, prepare, target_total
from compactor.methods import Compacted, get_method
from compactor.prefill import CONTEXT_SPAN, Prefilled
from compactor.study import Study, prefill_document, to_host
from compactor.types import CacheMetadata, LayerCache, Reporter

if TYPE_CHECKING:
    from compactor.model import LoadedModel


def compact(
    document: Document, loaded: LoadedModel, settings: CompactSettings, reporter: Reporter | None = None
) -> CompactedCache:
    """Compact one document. Raises DocumentError when it does not fit the model's window, SettingsError when the size
    target is too small for the model."""
    job = prepare(document, loaded, settings, reporter)
    return compact_prefilled(job, prefill_document(job))


def compact_prefilled(job: Job, full: Prefilled) -> CompactedCache:
    """Compact a prefilled document by the method of the settings."""
    return compact_study(Study(job, full), target_total(job))


def compact_study(study: Study, num_kept: int, method: str | None = None) -> CompactedCache:
    """Compact by a method (by default that of the settings), keeping ``num_kept`` keys over all heads."""
    compacted = get_method(method or study.job.settings.method)(study, num_kept)
    return CompactedCache([to_host(layer) for layer in compacted.layers], metadata(study, compacted))


def metadata(study: Study, compacted: Compacted) -> CacheMetadata:
    """Return what the file says of itself."""
    job, full = study.job, study.full
    return CacheMetadata(
        model=job.loaded.identity(),
        dtype=str(job.storage_dtype).removeprefix("torch."),
        logical_length=compacted.logical_length,
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
        report=report(study, compacted.layers) | compacted.report | {"seconds": rounded(job.seconds)},
    )


def report(study: Study, layers: list[LayerCache]) -> dict[str, Any]:
    """Return sizes and counts of the run."""
    job, full = study.job, study.full
    compacted = [layer for layer in layers if layer.sliding_window is None]
    document_keys = len(compacted) * job.loaded.num_kv_heads * len(job.document_ids)
    kept = sum(sum(layer.head_lengths) - full.prefix_length * layer.num_kv_heads for layer in compacted)
    rows: dict[str, int] = {"context": max(0, len(job.document_ids) - CONTEXT_SPAN)} if full.context_scores else {}
    for segment in study.segments:
        rows[segment.source] = rows.get(segment.source, 0) + len(segment.token_ids)
    return {
        "document_keys": document_keys,
        "kept_keys": kept,
        "kept_ratio": kept / document_keys,
        "full_bytes": full_bytes(job),
        "tensor_bytes": sum(layer.nbytes for layer in layers),
        "reference_rows": rows,
    }


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """Return seconds to the millisecond."""
    return {step: round(value, 3) for step, value in seconds.items()}
