"""Knows how to time attention over kept keys beside torch's own. Knows no model.

Calls of a row visit different documents in turn, so that none is found in the cache of the device, as when a model
visits its layers; those of a row "warm" all read one. Rows "int8" read keys and values of 8 bits, with a factor for
each vector; their error is that of the rounding, too. "Bias mask" is the published way: every head padded to the
longest, biases in a mask, -inf where there is no key.

The work of a row is what the job takes at least, whoever does it: keys, values and biases of every document read once,
queries read and outputs written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from compactor import attention
from compactor.attach import dense_heads
from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import CALLS, COLD_MULTIPLE, SMALL_BYTES, cache_bytes
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.synthetic_cache import CacheMaker, read_bytes
from compactor.bench.timing import Timing, measure_small
from compactor.bench.workloads import KernelSettings, ragged_lengths
from compactor.types import LayerCache, Reporter
from compactor_kernels.reference import biased_attention_reference, quantise

PADDED_TO = 16  # keys

Kept = Sequence[LayerCache]  # one document for all sequences of a batch, or one for each


class Way(NamedTuple):
    """One way to attend."""

    name: str
    prepare: Callable[[Kept, int], Any]  # documents and batch size -> what a call reads; not timed
    attend: Callable[[torch.Tensor, Any], torch.Tensor]  # queries (batch, heads, q_len, head_dim) -> outputs
    is_ours: bool = False
    is_8_bit: bool = False


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time compacted and full cache at every batch size, with one document for the batch and with one a sequence."""
    assert settings.keep is not None and settings.keys is not None
    ragged = ragged_lengths(settings.keep, settings.spread, settings.kv_heads, settings.keys)
    found: list[Row] = []
    for kind, lengths in (("kept", ragged), ("full", None)):
        bench = _Bench(settings, device, reporter, lengths)
        with reporter.phase(f"{kind} keys", len(settings.batches), "batch sizes") as advance:
            for batch in settings.batches:
                for num_documents in sorted({1, batch}):
                    found += bench.rows(batch, num_documents)
                advance(1)
    return found


class _Bench:
    """Documents of one kind, full or compacted, and the rows about them."""

    def __init__(
        self, settings: KernelSettings, device: torch.device, reporter: Reporter, lengths: list[int] | None
    ) -> None:
        """``lengths``: keys of the heads of a compacted document; None is the full one."""
        assert settings.keys is not None
        self.settings, self.device, self.reporter = settings, device, reporter
        self.is_full, self.dtype = lengths is None, model_dtype(device)
        self.maker = CacheMaker(settings.keys, 0, settings.head_dim, self.dtype, device, settings.seed)
        self.lengths = lengths or [settings.keys] * settings.kv_heads
        self.layers: list[LayerCache] = []

    def rows(self, batch: int, num_documents: int) -> list[Row]:
        """Return the rows of a batch that shares one document, or has as many as sequences."""
        settings = self.settings
        generator = torch.Generator(self.device).manual_seed(settings.seed)
        shape = (batch, settings.heads, settings.q_len, settings.head_dim)
        queries = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        sets = self._sets(num_documents)
        exact = biased_attention(exact_attention, queries, sets[0])
        ours = self._our_name(queries)
        kernel = Way(ours, joined_documents, attend_documents, is_ours=True)
        rounded = Way(f"{ours}, int8", rounded_documents, attend_documents, is_ours=True, is_8_bit=True)
        found = []
        for way in (kernel, rounded, *((SDPA,) if self.is_full else (PADDED, REPEATED))):
            try:
                found += self._time(way, queries, sets, exact)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as failure:
                reason = " ".join(str(failure).split())[:200]
                self.reporter.note(f"{way.name} cannot run here and is left out: {reason}")
        return found

    def _sets(self, num_documents: int) -> list[list[LayerCache]]:
        """Return sets of documents that hold together `COLD_MULTIPLE` times the cache, at least two."""
        needed = COLD_MULTIPLE * cache_bytes(self.device)
        count = max(2, math.ceil(needed / (num_documents * self._document_bytes()))) * num_documents
        while len(self.layers) < count:
            one = self.maker.full(self.settings.kv_heads) if self.is_full else self.maker.kept(self.lengths)
            self.layers.append(one)
        return [self.layers[i : i + num_documents] for i in range(0, count, num_documents)]

    def _document_bytes(self) -> int:
        return sum(self.lengths) * (2 * self.settings.head_dim * self.dtype.itemsize + (0 if self.is_full else 4))

    def _our_name(self, queries: torch.Tensor) -> str:
        is_kernel = attention.kernel_usable("biased_decode", queries)
        return "biased_decode" if is_kernel else "biased_decode, twin"

    def _time(self, way: Way, queries: torch.Tensor, sets: list[list[LayerCache]], exact: torch.Tensor) -> list[Row]:
        """Time one way; ``exact``: outputs for the first set, float64."""
        batch, num_documents = len(queries), len(sets[0])
        calls = [partial(way.attend, queries, way.prepare(documents, batch)) for documents in sets]
        error = float((calls[0]().double() - exact).abs().max())
        is_small = self.device.type == "cuda" and num_documents * self._document_bytes() < SMALL_BYTES
        count = max(len(calls), CALLS if is_small else 0)
        read = self._read_bytes(sets[0], is_8_bit=way.is_8_bit)
        made = [self._row(way.name, queries, num_documents, read, error, [calls[i % len(calls)] for i in range(count)])]
        if way.is_ours and not way.is_8_bit:
            made.append(self._row(f"{way.name}, warm", queries, num_documents, read, error, [calls[0]] * count))
        return made

    def _read_bytes(self, kept: Kept, *, is_8_bit: bool) -> int:
        """Return the bytes that a call reads at least, queries and outputs aside."""
        if not is_8_bit:
            return read_bytes(kept, with_biases=not self.is_full)
        vectors = len(kept) * sum(self.lengths)
        return vectors * (2 * self.settings.head_dim + 8 + (0 if self.is_full else 4))

    def _row(
        self,
        name: str,
        queries: torch.Tensor,
        num_documents: int,
        read: int,
        error: float,
        calls: list[Callable[[], torch.Tensor]],
    ) -> Row:
        settings, batch = self.settings, len(queries)
        timing: Timing = measure_small(calls, self.device, repeats=settings.repeats)
        sizes = {size: getattr(settings, size) for size in ("heads", "kv_heads", "head_dim", "q_len")}
        sizes |= {"batch": batch, "documents": num_documents, "keys": round(sum(self.lengths) / len(self.lengths))}
        rows_per_head = batch * settings.q_len * settings.heads // settings.kv_heads
        work = Work(
            4.0 * rows_per_head * sum(self.lengths) * settings.head_dim,
            precision_of(self.dtype),
            read + 2 * queries.nbytes,
        )
        return Row(name, timing, sizes, [work], {"longest_head": max(self.lengths), "max_error": error})


class Documents(NamedTuple):
    """The kept keys of one or several documents as the kernel takes them."""

    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # keys, values, biases, offsets
    longest: int  # keys of the longest head
    number: int  # of documents
    scales: tuple[torch.Tensor, torch.Tensor] | None = None  # of keys and values in 8 bits


def joined_documents(kept: Kept, batch: int) -> Documents:
    """Return the documents one after another."""
    lengths = [length for layer in kept for length in layer.head_lengths]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=kept[0].keys.device)
    keys, values, biases = (
        torch.cat([getattr(layer, name) for layer in kept]) if len(kept) > 1 else getattr(kept[0], name)
        for name in ("keys", "values", "biases")
    )
    return Documents((keys, values, biases, offsets), max(lengths), len(kept))


def rounded_documents(kept: Kept, batch: int) -> Documents:
    """Return the same in 8 bits."""
    whole = joined_documents(kept, batch)
    (keys, key_scales), (values, value_scales) = map(quantise, whole.parts[:2])
    return whole._replace(parts=(keys, values, *whole.parts[2:]), scales=(key_scales, value_scales))


def attend_documents(queries: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Attend as the program does while it decodes, by the kernel where there is one, elsewhere by its twin."""
    return attention.document_attention(
        queries,
        *documents.parts,
        scaling=queries.shape[-1] ** -0.5,
        max_head_length=documents.longest,
        num_documents=documents.number,
        scales=documents.scales,
        settled=True,
    )[0]


def biased_attention(
    attend: Callable[[torch.Tensor, LayerCache], torch.Tensor], queries: torch.Tensor, kept: Kept
) -> torch.Tensor:
    """Call ``attend`` once for a document that all sequences share, or for each with the queries of its sequence."""
    if len(kept) == 1:
        return attend(queries, kept[0])
    return torch.cat([attend(own, layer) for own, layer in zip(queries.split(1), kept, strict=True)])


def exact_attention(queries: torch.Tensor, layer: LayerCache) -> torch.Tensor:
    """Attend in float64."""
    parts = (layer.keys.double(), layer.values.double(), layer.biases, layer.offsets)
    return biased_attention_reference(queries.double(), *parts, scaling=queries.shape[-1] ** -0.5).out


def full_heads(kept: Kept, batch: int) -> tuple[torch.Tensor, ...]:
    """Return keys and values (batch, num_kv_heads, keys, head_dim); a view where one document is shared."""
    return _batched([dense_heads(layer) for layer in kept], batch)


def padded_heads(kept: Kept, batch: int) -> tuple[torch.Tensor, ...]:
    """Return keys and values (batch, num_kv_heads, padded, head_dim), and biases (batch, num_kv_heads, 1, padded) of
    their type, -inf where there is no key."""
    return _batched([_pad(layer) for layer in kept], batch)


def _pad(layer: LayerCache) -> tuple[torch.Tensor, ...]:
    lengths = layer.head_lengths
    padded = PADDED_TO * math.ceil(max(lengths) / PADDED_TO)
    keys, values = (layer.keys.new_zeros(1, len(lengths), padded, layer.keys.shape[-1]) for _ in range(2))
    mask = layer.keys.new_full((1, len(lengths), 1, padded), -math.inf)
    for head, own in enumerate(zip(*(part.split(lengths) for part in (layer.keys, layer.values, layer.biases)),
                                   strict=True)):  # fmt: skip
        keys[0, head, : lengths[head]], values[0, head, : lengths[head]], mask[0, head, 0, : lengths[head]] = own
    return keys, values, mask


def _batched(documents: Sequence[tuple[torch.Tensor, ...]], batch: int) -> tuple[torch.Tensor, ...]:
    if len(documents) == 1:
        return tuple(part.expand(batch, -1, -1, -1) for part in documents[0])
    return tuple(torch.cat(parts) for parts in zip(*documents, strict=True))


def sdpa(queries: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Torch SDPA over full heads."""
    keys, values = parts
    return scaled_dot_product_attention(queries, keys, values, enable_gqa=True)


def sdpa_padded(queries: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Torch SDPA over padded heads, the query heads of a group as rows of their KV head: no key is repeated."""
    keys, values, mask = parts
    grouped = queries.reshape(len(keys), keys.shape[1], -1, keys.shape[-1])
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask.expand(-1, -1, grouped.shape[2], -1))
    return out.reshape(queries.shape)


def sdpa_repeated(queries: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Torch SDPA over padded heads, keys, values and mask repeated for the query heads in every call."""
    group, q_len = queries.shape[1] // parts[0].shape[1], queries.shape[2]
    keys, values, mask = (part.repeat_interleave(group, 1) for part in parts)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask.expand(-1, -1, q_len, -1))


SDPA = Way("SDPA", full_heads, sdpa)
PADDED = Way("SDPA, bias mask", padded_heads, sdpa_padded)
REPEATED = Way("SDPA, bias mask, keys repeated", padded_heads, sdpa_repeated)
