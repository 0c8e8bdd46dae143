"""Knows the Triton kernel that turns queries and keys by their positions. Knows no model and no attention.

Rotary position embedding (Su et al., arXiv 2104.09864, section 3.2), with component d paired with d + HEAD_DIM / 2:

    out_d = x_d cos_d - x_{d + D/2} sin_d   for d < D/2,   out_d = x_d cos_d + x_{d - D/2} sin_d   for the others

The sum is rounded to the type of x, and so are the products unless the compiler joins them with it, which is more
exact. One launch turns queries and keys of all heads, and writes them with consecutive rows of a head. Where a model
normalises them first (Henry et al., arXiv 2010.04245, by the root mean square here), the same launch does.

Twin: `reference_rotary.rotate_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from compactor_kernels.launching import gdc_launch_dependents, gdc_wait, launch_options, launches_early

MAX_HEAD_DIM = 512
TILE_ELEMENTS = 2048  # of half a tile of rows


@triton.jit
def _turn(first, second, cos, sin, SIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return first * cos + SIGN * second * sin, each step rounded to the type of ``first``."""
    kind = first.dtype
    left = (first.to(tl.float32) * cos.to(tl.float32)).to(kind)
    right = (second.to(tl.float32) * sin.to(tl.float32)).to(kind)
    return (left.to(tl.float32) + SIGN * right.to(tl.float32)).to(kind)


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "num_heads", "stride_cos_batch"])
def _rotate(  # type: ignore[no-untyped-def]
    queries,  # (batch, num_heads, num_rows, HEAD_DIM), any strides but 1 between the elements of a vector
    keys,  # (batch, num_kv_heads, num_rows, HEAD_DIM)
    cos,  # (batch or 1, num_rows, HEAD_DIM)
    sin,
    query_weight,  # (HEAD_DIM,), like key_weight and epsilon not read unless HAS_NORM
    key_weight,
    epsilon,
    out_queries,  # contiguous
    out_keys,
    num_rows,
    num_heads,
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_cos_batch,
    HEAD_DIM: tl.constexpr,
    HALF_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Turn a tile of rows of one head; grid (row tile, head of the queries and then of the keys, sequence)."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)).to(tl.int64)
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, HALF_TILE)
    exists = (rows < num_rows)[:, None] & (dims < half)[None, :]
    angles = batch * stride_cos_batch + rows[:, None] * HEAD_DIM + dims[None, :]
    cos_low = tl.load(cos + angles, mask=exists)
    cos_high = tl.load(cos + angles + half, mask=exists)
    sin_low = tl.load(sin + angles, mask=exists)
    sin_high = tl.load(sin + angles + half, mask=exists)
    if head < num_heads:
        source = queries + batch * stride_query_batch + head * stride_query_head + rows[:, None] * stride_query_row
        weight = query_weight
        target = out_queries + ((batch * num_heads + head) * num_rows + rows[:, None]) * HEAD_DIM
    else:
        own = head - num_heads
        source = keys + batch * stride_key_batch + own * stride_key_head + rows[:, None] * stride_key_row
        weight = key_weight
        target = out_keys + ((batch * (tl.num_programs(1) - num_heads) + own) * num_rows + rows[:, None]) * HEAD_DIM
    low = tl.load(source + dims[None, :], mask=exists)
    high = tl.load(source + dims[None, :] + half, mask=exists)
    if HAS_NORM:
        kind = low.dtype
        wide_low = tl.where(exists, low.to(tl.float32), 0.0)
        wide_high = tl.where(exists, high.to(tl.float32), 0.0)
        squares = tl.sum(wide_low * wide_low + wide_high * wide_high, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + epsilon)[:, None]
        in_half = dims < half
        low_weight = tl.load(weight + dims, mask=in_half, other=0.0).to(tl.float32)[None, :]
        high_weight = tl.load(weight + dims + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
        low = (wide_low * scale * low_weight).to(kind)
        high = (wide_high * scale * high_weight).to(kind)
    tl.store(target + dims[None, :], _turn(low, high, cos_low, sin_low, -1.0), mask=exists)
    tl.store(target + dims[None, :] + half, _turn(high, low, cos_high, sin_high, 1.0), mask=exists)


def rotate(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    epsilon: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys turned by the angles of their rows, contiguous; equation in the module.

    queries: (batch, num_heads, num_rows, head_dim), keys: (batch, num_kv_heads, num_rows, head_dim), float32, float16
    or bfloat16, vectors contiguous; head_dim even. cos, sin: (batch or 1, num_rows, head_dim) of the same type,
    contiguous. ``norm_weights``: of queries and of keys, (head_dim,) each of the same type: every vector is first
    normalised by its root mean square (with ``epsilon``), scaled and rounded. Launches on the current stream of the
    tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(queries, keys, cos, sin, norm_weights)
    batch, num_heads, num_rows, head_dim = queries.shape
    out_queries, out_keys = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (queries, keys))
    half_tile = max(8, triton.next_power_of_2(head_dim // 2))
    row_tile = max(1, min(triton.next_power_of_2(max(1, num_rows)), TILE_ELEMENTS // half_tile))
    if queries.numel() or keys.numel():
        with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
            _rotate[(triton.cdiv(num_rows, row_tile), num_heads + keys.shape[1], batch)](
                queries,
                keys,
                cos,
                sin,
                *(norm_weights or (cos, cos)),
                epsilon,
                out_queries,
                out_keys,
                num_rows,
                num_heads,
                *queries.stride()[:3],
                *keys.stride()[:3],
                cos.stride(0) if len(cos) > 1 else 0,
                HEAD_DIM=head_dim,
                HALF_TILE=half_tile,
                ROW_TILE=row_tile,
                HAS_NORM=norm_weights is not None,
                OVERLAPS=launches_early(queries.device),
                num_warps=4 if row_tile * half_tile >= 512 else 1,
                **launch_options(queries.device),
            )
    return out_queries, out_keys


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_rotate, triton.JITFunction)


def _check_inputs(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    if queries.dim() != 4:
        raise ValueError(f"queries must be (batch, num_heads, num_rows, head_dim), not {tuple(queries.shape)}.")
    batch, _, num_rows, head_dim = queries.shape
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be even, 2 to {MAX_HEAD_DIM}, not {head_dim}.")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float32, float16 or bfloat16, not {queries.dtype}.")
    if keys.dim() != 4 or keys.shape[0] != batch or keys.shape[2:] != queries.shape[2:]:
        raise ValueError(f"keys must be ({batch}, num_kv_heads, {num_rows}, {head_dim}), not {tuple(keys.shape)}.")
    for name, part in (("cos", cos), ("sin", sin)):
        if part.shape not in ((batch, num_rows, head_dim), (1, num_rows, head_dim)) or cos.shape != sin.shape:
            raise ValueError(f"{name} must be ({batch} or 1, {num_rows}, {head_dim}), not {tuple(part.shape)}.")
        if not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
    given = {"keys": keys, "cos": cos, "sin": sin}
    for name, part in zip(("query weight", "key weight"), norm_weights or (), strict=False):
        if part.shape != (head_dim,) or not part.is_contiguous():
            raise ValueError(f"{name} must be ({head_dim},), contiguous, not {tuple(part.shape)}.")
        given[name] = part
    for name, part in given.items():
        if part.dtype != queries.dtype:
            raise ValueError(f"{name} must have the type of the queries, {queries.dtype}, not {part.dtype}.")
        if part.device != queries.device:
            raise ValueError(f"{name} must be on {queries.device} like the queries, not on {part.device}.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
    for name, part in (("queries", queries), ("keys", keys)):
        if part.stride(3) != 1:
            raise ValueError(f"The last dimension of {name} must be contiguous; call .contiguous() first.")
