"""Knows the Triton kernel for attention of new tokens to the tail of their own sequence. Knows no cache and no model.

For a query q_i of a sequence, whose own key stands in column e_i of the sequence's tail, and the keys k_j of its KV
head, of which the first ``padding`` columns are hidden:

    tail_i = log sum_{padding <= j <= e_i} exp(s q_i.k_j),   lse_i = log(exp(tail_i) + exp(d_i))
    out_i = sum_j exp(s q_i.k_j - lse_i) v_j + exp(d_i - lse_i) o_i

with o_i and d_i the output and the log-sum-exp of attention to what precedes the tail, computed elsewhere
(FlashAttention-2, arXiv 2307.08691, section 3.1). A program takes one sequence and one KV head, with all query heads
of the group and their new tokens packed into one tile of rows: a key is read once per tile, columns that no row sees
are not read at all, and neither scores nor the tail's own output reach memory.

Twin: `reference_tail.tail_decode_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.reference import PartialAttention

MAX_HEAD_DIM = 256
FEW_ROWS = 16  # the least that matrix units take: memory is what a program waits for

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["tail_end_number", "q_len", "tail_len", "num_kv_heads"])
def _tail_decode(  # type: ignore[no-untyped-def]
    queries,  # (batch, num_heads, q_len, HEAD_DIM), any strides but 1 between the elements of a vector
    keys,  # (batch, num_kv_heads, tail_len, HEAD_DIM), like values
    values,
    padding,  # (batch,) int64
    tail_end,  # (1,) int64, not read unless END_ON_DEVICE
    document_out,  # (batch, num_heads, q_len, HEAD_DIM) fp32, like document_lse not read unless HAS_DOCUMENT
    document_lse,  # (batch, num_heads, q_len) fp32
    out,  # (batch, q_len, num_heads, HEAD_DIM)
    lse,  # (batch, num_heads, q_len) fp32
    scaling,
    tail_end_number,
    q_len,
    tail_len,
    num_kv_heads,
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_value_batch,
    stride_value_head,
    stride_value_row,
    END_ON_DEVICE: tl.constexpr,
    HAS_DOCUMENT: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
):
    """Attend with one tile of rows of one KV head of one sequence; grid (sequence and KV head, row tile)."""
    sequence = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % num_kv_heads
    first_row = tl.program_id(1) * ROW_TILE
    num_rows = GROUP * q_len
    rows = first_row + tl.arange(0, ROW_TILE)  # heads of a position lie together: a tile sees few different positions
    row_exists = rows < num_rows
    position = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, DIM_TILE)
    dim_exists = dims < HEAD_DIM
    in_rows = row_exists[:, None] & dim_exists[None, :]

    query_rows = sequence * stride_query_batch + head.to(tl.int64) * stride_query_head
    query_rows += position.to(tl.int64) * stride_query_row
    query_tile = tl.load(queries + query_rows[:, None] + dims[None, :], mask=in_rows, other=0.0)
    query_tile = query_tile.to(PRODUCT_TYPE)  # (ROW_TILE, DIM_TILE)
    num_heads = num_kv_heads * GROUP
    lse_rows = (sequence * num_heads + head) * q_len + position
    given_lse = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    given_out = tl.zeros((ROW_TILE, DIM_TILE), tl.float32)
    if HAS_DOCUMENT:  # asked for here, needed after the keys
        given_lse = tl.load(document_lse + lse_rows, mask=row_exists, other=float("-inf")) * LOG2_E
        given_out = tl.load(document_out + lse_rows[:, None] * HEAD_DIM + dims[None, :], mask=in_rows, other=0.0)

    if END_ON_DEVICE:
        tail_end_number = tl.load(tail_end)
    row_end = tail_end_number.to(tl.int32) + position  # the last column that a row sees
    last_position = (tl.minimum(first_row + ROW_TILE, num_rows) - 1) // GROUP
    stop = tl.minimum(tail_end_number.to(tl.int32) + last_position + 1, tail_len)
    start = tl.maximum(tl.load(padding + sequence).to(tl.int32), 0)

    # products in PRODUCT_TYPE with fp32 sums; scores, weights, maximum and mass in fp32, scores in base 2
    in_tile = tl.arange(0, KEY_TILE)
    keys += sequence * stride_key_batch + kv_head.to(tl.int64) * stride_key_head
    values += sequence * stride_value_batch + kv_head.to(tl.int64) * stride_value_head
    key_elements = in_tile[:, None] * stride_key_row + dims[None, :]
    value_elements = in_tile[:, None] * stride_value_row + dims[None, :]
    peak = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    mass = tl.zeros((ROW_TILE,), tl.float32)
    total = tl.zeros((ROW_TILE, DIM_TILE), tl.float32)
    for offset in range(0, stop - start, KEY_TILE):
        column = start.to(tl.int64) + offset
        in_keys = (in_tile < stop - start - offset)[:, None] & dim_exists[None, :]
        key_tile = tl.load(keys + column * stride_key_row + key_elements, mask=in_keys, other=0.0)
        key_tile = key_tile.to(PRODUCT_TYPE)
        scores = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")  # (ROW_TILE, KEY_TILE)
        last_seen = tl.minimum(row_end, stop - 1) - start - offset
        scores = tl.where(in_tile[None, :] <= last_seen[:, None], scores * (scaling * LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row may see nothing
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(peak - shift)
        mass = mass * shrink + tl.sum(weights, 1)
        # weights are rounded to PRODUCT_TYPE for the second product; their sum is not
        value_tile = tl.load(values + column * stride_value_row + value_elements, mask=in_keys, other=0.0)
        value_tile = value_tile.to(PRODUCT_TYPE)
        total = tl.dot(weights.to(PRODUCT_TYPE), value_tile, total * shrink[:, None], input_precision="ieee")
        peak = new_peak

    new_peak = tl.maximum(peak, given_lse)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - shift)
    given_weight = tl.exp2(given_lse - shift)
    mass = mass * shrink + given_weight
    total = total * shrink[:, None] + given_out * given_weight[:, None]
    divisor = tl.where(mass > 0.0, mass, 1.0)  # nothing seen: out 0 and lse -inf
    out_rows = ((sequence * q_len + position) * num_heads + head) * HEAD_DIM
    result = total / divisor[:, None]
    tl.store(out + out_rows[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=in_rows)
    tl.store(lse + lse_rows, (new_peak + tl.log2(divisor)) * LN_2, mask=row_exists)


class Tiles(NamedTuple):
    """How one launch cuts its work."""

    row_tile: int  # rows of a program
    key_tile: int  # keys held at once
    dim_tile: int  # head_dim rounded up to a power of two; all three are at least 16, for the matrix units
    num_warps: int
    num_stages: int  # tiles in flight


def tail_decode(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    tail_end: int | torch.Tensor,
    *,
    scaling: float,
    document: tuple[torch.Tensor, torch.Tensor] | None = None,
    out_type: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
) -> PartialAttention:
    """Attend to each sequence's own tail and merge with a given attention; equations and sources in the module.

    queries: (batch, num_heads, q_len, head_dim), float32, float16 or bfloat16, head_dim at most 256; keys, values:
    (batch, num_kv_heads, tail_len, head_dim) of the same type; all three with any strides but a contiguous last
    dimension. Query head h reads KV head h // (num_heads // num_kv_heads). padding: (batch,) int64, contiguous, the
    columns at the start of each sequence that nobody sees. ``tail_end``: the column of the first query's own key, a
    number or a (1,) int64 tensor on the device, which is trusted; row i sees the columns padding <= c <= tail_end + i,
    and what lies in the others does not matter. ``document``: out (batch, num_heads, q_len, head_dim) and lse (batch,
    num_heads, q_len), float32, contiguous, to be merged with; lse -inf where it holds no key. ``out_type``: float32 or
    the type of the queries. ``tiles`` overrides the choice of tiles and changes no more than the order of sums.

    Returns out in ``out_type``, (batch, num_heads, q_len, head_dim), a view of contiguous (batch, q_len, num_heads,
    head_dim), and lse (batch, num_heads, q_len) float32, natural logarithm; a row that sees nothing at all gives out 0
    and lse -inf. Products are in the type of the queries with float32 sums, all else is float32 up to the rounding of
    the result. Deterministic. Launches once on the current stream of the tensors' device without a device sync, so it
    can be captured in a CUDA graph, which then follows ``tail_end`` on the device. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(queries, keys, values, padding, tail_end, document, out_type)
    batch, num_heads, q_len, head_dim = queries.shape
    num_kv_heads, tail_len = keys.shape[1], keys.shape[2]
    out = torch.empty((batch, q_len, num_heads, head_dim), dtype=out_type, device=queries.device)
    lse = torch.empty((batch, num_heads, q_len), dtype=torch.float32, device=queries.device)
    if lse.numel():
        num_rows = q_len * num_heads // num_kv_heads
        tiles = tiles or choose_tiles(num_rows, head_dim, queries.element_size())
        document_out, document_lse = (out, lse) if document is None else document
        on_device = isinstance(tail_end, torch.Tensor)
        with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
            _tail_decode[(batch * num_kv_heads, triton.cdiv(num_rows, tiles.row_tile))](
                queries,
                keys,
                values,
                padding,
                tail_end if on_device else padding,
                document_out,
                document_lse,
                out,
                lse,
                scaling,
                0 if on_device else tail_end,
                q_len,
                tail_len,
                num_kv_heads,
                *queries.stride()[:3],
                *keys.stride()[:3],
                *values.stride()[:3],
                END_ON_DEVICE=on_device,
                HAS_DOCUMENT=document is not None,
                GROUP=num_heads // num_kv_heads,
                HEAD_DIM=head_dim,
                DIM_TILE=tiles.dim_tile,
                ROW_TILE=tiles.row_tile,
                KEY_TILE=tiles.key_tile,
                PRODUCT_TYPE=_product_type(queries.dtype),
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
    return PartialAttention(out.transpose(1, 2), lse)


def choose_tiles(num_rows: int, head_dim: int, element_bytes: int) -> Tiles:
    """Return the tiles for ``num_rows`` rows of a KV head of one sequence."""
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    # fp32 products run on the ordinary arithmetic units, whose operands fill the registers: smaller tiles
    tile_elements, longest = (2048, 32) if element_bytes == 4 else (8192, 64)
    row_tile = max(FEW_ROWS, min(triton.next_power_of_2(num_rows), tile_elements // dim_tile, longest))
    # few rows: small tiles of keys, so that several programs fit on a multiprocessor, and more of them in flight
    key_bytes, num_stages = (16 * 1024, 3) if row_tile == FEW_ROWS else (32 * 1024, 2)
    key_tile = max(16, min(key_bytes // (2 * dim_tile * element_bytes), longest))
    return Tiles(row_tile, key_tile, dim_tile, 4, num_stages)


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_tail_decode, triton.JITFunction)


def _product_type(dtype: torch.dtype) -> tl.dtype:
    if dtype == torch.bfloat16 and is_interpreted():
        return tl.float32  # the interpreter multiplies the bit patterns of bf16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _check_inputs(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    tail_end: int | torch.Tensor,
    document: tuple[torch.Tensor, torch.Tensor] | None,
    out_type: torch.dtype,
) -> None:
    if queries.dim() != 4:
        raise ValueError(f"queries must be (batch, num_heads, q_len, head_dim), not {tuple(queries.shape)}.")
    batch, num_heads, q_len, head_dim = queries.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {head_dim}; use the reference for it.")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float32, float16 or bfloat16, not {queries.dtype}.")
    if out_type not in (torch.float32, queries.dtype):
        raise ValueError(f"out_type must be float32 or the type of the queries, {queries.dtype}, not {out_type}.")
    for name, part in (("keys", keys), ("values", values)):
        if part.dim() != 4 or part.shape != (batch, *keys.shape[1:3], head_dim):
            wanted = f"({batch}, num_kv_heads, tail_len, {head_dim})"
            raise ValueError(f"{name} must be {wanted}, keys and values alike, not {tuple(part.shape)}.")
        if part.dtype != queries.dtype:
            raise ValueError(f"{name} must have the type of the queries, {queries.dtype}, not {part.dtype}.")
    num_kv_heads, tail_len = keys.shape[1:3]
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, not {num_heads}.")
    if padding.shape != (batch,) or padding.dtype != torch.int64:
        raise ValueError(f"padding must be ({batch},) int64, not {tuple(padding.shape)} {padding.dtype}.")
    shared = {"keys": keys, "values": values, "padding": padding}
    contiguous = {"padding": padding}
    if isinstance(tail_end, torch.Tensor):
        if tail_end.shape != (1,) or tail_end.dtype != torch.int64:
            raise ValueError(f"tail_end must be (1,) int64, not {tuple(tail_end.shape)} {tail_end.dtype}.")
        shared["tail_end"] = tail_end
    elif not 0 <= tail_end <= tail_len - q_len:
        raise ValueError(f"tail_end must be 0 to {tail_len - q_len}, tail_len less q_len, not {tail_end}.")
    if document is not None:
        shapes = {"document out": (batch, num_heads, q_len, head_dim), "document lse": (batch, num_heads, q_len)}
        for (name, shape), part in zip(shapes.items(), document, strict=True):
            if part.shape != shape or part.dtype != torch.float32:
                raise ValueError(f"{name} must be {shape} float32, not {tuple(part.shape)} {part.dtype}.")
            shared[name] = contiguous[name] = part
    for name, part in shared.items():
        if part.device != queries.device:
            raise ValueError(f"{name} must be on {queries.device} like the queries, not on {part.device}.")
    for name, part in contiguous.items():
        if not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
    for name, part in (("queries", queries), ("keys", keys), ("values", values)):
        if part.stride(3) != 1 and head_dim > 1:
            raise ValueError(f"The last dimension of {name} must be contiguous; call .contiguous() first.")
