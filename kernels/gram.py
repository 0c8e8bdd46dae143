"""Knows the Triton kernels for X^T X and X^T Y of many rows and few columns. Knows no fit and no weights.

For the rows x_r of X (a head's rows of a least squares problem) and y_r of Y:

    G += sum_r x_r x_r^T,   B += sum_r x_r y_r^T

The results are small and the sums are long, so the rows are cut into spans, and each span of each tile of the result is
one program (the fixed split of Osama, Merrill, Cecka, Garland and Owens, "Stream-K", PPoPP 2023). `_span_products`
leaves the product of each span, float16 with float32 sums; `_add_spans` adds the spans in float64, always in the same
order, so that equal calls give equal bits. Of X^T X only tiles that touch the lower half are computed; the upper half
is its mirror image.

Twins: `reference_gram.add_gram_reference`, `reference_gram.add_product_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

MOST_SPAN_ROWS = 8192  # rows in one float32 sum: the matrix units cut off what does not fit, which adds up
SPAN_COST = 512  # rows whose product takes as long as writing and reading the sums of one span
WAVES = 4  # more programs than these times what the device holds at once are not looked at
WORKSPACE_BYTES = 256 << 20  # of sums of spans that wait to be added; at least one span of all heads is held
ALIGNMENT = 8  # float16 numbers that are loaded at once where rows begin at multiples of 16 bytes
SPARE_BYTES = 2048  # of shared memory, besides the tiles
INTERPRETED_MULTIPROCESSORS = 4  # what the interpreter pretends to have
ADDED_LEFT, ADDED_RIGHT, ADDED_SPANS = 16, 64, 8  # block of a result that a program adds, and spans under way at once


@triton.jit
def _place_of(  # type: ignore[no-untyped-def]
    pair, num_left, num_right, SYMMETRIC: tl.constexpr, LEFT_TILE: tl.constexpr, RIGHT_TILE: tl.constexpr
):
    """Return the first row and the first column of a tile of the result, which are counted along rows of tiles."""
    if SYMMETRIC:
        left = 0
        width = (tl.minimum(num_left, LEFT_TILE) - 1) // RIGHT_TILE + 1  # tiles of this row that touch the lower half
        while pair >= width:
            pair -= width
            left += 1
            width = (tl.minimum(num_left, (left + 1) * LEFT_TILE) - 1) // RIGHT_TILE + 1
        right = pair
    else:
        width = (num_right - 1) // RIGHT_TILE + 1
        left = pair // width
        right = pair % width
    return left * LEFT_TILE, right * RIGHT_TILE


@triton.jit
def _tile_product(  # type: ignore[no-untyped-def]
    left, right, left_limit, right_limit, left_stride, right_stride, count,
    SAME: tl.constexpr, LEFT_TILE: tl.constexpr, RIGHT_TILE: tl.constexpr, ROW_TILE: tl.constexpr,
):  # fmt: skip
    """Return the product of ``count`` rows of two tiles of columns, (LEFT_TILE, RIGHT_TILE) fp32; with SAME they are
    one and are loaded once."""
    in_tile = tl.arange(0, ROW_TILE)
    left_columns = tl.arange(0, LEFT_TILE)
    right_columns = tl.arange(0, RIGHT_TILE)
    left_elements = in_tile[:, None] * left_stride + left_columns[None, :]
    right_elements = in_tile[:, None] * right_stride + right_columns[None, :]
    left_exists = (left_columns < left_limit)[None, :]
    right_exists = (right_columns < right_limit)[None, :]
    total = tl.zeros((LEFT_TILE, RIGHT_TILE), tl.float32)
    for first in range(0, count, ROW_TILE):
        row_exists = (in_tile < count - first)[:, None]
        left_part = tl.load(left + left_elements, mask=row_exists & left_exists, other=0.0)
        if SAME:
            right_part = left_part
        else:
            right_part = tl.load(right + right_elements, mask=row_exists & right_exists, other=0.0)
        total = tl.dot(tl.trans(left_part), right_part, total)
        left += ROW_TILE * left_stride
        right += ROW_TILE * right_stride
    return total


# Sizes that vary from call to call are not specialised: every specialisation is another compilation. Strides and limits
# come in groups of ALIGNMENT, a multiple that the compiler then knows of: loads take 16 bytes at once.
@triton.jit(
    do_not_specialize=[
        "left_head_groups", "right_head_groups", "left_groups", "right_groups", "left_limit_groups",
        "right_limit_groups", "num_left", "num_right", "num_rows", "first_span", "rows_per_span",
    ]
)  # fmt: skip
def _span_products(  # type: ignore[no-untyped-def]
    left,  # (num_heads, num_rows, num_left) fp16, and the next (num_heads, num_rows, num_right): the same if SYMMETRIC
    right,
    sums,  # (num_heads, num_spans, num_pairs, LEFT_TILE, RIGHT_TILE) fp32
    left_head_groups,  # from head to head, and from row to row
    right_head_groups,
    left_groups,
    right_groups,
    left_limit_groups,  # columns that may be read: those past the last one change nothing that is kept
    right_limit_groups,
    num_left,
    num_right,
    num_rows,
    first_span,
    rows_per_span,
    SYMMETRIC: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LEFT_TILE: tl.constexpr,
    RIGHT_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Multiply one span of rows for one tile of the result; grid (tile, span, head)."""
    head = tl.program_id(2).to(tl.int64)
    first_left, first_right = _place_of(tl.program_id(0), num_left, num_right, SYMMETRIC, LEFT_TILE, RIGHT_TILE)
    first_row = (first_span + tl.program_id(1)) * rows_per_span
    count = tl.minimum(rows_per_span, num_rows - first_row)
    left_stride = left_groups * ALIGNMENT
    right_stride = right_groups * ALIGNMENT
    left_limit = left_limit_groups * ALIGNMENT - first_left
    right_limit = right_limit_groups * ALIGNMENT - first_right
    left += head * left_head_groups * ALIGNMENT + first_row.to(tl.int64) * left_stride + first_left
    right += head * right_head_groups * ALIGNMENT + first_row.to(tl.int64) * right_stride + first_right
    if SYMMETRIC and LEFT_TILE == RIGHT_TILE:
        if first_left == first_right:
            total = _tile_product(
                left, right, left_limit, right_limit, left_stride, right_stride, count,
                True, LEFT_TILE, RIGHT_TILE, ROW_TILE,
            )  # fmt: skip
        else:
            total = _tile_product(
                left, right, left_limit, right_limit, left_stride, right_stride, count,
                False, LEFT_TILE, RIGHT_TILE, ROW_TILE,
            )  # fmt: skip
    else:
        total = _tile_product(
            left, right, left_limit, right_limit, left_stride, right_stride, count,
            False, LEFT_TILE, RIGHT_TILE, ROW_TILE,
        )  # fmt: skip
    place = (head * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    in_left = tl.arange(0, LEFT_TILE)[:, None]
    in_right = tl.arange(0, RIGHT_TILE)[None, :]
    tl.store(sums + place * (LEFT_TILE * RIGHT_TILE) + in_left * RIGHT_TILE + in_right, total)


@triton.jit(do_not_specialize=["num_left", "num_right", "num_spans"])
def _add_spans(  # type: ignore[no-untyped-def]
    sums,  # from `_span_products`
    result,  # (num_heads, num_left, num_right) fp32 or fp64
    num_left,
    num_right,
    num_spans,
    SYMMETRIC: tl.constexpr,
    LEFT_TILE: tl.constexpr,
    RIGHT_TILE: tl.constexpr,
    ADDED_LEFT: tl.constexpr,
    ADDED_RIGHT: tl.constexpr,
    ADDED_SPANS: tl.constexpr,
):
    """Add the spans of one block of a tile to the result, in fp64; grid (tile, block, head)."""
    head = tl.program_id(2).to(tl.int64)
    first_left, first_right = _place_of(tl.program_id(0), num_left, num_right, SYMMETRIC, LEFT_TILE, RIGHT_TILE)
    blocks_across: tl.constexpr = RIGHT_TILE // ADDED_RIGHT
    to_left = tl.program_id(1) // blocks_across * ADDED_LEFT
    to_right = tl.program_id(1) % blocks_across * ADDED_RIGHT
    if (first_left + to_left >= num_left) | (first_right + to_right >= num_right):
        return
    if SYMMETRIC:  # noqa: SIM102
        if first_left + to_left + ADDED_LEFT <= first_right + to_right:
            return
    in_left = to_left + tl.arange(0, ADDED_LEFT)
    in_right = to_right + tl.arange(0, ADDED_RIGHT)
    rows = first_left + in_left
    columns = first_right + in_right
    row_exists = rows < num_left
    column_exists = columns < num_right
    mask = row_exists[:, None] & column_exists[None, :]
    if SYMMETRIC:
        mask = mask & (rows[:, None] >= columns[None, :])

    elements = in_left[:, None] * RIGHT_TILE + in_right[None, :]
    total = tl.zeros((ADDED_LEFT, ADDED_RIGHT), tl.float64)
    for first_span in range(0, num_spans, ADDED_SPANS):
        for later in tl.static_range(ADDED_SPANS):
            span = first_span + later
            is_span = tl.full((1, 1), first_span + later, tl.int32) < num_spans
            place = (head * num_spans + span) * tl.num_programs(0) + tl.program_id(0)
            part = tl.load(sums + place * (LEFT_TILE * RIGHT_TILE) + elements, mask=is_span, other=0.0)
            total += part.to(tl.float64)

    result += head * num_left * num_right
    place_in_result = result + rows.to(tl.int64)[:, None] * num_right + columns[None, :]
    total += tl.load(place_in_result, mask=mask, other=0.0).to(tl.float64)
    tl.store(place_in_result, total, mask=mask)
    if SYMMETRIC:
        mirrored = result + columns.to(tl.int64)[:, None] * num_right + rows[None, :]
        mask = column_exists[:, None] & row_exists[None, :] & (columns[:, None] <= rows[None, :])
        tl.store(mirrored, tl.trans(total), mask=mask)


class Tiles(NamedTuple):
    """How one launch cuts its work; all but the last two are powers of two, at least 16."""

    left_tile: int  # rows of a tile of the result, columns of X
    right_tile: int  # columns of a tile of the result
    row_tile: int  # rows multiplied at once
    num_warps: int
    num_stages: int  # tiles of rows in flight

    @property
    def bytes_in_flight(self) -> int:
        """Shared memory of one program."""
        return 2 * self.row_tile * (self.left_tile + self.right_tile) * self.num_stages


def add_gram(
    total: torch.Tensor, rows: torch.Tensor, *, tiles: Tiles | None = None, rows_per_span: int | None = None
) -> None:
    """Add X^T X to ``total`` in place; equations and sources in the module.

    total: (num_heads, n, n) float32 or float64, contiguous, of which the lower half is read and the upper half is
    overwritten by its mirror image, so that the result is symmetric to the bit; rows X: (num_heads, num_rows, n)
    float16, any strides but a contiguous last dimension. ``tiles`` and ``rows_per_span`` override the choice and change
    no more than the order of sums.

    Products are exact, sums over at most `MOST_SPAN_ROWS` rows are float32, all further ones float64. A call takes
    about num_heads num_rows n (n + 128) operations and up to `WORKSPACE_BYTES` of workspace. It is fastest where rows
    begin at multiples of 16 bytes and fill whole such multiples. Deterministic. Launches on the current stream of the
    tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device, memory layout or number is not as above.
    """
    _check_inputs(total, rows, rows, rows_per_span)
    _add(total, rows, rows, tiles or choose_tiles(rows.shape[2], None, _machine(rows.device)[1]), rows_per_span, True)


def add_product(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    tiles: Tiles | None = None,
    rows_per_span: int | None = None,
) -> None:
    """Add X^T Y to ``total`` in place: total (num_heads, n, m), left X (num_heads, num_rows, n), right Y (num_heads,
    num_rows, m). Types, layouts, sums, errors and the rest as in `add_gram`, but all of ``total`` is read."""
    _check_inputs(total, left, right, rows_per_span)
    tiles = tiles or choose_tiles(left.shape[2], right.shape[2], _machine(left.device)[1])
    _add(total, left, right, tiles, rows_per_span, False)


def _add(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    tiles: Tiles,
    rows_per_span: int | None,
    symmetric: bool,
) -> None:
    num_heads, num_rows, num_left = left.shape
    num_right = right.shape[2]
    if not total.numel() or not num_rows:
        return
    num_pairs = _num_pairs(num_left, num_right, tiles, symmetric)
    if rows_per_span is None:
        slots = _programs_at_once(tiles, *_machine(left.device))
        rows_per_span = choose_rows_per_span(num_rows, num_heads * num_pairs, tiles.row_tile, slots)
    num_spans = triton.cdiv(num_rows, rows_per_span)
    tile_elements = tiles.left_tile * tiles.right_tile
    held = max(1, min(num_spans, WORKSPACE_BYTES // (4 * num_heads * num_pairs * tile_elements)))
    sums = torch.empty(held * num_heads * num_pairs * tile_elements, dtype=torch.float32, device=left.device)
    alignment = ALIGNMENT if _is_aligned(left) and _is_aligned(right) else 1
    added = min(ADDED_LEFT, tiles.left_tile), min(ADDED_RIGHT, tiles.right_tile)
    shared = {"SYMMETRIC": symmetric, "LEFT_TILE": tiles.left_tile, "RIGHT_TILE": tiles.right_tile}
    with torch.cuda.device(left.device) if left.is_cuda else nullcontext():
        for first_span in range(0, num_spans, held):
            spans = min(held, num_spans - first_span)
            _span_products[(num_pairs, spans, num_heads)](
                left,
                right,
                sums,
                left.stride(0) // alignment,
                right.stride(0) // alignment,
                left.stride(1) // alignment,
                right.stride(1) // alignment,
                triton.cdiv(num_left, alignment),
                triton.cdiv(num_right, alignment),
                num_left,
                num_right,
                num_rows,
                first_span,
                rows_per_span,
                **shared,
                ALIGNMENT=alignment,
                ROW_TILE=tiles.row_tile,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
            _add_spans[(num_pairs, tile_elements // (added[0] * added[1]), num_heads)](
                sums,
                total,
                num_left,
                num_right,
                spans,
                **shared,
                ADDED_LEFT=added[0],
                ADDED_RIGHT=added[1],
                ADDED_SPANS=ADDED_SPANS,
                num_warps=4,
            )


def choose_tiles(num_left: int, num_right: int | None, shared_bytes: int) -> Tiles:
    """Return the tiles for a result of ``num_left`` rows and ``num_right`` columns, None for X^T X; a block may use
    ``shared_bytes`` of memory.

    The larger a tile, the fewer times a row is read; the smaller, the less is computed past the edges.
    """
    left_tile = 64 if num_left <= 64 else 128
    if num_right is None:
        right_tile = left_tile if num_left <= 512 else 256
    else:
        right_tile = min(max(16, triton.next_power_of_2(num_right)), 256)
    num_warps = 8 if left_tile * right_tile >= 128 * 128 else 4
    tiles = Tiles(left_tile, right_tile, 64, num_warps, 3 if num_warps == 8 else 4)
    while tiles.bytes_in_flight > shared_bytes - SPARE_BYTES and tiles.row_tile > 16:
        tiles = tiles._replace(row_tile=tiles.row_tile // 2)
    return tiles


def choose_rows_per_span(num_rows: int, num_products: int, row_tile: int, slots: int) -> int:
    """Return the length of a span, a multiple of ``row_tile``, with which ``num_products`` products over all rows
    take the least time on a device that holds ``slots`` programs at once.

    All programs are equally long: the number of spans is one that leaves few slots empty at the end.
    """
    fewest = triton.cdiv(num_rows, MOST_SPAN_ROWS)
    first_wave = triton.cdiv(num_products * fewest, slots)
    best, least_cost = MOST_SPAN_ROWS, float("inf")
    for waves in range(first_wave, first_wave + WAVES):
        count = max(fewest, waves * slots // num_products)
        length = triton.cdiv(triton.cdiv(num_rows, count), row_tile) * row_tile
        taken = triton.cdiv(num_products * triton.cdiv(num_rows, length), slots)
        cost = taken * (length + SPAN_COST)
        if cost < least_cost:
            best, least_cost = length, cost
    return int(best)


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_span_products, triton.JITFunction)


def _num_pairs(num_left: int, num_right: int, tiles: Tiles, symmetric: bool) -> int:
    """Return how many tiles of the result are computed; see `_place_of`."""
    across = triton.cdiv(num_left, tiles.left_tile)
    if not symmetric:
        return int(across * triton.cdiv(num_right, tiles.right_tile))
    ends = (min(num_left, (left + 1) * tiles.left_tile) for left in range(across))
    return sum(triton.cdiv(end, tiles.right_tile) for end in ends)


def _programs_at_once(tiles: Tiles, multiprocessors: int, shared_bytes: int) -> int:
    by_memory = shared_bytes // (tiles.bytes_in_flight + SPARE_BYTES)
    return multiprocessors * max(1, min(by_memory, 16 // tiles.num_warps))


def _is_aligned(part: torch.Tensor) -> bool:
    """Whether all rows can be read in groups of `ALIGNMENT` from their beginning, the last group filled from memory
    that is the tensor's own or another view's."""
    num_heads, num_rows, num_columns = part.shape
    strides = [part.stride(dim) for dim in (0, 1) if part.shape[dim] > 1]
    last = (num_heads - 1) * part.stride(0) + (num_rows - 1) * part.stride(1)
    read_to = part.storage_offset() + last + triton.cdiv(num_columns, ALIGNMENT) * ALIGNMENT
    stored = part.untyped_storage().nbytes() // part.element_size()
    return all(stride % ALIGNMENT == 0 for stride in strides) and read_to <= stored


@cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors and the bytes of shared memory that one block may use."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS, 128 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 64 * 1024)


def _check_inputs(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rows_per_span: int | None) -> None:
    for name, part in (("rows", left), ("right", right)):
        if part.dim() != 3 or part.shape[:2] != left.shape[:2]:
            wanted = "(num_heads, num_rows, n)" if part is left else f"{tuple(left.shape[:2])} and columns"
            raise ValueError(f"{name} must be {wanted}, not {tuple(part.shape)}.")
        if part.dtype != torch.float16:
            raise ValueError(f"{name} must be float16, not {part.dtype}; use the reference for it.")
        if part.device != total.device:
            raise ValueError(f"{name} must be on {total.device} like the total, not on {part.device}.")
        if part.stride(2) != 1 and part.shape[2] > 1:
            raise ValueError(f"The last dimension of {name} must be contiguous; call .contiguous() first.")
    shape = (left.shape[0], left.shape[2], right.shape[2])
    if total.shape != shape or total.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"total must be {shape} float32 or float64, not {tuple(total.shape)} {total.dtype}.")
    if not total.is_contiguous():
        raise ValueError("total must be contiguous: it is changed in place.")
    if rows_per_span is not None and rows_per_span < 1:
        raise ValueError(f"rows_per_span must be at least 1, not {rows_per_span}.")
    if not total.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {total.device}; use the reference there.")
