"""Reads like the data flow: prepare, prefill, compact by a method, certify, describe. Knows the order of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compactor import __version__
from compactor.attach import CompactedCache
from compactor.certificate import fidelity_report
from compactor.config import SUMMARISING, CompactSettings
from compactor.curves import remove_stale_curves, save_curves
from compactor.document import Document
from compactor.errors import FidelityError
from compactor.estimate import check_workspace
from compactor.job import Job, full_bytes, num_compacted, prepare, target_total
from compactor.methods import Compacted, get_method
from compactor.output import AnyPath
from compactor.prefill import Prefilled
from compactor.study import GREEDY_CHUNK, Study, prefill_document, reference_rows, to_host
from compactor.types import CacheMetadata, LayerCache, Reporter

if TYPE_CHECKING:
    from compactor.model import LoadedModel


GROWTH = 1.5  # factor from one budget to the next with --grow


def compact(
    document: Document, loaded: LoadedModel, settings: CompactSettings, reporter: Reporter | None = None
) -> CompactedCache:
    """Compact one document. Raises DocumentError when it does not fit the model's window, SettingsError when the size
    target is too small for the model, FidelityError when the cache is further from the full one than is required,
    MemoryShortError when it needs more than a bound of the workspace (`workspace.bounded`)."""
    job = prepare(document, loaded, settings, reporter)
    check_workspace(job)
    return compact_prefilled(job, prefill_document(job))


def compact_prefilled(job: Job, full: Prefilled) -> CompactedCache:
    """Compact a prefilled document by the method of the settings, as faithfully as they require."""
    study = Study(job, full)
    if job.settings.require_kl is None:
        return compact_study(study, target_total(job))
    return compact_faithfully(study, target_total(job), job.settings.require_kl)


def compact_faithfully(study: Study, num_kept: int, require_kl: float) -> CompactedCache:
    """Compact to a held-out KL of at most ``require_kl`` nats per token; with --grow by raising ``num_kept``.

    With --grow the report's ``fidelity`` gets ``tried``: document keys and KL of every size, the last one included.
    Raises FidelityError.
    """
    job, tried = study.job, []
    for size in sizes_to_try(job, num_kept):
        cache = compact_study(study, size)
        kl = held_out_kl(job, cache)
        tried.append({"kept_keys": cache.metadata.report["kept_keys"], "kl_mean": kl})
        if kl <= require_kl:
            return with_tried(cache, tried) if job.settings.grow else cache
        kept = tried[-1]["kept_keys"]
        job.reporter.note(f"KL {kl:.3g} nats per token with {kept:,} keys, above --require-kl {require_kl:g}.")
    reached = size if job.settings.method in SUMMARISING else kept  # a summary may stay below its size
    raise too_far(job, kl, require_kl, everything=reached >= every_key(job))


def sizes_to_try(job: Job, num_kept: int) -> Iterator[int]:
    """Yield ``num_kept`` and, with --grow, `GROWTH` times as many keys each time, at last all."""
    yield num_kept
    while job.settings.grow and num_kept < every_key(job):
        num_kept = min(math.ceil(GROWTH * num_kept), every_key(job))
        yield num_kept


def held_out_kl(job: Job, cache: CompactedCache) -> float:
    """Return the certificate's mean KL. Raises FidelityError where there is no certificate."""
    fidelity = cache.metadata.report["fidelity"]
    if fidelity is None:
        raise FidelityError(
            f"{job.document.name} leaves no room in the model's window for a held-out question, so --require-kl cannot "
            "be checked; shorten the document or leave out --require-kl."
        )
    return float(fidelity["kl_mean"])


def too_far(job: Job, kl: float, require_kl: float, *, everything: bool) -> FidelityError:
    """Return the error of a cache whose held-out KL is above what is required."""
    in_words = job.settings.method in SUMMARISING
    remedy = "keep more (--keep-ratio, --target-tokens, --max-bytes) or give --grow"
    if job.settings.max_error is not None:
        remedy = "lower --max-error"
    if everything and in_words:
        remedy = "it may be as long as the document already, so raise --require-kl or take another --method"
    elif everything:
        remedy = "every key is kept already, so raise --require-kl or take --cache-dtype float32"
    return FidelityError(
        f"The {'summary of' if in_words else 'compacted'} {job.document.name} is {kl:.3g} nats per token away from the "
        f"full cache on held-out questions, above --require-kl {require_kl:g}; {remedy}."
    )


def with_tried(cache: CompactedCache, tried: list[dict[str, Any]]) -> CompactedCache:
    """Return the cache with the sizes that --grow tried in its fidelity report."""
    fidelity = cache.metadata.report["fidelity"] | {"tried": tried}
    return replace(cache, metadata=replace(cache.metadata, report=cache.metadata.report | {"fidelity": fidelity}))


def every_key(job: Job) -> int:
    """Return the number of document keys over all compacted heads."""
    return num_compacted(job.loaded) * job.loaded.num_kv_heads * len(job.document_ids)


def compact_study(
    study: Study, num_kept: int, method: str | None = None, *, certify: bool | None = None
) -> CompactedCache:
    """Compact by a method (by default that of the settings), keeping ``num_kept`` keys over all heads.

    ``certify`` says whether the report gets its ``fidelity``; None follows the settings.
    """
    compacted = get_method(method or study.job.settings.method)(study, num_kept)
    extra: dict[str, Any] = {}
    if study.job.settings.certify if certify is None else certify:
        with study.job.timed("certify"):
            extra["fidelity"] = fidelity_report(study, compacted)
    layers = [to_host(layer) for layer in compacted.layers]
    curves = compacted.curves

    def save_sidecar(path: AnyPath, force: bool) -> None:
        if curves is not None:
            try:
                save_curves(path, curves, chunk=GREEDY_CHUNK, force=force)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted; {path} is written, its curves are not") from None
        elif force:
            remove_stale_curves(path)

    return CompactedCache(layers, metadata(study, compacted, extra), save_sidecar)


def metadata(study: Study, compacted: Compacted, extra: dict[str, Any]) -> CacheMetadata:
    """Return what the file says of itself; ``extra`` goes into its report."""
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
        report=report(study, compacted.layers) | compacted.report | extra | {"seconds": rounded(job.seconds)},
    )


def report(study: Study, layers: list[LayerCache]) -> dict[str, Any]:
    """Return sizes and counts of the run."""
    job, full = study.job, study.full
    compacted = [layer for layer in layers if layer.sliding_window is None]
    document_keys = len(compacted) * job.loaded.num_kv_heads * len(job.document_ids)
    kept = sum(sum(layer.head_lengths) - full.prefix_length * layer.num_kv_heads for layer in compacted)
    return {
        "document_keys": document_keys,
        "kept_keys": kept,
        "kept_ratio": kept / document_keys,
        "full_bytes": full_bytes(job),
        "tensor_bytes": sum(layer.nbytes for layer in layers),
        "reference_rows": reference_rows(study, study.__dict__.get("segments", [])),  # made if a method asked
    }


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    """Return seconds to the millisecond."""
    return {step: round(value, 3) for step, value in seconds.items()}
