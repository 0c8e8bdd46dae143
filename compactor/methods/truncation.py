"""Knows the cheapest cache: the beginning of the document. Knows no queries."""

from __future__ import annotations

from compactor.attach import dense_heads
from compactor.methods import Compacted
from compactor.methods.keeping import plain_tokens
from compactor.prefill import dense_layer, prefill
from compactor.study import Study, stored

SUMMARY = "the first tokens of the document, as a plain cache of the same bytes"


def compact(study: Study, num_kept: int) -> Compacted:
    """Keep as many first tokens of the document as the bytes of ``num_kept`` keys allow; positions end with them."""
    return first_tokens(study, plain_tokens(study, num_kept))


def first_tokens(study: Study, num_tokens: int) -> Compacted:
    """Return the cache of the document cut after ``num_tokens`` tokens.

    Causality makes the cut exact: keys of a document's beginning do not depend on its end. A sliding layer of the full
    cache has only the end, so a model with such layers reads the cut document again.
    """
    job, full = study.job, study.full
    length = min(full.prefix_length + num_tokens, full.logical_length)
    layers = full.layers
    if len(full.full_layers) < len(layers) and length < full.logical_length:
        with job.timed("prefill the beginning"):
            layers = prefill(
                job.loaded,
                list(job.prompt.prefix_ids),
                job.document_ids[: length - full.prefix_length],
                prefill_chunk=job.settings.prefill_chunk,
                head_gains=None,
                reporter=job.reporter,
            ).layers
    cut = []
    for layer in layers:
        if layer.sliding_window is None:
            keys, values = (part[0, :, :length] for part in dense_heads(layer))
            layer = dense_layer(keys, values, first_position=0)
        cut.append(stored(layer, job.storage_dtype))
    return Compacted(cut, length)
