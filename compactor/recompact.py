"""Knows how a compacted cache becomes a smaller one from its sidecar: size, counts, shrinking, what the file then says.

Knows no model. The steps read like the pipeline's: load, count, shrink, describe, save.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compactor import __version__
from compactor.budget_profile import allocate_by_shares
from compactor.cache_file import FileSizes, load_cache, save_cache
from compactor.config import CompactSettings
from compactor.curves import Curves, LayerCurves, curves_path, load_curves, save_curves
from compactor.errors import SettingsError
from compactor.output import AnyPath, check_output
from compactor.solve.budget import key_bytes, total_from_bytes
from compactor.solve.shrink import HeadCurve, ShrunkHead, check_total, shrink_layer, smaller_counts
from compactor.types import CacheMetadata, LayerCache

# What the report says of the document and not of the keys that were kept.
LASTING_REPORT = ("document_keys", "full_bytes", "reference_rows")


@dataclass(frozen=True)
class SmallerCache:
    """A recompacted cache and its own sidecar, in memory."""

    layers: list[LayerCache]
    metadata: CacheMetadata
    curves: Curves


def recompact(path: AnyPath, output: AnyPath, target: CompactSettings, *, force: bool = False) -> SmallerCache:
    """Write a smaller copy of the cache at ``path``, and its sidecar, to ``output``; return what was written.

    Of ``target`` only the size counts: ``keep_ratio``, ``target_tokens`` or ``max_bytes``, all relative to the original
    document. Raises CacheFileError without a sidecar that belongs to the cache, SettingsError for a size above the
    present one or below one key a head, OutputError when ``output`` cannot be written.
    """
    check_output(output, force)
    check_output(curves_path(output), force)
    layers, metadata = load_cache(path)
    smaller = shrink_cache(layers, metadata, load_curves(path), target)
    save_smaller(output, smaller, force=force)
    return smaller


def save_smaller(output: AnyPath, smaller: SmallerCache, *, force: bool = False) -> FileSizes:
    """Write a recompacted cache and its sidecar. Raises OutputError."""
    sizes = save_cache(output, smaller.layers, smaller.metadata, force=force)
    save_curves(output, smaller.curves.layers, chunk=smaller.curves.chunk, force=force)
    return sizes


def shrink_cache(
    layers: Sequence[LayerCache], metadata: CacheMetadata, curves: Curves, target: CompactSettings
) -> SmallerCache:
    """Shrink a cache in memory; see `recompact`."""
    compacted = [layer for layer in layers if layer.sliding_window is None]
    present = sum(sum(layer.head_lengths) - metadata.prefix_length * layer.num_kv_heads for layer in compacted)
    total = smaller_total(layers, metadata, target, present)
    heads = [layer for layer in curves.layers if layer is not None]
    counts = iter(allocated_like_now(heads, total) if metadata.settings.get("budget") else smaller_counts(heads, total))
    box = CompactSettings()
    lower = math.exp(metadata.settings.get("min_log_bias", box.min_log_bias))
    upper = math.exp(metadata.settings.get("max_log_bias", box.max_log_bias))
    fits = metadata.settings.get("method") != "fast"  # which fits nothing, from too few rows to fit to
    new_layers: list[LayerCache] = []
    new_curves: list[LayerCurves] = []
    shrunk: list[ShrunkHead] = []
    for layer, curve in zip(layers, curves.layers, strict=True):
        if curve is None:
            new_layers.append(layer)
            new_curves.append(None)
            continue
        smaller, own = shrink_layer(
            layer, metadata.prefix_length, curve, next(counts), lower=lower, upper=upper, fits=fits
        )
        new_layers.append(smaller)
        new_curves.append([head.curve for head in own])
        shrunk += own
    new_metadata = replace(
        metadata,
        settings=smaller_settings(metadata, target),
        tool_version=__version__,
        report=smaller_report(metadata, layers, new_layers, shrunk, total, present),
    )
    return SmallerCache(new_layers, new_metadata, Curves(new_curves, curves.chunk))


def smaller_total(layers: Sequence[LayerCache], metadata: CacheMetadata, target: CompactSettings, present: int) -> int:
    """Return how many document keys to keep over all heads. Raises SettingsError for more than there are now."""
    model, num_document = metadata.model, metadata.document_tokens
    num_layers = sum(window is None for window in metadata.sliding_windows)
    num_heads = num_layers * model.num_kv_heads
    if target.max_bytes is not None:
        one_key = key_bytes(model.head_dim, layers[0].keys.element_size())
        total = total_from_bytes(
            target.max_bytes,
            fixed_bytes=sum(layer.nbytes for layer in layers) - present * one_key,
            num_layers=num_layers,
            num_kv_heads=model.num_kv_heads,
            num_document=num_document,
            bytes_per_key=one_key,
        )
    elif target.target_tokens is not None:
        total = min(target.target_tokens, num_document) * num_heads
    elif target.keep_ratio is not None:
        total = max(num_heads, round(target.keep_ratio * num_document * num_heads))
    else:
        raise SettingsError("A recompacted size is a ratio, a number of tokens or of bytes; give one of those.")
    if total > present:
        raise SettingsError(
            f"The cache keeps {present:,} document keys, {present / (num_heads * num_document):.3g} of all, and "
            f"{total:,} were asked for; a larger size needs the model: run compact on the document again."
        )
    return total


def allocated_like_now(curves: Sequence[Sequence[HeadCurve]], total: int) -> list[list[int]]:
    """Return counts in proportion to the present ones: those of a cache that a budget profile shaped."""
    lengths = torch.tensor([[len(head.gains) for head in layer] for layer in curves])
    check_total(total, int((lengths > 0).sum()))
    counts: list[list[int]] = allocate_by_shares(lengths.double(), total, lengths).tolist()
    return counts


def smaller_settings(metadata: CacheMetadata, target: CompactSettings) -> dict[str, Any]:
    """Return the settings that the smaller file tells: those of the run, the new size, and no certificate."""
    return {
        **metadata.settings,
        "keep_ratio": target.keep_ratio,
        "target_tokens": target.target_tokens,
        "max_bytes": target.max_bytes,
        "max_error": None,
        "keep_curves": True,
        "certify": False,
        "require_kl": None,
        "grow": False,
    }


def smaller_report(
    metadata: CacheMetadata,
    before: Sequence[LayerCache],
    after: Sequence[LayerCache],
    shrunk: Sequence[ShrunkHead],
    total: int,
    present: int,
) -> dict[str, Any]:
    """Return the report of the smaller file; what was measured on the larger one moves to ``recompacted_from``."""
    lasting = {name: metadata.report[name] for name in LASTING_REPORT if name in metadata.report}
    former = {name: value for name, value in metadata.report.items() if name not in LASTING_REPORT}
    num_heads = sum(layer.num_kv_heads for layer in before if layer.sliding_window is None)
    document_keys = num_heads * metadata.document_tokens
    energy = sum(head.energy for head in shrunk)
    return {
        **lasting,
        "document_keys": document_keys,
        "kept_keys": total,
        "kept_ratio": total / document_keys,
        "tensor_bytes": sum(layer.nbytes for layer in after),
        "recompaction_error": (sum(head.squared_error for head in shrunk) / energy) ** 0.5 if energy > 0 else 0.0,
        "fidelity": None,
        "recompacted_from": {
            "fidelity": None,
            **former,
            "kept_keys": present,
            "kept_ratio": present / document_keys,
            "tensor_bytes": sum(layer.nbytes for layer in before),
            "tool_version": metadata.tool_version,
        },
    }


def describe_files(output: AnyPath) -> dict[str, int]:
    """Return the bytes of both written files."""
    return {"file_bytes": os.path.getsize(output), "curves_bytes": os.path.getsize(curves_path(output))}
