"""Knows the Triton kernel that multiplies a few rows with weight matrices. Knows no model.

    y_i = W x_i + b,   or   y_i = act(G x_i) * (U x_i)   of a gated feed-forward layer (Shazeer, arXiv 2002.05202)

With a row or a few, every weight is read once and used once or a few times: the bandwidth of memory is the limit, so
the ordinary arithmetic units do, and what matters is that enough reads are on their way at every moment. Several
matrices that the same rows meet are one launch, and the first weights are asked for before the rows are there
(`launching`).
Products are exact, sums float32; a program sums TILE_IN products per component in parallel, and those at the end.

Twins: `reference_gemv.gemv_reference`, `reference_gemv.gated_gemv_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.launching import gdc_launch_dependents, gdc_wait, launch_options, launches_early

MAX_ROWS = 2  # beyond, matrix units and larger tiles are faster
MAX_PARTS = 3  # matrices of one launch
ACTIVATIONS = ("silu", "gelu_tanh")
INTERPRETED_MULTIPROCESSORS = 4  # what the interpreter pretends to have

GELU_OUTER = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


# Sizes that vary from call to call are not specialised: every specialisation is another compilation.
@triton.jit(do_not_specialize=["num_rows", "size_0", "size_1", "size_2"])
def _gemv(  # type: ignore[no-untyped-def]
    rows,  # (num_rows, NUM_INPUTS)
    weights_0,  # (size_0, NUM_INPUTS), like the others; of parts that there are not, anything
    weights_1,
    weights_2,
    biases_0,  # (size_0,), not read unless HAS_BIAS
    biases_1,
    biases_2,
    out_0,  # (num_rows, size_0)
    out_1,
    out_2,
    num_rows,
    size_0,
    size_1,
    size_2,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SETTLED: tl.constexpr,
):
    """Make TILE_OUT components of all rows; grid (tiles of the first matrix, then of the others)."""
    if OVERLAPS:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    weights, biases, out, size = weights_0, biases_0, out_0, size_0
    if PARTS > 1:
        tiles = tl.cdiv(size_0, TILE_OUT)
        if tile >= tiles:
            weights, biases, out, size = weights_1, biases_1, out_1, size_1
            tile -= tiles
            if PARTS > 2:
                tiles = tl.cdiv(size_1, TILE_OUT)
                if tile >= tiles:
                    weights, biases, out, size = weights_2, biases_2, out_2, size_2
                    tile -= tiles
    components = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    exists = components < size
    inputs, own = tl.arange(0, TILE_IN), tl.arange(0, ROW_TILE)
    there = own < num_rows
    from_weights = weights + components.to(tl.int64)[:, None] * NUM_INPUTS + inputs[None, :]
    elements = own.to(tl.int64)[:, None] * NUM_INPUTS + inputs[None, :]
    if OVERLAPS and not SETTLED:
        gdc_wait()
    tile_weights = tl.load(from_weights, mask=exists[:, None] & (inputs < NUM_INPUTS)[None, :], other=0.0)
    if OVERLAPS and SETTLED:
        gdc_wait()
    tile_rows = tl.load(rows + elements, mask=there[:, None] & (inputs < NUM_INPUTS)[None, :], other=0.0)
    x = tile_rows.to(tl.float32)[:, None, :]
    sums = x * tile_weights.to(tl.float32)[None, :, :]
    for start in tl.static_range(TILE_IN, NUM_INPUTS, TILE_IN):
        inputs += TILE_IN
        elements += TILE_IN
        inside = exists[:, None] & (inputs < NUM_INPUTS)[None, :]
        tile_weights = tl.load(from_weights + start, mask=inside, other=0.0)
        tile_rows = tl.load(rows + elements, mask=there[:, None] & (inputs < NUM_INPUTS)[None, :], other=0.0)
        x = tile_rows.to(tl.float32)[:, None, :]
        sums += x * tile_weights.to(tl.float32)[None, :, :]
    result = tl.sum(sums, 2)  # (ROW_TILE, TILE_OUT)
    if HAS_BIAS:
        result += tl.load(biases + components, mask=exists, other=0.0).to(tl.float32)[None, :]
    to = out + own.to(tl.int64)[:, None] * size + components[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=there[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["num_rows", "size"])
def _gated_gemv(  # type: ignore[no-untyped-def]
    rows,  # (num_rows, NUM_INPUTS)
    gate,  # (size, NUM_INPUTS)
    up,
    out,  # (num_rows, size)
    num_rows,
    size,
    IS_SILU: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    SETTLED: tl.constexpr,
):
    """Make TILE_OUT components of all rows; grid (tiles of components,)."""
    if OVERLAPS:
        gdc_launch_dependents()
    components = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    exists = components < size
    inputs, own = tl.arange(0, TILE_IN), tl.arange(0, ROW_TILE)
    there = own < num_rows
    of_weights = components.to(tl.int64)[:, None] * NUM_INPUTS + inputs[None, :]
    elements = own.to(tl.int64)[:, None] * NUM_INPUTS + inputs[None, :]
    inside = exists[:, None] & (inputs < NUM_INPUTS)[None, :]
    if OVERLAPS and not SETTLED:
        gdc_wait()
    tile_gate = tl.load(gate + of_weights, mask=inside, other=0.0)
    tile_up = tl.load(up + of_weights, mask=inside, other=0.0)
    if OVERLAPS and SETTLED:
        gdc_wait()
    tile_rows = tl.load(rows + elements, mask=there[:, None] & (inputs < NUM_INPUTS)[None, :], other=0.0)
    x = tile_rows.to(tl.float32)[:, None, :]
    sum_gate = x * tile_gate.to(tl.float32)[None, :, :]
    sum_up = x * tile_up.to(tl.float32)[None, :, :]
    for start in tl.static_range(TILE_IN, NUM_INPUTS, TILE_IN):
        inputs += TILE_IN
        elements += TILE_IN
        inside = exists[:, None] & (inputs < NUM_INPUTS)[None, :]
        tile_gate = tl.load(gate + of_weights + start, mask=inside, other=0.0)
        tile_up = tl.load(up + of_weights + start, mask=inside, other=0.0)
        tile_rows = tl.load(rows + elements, mask=there[:, None] & (inputs < NUM_INPUTS)[None, :], other=0.0)
        x = tile_rows.to(tl.float32)[:, None, :]
        sum_gate += x * tile_gate.to(tl.float32)[None, :, :]
        sum_up += x * tile_up.to(tl.float32)[None, :, :]
    score, factor = tl.sum(sum_gate, 2), tl.sum(sum_up, 2)  # (ROW_TILE, TILE_OUT)
    if IS_SILU:
        score /= 1.0 + tl.exp(-score)
    else:
        score = score / (1.0 + tl.exp((score + score * score * score * GELU_CUBE) * -GELU_OUTER))
    to = out + own.to(tl.int64)[:, None] * size + components[None, :]
    tl.store(to, (score * factor).to(out.dtype.element_ty), mask=there[:, None] & exists[None, :])


class Tiles(NamedTuple):
    """How one launch cuts its work."""

    row_tile: int  # rows, rounded up to a power of two
    tile_out: int  # components of a program
    tile_in: int  # inputs held at once
    num_warps: int


def gemv(
    rows: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None = None,
    *,
    settled: bool = False,
    tiles: Tiles | None = None,
) -> list[torch.Tensor]:
    """Return W x + b of every row x, for one to three matrices W; equations in the module.

    rows: (num_rows, num_inputs), at most `MAX_ROWS`, float32, float16 or bfloat16; weights: (size, num_inputs) each;
    biases: (size,) of each or None; all contiguous and of one type. ``settled``: nothing that is still running on the
    stream writes weights; they are then read before it ends. ``tiles`` overrides the choice of tiles. Returns
    (num_rows, size) for each matrix, in the type of the rows, summed in float32. Deterministic. Launches once on the
    current stream of the tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(rows, weights, biases)
    (num_rows, num_inputs), sizes = rows.shape, [len(weight) for weight in weights]
    outs = [torch.empty(num_rows, size, dtype=rows.dtype, device=rows.device) for size in sizes]
    absent = MAX_PARTS - len(weights)
    nothing = [weights[0]] * absent  # not read
    if num_rows and sum(sizes):
        early = launches_early(rows.device)
        tiles = tiles or choose_tiles(num_rows, num_inputs, sum(sizes), 1, _multiprocessors(rows.device))
        with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
            _gemv[(sum(triton.cdiv(size, tiles.tile_out) for size in sizes),)](
                rows,
                *weights,
                *nothing,
                *(biases or weights),
                *nothing,
                *outs,
                *outs[:1] * absent,
                num_rows,
                *sizes,
                *[0] * absent,
                PARTS=len(weights),
                HAS_BIAS=biases is not None,
                ROW_TILE=tiles.row_tile,
                TILE_OUT=tiles.tile_out,
                TILE_IN=tiles.tile_in,
                NUM_INPUTS=num_inputs,
                OVERLAPS=early,
                SETTLED=settled,
                num_warps=tiles.num_warps,
                **launch_options(rows.device),
            )
    return outs


def gated_gemv(
    rows: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: str,
    settled: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Return act(G x) * (U x) of every row x; equation in the module.

    rows: (num_rows, num_inputs), gate and up: (size, num_inputs), as in `gemv`; activation: one of `ACTIVATIONS` (gelu
    in its tanh form). Returns (num_rows, size) in the type of the rows; all before is float32. The rest as in `gemv`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    _check_inputs(rows, (gate, up), None)
    if gate.shape != up.shape:
        raise ValueError(f"up must be {tuple(gate.shape)} like gate, not {tuple(up.shape)}.")
    (num_rows, num_inputs), size = rows.shape, len(gate)
    out = torch.empty(num_rows, size, dtype=rows.dtype, device=rows.device)
    if out.numel():
        early = launches_early(rows.device)
        tiles = tiles or choose_tiles(num_rows, num_inputs, size, 2, _multiprocessors(rows.device))
        with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
            _gated_gemv[(triton.cdiv(size, tiles.tile_out),)](
                rows,
                gate,
                up,
                out,
                num_rows,
                size,
                IS_SILU=activation == "silu",
                ROW_TILE=tiles.row_tile,
                TILE_OUT=tiles.tile_out,
                TILE_IN=tiles.tile_in,
                NUM_INPUTS=num_inputs,
                OVERLAPS=early,
                SETTLED=settled,
                num_warps=tiles.num_warps,
                **launch_options(rows.device),
            )
    return out


def choose_tiles(num_rows: int, num_inputs: int, size: int, matrices: int, multiprocessors: int) -> Tiles:
    """Return the tiles for ``size`` components of ``num_rows`` rows, each a product with ``matrices`` matrices.

    Found by trying on an H100. A program has all its first reads on their way before the rows are there, so that small
    tiles of long pieces do best; where there are few components, longer pieces make up for fewer programs.
    """
    many = size >= 4 * 8 * multiprocessors
    if num_rows > 1:
        tile_out, tile_in, num_warps = (8 // matrices, 512, 4) if many else (8 // matrices, 1024, 8)
    elif matrices > 1:
        tile_out, tile_in, num_warps = 2, 512, 2
    else:
        tile_out, tile_in, num_warps = (4, 1024, 4) if many else (4, 2048, 4)
    while tile_out > 1 and size < multiprocessors * tile_out:
        tile_out //= 2
    return Tiles(
        triton.next_power_of_2(num_rows), tile_out, min(tile_in, triton.next_power_of_2(num_inputs)), num_warps
    )


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_gemv, triton.JITFunction)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_inputs(rows: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> None:
    if rows.dim() != 2 or len(rows) > MAX_ROWS:
        raise ValueError(f"rows must be (num_rows, num_inputs), at most {MAX_ROWS}, not {tuple(rows.shape)}.")
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"rows must be float32, float16 or bfloat16, not {rows.dtype}.")
    if not 1 <= len(weights) <= MAX_PARTS:
        raise ValueError(f"weights must be 1 to {MAX_PARTS} matrices, not {len(weights)}.")
    named = {"rows": rows}
    for number, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != rows.shape[1] or not rows.shape[1]:
            raise ValueError(f"weights must be (size, {rows.shape[1]}), not {tuple(weight.shape)}.")
        named[f"weights {number}"] = weight
    if biases is not None:
        if len(biases) != len(weights):
            raise ValueError(f"biases must be {len(weights)}, as many as weights, not {len(biases)}.")
        for number, (bias, weight) in enumerate(zip(biases, weights, strict=True)):
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"biases must be ({len(weight)},), not {tuple(bias.shape)}.")
            named[f"biases {number}"] = bias
    for name, part in named.items():
        if part.dtype != rows.dtype:
            raise ValueError(f"{name} must have the type of the rows, {rows.dtype}, not {part.dtype}.")
        if part.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device} like the rows, not on {part.device}.")
        if not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
    if not rows.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {rows.device}; use the reference there.")
