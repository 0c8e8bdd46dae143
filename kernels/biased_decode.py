"""Knows the Triton kernel for attention over a layer's ragged, biased kept keys. Knows no cache and no model.

For a query q_i and the kept keys k_j of its KV head, with bias b_j (all sums over the document part only):

    lse_i = log sum_j exp(scaling q_i.k_j + b_j),   out_i = sum_j exp(scaling q_i.k_j + b_j - lse_i) v_j

The softmax runs over tiles of keys with a running maximum (FlashAttention-2, arXiv 2307.08691, algorithm 1).
The rows of all sequences of a document and of all query heads of a group share their keys and are packed into one
tile, so that a key is read once per tile of rows. A head's keys are split over blocks, and a second kernel merges the
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

from compactor_kernels.launching import gdc_launch_dependents, gdc_wait, launch_options, launches_early
from compactor_kernels.reference import PartialAttention

MAX_HEAD_DIM = 256
BLOCKS_PER_MULTIPROCESSOR = 2
KEY_TILE_BYTES = 32 * 1024  # one tile of keys and one of values
FEW_KEYS = 64  # for each block of a full device: up to here a block has one tile, and its latency is what counts
INTERPRETED_MULTIPROCESSORS = 4  # what the interpreter pretends to have
MERGED_SPLITS = 64  # splits that a program of the merge holds at once, at most

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
VALUE_LIFT = tl.constexpr(128.0)  # of scaled weights: numbers of 8 bits times their scale keep the size of values


@triton.jit
def _add_tile(  # type: ignore[no-untyped-def]
    query_tile,  # (ROW_TILE, DIM_TILE) PRODUCT_TYPE
    key_tile,  # (KEY_TILE, DIM_TILE), like value_tile
    value_tile,
    bias_tile,  # (KEY_TILE,) fp32, -inf where there is no key
    key_scales,  # (KEY_TILE,) fp32, like value_scales not used unless SCALED
    value_scales,
    peak,
    mass,
    total,
    scaling,
    SCALED: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
):
    """Return running maximum, mass and sum with one more tile; scores in base 2.

    Products are in PRODUCT_TYPE with fp32 sums; scores, weights, maximum and mass are fp32.
    """
    scores = tl.dot(query_tile, tl.trans(key_tile.to(PRODUCT_TYPE)), input_precision="ieee")  # (ROW_TILE, KEY_TILE)
    if SCALED:
        scores = scores * (key_scales * (scaling * LOG2_E))[None, :] + (bias_tile * LOG2_E)[None, :]
    else:
        scores = scores * (scaling * LOG2_E) + (bias_tile * LOG2_E)[None, :]
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # biases may all be -inf
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(peak - shift)
    mass = mass * shrink + tl.sum(weights, 1)
    if SCALED:
        weights = weights * (value_scales * VALUE_LIFT)[None, :]
    # weights are rounded to PRODUCT_TYPE for the second product; their sum is not
    value_tile = value_tile.to(PRODUCT_TYPE)
    total = tl.dot(weights.to(PRODUCT_TYPE), value_tile, total * shrink[:, None], input_precision="ieee")
    return new_peak, mass, total


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "q_len", "num_heads", "num_kv_heads", "total_rows", "keys_per_split"])
def _attend_splits(  # type: ignore[no-untyped-def]
    queries,  # (batch, num_heads, q_len, HEAD_DIM), any strides but 1 between the elements of a vector
    keys,  # (num_kept, HEAD_DIM)
    values,  # (num_kept, HEAD_DIM)
    biases,  # (num_kept,) fp32
    key_scales,  # (num_kept,) fp32, like value_scales not read unless SCALED
    value_scales,
    offsets,  # (num_documents * num_kv_heads + 1,) int32
    split_out,  # (num_splits, batch * num_heads * q_len, HEAD_DIM) fp32
    split_lse,  # (num_splits, batch * num_heads * q_len) fp32
    scaling,
    stride_batch,
    stride_head,
    stride_row,
    num_rows,  # sequences of a document * GROUP * q_len, the rows of one KV head
    q_len,
    num_heads,
    num_kv_heads,
    total_rows,  # batch * num_heads * q_len
    keys_per_split,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SETTLED: tl.constexpr,
):
    """Attend with one tile of rows to one split of one KV head; grid (row tile, document and KV head, split)."""
    if OVERLAPS:
        gdc_launch_dependents()
        if not SETTLED:
            gdc_wait()
    document_head = tl.program_id(1)
    document, kv_head = document_head // num_kv_heads, document_head % num_kv_heads
    split = tl.program_id(2)
    first_key = tl.load(offsets + document_head).to(tl.int64)
    num_kept = (tl.load(offsets + document_head + 1) - first_key).to(tl.int32)
    start = split * keys_per_split
    if (split > 0) & (start >= num_kept):
        return  # the merge kernel knows the lengths and does not read this split
    # the last split takes all that is left, so a wrong hint of the longest head costs time, never keys
    stop = tl.where(split == tl.num_programs(2) - 1, num_kept, tl.minimum(start + keys_per_split, num_kept))

    in_tile, dims = tl.arange(0, KEY_TILE), tl.arange(0, DIM_TILE)
    dim_exists = dims < HEAD_DIM
    tile_elements = in_tile[:, None] * HEAD_DIM + dims[None, :]
    if ONE_TILE:  # as a rule all there is: asked for before the queries are there
        key_exists = in_tile < stop - start
        in_keys = key_exists[:, None] & dim_exists[None, :]
        base = first_key + start
        key_tile = tl.load(keys + base * HEAD_DIM + tile_elements, mask=in_keys, other=0)
        value_tile = tl.load(values + base * HEAD_DIM + tile_elements, mask=in_keys, other=0)
        bias_tile = tl.load(biases + base + in_tile, mask=key_exists, other=float("-inf"))
        own_key_scales, own_value_scales = bias_tile, bias_tile
        if SCALED:
            own_key_scales = tl.load(key_scales + base + in_tile, mask=key_exists, other=0.0)
            own_value_scales = tl.load(value_scales + base + in_tile, mask=key_exists, other=0.0)
    if OVERLAPS and SETTLED:
        gdc_wait()

    rows = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    row_exists = rows < num_rows
    sequence = document * (num_rows // (GROUP * q_len)) + rows // (GROUP * q_len)
    head = kv_head * GROUP + rows // q_len % GROUP
    position = rows % q_len
    query_rows = sequence.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    query_rows += position.to(tl.int64) * stride_row
    in_rows = row_exists[:, None] & dim_exists[None, :]
    query_tile = tl.load(queries + query_rows[:, None] + dims[None, :], mask=in_rows, other=0.0)
    query_tile = query_tile.to(PRODUCT_TYPE)  # (ROW_TILE, DIM_TILE)

    peak = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    mass = tl.zeros((ROW_TILE,), tl.float32)
    total = tl.zeros((ROW_TILE, DIM_TILE), tl.float32)
    if ONE_TILE:
        peak, mass, total = _add_tile(
            query_tile, key_tile, value_tile, bias_tile, own_key_scales, own_value_scales, peak, mass, total, scaling,
            SCALED, PRODUCT_TYPE,
        )  # fmt: skip
        start += KEY_TILE
    for tile_start in range(start, stop, KEY_TILE):
        key_exists = in_tile < stop - tile_start
        in_keys = key_exists[:, None] & dim_exists[None, :]
        base = first_key + tile_start
        key_tile = tl.load(keys + base * HEAD_DIM + tile_elements, mask=in_keys, other=0)
        value_tile = tl.load(values + base * HEAD_DIM + tile_elements, mask=in_keys, other=0)
        bias_tile = tl.load(biases + base + in_tile, mask=key_exists, other=float("-inf"))
        own_key_scales, own_value_scales = bias_tile, bias_tile
        if SCALED:
            own_key_scales = tl.load(key_scales + base + in_tile, mask=key_exists, other=0.0)
            own_value_scales = tl.load(value_scales + base + in_tile, mask=key_exists, other=0.0)
        peak, mass, total = _add_tile(
            query_tile, key_tile, value_tile, bias_tile, own_key_scales, own_value_scales, peak, mass, total, scaling,
            SCALED, PRODUCT_TYPE,
        )  # fmt: skip

    divisor = tl.where(mass > 0.0, mass, 1.0)  # no key: out 0 and lse -inf
    if SCALED:
        total = total * (1.0 / VALUE_LIFT)
    out_rows = split.to(tl.int64) * total_rows + (sequence * num_heads + head).to(tl.int64) * q_len + position
    tl.store(split_out + out_rows[:, None] * HEAD_DIM + dims[None, :], total / divisor[:, None], mask=in_rows)
    tl.store(split_lse + out_rows, (peak + tl.log2(divisor)) * LN_2, mask=row_exists)


@triton.jit(
    do_not_specialize=["q_len", "num_heads", "num_kv_heads", "rows_per_document", "num_splits", "keys_per_split"]
)
def _merge_splits(  # type: ignore[no-untyped-def]
    split_out,  # (num_splits, total_rows, HEAD_DIM) fp32
    split_lse,  # (num_splits, total_rows) fp32
    offsets,  # (num_documents * num_kv_heads + 1,) int32
    out,  # (total_rows, HEAD_DIM) fp32
    lse,  # (total_rows,) fp32
    q_len,
    num_heads,
    num_kv_heads,
    rows_per_document,  # sequences of a document * num_heads * q_len
    num_splits,
    keys_per_split,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SETTLED: tl.constexpr,
):
    """Merge the splits of one row, the maximum subtracted, all in fp32; grid (total_rows,)."""
    if OVERLAPS:
        gdc_launch_dependents()
        if not SETTLED:
            gdc_wait()
    row, total_rows = tl.program_id(0), tl.num_programs(0)
    document_head = row // rows_per_document * num_kv_heads + row // q_len % num_heads // GROUP
    num_kept = tl.load(offsets + document_head + 1) - tl.load(offsets + document_head)
    if OVERLAPS and SETTLED:
        gdc_wait()
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
    num_documents: int = 1,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    keys_per_split: int | None = None,
    settled: bool = False,
) -> PartialAttention:
    """Attend to ragged kept keys that the sequences of a batch share; equations and sources in the module.

    queries: (batch, num_heads, q_len, head_dim), float32, float16 or bfloat16, any strides with the last
    dimension contiguous, head_dim at most 256; keys, values: (num_kept, head_dim), the type of the queries,
    contiguous, the KV heads one after another, head h owns rows offsets[h]:offsets[h + 1]; biases:
    (num_kept,) float32, natural logarithm, added to the scaled score (-inf hides a key); offsets:
    (num_kv_heads + 1,) int32, ascending from 0 to num_kept (they stay on the device and are trusted). Query
    head h reads KV head h // (num_heads // num_kv_heads). There is no causal mask: the document precedes
    every query. ``max_head_length`` is the longest head's number of keys: it decides the number of splits
    without a device sync, and a wrong one costs only time. ``keys_per_split`` overrides the choice.

    ``num_documents``: the batch holds as many sequences about each of several documents, one document after another;
    then the documents' heads follow one another in keys, values, biases and offsets (num_documents * num_kv_heads + 1).
    ``scales``: keys and values are int8, and these are the factors of each vector, (num_kept,) float32, key j being
    scales[0][j] * keys[j] (`reference.quantise`); they are multiplied out in registers. ``settled``: nothing that is
    still running on the stream writes keys, values, biases, scales or offsets; they are then read before it ends.

    Returns out (batch, num_heads, q_len, head_dim) and lse (batch, num_heads, q_len, natural logarithm),
    both float32, over these keys alone; a head without keys gives out 0 and lse -inf. Products are in the
    type of the queries with float32 sums, all else is float32. Launches on the current stream of the
    tensors' device without a device sync, so it can be captured in a CUDA graph. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    splits = attend_splits(
        queries,
        keys,
        values,
        biases,
        offsets,
        scaling=scaling,
        max_head_length=max_head_length,
        num_documents=num_documents,
        scales=scales,
        keys_per_split=keys_per_split,
        settled=settled,
    )
    if len(splits.out) == 1:
        return PartialAttention(splits.out[0], splits.lse[0])
    num_heads, q_len, head_dim = queries.shape[1:]
    num_kv_heads = (offsets.shape[0] - 1) // num_documents
    out, lse = torch.empty_like(splits.out[0]), torch.empty_like(splits.lse[0])
    with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
        _merge_splits[(lse.numel(),)](
            splits.out,
            splits.lse,
            offsets,
            out,
            lse,
            q_len,
            num_heads,
            num_kv_heads,
            lse.numel() // num_documents,
            len(splits.out),
            splits.keys_per_split,
            GROUP=num_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            DIM_TILE=max(16, triton.next_power_of_2(head_dim)),
            SPLIT_TILE=split_tile(len(splits.out)),
            OVERLAPS=launches_early(queries.device),
            SETTLED=settled,
            num_warps=4 if len(splits.out) <= 16 else 8,
            **launch_options(queries.device),
        )
    return PartialAttention(out, lse)


class Splits(NamedTuple):
    """Attention over the kept keys in splits of each head, not merged yet.

    Split s holds keys s * keys_per_split onwards of every head that has as many, the last split all the rest; of heads
    that have fewer keys nothing is written there, and what is there is not read.
    """

    out: torch.Tensor  # (num_splits, batch, num_heads, q_len, head_dim) float32, normalised by itself
    lse: torch.Tensor  # (num_splits, batch, num_heads, q_len) float32, natural logarithm
    offsets: torch.Tensor  # (num_documents * num_kv_heads + 1,) int32
    keys_per_split: int
    num_documents: int = 1


def attend_splits(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    biases: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scaling: float,
    max_head_length: int,
    num_documents: int = 1,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    keys_per_split: int | None = None,
    settled: bool = False,
) -> Splits:
    """Do what `biased_decode` does, up to the merge of the splits: arguments and errors as there, one launch."""
    _check_inputs(queries, keys, values, biases, offsets, max_head_length, num_documents, scales, keys_per_split)
    batch, num_heads, q_len, head_dim = queries.shape
    num_kv_heads = (offsets.shape[0] - 1) // num_documents
    group = num_heads // num_kv_heads
    num_rows, total_rows = batch // num_documents * group * q_len, batch * num_heads * q_len
    multiprocessors, shared_bytes = _machine(queries.device)
    few_keys = len(keys) <= FEW_KEYS * BLOCKS_PER_MULTIPROCESSOR * multiprocessors
    tiles = choose_tiles(max(1, num_rows), head_dim, queries.element_size(), shared_bytes, few_keys=few_keys)
    num_row_tiles = triton.cdiv(num_rows, tiles.row_tile)
    if keys_per_split is None:
        keys_per_split = choose_keys_per_split(
            keys.shape[0], num_documents * num_kv_heads, num_row_tiles, tiles.key_tile, multiprocessors
        )
    num_splits = max(1, triton.cdiv(max_head_length, keys_per_split))
    split_out = torch.empty((num_splits, batch, num_heads, q_len, head_dim), dtype=torch.float32, device=queries.device)
    split_lse = torch.empty(split_out.shape[:-1], dtype=torch.float32, device=queries.device)
    if total_rows:
        with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
            _attend_splits[(num_row_tiles, num_documents * num_kv_heads, num_splits)](
                queries,
                keys,
                values,
                biases,
                *(scales or (biases, biases)),
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
                num_kv_heads,
                total_rows,
                keys_per_split,
                GROUP=group,
                HEAD_DIM=head_dim,
                DIM_TILE=tiles.dim_tile,
                ROW_TILE=tiles.row_tile,
                KEY_TILE=tiles.key_tile,
                SCALED=scales is not None,
                ONE_TILE=keys_per_split == tiles.key_tile,
                PRODUCT_TYPE=_product_type(queries.dtype),
                OVERLAPS=launches_early(queries.device),
                SETTLED=settled,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
                **launch_options(queries.device),
            )
    return Splits(split_out, split_lse, offsets, keys_per_split, num_documents)


def choose_tiles(
    num_rows: int, head_dim: int, element_bytes: int, shared_bytes: int, *, few_keys: bool = False
) -> Tiles:
    """Return the tiles for ``num_rows`` rows of a KV head; a block may use ``shared_bytes`` of memory.

    ``few_keys``: a tile is nearly all that a block gets. For few rows it is then twice as long and has twice as many
    warps: fewer splits are merged, and more reads are on their way at once (found by trying on an H100).
    """
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    # fp32 products run on the ordinary arithmetic units, whose operands fill the registers: smaller tiles
    tile_elements, longest = (4096, 32) if element_bytes == 4 else (16384, 128)
    row_tile = max(16, min(triton.next_power_of_2(num_rows), tile_elements // dim_tile, longest))
    key_bytes = 2 * dim_tile * element_bytes
    widens = few_keys and element_bytes == 2 and row_tile == 16
    key_tile = min(max(16, (1 + widens) * KEY_TILE_BYTES // key_bytes), longest, 8192 // row_tile)
    row_bytes = row_tile * dim_tile * (element_bytes + 4)  # queries, and the sums on their way out
    num_stages = min(1 + max(0, shared_bytes - row_bytes) // (key_tile * key_bytes), 2 if few_keys else 3)
    num_warps = 8 if row_tile * dim_tile >= 64 * 256 or widens else 4
    return Tiles(row_tile, key_tile, dim_tile, num_warps, num_stages)


def split_tile(num_splits: int) -> int:
    """Return how many splits a program merges at once: what a token waits for is one read after another."""
    return max(2, min(int(triton.next_power_of_2(num_splits)), MERGED_SPLITS))


def choose_keys_per_split(
    num_kept: int, num_heads: int, num_row_tiles: int, key_tile: int, multiprocessors: int
) -> int:
    """Return the length of a split, a multiple of ``key_tile``, with which all heads fill the device once.

    Splits are equally long whatever head they belong to: heads of unequal lengths load the device evenly. The last one
    of a head is half full on average.
    """
    blocks = BLOCKS_PER_MULTIPROCESSOR * multiprocessors
    blocks -= min(blocks // 2, num_heads * num_row_tiles // 2)
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
    num_documents: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
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
        if scales is None and tensor.dtype != queries.dtype:
            raise ValueError(f"{name} must have the type of the queries, {queries.dtype}, not {tensor.dtype}.")
        if scales is not None and tensor.dtype != torch.int8:
            raise ValueError(f"{name} must be int8 where there are scales, not {tensor.dtype}.")
    num_kept, num_heads, num_all_heads = keys.shape[0], queries.shape[1], offsets.numel() - 1
    for name, tensor in zip(("key scales", "value scales"), scales or (), strict=False):
        if tensor.shape != (num_kept,) or tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be ({num_kept},) float32, not {tuple(tensor.shape)} {tensor.dtype}.")
    if num_documents < 1 or len(queries) % num_documents:
        raise ValueError(f"The batch must be a multiple of num_documents={num_documents}, not {len(queries)}.")
    if biases.shape != (num_kept,) or biases.dtype != torch.float32:
        raise ValueError(f"biases must be ({num_kept},) float32, not {tuple(biases.shape)} {biases.dtype}.")
    if offsets.dim() != 1 or num_all_heads < 1 or num_all_heads % num_documents or offsets.dtype != torch.int32:
        wanted = "(num_kv_heads + 1,)" if num_documents == 1 else f"({num_documents} * num_kv_heads + 1,)"
        raise ValueError(f"offsets must be {wanted} int32, not {tuple(offsets.shape)} {offsets.dtype}.")
    num_kv_heads = num_all_heads // num_documents
    if num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, not {num_heads}.")
    shared = {"keys": keys, "values": values, "biases": biases, "offsets": offsets}
    shared |= dict(zip(("key scales", "value scales"), scales or (), strict=False))
    for name, tensor in shared.items():
        if tensor.device != queries.device:
            raise ValueError(f"{name} must be on {queries.device} like the queries, not on {tensor.device}.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() once, before the first step.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
    if queries.stride(3) != 1 and head_dim > 1:
        raise ValueError("The last dimension of queries must be contiguous; call .contiguous() first.")
    if max_head_length * num_all_heads < num_kept:
        heads = f"{num_all_heads} heads"
        raise ValueError(f"max_head_length={max_head_length} is too short for {num_kept} keys in {heads}.")
    if keys_per_split is not None and keys_per_split < 1:
        raise ValueError(f"keys_per_split must be at least 1, not {keys_per_split}.")
