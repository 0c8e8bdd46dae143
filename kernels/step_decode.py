"""Knows the Triton kernel that ends the attention of one decoding step. Knows no cache and no model.

A step brings one token a sequence. Attention over the kept keys has been computed in splits (`biased_decode`); what is
left is little, and would be three launches that each take longer than their work: the new keys and values are written
into the tail's buffers, the queries attend to the tail, and all parts are merged by log-sum-exp (FlashAttention-2,
arXiv 2307.08691, section 3.1):

    lse_i = log( sum_s exp(lse_si) + sum_{j <= tail_end} exp(scaling q_i.k_j) )
    out_i = sum_s exp(lse_si - lse_i) out_si + sum_j exp(scaling q_i.k_j - lse_i) v_j

A program is one query head of one sequence; the tail is short, so that reading it once per head of a group is cheap. It
takes the new key and value as they are given, not from the buffer, where the first head of a group writes them.

Twin: `reference_step.step_decode_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from compactor_kernels.biased_decode import Splits, split_tile
from compactor_kernels.launching import gdc_launch_dependents, gdc_wait, launch_options, launches_early

MAX_HEAD_DIM = 256
TILE_ELEMENTS = 8192  # of keys, like values, held at once
NUM_WARPS = 8

LOG2_E = tl.constexpr(1.4426950408889634)


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_heads", "num_splits", "keys_per_split", "total_rows"])
def _step_decode(  # type: ignore[no-untyped-def]
    queries,  # (batch, num_heads, HEAD_DIM), any strides but 1 between the elements of a vector
    new_keys,  # (batch, num_kv_heads, HEAD_DIM), like new_values
    new_values,
    keys,  # (batch, num_kv_heads, capacity, HEAD_DIM), like values
    values,
    padding,  # (batch,) int64
    tail_end,  # (1,) int64
    split_out,  # (num_splits, batch * num_heads, HEAD_DIM) fp32
    split_lse,  # (num_splits, batch * num_heads) fp32
    offsets,  # (num_kv_heads + 1,) int32
    out,  # (batch, num_heads, HEAD_DIM)
    scaling,
    num_heads,
    num_splits,
    keys_per_split,
    total_rows,
    stride_query_batch,
    stride_query_head,
    stride_new_key_batch,
    stride_new_key_head,
    stride_new_value_batch,
    stride_new_value_head,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_value_batch,
    stride_value_head,
    stride_value_row,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Finish one query head of one sequence, all in fp32; grid (batch * num_heads,)."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    sequence, head = row // num_heads, row % num_heads
    kv_head = head // GROUP
    dims = tl.arange(0, DIM_TILE)
    dim_exists = dims < HEAD_DIM
    end = tl.load(tail_end)
    start = tl.maximum(tl.load(padding + sequence), 0)
    query = tl.load(
        queries + sequence * stride_query_batch + head * stride_query_head + dims, mask=dim_exists, other=0.0
    )
    from_new_keys = new_keys + sequence * stride_new_key_batch + kv_head * stride_new_key_head
    from_new_values = new_values + sequence * stride_new_value_batch + kv_head * stride_new_value_head
    new_key = tl.load(from_new_keys + dims, mask=dim_exists, other=0.0)
    new_value = tl.load(from_new_values + dims, mask=dim_exists, other=0.0)
    keys += sequence * stride_key_batch + kv_head * stride_key_head
    values += sequence * stride_value_batch + kv_head * stride_value_head
    if head % GROUP == 0:
        tl.store(keys + end * stride_key_row + dims, new_key, mask=dim_exists)
        tl.store(values + end * stride_value_row + dims, new_value, mask=dim_exists)

    num_kept = tl.load(offsets + kv_head + 1) - tl.load(offsets + kv_head)
    written = tl.minimum(tl.cdiv(num_kept, keys_per_split), num_splits)

    # scores, maximum and mass in base 2; the token's own key is always seen
    query = query.to(tl.float32) * (scaling * LOG2_E)
    peak = tl.sum(query * new_key.to(tl.float32), 0)
    mass = 1.0
    total = new_value.to(tl.float32)
    in_tile = tl.arange(0, KEY_TILE)
    for first in range(start, end, KEY_TILE):
        columns = first + in_tile
        seen = columns < end
        in_keys = seen[:, None] & dim_exists[None, :]
        key_tile = tl.load(keys + columns[:, None] * stride_key_row + dims[None, :], mask=in_keys, other=0.0)
        value_tile = tl.load(values + columns[:, None] * stride_value_row + dims[None, :], mask=in_keys, other=0.0)
        scores = tl.where(seen, tl.sum(key_tile.to(tl.float32) * query[None, :], 1), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - new_peak), tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(weights, 0)
        total = total * shrink + tl.sum(weights[:, None] * value_tile.to(tl.float32), 0)
        peak = new_peak

    for first_split in range(0, written, SPLIT_TILE):
        splits = first_split + tl.arange(0, SPLIT_TILE)
        exists = splits < written
        split_rows = splits.to(tl.int64) * total_rows + row
        lse_tile = tl.load(split_lse + split_rows, mask=exists, other=float("-inf")) * LOG2_E
        in_splits = exists[:, None] & dim_exists[None, :]
        out_tile = tl.load(split_out + split_rows[:, None] * HEAD_DIM + dims[None, :], mask=in_splits, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse_tile, 0))
        weights, shrink = tl.exp2(lse_tile - new_peak), tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(weights, 0)
        total = total * shrink + tl.sum(weights[:, None] * out_tile, 0)
        peak = new_peak
    tl.store(out + row * HEAD_DIM + dims, (total / mass).to(out.dtype.element_ty), mask=dim_exists)


def step_decode(
    queries: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    tail_end: torch.Tensor,
    splits: Splits,
    *,
    scaling: float,
) -> torch.Tensor:
    """Append one token to every tail, and attend to tail and kept keys; equations and sources in the module.

    queries: (batch, num_heads, 1, head_dim), float32, float16 or bfloat16, head_dim at most 256; new_keys, new_values:
    (batch, num_kv_heads, 1, head_dim); keys, values: the buffers, (batch, num_kv_heads, capacity, head_dim); all of one
    type, any strides with a contiguous last dimension. Query head h reads KV head h // (num_heads // num_kv_heads).
    padding: (batch,) int64, contiguous, columns at the start of each tail that nobody sees; tail_end: (1,) int64, the
    column of the new token, below the capacity (it stays on the device and is trusted); what lies in columns after it
    does not matter. ``splits``: attention of the same queries over the kept keys, from `attend_splits`.

    Writes column ``tail_end`` of the buffers. Returns (batch, num_heads, 1, head_dim) in the type of the queries, a
    view of contiguous (batch, 1, num_heads, head_dim); all before is float32. Deterministic. Launches once on the
    current stream of the tensors' device without a device sync, so it can be captured in a CUDA graph, which follows
    ``tail_end`` on the device. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(queries, new_keys, new_values, keys, values, padding, tail_end, splits)
    batch, num_heads, _, head_dim = queries.shape
    out = torch.empty((batch, 1, num_heads, head_dim), dtype=queries.dtype, device=queries.device)
    if out.numel():
        dim_tile = max(16, triton.next_power_of_2(head_dim))
        with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
            _step_decode[(batch * num_heads,)](
                queries,
                new_keys,
                new_values,
                keys,
                values,
                padding,
                tail_end,
                splits.out,
                splits.lse,
                splits.offsets,
                out,
                scaling,
                num_heads,
                len(splits.out),
                splits.keys_per_split,
                batch * num_heads,
                *queries.stride()[:2],
                *new_keys.stride()[:2],
                *new_values.stride()[:2],
                *keys.stride()[:3],
                *values.stride()[:3],
                GROUP=num_heads // keys.shape[1],
                HEAD_DIM=head_dim,
                DIM_TILE=dim_tile,
                KEY_TILE=TILE_ELEMENTS // dim_tile,
                SPLIT_TILE=split_tile(len(splits.out)),
                OVERLAPS=launches_early(queries.device),
                num_warps=NUM_WARPS,
                **launch_options(queries.device),
            )
    return out.transpose(1, 2)


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_step_decode, triton.JITFunction)


def _check_inputs(
    queries: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    padding: torch.Tensor,
    tail_end: torch.Tensor,
    splits: Splits,
) -> None:
    if queries.dim() != 4 or queries.shape[2] != 1:
        raise ValueError(f"queries must be (batch, num_heads, 1, head_dim), not {tuple(queries.shape)}.")
    batch, num_heads, _, head_dim = queries.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {head_dim}; use the reference for it.")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float32, float16 or bfloat16, not {queries.dtype}.")
    num_kv_heads = len(splits.offsets) - 1
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, not {num_heads}.")
    for name, part in (("new_keys", new_keys), ("new_values", new_values)):
        if part.shape != (batch, num_kv_heads, 1, head_dim):
            raise ValueError(f"{name} must be ({batch}, {num_kv_heads}, 1, {head_dim}), not {tuple(part.shape)}.")
    for name, part in (("keys", keys), ("values", values)):
        if part.dim() != 4 or part.shape != (batch, num_kv_heads, keys.shape[2], head_dim) or not part.shape[2]:
            wanted = f"({batch}, {num_kv_heads}, capacity, {head_dim})"
            raise ValueError(f"{name} must be {wanted}, keys and values alike, not {tuple(part.shape)}.")
    if padding.shape != (batch,) or padding.dtype != torch.int64 or not padding.is_contiguous():
        raise ValueError(f"padding must be ({batch},) int64, contiguous, not {tuple(padding.shape)} {padding.dtype}.")
    if tail_end.shape != (1,) or tail_end.dtype != torch.int64:
        raise ValueError(f"tail_end must be (1,) int64, not {tuple(tail_end.shape)} {tail_end.dtype}.")
    if splits.num_documents != 1:
        raise ValueError(f"splits must be of one document, not of {splits.num_documents}.")
    if splits.out.shape[1:] != queries.shape or splits.lse.shape != splits.out.shape[:-1]:
        raise ValueError(f"splits must be of queries {tuple(queries.shape)}, not {tuple(splits.out.shape[1:])}.")
    vectors = {"queries": queries, "new_keys": new_keys, "new_values": new_values, "keys": keys, "values": values}
    for name, part in vectors.items():
        if part.dtype != queries.dtype:
            raise ValueError(f"{name} must have the type of the queries, {queries.dtype}, not {part.dtype}.")
        if part.stride(3) != 1 and head_dim > 1:
            raise ValueError(f"The last dimension of {name} must be contiguous; call .contiguous() first.")
    for name, part in {**vectors, "padding": padding, "tail_end": tail_end, "splits": splits.out}.items():
        if part.device != queries.device:
            raise ValueError(f"{name} must be on {queries.device} like the queries, not on {part.device}.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
