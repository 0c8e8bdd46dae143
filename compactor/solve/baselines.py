"""Knows what a compacted cache must beat: caches of the same bytes that cost nothing to make. Knows no queries."""

from __future__ import annotations

import torch

from compactor.attach import dense_heads
from compactor.prefill import Prefilled, dense_layer
from compactor.types import LayerCache


def truncation(full: Prefilled, num_kept: int) -> tuple[list[LayerCache], int]:
    """Cut the document after its first ``num_kept`` tokens.

    Returns the layers and the shorter logical length. Causality makes this exact: keys of a document's beginning do not
    depend on its end. Sliding layers cannot be cut afterwards, so they keep their last window of the whole document.
    """
    length = min(full.prefix_length + num_kept, full.logical_length)
    layers = []
    for layer in full.layers:
        if layer.sliding_window is None:
            keys, values = (part[0, :, :length] for part in dense_heads(layer))
            layer = dense_layer(keys, values, first_position=0)
        layers.append(layer)
    return layers, length


def random_keys(full: Prefilled, num_kept: int, seed: int) -> list[LayerCache]:
    """Keep the prefix and ``num_kept`` random document keys per head, with biases 0 and their own values."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in full.layers:
        if layer.sliding_window is None:
            layer = _keep(layer, full.prefix_length, num_kept, generator)
        layers.append(layer)
    return layers


def _keep(layer: LayerCache, prefix_length: int, num_kept: int, generator: torch.Generator) -> LayerCache:
    keys, values = (part[0] for part in dense_heads(layer))
    num_kv_heads, total, head_dim = keys.shape
    prefix = torch.arange(prefix_length)
    rows = torch.stack(
        [
            torch.cat([prefix, prefix_length + torch.randperm(total - prefix_length, generator=generator)[:num_kept]])
            for _ in range(num_kv_heads)
        ]
    )
    rows = rows.sort(dim=-1).values.to(keys.device)
    index = rows.unsqueeze(-1).expand(-1, -1, head_dim)
    return LayerCache(
        keys=keys.gather(1, index).flatten(0, 1),
        values=values.gather(1, index).flatten(0, 1),
        biases=torch.zeros(rows.numel(), device=keys.device),
        positions=rows.flatten().to(torch.int32),
        offsets=torch.arange(num_kv_heads + 1, dtype=torch.int32, device=keys.device) * rows.shape[1],
    )
