"""Knows the Triton kernel for attention over a layer's ragged, biased kept keys. Knows no cache and no model.

For a query q_i and the kept keys k_j of its KV head, with bias b_j (all sums over the document part only):

    lse_i = log sum_j exp(scaling q_i.k_j + b_j),   out_i = sum_j exp(scaling q_i.k_j + b_j - lse_i) v_j

The softmax runs over tiles of keys with a running maximum (FlashAttention-2, arXiv 2307.08691, algorithm 1).
The rows of all sequences and of all query heads of a group share their keys and are packed into one tile, so
that a key is read once per tile of rows. A head's keys are split over blocks, and a second kernel merges the
splits by log-sum-exp (Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023):

    lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

Twin: `reference.biased_attention_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.reference import PartialAttention

MAX_HEAD_DIM = 256
BLOCKS_PER_MULTIPROCESSOR = 2
KEY_TILE_BYTES = 32 * 1024  # one tile of keys and one of values
INTERPRETED_MULTIPROCESSORS = 4  # what the interpreter pretends to have
MERGED_SPLITS = 16  # splits that the merge kernel holds at once

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "q_len", "num_heads", "total_rows", "keys_per_split"])
def _attend_splits(  # type: ignore[no-untyped-def]
    queries,  # (batch, num_heads, q_len, HEAD_DIM), any strides but 1 between the elements of a vector
    keys,  # (num_kept, HEAD_DIM)
    values,  # (num_kept, HEAD_DIM)
    biases,  # (num_kept,) fp32
    offsets,  # (num_kv_heads + 1,) int32
    split_out,  # (num_splits, batch * num_heads * q_len, HEAD_DIM) fp32
    split_lse,  # (num_splits, batch * num_heads * q_len) fp32
    scaling,
    stride_batch,
    stride_head,
    stride_row,
    num_rows,  # batch * GROUP * q_len, the rows of one KV head
    q_len,
    num_heads,
    total_rows,  # batch * num_heads * q_len
    keys_per_split,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
):
    """Attend with one tile of rows to one split of one KV head; grid (row tile, KV head, split)."""
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first_key = tl.load(offsets + kv_head).to(tl.int64)
    num_kept = (tl.load(offsets + kv_head + 1) - first_key).to(tl.int32)
    start = split * keys_per_split
    if (split > 0) & (start >= num_kept):
        return  # the merge kernel knows the lengths and does not read this split
    # the last split takes all that is left, so a wrong hint of the longest head costs time, never keys
    stop = tl.where(split == tl.num_programs(2) - 1, num_kept, tl.minimum(start + keys_per_split, num_kept))

    rows = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    row_exists = rows < num_rows
    sequence = rows // (GROUP * q_len)
    head = kv_head * GROUP + rows // q_len % GROUP
    position = rows % q_len
    dims = tl.arange(0, DIM_TILE)
    dim_exists = dims < HEAD_DIM
    query_rows = sequence.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    query_rows += position.to(tl.int64) * stride_row
    in_rows = row_exists[:, None] & dim_exists[None, :]
    query_tile = tl.load(queries + query_rows[:, None] + dims[None, :], mask=in_rows, other=0.0)
    query_tile = query_tile.to(PRODUCT_TYPE)  # (ROW_TILE, DIM_TILE)

    # products in PRODUCT_TYPE with fp32 sums; scores, weights, maximum and mass in fp32, scores in base 2
    in_tile = tl.arange(0, KEY_TILE)
    tile_elements = in_tile[:, None] * HEAD_DIM + dims[None, :]
    peak = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    mass = tl.zeros((ROW_TILE,), tl.float32)
    total = tl.zeros((ROW_TILE, DIM_TILE), tl.float32)
    for tile_start in range(start, stop, KEY_TILE):
        key_exists = in_tile < stop - tile_start
        in_keys = key_exists[:, None] & dim_exists[None, :]
        tile_base = first_key + tile_start
        key_tile = tl.load(keys + tile_base * HEAD_DIM + tile_elements, mask=in_keys, other=0.0)
        key_tile = key_tile.to(PRODUCT_TYPE)
        bias_tile = tl.load(biases + tile_base + in_tile, mask=key_exists, other=float("-inf"))
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")  # (ROW_TILE, KEY_TILE)
        scores = scores * (scaling * LOG2_E) + (bias_tile * LOG2_E)[None, :]
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # biases may all be -inf
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(peak - shift)
        mass = mass * shrink + tl.sum(weights, 1)
        # weights are rounded to PRODUCT_TYPE for the second product; their sum is not
        value_tile = tl.load(values + tile_base * HEAD_DIM + tile_elements, mask=in_keys, other=0.0)
        value_tile = value_tile.to(PRODUCT_TYPE)
        total = tl.dot(weights.to(PRODUCT_TYPE), value_tile, total * shrink[:, None], input_precision="ieee")
        peak = new_peak

    divisor = tl.where(mass > 0.0, mass, 1.0)  # no key: out 0 and lse -inf
    out_rows = split.to(tl.int64) * total_rows + (sequence * num_heads + head).to(tl.int64) * q_len + position
    tl.store(split_out + out_rows[:, None] * HEAD_DIM + dims[None, :], total / divisor[:, None], mask=in_rows)
    tl.store(split_lse + out_rows, (peak + tl.log2(divisor)) * LN_2, mask=row_exists)


@triton.jit(do_not_specialize=["q_len", "num_heads", "total_rows", "num_splits", "keys_per_split"])
def _merge_splits(  # type: ignore[no-untyped-def]
    split_out,  # (num_splits, total_rows, HEAD_DIM) fp32
    split_lse,  # (num_splits, total_rows) fp32
    offsets,  # (num_kv_heads + 1,) int32
    out,  # (total_rows, HEAD_DIM) fp32
    lse,  # (total_rows,) fp32
    q_len,
    num_heads,
    total_rows,
    num_splits,
    keys_per_split,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
):
    """Merge the splits of one row, the maximum subtracted, all in fp32; grid (total_rows,)."""
    row = tl.program_id(0)
    kv_head = row // q_len % num_heads // GROUP
    num_kept = tl.load(offsets + kv_head + 1) - tl.load(offsets + kv_head)
    written = tl.minimum(tl.cdiv(num_kept, keys_per_split), num_splits)
    dims = tl.arange(0, DIM_TILE)
    dim_exists = dims < HEAD_DIM
    peak = tl.full((1,), float("-inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    total = tl.zeros((DIM_TILE,), tl.float32)
    for first_split in range(0, written, SPLIT_TILE):
        splits = first_split + tl.arange(0, SPLIT_TILE)
        split_exists = splits < written
        split_rows = splits.to(tl.int64) * total_rows + row
        lse_tile = tl.load(split_lse + split_rows, mask=split_exists, other=float("-inf")) * LOG2_E
        in_splits = split_exists[:, None] & dim_exists[None, :]
        out_elements = split_rows[:, None] * HEAD_DIM + dims[None, :]
        out_tile = tl.load(split_out + out_elements, mask=in_splits, other=0.0)  # (SPLIT_TILE, DIM_TILE)
        new_peak = tl.maximum(peak, tl.max(lse_tile, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(lse_tile - shift)
        shrink = tl.exp2(peak - shift)
        mass = mass * shrink + tl.sum(weights, 0)
        total = total * shrink + tl.sum(weights[:, None] * out_tile, 0)
        peak = new_peak
    divisor = tl.where(mass > 0.0, mass, 1.0)
    out_row = row.to(tl.int64)
    tl.store(out + out_row * HEAD_DIM + dims, total / divisor, mask=dim_exists)
    tl.store(lse + out_row + tl.arange(0, 1), (peak + tl.log2(divisor)) * LN_2)


class Tiles(NamedTuple):
    """How one launch cuts its work."""

    row_tile: int  # rows of a block
    key_tile: int  # keys held at once
    dim_tile: int  # head_dim rounded up to a power of two; all three are at least 16, for the matrix units
    num_warps: int
    num_stages: int  # tiles in flight


def biased_decode(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    biases: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scaling: float,
    max_head_length: int,
    keys_per_split: int | None = None,
) -> PartialAttention:
    """Attend to ragged kept keys that all sequences of a batch share; equations and sources in the module.

    queries: (batch, num_heads, q_len, head_dim), float32, float16 or bfloat16, any strides with the last
    dimension contiguous, head_dim at most 256; keys, values: (num_kept, head_dim), the type of the queries,
    contiguous, the KV heads one after another, head h owns rows offsets[h]:offsets[h + 1]; biases:
    (num_kept,) float32, natural logarithm, added to the scaled score (-inf hides a key); offsets:
    (num_kv_heads + 1,) int32, ascending from 0 to num_kept (they stay on the device and are trusted). Query
    head h reads KV head h // (num_heads // num_kv_heads). There is no causal mask: the document precedes
    every query. ``max_head_length`` is the longest head's number of keys: it decides the number of splits
    without a device sync, and a wrong one costs only time. ``keys_per_split`` overrides the choice.

    Returns out (batch, num_heads, q_len, head_dim) and lse (batch, num_heads, q_len, natural logarithm),
    both float32, over these keys alone; a head without keys gives out 0 and lse -inf. Products are in the
    type of the queries with float32 sums, all else is float32. Launches on the current stream of the
    tensors' device without a device sync, so it can be captured in a CUDA graph. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(queries, keys, values, biases, offsets, max_head_length, keys_per_split)
    batch, num_heads, q_len, head_dim = queries.shape
    num_kv_heads = offsets.shape[0] - 1
    group = num_heads // num_kv_heads
    num_rows, total_rows = batch * group * q_len, batch * num_heads * q_len
    out = torch.empty((batch, num_heads, q_len, head_dim), dtype=torch.float32, device=queries.device)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=queries.device)
    if total_rows == 0:
        return PartialAttention(out, lse)

    multiprocessors, shared_bytes = _machine(queries.device)
    tiles = choose_tiles(num_rows, head_dim, queries.element_size(), shared_bytes)
    num_row_tiles = triton.cdiv(num_rows, tiles.row_tile)
    if keys_per_split is None:
        keys_per_split = choose_keys_per_split(keys.shape[0], num_row_tiles, tiles.key_tile, multiprocessors)
    num_splits = max(1, triton.cdiv(max_head_length, keys_per_split))
    split_out, split_lse = out, lse
    if num_splits > 1:
        split_out = torch.empty((num_splits, *out.shape), dtype=torch.float32, device=queries.device)
        split_lse = torch.empty((num_splits, *lse.shape), dtype=torch.float32, device=queries.device)

    with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
        _attend_splits[(num_row_tiles, num_kv_heads, num_splits)](
            queries,
            keys,
            values,
            biases,
            offsets,
            split_out,
            split_lse,
            scaling,
            queries.stride(0),
            queries.stride(1),
            queries.stride(2),
            num_rows,
            q_len,
            num_heads,
            total_rows,
            keys_per_split,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIM_TILE=tiles.dim_tile,
            ROW_TILE=tiles.row_tile,
            KEY_TILE=tiles.key_tile,
            PRODUCT_TYPE=_product_type(queries.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        if num_splits > 1:
            _merge_splits[(total_rows,)](
                split_out,
                split_lse,
                offsets,
                out,
                lse,
                q_len,
                num_heads,
                total_rows,
                num_splits,
                keys_per_split,
                GROUP=group,
                HEAD_DIM=head_dim,
                DIM_TILE=tiles.dim_tile,
                SPLIT_TILE=MERGED_SPLITS,
                num_warps=4,
            )
    return PartialAttention(out, lse)


def choose_tiles(num_rows: int, head_dim: int, element_bytes: int, shared_bytes: int) -> Tiles:
    """Return the tiles for ``num_rows`` rows of a KV head; a block may use ``shared_bytes`` of memory."""
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    # fp32 products run on the ordinary arithmetic units, whose operands fill the registers: smaller tiles
    tile_elements, longest = (4096, 32) if element_bytes == 4 else (16384, 128)
    row_tile = max(16, min(triton.next_power_of_2(num_rows), tile_elements // dim_tile, longest))
    key_bytes = 2 * dim_tile * element_bytes
    key_tile = min(max(16, KEY_TILE_BYTES // key_bytes), longest, 8192 // row_tile)
    row_bytes = row_tile * dim_tile * (element_bytes + 4)  # queries, and the sums on their way out
    num_stages = min(1 + max(0, shared_bytes - row_bytes) // (key_tile * key_bytes), 3)
    num_warps = 8 if row_tile * dim_tile >= 64 * 256 else 4
    return Tiles(row_tile, key_tile, dim_tile, num_warps, num_stages)


def choose_keys_per_split(num_kept: int, num_row_tiles: int, key_tile: int, multiprocessors: int) -> int:
    """Return the length of a split, a multiple of ``key_tile``, with which all heads fill the device once.

    Splits are equally long whatever head they belong to: heads of unequal lengths load the device evenly.
    """
    blocks = BLOCKS_PER_MULTIPROCESSOR * multiprocessors
    tiles_per_split = -(-num_kept * num_row_tiles // (blocks * key_tile))  # rounded up
    return key_tile * max(1, tiles_per_split)


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_attend_splits, triton.JITFunction)


def _product_type(dtype: torch.dtype) -> tl.dtype:
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


def _check_inputs(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    biases: torch.Tensor,
    offsets: torch.Tensor,
    max_head_length: int,
    keys_per_split: int | None,
) -> None:
    if queries.dim() != 4:
        raise ValueError(f"queries must be (batch, num_heads, q_len, head_dim), not {tuple(queries.shape)}.")
    head_dim = queries.shape[3]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {head_dim}; use the reference for it.")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float32, float16 or bfloat16, not {queries.dtype}.")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dim() != 2 or tensor.shape[1] != head_dim or tensor.shape[0] != keys.shape[0]:
            raise ValueError(f"{name} must be (num_kept, head_dim={head_dim}), not {tuple(tensor.shape)}.")
        if tensor.dtype != queries.dtype:
            raise ValueError(f"{name} must have the type of the queries, {queries.dtype}, not {tensor.dtype}.")
    num_kept, num_heads, num_kv_heads = keys.shape[0], queries.shape[1], offsets.numel() - 1
    if biases.shape != (num_kept,) or biases.dtype != torch.float32:
        raise ValueError(f"biases must be ({num_kept},) float32, not {tuple(biases.shape)} {biases.dtype}.")
    if offsets.dim() != 1 or num_kv_heads < 1 or offsets.dtype != torch.int32:
        shape = tuple(offsets.shape)
        raise ValueError(f"offsets must be (num_kv_heads + 1,) int32, not {shape} {offsets.dtype}.")
    if num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, not {num_heads}.")
    for name, tensor in (("keys", keys), ("values", values), ("biases", biases), ("offsets", offsets)):
        if tensor.device != queries.device:
            raise ValueError(f"{name} must be on {queries.device} like the queries, not on {tensor.device}.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() once, before the first step.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
    if queries.stride(3) != 1 and head_dim > 1:
        raise ValueError("The last dimension of queries must be contiguous; call .contiguous() first.")
    if max_head_length * num_kv_heads < num_kept:
        raise ValueError(f"max_head_length={max_head_length} is too short for {num_kept} keys in {num_kv_heads} heads.")
    if keys_per_split is not None and keys_per_split < 1:
        raise ValueError(f"keys_per_split must be at least 1, not {keys_per_split}.")
