"""Knows the fit of one layer, on-policy: the queries it sees come from layers below that are already compacted.

Per KV head, over all its reference rows: attention mass on the document -> biases (biases.py), attention output ->
values (values.py), both jointly over the kept keys of all chunks and with the true normaliser; then keys, biases and
values together (refine.py). The layer then returns attention over its compacted self, so that the next layer sees what
it will see at decode time.

Exact attention is computed once per row (rows.py); where no selection ordered the keys before, they are scored from
it too (key_scores.py). On a GPU heads of similar length are fitted as one batch
(`head_batches`), padded to the longest with keys of bias -inf; elsewhere each head alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from compactor import attention
from compactor.attach import dense_heads
from compactor.config import CompactSettings
from compactor.packed import ExactParts, ExactRows, Packed, PackedLayer, exact_parts, exact_rows
from compactor.prefill import context_spans
from compactor.solve.biases import not_finite, require_finite, solve_box_nnls_batched
from compactor.solve.budget import allocate
from compactor.solve.gram import GramSum, as_sum, kernel_runs, on_device
from compactor.solve.key_scores import KeySums
from compactor.solve.refine import HeadKeyValues, Refiner
from compactor.solve.rows import (
    HELD_OUT_EVERY,
    HELD_OUT_SPAN,
    Block,
    Heads,
    Rows,
    attention_rows,
    energies,
    fitted_output,
    held_out_rows,
    squared_errors,
)
from compactor.solve.shrink import HeadCurve, chunk_blocks
from compactor.solve.values import ValueFit, fit_values
from compactor.types import Advance, LayerCache

if TYPE_CHECKING:
    from compactor_kernels.reference_merge import MergedRows, Part

BIAS_PRIOR = 1e-3  # pull of each b towards 1, relative to its own diagonal entry
BIAS_STEPS = 3  # projected Newton steps of the biases at most: values and refinement make up for what is left
REFINED_BIAS_STEPS = 1  # the same where a refinement follows
REFINED_RIDGE = 0.1  # of the values where a refinement follows, unless the settings name one: none has to be chosen
BIAS_TOLERANCE = 1e-3  # their stopping test
EVERY_OTHER = 16  # rows for each key of the longest head, from which least squares look at every other row
SMALL = 1 << 36  # multiplications of a batch's Gram matrices below which heads of all lengths share it
LEAST_FILLED = 0.5  # of the Gram matrices of a larger one
TARGET_UNITS = 4.0  # of the float16 halves of targets in the root mean square of a head's weighted outputs, at least

Naming = Callable[[int], AbstractContextManager[None]]  # puts the name of a KV head before an error raised inside


@dataclass(frozen=True)
class FitInputs:
    """What a layer's fit needs besides the queries that the pass brings."""

    prefix_length: int
    order: torch.Tensor | None  # (num_kv_heads, num_document) int64, best first; None: the rows of this pass say it
    counts: list[int]  # document keys to keep, per KV head; without an order their sum, unless ``shares_given``
    head_gains: torch.Tensor  # (num_heads,) float32
    source_weights: dict[str, float]  # weight of a row of each source
    context_queries: torch.Tensor | None  # (num_heads, num_document, head_dim), host memory
    storage_dtype: torch.dtype
    settings: CompactSettings
    curve_gains: torch.Tensor | None = None  # (num_kv_heads, num_document) float32 by position, for the curves
    curve_chunk: int = 0  # document tokens of a chunk of the curves
    refiner: Refiner | None = None  # of keys, biases and values together
    currency: float = 1.0  # factor that makes this layer's squared errors comparable with other layers'
    fits: bool = True  # otherwise the keys stay as they are, and the rows only tell their error
    shares_given: bool = False  # whether ``counts`` hold for each head
    context_squares: torch.Tensor | None = None  # (num_kv_heads, num_document): weighted, of the document's own queries

    def ordered(self, scores: torch.Tensor) -> FitInputs:
        """Return the inputs with the keys ordered by their scores, (num_kv_heads, num_document) float32, by which the
        heads share the layer's keys unless their shares are given."""
        gains = scores * self.currency
        ranked = gains.sort(dim=-1, descending=True, stable=True)
        counts = self.counts
        if not self.shares_given:
            found = ranked.values.unsqueeze(0)
            counts = allocate(found.to(solve_device(found.device)), sum(counts))[0].tolist()
        curve_gains = gains.cpu() if self.settings.keep_curves else None
        return replace(self, order=ranked.indices, counts=counts, curve_gains=curve_gains)


@dataclass(frozen=True)
class HeadFit:
    """The fitted document keys of one KV head."""

    kept: torch.Tensor  # (num_kept,) int64, document-relative, increasing
    keys: torch.Tensor  # (num_kept, head_dim) float32
    biases: torch.Tensor  # (num_kept,) float32
    values: torch.Tensor  # (num_kept, head_dim) float32
    ridge: float
    squared_error: float  # weighted, of the attention output, on all rows
    unfitted_error: float  # of the rows that were fitted, with the original values and the fitted biases
    energy: float  # weighted squared norm of the true attention output
    gram: torch.Tensor | None = None  # (num_kept, num_kept) float64: sum of w A_i A_i^T, where curves are kept
    curve: HeadCurve | None = None  # what `compactor recompact` needs of it, in host memory

    @property
    def relative_error(self) -> float:
        """Square root of the squared error over the energy."""
        return math.sqrt(self.squared_error / self.energy) if self.energy > 0 else 0.0


@dataclass(frozen=True)
class LayerKeys:
    """Document keys and values of all KV heads."""

    keys: torch.Tensor  # (num_kv_heads, num_document, head_dim)
    values: torch.Tensor  # (num_kv_heads, num_document, head_dim)
    storage_dtype: torch.dtype

    @property
    def num_document(self) -> int:
        """Number of document keys of a head."""
        return self.keys.shape[1]

    def keys_at(self, members: list[int], positions: torch.Tensor) -> torch.Tensor:
        """Return keys of some heads at positions (num_heads, n), as the file will hold them: (num_heads, n, head_dim)
        float32."""
        return _take(self.keys, members, positions).to(self.storage_dtype).float()

    def values_at(self, members: list[int], positions: torch.Tensor) -> torch.Tensor:
        """Return values of some heads at positions (num_heads, n): (num_heads, n, head_dim) float32."""
        return _take(self.values, members, positions).float()


@dataclass(frozen=True)
class KeptKeys:
    """The chosen document keys of a batch of heads and their biases, padded to the head that keeps most."""

    members: list[int]  # the KV heads
    counts: list[int]  # keys of each
    sizes: torch.Tensor  # the same, (num_heads,) int64 on the device
    positions: torch.Tensor  # (num_heads, most) int64, document-relative, increasing; any in the padding
    keys: torch.Tensor  # (num_heads, most, head_dim) float32, as the file will hold them
    biases: torch.Tensor  # (num_heads, most) float32, -inf in the padding
    energy: torch.Tensor  # (num_heads,) float64: weighted squared norm of the true attention output
    grams: list[torch.Tensor] | None  # see `HeadFit.gram`


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
        own_keys, own_values = (part[0, :, prefix:] for part in dense_heads(self.full))
        document = LayerKeys(own_keys, own_values, inputs.storage_dtype)
        given = queries, keys, values, scaling
        if inputs.order is None:
            sums = KeySums.empty(len(keys), document.num_document, queries.shape[-1], queries.device)
            rows = [segment_rows(self, inputs, *given, sums)]
            self.inputs = inputs = inputs.ordered(sums.scores(self.full, prefix, inputs.context_squares))
        else:
            rows = [segment_rows(self, inputs, *given)]
        assert inputs.order is not None
        if inputs.context_queries is not None:
            rows.append(context_rows(self.full, inputs, inputs.context_queries, scaling))
        if not inputs.fits:
            heads, out = self._unfitted(document, rows, inputs.order)
        else:
            refined = inputs.refiner is not None
            step = rows_apart(rows, max(inputs.counts)) if refined else 1
            looked_at = [part.every(step) for part in rows]
            given_keys = inputs.order, inputs.counts, inputs.settings
            heads = fit_heads(document, looked_at, *given_keys, self.naming, refined=refined)
            if inputs.refiner is not None:
                heads, out = self._refined(heads, rows, step, inputs.refiner)
            else:
                out = fitted_outputs(rows[0], heads, inputs.storage_dtype)
        self.heads = [self._with_curve(head, fit) for head, fit in enumerate(heads)]
        self.fitted = assemble(self.full, self.heads, prefix, inputs.storage_dtype)
        return out.view(queries.shape)

    def _unfitted(
        self, document: LayerKeys, rows: list[Rows], ranking: torch.Tensor
    ) -> tuple[list[HeadFit], torch.Tensor]:
        """Return heads that keep the first keys of their ranking as they are, with their errors, and what they make of
        the first rows."""
        counts, device, num_heads = self.inputs.counts, document.keys.device, len(document.keys)
        energy_of = torch.stack([energies(part) for part in rows]).sum(0)
        order, everyone = ranking[:, : max(counts)].to(device), list(range(num_heads))
        ranks = torch.arange(order.shape[1], device=device) < torch.tensor(counts, device=device).unsqueeze(-1)
        positions = order.masked_fill(~ranks, document.num_document).sort().values.clamp_max(document.num_document - 1)
        keys, values = document.keys_at(everyone, positions), document.values_at(everyone, positions)
        finite = (torch.isfinite(keys) & torch.isfinite(values)).flatten(1).all(1) & torch.isfinite(energy_of)
        heads = []
        for head, (n, energy, good) in enumerate(zip(counts, energy_of.tolist(), finite.tolist(), strict=True)):
            if not good:
                with self.naming(head):
                    raise not_finite()
            biases = torch.zeros(n, device=device)
            own = positions[head, :n], keys[head, :n], biases, values[head, :n]
            heads.append(HeadFit(*own, math.inf, 0.0, 0.0, energy))
        outputs, errors, _ = self._outputs(heads, rows)
        for i, (fit, error) in enumerate(zip(heads, errors, strict=True)):
            if len(fit.kept) == document.num_document:  # such a head takes no part
                fit, error = replace(fit, energy=0.0), 0.0
            heads[i] = self._measured(i, replace(fit, unfitted_error=error), error, rows)
        return heads, outputs

    def _refined(
        self, before: list[HeadFit], rows: list[Rows], step: int, refiner: Refiner
    ) -> tuple[list[HeadFit], torch.Tensor]:
        """Return refined heads with their errors and Gram matrices, and what they make of the first rows. A head that
        is further from the exact output than it was, both as stored, on the rows that it was fitted to and on all,
        stays as it was. ``step``: the heads were fitted to one row in so many."""
        num_document = dense_heads(self.full)[0].shape[2] - self.inputs.prefix_length
        heads = refine_heads(before, rows, refiner, num_document)
        outputs, errors, on_fitted = self._outputs(heads, rows, step)
        worse = [
            i for i, error in enumerate(on_fitted) if not error <= before[i].squared_error and heads[i] is not before[i]
        ]
        if worse:
            mixed = [before[i] if i in worse else head for i, head in enumerate(heads)]
            outputs_before, errors_before, _ = self._outputs(mixed, rows)
            for i in worse:
                if not errors_before[i] > errors[i]:  # it may not be a number
                    heads[i], errors[i], outputs[i] = before[i], errors_before[i], outputs_before[i]
        if step > 1:
            heads = [replace(fit, energy=energy) for fit, energy in zip(heads, energies(rows[0]).tolist(), strict=True)]
        return [
            before[i] if len(fit.kept) == num_document else self._measured(i, fit, error, rows)
            for i, (fit, error) in enumerate(zip(heads, errors, strict=True))
        ], outputs

    def _outputs(
        self, heads: list[HeadFit], rows: list[Rows], step: int = 1
    ) -> tuple[torch.Tensor, list[float], list[float]]:
        """Return what heads, as stored, make of the first rows, and the squared error of each over all rows and over
        one in ``step``, as `Rows.every` weighs them."""
        outputs, errors, thinned = measured_outputs(rows[0], heads, self.inputs.storage_dtype, step)
        for part in rows[1:]:
            _, more, more_thinned = measured_outputs(part, heads, self.inputs.storage_dtype, step)
            errors, thinned = errors + more, thinned + more_thinned
        return outputs, errors.tolist(), thinned.tolist()

    def _measured(self, head: int, fit: HeadFit, error: float, rows: list[Rows]) -> HeadFit:
        """Return a head with its error, and its Gram matrix where curves are kept."""
        fit = replace(fit, squared_error=error)
        if self.inputs.settings.keep_curves:
            stored = fit.keys.to(self.inputs.storage_dtype).float()
            fit = replace(fit, gram=gram_of([part.head(head) for part in rows], stored, fit.kept))
        return fit

    def _with_curve(self, head: int, fit: HeadFit) -> HeadFit:
        """Replace the Gram matrix by its chunk blocks, which are all that is kept of it."""
        gains = self.inputs.curve_gains
        return fit if gains is None else replace(fit, gram=None, curve=curve_of(fit, gains[head], self.inputs))


def refine_heads(heads: list[HeadFit], rows: list[Rows], refiner: Refiner, num_document: int) -> list[HeadFit]:
    """Move keys, biases and values of all heads together; heads that keep every key stay as they are."""
    none = torch.empty(0)
    before = [
        HeadKeyValues(fit.keys, fit.biases, fit.values, fit.kept, fit.relative_error)
        if len(fit.kept) < num_document
        else HeadKeyValues(none, none, none, none)
        for fit in heads
    ]
    after = refiner.refine(rows, before)
    return [
        replace(fit, keys=moved.keys, biases=moved.biases, values=moved.values) if len(moved.biases) else fit
        for fit, moved in zip(heads, after, strict=True)
    ]


def rows_apart(rows: Sequence[Rows], longest: int) -> int:
    """Return 2 where least squares may look at every other row: there are `EVERY_OTHER` for each of the ``longest``
    head's keys, and half of them still has some to hold out. The refinement sees them all."""
    _, group, num_rows = rows[0].lse.shape
    enough = group * num_rows >= EVERY_OTHER * longest and num_rows >= 2 * HELD_OUT_SPAN * HELD_OUT_EVERY
    return 2 if len(rows) == 1 and enough else 1


def gram_of(parts: list[Rows], stored_keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return sum of w A_i A_i^T over all rows of one head, float64; A_i: attention to the kept keys without biases."""
    sums = GramSum(1, len(kept), 1, solve_device(stored_keys.device))
    for rows in parts:
        for block in rows.blocks(len(kept)):
            shares, _ = attention_rows(block, stored_keys, kept)
            sums.add(shares, torch.zeros_like(block.root_weights.unsqueeze(-1)))
    return sums.gram[0]


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
    sums: KeySums | None = None,
) -> Rows:
    """Return all packed rows with their exact attention, heads first; shapes as `PackedLayer.attend_packed`. ``sums``,
    where they are wanted, get what the rows say of each key."""
    num_kv_heads, num_rows = keys.shape[0], queries.shape[1]
    given = layer, queries, keys, values, scaling, inputs.prefix_length
    gains = inputs.head_gains.to(queries.device).view(num_kv_heads, -1, 1)
    roots = gains * layer.packed.row_weights(inputs.source_weights, queries.device).sqrt()
    grouped = queries.view(num_kv_heads, -1, num_rows, queries.shape[-1])
    document = grouped.flatten(1, 2), dense_heads(layer.full)[0][0, :, inputs.prefix_length :], scaling
    exact: ExactRows | MergedRows
    if attention.merges_in_one_pass(queries):
        parts = exact_parts(*given, out_type=queries.dtype)
        if sums is not None:
            sums.add_parts(*document, parts, roots)
        exact = merged_rows(parts)
    else:
        exact = exact_rows(*given)
        if sums is not None:
            sums.add(*document, exact, roots)
    held_out = held_out_rows(num_rows, queries.device)
    near_share = exact.near_lse - exact.lse
    return Rows(grouped, scaling, roots, exact.lse, near_share, exact.near, exact.out, held_out)


def merged_rows(parts: ExactParts) -> MergedRows:
    """Merge the parts of all rows, where `attention.merges_in_one_pass`."""
    from compactor_kernels.merge_rows import merge_rows

    return merge_rows(parts.near, parts.document)


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


def unnamed(_head: int) -> AbstractContextManager[None]:
    """Leave errors as they are."""
    return nullcontext()


def fit_heads(
    keys: LayerKeys,
    parts: Sequence[Rows],
    order: torch.Tensor,
    counts: Sequence[int],
    settings: CompactSettings,
    naming: Naming = unnamed,
    *,
    refined: bool = False,
) -> list[HeadFit]:
    """Choose, bias and refit the document keys of all KV heads.

    ``parts``: rows of all heads; ``order`` (num_kv_heads, num_document) int64 ranks the keys of each, best first;
    ``counts``: how many each keeps; ``refined``: a refinement follows, which makes up for what is saved here. Raises
    NumericalError, named by ``naming``, where a head has no finite fit.
    """
    ridge, bias_steps = settings.ridge, BIAS_STEPS
    if refined:
        ridge, bias_steps = REFINED_RIDGE if ridge is None else ridge, REFINED_BIAS_STEPS
    kept = choose_heads(keys, parts, order, counts, settings, bias_steps)
    return refit_heads(keys, parts, kept, ridge, naming)


def choose_heads(
    keys: LayerKeys,
    parts: Sequence[Rows],
    order: torch.Tensor,
    counts: Sequence[int],
    settings: CompactSettings,
    bias_steps: int = BIAS_STEPS,
) -> list[KeptKeys]:
    """Choose and bias the keys of all KV heads, batch by batch; heads that keep every key are in none. See
    `fit_heads`."""
    members = [i for i, count in enumerate(counts) if count < keys.num_document or settings.keep_curves]
    num_rows = sum(part.lse.shape[1] * part.lse.shape[2] for part in parts)
    batches = head_batches({i: counts[i] for i in members}, num_rows, keys.keys.device)
    return [
        choose_keys(keys, parts, order, batch, [counts[i] for i in batch], settings, bias_steps) for batch in batches
    ]


def refit_heads(
    keys: LayerKeys,
    parts: Sequence[Rows],
    batches: Sequence[KeptKeys],
    ridge: float | None,
    naming: Naming = unnamed,
) -> list[HeadFit]:
    """Refit the values of the batches; heads that are in none keep every key as it is. See `fit_heads`."""
    fits: dict[int, HeadFit] = {}
    for kept in batches:
        fits.update(
            zip(kept.members, finish(keys, kept, fit_head_values(keys, parts, kept, ridge), naming), strict=True)
        )
    for head in range(len(keys.keys)):
        if head not in fits:
            fits[head] = whole_head(keys, head)
            with naming(head):
                require_finite(fits[head].values)
    return [fits[head] for head in range(len(keys.keys))]


def head_batches(lengths: dict[int, int], num_rows: int, device: torch.device) -> list[list[int]]:
    """Split heads of some lengths into batches; the members of each increase.

    Elsewhere than on a GPU each head is alone. There, the float64 Gram matrices of a batch take at most a quarter of
    the memory of a block of scores, and unless a batch is `SMALL`, at least `LEAST_FILLED` of them is no padding.
    """
    result: list[list[int]] = []
    longest = filled = 0
    for head in sorted(lengths, key=lambda i: -lengths[i]):
        length = lengths[head]
        padded = (len(result[-1]) + 1) * longest**2 if result else 0
        fits = device.type == "cuda" and 8 * padded <= attention.block_elements(device)
        if result and fits and (padded * num_rows <= SMALL or filled + length**2 >= LEAST_FILLED * padded):
            result[-1].append(head)
            filled += length**2
        else:
            result.append([head])
            longest, filled = length, length**2
    return [sorted(batch) for batch in result]


def index_of(members: list[int], device: torch.device) -> Heads:
    """Return KV heads as a slice where they are neighbours, so that nothing is copied; else as a tensor."""
    if members == list(range(members[0], members[-1] + 1)):
        return slice(members[0], members[-1] + 1)
    return on_device(members, device)


def _take(part: torch.Tensor, members: list[int], positions: torch.Tensor) -> torch.Tensor:
    """Return vectors of some heads at positions (num_heads, n) of ``part`` (num_kv_heads, num_document, head_dim)."""
    if len(members) == 1:
        return part[members[0]].index_select(0, positions[0])[None]
    index = index_of(members, part.device)
    if isinstance(index, slice):
        index = torch.arange(index.start, index.stop, device=part.device)
    return part[index.unsqueeze(-1), positions]


def whole_head(keys: LayerKeys, head: int) -> HeadFit:
    """Return a head that keeps every key as it is."""
    everything = torch.arange(keys.num_document, device=keys.keys.device)
    own_keys, own_values = (take([head], everything[None])[0] for take in (keys.keys_at, keys.values_at))
    return HeadFit(
        everything, own_keys, torch.zeros_like(everything, dtype=torch.float32), own_values, 0.0, 0.0, 0.0, 0.0
    )


def choose_keys(
    keys: LayerKeys,
    parts: Sequence[Rows],
    order: torch.Tensor,
    members: list[int],
    counts: list[int],
    settings: CompactSettings,
    bias_steps: int = BIAS_STEPS,
) -> KeptKeys:
    """Choose and bias the keys of one batch of heads; see `fit_heads`."""
    device, most, num_document = keys.keys.device, max(counts), keys.num_document
    heads, sizes = index_of(members, device), on_device(counts, device)
    present = torch.arange(most, device=device) < sizes.unsqueeze(-1)
    own_order = order[index_of(members, order.device), :most].to(device, non_blocking=device.type == "cuda")
    positions = own_order.masked_fill(~present, num_document)
    positions = positions.sort().values.clamp_max(num_document - 1)  # the padding stays behind
    stored = keys.keys_at(members, positions)
    sums = GramSum(len(members), most, 1, solve_device(device))
    energy = torch.zeros_like(sums.energy)
    for rows in parts:
        for block in rows.blocks(most, heads):
            roots = block.root_weights.unsqueeze(-1)
            shares, _ = attention_rows(block, stored, positions)
            mass = -torch.expm1(block.near_share.unsqueeze(-1))  # 1 - the attention on prefix and local keys
            sums.add(shares, mass * roots)
        energy += as_sum(energies(rows, heads), energy)
    solution = solve_biases(sums.gram, sums.rhs[..., 0], present.to(sums.gram.device), settings, bias_steps)
    biases = solution.log().float().to(device).masked_fill(~present, -math.inf)
    grams = [gram[:n, :n] for gram, n in zip(sums.gram, counts, strict=True)] if settings.keep_curves else None
    return KeptKeys(members, counts, sizes, positions, stored, biases, energy, grams)


def solve_biases(
    gram: torch.Tensor, rhs: torch.Tensor, present: torch.Tensor, settings: CompactSettings, steps: int = BIAS_STEPS
) -> torch.Tensor:
    """Return b = exp(bias) of each head's keys, (num_heads, n) float64, as ``steps`` steps towards the best one in the
    box of the settings leave it.

    gram (num_heads, n, n), rhs (num_heads, n): of attention to the keys and to the whole document; ``present``
    (num_heads, n) bool: the others are padding.
    """
    low, high = math.exp(settings.min_log_bias), math.exp(settings.max_log_bias)
    prior = BIAS_PRIOR * gram.diagonal(dim1=-2, dim2=-1) * present
    system = gram * (present.unsqueeze(-1) & present.unsqueeze(-2)) if len(gram) > 1 else gram.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(prior)
    return solve_box_nnls_batched(
        system, rhs + prior, lower=low, upper=high, tolerance=BIAS_TOLERANCE, max_iterations=steps
    ).solution


def fit_head_values(keys: LayerKeys, parts: Sequence[Rows], kept: KeptKeys, ridge: float | None) -> ValueFit:
    """Refit the values of the kept keys so that attention over the compacted heads gives the true outputs.

    What they are fitted to goes through a kernel where attention is float16. It takes it apart in units of a power of
    two, `TARGET_UNITS` to twice as many in the root mean square of the head's weighted outputs. Numbers beyond 65,504
    units, 8,188 times that size or more, are cut off; N outputs hold none beyond sqrt(N) times their own.
    """
    device, values = keys.keys.device, keys.values_at(kept.members, kept.positions)
    (num_heads, most, head_dim), heads = values.shape, index_of(kept.members, device)
    train, held_out = (GramSum(num_heads, most, head_dim, solve_device(device)) for _ in range(2))
    num_rows = sum(part.lse.shape[1] * part.lse.shape[2] for part in parts)
    mean = (kept.energy / max(1, num_rows * head_dim)).clamp_min(1e-30)
    units = ((0.5 * mean.log2()).floor().exp2() / TARGET_UNITS).float().to(device)
    for rows in parts:
        for sums, chosen in ((train, rows.fitted), (held_out, rows.held_out)):
            for block in rows.blocks(most, heads, chosen):
                shares, near_weights = attention_rows(block, kept.keys, kept.positions, kept.biases)
                product = attention.multiply(shares, values)
                if halves_usable(block, shares):
                    halves, energy = value_halves(block, near_weights, product, units)
                    sums.add_halves(shares, halves, units, energy)
                else:
                    wanted = (block.out - near_weights.unsqueeze(-1) * block.near) * block.root_weights.unsqueeze(-1)
                    sums.add(shares, wanted - product)
    return fit_values(train, held_out, kept.sizes.to(train.gram.device), ridge)


def halves_usable(rows: Block, shares: torch.Tensor) -> bool:
    """Whether targets go through the kernel that takes them apart, into the one that multiplies them."""
    return (
        shares.dtype == torch.float16 and kernel_runs(shares) and attention.kernel_usable("value_targets", rows.queries)
    )


def value_halves(
    rows: Block, near_weights: torch.Tensor, product: torch.Tensor, units: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what kept keys leave to be explained, as `GramSum.add_halves` takes it: near_weights (num_heads, n) from
    `attention_rows`, product (num_heads, n, head_dim) of the weighted shares with the values, units (num_heads,)."""
    from compactor_kernels.value_targets import value_targets

    out, near = rows.whole.out, rows.whole.near
    heads = None
    if isinstance(rows.heads, slice):
        out, near = out[rows.heads], near[rows.heads]
    else:
        heads = rows.heads
    assert not isinstance(rows.chosen, slice)  # fitted or held out
    weights = near_weights.contiguous(), rows.root_weights.contiguous()
    found = value_targets(product, out, near, *weights, units, heads=heads, rows=rows.chosen.contiguous())
    return found.halves, found.energy


def finish(keys: LayerKeys, kept: KeptKeys, fit: ValueFit, naming: Naming) -> list[HeadFit]:
    """Cut a batch into its heads; the host waits for it once."""
    device = keys.keys.device
    values = keys.values_at(kept.members, kept.positions) + fit.change.float().to(device)
    finite = torch.isfinite(values).flatten(1).all(1) & ~kept.biases.isnan().any(1)
    numbers = (fit.ridge, fit.error_after, fit.error_before, kept.energy, finite)
    figures = torch.stack([as_sum(one, fit.ridge) for one in numbers]).T.tolist()
    result = []
    for i, (head, n) in enumerate(zip(kept.members, kept.counts, strict=True)):
        ridge, after, before, energy, is_finite = figures[i]
        if not is_finite:
            with naming(head):
                raise not_finite()
        parts = (kept.positions, kept.keys, kept.biases, values)
        positions, own_keys, biases, own_values = (
            part[i] if n == part.shape[1] else part[i, :n].clone() for part in parts
        )
        gram = None if kept.grams is None else kept.grams[i]
        errors = after, before, energy
        result.append(HeadFit(positions, own_keys, biases, own_values, ridge, *errors, gram))
    return result


def measured_outputs(
    rows: Rows, heads: Sequence[HeadFit], dtype: torch.dtype, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `fitted_outputs`, and the squared error of each head over all rows and over one row in ``step``, as
    `Rows.every` weighs them, (num_heads,) each. Where one pass merges and measures, the outputs are rounded to the type
    of the queries, the errors are of what they were before."""
    if decodes(rows, dtype) and attention.merges_in_one_pass(rows.queries):
        from compactor_kernels.merge_rows import merge_measured

        near = rows.near, rows.near_share + rows.lse
        document, out_type = _decoded_document(rows, heads), rows.queries.dtype
        measured = merge_measured(document, near, rows.out, rows.root_weights, step=step, out_type=out_type)
        return measured.out, measured.errors, measured.thinned_errors
    outputs = fitted_outputs(rows, heads, dtype)
    errors = squared_errors(rows, outputs)
    return outputs, errors, errors if step == 1 else squared_errors(rows.every(step), outputs[:, :, ::step])


def fitted_outputs(rows: Rows, heads: Sequence[HeadFit], dtype: torch.dtype) -> torch.Tensor:
    """Return attention of all rows over all fitted heads, their keys and values rounded to ``dtype``; see
    `fitted_output`. Half-precision rows that see all keys attend as they will when decoding."""
    if decodes(rows, dtype):
        return attention.merge(*_decoded_document(rows, heads), rows.near, rows.near_share + rows.lse)[0]
    device, (_, group, num_rows) = rows.lse.device, rows.lse.shape
    lengths = {i: len(fit.biases) for i, fit in enumerate(heads)}
    out = torch.empty(rows.out.shape, device=device)
    for members in head_batches(lengths, group * num_rows, device):
        fits, index = [heads[i] for i in members], index_of(members, device)
        keys, values = (pad([getattr(fit, name) for fit in fits]).to(dtype).float() for name in ("keys", "values"))
        biases, kept = pad([fit.biases for fit in fits], -math.inf), pad([fit.kept for fit in fits])
        out[index] = fitted_output(rows, keys, values, biases, kept, index)
    return out


def decodes(rows: Rows, dtype: torch.dtype) -> bool:
    """Whether rows attend to fitted heads as they will when decoding: half-precision rows that see all keys, which are
    kept in the same type."""
    return rows.document_stop is None and attention.is_fast(rows.queries) and dtype == rows.queries.dtype


def _decoded_document(rows: Rows, heads: Sequence[HeadFit]) -> Part:
    keys, values = (
        torch.cat([getattr(fit, name) for fit in heads]).to(rows.queries.dtype) for name in ("keys", "values")
    )
    lengths = [len(fit.biases) for fit in heads]
    document, lse = attention.document_attention(
        rows.queries.flatten(0, 1).unsqueeze(0),
        keys,
        values,
        torch.cat([fit.biases for fit in heads]),
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=keys.device),
        scaling=rows.scaling,
        max_head_length=max(lengths),
    )
    return document[0].view(rows.out.shape), lse[0].view(rows.lse.shape)


def pad(parts: list[torch.Tensor], filling: float = 0.0) -> torch.Tensor:
    """Return tensors of unlike length as one, (num_heads, longest, ...)."""
    return parts[0][None] if len(parts) == 1 else pad_sequence(parts, batch_first=True, padding_value=filling)


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
