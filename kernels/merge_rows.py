"""Knows the Triton kernels that merge attention parts row by row, in one pass over memory. Knows no keys and no fit.

A part is the output o and the log-sum-exp l of attention to some of a row's keys. With near parts a and b (own segment
and prefix) and the document's part d,

    near = (exp(l_a) o_a + exp(l_b) o_b) / exp(l_near),   l_near = log(exp(l_a) + exp(l_b))
    out = (exp(l_near) near + exp(l_d) o_d) / exp(lse),   lse = log(exp(l_near) + exp(l_d))

the maximum subtracted before the exponential (FlashAttention-2, arXiv 2307.08691, section 3.1). `merge_rows` writes
near and out; `merge_scored` writes out, rounded, and sums up by KV head what the document gives to it, with row weights
w and m = exp(l_d - lse): w m ||o_d - out||^2, w m, w m^2 o_d and w m^2; `merge_measured` merges with a given near part
and sums up w ||out - exact||^2. A program takes a tile of rows of one head; its sums are written and added afterwards,
so that equal calls give equal bits.

Twins: `reference_merge.merge_rows_reference`, `merge_scored_reference`, `merge_measured_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.reference_merge import MeasuredRows, MergedRows, Part, ScoredRows

MAX_HEAD_DIM = 256
TILE_ELEMENTS = 4096  # of a part that a program holds: 32 numbers a thread
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    part, kv_head, member, rows, in_tile, stride_kv_head, stride_member, stride_row, DIM_TILE: tl.constexpr
):  # fmt: skip
    """Load rows (int64) of one head, (ROW_TILE, DIM_TILE) fp32; 0 where there are none."""
    part += kv_head * stride_kv_head + member * stride_member
    elements = (rows * stride_row)[:, None] + tl.arange(0, DIM_TILE)[None, :]
    return tl.load(part + elements, mask=in_tile, other=0.0).to(tl.float32)


@triton.jit
def _weigh(lse_a, lse_b):  # type: ignore[no-untyped-def]
    """Return the log-sum-exp of two parts and their weights: -inf, 0 and 0 where neither saw anything. What is no
    number stays none."""
    largest = tl.maximum(lse_a, lse_b, propagate_nan=tl.PropagateNan.ALL)
    blind = largest == float("-inf")
    shift = tl.where(blind, 0.0, largest)
    weight_a = tl.exp(lse_a - shift)
    weight_b = tl.exp(lse_b - shift)
    total = tl.where(blind, 1.0, weight_a + weight_b)
    return largest + tl.log(total), weight_a / total, weight_b / total


# Sizes that vary from layer to layer are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _merge(  # type: ignore[no-untyped-def]
    own,  # (num_kv_heads, GROUP, num_rows, HEAD_DIM), any strides but 1 in a vector, like prefix and document
    own_lse,  # (num_kv_heads, GROUP, num_rows) fp32, like all lse and root_weights
    prefix,  # like prefix_lse not read unless HAS_PREFIX
    prefix_lse,
    document,
    document_lse,
    root_weights,  # not read unless SCORED
    near,  # (num_kv_heads, GROUP, num_rows, HEAD_DIM) fp32, like near_lse not written if SCORED
    near_lse,
    out,  # (num_kv_heads, GROUP, num_rows, HEAD_DIM), if SCORED (num_rows, num_kv_heads, GROUP, HEAD_DIM)
    lse,
    sums,  # (3, tiles of rows, num_kv_heads, GROUP) fp32: contrast, mass, centre_weight; not written unless SCORED
    centre,  # (tiles of rows, num_kv_heads, GROUP, HEAD_DIM) fp32, not written unless SCORED
    num_rows,
    num_heads,  # num_kv_heads * GROUP
    stride_own_kv_head,
    stride_own_member,
    stride_own_row,
    stride_prefix_kv_head,
    stride_prefix_member,
    stride_prefix_row,
    stride_document_kv_head,
    stride_document_member,
    stride_document_row,
    HAS_PREFIX: tl.constexpr,
    SCORED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Merge one tile of rows of one head; grid (tiles of rows * num_heads,), heads first."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    rows = (program // num_heads).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    exists = rows < num_rows
    dims = tl.arange(0, DIM_TILE)
    in_tile = exists[:, None] & (dims < HEAD_DIM)[None, :]
    kv_head, member = head // GROUP, head % GROUP
    row = head * num_rows + rows

    near_tile = _load_tile(
        own, kv_head, member, rows, in_tile, stride_own_kv_head, stride_own_member, stride_own_row, DIM_TILE
    )
    document_tile = _load_tile(
        document, kv_head, member, rows, in_tile,
        stride_document_kv_head, stride_document_member, stride_document_row, DIM_TILE,
    )  # fmt: skip
    lse_row = tl.load(own_lse + row, mask=exists, other=0.0)
    if HAS_PREFIX:
        prefix_tile = _load_tile(
            prefix, kv_head, member, rows, in_tile,
            stride_prefix_kv_head, stride_prefix_member, stride_prefix_row, DIM_TILE,
        )  # fmt: skip
        prefix_row = tl.load(prefix_lse + row, mask=exists, other=0.0)
        lse_row, own_weight, prefix_weight = _weigh(lse_row, prefix_row)
        near_tile = near_tile * own_weight[:, None] + prefix_tile * prefix_weight[:, None]
    vectors = row[:, None] * HEAD_DIM + dims[None, :]
    if not SCORED:
        tl.store(near + vectors, near_tile, mask=in_tile)
        tl.store(near_lse + row, lse_row, mask=exists)

    document_row = tl.load(document_lse + row, mask=exists, other=0.0)
    lse_row, near_weight, mass = _weigh(lse_row, document_row)
    result = near_tile * near_weight[:, None] + document_tile * mass[:, None]
    tl.store(lse + row, lse_row, mask=exists)
    if SCORED:
        vectors = (rows * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + vectors, result.to(out.dtype.element_ty), mask=in_tile)

    if SCORED:
        root = tl.load(root_weights + row, mask=exists, other=0.0)
        weighted = root * root * mass
        by_mass = weighted * mass
        difference = document_tile - result
        contrast = weighted * tl.sum(difference * difference, 1)
        num_programs = tl.num_programs(0)
        tl.store(sums + program, tl.sum(contrast, 0))
        tl.store(sums + num_programs + program, tl.sum(weighted, 0))
        tl.store(sums + 2 * num_programs + program, tl.sum(by_mass, 0))
        towards = tl.sum(document_tile * by_mass[:, None], 0)
        tl.store(centre + program.to(tl.int64) * HEAD_DIM + dims, towards, mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows", "num_heads", "step"])
def _measure(  # type: ignore[no-untyped-def]
    document,  # (num_kv_heads, GROUP, num_rows, HEAD_DIM), any strides but 1 in a vector, like near and exact
    document_lse,  # (num_kv_heads, GROUP, num_rows) fp32, like near_lse and root_weights
    near,
    near_lse,
    exact,
    root_weights,
    out,  # (num_rows, num_kv_heads, GROUP, HEAD_DIM)
    errors,  # (2, tiles of rows, num_kv_heads, GROUP) fp32: of all rows, of every step-th
    num_rows,
    num_heads,  # num_kv_heads * GROUP
    step,
    stride_document_kv_head,
    stride_document_member,
    stride_document_row,
    stride_near_kv_head,
    stride_near_member,
    stride_near_row,
    stride_exact_kv_head,
    stride_exact_member,
    stride_exact_row,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Merge and measure one tile of rows of one head; grid (tiles of rows * num_heads,), heads first."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    rows = (program // num_heads).to(tl.int64) * ROW_TILE + tl.arange(0, ROW_TILE)
    exists = rows < num_rows
    dims = tl.arange(0, DIM_TILE)
    in_tile = exists[:, None] & (dims < HEAD_DIM)[None, :]
    kv_head, member = head // GROUP, head % GROUP
    row = head * num_rows + rows

    document_tile = _load_tile(
        document, kv_head, member, rows, in_tile,
        stride_document_kv_head, stride_document_member, stride_document_row, DIM_TILE,
    )  # fmt: skip
    near_tile = _load_tile(
        near, kv_head, member, rows, in_tile, stride_near_kv_head, stride_near_member, stride_near_row, DIM_TILE
    )
    exact_tile = _load_tile(
        exact, kv_head, member, rows, in_tile, stride_exact_kv_head, stride_exact_member, stride_exact_row, DIM_TILE
    )
    document_row = tl.load(document_lse + row, mask=exists, other=0.0)
    near_row = tl.load(near_lse + row, mask=exists, other=0.0)
    root = tl.load(root_weights + row, mask=exists, other=0.0)
    _, document_weight, near_weight = _weigh(document_row, near_row)
    result = document_tile * document_weight[:, None] + near_tile * near_weight[:, None]
    vectors = (rows * num_heads + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + vectors, result.to(out.dtype.element_ty), mask=in_tile)

    difference = (result - exact_tile) * root[:, None]
    error = tl.sum(difference * difference, 1)
    tl.store(errors + program, tl.sum(error, 0))
    thinned = tl.where(rows % step == 0, error, 0.0)
    tl.store(errors + tl.num_programs(0) + program, tl.sum(thinned, 0))


class Tiles(NamedTuple):
    """How one launch cuts its work."""

    row_tile: int  # rows of a program, a power of two
    dim_tile: int  # head_dim rounded up to a power of two
    num_warps: int


def merge_rows(near: Sequence[Part], document: Part, *, tiles: Tiles | None = None) -> MergedRows:
    """Merge one or two near parts and the document's, in float32; equations and sources in the module.

    A part: output (num_kv_heads, group, num_rows, head_dim), float32, float16 or bfloat16, all parts alike, head_dim at
    most 256, any strides but a contiguous last dimension; and log-sum-exp (num_kv_heads, group, num_rows) float32,
    natural logarithm, any strides, -inf for a row that sees no key of the part, whose output must then be finite.
    ``tiles`` overrides the choice of tiles and changes nothing but the order of sums, here and below.

    Returns near, near_lse, out and lse, float32, contiguous; a row that sees nothing gives out 0 and lse -inf. Every
    number is read and written once. Deterministic. Launches on the current stream of the tensors' device without a
    device sync. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_near(near)
    _check_parts([("document", document), *_named(near)], TYPES)
    shape, device = document[0].shape, document[0].device
    merged = MergedRows(*(torch.empty(s, dtype=torch.float32, device=device) for s in 2 * (shape, shape[:3])))
    if merged.out.numel():
        _launch_merge(near, document, None, merged, merged.out, merged.lse, tiles or choose_tiles(shape[3]))
    return merged


def merge_scored(
    near: Sequence[Part], document: Part, root_weights: torch.Tensor, *, tiles: Tiles | None = None
) -> ScoredRows:
    """Merge for the scores of keys; parts, failures and the launch as `merge_rows`.

    root_weights: (num_kv_heads, group, num_rows) float32, any strides, square roots of the row weights. Returns out in
    the type of the parts, (num_kv_heads, group, num_rows, head_dim), a view of contiguous (num_rows, num_kv_heads,
    group, head_dim); lse; and the sums of each KV head, from float32 outputs, float32. A row that sees nothing adds
    nothing.
    """
    _check_near(near)
    _check_parts([("document", document), *_named(near)], TYPES)
    _check_rows("root_weights", root_weights, document[0])
    shape, device = document[0].shape, document[0].device
    num_kv_heads, group, num_rows, head_dim = shape
    tiles = tiles or choose_tiles(head_dim)
    out = torch.empty(num_rows, num_kv_heads, group, head_dim, dtype=document[0].dtype, device=device)
    lse = torch.empty(shape[:3], dtype=torch.float32, device=device)
    blocks = triton.cdiv(num_rows, tiles.row_tile), num_kv_heads, group
    sums = torch.empty(3, *blocks, dtype=torch.float32, device=device)
    centre = torch.empty(*blocks, head_dim, dtype=torch.float32, device=device)
    if out.numel():
        _launch_merge(near, document, (root_weights, sums, centre), None, out, lse, tiles)
    contrast, mass, centre_weight = sums.sum((1, 3))
    return ScoredRows(out.permute(1, 2, 0, 3), lse, contrast, mass, centre.sum((0, 2)), centre_weight)


def merge_measured(
    document: Part,
    near: Part,
    exact: torch.Tensor,
    root_weights: torch.Tensor,
    *,
    step: int = 1,
    out_type: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
) -> MeasuredRows:
    """Merge two parts and measure how far the result is from ``exact``; failures and the launch as `merge_rows`.

    Parts as in `merge_rows`, but float32; exact: (num_kv_heads, group, num_rows, head_dim) float32, any strides but a
    contiguous last dimension; root_weights as in `merge_scored`. Returns out in ``out_type`` (float32, float16 or
    bfloat16), laid out as by `merge_scored`, and the weighted squared errors of the float32 outputs of each KV head,
    (num_kv_heads,) float64: of all rows, and of the rows 0, step, 2 step ..., times ``step``.
    """
    _check_parts([("document", document), ("near", near)], (torch.float32,))
    _check_vectors("exact", exact, document[0])
    _check_rows("root_weights", root_weights, document[0])
    if step < 1:
        raise ValueError(f"step must be at least 1, not {step}.")
    if out_type not in TYPES:
        raise ValueError(f"out_type must be float32, float16 or bfloat16, not {out_type}.")
    num_kv_heads, group, num_rows, head_dim = exact.shape
    tiles = tiles or choose_tiles(head_dim)
    out = torch.empty(num_rows, num_kv_heads, group, head_dim, dtype=out_type, device=exact.device)
    blocks = triton.cdiv(num_rows, tiles.row_tile), num_kv_heads, group
    errors = torch.empty(2, *blocks, dtype=torch.float32, device=exact.device)
    if out.numel():
        with torch.cuda.device(exact.device) if exact.is_cuda else nullcontext():
            _measure[(errors[0].numel(),)](
                document[0],
                document[1].contiguous(),
                near[0],
                near[1].contiguous(),
                exact,
                root_weights.contiguous(),
                out,
                errors,
                num_rows,
                num_kv_heads * group,
                step,
                *document[0].stride()[:3],
                *near[0].stride()[:3],
                *exact.stride()[:3],
                GROUP=group,
                HEAD_DIM=head_dim,
                DIM_TILE=tiles.dim_tile,
                ROW_TILE=tiles.row_tile,
                num_warps=tiles.num_warps,
            )
    total, thinned = errors.sum((1, 3), dtype=torch.float64)
    return MeasuredRows(out.permute(1, 2, 0, 3), total, step * thinned)


def choose_tiles(head_dim: int) -> Tiles:
    """Return the tiles for a size of outputs."""
    dim_tile = triton.next_power_of_2(head_dim)
    return Tiles(min(256, max(1, TILE_ELEMENTS // dim_tile)), dim_tile, 4)


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_merge, triton.JITFunction)


def _launch_merge(
    near: Sequence[Part],
    document: Part,
    scored: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    merged: MergedRows | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: Tiles,
) -> None:
    """Launch `_merge`; ``scored``: root weights, sums and centre; ``merged`` holds near and near_lse. One is None."""
    (own, own_lse), (prefix, prefix_lse) = near[0], near[-1]
    num_kv_heads, group, num_rows, head_dim = own.shape
    root_weights, sums, centre = (lse, lse, lse) if scored is None else scored
    near_out, near_lse = (out, lse) if merged is None else merged[:2]
    num_programs = triton.cdiv(num_rows, tiles.row_tile) * num_kv_heads * group
    with torch.cuda.device(own.device) if own.is_cuda else nullcontext():
        _merge[(num_programs,)](
            own,
            own_lse.contiguous(),
            prefix,
            prefix_lse.contiguous(),
            document[0],
            document[1].contiguous(),
            root_weights.contiguous(),
            near_out,
            near_lse,
            out,
            lse,
            sums,
            centre,
            num_rows,
            num_kv_heads * group,
            *own.stride()[:3],
            *prefix.stride()[:3],
            *document[0].stride()[:3],
            HAS_PREFIX=len(near) == 2,
            SCORED=scored is not None,
            GROUP=group,
            HEAD_DIM=head_dim,
            DIM_TILE=tiles.dim_tile,
            ROW_TILE=tiles.row_tile,
            num_warps=tiles.num_warps,
        )


def _named(near: Sequence[Part]) -> list[tuple[str, Part]]:
    return [(f"near part {i}", part) for i, part in enumerate(near)]


def _check_near(near: Sequence[Part]) -> None:
    if len(near) not in (1, 2):
        raise ValueError(f"There must be one or two near parts, not {len(near)}.")


def _check_parts(parts: list[tuple[str, Part]], types: tuple[torch.dtype, ...]) -> None:
    """Check parts by name; the first is what the others are compared with."""
    name, (first, _) = parts[0]
    if first.dim() != 4:
        raise ValueError(f"{name} must be (num_kv_heads, group, num_rows, head_dim), not {tuple(first.shape)}.")
    if not 1 <= first.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {first.shape[3]}; use the reference for it.")
    if first.dtype not in types:
        wanted = " or ".join(str(one).removeprefix("torch.") for one in types)
        raise ValueError(f"{name} must be {wanted}, not {first.dtype}.")
    if not first.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {first.device}; use the reference there.")
    for name, (out, lse) in parts:
        _check_vectors(name, out, first)
        _check_rows(f"the log-sum-exp of {name}", lse, first)


def _check_vectors(name: str, part: torch.Tensor, first: torch.Tensor) -> None:
    if part.shape != first.shape or part.dtype != first.dtype:
        wanted = f"{tuple(first.shape)} {first.dtype}"
        raise ValueError(f"{name} must be {wanted} like the document, not {tuple(part.shape)} {part.dtype}.")
    if part.device != first.device:
        raise ValueError(f"{name} must be on {first.device} like the document, not on {part.device}.")
    if part.stride(3) != 1 and part.shape[3] > 1:
        raise ValueError(f"The last dimension of {name} must be contiguous; call .contiguous() first.")


def _check_rows(name: str, rows: torch.Tensor, first: torch.Tensor) -> None:
    if rows.shape != first.shape[:3] or rows.dtype != torch.float32:
        raise ValueError(f"{name} must be {tuple(first.shape[:3])} float32, not {tuple(rows.shape)} {rows.dtype}.")
    if rows.device != first.device:
        raise ValueError(f"{name} must be on {first.device} like the document, not on {rows.device}.")
