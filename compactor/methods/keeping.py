"""Knows how a choice of keys becomes a cache: counts per head, rows of the full cache, bytes. Knows no scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compactor.attach import dense_heads
from compactor.methods import Compacted
from compactor.solve.budget import key_bytes
from compactor.study import Study, stored
from compactor.types import LayerCache

Choose = Callable[[int, int], torch.Tensor]


def num_heads(study: Study) -> int:
    """Number of KV heads over all compacted layers."""
    return len(study.full.full_layers) * study.job.loaded.num_kv_heads


def keeps_all(study: Study, num_kept: int) -> bool:
    """Whether ``num_kept`` document keys leave nothing to choose."""
    return num_kept >= num_heads(study) * len(study.job.document_ids)


def uniform_counts(study: Study, num_kept: int) -> dict[int, list[int]]:
    """Return how many document keys each KV head of each compacted layer keeps: equally many, the rest of the division
    to the first heads, never more than the document has."""
    heads, num_kv_heads = num_heads(study), study.job.loaded.num_kv_heads
    each, over = divmod(num_kept, heads)
    flat = [min(each + (head < over), len(study.job.document_ids)) for head in range(heads)]
    return {i: flat[row * num_kv_heads : (row + 1) * num_kv_heads] for row, i in enumerate(study.full.full_layers)}


def keep_uniformly(study: Study, num_kept: int, orders: Callable[[int, int, int], torch.Tensor]) -> Compacted:
    """Keep the same number of keys in every head, unchanged; ``orders(layer, head, count)`` names them."""
    counts = uniform_counts(study, num_kept)
    return keep_chosen(study, lambda i, head: orders(i, head, counts[i][head]))


def keep_chosen(study: Study, choose: Choose) -> Compacted:
    """Keep the prefix and the chosen document keys with their own values and biases 0.

    ``choose(layer, head)`` returns document-relative indices, int64 in any order. Sliding layers stay as they are.
    """
    full, job = study.full, study.job
    layers = []
    for i, layer in enumerate(full.layers):
        if layer.sliding_window is None:
            kept = [choose(i, head) for head in range(layer.num_kv_heads)]
            layers.append(keep_keys(layer, kept, full.prefix_length, job.storage_dtype))
        else:
            layers.append(stored(layer, job.storage_dtype))
    return Compacted(layers, full.logical_length)


def keep_everything(study: Study) -> Compacted:
    """Keep the full cache in the storage type."""
    return Compacted([stored(layer, study.job.storage_dtype) for layer in study.full.layers], study.full.logical_length)


def keep_keys(
    layer: LayerCache,
    kept: Sequence[torch.Tensor],
    prefix_length: int,
    dtype: torch.dtype,
    biases: Sequence[torch.Tensor] | None = None,
    values: Sequence[torch.Tensor] | None = None,
) -> LayerCache:
    """Return prefix and kept document keys of every head as one ragged layer in the storage type.

    kept: per KV head, document-relative indices, int64; ``biases`` (float32) and ``values`` (float32, (n, head_dim))
    belong to them in the same order, and are 0 and the keys' own by default. Rows are put in order of position.
    """
    full_keys, full_values = (part[0] for part in dense_heads(layer))
    device = full_keys.device
    prefix = torch.arange(prefix_length, device=device)
    no_bias = torch.zeros(prefix_length, device=device)
    rows, out_keys, out_values, out_biases = [], [], [], []
    for head, chosen in enumerate(kept):
        by_position = chosen.to(device).sort()
        own = by_position.values + prefix_length
        rows.append(torch.cat([prefix, own]))
        out_keys.append(full_keys[head, rows[-1]])
        own_values = full_values[head, own] if values is None else values[head].to(device)[by_position.indices]
        out_values += [full_values[head, prefix].to(dtype), own_values.to(dtype)]
        own_biases = torch.zeros(len(own), device=device) if biases is None else biases[head].to(device)
        out_biases += [no_bias, own_biases[by_position.indices]]
    lengths = torch.tensor([0, *(len(own) for own in rows)], device=device)
    return LayerCache(
        keys=torch.cat(out_keys).to(dtype),
        values=torch.cat(out_values),
        biases=torch.cat(out_biases).float(),
        positions=torch.cat(rows).to(torch.int32),
        offsets=lengths.cumsum(0).to(torch.int32),
    )


def plain_tokens(study: Study, num_kept: int) -> int:
    """Return how many tokens of a plain cache cost the bytes of ``num_kept`` kept keys.

    A plain cache needs no biases and no positions, so the comparison grants it a few more tokens than kept keys. The
    file holds them all the same: where --max-bytes bounds the file, they are paid for.
    """
    job, heads = study.job, num_heads(study)
    kept_key = key_bytes(job.loaded.head_dim, job.storage_dtype.itemsize)
    plain_key = 2 * job.loaded.head_dim * job.storage_dtype.itemsize
    per_token = heads * (plain_key if job.settings.max_bytes is None else kept_key)
    return max(1, min(num_kept * kept_key // per_token, len(job.document_ids)))
