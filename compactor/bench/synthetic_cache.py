"""Knows how to fill a cache with random numbers: full, or compacted with ragged heads. Knows no model and no timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compactor.prefill import dense_layer
from compactor.types import LayerCache

LEAST_BIAS, MOST_BIAS = -1.0, 3.0


class CacheMaker:
    """Makes layers one after another; equal seeds make equal ones on one device. Head order is another in each."""

    def __init__(self, num_tokens: int, prefix_length: int, head_dim: int, dtype: torch.dtype, device: torch.device,
                 seed: int) -> None:  # fmt: skip
        self.num_tokens, self.prefix_length = num_tokens, prefix_length  # of the document, and before it
        self.head_dim, self.dtype, self.device = head_dim, dtype, device
        self.order = torch.Generator().manual_seed(seed)
        self.numbers = torch.Generator(device).manual_seed(seed)

    @property
    def logical_length(self) -> int:
        """Tokens of prefix and document."""
        return self.prefix_length + self.num_tokens

    def full(self, num_kv_heads: int) -> LayerCache:
        """Return a layer in which every head keeps every key."""
        keys, values = (self._normal(num_kv_heads, self.logical_length) for _ in range(2))
        return dense_layer(keys, values, first_position=0)

    def kept(self, lengths: Sequence[int]) -> LayerCache:
        """Return a layer whose heads keep the prefix and, in some order, ``lengths`` document keys: at random places,
        with biases drawn from `LEAST_BIAS` to `MOST_BIAS`."""
        shuffled = [lengths[i] for i in torch.randperm(len(lengths), generator=self.order).tolist()]
        positions, biases = [], []
        prefix = torch.arange(self.prefix_length)
        for length in shuffled:
            drawn = torch.randperm(self.num_tokens, generator=self.order)[:length].sort().values
            positions += [prefix, self.prefix_length + drawn]
            of_document = torch.rand(length, generator=self.order) * (MOST_BIAS - LEAST_BIAS) + LEAST_BIAS
            biases += [torch.zeros(self.prefix_length), of_document]
        ends = torch.tensor([0, *(self.prefix_length + length for length in shuffled)]).cumsum(0)
        num_kept = int(ends[-1])
        return LayerCache(
            keys=self._normal(num_kept),
            values=self._normal(num_kept),
            biases=torch.cat(biases).to(self.device),
            positions=torch.cat(positions).to(self.device, torch.int32),
            offsets=ends.to(self.device, torch.int32),
        )

    def last(self, num_kv_heads: int, window: int) -> LayerCache:
        """Return a layer that looks back ``window`` tokens: it keeps the last ``window`` - 1."""
        length = min(self.logical_length, window - 1)
        keys, values = (self._normal(num_kv_heads, length) for _ in range(2))
        return dense_layer(keys, values, first_position=self.logical_length - length, sliding_window=window)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.head_dim, generator=self.numbers, device=self.device, dtype=self.dtype)


def read_bytes(layers: Sequence[LayerCache], *, with_biases: bool = True) -> int:
    """Return the bytes that attention reads of a cache: keys, values and, where there are any, biases."""
    return sum(
        layer.keys.nbytes + layer.values.nbytes + (layer.biases.nbytes if with_biases else 0) for layer in layers
    )
