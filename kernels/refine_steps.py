"""Knows the Triton kernel that moves kept keys, biases and values by a step of Adam. Knows no gradients and no model.

A step is `_row_errors` and `_key_sums` of refine_gradients.py, `_move_keys`, and a count. `_move_keys` adds the slices
of a few keys' gradients g, takes the step (Kingma and Ba 2015, algorithm 1; t counts from 1, x is a key, bias or value)

    m = beta_1 m + (1 - beta_1) g,   v = beta_2 v + (1 - beta_2) g^2
    x = x - unit rate (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + epsilon)

and writes x as the products of the next step take it. Rows, rate and corrections of a step are found by its number on
the device, so that all steps are the same launches.

Twin: `reference_steps.take_step_reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from compactor_kernels.reference_steps import EPSILON, Steps, begin_steps_reference
from compactor_kernels.refine_gradients import (
    ADDED_KEYS,
    ADDED_SLICES,
    LARGEST_HALF,
    GradientPlan,
    add_slices,
    added_blocks,
    check_moving,
    check_tensor,
    in_types_of_products,
    on_device_of,
    place_keys,
    sum_slices,
)


@triton.jit
def _load(part, first, second, elements, mask):  # type: ignore[no-untyped-def]
    part_tile = tl.load(part + elements, mask=mask, other=0.0)
    first_tile = tl.load(first + elements, mask=mask, other=0.0)
    return part_tile, first_tile, tl.load(second + elements, mask=mask, other=0.0)


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    part,
    first,
    second,
    elements,
    mask,
    part_tile,  # from `_load`, with the next two
    first_tile,
    second_tile,
    gradient,
    rate,
    correction_1,
    correction_2,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Take the step of keys, biases or values; return what they are then."""
    first_tile = BETA_1 * first_tile + (1.0 - BETA_1) * gradient
    second_tile = BETA_2 * second_tile + (1.0 - BETA_2) * gradient * gradient
    moved = part_tile - rate * (first_tile / correction_1) / (tl.sqrt(second_tile / correction_2) + EPSILON)
    tl.store(part + elements, moved, mask=mask)
    tl.store(first + elements, first_tile, mask=mask)
    tl.store(second + elements, second_tile, mask=mask)
    return moved


@triton.jit(do_not_specialize=["num_heads", "num_steps", "longest", "num_slices"])
def _move_keys(  # type: ignore[no-untyped-def]
    key_sums,  # from `_key_sums`, with the next two
    bias_sums,
    value_sums,
    lengths,  # (num_heads,) int32
    tile_heads,  # (num_tiles,) int32, and the next
    tile_starts,
    weight_unit,  # (num_heads,) fp32, and the next
    out_unit,
    scales,  # (3, num_heads) fp32
    keys,  # (num_heads, longest, HEAD_DIM) fp32
    biases,  # (num_heads, longest) fp32
    values,  # (num_heads, longest, HEAD_DIM) fp32
    first_of_keys,  # m: as the three above
    first_of_biases,
    first_of_values,
    second_of_keys,  # v: as the three above
    second_of_biases,
    second_of_values,
    rounded_keys,  # as keys, in the type of the queries
    scaled_values,  # as values, in the type of shares, in units of out_unit
    units,  # (3, num_heads) fp32
    rates,  # (num_steps,) fp32
    corrections,  # (2, num_steps) fp32: 1 - beta_1^t and 1 - beta_2^t
    number,  # (1,) int64: t - 1
    scaling,
    num_heads,
    num_steps,
    longest,
    num_slices,
    BETA_1: tl.constexpr,
    BETA_2: tl.constexpr,
    EPSILON: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    ADDED_KEYS: tl.constexpr,
    ADDED_SLICES: tl.constexpr,
):
    """Move a few keys, their biases and values; grid (key tile, part of the tile)."""
    head, start, in_tile, key_exists = place_keys(lengths, tile_heads, tile_starts, ADDED_KEYS)
    places = head * longest + start + in_tile
    dims = tl.arange(0, DIM_TILE)
    elements = places[:, None] * HEAD_DIM + dims[None, :]
    in_keys = key_exists[:, None] & (dims < HEAD_DIM)[None, :]

    # all that a step reads is asked for before any of it is waited for
    key, first_of_key, second_of_key = _load(keys, first_of_keys, second_of_keys, elements, in_keys)
    bias, first_of_bias, second_of_bias = _load(biases, first_of_biases, second_of_biases, places, key_exists)
    value, first_of_value, second_of_value = _load(values, first_of_values, second_of_values, elements, in_keys)
    unit = tl.load(out_unit + head)
    step = tl.load(number)
    rate = tl.load(rates + step)
    correction_1 = tl.load(corrections + step)
    correction_2 = tl.load(corrections + num_steps + step)
    key_rate = rate * tl.load(units + head)
    bias_rate = rate * tl.load(units + num_heads + head)
    value_rate = rate * tl.load(units + 2 * num_heads + head)
    by_key, by_bias, by_value = add_slices(
        key_sums,
        bias_sums,
        value_sums,
        weight_unit,
        out_unit,
        scales,
        scaling,
        num_heads,
        num_slices,
        head,
        in_tile,
        key_exists,
        HEAD_DIM,
        DIM_TILE,
        KEY_TILE,
        ADDED_KEYS,
        ADDED_SLICES,
    )

    key = _move(
        keys,
        first_of_keys,
        second_of_keys,
        elements,
        in_keys,
        key,
        first_of_key,
        second_of_key,
        by_key,
        key_rate,
        correction_1,
        correction_2,
        BETA_1,
        BETA_2,
        EPSILON,
    )
    _move(
        biases,
        first_of_biases,
        second_of_biases,
        places,
        key_exists,
        bias,
        first_of_bias,
        second_of_bias,
        by_bias,
        bias_rate,
        correction_1,
        correction_2,
        BETA_1,
        BETA_2,
        EPSILON,
    )
    value = _move(
        values,
        first_of_values,
        second_of_values,
        elements,
        in_keys,
        value,
        first_of_value,
        second_of_value,
        by_value,
        value_rate,
        correction_1,
        correction_2,
        BETA_1,
        BETA_2,
        EPSILON,
    )
    scaled = value / unit
    if scaled_values.dtype.element_ty == tl.float16:
        scaled = tl.clamp(scaled, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    tl.store(rounded_keys + elements, key.to(rounded_keys.dtype.element_ty), mask=in_keys)
    tl.store(scaled_values + elements, scaled.to(scaled_values.dtype.element_ty), mask=in_keys)


@dataclass(frozen=True)
class KernelSteps(Steps):
    """A descent, and what its next step reads besides; a step changes the first two of these in place."""

    rounded_keys: torch.Tensor  # as keys, in the type of the queries; padding is as it was, and in the next
    scaled_values: torch.Tensor  # as values, in units of the plan's ``out_unit``, in the type of shares
    corrections: torch.Tensor  # (2, steps) float32: 1 - beta^t of both betas


def begin_steps(
    plan: GradientPlan,
    keys: torch.Tensor,
    biases: torch.Tensor,
    values: torch.Tensor,
    units: torch.Tensor,
    drawn: torch.Tensor,
    rates: torch.Tensor,
    betas: tuple[float, float],
) -> KernelSteps:
    """Return a descent of Adam that has taken no step yet, from copies of keys, biases and values.

    keys, values: (num_heads, longest, head_dim) float32, head h owns the first ``lengths[h]``, padding never moves;
    biases: (num_heads, longest) float32; units: (3, num_heads) float32, what a change of 1 moves keys, biases and
    values of a head by; drawn: (steps, num_drawn) int64, the row numbers of all steps, which are trusted; rates:
    (steps,) float32; all contiguous and on the device of the plan. Gradients are those of refine_gradients.py times the
    plan's ``scales``, which contain the units if they are to be gradients of changes in these units.

    Raises ValueError when a shape, type, device or memory layout is not as above, or a beta is not from 0 to 1.
    """
    check_moving(plan, keys, biases, values)
    if drawn.dim() != 2 or 0 in drawn.shape:
        raise ValueError(f"drawn must be (steps, num_drawn), not {tuple(drawn.shape)}.")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be at least 0 and below 1, not {betas}.")
    check_tensor("units", units, (3, len(keys)), torch.float32, keys.device)
    check_tensor("drawn", drawn, drawn.shape, torch.int64, keys.device)
    check_tensor("rates", rates, drawn.shape[:1], torch.float32, keys.device)
    begun = begin_steps_reference(keys, biases, values, units, drawn, rates, betas)
    counts = torch.arange(1, len(rates) + 1, dtype=torch.float64, device=keys.device)
    corrections = torch.stack([1.0 - beta**counts for beta in betas]).float()
    rounded_keys, scaled_values = in_types_of_products(plan, *begun.moving[::2])
    if rounded_keys is begun.moving.keys:  # of float32 queries
        rounded_keys = rounded_keys.clone()
    return KernelSteps(**vars(begun), rounded_keys=rounded_keys, scaled_values=scaled_values, corrections=corrections)


def take_step(plan: GradientPlan, steps: KernelSteps) -> None:
    """Take the next step of a descent that `begin_steps` began with this plan; equations in the module.

    It may be called as often as the descent has steps. Equal descents give equal bits. Launches on the current stream
    of the tensors' device without a device sync, so it can be captured in a CUDA graph once the same shapes have been
    through; each replay takes one more step.
    """
    keys, biases, _ = steps.moving
    sums = sum_slices(plan, steps.drawn, steps.number, steps.rounded_keys, biases, steps.scaled_values)
    num_heads, longest, head_dim = keys.shape
    with on_device_of(keys):
        _move_keys[added_blocks(plan)](
            *sums,
            plan.lengths,
            plan.tile_heads,
            plan.tile_starts,
            plan.weight_unit,
            plan.out_unit,
            plan.scales,
            *steps.moving,
            *steps.first,
            *steps.second,
            steps.rounded_keys,
            steps.scaled_values,
            steps.units,
            steps.rates,
            steps.corrections,
            steps.number,
            plan.scaling,
            num_heads,
            len(steps.rates),
            longest,
            len(sums.keys),
            BETA_1=steps.betas[0],
            BETA_2=steps.betas[1],
            EPSILON=EPSILON,
            HEAD_DIM=head_dim,
            DIM_TILE=plan.sum_tiles.dim_tile,
            KEY_TILE=plan.sum_tiles.key_tile,
            ADDED_KEYS=ADDED_KEYS,
            ADDED_SLICES=ADDED_SLICES,
            num_warps=4,
        )
    steps.number.add_(1)
