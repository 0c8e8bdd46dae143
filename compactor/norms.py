"""Knows which modules of a model are RMS norms that are computed as one kernel. Knows no other module.

In half precision, transformers writes a norm (Zhang and Sennrich 2019, equation 4) as eight operations, each a pass
over the activations. A module is given PyTorch's own, and for few rows the kernel `rms_norm`, only if they agree with
it on random input to the rounding of its type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from compactor.kernel_trial import usable
from compactor.lazy_rows import lazy_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPSILON_NAMES = ("variance_epsilon", "eps")  # attributes under which modules keep what is added to the mean square
ROWS = 32  # of random input
ROUNDINGS = 2.0  # units in the last place by which the two may differ
LEAST = 1e-3  # outputs below count as this large
FEW_ROWS = 1024  # up to which the Triton kernel normalises


def fuse_norms(model: PreTrainedModel) -> int:
    """Let PyTorch compute the RMS norms of a half-precision model on an NVIDIA GPU; return how many.

    Modules that other code moves between devices (accelerate's hooks) stay as they are, and so does every module that
    does not do what its name says. Weights are used as they are now.
    """
    count = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (norm := fused_form(module)) is not None:
            module.forward = norm
            count += 1
    return count


@torch.no_grad()
def fused_form(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that does what an RMS norm module does, by one kernel; None where there is none."""
    weight = getattr(module, "weight", None)
    epsilon = next((getattr(module, name) for name in EPSILON_NAMES if hasattr(module, name)), None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if not is_half_on_gpu(weight) or hasattr(module, "_hf_hook"):
        return None
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, ROWS, len(weight), generator=generator).to(weight.device, weight.dtype)
    expected, norm = module(given).float(), partial(rms_norm, weight=weight.detach(), epsilon=epsilon)
    allowed = ROUNDINGS * torch.finfo(weight.dtype).eps * expected.abs().clamp_min(LEAST)
    return norm if bool(((norm(given).float() - expected).abs() <= allowed).all()) else None


def rms_norm(hidden_states: torch.Tensor, *, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return x / sqrt(mean x^2 + epsilon) * weight over the last dimension, in the type of x; of few rows on a GPU when
    it is needed (`lazy_rows`)."""
    if hidden_states.numel() <= FEW_ROWS * len(weight) and kernel_takes(hidden_states, weight):
        from compactor_kernels import rms_norm as kernel

        return lazy_norm(hidden_states, weight, epsilon, kernel.rms_norm)
    return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, epsilon)


def kernel_takes(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the Triton kernel normalises these rows: it begins while the kernel before it ends."""
    alike = hidden_states.dtype == weight.dtype and hidden_states.device == weight.device
    if not (alike and is_half_on_gpu(weight) and hidden_states.is_contiguous() and not torch.is_grad_enabled()):
        return False
    return usable("rms_norm", weight.device, weight.dtype, len(weight))


def is_half_on_gpu(weight: torch.Tensor) -> bool:
    """Whether a weight is of half precision on an NVIDIA GPU: elsewhere nothing is gained."""
    return weight.is_cuda and torch.version.hip is None and weight.dtype in (torch.float16, torch.bfloat16)
