"""Knows the Triton kernels that factor and solve a batch of positive definite systems. Knows no least squares.

For A = L L^T in tiles of 64 rows and columns, tile column p after tile column p, right-looking (Golub and Van Loan,
"Matrix Computations", section 4.2):

    L_pp L_pp^T = A_pp,   L_ip = A_ip L_pp^-T,   A_ij -= L_ip L_jp^T   for i >= j > p

A tile column takes two launches, `_factor_panel` and `_update_rest`, and nothing waits for the host. Each program of
the first one factors the tile of the diagonal for itself, in registers; that is two halves of 32 rows,

    L_pp = [L_1, 0; K, L_2],   and what is stored is [L_1^-1, -; K, L_2^-1]

so that everything else, `_substitute` too, is products. Each step of a half applies the elimination of a column to the
identity beside it, which gives the inverse in the same pass. All is float32 without TF32: systems that are nearly
singular have no other factor. `_substitute` solves for a tile of right-hand sides in one program, both ways.

Twin: `reference_cholesky.cholesky_solve_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.reference_cholesky import MAX_SIZE, BlockFactors

TILE = tl.constexpr(64)
HALF = tl.constexpr(32)


@triton.jit(do_not_specialize=["size", "num_tiles"])
def _begin(  # type: ignore[no-untyped-def]
    systems,  # (num_systems, size, size) fp32
    added,  # (num_systems,) fp32, not read unless HAS_ADDED
    lower,  # (num_systems, num_tiles * TILE, num_tiles * TILE) fp32, of which tiles of the lower half are written
    failed,  # (num_systems,) int32
    size,
    num_tiles,
    HAS_ADDED: tl.constexpr,
):
    """Copy one tile of a system and fill it up with the identity; grid (tile row, tile column, system)."""
    if tl.program_id(1) > tl.program_id(0):
        return
    system = tl.program_id(2).to(tl.int64)
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE))[:, None]
    columns = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    exists = (rows < size) & (columns < size)
    tile = tl.load(systems + system * size * size + rows * size + columns, mask=exists, other=0.0)
    on_diagonal = rows == columns
    if HAS_ADDED:
        tile += tl.where(on_diagonal & exists, tl.load(added + system), 0.0)
    tile = tl.where(on_diagonal & (rows >= size), 1.0, tile)
    stride = num_tiles * TILE
    tl.store(lower + system * stride * stride + rows * stride + columns, tile)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(failed + system, 0)


@triton.jit
def _inverse_factor(tile):  # type: ignore[no-untyped-def]
    """Return the inverse of the lower factor of a symmetric tile (HALF, HALF), and 1 where all pivots are positive,
    else 0."""
    places = tl.arange(0, HALF)
    rows = places[:, None]
    columns = places[None, :]
    inverse = tl.where(rows == columns, 1.0, 0.0)
    good = 1
    for step in range(HALF):
        # the tile is symmetric: row and column are summed along the axis that each is needed on
        row = tl.sum(tl.where(rows == step, tile, 0.0), 0)
        column = tl.sum(tl.where(columns == step, tile, 0.0), 1)
        pivot = tl.sum(tl.where(places == step, row, 0.0), 0)
        positive = pivot > 0.0
        good = tl.where(positive, good, 0)
        scale = tl.where(positive, tl.div_rn(1.0, tl.sqrt_rn(tl.where(positive, pivot, 1.0))), 0.0)
        row *= scale
        column *= scale
        tile -= column[:, None] * row[None, :]  # leaves rounding in what is done with, which is read no more
        done = tl.sum(tl.where(rows == step, inverse, 0.0), 0) * scale
        below = tl.where(places > step, column, 0.0)
        inverse = tl.where(rows == step, done[None, :], inverse - below[:, None] * done[None, :])
    return inverse, good


@triton.jit(do_not_specialize=["panel", "num_tiles"])
def _factor_panel(  # type: ignore[no-untyped-def]
    lower,  # (num_systems, num_tiles * TILE, num_tiles * TILE) fp32: L_ip is written over A_ip
    diagonal,  # (num_systems, num_tiles * TILE, TILE) fp32
    failed,  # (num_systems,) int32
    running,  # (num_systems,) int32, not read unless HAS_RUNNING: nothing is done where it is 0
    panel,
    num_tiles,
    HAS_RUNNING: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Factor the tile of the diagonal of one tile column, and divide ROW_TILE rows below it; grid (1 + tiles of rows,
    system): the first program stores the diagonal."""
    system = tl.program_id(1).to(tl.int64)
    if HAS_RUNNING:
        goes = tl.load(running + system)
        if goes == 0:
            return
    stride = num_tiles * TILE
    in_half = tl.arange(0, HALF)
    square = in_half[:, None] * stride + in_half[None, :]
    lower += system * stride * stride + panel * TILE
    corner = lower + panel * TILE * stride
    first_inverse, first_good = _inverse_factor(tl.load(corner + square))
    between = tl.load(corner + HALF * stride + square)
    between = tl.dot(between, tl.trans(first_inverse), input_precision="ieee")  # K
    second = tl.load(corner + HALF * stride + HALF + square)
    second -= tl.dot(between, tl.trans(between), input_precision="ieee")
    second_inverse, second_good = _inverse_factor(second)

    if tl.program_id(0) == 0:
        kept = diagonal + (system * stride + panel * TILE) * TILE + in_half[:, None] * TILE + in_half[None, :]
        tl.store(kept, first_inverse)
        tl.store(kept + HALF * TILE, between)
        tl.store(kept + HALF * TILE + HALF, second_inverse)
        if first_good * second_good == 0:
            tl.store(failed + system, 1)
    else:
        rows = (panel + 1) * TILE + (tl.program_id(0) - 1) * ROW_TILE + tl.arange(0, ROW_TILE)
        place = lower + rows[:, None] * stride + in_half[None, :]
        left = tl.load(place)
        right = tl.load(place + HALF)
        left = tl.dot(left, tl.trans(first_inverse), input_precision="ieee")
        right -= tl.dot(left, tl.trans(between), input_precision="ieee")
        right = tl.dot(right, tl.trans(second_inverse), input_precision="ieee")
        tl.debug_barrier()  # other threads may hold the numbers that were here
        tl.store(place, left)
        tl.store(place + HALF, right)


@triton.jit(do_not_specialize=["panel", "num_tiles"])
def _update_rest(  # type: ignore[no-untyped-def]
    lower,  # as in `_factor_panel`
    running,
    panel,
    num_tiles,
    HAS_RUNNING: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Subtract what a tile column explains from one tile right of it; grid (tile row, tile column, system), counted
    from the tile after the panel's."""
    if tl.program_id(1) > tl.program_id(0):
        return
    system = tl.program_id(2).to(tl.int64)
    if HAS_RUNNING:
        goes = tl.load(running + system)
        if goes == 0:
            return
    stride = num_tiles * TILE
    lower += system * stride * stride
    rows = (panel + 1 + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    columns = (panel + 1 + tl.program_id(1)) * TILE + tl.arange(0, TILE)
    in_depth = panel * TILE + tl.arange(0, DEPTH)
    place = lower + rows[:, None] * stride + columns[None, :]
    explained = tl.zeros((TILE, TILE), tl.float32)
    for first in tl.static_range(0, TILE, DEPTH):
        left = tl.load(lower + rows[:, None] * stride + (first + in_depth)[None, :])
        right = tl.load(lower + columns[:, None] * stride + (first + in_depth)[None, :])
        explained = tl.dot(left, tl.trans(right), explained, input_precision="ieee")
    tl.store(place, tl.load(place) - explained)


@triton.jit
def _product(left, right, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return left (n, k) times right (k, m), where m is 1 with ONE."""
    if ONE:
        return tl.sum(left * tl.trans(right), 1, keep_dims=True)
    else:
        return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["size", "num_rhs", "num_tiles"])
def _substitute(  # type: ignore[no-untyped-def]
    lower,  # as in `_factor_panel`
    diagonal,
    running,
    rhs,  # (num_systems, size, num_rhs) fp32
    solution,  # (num_systems, num_tiles * TILE, num_rhs) fp32
    size,
    num_rhs,
    num_tiles,
    HAS_RUNNING: tl.constexpr,
    RHS_TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Solve L L^T X = B for a tile of right-hand sides; grid (tile, system)."""
    ONE: tl.constexpr = RHS_TILE == 1
    system = tl.program_id(1).to(tl.int64)
    if HAS_RUNNING:
        goes = tl.load(running + system)
        if goes == 0:
            return
    stride = num_tiles * TILE
    lower += system * stride * stride
    diagonal += system * stride * TILE
    rhs += system * size * num_rhs
    solution += system * stride * num_rhs
    columns = (tl.program_id(0) * RHS_TILE + tl.arange(0, RHS_TILE))[None, :]
    wanted = columns < num_rhs
    in_half = tl.arange(0, HALF)
    in_tile = tl.arange(0, TILE)
    square = in_half[:, None] * TILE + in_half[None, :]

    for tile in range(num_tiles):  # L Y = B
        rows = in_half + tile * TILE
        upper = tl.load(rhs + rows[:, None] * num_rhs + columns, mask=(rows < size)[:, None] & wanted, other=0.0)
        rows += HALF
        under = tl.load(rhs + rows[:, None] * num_rhs + columns, mask=(rows < size)[:, None] & wanted, other=0.0)
        places = lower + (in_half + tile * TILE)[:, None] * stride + in_tile[None, :]
        for first in tl.range(0, tile * TILE, TILE, num_stages=NUM_STAGES):
            known = tl.load(solution + (first + in_tile)[:, None] * num_rhs + columns, mask=wanted, other=0.0)
            upper -= _product(tl.load(places + first), known, ONE)
            under -= _product(tl.load(places + first + HALF * stride), known, ONE)
        corner = diagonal + square + tile * TILE * TILE
        upper = _product(tl.load(corner), upper, ONE)
        under -= _product(tl.load(corner + HALF * TILE), upper, ONE)
        under = _product(tl.load(corner + HALF * TILE + HALF), under, ONE)
        out = solution + (in_half + tile * TILE)[:, None] * num_rhs + columns
        tl.store(out, upper, mask=wanted)
        tl.store(out + HALF * num_rhs, under, mask=wanted)
        tl.debug_barrier()  # other threads of the program read it

    for back in range(num_tiles):  # L^T X = Y
        tile = num_tiles - 1 - back
        out = solution + (in_half + tile * TILE)[:, None] * num_rhs + columns
        upper = tl.load(out, mask=wanted, other=0.0)
        under = tl.load(out + HALF * num_rhs, mask=wanted, other=0.0)
        places = lower + (in_half + tile * TILE)[:, None] + in_tile[None, :] * stride  # transposed
        for first in tl.range((tile + 1) * TILE, num_tiles * TILE, TILE, num_stages=NUM_STAGES):
            known = tl.load(solution + (first + in_tile)[:, None] * num_rhs + columns, mask=wanted, other=0.0)
            upper -= _product(tl.load(places + first * stride), known, ONE)
            under -= _product(tl.load(places + first * stride + HALF), known, ONE)
        corner = diagonal + in_half[None, :] * TILE + in_half[:, None] + tile * TILE * TILE
        under = _product(tl.load(corner + HALF * TILE + HALF), under, ONE)
        upper -= _product(tl.load(corner + HALF * TILE), under, ONE)
        upper = _product(tl.load(corner), upper, ONE)
        tl.debug_barrier()  # other threads may hold the numbers that were here
        tl.store(out, upper, mask=wanted)
        tl.store(out + HALF * num_rhs, under, mask=wanted)
        tl.debug_barrier()


class Tiles(NamedTuple):
    """How the launches cut their work."""

    row_tile: int = 64  # rows that a program of a panel divides: 16, 32 or 64
    panel_warps: int = 4  # with fewer the registers spill, with more each step in a tile of the diagonal waits longer
    update_warps: int = 4
    rhs_tile: int = 16  # right-hand sides of a program where there are several; at least 16, for products
    solve_warps: int = 8
    num_stages: int = 3  # tiles of L under way at once while solving


def cholesky_factors_batched(
    systems: torch.Tensor, *, added: torch.Tensor | None = None, tiles: Tiles | None = None
) -> BlockFactors:
    """Factor A + added I of each system; equations in the module.

    systems A: (num_systems, n, n) float32, contiguous, of which the lower half and the tiles of 64 on the diagonal are
    read, n at most `MAX_SIZE`; added: (num_systems,) float32, nothing if left out. Where a pivot is not positive
    ``failed`` is set and the factor is of no use; the other systems are not touched by that.

    Everything is float32 without TF32. A system takes n^3 / 3 operations and about 4 n^2 bytes of workspace; a call
    takes n / 32 launches. Deterministic. Launches on the current stream of the tensors' device without a device sync.
    Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_systems(systems, added)
    num_systems, size, _ = systems.shape
    lower, diagonal, failed = empty_factors(num_systems, size, systems.device)
    if systems.numel():
        num_tiles = triton.cdiv(size, TILE.value)
        with torch.cuda.device(systems.device) if systems.is_cuda else nullcontext():
            _begin[(num_tiles, num_tiles, num_systems)](
                systems,
                systems if added is None else added,
                lower,
                failed,
                size,
                num_tiles,
                HAS_ADDED=added is not None,
                num_warps=4,
            )
            factor_in_place(lower, diagonal, failed, None, tiles or Tiles())
    return BlockFactors(lower, diagonal, failed != 0, size)


def cholesky_solve_factored(factors: BlockFactors, rhs: torch.Tensor, *, tiles: Tiles | None = None) -> torch.Tensor:
    """Return X of L L^T X = B, (num_systems, n, num_rhs) float32, for rhs B of the same shape, float32 and contiguous;
    no useful number where the factor failed.

    A system takes 2 n^2 num_rhs operations; a call is one launch. The rest as in `cholesky_factors_batched`.
    """
    num_systems, padded, _ = factors.lower.shape
    _check_rhs(rhs, (num_systems, factors.size), factors.lower.device)
    solution = rhs.new_empty(num_systems, padded, rhs.shape[2])
    if rhs.numel():
        with torch.cuda.device(rhs.device) if rhs.is_cuda else nullcontext():
            substitute(factors.lower, factors.diagonal, rhs, solution, factors.size, None, tiles or Tiles())
    return solution[:, : factors.size]


def cholesky_solve_batched(
    systems: torch.Tensor, rhs: torch.Tensor, *, added: torch.Tensor | None = None, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A + added I)^-1 B and which of the systems failed, (num_systems,) bool; see the two functions above. NaN
    where one failed."""
    factors = cholesky_factors_batched(systems, added=added, tiles=tiles)
    solution = cholesky_solve_factored(factors, rhs, tiles=tiles)
    return solution.masked_fill(factors.failed.view(-1, 1, 1), torch.nan), factors.failed


def empty_factors(num_systems: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for ``lower``, ``diagonal`` and ``failed`` (int32, zeros) of systems of ``size`` rows."""
    padded = triton.cdiv(size, TILE.value) * TILE.value
    lower = torch.empty(num_systems, padded, padded, device=device)
    diagonal = torch.empty(num_systems, padded, TILE.value, device=device)
    return lower, diagonal, torch.zeros(num_systems, dtype=torch.int32, device=device)


def factor_in_place(
    lower: torch.Tensor, diagonal: torch.Tensor, failed: torch.Tensor, running: torch.Tensor | None, tiles: Tiles
) -> None:
    """Launch the factorisation of systems that stand in ``lower`` already, with the identity past their end; ``failed``
    is set where there is none, and never cleared. Nothing is done where ``running`` (num_systems,) int32 is 0."""
    num_systems, num_tiles = len(lower), lower.shape[1] // TILE.value
    shared = {"HAS_RUNNING": running is not None}
    flags = failed if running is None else running
    for panel in range(num_tiles):
        rest = num_tiles - 1 - panel
        _factor_panel[(1 + rest * TILE.value // tiles.row_tile, num_systems)](
            lower,
            diagonal,
            failed,
            flags,
            panel,
            num_tiles,
            **shared,
            ROW_TILE=tiles.row_tile,
            num_warps=tiles.panel_warps,
        )
        if rest:
            _update_rest[(rest, rest, num_systems)](
                lower, flags, panel, num_tiles, **shared, DEPTH=HALF.value, num_warps=tiles.update_warps
            )


def substitute(
    lower: torch.Tensor,
    diagonal: torch.Tensor,
    rhs: torch.Tensor,
    solution: torch.Tensor,
    size: int,
    running: torch.Tensor | None,
    tiles: Tiles,
) -> None:
    """Launch the solution for rhs (num_systems, size, num_rhs) into ``solution`` (num_systems, padded, num_rhs)."""
    num_rhs = rhs.shape[2]
    rhs_tile = 1 if num_rhs == 1 else tiles.rhs_tile
    _substitute[(triton.cdiv(num_rhs, rhs_tile), len(rhs))](
        lower,
        diagonal,
        lower if running is None else running,
        rhs,
        solution,
        size,
        num_rhs,
        lower.shape[1] // TILE.value,
        HAS_RUNNING=running is not None,
        RHS_TILE=rhs_tile,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.solve_warps,
    )


def is_interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_begin, triton.JITFunction)


def _check_systems(systems: torch.Tensor, added: torch.Tensor | None) -> None:
    if systems.dim() != 3 or systems.shape[1] != systems.shape[2]:
        raise ValueError(f"systems must be (num_systems, n, n), not {tuple(systems.shape)}.")
    if systems.shape[1] > MAX_SIZE:
        raise ValueError(f"There must be at most {MAX_SIZE} rows, not {systems.shape[1]}; use the reference for them.")
    if added is not None and added.shape != systems.shape[:1]:
        raise ValueError(f"added must be {tuple(systems.shape[:1])}, not {tuple(added.shape)}.")
    for name, tensor in (("systems", systems), ("added", added)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, not {tensor.dtype}; use the reference for it.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
        if tensor.device != systems.device:
            raise ValueError(f"{name} must be on {systems.device} like the systems, not on {tensor.device}.")
    if not systems.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {systems.device}; use the reference there.")


def _check_rhs(rhs: torch.Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if rhs.dim() != 3 or rhs.shape[:2] != shape:
        raise ValueError(f"rhs must be {shape} and right-hand sides, not {tuple(rhs.shape)}.")
    if rhs.dtype != torch.float32:
        raise ValueError(f"rhs must be float32, not {rhs.dtype}; use the reference for it.")
    if not rhs.is_contiguous():
        raise ValueError("rhs must be contiguous; call .contiguous() first.")
    if rhs.device != device:
        raise ValueError(f"rhs must be on {device} like the factors, not on {rhs.device}.")
