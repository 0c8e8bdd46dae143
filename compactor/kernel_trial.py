"""Knows whether a Triton kernel can be trusted on a device: each is tried once against its twin. Knows no model.

A kernel that does not compile, does not launch or computes something else than its twin must not end a run or change an
answer: the caller goes on with the twin, and one warning says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch

TOLERANCE = 0.03  # of the twin's norm: rounding of half precision is far below, a wrong mask or stride far above
HEADS, GROUP, ROWS, KEYS = 2, 2, 96, 80


@cache
def kernel_available(device: torch.device) -> bool:
    """Whether the Triton kernels run on a CUDA device: Triton is installed and the GPU is an Ampere or newer."""
    from importlib.util import find_spec

    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def passes(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether kernel ``name`` of `TRIALS` agrees with its twin on small random input; tried once a process.

    Warns with one sentence where it does not.
    """
    reason = failure(name, device, dtype, head_dim)
    if reason is not None:
        warnings.warn(
            f"The Triton kernel {name} is not used on {device}: {reason}. PyTorch takes its place, more slowly.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None


def usable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether kernel ``name`` of `TRIALS` runs on a device, and runs rightly; without a GPU nothing is tried."""
    return device.type == "cuda" and kernel_available(device) and passes(name, device, dtype, head_dim)


def failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Try a kernel; return what is wrong with it, or None."""
    try:
        with torch.no_grad():
            for found, expected in TRIALS[name](device, dtype, head_dim):
                distance = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
                if not distance <= TOLERANCE:
                    return f"it is {distance:.2g} away from its twin"
    except Exception as error:  # a compiler fails in many ways
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"
    return None


Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # what the kernel gave, and its twin


def _draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _try_biased_decode(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.biased_decode import biased_decode
    from compactor_kernels.reference import biased_attention_reference

    pairs: Pairs = []
    for q_len in (1, 5):
        queries, keys, values = _draw(
            device, dtype, (2, HEADS * GROUP, q_len, head_dim), (KEYS, head_dim), (KEYS, head_dim)
        )
        (biases,) = _draw(device, torch.float32, (KEYS,))
        offsets = torch.tensor([0, KEYS // 3, KEYS], dtype=torch.int32, device=device)
        given = queries, keys, values, biases, offsets
        found = biased_decode(*given, scaling=head_dim**-0.5, max_head_length=KEYS)
        expected = biased_attention_reference(*given, scaling=head_dim**-0.5)
        pairs += list(zip(found, expected, strict=True))
    return pairs


def _try_biased_decode_int8(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """Several documents, and keys and values of 8 bits."""
    from compactor_kernels.biased_decode import biased_decode
    from compactor_kernels.reference import biased_attention_reference, quantise

    (queries,) = _draw(device, dtype, (4, HEADS * GROUP, 1, head_dim))
    (keys, key_scales), (values, value_scales) = map(quantise, _draw(device, torch.float32, *[(KEYS, head_dim)] * 2))
    (biases,) = _draw(device, torch.float32, (KEYS,))
    offsets = torch.tensor([0, 3, KEYS // 3, KEYS // 2, KEYS], dtype=torch.int32, device=device)
    given, scales = (queries, keys, values, biases, offsets), (key_scales, value_scales)
    found = biased_decode(*given, scaling=head_dim**-0.5, max_head_length=KEYS, num_documents=2, scales=scales)
    expected = biased_attention_reference(*given, scaling=head_dim**-0.5, num_documents=2, scales=scales)
    return list(zip(found, expected, strict=True))


def _try_attention_stats(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.attention_stats import attention_stats
    from compactor_kernels.reference_stats import attention_stats_reference

    queries, keys = _draw(device, dtype, (HEADS * GROUP, ROWS, head_dim), (HEADS, KEYS, head_dim))
    (shift,) = _draw(device, torch.float32, (HEADS * GROUP, ROWS))
    stops = torch.arange(ROWS, device=device, dtype=torch.int32) // 32 * 32
    pairs: Pairs = []
    for limits in (None, stops):
        found, expected = (
            run(queries, keys, shift - 3.0, scaling=head_dim**-0.5, stops=limits)
            for run in (attention_stats, attention_stats_reference)
        )
        assert found.squares is not None and expected.squares is not None
        pairs.append((found.squares, expected.squares))
    return pairs


def _try_refine_steps(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.reference import FitRows
    from compactor_kernels.reference_steps import begin_steps_reference, take_step_reference
    from compactor_kernels.refine_gradients import plan_gradients
    from compactor_kernels.refine_steps import begin_steps, take_step

    (queries,) = _draw(device, dtype, (HEADS, ROWS, head_dim))
    near, out, keys, values, biases, lse = _draw(
        device,
        torch.float32,
        (HEADS, ROWS, head_dim),
        (HEADS, ROWS, head_dim),
        (HEADS, KEYS, head_dim),
        (HEADS, KEYS, head_dim),
        (HEADS, KEYS),
        (HEADS, ROWS),
    )
    weights = lse.abs() + 0.1
    rows = FitRows(queries, weights, lse + 3.0, lse - 1.0, near, out)
    index = torch.arange(ROWS, device=device).flip(0)[: ROWS - 7].contiguous()
    lengths, scales = [KEYS, KEYS // 3], torch.ones(3, HEADS, device=device)
    scaling = head_dim**-0.5
    plan = plan_gradients(rows, lengths, scales, scaling=scaling)
    # the first step is short: it moves a component whose gradient is nearly 0 one way or the other
    drawn, rates = torch.stack([index, index // 2]), torch.tensor([0.01, 0.3], device=device)
    start = keys, biases, values, scales, drawn, rates, (0.9, 0.95)
    steps, twin = begin_steps(plan, *start), begin_steps_reference(*start)
    for _ in rates:
        take_step(plan, steps)
        take_step_reference(rows, lengths, scales, twin, scaling=scaling)
    pairs: Pairs = list(zip(steps.first, twin.first, strict=True))
    rounded = steps.rounded_keys.float(), steps.scaled_values.float() * plan.out_unit.view(-1, 1, 1)
    for before, here, there in zip(
        (keys, biases, values, keys, values), (*steps.moving, *rounded), (*twin.moving, *twin.moving[::2]), strict=True
    ):
        pairs.append((here - before, there - before))
    return pairs


def _try_kept_shares(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.kept_shares import kept_shares
    from compactor_kernels.reference import kept_shares_reference

    rows = 3 * ROWS + 5  # several blocks, the last one not full
    wide, keys = _draw(device, dtype, (HEADS, rows, 2, head_dim), (HEADS, KEYS, head_dim))
    biases, shift, near, roots = _draw(
        device, torch.float32, (HEADS, KEYS), (HEADS, rows), (HEADS, rows), (HEADS, rows)
    )
    given = wide[:, :, 1], keys, biases, shift - 3.0
    pairs: Pairs = []
    for normaliser, weights in ((None, None), (near, roots.abs())):
        found, expected = (
            run(*given, scaling=head_dim**-0.5, near_share=normaliser, root_weights=weights)
            for run in (kept_shares, kept_shares_reference)
        )
        for a, b in zip(found, expected, strict=True):
            if a is not None and b is not None:
                pairs += zip(a.split(64, dim=1), b.split(64, dim=1), strict=True)
    return pairs


def _try_greedy(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """``head_dim`` is the number of targets; everything is float32 whatever ``dtype`` is."""
    from compactor_kernels.greedy import greedy_picks
    from compactor_kernels.reference_greedy import greedy_picks_reference

    num_keys = 500  # of a chunk: seldom a multiple of 16
    columns, targets = _draw(device, torch.float32, (HEADS, 2 * num_keys, num_keys), (HEADS, num_keys, head_dim))
    columns[0, :, 20:] = 0.0  # this problem ends early
    gram = columns.mT @ columns
    found, expected = (
        run(gram, targets, 32, stop=1e-6, redundant=1e-5, look_every=8)
        for run in (greedy_picks, greedy_picks_reference)
    )
    by_key = [torch.zeros_like(one.gains).scatter_(1, one.order, one.gains) for one in (found, expected)]
    return [
        (found.energy, expected.energy),
        (by_key[0], by_key[1]),
        *zip(found.gains.split(16, dim=1), expected.gains.split(16, dim=1), strict=True),
    ]


def _try_tail_decode(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.reference_tail import tail_decode_reference
    from compactor_kernels.tail_decode import tail_decode

    pairs: Pairs = []
    padding = torch.tensor([0, 3, KEYS - 8], device=device)
    for q_len, tail_end in ((1, torch.tensor([KEYS - 7], device=device)), (37, KEYS - 37)):
        batch = len(padding), HEADS * GROUP, q_len
        queries, wide = _draw(device, dtype, (*batch, head_dim), (2, len(padding), KEYS, HEADS, head_dim))
        given = queries, *wide.transpose(2, 3), padding, tail_end
        document = _draw(device, torch.float32, (*batch, head_dim), batch)
        document[1][1, 1] = -torch.inf  # a head that kept nothing
        for merged in (None, (document[0], document[1])):
            found, expected = (
                run(*given, scaling=head_dim**-0.5, document=merged) for run in (tail_decode, tail_decode_reference)
            )
            pairs += zip(found.out, expected.out, strict=True)
            pairs += zip(found.lse.exp(), expected.lse.exp(), strict=True)  # rows may see nothing
    return pairs


def _try_merge_rows(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.merge_rows import merge_measured, merge_rows, merge_scored
    from compactor_kernels.reference_merge import (
        merge_measured_reference,
        merge_rows_reference,
        merge_scored_reference,
    )

    rows = 3 * ROWS + 5  # the last tile is not full
    (wide,) = _draw(device, dtype, (3, rows, HEADS, GROUP, head_dim))
    outs = [one.permute(1, 2, 0, 3) for one in wide]
    shape = HEADS, GROUP, rows
    own_lse, prefix_lse, document_lse, roots = _draw(device, torch.float32, *([shape] * 4))
    prefix_lse[0, :, :9] = document_lse[1, :, 7:] = -torch.inf  # rows that see no key of a part
    near, document = [(outs[0], own_lse), (outs[1], prefix_lse)], (outs[2], document_lse)
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for parts in (near, near[:1]):
        found += [*merge_rows(parts, document), *merge_scored(parts, document, roots)]
        expected += [*merge_rows_reference(parts, document), *merge_scored_reference(parts, document, roots)]
    merged = merge_rows_reference(near, document)
    given = (merged.out, merged.lse - 1.0), (merged.near, merged.near_lse), merged.out, roots
    found += merge_measured(*given, step=2, out_type=dtype)
    expected += merge_measured_reference(*given, step=2)
    return list(zip(found, expected, strict=True))


def _try_gram(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """``head_dim`` is a number of columns; rows are float16 whatever ``dtype`` is."""
    from compactor_kernels.gram import add_gram, add_product
    from compactor_kernels.reference_gram import add_gram_reference, add_product_reference

    num_rows = 2 * ROWS + 5  # three spans, the last one not full
    pairs: Pairs = []
    # every size of tile, rows aligned or not
    for heads, columns, stored in ((HEADS, head_dim, head_dim), (HEADS, 130, 131), (1, 515, 520)):
        (wide,) = _draw(device, torch.float16, (heads, num_rows, stored))
        rows = wide.abs()[..., :columns]
        (total,) = _draw(device, torch.float64, (heads, columns, columns))
        found, expected = ((total + total.mT).contiguous() for _ in range(2))
        add_gram(found, rows, rows_per_span=ROWS)
        add_gram_reference(expected, rows)
        pairs += zip(found.split(64, dim=2), expected.split(64, dim=2), strict=True)
    for num_targets in (8, 2 * head_dim):
        (targets,) = _draw(device, torch.float16, (1, num_rows, num_targets))
        found, expected = targets.new_zeros(2, 1, columns, num_targets, dtype=torch.float64)
        add_product(found, rows, targets)
        add_product_reference(expected, rows, targets)
        pairs += zip(found.split(64, dim=1), expected.split(64, dim=1), strict=True)
    return pairs


def _try_value_targets(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """Everything is float32 whatever ``dtype`` is, and of so few bits that no sum is rounded: halves of a number that
    differs in its last bit may be quite different ones."""
    from compactor_kernels.reference_targets import value_targets_reference
    from compactor_kernels.value_targets import value_targets

    wide, product, units = _draw(
        device,
        torch.float32,
        (2, HEADS + 1, GROUP, 2 * ROWS, head_dim),
        (HEADS, GROUP * (ROWS - 7), head_dim),
        (HEADS,),
    )
    (roots,) = _draw(device, torch.float32, product.shape[:2])
    roots = roots.sign() + 1.5
    out, near = (64.0 * wide).round()[:, :, :, ::2] / 64.0
    rows = torch.arange(ROWS, device=device).flip(0)[: ROWS - 7].contiguous()
    given = (2.0**12 * product).round() / 2.0**12, out, near, roots / 2.0, roots, units.sign() * 0.25 + 0.75
    heads = torch.tensor([2, 0], device=device)
    found, expected = (run(*given, heads=heads, rows=rows) for run in (value_targets, value_targets_reference))
    parts = (one.halves.split(head_dim, dim=-1) for one in (found, expected))
    return [*zip(*parts, strict=True), (found.energy, expected.energy)]


def _try_rotary(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.reference_rotary import rotate_reference
    from compactor_kernels.rotary import rotate

    wide, keys = _draw(device, dtype, (2, ROWS, HEADS * GROUP, head_dim), (2, HEADS, ROWS, head_dim))
    cos, sin = _draw(device, dtype, (1, ROWS, head_dim), (1, ROWS, head_dim))
    given = wide.transpose(1, 2), keys, cos, sin
    pairs = list(zip(rotate(*given), rotate_reference(*given), strict=True))
    norms = tuple(_draw(device, dtype, (2, head_dim))[0])
    found, expected = (
        run(*given, norm_weights=(norms[0], norms[1]), epsilon=1e-6) for run in (rotate, rotate_reference)
    )
    return [*pairs, *zip(found, expected, strict=True)]


def _try_gemv(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """``head_dim`` is the number of inputs."""
    from compactor_kernels.gemv import ACTIVATIONS, MAX_ROWS, gated_gemv, gemv
    from compactor_kernels.reference_gemv import gated_gemv_reference, gemv_reference

    pairs: Pairs = []
    weights = _draw(device, dtype, (ROWS, head_dim), (ROWS + 3, head_dim), (5, head_dim))
    biases = _draw(device, dtype, (ROWS,), (ROWS + 3,), (5,))
    for num_rows in (1, MAX_ROWS):
        (rows,) = _draw(device, dtype, (num_rows, head_dim))
        for parts, own in ((1, None), (3, None), (3, biases)):  # as modules call it
            found, expected = (run(rows, weights[:parts], own) for run in (gemv, gemv_reference))
            pairs += zip(found, expected, strict=True)
        for name in ACTIVATIONS:
            given = rows, weights[0], weights[1][:ROWS]
            pairs.append((gated_gemv(*given, activation=name), gated_gemv_reference(*given, activation=name)))
    return pairs


def _try_rms_norm(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """``head_dim`` is the size of a row."""
    from compactor_kernels.rms_norm import rms_norm

    rows, weight = _draw(device, dtype, (ROWS, head_dim), (head_dim,))
    (addend,) = _draw(device, dtype, (1 + ROWS, head_dim))
    total, whole = torch.empty_like(rows), rows + addend[1:]
    expected, summed = (
        torch.nn.functional.rms_norm(part.float(), weight.shape, weight.float(), 1e-6) for part in (rows, whole)
    )
    found = rms_norm(rows, weight, 1e-6, addend=addend[1:], total=total)
    return [(rms_norm(rows, weight, 1e-6), expected), (found, summed), (total, whole)]


def _try_step_decode(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    from compactor_kernels.biased_decode import attend_splits
    from compactor_kernels.reference import biased_attention_reference
    from compactor_kernels.reference_step import step_decode_reference
    from compactor_kernels.step_decode import step_decode

    pairs: Pairs = []
    padding = torch.tensor([0, 3, KEYS - 8], device=device)
    batch, capacity = len(padding), KEYS + 3
    queries, new, kept = _draw(
        device, dtype, (batch, HEADS * GROUP, 1, head_dim), (2, batch, HEADS, 1, head_dim), (2, 3 * KEYS, head_dim)
    )
    (biases,) = _draw(device, torch.float32, (3 * KEYS,))
    for lengths in ((KEYS, 2 * KEYS), (0, 3 * KEYS)):
        offsets = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
        document, scaling = (queries, *kept, biases, offsets), head_dim**-0.5
        splits = attend_splits(*document, scaling=scaling, max_head_length=3 * KEYS, keys_per_split=16)
        merged = biased_attention_reference(*document, scaling=scaling)
        for end in (KEYS - 7, KEYS + 2):
            tail_end = torch.tensor([end], device=device)
            (wide,) = _draw(device, dtype, (2, batch, HEADS, capacity, head_dim))
            here, there = wide.clone(), wide.clone()
            at = padding, tail_end
            found = step_decode(queries, new[0], new[1], here[0], here[1], *at, splits, scaling=scaling)
            expected = step_decode_reference(queries, new[0], new[1], there[0], there[1], *at, merged, scaling=scaling)
            pairs += [*zip(found, expected, strict=True), (here, there)]
    return pairs


def _try_cholesky(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """``head_dim`` is the number of right-hand sides; everything is float32 whatever ``dtype`` is."""
    from compactor_kernels.cholesky import cholesky_factors_batched, cholesky_solve_factored
    from compactor_kernels.reference_cholesky import cholesky_solve_reference

    size = 2 * 64 + 1  # three tiles: the last one is updated twice
    (rows,) = _draw(device, torch.float32, (HEADS, 2 * size, size))
    systems = rows.mT @ rows / (2 * size)
    systems[1].diagonal().sub_(2.0)  # has no factor
    added = torch.linspace(0.1, 1.0, HEADS, device=device)
    factors = cholesky_factors_batched(systems, added=added)
    pairs: Pairs = []
    for num_rhs in (1, head_dim):
        (rhs,) = _draw(device, torch.float32, (HEADS, size, num_rhs))
        expected, failed = cholesky_solve_reference(systems, rhs, added)
        found = cholesky_solve_factored(factors, rhs)
        pairs += [(factors.failed, failed), *zip(found[0].split(32), expected[0].split(32), strict=True)]
    return pairs


def _try_nnls(device: torch.device, dtype: torch.dtype, head_dim: int) -> Pairs:
    """``head_dim`` is the number of variables; everything is float64 whatever ``dtype`` is."""
    from compactor_kernels.nnls import box_newton
    from compactor_kernels.reference_nnls import BoxProblems, Search, box_newton_reference

    (rows,) = _draw(device, torch.float64, (HEADS + 1, 4 * head_dim, head_dim))
    gram = rows.mT @ rows / (4 * head_dim)
    gram[0, :, head_dim // 2 :] = gram[0, head_dim // 2 :] = 0.0  # padding
    gram[2].diagonal().sub_(3.0)  # has no factor, and goes downhill
    rhs, start = _draw(device, torch.float64, *[(HEADS + 1, head_dim)] * 2)
    low, high = torch.full_like(rhs, -0.5), torch.full_like(rhs, 0.7)
    seen = gram.diagonal(dim1=-2, dim2=-1) != 0
    given = BoxProblems(gram, rhs, start.clamp(low, high), low, high, seen, rhs.abs().amax(-1))
    search = Search((0.5, 6), (0.25, 8), 1e-4, 1e-7, 1.0)
    found, expected = (
        run(given, tolerance=1e-6, max_iterations=12, search=search) for run in (box_newton, box_newton_reference)
    )
    return [
        *zip(found.point.nan_to_num(9.0), expected.point.nan_to_num(9.0), strict=True),
        (found.optimality <= 1e-6, expected.optimality <= 1e-6),
    ]


TRIALS: dict[str, Callable[[torch.device, torch.dtype, int], Pairs]] = {
    "biased_decode": _try_biased_decode,
    "biased_decode_int8": _try_biased_decode_int8,
    "attention_stats": _try_attention_stats,
    "refine_steps": _try_refine_steps,
    "kept_shares": _try_kept_shares,
    "tail_decode": _try_tail_decode,
    "greedy": _try_greedy,
    "gram": _try_gram,
    "value_targets": _try_value_targets,
    "merge_rows": _try_merge_rows,
    "rotary": _try_rotary,
    "gemv": _try_gemv,
    "rms_norm": _try_rms_norm,
    "step_decode": _try_step_decode,
    "cholesky": _try_cholesky,
    "nnls": _try_nnls,
}
