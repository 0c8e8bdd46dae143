"""Knows the Triton kernels for least squares in a box by projected Newton steps, many problems at once. Knows no rows.

Minimises f(x) = x^T G x / 2 - r^T x over low <= x <= high (Bertsekas 1982, section 1.5). A step takes, of each problem,

    g = G x - r,   H = the variables that are held: at a bound with the gradient outwards, or never seen
    (G + jitter I)_FF d_F = -g_F for the others F,   d_H = 0
    x <- the first of P(x + s d), then of P(x - s g_F), over some s, with f(x) - f >= sufficient (its linear part) > 0

where P projects into the box. Gradients and decreases are float64, directions float32 (`cholesky`): an exact gradient
steers them. Every decision is taken on the device: a problem whose largest |g_F| is small, or that finds no better
point, is marked, and the programs of later launches that would work on it return at once.

Twin: `reference_nnls.box_newton_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from compactor_kernels.cholesky import TILE, Tiles, empty_factors, factor_in_place, is_interpreted, substitute
from compactor_kernels.reference_cholesky import MAX_SIZE
from compactor_kernels.reference_nnls import BoxPoints, BoxProblems, Search

ROW_TILE = tl.constexpr(32)  # rows of a program of `_gradient`; there is a maximum of each
COLUMN_TILE = tl.constexpr(64)  # columns that it reads at once
PARTS = tl.constexpr(64)  # a power of two, at least as many as there are tiles of 32 rows
CANDIDATES = tl.constexpr(16)  # a power of two, at least as many as there are steps
TRIED_TILE = tl.constexpr(32)  # columns of a program of `_try_steps`
TRIED_ROWS = tl.constexpr(8)  # rows that it reads at once
TAKEN_TILE = tl.constexpr(128)  # variables of a program of `_take_step`


@triton.jit(do_not_specialize=["num_keys", "num_parts"])
def _gradient(  # type: ignore[no-untyped-def]
    gram,  # (num_problems, num_keys, num_keys) fp64, and vectors (num_problems, num_keys) fp64
    rhs,
    point,
    low,
    high,
    seen,  # the same int8
    running,  # (num_problems,) int32
    gradient,  # (num_problems, num_keys) fp64
    downhill,  # the same fp32: -gradient, 0 where a variable is held
    free,  # the same int8
    peaks,  # (num_problems, num_parts) fp64
    num_keys,
    num_parts,
):
    """Write the gradient of a tile of variables and the largest of its free ones; grid (tile, problem)."""
    problem = tl.program_id(1).to(tl.int64)
    if tl.load(running + problem) == 0:
        return
    rows = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    exists = rows < num_keys
    in_tile = tl.arange(0, COLUMN_TILE)
    here = problem * num_keys + rows
    gram += problem * num_keys * num_keys
    sums = tl.zeros((ROW_TILE, COLUMN_TILE), tl.float64)
    for first in range(0, num_keys, COLUMN_TILE):
        columns = in_tile + first
        known = columns < num_keys
        others = tl.load(point + problem * num_keys + columns, mask=known, other=0.0)
        tile = tl.load(
            gram + rows[:, None] * num_keys + columns[None, :], mask=exists[:, None] & known[None, :], other=0.0
        )
        sums += tile * others[None, :]
    slope = tl.sum(sums, 1) - tl.load(rhs + here, mask=exists, other=0.0)
    x = tl.load(point + here, mask=exists, other=0.0)
    at_low = (x <= tl.load(low + here, mask=exists, other=0.0)) & (slope > 0)
    at_high = (x >= tl.load(high + here, mask=exists, other=0.0)) & (slope < 0)
    is_free = exists & (tl.load(seen + here, mask=exists, other=0) != 0) & ~(at_low | at_high)
    steep = tl.where(is_free, -slope, 0.0)
    tl.store(gradient + here, slope, mask=exists)
    tl.store(downhill + here, steep.to(tl.float32), mask=exists)
    tl.store(free + here, is_free.to(tl.int8), mask=exists)
    lost = tl.sum((steep != steep).to(tl.int32), 0) > 0  # a maximum may pass over what is no number
    tl.store(peaks + problem * num_parts + tl.program_id(0), tl.where(lost, float("nan"), tl.max(tl.abs(steep), 0)))


@triton.jit(do_not_specialize=["num_keys", "num_parts", "num_tiles"])
def _begin_step(  # type: ignore[no-untyped-def]
    gram,  # from `_gradient`
    free,
    peaks,
    reference,  # (num_problems,) fp64: what optimality is relative to; the next five are like it
    tolerance,
    running,
    goes_on,  # int32: `running` of the problems that have further to go
    iterations,  # int64
    optimality,
    jitter,
    lower,  # (num_problems, num_tiles * TILE, num_tiles * TILE) fp32, of which tiles of the lower half are written
    failed,  # (num_problems,) int32
    num_keys,
    num_parts,
    num_tiles,
    STEPS: tl.constexpr,
):
    """Say which problems go on and, with STEPS, write one tile of their systems; grid (tile row, tile column,
    problem). Without, one program a problem is enough."""
    if tl.program_id(1) > tl.program_id(0):
        return
    problem = tl.program_id(2).to(tl.int64)
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    runs = tl.load(running + problem)
    if runs == 0:
        if is_first:
            tl.store(goes_on + problem, 0)
        return
    parts = tl.arange(0, PARTS)
    maxima = tl.load(peaks + problem * num_parts + parts, mask=parts < num_parts, other=0.0)
    lost = tl.sum((maxima != maxima).to(tl.int32), 0) > 0
    found = tl.where(lost, float("nan"), tl.max(maxima, 0) / tl.load(reference + problem))
    goes = found > tl.load(tolerance + problem)  # not where it is no number
    if is_first:
        tl.store(optimality + problem, found)
        tl.store(goes_on + problem, goes.to(tl.int32))
        if STEPS:
            tl.store(failed + problem, 0)
            tl.store(iterations + problem, tl.load(iterations + problem) + goes.to(tl.int64))
    if STEPS:  # noqa: SIM102
        if goes:
            rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
            columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
            row_free = tl.load(free + problem * num_keys + rows, mask=rows < num_keys, other=0) != 0
            column_free = tl.load(free + problem * num_keys + columns, mask=columns < num_keys, other=0) != 0
            gram += problem * num_keys * num_keys
            tile = tl.load(
                gram + rows[:, None] * num_keys + columns[None, :],
                mask=row_free[:, None] & column_free[None, :],
                other=0.0,
            )
            amount = tl.where(row_free, tl.load(jitter + problem), 1.0)
            tile = tile.to(tl.float32)
            tile += tl.where(rows[:, None] == columns[None, :], amount[:, None], 0.0).to(tl.float32)
            stride = num_tiles * TILE
            tl.store(lower + problem * stride * stride + rows[:, None] * stride + columns[None, :], tile)


@triton.jit
def _candidates(  # type: ignore[no-untyped-def]
    places, mask, has_failed, point, low, high, gradient, free, newton, newton_places, steps, by_newton
):
    """Return points (n,) and changes (CANDIDATES, n) fp64 of variables at ``places``, whose solutions of the system
    stand at ``newton_places``."""
    x = tl.load(point + places, mask=mask, other=0.0)
    bottom = tl.load(low + places, mask=mask, other=0.0)
    top = tl.load(high + places, mask=mask, other=0.0)
    is_free = tl.load(free + places, mask=mask, other=0) != 0
    steep = tl.where(is_free, -tl.load(gradient + places, mask=mask, other=0.0), 0.0)
    towards = tl.load(newton + newton_places, mask=mask, other=0.0).to(tl.float64)
    towards = tl.where(has_failed, steep, towards)
    directions = tl.where(by_newton[:, None], towards[None, :], steep[None, :])
    moved = x[None, :] + steps[:, None] * directions
    moved = tl.minimum(tl.maximum(moved, bottom[None, :]), top[None, :])
    return x, moved - x[None, :]


@triton.jit(do_not_specialize=["num_keys", "num_tried", "num_newton", "stride"])
def _try_steps(  # type: ignore[no-untyped-def]
    gram,  # from `_gradient`
    point,
    low,
    high,
    gradient,
    free,
    newton,  # (num_problems, stride) fp32
    failed,
    running,
    steps,  # (CANDIDATES,) fp64, 0 where there is no further one
    slopes,  # (num_problems, num_tried, CANDIDATES) fp64: linear part of the decrease
    curvatures,  # the same: change^T G change
    num_keys,
    num_tried,
    num_newton,
    stride,
):
    """Write what a tile of variables adds to the decreases of all steps; grid (tile, problem)."""
    problem = tl.program_id(1).to(tl.int64)
    if tl.load(running + problem) == 0:
        return
    has_failed = tl.load(failed + problem) != 0
    tried = tl.arange(0, CANDIDATES)
    lengths = tl.load(steps + tried)
    by_newton = tried < num_newton
    point += problem * num_keys
    low += problem * num_keys
    high += problem * num_keys
    gradient += problem * num_keys
    free += problem * num_keys
    gram += problem * num_keys * num_keys
    newton += problem * stride

    columns = tl.program_id(0) * TRIED_TILE + tl.arange(0, TRIED_TILE)
    exists = columns < num_keys
    in_rows = tl.arange(0, TRIED_ROWS)
    product = tl.zeros((CANDIDATES, TRIED_TILE), tl.float64)  # changes times G
    for first in range(0, num_keys, TRIED_ROWS):
        rows = in_rows + first
        known = rows < num_keys
        _, changes = _candidates(
            rows, known, has_failed, point, low, high, gradient, free, newton, rows, lengths, by_newton
        )
        tile = tl.load(
            gram + rows[:, None] * num_keys + columns[None, :], mask=known[:, None] & exists[None, :], other=0.0
        )
        product += tl.sum(changes[:, :, None] * tile[None, :, :], 1)
    _, changes = _candidates(
        columns, exists, has_failed, point, low, high, gradient, free, newton, columns, lengths, by_newton
    )
    slope = tl.load(gradient + columns, mask=exists, other=0.0)
    out = (problem * num_tried + tl.program_id(0)) * CANDIDATES + tried
    tl.store(slopes + out, -tl.sum(changes * slope[None, :], 1))
    tl.store(curvatures + out, tl.sum(changes * product, 1))


@triton.jit(do_not_specialize=["sufficient", "hopeless", "num_keys", "num_tried", "num_newton", "stride"])
def _take_step(  # type: ignore[no-untyped-def]
    point,  # from `_try_steps`; overwritten
    low,
    high,
    gradient,
    free,
    newton,
    failed,
    running,
    steps,
    slopes,
    curvatures,
    jitter,
    next_running,  # (num_problems,) int32
    next_jitter,  # (num_problems,) fp64
    sufficient,
    hopeless,
    num_keys,
    num_tried,
    num_newton,
    stride,
):
    """Move a tile of variables by the first good step; grid (tile, problem)."""
    problem = tl.program_id(1).to(tl.int64)
    is_first = tl.program_id(0) == 0
    if tl.load(running + problem) == 0:
        if is_first:
            tl.store(next_running + problem, 0)
        return
    has_failed = tl.load(failed + problem) != 0
    amount = tl.load(jitter + problem)
    amount = tl.where(has_failed, 10.0 * amount, amount)
    no_hope = amount > hopeless

    parts = tl.arange(0, PARTS)[:, None]
    tried = tl.arange(0, CANDIDATES)
    sums = (problem * num_tried + parts) * CANDIDATES + tried[None, :]
    slope = tl.sum(tl.load(slopes + sums, mask=parts < num_tried, other=0.0), 0)
    decrease = slope - 0.5 * tl.sum(tl.load(curvatures + sums, mask=parts < num_tried, other=0.0), 0)
    good = (decrease > 0.0) & (decrease >= sufficient * slope)
    chosen = tl.min(tl.where(good, tried, CANDIDATES), 0)
    length = tl.sum(tl.where(tried == chosen, tl.load(steps + tried), 0.0), 0)
    moves = chosen < CANDIDATES
    if is_first:
        tl.store(next_running + problem, (moves | no_hope).to(tl.int32))
        tl.store(next_jitter + problem, amount)

    columns = tl.program_id(0) * TAKEN_TILE + tl.arange(0, TAKEN_TILE)
    exists = columns < num_keys
    here = problem * num_keys + columns
    x = tl.load(point + here, mask=exists, other=0.0)
    bottom = tl.load(low + here, mask=exists, other=0.0)
    top = tl.load(high + here, mask=exists, other=0.0)
    is_free = tl.load(free + here, mask=exists, other=0) != 0
    direction = tl.where(is_free, -tl.load(gradient + here, mask=exists, other=0.0), 0.0)
    if (chosen < num_newton) & (has_failed == 0):
        direction = tl.load(newton + problem * stride + columns, mask=exists, other=0.0).to(tl.float64)
    moved = tl.minimum(tl.maximum(x + length * direction, bottom), top)
    moved = tl.where(moves, moved, x)
    tl.store(point + here, tl.where(no_hope, float("nan"), moved), mask=exists)


def box_newton(
    problems: BoxProblems,
    *,
    tolerance: float,
    max_iterations: int,
    search: Search,
    look_every: int | None = None,
    tiles: Tiles | None = None,
) -> BoxPoints:
    """Take projected Newton steps of all problems until each has stopped; equations and sources in the module.

    The Gram matrices are contiguous, n is at most `MAX_SIZE`. A problem stops once its largest |g_F| is at most
    ``tolerance`` times its reference, where it finds no better point, and after ``max_iterations``.

    A problem whose system does not factor goes downhill and has ten times the jitter in its next step; one whose jitter
    exceeds ``search.hopeless`` becomes NaN. All launches are queued ahead; the host looks whether all problems have
    stopped only before every ``look_every``-th step, never if that is None. A step takes about n / 32 + 4 launches and,
    of each problem, n^3 / 3 float32 operations and 34 n^2 float64 ones. Deterministic. Launches on the current stream
    of the tensors' device. Not differentiable.

    Raises ValueError when a shape, type, device, memory layout or number is not as above.
    """
    _check_inputs(problems, search)
    gram, rhs, start, low, high, seen, reference = problems
    num_problems, num_keys = rhs.shape
    device, tiles = gram.device, tiles or Tiles()
    point = start.clone(memory_format=torch.contiguous_format)
    rhs, low, high = (vector.contiguous() for vector in (rhs, low, high))
    iterations = torch.zeros(num_problems, dtype=torch.int64, device=device)
    optimality = torch.zeros(num_problems, dtype=torch.float64, device=device)
    if not gram.numel():
        return BoxPoints(point, iterations, optimality)

    reference, limits = reference.contiguous(), torch.full_like(optimality, tolerance)
    steps = search.steps(device)
    steps = torch.nn.functional.pad(steps, (0, CANDIDATES.value - len(steps)))
    was_seen, free = seen.to(torch.int8).contiguous(), torch.empty_like(rhs, dtype=torch.int8)
    gradient, downhill = torch.empty_like(rhs), torch.empty_like(rhs, dtype=torch.float32)
    lower, diagonal, failed = empty_factors(num_problems, num_keys, device)
    newton = downhill.new_empty(num_problems, lower.shape[1], 1)
    running = torch.ones(num_problems, dtype=torch.int32, device=device)
    goes_on = torch.empty_like(running)
    jitter, next_jitter = torch.full_like(optimality, search.jitter), torch.full_like(optimality, search.jitter)
    num_parts, num_tried = triton.cdiv(num_keys, ROW_TILE.value), triton.cdiv(num_keys, TRIED_TILE.value)
    num_tiles, stride = lower.shape[1] // TILE.value, lower.shape[1]
    peaks = gradient.new_empty(num_problems, num_parts)
    slopes, curvatures = gradient.new_empty(2, num_problems, num_tried, CANDIDATES.value)
    box = low, high
    with torch.cuda.device(device) if gram.is_cuda else nullcontext():
        for iteration in range(max_iterations + 1):
            _gradient[(num_parts, num_problems)](
                gram, rhs, point, *box, was_seen, running, gradient, downhill, free, peaks, num_keys, num_parts
            )
            is_last = iteration == max_iterations
            across = 1 if is_last else num_tiles
            _begin_step[(across, across, num_problems)](
                gram,
                free,
                peaks,
                reference,
                limits,
                running,
                goes_on,
                iterations,
                optimality,
                jitter,
                lower,
                failed,
                num_keys,
                num_parts,
                num_tiles,
                STEPS=not is_last,
            )
            looks = look_every is not None and iteration > 0 and iteration % look_every == 0
            if is_last or (looks and not bool(goes_on.any())):
                break
            factor_in_place(lower, diagonal, failed, goes_on, tiles)
            substitute(lower, diagonal, downhill.unsqueeze(-1), newton, num_keys, goes_on, tiles)
            found = gradient, free, newton, failed, goes_on, steps, slopes, curvatures
            counts = num_keys, num_tried, search.newton[1], stride
            _try_steps[(num_tried, num_problems)](gram, point, *box, *found, *counts)
            _take_step[(triton.cdiv(num_keys, TAKEN_TILE.value), num_problems)](
                point, *box, *found, jitter, running, next_jitter, search.sufficient, search.hopeless, *counts
            )
            jitter, next_jitter = next_jitter, jitter
    return BoxPoints(point, iterations, optimality)


def _check_inputs(problems: BoxProblems, search: Search) -> None:
    gram, *vectors, seen, reference = problems
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
        raise ValueError(f"gram must be (num_problems, n, n), not {tuple(gram.shape)}.")
    if gram.shape[1] > MAX_SIZE:
        raise ValueError(
            f"There must be at most {MAX_SIZE} variables, not {gram.shape[1]}; use the reference for them."
        )
    if not gram.is_contiguous():
        raise ValueError("gram must be contiguous; call .contiguous() first.")
    names = "rhs", "start", "low", "high", "seen"
    for name, vector in zip(names, (*vectors, seen), strict=True):
        if vector.shape != gram.shape[:2]:
            raise ValueError(f"{name} must be {tuple(gram.shape[:2])}, not {tuple(vector.shape)}.")
    if reference.shape != gram.shape[:1]:
        raise ValueError(f"reference must be {tuple(gram.shape[:1])}, not {tuple(reference.shape)}.")
    for name, tensor in zip(("gram", *names[:4], "reference"), (gram, *vectors, reference), strict=True):
        if tensor.dtype != torch.float64:
            raise ValueError(f"{name} must be float64, not {tensor.dtype}.")
    if seen.dtype != torch.bool:
        raise ValueError(f"seen must be bool, not {seen.dtype}.")
    for name, tensor in zip((*names, "reference"), (*vectors, seen, reference), strict=True):
        if tensor.device != gram.device:
            raise ValueError(f"{name} must be on {gram.device} like gram, not on {tensor.device}.")
    if not 0 < search.newton[1] + search.downhill[1] <= CANDIDATES.value:
        raise ValueError(f"There must be 1 to {CANDIDATES.value} steps, not {search.newton[1] + search.downhill[1]}.")
    if not gram.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {gram.device}; use the reference there.")
