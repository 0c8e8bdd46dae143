"""Knows the Triton kernel of RMS norms of a few rows. Knows no model.

    y = x / sqrt(mean x^2 + epsilon) * weight     (Zhang and Sennrich 2019, equation 4)

where x may be a sum of two vectors, a residual stream, which is written too.

PyTorch's own is as exact; this one is set up while the kernel before it ends (`launching`), which is most of the time
that a norm of a few rows takes.

Twin: `torch.nn.functional.rms_norm`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from compactor_kernels.launching import gdc_launch_dependents, gdc_wait, launch_options, launches_early

MAX_SIZE = 16384
SMALL = 512  # elements that one warp takes


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    rows,  # (num_rows, SIZE)
    addend,  # (num_rows, SIZE), not read unless HAS_ADDEND
    total,  # (num_rows, SIZE), written where HAS_ADDEND: the sum
    weight,  # (SIZE,)
    out,  # (num_rows, SIZE)
    epsilon,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Normalise one row; grid (num_rows,)."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    elements = tl.arange(0, TILE)
    exists = elements < SIZE
    start = tl.program_id(0).to(tl.int64) * SIZE
    row = tl.load(rows + start + elements, mask=exists, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        row += tl.load(addend + start + elements, mask=exists, other=0.0).to(tl.float32)
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + start + elements, rounded, mask=exists)
        row = rounded.to(tl.float32)
    scale = tl.load(weight + elements, mask=exists, other=0.0).to(tl.float32)
    row = row * tl.rsqrt(tl.sum(row * row, 0) / SIZE + epsilon) * scale
    tl.store(out + start + elements, row.to(out.dtype.element_ty), mask=exists)


def rms_norm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    out: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x / sqrt(mean x^2 + epsilon) * weight over the last dimension; equation in the module.

    rows: (..., size), float32, float16 or bfloat16, contiguous, size at most `MAX_SIZE`; weight: (size,) of the same
    type, contiguous; ``out``: where the result is written, like the rows; ``addend`` and ``total``, like the rows too:
    what is added first, and where the sum is written, rounded. Returns the type of the rows; all before is float32.
    Launches once on the current stream of the tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(rows, weight, {"out": out, "addend": addend, "total": total})
    out = torch.empty_like(rows) if out is None else out
    if rows.numel():
        size, early = rows.shape[-1], launches_early(rows.device)
        with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
            _rms_norm[(rows.numel() // size,)](
                rows,
                rows if addend is None else addend,
                rows if total is None else total,
                weight,
                out,
                epsilon,
                SIZE=size,
                TILE=triton.next_power_of_2(size),
                HAS_ADDEND=addend is not None,
                OVERLAPS=early,
                num_warps=1 if size <= SMALL else 8,
                **launch_options(rows.device),
            )
    return out


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_rms_norm, triton.JITFunction)


def _check_inputs(rows: torch.Tensor, weight: torch.Tensor, like_rows: dict[str, torch.Tensor | None]) -> None:
    if rows.dim() < 1 or not 1 <= rows.shape[-1] <= MAX_SIZE:
        raise ValueError(f"rows must be (..., size), size 1 to {MAX_SIZE}, not {tuple(rows.shape)}.")
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"rows must be float32, float16 or bfloat16, not {rows.dtype}.")
    if weight.shape != rows.shape[-1:]:
        raise ValueError(f"weight must be ({rows.shape[-1]},), not {tuple(weight.shape)}.")
    if weight.dtype != rows.dtype:
        raise ValueError(f"weight must have the type of the rows, {rows.dtype}, not {weight.dtype}.")
    if weight.device != rows.device:
        raise ValueError(f"weight must be on {rows.device} like the rows, not on {weight.device}.")
    for name, part in (("rows", rows), ("weight", weight)):
        if not part.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
    if (like_rows["addend"] is None) != (like_rows["total"] is None):
        raise ValueError("addend and total must be given together.")
    wanted = rows.shape, rows.dtype, rows.device
    for name, given in like_rows.items():
        if given is not None and ((given.shape, given.dtype, given.device) != wanted or not given.is_contiguous()):
            found = f"{tuple(given.shape)} {given.dtype} on {given.device}"
            raise ValueError(
                f"{name} must be {tuple(rows.shape)} {rows.dtype} on {rows.device}, contiguous, not {found}."
            )
    if not rows.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {rows.device}; use torch's own there.")
