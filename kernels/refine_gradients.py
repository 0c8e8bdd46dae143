"""Knows the Triton kernels for the gradients of a layer's refinement. Knows no optimiser and no model.

For the drawn rows i of a KV head h and its kept keys k_j with biases b_j and values v_j (s is the scaling; what a row
sees besides is one more key, of fixed score and output):

    S_ij = s q_i.k_j + b_j - lse_i,   shift_i = log(exp(near_share_i) + sum_j exp(S_ij)),   P_ij = exp(S_ij - shift_i)
    out'_i = exp(near_share_i - shift_i) near_i + sum_j P_ij v_j,   e_i = w_i (out'_i - out_i)
    dV = P^T e,   dS_ij = P_ij (e_i.v_j - e_i.out'_i),   dK = s dS^T Q,   db_j = sum_i dS_ij

These are the gradients of half the sum of w_i ||out'_i - out_i||^2. Scores are never stored (FlashAttention-2, arXiv
2307.08691, algorithms 1 and 2): `_row_errors` runs over the keys of a tile of rows and leaves e_i, shift_i and
e_i.out'_i; `_key_sums` runs over a slice of the rows of a tile of keys, with scores computed once more; `add_slices`
adds the slices in a fixed order, so that equal calls give equal bits. Only tiles of keys that exist are visited.
Gradients are never written: `refine_steps` adds the slices where it takes a step.

Half-precision queries have shares, values and errors in float16 in products, and dS in their own type; keys are rounded
to the type of the queries, and all sums are float32. For float32 queries all is float32.

Twin: `reference.refine_gradients_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.biased_decode import INTERPRETED_MULTIPROCESSORS, MAX_HEAD_DIM, Tiles, is_interpreted
from compactor_kernels.reference import FitRows

BLOCKS_PER_MULTIPROCESSOR = 2
MOST_SLICES = 64
SLICE_COST = 4  # row tiles of products that take as long as writing and reading the sums of one tile of keys
SPARE_BYTES = 2048  # of shared memory, for numbers of rows and for reductions
ADDED_KEYS, ADDED_SLICES = 8, 4  # keys of a block of `add_slices`, and slices that it holds at once
HIGHEST_WEIGHT = 16.0  # errors are kept in units in which the highest weight of a head is this
LARGEST_HALF = tl.constexpr(6e4)  # float16 ends at 65,504

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# Sizes that vary from layer to layer are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "num_drawn", "longest"])
def _row_errors(  # type: ignore[no-untyped-def]
    queries,  # (num_heads, num_rows, HEAD_DIM)
    weights,  # (num_heads, num_rows) fp32, and the next two
    lse,
    near_share,
    near,  # (num_heads, num_rows, HEAD_DIM) fp32, and the next
    out,
    drawn_rows,  # (steps, num_drawn) int64
    number,  # (1,) int64: of the step
    keys,  # (num_heads, longest, HEAD_DIM), the type of the queries
    biases,  # (num_heads, longest) fp32
    values,  # (num_heads, longest, HEAD_DIM), SHARE_TYPE, in units of out_unit
    lengths,  # (num_heads,) int32
    order,  # (num_heads,) int32, heads with keys, longest first
    weight_unit,  # (num_heads,) fp32, and the next
    out_unit,
    errors,  # (num_heads, padded, HEAD_DIM), SHARE_TYPE: e in units of weight_unit * out_unit
    bases,  # (num_heads, padded) fp32: lse + shift, so that P = exp(s q.k + b - base)
    products,  # (num_heads, padded) fp32: e.out', in units of weight_unit * out_unit ** 2
    scaling,
    num_rows,
    num_drawn,
    longest,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SCORE_TYPE: tl.constexpr,
    SHARE_TYPE: tl.constexpr,
):
    """Attend with one tile of a step's rows to the keys of their head; grid (row tile, place in the order).

    Rows of the last tile that are not drawn get error 0 and base inf: `_key_sums` may read them.
    """
    head = tl.load(order + tl.program_id(1)).to(tl.int64)
    num_kept = tl.load(lengths + head)
    drawn = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)  # up to `padded`
    is_drawn = drawn < num_drawn
    index = drawn_rows + tl.load(number) * num_drawn
    rows = head * num_rows + tl.load(index + drawn, mask=is_drawn, other=0)
    dims = tl.arange(0, DIM_TILE)
    dim_exists = dims < HEAD_DIM
    in_rows = is_drawn[:, None] & dim_exists[None, :]
    row_elements = rows[:, None] * HEAD_DIM + dims[None, :]
    query_tile = tl.load(queries + row_elements, mask=in_rows, other=0.0).to(SCORE_TYPE)  # (ROW_TILE, DIM_TILE)
    row_lse = tl.load(lse + rows, mask=is_drawn, other=0.0)
    unit = tl.load(out_unit + head)

    # the softmax starts with what is near, and runs over the keys with a running maximum; all but products is fp32
    peak = tl.load(near_share + rows, mask=is_drawn, other=0.0)
    mass = tl.where(peak == float("-inf"), 0.0, 1.0)
    total = tl.load(near + row_elements, mask=in_rows, other=0.0) * (mass / unit)[:, None]
    in_tile = tl.arange(0, KEY_TILE)
    tile_elements = in_tile[:, None] * HEAD_DIM + dims[None, :]
    for start in range(0, num_kept, KEY_TILE):
        key_exists = in_tile < num_kept - start
        in_keys = key_exists[:, None] & dim_exists[None, :]
        first_key = head * longest + start
        key_tile = tl.load(keys + first_key * HEAD_DIM + tile_elements, mask=in_keys, other=0.0).to(SCORE_TYPE)
        bias_tile = tl.load(biases + first_key + in_tile, mask=key_exists, other=float("-inf"))
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")  # (ROW_TILE, KEY_TILE)
        scores = scores * scaling - row_lse[:, None] + bias_tile[None, :]
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing near and no key of finite bias yet
        shares = tl.exp2((scores - base[:, None]) * LOG2_E)
        shrink = tl.exp2((peak - base) * LOG2_E)
        mass = mass * shrink + tl.sum(shares, 1)
        # shares are rounded to SHARE_TYPE for the product; their sum is not
        value_tile = tl.load(values + first_key * HEAD_DIM + tile_elements, mask=in_keys, other=0.0)
        total = tl.dot(shares.to(SHARE_TYPE), value_tile, total * shrink[:, None], input_precision="ieee")
        peak = new_peak

    found = total / mass[:, None]  # out', in units of out_unit
    weight = tl.load(weights + rows, mask=is_drawn, other=0.0) / tl.load(weight_unit + head)
    error = (found - tl.load(out + row_elements, mask=in_rows, other=0.0) / unit) * weight[:, None]
    if SHARE_TYPE == tl.float16:  # noqa: SIM300
        error = tl.clamp(error, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    error = error.to(SHARE_TYPE)  # 0 where no row is drawn: its weight is
    base = tl.where(is_drawn, row_lse + peak + tl.log2(mass) * LN_2, float("inf"))
    out_rows = head * tl.num_programs(0) * ROW_TILE + drawn
    tl.store(errors + out_rows[:, None] * HEAD_DIM + dims[None, :], error, mask=dim_exists[None, :])
    tl.store(bases + out_rows, base)
    tl.store(products + out_rows, tl.sum(error.to(tl.float32) * found, 1))


@triton.jit(do_not_specialize=["num_rows", "num_drawn", "padded", "longest", "rows_per_slice"])
def _key_sums(  # type: ignore[no-untyped-def]
    queries,  # as above, down to lengths
    drawn_rows,
    number,
    keys,
    biases,
    values,
    lengths,
    tile_heads,  # (num_tiles,) int32: whose keys a tile holds
    tile_starts,  # (num_tiles,) int32: the first of them
    errors,  # from `_row_errors`, with the next two
    bases,
    products,
    key_sums,  # (num_slices, num_tiles, KEY_TILE, HEAD_DIM) fp32: dS^T Q, in units of weight_unit * out_unit ** 2
    bias_sums,  # (num_slices, num_tiles, KEY_TILE) fp32, the same unit
    value_sums,  # (num_slices, num_tiles, KEY_TILE, HEAD_DIM) fp32, in units of weight_unit * out_unit
    scaling,
    num_rows,
    num_drawn,
    padded,  # num_drawn rounded up to tiles of rows of `_row_errors`; a multiple of ROW_TILE, and so is the next
    longest,
    rows_per_slice,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SCORE_TYPE: tl.constexpr,
    SHARE_TYPE: tl.constexpr,
):
    """Sum one slice of the drawn rows for one tile of keys; grid (key tile, slice)."""
    tile = tl.program_id(0).to(tl.int64)
    head = tl.load(tile_heads + tile).to(tl.int64)
    start = tl.load(tile_starts + tile)
    in_tile = tl.arange(0, KEY_TILE)
    key_exists = in_tile < tl.load(lengths + head) - start
    dims = tl.arange(0, DIM_TILE)
    dim_exists = dims < HEAD_DIM
    in_keys = key_exists[:, None] & dim_exists[None, :]
    first_key = head * longest + start
    tile_elements = in_tile[:, None] * HEAD_DIM + dims[None, :]
    key_tile = tl.load(keys + first_key * HEAD_DIM + tile_elements, mask=in_keys, other=0.0).to(SCORE_TYPE)
    value_tile = tl.load(values + first_key * HEAD_DIM + tile_elements, mask=in_keys, other=0.0)
    bias_tile = tl.load(biases + first_key + in_tile, mask=key_exists, other=float("-inf"))

    # keys along the first dimension: what multiplies the rows needs no transposition
    key_total = tl.zeros((KEY_TILE, DIM_TILE), tl.float32)
    value_total = tl.zeros((KEY_TILE, DIM_TILE), tl.float32)
    bias_total = tl.zeros((KEY_TILE,), tl.float32)
    index = drawn_rows + tl.load(number) * num_drawn
    first_row = tl.program_id(1) * rows_per_slice
    for row_start in range(first_row, tl.minimum(first_row + rows_per_slice, padded), ROW_TILE):
        drawn = row_start + tl.arange(0, ROW_TILE)
        rows = head * num_rows + tl.load(index + drawn, mask=drawn < num_drawn, other=0)
        query_elements = rows[:, None] * HEAD_DIM + dims[None, :]
        query_tile = tl.load(queries + query_elements, mask=dim_exists[None, :], other=0.0)
        query_tile = query_tile.to(SCORE_TYPE)  # (ROW_TILE, DIM_TILE)
        out_rows = head * padded + drawn
        error_elements = out_rows[:, None] * HEAD_DIM + dims[None, :]
        error_tile = tl.load(errors + error_elements, mask=dim_exists[None, :], other=0.0)
        base = tl.load(bases + out_rows)
        product = tl.load(products + out_rows)
        scores = tl.dot(key_tile, tl.trans(query_tile), input_precision="ieee")  # (KEY_TILE, ROW_TILE)
        scores = scores * scaling - base[None, :] + bias_tile[:, None]
        shares = tl.exp2(scores * LOG2_E)
        value_total = tl.dot(shares.to(SHARE_TYPE), error_tile, value_total, input_precision="ieee")
        by_share = tl.dot(value_tile, tl.trans(error_tile), input_precision="ieee")
        by_score = shares * (by_share - product[None, :])
        bias_total += tl.sum(by_score, 1)
        if SCORE_TYPE == tl.float16:  # noqa: SIM300
            by_score = tl.clamp(by_score, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
        key_total = tl.dot(by_score.to(SCORE_TYPE), query_tile, key_total, input_precision="ieee")

    place = (tl.program_id(1) * tl.num_programs(0) + tile) * KEY_TILE
    sum_elements = place * HEAD_DIM + tile_elements
    tl.store(key_sums + sum_elements, key_total, mask=in_keys)
    tl.store(value_sums + sum_elements, value_total, mask=in_keys)
    tl.store(bias_sums + place + in_tile, bias_total, mask=key_exists)


@triton.jit
def place_keys(lengths, tile_heads, tile_starts, ADDED_KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return head and first key of a block's tile, and which of the tile's keys the block has and which of them exist;
    grid (key tile, part of the tile)."""
    head = tl.load(tile_heads + tl.program_id(0)).to(tl.int64)
    start = tl.load(tile_starts + tl.program_id(0))
    in_tile = tl.program_id(1) * ADDED_KEYS + tl.arange(0, ADDED_KEYS)
    return head, start, in_tile, in_tile < tl.load(lengths + head) - start


@triton.jit
def add_slices(  # type: ignore[no-untyped-def]
    key_sums,  # from `_key_sums`, with the next two
    bias_sums,
    value_sums,
    weight_unit,
    out_unit,
    scales,  # (3, num_heads) fp32
    scaling,
    num_heads,
    num_slices,
    head,  # from `place_keys`, with the next two
    in_tile,
    key_exists,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    ADDED_KEYS: tl.constexpr,
    ADDED_SLICES: tl.constexpr,
):
    """Return the gradients with respect to a block's keys, biases and values: their slices, always added in the same
    order, times the scales."""
    tile = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM_TILE)
    in_keys = key_exists[:, None] & (dims < HEAD_DIM)[None, :]
    elements = in_tile[:, None] * HEAD_DIM + dims[None, :]
    unit = tl.load(out_unit + head)
    value_scale = tl.load(scales + 2 * num_heads + head) * tl.load(weight_unit + head) * unit
    bias_scale = tl.load(scales + num_heads + head) * tl.load(weight_unit + head) * unit * unit
    key_scale = tl.load(scales + head) * tl.load(weight_unit + head) * unit * unit * scaling
    key_total = tl.zeros((ADDED_KEYS, DIM_TILE), tl.float32)
    value_total = tl.zeros((ADDED_KEYS, DIM_TILE), tl.float32)
    bias_total = tl.zeros((ADDED_KEYS,), tl.float32)
    for first_slice in range(0, num_slices, ADDED_SLICES):
        for later in tl.static_range(ADDED_SLICES):
            is_slice = tl.full((1,), first_slice + later, tl.int32) < num_slices
            place = ((first_slice + later) * tl.num_programs(0) + tile) * KEY_TILE
            sum_elements = place * HEAD_DIM + elements
            key_total += tl.load(key_sums + sum_elements, mask=in_keys & is_slice[:, None], other=0.0)
            value_total += tl.load(value_sums + sum_elements, mask=in_keys & is_slice[:, None], other=0.0)
            bias_total += tl.load(bias_sums + place + in_tile, mask=key_exists & is_slice, other=0.0)
    return key_total * key_scale, bias_total * bias_scale, value_total * value_scale


@dataclass(frozen=True)
class GradientPlan:
    """What is the same in all steps on the same rows and heads, on their device; made by `plan_gradients`."""

    rows: FitRows
    scaling: float
    longest: int  # keys of the longest head
    lengths: torch.Tensor  # (num_heads,) int32
    order: torch.Tensor  # (heads with keys,) int32, longest first
    scales: torch.Tensor  # (3, num_heads) float32
    weight_unit: torch.Tensor  # (num_heads,) float32: of the errors' weights
    out_unit: torch.Tensor  # (num_heads,) float32: of outputs and values
    error_tiles: Tiles
    sum_tiles: Tiles
    tile_heads: torch.Tensor  # (num_tiles,) int32
    tile_starts: torch.Tensor  # (num_tiles,) int32


class SliceSums(NamedTuple):
    """What `_key_sums` leaves, float32, in its units."""

    keys: torch.Tensor  # (num_slices, num_tiles, key_tile, head_dim)
    biases: torch.Tensor  # (num_slices, num_tiles, key_tile)
    values: torch.Tensor  # (num_slices, num_tiles, key_tile, head_dim)


def plan_gradients(
    rows: FitRows,
    lengths: Sequence[int],
    scales: torch.Tensor,
    *,
    scaling: float,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> GradientPlan:
    """Return what the gradients of a step need to know of rows and heads; waits for the device.

    rows: queries float32, float16 or bfloat16, the other parts float32, all contiguous; ``lengths``: keys of each head;
    ``scales``: (3, num_heads) float32, what the gradients with respect to keys, biases and values are multiplied by.
    ``tiles`` overrides the choice for errors and for sums.

    Half precision holds errors in units of the head: weights relative to its highest, where that is `HIGHEST_WEIGHT`;
    outputs and values relative to the root mean square of its exact output. Weighted errors from 4e-6 to 3,750 such
    units are then as exact as the type allows; smaller ones fade out, larger ones are cut.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_rows(rows, lengths, scales)
    device, head_dim = rows.queries.device, rows.queries.shape[2]
    error_tiles, sum_tiles = tiles or choose_tiles(head_dim, rows.queries.element_size(), _machine(device)[1])
    places = [(head, start) for head, n in enumerate(lengths) for start in range(0, n, sum_tiles.key_tile)]
    heads, starts = zip(*places, strict=True)
    with_keys = [head for head, n in enumerate(lengths) if n]
    on_device = partial(torch.tensor, dtype=torch.int32, device=device)
    highest = rows.weights.amax(1)
    size = torch.linalg.vector_norm(rows.out, dim=(1, 2)) / (rows.out.shape[1] * head_dim) ** 0.5
    return GradientPlan(
        rows=rows,
        scaling=scaling,
        longest=max(lengths),
        lengths=on_device(list(lengths)),
        order=on_device(sorted(with_keys, key=lambda head: -lengths[head])),
        scales=scales,
        weight_unit=torch.where(highest > 0, highest / HIGHEST_WEIGHT, 1.0),
        out_unit=torch.where(size > 0, size, 1.0),
        error_tiles=error_tiles,
        sum_tiles=sum_tiles,
        tile_heads=on_device(heads),
        tile_starts=on_device(starts),
    )


def in_types_of_products(
    plan: GradientPlan, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values as products take them: keys in the type of the queries; values in units of the plan's
    ``out_unit``, float16 for half-precision queries."""
    scaled_values = values / plan.out_unit.view(-1, 1, 1)
    if plan.rows.queries.dtype != torch.float32:
        scaled_values = scaled_values.clamp_(-LARGEST_HALF.value, LARGEST_HALF.value).half()
    return keys.to(plan.rows.queries.dtype), scaled_values


def sum_slices(
    plan: GradientPlan,
    drawn_rows: torch.Tensor,
    number: torch.Tensor,
    rounded_keys: torch.Tensor,
    biases: torch.Tensor,
    scaled_values: torch.Tensor,
) -> SliceSums:
    """Launch what a step has before its slices are added; nothing is checked.

    drawn_rows: (steps, num_drawn) int64, one row number at least; number: (1,) int64, whose row of them is taken;
    rounded_keys, scaled_values: as `in_types_of_products` gives them; biases: (num_heads, longest) float32.
    """
    rows, device, of_errors, of_sums = plan.rows, rounded_keys.device, plan.error_tiles, plan.sum_tiles
    num_heads, longest, head_dim = rounded_keys.shape
    num_rows, num_drawn = rows.lse.shape[1], drawn_rows.shape[1]
    half = rows.queries.dtype != torch.float32
    padded = ceil_div(num_drawn, of_errors.row_tile) * of_errors.row_tile
    errors = torch.empty((num_heads, padded, head_dim), dtype=scaled_values.dtype, device=device)
    bases, products = (torch.empty((num_heads, padded), device=device) for _ in range(2))
    num_tiles = len(plan.tile_heads)
    num_row_tiles = ceil_div(num_drawn, of_sums.row_tile)
    tiles_per_slice = ceil_div(num_row_tiles, choose_num_slices(num_tiles, num_row_tiles, _machine(device)[0]))
    num_slices = ceil_div(num_row_tiles, tiles_per_slice)
    key_sums, value_sums = (
        torch.empty((num_slices, num_tiles, of_sums.key_tile, head_dim), device=device) for _ in range(2)
    )
    bias_sums = torch.empty(key_sums.shape[:3], device=device)
    types = {"SCORE_TYPE": _score_type(rows.queries.dtype), "SHARE_TYPE": tl.float16 if half else tl.float32}

    with on_device_of(rounded_keys):
        _row_errors[(ceil_div(num_drawn, of_errors.row_tile), len(plan.order))](
            *rows,
            drawn_rows,
            number,
            rounded_keys,
            biases,
            scaled_values,
            plan.lengths,
            plan.order,
            plan.weight_unit,
            plan.out_unit,
            errors,
            bases,
            products,
            plan.scaling,
            num_rows,
            num_drawn,
            longest,
            HEAD_DIM=head_dim,
            DIM_TILE=of_errors.dim_tile,
            ROW_TILE=of_errors.row_tile,
            KEY_TILE=of_errors.key_tile,
            **types,
            num_warps=of_errors.num_warps,
            num_stages=of_errors.num_stages,
        )
        _key_sums[(num_tiles, num_slices)](
            rows.queries,
            drawn_rows,
            number,
            rounded_keys,
            biases,
            scaled_values,
            plan.lengths,
            plan.tile_heads,
            plan.tile_starts,
            errors,
            bases,
            products,
            key_sums,
            bias_sums,
            value_sums,
            plan.scaling,
            num_rows,
            num_drawn,
            padded,
            longest,
            tiles_per_slice * of_sums.row_tile,
            HEAD_DIM=head_dim,
            DIM_TILE=of_sums.dim_tile,
            ROW_TILE=of_sums.row_tile,
            KEY_TILE=of_sums.key_tile,
            **types,
            num_warps=of_sums.num_warps,
            num_stages=of_sums.num_stages,
        )
    return SliceSums(key_sums, bias_sums, value_sums)


def added_blocks(plan: GradientPlan) -> tuple[int, int]:
    """Return the grid of a kernel that calls `add_slices`."""
    return len(plan.tile_heads), plan.sum_tiles.key_tile // ADDED_KEYS


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Return the context in which kernels are launched on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def flops(num_drawn: int, lengths: Sequence[int], head_dim: int) -> int:
    """Return the operations of one step, 12 r n d for r rows and n keys of a head: scores and outputs 4, scores once
    more, e.v, dV and dK 8; a multiplication and an addition are two."""
    return 12 * num_drawn * sum(lengths) * head_dim


def choose_tiles(head_dim: int, element_bytes: int, shared_bytes: int) -> tuple[Tiles, Tiles]:
    """Return the tiles for errors and for sums; a block may use ``shared_bytes`` of memory.

    The sums of a tile of keys fill the registers: more rows at once, or more keys, would spill. Rows of errors come in
    whole tiles of rows of sums.
    """
    dim_tile = max(16, 1 << (head_dim - 1).bit_length())
    if element_bytes == 4:  # the ordinary arithmetic units, whose operands fill the registers
        size = 32 if dim_tile <= 64 else 16
        tiles = Tiles(size, size, dim_tile, 8 if dim_tile > 128 else 4, 1)
        return tiles, tiles
    narrow, wide = dim_tile <= 64, dim_tile > 128
    errors = Tiles(64, 64, dim_tile, 8 if wide else 4, 3 if narrow else 2)
    sums = Tiles(32 if wide else 64, 64, dim_tile, 8 if wide else 4, 3 if narrow else 2)
    pair_bytes = 2 * 2 * dim_tile  # a key and a value, or a query and an error

    def errors_fit(tiles: Tiles) -> bool:
        held = tiles.row_tile * pair_bytes // 2 + tiles.num_stages * tiles.key_tile * pair_bytes
        return bool(held + SPARE_BYTES <= shared_bytes)

    def sums_fit(tiles: Tiles) -> bool:
        held = tiles.key_tile * pair_bytes + max(2, tiles.num_stages - 1) * tiles.row_tile * pair_bytes
        return bool(held + SPARE_BYTES <= shared_bytes)

    return _shrink(errors, errors_fit), _shrink(sums, sums_fit)


def _shrink(tiles: Tiles, fit: Callable[[Tiles], bool]) -> Tiles:
    while not fit(tiles) and tiles.key_tile > 16:
        if tiles.num_stages > 2:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        else:
            tiles = tiles._replace(key_tile=tiles.key_tile // 2)
    return tiles


def choose_num_slices(num_tiles: int, num_row_tiles: int, multiprocessors: int) -> int:
    """Return into how many slices the rows are cut so that tiles of keys times slices fill the device evenly.

    A round of as many blocks as the device holds takes as long as a slice has tiles of rows, and `SLICE_COST` for its
    sums. That also bounds their memory: about sqrt(num_row_tiles / SLICE_COST) rounds of blocks, or one slice.
    """
    at_once = BLOCKS_PER_MULTIPROCESSOR * multiprocessors

    def duration(num_slices: int) -> int:
        return ceil_div(num_tiles * num_slices, at_once) * (ceil_div(num_row_tiles, num_slices) + SLICE_COST)

    return min(range(1, min(MOST_SLICES, num_row_tiles) + 1), key=duration)


def ceil_div(number: int, divisor: int) -> int:
    """Return the quotient rounded up."""
    return -(-number // divisor)


def _score_type(dtype: torch.dtype) -> tl.dtype:
    if dtype == torch.bfloat16 and is_interpreted():
        return tl.float32  # the interpreter multiplies the bit patterns of bf16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors and the bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS, 64 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 64 * 1024)


def _check_rows(rows: FitRows, lengths: Sequence[int], scales: torch.Tensor) -> None:
    queries = rows.queries
    if queries.dim() != 3 or 0 in queries.shape:
        raise ValueError(f"queries must be (num_heads, num_rows, head_dim), not {tuple(queries.shape)}.")
    num_heads, _, head_dim = queries.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {head_dim}; use the reference for it.")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float32, float16 or bfloat16, not {queries.dtype}.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
    shapes = {"near": queries.shape, "out": queries.shape}
    for name, tensor in rows._asdict().items():
        if name != "queries":
            check_tensor(name, tensor, shapes.get(name, queries.shape[:2]), torch.float32, queries.device)
    check_tensor("queries", queries, queries.shape, queries.dtype, queries.device)
    check_tensor("scales", scales, (3, num_heads), torch.float32, queries.device)
    if len(lengths) != num_heads or min(lengths) < 0 or max(lengths) < 1:
        raise ValueError(f"lengths must be {num_heads} numbers of keys, one above 0 at least, not {list(lengths)}.")


def check_moving(plan: GradientPlan, keys: torch.Tensor, biases: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError unless keys, biases and values are as `refine_steps.begin_steps` takes them."""
    num_heads, _, head_dim = plan.rows.queries.shape
    device = plan.rows.queries.device
    if keys.dim() != 3 or keys.shape[1] < plan.longest:
        raise ValueError(f"keys must be (num_heads, {plan.longest} or more, head_dim), not {tuple(keys.shape)}.")
    shape = (num_heads, keys.shape[1], head_dim)
    check_tensor("keys", keys, shape, torch.float32, device)
    check_tensor("biases", biases, shape[:2], torch.float32, device)
    check_tensor("values", values, shape, torch.float32, device)


def check_tensor(
    name: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError unless a tensor is contiguous and has this shape, type and device."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} must be {tuple(shape)} {dtype}, not {found}.")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the queries, not on {tensor.device}.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() once, before the first step.")
