"""Knows how many keys each head keeps: one global ranking of gains over all layers and heads, with a floor.

Also knows what a kept key costs in bytes, so that a ratio, a count per head and a number of bytes are one quantity.
"""

from __future__ import annotations

import torch

from compactor.errors import SettingsError

FLOOR_FRACTION = 0.1  # of the average count; a head keeps at least this, and at least one key
BYTES_PER_KEY_EXTRA = 8  # float32 bias and int32 position
BYTES_PER_OFFSET = 4


def allocate(gains: torch.Tensor, total: int) -> torch.Tensor:
    """Return the number of kept keys per head, (num_layers, num_kv_heads) int64 on the host, summing to ``total``.

    gains: (num_layers, num_kv_heads, num_document) float32, not increasing along the last dimension. The ``total``
    largest gains win, after each head has its floor. Raises SettingsError when there are more heads than keys to keep.
    """
    num_layers, num_kv_heads, _ = gains.shape
    num_heads = num_layers * num_kv_heads
    if total < num_heads:
        raise SettingsError(
            f"The size target keeps {total} document keys over {num_heads} heads; raise it to at least one key a head."
        )
    floor = max(1, int(FLOOR_FRACTION * total / num_heads))
    rest = gains[..., floor:].reshape(num_heads, -1)
    wanted = total - floor * num_heads
    counts = torch.full((num_heads,), floor, device=gains.device)
    if wanted:
        last = rest.flatten().kthvalue(rest.numel() - wanted + 1).values  # the least gain that wins
        above, equal = (rest > last).sum(1), (rest == last).sum(1)
        left = wanted - above.sum() - (equal.cumsum(0) - equal)  # for this head's equals, after those of heads before
        counts += above + left.clamp_min(0).minimum(equal)
    return counts.view(num_layers, num_kv_heads).cpu()


def key_bytes(head_dim: int, itemsize: int) -> int:
    """Bytes of one kept key: key, value, bias and position."""
    return 2 * head_dim * itemsize + BYTES_PER_KEY_EXTRA


def total_from_bytes(
    max_bytes: int,
    *,
    fixed_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    num_document: int,
    bytes_per_key: int,
) -> int:
    """Return how many document keys fit in ``max_bytes`` beside ``fixed_bytes`` (prefix, sliding layers, offsets).

    Raises SettingsError when not even one key a head fits; the message says the least that does.
    """
    num_heads = num_layers * num_kv_heads
    total = min((max_bytes - fixed_bytes) // bytes_per_key, num_heads * num_document)
    if total < num_heads:
        least = fixed_bytes + num_heads * bytes_per_key
        raise SettingsError(
            f"--max-bytes {max_bytes:,} is too small for this model and prompt; the least is {least:,} bytes."
        )
    return total
