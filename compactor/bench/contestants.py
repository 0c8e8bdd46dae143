"""Knows how a synthetic layer is compacted: by our selection and fit, and by the published selectors. Knows no tables.

All of it is the product's own code; here it is only called without a model. Rows see the document and nothing else: no
prefix, no local keys. All rows weigh 1, and layers and heads are equally important. It is the problem for which the
published method is made. The kept keys, their biases and their values come back as the layer that a file would hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from compactor import attention, study
from compactor.attach import dense_heads
from compactor.bench.synthetic import SyntheticLayer
from compactor.bench.timing import Stages
from compactor.config import CompactSettings
from compactor.methods import attention_matching_omp as omp
from compactor.methods.attention_matching import MatchLayer
from compactor.methods.attention_matching_omp import PursuitLayer
from compactor.methods.attention_matching_rms import RmsLayer
from compactor.packed import ExactRows, Packed
from compactor.solve.budget import allocate
from compactor.solve.chunk_grams import ChunkGrams, add_diagonal, add_rows
from compactor.solve.fit import LayerKeys, assemble, choose_heads, refine_heads, refit_heads
from compactor.solve.refine import Refiner
from compactor.solve.rows import Rows, held_out_rows
from compactor.solve.select import LayerCurves, greedy_curves
from compactor.types import LayerCache

STAGES = ("exact", "gram", "greedy", "allocate", "biases", "values", "refine")


@dataclass(frozen=True)
class Solved:
    """Some layers that ours compacted together."""

    layers: list[LayerCache]
    counts: torch.Tensor  # (num_layers, heads) int64: keys kept
    seconds: dict[str, float]  # of every stage, all layers together

    @property
    def elapsed_s(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def chunk_size(num_keys: int) -> int:
    """Return the keys of one greedy problem, as `ChunkGrams.empty` cuts them."""
    return -(-num_keys // -(-num_keys // study.GREEDY_CHUNK))


def picks_per_chunk(num_keys: int, keep: int) -> int:
    """Return how many keys of a chunk compact picks greedily when ``keep`` are kept per head: `study.picks_per_chunk`,
    which asks a study."""
    size = chunk_size(num_keys)
    if num_keys <= study.DEEP_TOKENS:
        return size
    return min(size, round(study.DEPTH * keep * size / num_keys) + study.LEAST_PICKS)


def solve_ours(
    layers: Sequence[SyntheticLayer], keep: int, *, num_picks: int, uniform: bool, refine_steps: int
) -> Solved:
    """Choose keys greedily, fit biases and values, and refine them with the keys, as `best` does.

    ``keep`` keys stay per head on average: by one ranking over all layers and heads, or ``uniform``ly.
    As many layers as `study.GRAM_BYTES` hold are ordered as one batch.
    """
    clock = Stages(layers[0].queries.device)
    rows, curves = _order_keys(layers, num_picks, clock)
    with clock.stage("allocate"):
        gains = torch.stack([one.gains.cpu() for one in curves])
        num_layers, num_heads = gains.shape[:2]
        if uniform:
            counts = torch.full((num_layers, num_heads), keep)
        else:
            counts = allocate(gains, keep * num_layers * num_heads)
    refiner = Refiner(refine_steps) if refine_steps else None
    fitted = [
        _fit_layer(layer, own, one.order, chosen.tolist(), clock, refiner)
        for layer, own, one, chosen in zip(layers, rows, curves, counts, strict=True)
    ]
    return Solved(fitted, counts, {name: clock.seconds[name] for name in STAGES if name in clock.seconds})


def _order_keys(
    layers: Sequence[SyntheticLayer], num_picks: int, clock: Stages
) -> tuple[list[Rows], list[LayerCurves]]:
    """Return the rows of every layer with their exact attention, and its greedy orders."""
    rows: list[Rows] = []
    curves: list[LayerCurves] = []
    at_once = max(1, study.GRAM_BYTES // (3 * _gram_bytes(layers[0])))
    for start in range(0, len(layers), at_once):
        batch = layers[start : start + at_once]
        with clock.stage("exact"):
            rows += [_exact_rows(layer) for layer in batch]
        with clock.stage("gram"):
            sums = [_chunk_grams(layer, own) for layer, own in zip(batch, rows[start:], strict=True)]
        with clock.stage("greedy"):
            curves += greedy_curves(sums, [layer.full for layer in batch], 0, num_picks, study.STOP)
        del sums
    return rows, curves


def _gram_bytes(layer: SyntheticLayer) -> int:
    num_keys = layer.full.head_lengths[0]
    return 4 * layer.full.num_kv_heads * num_keys * chunk_size(num_keys)


def _exact_rows(layer: SyntheticLayer) -> Rows:
    """Attend to the document; nothing is near."""
    keys, values = (part[0] for part in dense_heads(layer.full))
    out, lse = attention.dense_attention(layer.queries, keys, values, layer.scaling)
    num_rows, device = lse.shape[1], lse.device
    nothing = torch.full_like(lse, -math.inf)
    return Rows(
        queries=layer.queries.unsqueeze(1),
        scaling=layer.scaling,
        root_weights=torch.ones_like(lse).unsqueeze(1),
        lse=lse.unsqueeze(1),
        near_share=nothing.unsqueeze(1),
        near=torch.zeros_like(out).unsqueeze(1),
        out=out.unsqueeze(1),
        held_out=held_out_rows(num_rows, device),
    )


def _chunk_grams(layer: SyntheticLayer, rows: Rows) -> ChunkGrams:
    keys = dense_heads(layer.full)[0][0]
    sums = ChunkGrams.empty(keys.shape[0], keys.shape[1], study.GREEDY_CHUNK, keys.device)
    exact = ExactRows(rows.lse, rows.out, rows.lse, rows.near, rows.near_share, rows.out)
    add_rows(sums, layer.queries, keys, layer.scaling, exact, rows.root_weights)
    add_diagonal(sums, study.OWN_SHARE, torch.zeros(1, device=keys.device))  # there are no context rows
    return sums


def _fit_layer(
    layer: SyntheticLayer,
    rows: Rows,
    order: torch.Tensor,
    counts: list[int],
    clock: Stages,
    refiner: Refiner | None,
) -> LayerCache:
    """Fit all heads."""
    settings, dtype = CompactSettings(), layer.queries.dtype
    full_keys, full_values = (part[0] for part in dense_heads(layer.full))
    keys = LayerKeys(full_keys, full_values, dtype)
    with clock.stage("biases"):
        chosen = choose_heads(keys, [rows], order, counts, settings)
    with clock.stage("values"):
        heads = refit_heads(keys, [rows], chosen, settings.ridge)
    if refiner is not None:
        with clock.stage("refine"):
            heads = refine_heads(heads, [rows], refiner, num_document=keys.num_document)
    with clock.stage("values"):
        return assemble(layer.full, heads, 0, dtype)


def solve_published(layer: SyntheticLayer, keep: int, name: str) -> LayerCache:
    """Compact one layer by a published selector of `bench.settings.SOLVER_METHODS`, ``keep`` keys in every head."""
    layer_type, all_at_once = PUBLISHED_LAYERS[name]
    num_heads, _, head_dim = layer.queries.shape
    nothing_follows = Packed(torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0, dtype=torch.int64), [], [])
    matching = layer_type(
        layer.full,
        nothing_follows,
        layer.full.head_lengths[0],
        lambda _units: None,
        prefix_length=0,
        counts=[keep] * num_heads,
        storage_dtype=layer.queries.dtype,
    )
    no_keys = layer.queries.new_empty(num_heads, 0, head_dim)
    with several_keys_a_step() if all_at_once else nullcontext():
        matching.attend_packed(layer.queries, no_keys, no_keys, layer.scaling)
    assert matching.fitted is not None
    return matching.fitted


PUBLISHED_LAYERS: dict[str, tuple[type[MatchLayer], bool]] = {
    "attention-matching-omp": (PursuitLayer, False),
    "attention-matching-omp-fast": (PursuitLayer, True),
    "attention-matching-rms": (RmsLayer, False),
}


@contextmanager
def several_keys_a_step() -> Iterator[None]:
    """Let the pursuit take `attention_matching_omp.LATER` keys per refit from the first one on, inside.

    It is the paper's fast variant; the schedule of the program comes to it only after many keys.
    """
    schedule = omp.SCHEDULE
    omp.SCHEDULE = ((0, 1), (0, 1))
    try:
        yield
    finally:
        omp.SCHEDULE = schedule
