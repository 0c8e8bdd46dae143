"""Knows the fit of one layer, on-policy: the queries it sees come from layers below that are already compacted.

Per KV head, over all its reference rows: attention mass on the document -> biases (biases.py), attention output ->
values (values.py), both jointly over the kept keys of all chunks and with the true normaliser; then keys, biases and
values together (refine.py). The layer then returns attention over its compacted self, so that the next layer sees what
it will see at decode time.

Exact attention is computed once per row. What prefix and local keys give to it does not change when the document is
compacted, except for the normaliser: with their log-sum-exp and output known, a row needs only its scores on the kept
keys:

    lse' = log(exp(near_lse) + sum over kept j of exp(s q_i.k_j + beta_j))
    out'_i = exp(near_lse - lse') near_i + sum over kept j of exp(s q_i.k_j + beta_j - lse') v'_j
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from compactor import attention
from compactor.attach import dense_heads
from compactor.config import CompactSettings
from compactor.packed import Packed, PackedLayer, exact_rows
from compactor.prefill import context_spans
from compactor.solve.biases import require_finite, solve_box_nnls
from compactor.solve.gram import GramSum, energy_of
from compactor.solve.refine import HeadKeyValues, Refiner
from compactor.solve.shrink import HeadCurve, chunk_blocks
from compactor.solve.values import RidgeStats, ValueFit, fit_values
from compactor.types import Advance, LayerCache

HELD_OUT_SPAN, HELD_OUT_EVERY = 32, 5  # one span of 32 rows in five chooses the ridge
BIAS_PRIOR = 1e-3  # pull of each b towards 1, relative to its own diagonal entry
REFILLS = 3  # rounds in which keys at the lower bound give their slot to the next of the ranking
WORTH_A_REFILL = 0.01  # of the kept keys: fewer at the lower bound stay where they are
RESERVE_FRACTION, RESERVE_LEAST, RESERVE_MOST = 0.125, 8, 128  # candidates beyond the count, for refills
BIAS_TOLERANCE = 1e-6  # stopping test of the biases; the data are float32
CPU_GRAM_ROWS = 512  # query positions of one Gram block on a CPU: few enough that they look at some of the keys only
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
    curve_gains: torch.Tensor | None = None  # (num_kv_heads, num_document) float32 by position, where curves are kept
    curve_chunk: int = 0  # document tokens of a chunk of the curves
    refiner: Refiner | None = None  # of keys, biases and values together
    currency: float = 1.0  # factor that makes this layer's squared errors comparable with other layers'


@dataclass(frozen=True)
class HeadFit:
    """The fitted document keys of one KV head."""

    kept: torch.Tensor  # (num_kept,) int64, document-relative, increasing
    keys: torch.Tensor  # (num_kept, head_dim) float32
    biases: torch.Tensor  # (num_kept,) float32
    values: torch.Tensor  # (num_kept, head_dim) float32
    ridge: float
    converged: bool
    squared_error: float  # weighted, of the attention output, on all rows
    unfitted_error: float  # the same with the original values and the fitted biases
    energy: float  # weighted squared norm of the true attention output
    gram: torch.Tensor | None = None  # (num_kept, num_kept) float64: sum of w A_i A_i^T, where curves are kept
    curve: HeadCurve | None = None  # what `compactor recompact` needs of it, in host memory


@dataclass(frozen=True)
class Rows:
    """Reference rows of one KV head (or, with a leading dimension, of all) and their exact attention."""

    queries: torch.Tensor  # (group, num_rows, head_dim), the model's type
    scaling: float
    root_weights: torch.Tensor  # (group, num_rows) float32: square roots of the row weights
    lse: torch.Tensor  # (group, num_rows) float32: over prefix, document and local keys
    near_share: torch.Tensor  # (group, num_rows) float32: logarithm of the attention on prefix and local keys
    near: torch.Tensor  # (group, num_rows, head_dim) float32: their output, normalised among themselves
    out: torch.Tensor  # (group, num_rows, head_dim) float32: the whole output
    held_out: torch.Tensor  # (num_rows,) bool: chooses the ridge instead of being fitted
    document_stop: torch.Tensor | None = None  # (num_rows,) int64: document keys that the row sees; None is all

    def head(self, index: int) -> Rows:
        """Return the rows of one KV head."""
        own = {
            name: getattr(self, name)[index] for name in ("queries", "root_weights", "lse", "near_share", "near", "out")
        }
        return replace(self, **own)

    def blocks(self, num_columns: int) -> Iterator[Rows]:
        """Cut the rows such that ``num_columns`` scores a row stay within the device's block size; each block has its
        group flattened into the rows: (1, group * rows, ...)."""
        device, (group, num_rows, _) = self.queries.device, self.queries.shape
        most = CPU_GRAM_ROWS if device.type == "cpu" else num_rows
        step = max(1, min(most, attention.block_elements(device) // (group * max(1, num_columns))))
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            yield Rows(
                self.queries[:, rows].flatten(0, 1).unsqueeze(0),
                self.scaling,
                self.root_weights[:, rows].reshape(1, -1),
                self.lse[:, rows].reshape(1, -1),
                self.near_share[:, rows].reshape(1, -1),
                self.near[:, rows].flatten(0, 1).unsqueeze(0),
                self.out[:, rows].flatten(0, 1).unsqueeze(0),
                self.held_out[rows].repeat(group),
                None if self.document_stop is None else self.document_stop[rows].repeat(group),
            )


@dataclass(frozen=True)
class HeadKeys:
    """Document keys and values of one KV head, float32; the keys as the file will hold them."""

    values: torch.Tensor  # (num_document, head_dim)
    stored_keys: torch.Tensor  # (num_document, head_dim): rounded to the storage type


class FitLayer(PackedLayer):
    """Fits its layer when the pass reaches it; ``fitted`` and ``heads`` hold the result."""

    def __init__(
        self, full: LayerCache, packed: Packed, logical_length: int, advance: Advance, inputs: FitInputs
    ) -> None:
        super().__init__(full, packed, logical_length, advance)
        self.inputs = inputs
        self.fitted: LayerCache | None = None
        self.heads: list[HeadFit] = []

    def attend_packed(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Fit every KV head, then attend over the compacted layer; see `PackedLayer.attend_packed` for shapes."""
        inputs, prefix = self.inputs, self.inputs.prefix_length
        full_keys, full_values = (part[0, :, prefix:] for part in dense_heads(self.full))
        rows = [segment_rows(self, inputs, queries, keys, values, scaling)]
        if inputs.context_queries is not None:
            rows.append(context_rows(self.full, inputs, inputs.context_queries, scaling))
        heads = []
        for head in range(keys.shape[0]):
            parts = HeadKeys(full_values[head].float(), full_keys[head].to(inputs.storage_dtype).float())
            own = [part.head(head) for part in rows]
            with self.naming(head):
                heads.append(fit_head(parts, own, inputs.order[head], inputs.counts[head], inputs.settings))
                require_finite(heads[-1].biases, heads[-1].values)
        if inputs.refiner is not None:
            heads = refine_heads(heads, rows, inputs.refiner, num_document=inputs.order.shape[1])
        self.heads, outputs = [], []
        for head, fit in enumerate(heads):
            own = [part.head(head) for part in rows]
            stored_keys, stored_values = (part.to(inputs.storage_dtype).float() for part in (fit.keys, fit.values))
            outs = [fitted_output(part, stored_keys, stored_values, fit.biases, fit.kept) for part in own]
            outputs.append(outs[0])
            if inputs.refiner is not None and len(fit.kept) < inputs.order.shape[1]:
                fit = replace(fit, squared_error=sum(map(squared_error, own, outs)))
                if inputs.settings.keep_curves:
                    fit = replace(fit, gram=gram_of(own, stored_keys, fit.kept))
            self.heads.append(self._with_curve(head, fit))
        self.fitted = assemble(self.full, self.heads, prefix, inputs.storage_dtype)
        return torch.stack(outputs).view(queries.shape)

    def _with_curve(self, head: int, fit: HeadFit) -> HeadFit:
        """Replace the Gram matrix by its chunk blocks, which are all that is kept of it."""
        gains = self.inputs.curve_gains
        return fit if gains is None else replace(fit, gram=None, curve=curve_of(fit, gains[head], self.inputs))


def refine_heads(heads: list[HeadFit], rows: list[Rows], refiner: Refiner, num_document: int) -> list[HeadFit]:
    """Move keys, biases and values of all heads together; heads that keep every key stay as they are."""
    none = torch.empty(0)
    before = [
        HeadKeyValues(fit.keys, fit.biases, fit.values, fit.kept)
        if len(fit.kept) < num_document
        else HeadKeyValues(none, none, none, none)
        for fit in heads
    ]
    after = refiner.refine(rows, before)
    return [
        replace(fit, keys=moved.keys, biases=moved.biases, values=moved.values) if len(moved.biases) else fit
        for fit, moved in zip(heads, after, strict=True)
    ]


def squared_error(rows: Rows, output: torch.Tensor) -> float:
    """Return the weighted squared distance of outputs (group, num_rows, head_dim) from the exact ones."""
    return energy_of((output - rows.out) * rows.root_weights.unsqueeze(-1))


def gram_of(parts: list[Rows], stored_keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return sum of w A_i A_i^T over all rows, A_i the attention to the kept keys without biases, float64."""
    sums = GramSum(len(kept), 1, solve_device(stored_keys.device))
    for rows in parts:
        for block in rows.blocks(len(kept)):
            roots = block.root_weights.unsqueeze(-1)
            shares = kept_attention(block, stored_keys, kept)
            sums.add((shares * roots.to(shares.dtype))[0], torch.zeros_like(roots)[0])
    return sums.gram


def curve_of(fit: HeadFit, gains: torch.Tensor, inputs: FitInputs) -> HeadCurve:
    """Return the chunk blocks of a head's Gram matrix; gains: (num_document,) float32 by position."""
    assert fit.gram is not None
    kept = fit.kept.cpu()
    return chunk_blocks(fit.gram.cpu(), kept, inputs.curve_chunk, gains=gains[kept], currency=inputs.currency)


def segment_rows(
    layer: PackedLayer,
    inputs: FitInputs,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
) -> Rows:
    """Return all packed rows with their exact attention, heads first; shapes as `PackedLayer.attend_packed`."""
    num_kv_heads, num_rows = keys.shape[0], queries.shape[1]
    exact = exact_rows(layer, queries, keys, values, scaling, inputs.prefix_length)
    gains = inputs.head_gains.to(queries.device).view(num_kv_heads, -1, 1)
    roots = gains * layer.packed.row_weights(inputs.source_weights, queries.device).sqrt()
    grouped = queries.view(num_kv_heads, -1, num_rows, queries.shape[-1])
    held_out = held_out_rows(num_rows, queries.device)
    near_share = exact.near_lse - exact.lse
    return Rows(grouped, scaling, roots, exact.lse, near_share, exact.near, exact.out, held_out)


def context_rows(full: LayerCache, inputs: FitInputs, queries: torch.Tensor, scaling: float) -> Rows:
    """Return the document's own rows, heads first; the keys of a row's own span are local (prefill.context_spans).

    queries: (num_heads, num_document, head_dim).
    """
    keys, values = (part[0].float() for part in dense_heads(full))
    num_kv_heads, prefix = keys.shape[0], inputs.prefix_length
    num_document, device = queries.shape[1], keys.device
    grouped = queries.view(num_kv_heads, -1, num_document, queries.shape[-1])
    parts: list[tuple[torch.Tensor, ...]] = []
    stops = torch.zeros(num_document, dtype=torch.int64, device=device)
    first_row = num_document
    for start, stop, past in context_spans(0, num_document, 0):
        first_row = min(first_row, start)
        stops[start:stop] = past
        rows = (grouped[:, :, start:stop].to(device).float() * scaling).flatten(1, 2)
        seen = prefix + stop
        scores = torch.bmm(rows, keys[:, :seen].mT).view(num_kv_heads, -1, stop - start, seen)
        attention.hide_future(scores)
        near = torch.cat([scores[..., :prefix], scores[..., prefix + past :]], dim=-1)
        near_values = torch.cat([values[:, :prefix], values[:, prefix + past : seen]], dim=1)
        near_lse = near.logsumexp(-1)
        near_out = attention.weigh_values(near.sub_(near_lse.unsqueeze(-1)).exp_(), near_values)
        out = attention.weigh_values(scores.softmax(-1), values[:, :seen])
        lse = scores.logsumexp(-1)
        parts.append((grouped[:, :, start:stop].to(device), lse, near_lse - lse, near_out, out))
    if not parts:
        shape = (num_kv_heads, grouped.shape[1], 0)
        none = torch.zeros(*shape, queries.shape[-1], device=device)
        parts.append((none, torch.zeros(shape, device=device), torch.zeros(shape, device=device), none, none))
    own, lse, near_share, near_out, out = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    weight = inputs.source_weights["context"] ** 0.5
    roots = (inputs.head_gains.to(device).view(num_kv_heads, -1, 1) * weight).expand(lse.shape)
    return Rows(
        own, scaling, roots, lse, near_share, near_out, out, held_out_rows(lse.shape[2], device), stops[first_row:]
    )


def held_out_rows(count: int, device: torch.device) -> torch.Tensor:
    """Return bool (count,): which of the rows choose the ridge instead of being fitted."""
    spans = torch.arange(count, device=device) // HELD_OUT_SPAN
    return spans % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def fit_head(keys: HeadKeys, parts: list[Rows], order: torch.Tensor, count: int, settings: CompactSettings) -> HeadFit:
    """Choose, bias and refit ``count`` document keys of one KV head; ``order`` ranks all of them, best first."""
    num_document = keys.values.shape[0]
    device = keys.values.device
    if count >= num_document and not settings.keep_curves:
        everything = torch.arange(num_document, device=device)
        zero = torch.zeros(num_document, device=device)
        return HeadFit(everything, keys.stored_keys, zero, keys.values, 0.0, True, 0.0, 0.0, 0.0)
    reserve = min(num_document, count + min(RESERVE_MOST, max(RESERVE_LEAST, int(RESERVE_FRACTION * count))))
    candidates = order[:reserve].to(device)
    sums = GramSum(reserve, 1, solve_device(device))
    energy = 0.0
    for rows in parts:
        for block in rows.blocks(reserve):
            roots = block.root_weights.unsqueeze(-1)
            shares = kept_attention(block, keys.stored_keys[candidates], candidates)
            mass = -torch.expm1(block.near_share.unsqueeze(-1))  # 1 - the attention on prefix and local keys
            sums.add((shares * roots.to(shares.dtype))[0], (mass * roots)[0])
        energy += energy_of(rows.out * rows.root_weights.unsqueeze(-1))
    chosen, scale, converged = choose_biases(sums.gram, sums.rhs[:, 0], count, settings)
    by_position = candidates[chosen.to(device)].sort()
    kept = by_position.values
    biases = scale.log().float().to(device)[by_position.indices]
    gram = None
    if settings.keep_curves:
        sorted_ = chosen[by_position.indices.to(chosen.device)]
        gram = sums.gram[sorted_][:, sorted_]
    fit = fit_head_values(keys, parts, kept, biases, settings.ridge)
    values = keys.values[kept] + fit.change.float().to(device)
    errors = fit.error_after, fit.error_before
    return HeadFit(kept, keys.stored_keys[kept], biases, values, fit.ridge, converged, *errors, energy, gram)


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
    keys: HeadKeys, parts: list[Rows], kept: torch.Tensor, biases: torch.Tensor, ridge: float | None
) -> ValueFit:
    """Refit the values of the kept keys so that attention over the compacted head gives the true outputs."""
    device = keys.values.device
    train, held_out = (GramSum(len(kept), keys.values.shape[-1], solve_device(device)) for _ in range(2))
    kept_keys, kept_values = keys.stored_keys[kept], keys.values[kept]
    for rows in parts:
        for block in rows.blocks(len(kept)):
            shares, near_weights = fitted_attention(block, kept_keys, biases, kept)
            missing = (
                block.out - near_weights.unsqueeze(-1) * block.near - attention.multiply(shares, kept_values[None])
            )
            roots, aside = block.root_weights.unsqueeze(-1), block.held_out
            shares, missing = (shares * roots.to(shares.dtype))[0], (missing * roots)[0]
            for sums, member in ((train, ~aside), (held_out, aside)):
                sums.add(shares[member], missing[member])
    return fit_values(
        RidgeStats(train.gram, train.rhs, train.energy),
        RidgeStats(held_out.gram, held_out.rhs, held_out.energy),
        ridge,
    )


def fitted_attention(
    rows: Rows, kept_keys: torch.Tensor, biases: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention to the kept keys under the compacted normaliser, (group, rows, num_kept), and the attention that
    is left to prefix and local keys together, (group, rows).

    Taken in logarithms: a row that looked at one key which is not kept may have nothing else within range of a float.
    """
    scores = attention.shifted_scores(rows.queries, *for_each(rows, kept_keys, biases), rows.scaling, -rows.lse)
    hide_later(scores, rows, kept, -math.inf)
    shift = torch.logaddexp(scores.logsumexp(-1), rows.near_share)  # lse' - lse
    scores -= shift.unsqueeze(-1)
    return attention.exponential_of(scores, rows.queries), (rows.near_share - shift).exp()


def fitted_output(
    rows: Rows, kept_keys: torch.Tensor, kept_values: torch.Tensor, biases: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Return attention of rows over the compacted head: (group, num_rows, head_dim)."""
    parts = []
    for block in rows.blocks(len(biases)):
        shares, near_weights = fitted_attention(block, kept_keys, biases, kept)
        part = attention.multiply(shares, kept_values[None]) + near_weights.unsqueeze(-1) * block.near
        parts.append(part.view(rows.out.shape[0], -1, rows.out.shape[-1]))
    return torch.cat(parts, dim=1) if parts else torch.empty_like(rows.out)


def kept_attention(rows: Rows, stored_keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Attention of a block of rows to some document keys under the full normaliser.

    stored_keys: (num_keys, head_dim); positions: (num_keys,) int64. Returns (group, rows, num_keys), float16 where
    `attention.is_fast`, else float32.
    """
    keys, _ = for_each(rows, stored_keys, None)
    shares = attention.exponentials(rows.queries, keys, rows.scaling, -rows.lse)
    hide_later(shares, rows, positions, 0.0)
    return shares


def for_each(rows: Rows, keys: torch.Tensor, biases: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Repeat keys (num_keys, head_dim) and biases (num_keys,) for the leading dimension of the rows, without a copy."""
    count = len(rows.queries)
    return keys.expand(count, -1, -1), None if biases is None else biases.expand(count, -1)


def hide_later(scores: torch.Tensor, rows: Rows, positions: torch.Tensor, value: float) -> None:
    """Fill the entries of document keys that a row does not see."""
    if rows.document_stop is not None:
        scores.masked_fill_(positions >= rows.document_stop.unsqueeze(-1), value)


def solve_device(device: torch.device) -> torch.device:
    """Where float64 systems are solved: the same device, except that MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def assemble(full: LayerCache, heads: list[HeadFit], prefix_length: int, dtype: torch.dtype) -> LayerCache:
    """Put prefix (verbatim, bias 0) and fitted document keys of all heads into one ragged layer of storage type."""
    full_keys, full_values = (part[0].float() for part in dense_heads(full))
    device = full_keys.device
    prefix_positions = torch.arange(prefix_length, device=device, dtype=torch.int32)
    keys, values, biases, positions, lengths = [], [], [], [], [0]
    for index, head in enumerate(heads):
        rows = head.kept + prefix_length
        keys += [full_keys[index, :prefix_length], head.keys]
        values += [full_values[index, :prefix_length], head.values]
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
