"""Knows the Triton kernel for the targets of the least squares of the values. Knows no attention and no fit.

For row i of a head, with its exact output o_i, what prefix and local keys give, e_i, at the weight g_i that they have
beside the kept keys, the root r_i of its weight and the product P_i of its weighted shares with the keys' own values:

    t_i = r_i (o_i - g_i e_i) - P_i,   energy = sum_i ||t_i||^2

The matrix units multiply float16: with the unit u of the head, t / u is written as two numbers of 11 bits,

    first = float16(t / u),   second = float16(2048 (t / u - first)),   t = u (first + second / 2048)

o and e are read where they lie, of the rows that are asked for, so that neither a copy of them nor the targets in
float32 reach memory: each vector is read once and its halves are written once. Every program leaves its own part of
the energy, which is added up in float64.

Twin: `reference_targets.value_targets_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels import reference_targets
from compactor_kernels.reference_targets import ALIGNMENT, ValueTargets

MAX_HEAD_DIM = 256
TILE_ELEMENTS = 4096  # numbers of one tensor that a program holds

SECOND_HALF = tl.constexpr(reference_targets.SECOND_HALF)
LARGEST_HALF = tl.constexpr(reference_targets.LARGEST_HALF)


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "num_chosen"])
def _value_targets(  # type: ignore[no-untyped-def]
    product,  # (num_heads, num_rows, HEAD_DIM), any strides but 1 between the elements of a vector
    out,  # (num_kv_heads, group, rows of all, HEAD_DIM), like near
    near,
    near_weights,  # (num_heads, num_rows) fp32
    root_weights,  # (num_heads, num_rows) fp32
    inverse_units,  # (num_heads,) fp32
    heads,  # (num_heads,) int64, not read unless SOME_HEADS
    rows,  # (num_chosen,) int64, not read unless SOME_ROWS
    halves,  # (num_heads, num_rows, WIDTH) fp16
    energies,  # (num_heads, blocks of rows) fp64
    num_rows,  # group * num_chosen
    num_chosen,
    stride_product_head,
    stride_product_row,
    stride_out_head,
    stride_out_member,
    stride_out_row,
    stride_near_head,
    stride_near_member,
    stride_near_row,
    SOME_HEADS: tl.constexpr,
    SOME_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the halves of one block of rows and its energy; grid (block of rows, head)."""
    head = tl.program_id(1).to(tl.int64)
    in_block = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    exists = in_block < num_rows
    dims = tl.arange(0, DIM_TILE)
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    member = (in_block // num_chosen).to(tl.int64)  # of the group: its rows lie one after another
    row = (in_block % num_chosen).to(tl.int64)
    if SOME_ROWS:
        row = tl.load(rows + row, mask=exists, other=0)
    kv_head = head
    if SOME_HEADS:
        kv_head = tl.load(heads + head)

    flat_row = head * num_rows + in_block
    near_weight = tl.load(near_weights + flat_row, mask=exists, other=0.0)
    root = tl.load(root_weights + flat_row, mask=exists, other=0.0)
    out_rows = kv_head * stride_out_head + member * stride_out_member + row * stride_out_row
    near_rows = kv_head * stride_near_head + member * stride_near_member + row * stride_near_row
    product_rows = head * stride_product_head + in_block.to(tl.int64) * stride_product_row
    wanted = tl.load(out + out_rows[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    others = tl.load(near + near_rows[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    given = tl.load(product + product_rows[:, None] + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    targets = (wanted - near_weight[:, None] * others) * root[:, None] - given  # fp32, (ROW_TILE, DIM_TILE)

    energy = tl.sum(tl.sum(targets * targets, 1).to(tl.float64), 0)
    tl.store(energies + head * tl.num_programs(0) + tl.program_id(0), energy)

    scaled = targets * tl.load(inverse_units + head)
    # what is no number stays none: the caller says so
    scaled = tl.minimum(scaled, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    scaled = tl.maximum(scaled, -LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    scaled = tl.where(tl.abs(targets) == float("inf"), float("nan"), scaled)
    first = scaled.to(tl.float16)
    second = ((scaled - first.to(tl.float32)) * SECOND_HALF).to(tl.float16)
    place = halves + flat_row[:, None] * WIDTH + dims[None, :]
    tl.store(place, first, mask=inside)
    tl.store(place + HEAD_DIM, second, mask=inside)


class Tiles(NamedTuple):
    """How one launch cuts its work; tiles are powers of two."""

    row_tile: int  # rows of a program
    dim_tile: int  # head_dim rounded up
    num_warps: int


def value_targets(
    product: torch.Tensor,
    out: torch.Tensor,
    near: torch.Tensor,
    near_weights: torch.Tensor,
    root_weights: torch.Tensor,
    units: torch.Tensor,
    *,
    heads: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> ValueTargets:
    """Return what kept keys with their own values leave to be explained; equations and sources in the module.

    out, near: (num_kv_heads, group, num_all, head_dim), head_dim at most 256; ``heads`` (num_heads,) int64 and ``rows``
    (num_chosen,) int64, both contiguous, say which KV heads and rows are meant, and are trusted; None is all of them
    (a range is a view). n = group * num_chosen rows of a head, those of a query head one after another. product:
    (num_heads, n, head_dim). These three are float32, float16 or bfloat16, each of its own, with any strides but a
    contiguous last dimension. near_weights, root_weights: (num_heads, n) float32, contiguous; units: (num_heads,)
    float32, contiguous, above 0. ``tiles`` overrides the choice of tiles and changes no more than the order of sums.

    Returns halves (num_heads, n, 2 head_dim) float16, a view of rows that are aligned for the matrix units, and energy
    (num_heads,) float64. Targets are float32, and the energy is theirs, before they are rounded: sums of a vector are
    float32, all further ones float64. The halves hold 22 bits of a target from 2^-14 to 65,504 units (a power of two,
    else the division costs another rounding); below, their error is at most 2^-36 units. A target beyond 65,504 units
    is cut off there; one that is infinite or no number gives NaN. Deterministic. Launches once on the current stream of
    the tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(product, out, near, near_weights, root_weights, units, heads, rows)
    num_heads, num_rows, head_dim = product.shape
    num_chosen = out.shape[2] if rows is None else len(rows)
    tiles = tiles or choose_tiles(head_dim)
    width = triton.cdiv(2 * head_dim, ALIGNMENT) * ALIGNMENT
    blocks = triton.cdiv(num_rows, tiles.row_tile)
    halves = torch.empty(num_heads, num_rows, width, dtype=torch.float16, device=out.device)
    energies = torch.empty(num_heads, blocks, dtype=torch.float64, device=out.device)
    if energies.numel():
        with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
            _value_targets[(blocks, num_heads)](
                product,
                out,
                near,
                near_weights,
                root_weights,
                units.reciprocal(),
                units if heads is None else heads,
                units if rows is None else rows,
                halves,
                energies,
                num_rows,
                num_chosen,
                *product.stride()[:2],
                *out.stride()[:3],
                *near.stride()[:3],
                SOME_HEADS=heads is not None,
                SOME_ROWS=rows is not None,
                HEAD_DIM=head_dim,
                DIM_TILE=tiles.dim_tile,
                ROW_TILE=tiles.row_tile,
                WIDTH=width,
                num_warps=tiles.num_warps,
            )
    return ValueTargets(halves[..., : 2 * head_dim], energies.sum(1))


def choose_tiles(head_dim: int) -> Tiles:
    """Return the tiles for a size of values: what a program holds fits its registers."""
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    return Tiles(TILE_ELEMENTS // dim_tile, dim_tile, 4)


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_value_targets, triton.JITFunction)


def _check_inputs(
    product: torch.Tensor,
    out: torch.Tensor,
    near: torch.Tensor,
    near_weights: torch.Tensor,
    root_weights: torch.Tensor,
    units: torch.Tensor,
    heads: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    if out.dim() != 4:
        raise ValueError(f"out must be (num_kv_heads, group, num_rows, head_dim), not {tuple(out.shape)}.")
    num_kv_heads, group, num_all, head_dim = out.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {head_dim}; use the reference for it.")
    if near.shape != out.shape:
        raise ValueError(f"near must be {tuple(out.shape)} like out, not {tuple(near.shape)}.")
    for name, index in (("heads", heads), ("rows", rows)):
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
            raise ValueError(f"{name} must be one-dimensional int64, not {tuple(index.shape)} {index.dtype}.")
    num_heads = num_kv_heads if heads is None else len(heads)
    num_rows = group * (num_all if rows is None else len(rows))
    if product.shape != (num_heads, num_rows, head_dim):
        raise ValueError(f"product must be {(num_heads, num_rows, head_dim)}, not {tuple(product.shape)}.")
    vectors = {"product": product, "out": out, "near": near}
    for name, part in vectors.items():
        if part.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} must be float32, float16 or bfloat16, not {part.dtype}.")
    numbers = {"near_weights": near_weights, "root_weights": root_weights, "units": units}
    for name, part in numbers.items():
        shape = (num_heads,) if part is units else (num_heads, num_rows)
        if part.shape != shape or part.dtype != torch.float32:
            raise ValueError(f"{name} must be {shape} float32, not {tuple(part.shape)} {part.dtype}.")
    chosen = {name: index for name, index in (("heads", heads), ("rows", rows)) if index is not None}
    for name, part in {**vectors, **numbers, **chosen}.items():
        if part.device != out.device:
            raise ValueError(f"{name} must be on {out.device} like out, not on {part.device}.")
    for name, part in {**numbers, **chosen}.items():
        if not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
    if not out.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {out.device}; use the reference there.")
    for name, part in vectors.items():
        if part.stride(-1) != 1 and head_dim > 1:
            raise ValueError(f"The last dimension of {name} must be contiguous; call .contiguous() first.")
