"""Knows the Triton kernel for greedy orthogonal least squares on Gram matrices: all picks in one launch. Knows no rows.

Of L = G T the pick j is the free key of the largest gain ||l_j||^2 / g_jj, the first of equals. Then, for step s,

    c_s = (G_j - sum_{r<s} c_r[j] c_r) / sqrt(g_jj),   t_s = l_j / sqrt(g_jj),   L -= c_s t_s^T,   g_ii -= c_s[i]^2

which is orthogonal least squares with several targets (Chen, Billings and Luo 1989) as a pivoted Cholesky
factorisation. A program keeps one problem for all its picks: g and the norms of L in registers, L and the rows c in
global memory. A pick reads the earlier rows once, one row of G, and L once, which it writes back. L is stored with the
keys last, so that every load is of consecutive keys and every sum of a pick is over the first dimension of a tile.

Twin: `reference_greedy.greedy_picks_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.reference_greedy import Picks

MAX_KEYS = 1024
ALIGNMENT = tl.constexpr(16)  # keys: rows of L and of the factor begin at multiples of 64 bytes


@triton.jit(do_not_specialize=["groups", "num_targets", "num_picks", "look_every"])
def _greedy_picks(  # type: ignore[no-untyped-def]
    gram,  # (num_problems, num_keys, num_keys) fp32
    left,  # (num_problems, num_targets, groups * ALIGNMENT) fp32: L transposed, overwritten
    factor,  # (num_problems, num_picks, groups * ALIGNMENT) fp32: the rows c, overwritten
    limits,  # (num_problems,) fp32: a problem ends at a gain of this
    order,  # (num_problems, num_keys) int64, of which the picks are written
    gains,  # the same in fp32
    counts,  # (num_problems,) int32: picks made
    rest,  # (num_problems, num_keys) fp32: what each key would add to the picks; -1 for those
    redundant,
    num_keys,
    groups,
    num_targets,
    num_picks,
    look_every,
    KEY_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Make all picks of one problem; grid (problem,)."""
    problem = tl.program_id(0).to(tl.int64)
    stride = groups * ALIGNMENT  # a multiple that the compiler knows of: loads take 16 bytes at once
    gram += problem * num_keys * num_keys
    left += problem * num_targets * stride
    factor += problem * num_picks * stride
    order += problem * num_keys
    gains += problem * num_keys
    limit = tl.load(limits + problem)

    in_tile = tl.arange(0, ROW_TILE)
    keys = tl.arange(0, KEY_TILE)
    exists = keys < num_keys
    stored = (keys < stride)[None, :]  # the columns that only align the rows are zeros
    own = tl.load(gram + keys * (num_keys + 1), mask=exists, other=0.0)  # energy of each column not yet explained
    least = redundant * own
    free = exists

    squares = tl.zeros((ROW_TILE, KEY_TILE), tl.float32)
    for first in tl.range(0, num_targets, ROW_TILE, num_stages=NUM_STAGES):
        rows = first + in_tile
        tile = tl.load(
            left + rows[:, None] * stride + keys[None, :], mask=(rows < num_targets)[:, None] & stored, other=0.0
        )
        squares += tile * tile
    candidates = _candidate_gains(tl.sum(squares, 0), own, least, free)

    step = 0
    last = num_picks
    while step < last:
        # what is no number comes first, as in torch
        _, best = tl.max(tl.where(candidates == candidates, candidates, float("inf")), 0, return_indices=True)
        is_best = keys == best
        gain = tl.sum(tl.where(is_best, candidates, 0.0), 0)
        pivot = tl.sum(tl.where(is_best, own, 0.0), 0)
        scale = tl.where(gain > 0, tl.rsqrt(tl.maximum(pivot, 1e-30)), 0.0)  # a redundant key changes nothing

        column = tl.load(gram + best * num_keys + keys, mask=exists, other=0.0)
        explained = tl.zeros((ROW_TILE, KEY_TILE), tl.float32)
        for first in tl.range(0, step, ROW_TILE, num_stages=NUM_STAGES):
            rows = first + in_tile
            weights = tl.load(factor + rows * stride + best, mask=rows < step, other=0.0)
            tile = tl.load(
                factor + rows[:, None] * stride + keys[None, :], mask=(rows < step)[:, None] & stored, other=0.0
            )
            explained += weights[:, None] * tile
        column = (column - tl.sum(explained, 0)) * scale
        tl.store(factor + step * stride + keys, column, mask=keys < stride)
        own -= column * column

        squares = tl.zeros((ROW_TILE, KEY_TILE), tl.float32)
        for first in tl.range(0, num_targets, ROW_TILE, num_stages=NUM_STAGES):
            rows = first + in_tile
            wanted = rows < num_targets
            target = tl.load(left + rows * stride + best, mask=wanted, other=0.0) * scale
            place = left + rows[:, None] * stride + keys[None, :]
            mask = wanted[:, None] & stored
            tile = tl.load(place, mask=mask, other=0.0)
            # what the pick itself leaves is never read again: it stays, since other threads still read the target there
            tile -= target[:, None] * tl.where(is_best, 0.0, column)[None, :]
            tl.store(place, tile, mask=mask)
            squares += tile * tile

        free = free & (keys != best)
        candidates = _candidate_gains(tl.sum(squares, 0), own, least, free)
        tl.store(order + step, best.to(tl.int64))
        tl.store(gains + step, gain)
        step += 1
        if (step % look_every == 0) & (gain <= limit):
            last = step
        tl.debug_barrier()  # the next pick reads what other threads of the program have stored

    tl.store(counts + problem, step)
    tl.store(rest + problem * num_keys + keys, candidates, mask=exists)


@triton.jit
def _candidate_gains(norms, own, least, free):  # type: ignore[no-untyped-def]
    """Return what each key would add, (KEY_TILE,); 0 for redundant keys, -1 for those taken."""
    useful = own > least
    candidates = tl.div_rn(norms, tl.where(useful, own, 1.0))
    return tl.where(free, tl.where(useful, candidates, 0.0), -1.0)


class Tiles(NamedTuple):
    """How one launch cuts its work."""

    row_tile: int  # targets, or rows of the factor, loaded at once: a power of two, a number a thread of it or more
    num_warps: int
    num_stages: int  # tiles under way at once


def greedy_picks(
    gram: torch.Tensor,
    targets: torch.Tensor,
    num_picks: int,
    *,
    stop: float,
    redundant: float,
    look_every: int,
    tiles: Tiles | None = None,
) -> Picks:
    """Order the keys of each problem by greedy orthogonal least squares; equations and sources in the module.

    gram G: (num_problems, num_keys, num_keys) float32, symmetric, contiguous, at most 1,024 keys; targets T:
    (num_problems, num_keys, num_targets) float32. ``num_picks`` keys are picked, at least 1, at most all. A key gains
    nothing once its own g_jj is at most ``redundant`` of what it was. After every ``look_every`` picks a problem whose
    last gain is at most ``stop`` of its energy ends. What is never picked follows in the order of its own gain given
    the picks, the first of equals first. ``tiles`` overrides the choice of tiles and changes no more than the order of
    sums.

    Everything is float32 without TF32, but for the product G T, which is torch's. With C keys, D targets and K picks
    a problem takes C K (K + 4 D) operations, moves 2 C K (K + 4 D) bytes and needs 4 C (K + D) bytes of workspace.
    Deterministic. Launches on the current stream of the tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device, memory layout or number is not as above.
    """
    _check_inputs(gram, targets, num_picks, look_every)
    num_problems, num_keys, num_targets = targets.shape
    num_picks = min(num_picks, num_keys)
    groups = triton.cdiv(num_keys, ALIGNMENT.value)
    stride = groups * ALIGNMENT.value
    left = torch.bmm(targets.mT, gram)  # (num_problems, num_targets, num_keys), as G is symmetric
    energy = (targets.mT * left).sum((1, 2)).clamp_min(0.0)
    order = torch.empty(num_problems, num_keys, dtype=torch.int64, device=gram.device)
    gains, rest = gram.new_empty(2, num_problems, num_keys)
    if not num_problems or not num_keys:
        return Picks(order, gains, energy)
    if stride > num_keys:
        left = torch.nn.functional.pad(left, (0, stride - num_keys))
    factor = gram.new_empty(num_problems, num_picks, stride)
    counts = torch.empty(num_problems, dtype=torch.int32, device=gram.device)
    tiles = tiles or choose_tiles(num_keys)
    if tiles.row_tile * _key_tile(num_keys) < 32 * tiles.num_warps:  # two threads would update one number of L
        raise ValueError(f"row_tile {tiles.row_tile} is too small for {tiles.num_warps} warps; take fewer warps.")
    with torch.cuda.device(gram.device) if gram.is_cuda else nullcontext():
        _greedy_picks[(num_problems,)](
            gram,
            left,
            factor,
            stop * energy,
            order,
            gains,
            counts,
            rest,
            redundant,
            num_keys,
            groups,
            num_targets,
            num_picks,
            look_every,
            KEY_TILE=_key_tile(num_keys),
            ROW_TILE=tiles.row_tile,
            NUM_STAGES=tiles.num_stages,
            num_warps=tiles.num_warps,
        )
    return Picks(*_append_rest(order, gains, counts, rest), energy)


def choose_tiles(num_keys: int) -> Tiles:
    """Return the tiles for a size of problems: eight numbers a thread, which fit its registers without spilling."""
    key_tile = _key_tile(num_keys)
    num_warps = min(16, max(4, key_tile // 32))
    return Tiles(min(32, 256 * num_warps // key_tile), num_warps, 3)


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_greedy_picks, triton.JITFunction)


def _key_tile(num_keys: int) -> int:
    return max(ALIGNMENT.value, triton.next_power_of_2(num_keys))  # type: ignore[no-any-return]


def _append_rest(
    order: torch.Tensor, gains: torch.Tensor, counts: torch.Tensor, rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return order and gains of all keys: the first ``counts`` as they are, then the rest by what each would add."""
    ranked = rest.sort(dim=1, descending=True, stable=True)  # the picks, of -1, are the last
    behind = torch.arange(order.shape[1], device=order.device) - counts.unsqueeze(1)
    picked, place = behind < 0, behind.clamp_min(0)
    return (
        torch.where(picked, order, ranked.indices.gather(1, place)),
        torch.where(picked, gains, ranked.values.gather(1, place)),
    )


def _check_inputs(gram: torch.Tensor, targets: torch.Tensor, num_picks: int, look_every: int) -> None:
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2]:
        raise ValueError(f"gram must be (num_problems, num_keys, num_keys), not {tuple(gram.shape)}.")
    if targets.dim() != 3 or targets.shape[:2] != gram.shape[:2] or not targets.shape[2]:
        wanted = f"{tuple(gram.shape[:2])} and at least one target"
        raise ValueError(f"targets must be {wanted}, not {tuple(targets.shape)}.")
    if gram.shape[1] > MAX_KEYS:
        raise ValueError(f"There must be at most {MAX_KEYS} keys, not {gram.shape[1]}; use the reference for them.")
    for name, tensor in (("gram", gram), ("targets", targets)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, not {tensor.dtype}; use the reference for it.")
    if targets.device != gram.device:
        raise ValueError(f"targets must be on {gram.device} like gram, not on {targets.device}.")
    if not gram.is_contiguous():
        raise ValueError("gram must be contiguous; call .contiguous() first.")
    if num_picks < 1 or look_every < 1:
        raise ValueError(f"num_picks and look_every must be at least 1, not {num_picks} and {look_every}.")
    if not gram.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {gram.device}; use the reference there.")
