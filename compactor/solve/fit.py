"""Knows the fit of one layer, on-policy: the queries it sees come from layers below that are already compacted.

Per KV head, over all its reference rows: attention mass on the document -> biases (biases.py), attention output ->
values (values.py), both jointly over the kept keys of all chunks and with the true normaliser. The layer then returns
attention over its compacted self, so that the next layer sees what it will see at decode time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from compactor import attention
from compactor.attach import dense_heads
from compactor.config import CompactSettings
from compactor.packed import Packed, PackedLayer
from compactor.prefill import context_spans
from compactor.solve.biases import solve_box_nnls
from compactor.solve.gram import GramSum, energy_of
from compactor.solve.values import RidgeStats, ValueFit, fit_values
from compactor.types import LayerCache

HELD_OUT_SPAN, HELD_OUT_EVERY = 32, 5  # one span of 32 rows in five chooses the ridge
BIAS_PRIOR = 1e-3  # pull of each b towards 1, relative to its own diagonal entry
REFILLS = 3  # rounds in which keys at the lower bound give their slot to the next of the ranking
WORTH_A_REFILL = 0.01  # of the kept keys: fewer at the lower bound stay where they are
RESERVE_FRACTION, RESERVE_LEAST, RESERVE_MOST = 0.125, 8, 128  # candidates beyond the count, for refills
BIAS_TOLERANCE = 1e-6  # stopping test of the biases; the data are float32
GRAM_ROWS = 512  # query positions of one Gram block: few enough that they look at some of the keys only
AT_FLOOR = 1.0 + 1e-6


@dataclass(frozen=True)
class FitInputs:
    """What a layer's fit needs besides the queries that the pass brings."""

    prefix_length: int
    order: torch.Tensor  # (num_kv_heads, num_document) int64, best first
    counts: list[int]  # document keys to keep, per KV head
    head_gains: torch.Tensor  # (num_heads,) float32
    source_weights: dict[str, float]  # weight of a row of each source
    context_queries: torch.Tensor | None  # (num_heads, num_document, head_dim), host memory
    storage_dtype: torch.dtype
    settings: CompactSettings


@dataclass(frozen=True)
class HeadFit:
    """The fitted document keys of one KV head."""

    kept: torch.Tensor  # (num_kept,) int64, document-relative, increasing
    biases: torch.Tensor  # (num_kept,) float32
    values: torch.Tensor  # (num_kept, head_dim) float32
    ridge: float
    converged: bool
    squared_error: float  # weighted, of the attention output, on all rows
    unfitted_error: float  # the same with the original values and the fitted biases
    energy: float  # weighted squared norm of the true attention output


@dataclass(frozen=True)
class Rows:
    """A block of reference queries of one KV head, and the local tokens they see causally (the last q_len: their own).

    A segment's local tokens follow the document; a context row's are those of its own span of the document.
    """

    queries: torch.Tensor  # (group, q_len, head_dim) float32, multiplied by the scaling
    root_weights: torch.Tensor  # (group, 1) float32: square roots of the row weights
    document_stop: int  # document keys that the rows see: the first ones
    local_keys: torch.Tensor  # (num_local, head_dim) float32, num_local >= q_len
    local_values: torch.Tensor
    held_out: torch.Tensor  # (q_len,) bool


@dataclass(frozen=True)
class HeadKeys:
    """Full keys and values of one KV head, float32: prefix and document, and the keys as the file will hold them."""

    prefix_keys: torch.Tensor
    prefix_values: torch.Tensor
    document_keys: torch.Tensor
    document_values: torch.Tensor
    stored_keys: torch.Tensor  # document keys rounded to the storage type


class FitLayer(PackedLayer):
    """Fits its layer when the pass reaches it; ``fitted`` and ``heads`` hold the result."""

    def __init__(
        self,
        full: LayerCache,
        packed: Packed,
        logical_length: int,
        advance: Callable[[int], None],
        inputs: FitInputs,
    ) -> None:
        super().__init__(full, packed, logical_length, advance)
        self.inputs = inputs
        self.fitted: LayerCache | None = None
        self.heads: list[HeadFit] = []

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Fit every KV head, then attend over the compacted layer; see `PackedLayer.attend_packed` for shapes."""
        num_kv_heads = keys.shape[0]
        group = queries.shape[0] // num_kv_heads
        prefix = self.inputs.prefix_length
        full_keys, full_values = (part[0] for part in dense_heads(self.full))
        self.heads = []
        for head in range(num_kv_heads):
            own = slice(head * group, (head + 1) * group)
            document_keys = full_keys[head, prefix:].float()
            parts = HeadKeys(
                full_keys[head, :prefix].float(),
                full_values[head, :prefix].float(),
                document_keys,
                full_values[head, prefix:].float(),
                document_keys.to(self.inputs.storage_dtype).float(),
            )
            blocks = list(self._segment_rows(own, queries, keys[head].float(), values[head].float(), scaling))
            blocks += self._context_rows(own, parts, scaling)
            self.heads.append(
                fit_head(parts, blocks, self.inputs.order[head], self.inputs.counts[head], self.inputs.settings)
            )
        self.fitted = assemble(self.full, self.heads, prefix, self.inputs.storage_dtype)
        return self._attend_fitted(queries, keys, values, scaling)

    def _segment_rows(
        self, own: slice, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> Iterator[Rows]:
        gains = self.inputs.head_gains[own].to(queries.device).unsqueeze(-1)
        for (first, last), source in zip(self.packed.bounds, self.packed.sources, strict=True):
            kv_len = self.logical_length + last - first
            step = max(1, attention.BLOCK_ELEMENTS // (kv_len * gains.shape[0]))
            for start in range(0, last - first, step):
                stop = min(start + step, last - first)
                yield Rows(
                    queries[own, first + start : first + stop].float() * scaling,
                    gains * math.sqrt(self.inputs.source_weights[source]),
                    int(self.inputs.order.shape[-1]),
                    keys[first : first + stop],
                    values[first : first + stop],
                    held_out_rows(first + start, stop - start, queries.device),
                )

    def _context_rows(self, own: slice, parts: HeadKeys, scaling: float) -> Iterator[Rows]:
        inputs, device = self.inputs, parts.document_keys.device
        if inputs.context_queries is None:
            return
        gains = inputs.head_gains[own].to(device).unsqueeze(-1)
        for start, stop, past in context_spans(0, int(inputs.order.shape[-1]), 0):
            yield Rows(
                inputs.context_queries[own, start:stop].to(device).float() * scaling,
                gains * math.sqrt(inputs.source_weights["context"]),
                past,
                parts.document_keys[past:stop],
                parts.document_values[past:stop],
                held_out_rows(start, stop - start, device),
            )

    def _attend_fitted(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        assert self.fitted is not None
        layer, longest = self.fitted, max(self.fitted.head_lengths)
        stored_keys, stored_values = layer.keys.to(queries.dtype), layer.values.to(queries.dtype)
        out = torch.empty(queries.shape, device=queries.device)
        for first, last in self.packed.bounds:
            rows = queries[None, :, first:last]
            part, lse = attention.document_attention(
                rows,
                stored_keys,
                stored_values,
                layer.biases,
                layer.offsets,
                scaling=scaling,
                max_head_length=longest,
            )
            tail, tail_lse = attention.tail_attention(
                rows, keys[None, :, first:last], values[None, :, first:last], mask=None, scaling=scaling
            )
            out[:, first:last] = attention.merge(part, lse, tail, tail_lse)[0][0]
        return out


def held_out_rows(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return bool (count,): which of the rows ``first ..`` choose the ridge instead of being fitted."""
    spans = torch.arange(first, first + count, device=device) // HELD_OUT_SPAN
    return spans % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def fit_head(keys: HeadKeys, blocks: list[Rows], order: torch.Tensor, count: int, settings: CompactSettings) -> HeadFit:
    """Choose, bias and refit ``count`` document keys of one KV head; ``order`` ranks all of them, best first."""
    num_document = keys.document_keys.shape[0]
    device = keys.document_keys.device
    if count >= num_document:
        everything = torch.arange(num_document, device=device)
        zero = torch.zeros(num_document, device=device)
        return HeadFit(everything, zero, keys.document_values, 0.0, True, 0.0, 0.0, 0.0)
    reserve = min(num_document, count + min(RESERVE_MOST, max(RESERVE_LEAST, int(RESERVE_FRACTION * count))))
    candidates = order[:reserve].to(device)
    sums = GramSum(reserve, 1, solve_device(device))
    outputs, energy = [], 0.0
    for rows in blocks:
        lse, mass, out = full_attention(keys, rows)
        shares = weigh(kept_attention(keys.stored_keys[candidates], candidates, rows, lse), rows)
        masses = weigh(mass.unsqueeze(-1), rows)
        for part, target in zip(shares.split(GRAM_ROWS, 1), masses.split(GRAM_ROWS, 1), strict=True):
            sums.add(part.flatten(0, 1), target.flatten(0, 1))
        energy += energy_of(weigh(out, rows))
        outputs.append(out)
    chosen, scale, converged = choose_biases(sums.gram, sums.rhs[:, 0], count, settings)
    by_position = candidates[chosen.to(device)].sort()
    kept = by_position.values
    biases = scale.log().float().to(device)[by_position.indices]
    fit = fit_head_values(keys, blocks, outputs, kept, biases, settings.ridge)
    values = keys.document_values[kept] + fit.change.float().to(device)
    return HeadFit(kept, biases, values, fit.ridge, converged, fit.error_after, fit.error_before, energy)


def choose_biases(
    gram: torch.Tensor, rhs: torch.Tensor, count: int, settings: CompactSettings
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Solve the biases of the first ``count`` candidates; a key at the lower bound gives its slot to the next one.

    gram, rhs: over all candidates in ranking order. Returns indices into the candidates, b = exp(bias) of each, and
    whether the solver converged.
    """
    low, high = math.exp(settings.min_log_bias), math.exp(settings.max_log_bias)
    prior = BIAS_PRIOR * gram.diagonal()
    gram, rhs = gram + torch.diag(prior), rhs + prior
    chosen = torch.arange(count, device=gram.device)
    following = count
    solution = torch.ones(count, dtype=torch.float64, device=gram.device)
    for round_ in range(REFILLS + 1):
        fit = solve_box_nnls(
            gram[chosen][:, chosen], rhs[chosen], lower=low, upper=high, start=solution, tolerance=BIAS_TOLERANCE
        )
        solution = fit.solution
        idle = solution <= low * AT_FLOOR
        fresh = min(int(idle.sum()), gram.shape[0] - following)
        if fresh <= WORTH_A_REFILL * count or round_ == REFILLS:
            break
        slots = idle.nonzero().squeeze(-1)[:fresh]
        chosen[slots] = torch.arange(following, following + fresh, device=gram.device)
        solution[slots] = 1.0
        following += fresh
    return chosen, solution, fit.converged


def fit_head_values(
    keys: HeadKeys,
    blocks: list[Rows],
    outputs: list[torch.Tensor],
    kept: torch.Tensor,
    biases: torch.Tensor,
    ridge: float | None,
) -> ValueFit:
    """Refit the values of the kept keys so that attention over the compacted head gives the true outputs."""
    device = keys.document_keys.device
    head_dim = keys.document_values.shape[-1]
    train, held_out = (GramSum(len(kept), head_dim, solve_device(device)) for _ in range(2))
    kept_keys, kept_values = keys.stored_keys[kept], keys.document_values[kept]
    for rows, out in zip(blocks, outputs, strict=True):
        shares, delivered = fitted_attention(keys, kept, kept_keys, kept_values, biases, rows)
        weights, targets = weigh(shares, rows), weigh(out - delivered, rows)
        for sums, member in ((train, ~rows.held_out), (held_out, rows.held_out)):
            for positions in member.nonzero().squeeze(-1).split(GRAM_ROWS):
                sums.add(weights[:, positions].flatten(0, 1), targets[:, positions].flatten(0, 1))
    return fit_values(
        RidgeStats(train.gram, train.rhs, train.energy),
        RidgeStats(held_out.gram, held_out.rhs, held_out.energy),
        ridge,
    )


def fitted_attention(
    keys: HeadKeys,
    kept: torch.Tensor,
    kept_keys: torch.Tensor,
    kept_values: torch.Tensor,
    biases: torch.Tensor,
    rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over prefix, kept (biased) and local keys.

    Returns the weights of the kept keys (group, q_len, num_kept) and the output (group, q_len, head_dim).
    """
    prefix = keys.prefix_keys.shape[0]
    all_keys = torch.cat([keys.prefix_keys, kept_keys, rows.local_keys])
    all_values = torch.cat([keys.prefix_values, kept_values, rows.local_values])
    hidden = kept >= rows.document_stop
    group, q_len, head_dim = rows.queries.shape
    shares = rows.queries.new_empty(group, q_len, len(kept))
    out = rows.queries.new_empty(group, q_len, head_dim)
    for first, last in attention.row_blocks(q_len, len(all_keys), group, all_keys.device):
        seen = len(all_keys) - q_len + last
        scores = rows.queries[:, first:last] @ all_keys[:seen].T
        document = scores[..., prefix : prefix + len(kept)]
        document += biases
        document.masked_fill_(hidden, -math.inf)
        attention.hide_future(scores)
        probs = scores.softmax(-1)
        shares[:, first:last] = probs[..., prefix : prefix + len(kept)]
        out[:, first:last] = probs @ all_values[:seen]
    return shares, out


def full_attention(keys: HeadKeys, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend over prefix, document and local keys.

    Returns lse (group, q_len), the document's attention mass (group, q_len), and the output (group, q_len, head_dim).
    """
    prefix, stop = keys.prefix_keys.shape[0], rows.document_stop
    all_keys = torch.cat([keys.prefix_keys, keys.document_keys[:stop], rows.local_keys])
    all_values = torch.cat([keys.prefix_values, keys.document_values[:stop], rows.local_values])
    group, q_len, _ = rows.queries.shape
    lse, mass, out = [], [], []
    for first, last in attention.row_blocks(q_len, len(all_keys), group, all_keys.device):
        seen = len(all_keys) - q_len + last
        scores = rows.queries[:, first:last] @ all_keys[:seen].T
        attention.hide_future(scores)
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        lse.append((largest + total.log()).squeeze(-1))
        mass.append(weights[..., prefix : prefix + stop].sum(-1) / total.squeeze(-1))
        out.append((weights @ all_values[:seen]) / total)
    return torch.cat(lse, 1), torch.cat(mass, 1), torch.cat(out, 1)


def kept_attention(stored_keys: torch.Tensor, positions: torch.Tensor, rows: Rows, lse: torch.Tensor) -> torch.Tensor:
    """Attention of the rows to some document keys under the full normaliser: (group, q_len, num_keys) float32."""
    scores = rows.queries @ stored_keys.T
    scores.masked_fill_(positions >= rows.document_stop, -math.inf)
    return scores.sub_(lse.unsqueeze(-1)).exp_()


def weigh(rows_values: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Multiply (group, q_len, columns) by the square roots of the row weights."""
    return rows_values * rows.root_weights.unsqueeze(-1)


def solve_device(device: torch.device) -> torch.device:
    """Where float64 systems are solved: the same device, except that MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def assemble(full: LayerCache, heads: list[HeadFit], prefix_length: int, dtype: torch.dtype) -> LayerCache:
    """Put prefix (verbatim, bias 0) and fitted document keys of all heads into one ragged layer of storage type."""
    full_keys, full_values = (part[0] for part in dense_heads(full))
    device = full_keys.device
    prefix_positions = torch.arange(prefix_length, device=device, dtype=torch.int32)
    keys, values, biases, positions, lengths = [], [], [], [], [0]
    for index, head in enumerate(heads):
        rows = head.kept + prefix_length
        keys += [full_keys[index, :prefix_length], full_keys[index, rows]]
        values += [full_values[index, :prefix_length].float(), head.values]
        biases += [torch.zeros(prefix_length, device=device), head.biases]
        positions += [prefix_positions, rows.to(torch.int32)]
        lengths.append(prefix_length + len(rows))
    return LayerCache(
        keys=torch.cat(keys).to(dtype),
        values=torch.cat(values).to(dtype),
        biases=torch.cat(biases),
        positions=torch.cat(positions),
        offsets=torch.tensor(lengths, device=device).cumsum(0).to(torch.int32),
    )
