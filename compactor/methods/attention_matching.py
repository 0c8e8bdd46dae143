"""Knows Attention Matching as published (arXiv 2602.16284): uniform budgets, every query alike, no context around it.

Per KV head, with queries q_i of the reference segments and the document's keys and values alone (neither prefix nor
local tokens), s the scaling and M_i the largest score of row i:

    features   F_ij = exp(s q_i.k_j - M_i),  mass m_i = sum over j of F_ij
    biases     b = exp(beta) minimises ||F_S b - m||^2 in a box
    values     v minimises ||X v - Y||^2,  X_i = softmax(s q_i.k_S + beta),  Y_i = softmax(s q_i.K) V

The two methods differ in how they choose S. Layers are fitted on-policy, one after the other in one pass: each sees
the queries that come out of the compacted layers below it. Shifting a row by its own M_i is what the published program
does; it leaves rows that look at many keys with the larger mass and so with the larger say in the biases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from compactor import attention
from compactor.attach import dense_heads
from compactor.methods import Compacted
from compactor.methods.keeping import keep_everything, keep_keys, keeps_all, uniform_counts
from compactor.packed import Packed, PackedLayer, near_exact, near_fused
from compactor.prompt import chunk_borders
from compactor.reference_queries import repeat_segments
from compactor.solve.biases import require_finite
from compactor.solve.fit import solve_device
from compactor.solve.gram import add_symmetric_product, as_sum, energy_of
from compactor.solve.values import RidgeStats, solve_ridge
from compactor.study import Study, stored
from compactor.types import Advance, LayerCache, Segment

VALUE_RIDGE = 1e-7  # of the mean diagonal: for the factorisation only, the published fit is plain least squares


@dataclass(frozen=True)
class Head:
    """One KV head and the reference queries of its group."""

    queries: torch.Tensor  # (num_rows, head_dim) float32, multiplied by the scaling
    keys: torch.Tensor  # (num_document, head_dim) float32
    values: torch.Tensor  # (num_document, head_dim) float32
    stored_keys: torch.Tensor  # the keys as the cache will hold them, float32

    def blocks(self, num_columns: int) -> Iterator[slice]:
        """Cut the rows such that a block of ``num_columns`` scores a row stays within the device's block size."""
        for start, stop in attention.row_blocks(len(self.queries), num_columns, 1, self.queries.device):
            yield slice(start, stop)


@dataclass(frozen=True)
class Rows:
    """What the full document says to each row, float32."""

    largest: torch.Tensor  # (num_rows, 1): M
    mass: torch.Tensor  # (num_rows, 1): m, at least 1
    outputs: torch.Tensor  # (num_rows, head_dim): Y


@dataclass(frozen=True)
class HeadMatch:
    """The kept keys of one KV head."""

    kept: torch.Tensor  # (num_kept,) int64, document-relative
    biases: torch.Tensor  # (num_kept,) float32
    values: torch.Tensor  # (num_kept, head_dim) float32
    squared_error: float  # of the document's own attention output, over all rows
    energy: float  # squared norm of that output


class MatchLayer(PackedLayer, ABC):
    """Fits its layer when the pass reaches it, then attends to its compacted self; ``fitted`` holds the result."""

    def __init__(
        self,
        full: LayerCache,
        packed: Packed,
        logical_length: int,
        advance: Advance,
        *,
        prefix_length: int,
        counts: list[int],
        storage_dtype: torch.dtype,
    ) -> None:
        super().__init__(full, packed, logical_length, advance)
        self.prefix_length = prefix_length
        self.counts = counts  # document keys to keep, per KV head
        self.storage_dtype = storage_dtype
        self.fitted: LayerCache | None = None
        self.heads: list[HeadMatch] = []

    @abstractmethod
    def choose(self, head: Head, count: int) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """Return the kept keys (num_kept,) int64, their biases (num_kept,) float32, and what the rows must receive."""

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Fit every KV head, then attend over the compacted layer; see `PackedLayer.attend_packed` for shapes."""
        num_kv_heads, head_dim = keys.shape[0], keys.shape[-1]
        grouped = queries.reshape(num_kv_heads, -1, head_dim)
        full_keys, full_values = (part[0, :, self.prefix_length :] for part in dense_heads(self.full))
        self.heads = []
        for index, count in enumerate(self.counts):
            own_keys = full_keys[index].float()
            rounded = full_keys[index].to(self.storage_dtype).float()
            head = Head(grouped[index].float() * scaling, own_keys, full_values[index].float(), rounded)
            with self.naming(index):
                self.heads.append(self._match(head, count))
                require_finite(self.heads[-1].biases, self.heads[-1].values)
        self.fitted = keep_keys(
            self.full,
            [head.kept for head in self.heads],
            self.prefix_length,
            self.storage_dtype,
            [head.biases for head in self.heads],
            [head.values for head in self.heads],
        )
        return attend_compacted(self.fitted, self.packed, queries, keys, values, scaling)

    def _match(self, head: Head, count: int) -> HeadMatch:
        num_document = len(head.keys)
        if count >= num_document:
            everything = torch.arange(num_document, device=head.keys.device)
            return HeadMatch(everything, torch.zeros(num_document, device=head.keys.device), head.values, 0.0, 0.0)
        kept, biases, rows = self.choose(head, count)
        values, error, energy = fit_values(head, kept, biases, rows.outputs)
        return HeadMatch(kept, biases, values, error, energy)


MakeMatch = Callable[..., MatchLayer]


def match(study: Study, num_kept: int, layer_type: MakeMatch) -> Compacted:
    """Keep ``num_kept`` document keys, equally many in every head, by layers of ``layer_type``, on-policy."""
    if keeps_all(study, num_kept):
        return keep_everything(study)
    job, full = study.job, study.full
    counts = uniform_counts(study, num_kept)
    fits: dict[int, MatchLayer] = {}

    def make(i: int, layer: LayerCache, packed: Packed, advance: Advance) -> MatchLayer:
        fits[i] = layer_type(
            layer,
            packed,
            full.logical_length,
            advance,
            prefix_length=full.prefix_length,
            counts=counts[i],
            storage_dtype=job.storage_dtype,
        )
        return fits[i]

    segments = reference_segments(study)
    with job.timed("fit"):
        study.run_layers(segments, "fit", make)
    layers = []
    for i, layer in enumerate(full.layers):
        fitted = fits[i].fitted if i in fits else None
        layers.append(stored(layer, job.storage_dtype) if fitted is None else fitted)
    return Compacted(layers, full.logical_length, report(fits))


def reference_segments(study: Study) -> list[Segment]:
    """Return the study's segments; where it has none (context queries alone), the repeat pass."""
    job = study.job
    return study.segments or study.once(
        "repeat segments",
        lambda: repeat_segments(
            job.prompt, job.document_ids, chunk_borders(len(job.document_ids), job.settings.chunk), job.room
        ),
    )


def report(fits: dict[int, MatchLayer]) -> dict[str, object]:
    """Return the error of the document's own attention output, relative: sqrt(sum ||X v - Y||^2 / sum ||Y||^2)."""
    heads = [head for layer in fits.values() for head in layer.heads]
    energy = sum(head.energy for head in heads)
    error = sum(head.squared_error for head in heads)
    return {"document_output_error": (error / energy) ** 0.5 if energy > 0 else 0.0}


def read_rows(head: Head, see: Callable[[torch.Tensor, torch.Tensor], None]) -> Rows:
    """Attend to the whole document row by row; ``see(features F, masses m)`` is shown every block and may change it."""
    largest, mass, outputs = [], [], []
    for rows in head.blocks(len(head.keys)):
        scores = head.queries[rows] @ head.keys.T
        largest.append(scores.amax(-1, keepdim=True))
        features = scores.sub_(largest[-1]).exp_()
        mass.append(features.sum(-1, keepdim=True))
        outputs.append(features @ head.values / mass[-1])
        see(features, mass[-1])
    return Rows(torch.cat(largest), torch.cat(mass), torch.cat(outputs))


def mass_system(head: Head, rows: Rows, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return F_S^T F_S (n, n) and F_S^T m (n,) of the kept keys, float64."""
    gram, target = zero_sums(len(kept), 1, head.queries.device)
    keys = head.keys[kept]
    for block in head.blocks(len(kept)):
        features = (head.queries[block] @ keys.T).sub_(rows.largest[block]).exp_()
        add_symmetric_product(gram, features)
        target += as_sum(features.T @ rows.mass[block], target)
    return gram, target.squeeze(-1)


def fit_values(
    head: Head, kept: torch.Tensor, biases: torch.Tensor, outputs: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """Return the least squares values (n, head_dim) float32, their squared error, and the energy of the outputs."""
    gram, rhs = zero_sums(len(kept), outputs.shape[-1], head.queries.device)
    keys = head.stored_keys[kept]
    for block in head.blocks(len(kept)):
        weights = (head.queries[block] @ keys.T).add_(biases).softmax(-1)
        add_symmetric_product(gram, weights)
        rhs += as_sum(weights.T @ outputs[block], rhs)
    stats = RidgeStats(gram, rhs, energy_of(outputs))
    values = solve_ridge(stats, VALUE_RIDGE)
    return values.to(dtype=torch.float32).to(outputs.device), stats.error(values), stats.energy


def zero_sums(num_columns: int, num_targets: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros for a Gram matrix and its right-hand sides, float64.

    No column of a block is left out here, as `solve.gram.GramSum` does: without a pull towards the original values a
    key that rows hardly see would lose its value.
    """
    where = solve_device(device)
    return (
        torch.zeros(num_columns, num_columns, dtype=torch.float64, device=where),
        torch.zeros(num_columns, num_targets, dtype=torch.float64, device=where),
    )


def attend_compacted(
    layer: LayerCache,
    packed: Packed,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attend to a compacted layer and, causally, to the own segment, if there is one; shapes as
    `PackedLayer.attend_packed`."""
    offsets, longest = layer.offsets, max(layer.head_lengths)
    own_keys, own_values = layer.keys.to(queries.dtype), layer.values.to(queries.dtype)
    part, lse = attention.document_attention(
        queries[None], own_keys, own_values, layer.biases, offsets, scaling=scaling, max_head_length=longest
    )
    if not packed.bounds:
        return part[0]
    attend_tail = near_fused if attention.is_fast(queries) else near_exact
    grouped = queries.view(keys.shape[0], -1, *queries.shape[1:])
    nothing = keys[:, :0], values[:, :0]
    tail, tail_lse = attend_tail(packed, grouped, keys, values, nothing, scaling)
    out, _ = attention.merge(part[0], lse[0], tail.view(queries.shape), tail_lse.view(lse.shape[1:]))
    return out
