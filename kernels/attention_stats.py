"""Knows the Triton kernel for what each key receives from many queries. Knows no cache, no model and no values.

For queries q_i, the keys k_j of their KV head, a shift t_i per row and a limit of keys per row (all sums over the rows
that see key j, the rows of all query heads of a group together):

    a_ij = exp(scaling q_i.k_j + t_i),   squares_j = sum_i a_ij^2,   shares_j = sum_i a_ij,   peaks_j = max_i a_ij

With t_i = log(weight_i) - lse_i the a_ij are weighted attention, and nothing of the size rows x keys is ever held. A
program keeps one block of keys in shared memory and streams the rows past it, as FlashAttention-2 (arXiv 2307.08691)
streams keys past rows in its backward pass. Sums stay in registers until the last row; programs that share a block of
keys leave partial sums, which are added in a fixed order, so that equal calls give equal bits.

Twin: `reference_stats.attention_stats_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.reference_stats import AttentionStats

MAX_HEAD_DIM = 256
PROGRAMS_PER_MULTIPROCESSOR = 2  # at once: one forms products while the other forms exponentials
WAVES = 4  # of programs on the device: the last one, partly idle, is then a small part
LEAST_TILES = 16  # row tiles of a program; fewer would not be worth the loading of its keys
COUNT_TILE = 1024  # row limits read at once
SHARED_RESERVE = 4096  # bytes a program leaves to shifts, limits and the driver

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_vectors(base, steps, dims, stride, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the vectors ``base + steps * stride``, (len(steps), DIM_TILE), zero beyond HEAD_DIM."""
    pointers = base + steps[:, None] * stride + dims[None, :]
    if HEAD_DIM == DIM_TILE:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def _fold(tile, ROW_TILE: tl.constexpr, KEY_TILE: tl.constexpr, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """View (ROW_TILE, KEY_TILE) such that axis 1 has the FOLD rows that one thread of a matrix product holds: those
    8 apart. Rows are summed over that axis at once, in registers, which halves what is carried along."""
    return tl.reshape(tile, (ROW_TILE // (8 * FOLD), FOLD, 8, KEY_TILE))


@triton.jit
def _stream_rows(  # type: ignore[no-untyped-def]
    square_sums,  # (ROW_TILE // (8 * FOLD), 8, KEY_TILE) fp32, like the next two; what is not asked for stays as it is
    share_sums,
    peak_logs,  # in base 2
    queries,
    row_shift,
    stops,
    keys_transposed,  # (DIM_TILE, KEY_TILE)
    key_positions,  # (KEY_TILE,)
    kv_head,
    split,
    first_row,
    last_row,
    scaling,
    stride_head,
    stride_row,
    num_rows,
    num_splits,
    group,
    SQUARES: tl.constexpr,
    SHARES: tl.constexpr,
    PEAKS: tl.constexpr,
    LIMITED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
):
    """Add this split's part of the rows first_row .. last_row of every query head of the group."""
    # logarithms of a in base 2; of a^2 where nothing else is asked for, so that a square takes no product
    POWER: tl.constexpr = 2.0 * LOG2_E if SQUARES and not (SHARES or PEAKS) else 1.0 * LOG2_E
    dims = tl.arange(0, DIM_TILE)
    in_tile = tl.arange(0, ROW_TILE)
    tiles_per_head = tl.cdiv(last_row - first_row, ROW_TILE)
    tiles = tiles_per_head * group
    # named stages, so that the shifts are fetched ahead too: of their own accord only operands of a product are
    for tile in tl.range(tiles * split // num_splits, tiles * (split + 1) // num_splits, num_stages=STAGES):
        in_group = tile // tiles_per_head
        head = (kv_head * group + in_group).to(tl.int64)
        row = first_row + (tile - in_group * tiles_per_head) * ROW_TILE
        rows_left = last_row - row
        # rows past the end repeat the last one, and a shift of -inf takes them out: no mask on the tile itself
        steps = tl.minimum(in_tile, rows_left - 1)
        base = queries + head * stride_head + row.to(tl.int64) * stride_row
        query_tile = load_vectors(base, steps, dims, stride_row, HEAD_DIM, DIM_TILE).to(PRODUCT_TYPE)
        shift = tl.load(row_shift + head * num_rows + row + in_tile, mask=in_tile < rows_left, other=float("-inf"))
        scores = tl.dot(query_tile, keys_transposed, input_precision="ieee")  # (ROW_TILE, KEY_TILE), fp32
        logs = tl.fma(scores, scaling * POWER, (shift * POWER)[:, None])
        if LIMITED:
            stop = tl.load(stops + row + in_tile, mask=in_tile < rows_left, other=0)
            logs = tl.where(key_positions[None, :] < stop[:, None], logs, float("-inf"))
        if PEAKS:
            peak_logs = tl.maximum(peak_logs, tl.max(_fold(logs, ROW_TILE, KEY_TILE, FOLD), 1))
        if SQUARES or SHARES:
            powers = tl.exp2(logs)
            if SHARES:
                share_sums += tl.sum(_fold(powers, ROW_TILE, KEY_TILE, FOLD), 1)
            if SQUARES and (SHARES or PEAKS):
                powers = powers * powers
            if SQUARES:
                square_sums += tl.sum(_fold(powers, ROW_TILE, KEY_TILE, FOLD), 1)
    return square_sums, share_sums, peak_logs


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "kv_len", "num_splits", "group"])
def _attention_stats(  # type: ignore[no-untyped-def]
    queries,  # (num_heads, num_rows, HEAD_DIM), any strides but 1 between the elements of a vector
    keys,  # (num_kv_heads, kv_len, HEAD_DIM), likewise
    row_shift,  # (num_heads, num_rows) fp32
    stops,  # (num_rows,) int32 ascending: row i sees the keys before stops[i]; not read unless HAS_STOPS
    squares,  # (num_splits, num_kv_heads, kv_len) fp32, like the next two
    shares,
    peaks,
    scaling,
    stride_query_head,
    stride_query_row,
    stride_key_head,
    stride_key_row,
    num_rows,
    kv_len,
    num_splits,
    group,
    SQUARES: tl.constexpr,
    SHARES: tl.constexpr,
    PEAKS: tl.constexpr,
    HAS_STOPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    COUNT_TILE: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
):
    """Stream one split of the rows past one block of keys; grid (key block, KV head, split)."""
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first_key = tl.program_id(0) * KEY_TILE
    in_block = tl.arange(0, KEY_TILE)
    key_positions = first_key + in_block
    base = keys + kv_head.to(tl.int64) * stride_key_head + first_key.to(tl.int64) * stride_key_row
    steps = tl.minimum(in_block, kv_len - 1 - first_key)  # keys past the end repeat the last one and are not stored
    key_tile = load_vectors(base, steps, tl.arange(0, DIM_TILE), stride_key_row, HEAD_DIM, DIM_TILE)
    keys_transposed = tl.trans(key_tile.to(PRODUCT_TYPE))

    # rows before first_row see nothing of this block, rows from full_row on see all of it
    first_row = 0
    full_row = 0
    if HAS_STOPS:
        last_key = tl.minimum(first_key + KEY_TILE, kv_len)
        for start in range(0, num_rows, COUNT_TILE):
            rows = start + tl.arange(0, COUNT_TILE)
            stop = tl.load(stops + rows, mask=rows < num_rows, other=2147483647)
            first_row += tl.sum((stop <= first_key).to(tl.int32), 0)
            full_row += tl.sum((stop < last_key).to(tl.int32), 0)

    square_sums = tl.zeros((ROW_TILE // (8 * FOLD), 8, KEY_TILE), tl.float32)
    share_sums = tl.zeros((ROW_TILE // (8 * FOLD), 8, KEY_TILE), tl.float32)
    peak_logs = tl.full((ROW_TILE // (8 * FOLD), 8, KEY_TILE), float("-inf"), tl.float32)
    if HAS_STOPS:
        square_sums, share_sums, peak_logs = _stream_rows(
            square_sums, share_sums, peak_logs, queries, row_shift, stops, keys_transposed, key_positions,
            kv_head, split, first_row, full_row, scaling, stride_query_head, stride_query_row, num_rows, num_splits,
            group, SQUARES, SHARES, PEAKS, True, HEAD_DIM, DIM_TILE, ROW_TILE, KEY_TILE, FOLD, STAGES, PRODUCT_TYPE,
        )  # fmt: skip
    square_sums, share_sums, peak_logs = _stream_rows(
        square_sums, share_sums, peak_logs, queries, row_shift, stops, keys_transposed, key_positions,
        kv_head, split, full_row, num_rows, scaling, stride_query_head, stride_query_row, num_rows, num_splits,
        group, SQUARES, SHARES, PEAKS, False, HEAD_DIM, DIM_TILE, ROW_TILE, KEY_TILE, FOLD, STAGES, PRODUCT_TYPE,
    )  # fmt: skip

    out = (split * tl.num_programs(1) + kv_head).to(tl.int64) * kv_len + key_positions
    exists = key_positions < kv_len
    if SQUARES:
        tl.store(squares + out, tl.sum(tl.sum(square_sums, 1), 0), mask=exists)
    if SHARES:
        tl.store(shares + out, tl.sum(tl.sum(share_sums, 1), 0), mask=exists)
    if PEAKS:
        tl.store(peaks + out, tl.exp2(tl.max(tl.max(peak_logs, 1), 0)), mask=exists)


class Tiles(NamedTuple):
    """How one launch cuts its work."""

    row_tile: int  # rows streamed at once, a multiple of 16
    key_tile: int  # keys that a program keeps
    dim_tile: int  # head_dim rounded up to a power of two, at least 16 for the matrix units
    fold: int  # rows that one thread holds of a column of scores, 8 apart, and adds at once: 2, or 1
    num_warps: int
    num_stages: int  # row tiles in flight


class Machine(NamedTuple):
    """What the choice of tiles depends on."""

    generation: int  # major compute capability
    multiprocessors: int
    shared_bytes: int  # that one program may use


INTERPRETED = Machine(9, 4, 227 * 1024)  # what the interpreter pretends to be


def attention_stats(
    queries: torch.Tensor,
    keys: torch.Tensor,
    row_shift: torch.Tensor,
    *,
    scaling: float,
    stops: torch.Tensor | None = None,
    squares: bool = True,
    shares: bool = False,
    peaks: bool = False,
    num_splits: int | None = None,
    tiles: Tiles | None = None,
) -> AttentionStats:
    """Return what each key receives from the rows that see it; equations and sources in the module.

    queries: (num_heads, num_rows, head_dim), float32, float16 or bfloat16, head_dim at most 256; keys: (num_kv_heads,
    kv_len, head_dim) of the same type; both with any strides but a contiguous last dimension. Query head h belongs to
    KV head h // (num_heads // num_kv_heads). row_shift: (num_heads, num_rows) float32, natural logarithm, contiguous;
    -inf takes a row out. stops: (num_rows,) int32, ascending: row i of every head sees the keys before stops[i]; None:
    every row sees every key. Limits that all fall on multiples of a power of two cost least (no score is masked).
    Only what is asked for is computed. ``num_splits`` and ``tiles`` override the choice of programs per block of keys
    and of tiles; neither changes more than the order of sums.

    Returns `AttentionStats`, float32 (num_kv_heads, kv_len). Products are in the type of the queries with float32
    sums, all else is float32. With R rows of all heads that see N keys a call takes 2 R N head_dim operations and R N
    exponentials, reads queries and keys once from memory (from the L2 cache queries once for every ``key_tile`` keys)
    and writes N numbers for every KV head and split. Deterministic: equal calls give equal bits. Launches on the
    current stream of the tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(queries, keys, row_shift, stops, num_splits)
    num_heads, num_rows, head_dim = queries.shape
    num_kv_heads, kv_len, _ = keys.shape
    group = num_heads // num_kv_heads
    asked = (squares, shares, peaks)
    if num_rows == 0 or kv_len == 0 or not any(asked):
        zeros = (keys.new_zeros(num_kv_heads, kv_len, dtype=torch.float32) if wanted else None for wanted in asked)
        return AttentionStats(*zeros)

    machine = _machine(queries.device)
    if tiles is None:
        tiles = choose_tiles(head_dim, queries.element_size(), sum(asked), machine)
    key_blocks = triton.cdiv(kv_len, tiles.key_tile)
    if num_splits is None:
        num_row_tiles = triton.cdiv(num_rows, tiles.row_tile) * group
        num_splits = choose_num_splits(num_row_tiles, key_blocks * num_kv_heads, machine)
    shape = (num_splits, num_kv_heads, kv_len)
    parts = [torch.empty(shape, device=queries.device) if wanted else None for wanted in asked]
    unused = row_shift  # stands for what is neither read nor written

    with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
        _attention_stats[(key_blocks, num_kv_heads, num_splits)](
            queries,
            keys,
            row_shift,
            unused if stops is None else stops,
            *(unused if part is None else part for part in parts),
            scaling,
            queries.stride(0),
            queries.stride(1),
            keys.stride(0),
            keys.stride(1),
            num_rows,
            kv_len,
            num_splits,
            group,
            SQUARES=squares,
            SHARES=shares,
            PEAKS=peaks,
            HAS_STOPS=stops is not None,
            HEAD_DIM=head_dim,
            DIM_TILE=tiles.dim_tile,
            ROW_TILE=tiles.row_tile,
            KEY_TILE=tiles.key_tile,
            COUNT_TILE=COUNT_TILE,
            FOLD=tiles.fold,
            STAGES=tiles.num_stages,
            PRODUCT_TYPE=_product_type(queries.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    square_parts, share_parts, peak_parts = parts
    return AttentionStats(
        None if square_parts is None else square_parts.sum(0),
        None if share_parts is None else share_parts.sum(0),
        None if peak_parts is None else peak_parts.amax(0),
    )


def choose_tiles(head_dim: int, element_bytes: int, num_stats: int, machine: Machine) -> Tiles:
    """Return the tiles for ``num_stats`` statistics at once.

    The longer the block of keys, the seldomer a row is read again; its sums bound it, for they stay in registers. On
    Hopper a warp group multiplies 64 rows with up to 256 keys in one instruction.
    """
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    if element_bytes == 4:  # on the ordinary arithmetic units, whose operands fill the registers
        return Tiles(16, 32, dim_tile, 2, 4, 1)
    fold = 2
    if machine.generation == 9:
        row_tile, key_tile, num_warps = 64, 256 if num_stats == 1 else 128, 8 if dim_tile == 256 else 4
    elif machine.generation in (10, 11):  # a thread holds one row of scores
        row_tile, key_tile, num_warps, fold = 128, 128 if num_stats == 1 else 64, 8, 1
    else:
        row_tile, key_tile, num_warps = 64 if dim_tile == 256 else 128, 64 if num_stats == 1 else 32, 8
    vector_bytes = dim_tile * element_bytes
    programs = PROGRAMS_PER_MULTIPROCESSOR
    while programs > 1 and (key_tile + 2 * row_tile) * vector_bytes > machine.shared_bytes // programs - SHARED_RESERVE:
        programs -= 1
    rows_that_fit = (machine.shared_bytes // programs - SHARED_RESERVE) // vector_bytes - key_tile
    return Tiles(row_tile, key_tile, dim_tile, fold, num_warps, max(1, min(3, rows_that_fit // row_tile)))


def choose_num_splits(num_row_tiles: int, num_blocks: int, machine: Machine) -> int:
    """Return among how many programs the ``num_row_tiles`` row tiles of one block of keys are divided."""
    wanted = WAVES * PROGRAMS_PER_MULTIPROCESSOR * machine.multiprocessors
    return min(-(-wanted // num_blocks), max(1, num_row_tiles // LEAST_TILES))  # rounded up


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_attention_stats, triton.JITFunction)


def _product_type(dtype: torch.dtype) -> tl.dtype:
    if dtype == torch.bfloat16 and is_interpreted():
        return tl.float32  # the interpreter multiplies the bit patterns of bf16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@cache
def _machine(device: torch.device) -> Machine:
    """Return the device's sizes, or the interpreter's."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return Machine(properties.major, properties.multi_processor_count, shared_bytes)


def _check_inputs(
    queries: torch.Tensor,
    keys: torch.Tensor,
    row_shift: torch.Tensor,
    stops: torch.Tensor | None,
    num_splits: int | None,
) -> None:
    if queries.dim() != 3:
        raise ValueError(f"queries must be (num_heads, num_rows, head_dim), not {tuple(queries.shape)}.")
    num_heads, num_rows, head_dim = queries.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {head_dim}; use the reference for it.")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float32, float16 or bfloat16, not {queries.dtype}.")
    if keys.dim() != 3 or keys.shape[2] != head_dim:
        raise ValueError(f"keys must be (num_kv_heads, kv_len, head_dim={head_dim}), not {tuple(keys.shape)}.")
    if keys.dtype != queries.dtype:
        raise ValueError(f"keys must have the type of the queries, {queries.dtype}, not {keys.dtype}.")
    if keys.shape[0] == 0 or num_heads % keys.shape[0]:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads={keys.shape[0]}, not {num_heads}.")
    if row_shift.shape != (num_heads, num_rows) or row_shift.dtype != torch.float32:
        shape = tuple(row_shift.shape)
        raise ValueError(f"row_shift must be ({num_heads}, {num_rows}) float32, not {shape} {row_shift.dtype}.")
    if stops is not None and (stops.shape != (num_rows,) or stops.dtype != torch.int32):
        raise ValueError(f"stops must be ({num_rows},) int32, not {tuple(stops.shape)} {stops.dtype}.")
    for name, tensor in (("queries", queries), ("keys", keys), ("row_shift", row_shift), ("stops", stops)):
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(f"{name} must be on {queries.device} like the queries, not on {tensor.device}.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
    for name, tensor in (("queries", queries), ("keys", keys)):
        if tensor.stride(2) != 1 and head_dim > 1:
            raise ValueError(f"The last dimension of {name} must be contiguous; call .contiguous() first.")
    for name, tensor in (("row_shift", row_shift), ("stops", stops)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, not {num_splits}.")
