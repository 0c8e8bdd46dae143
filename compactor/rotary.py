"""Knows how the attention modules of a loaded model turn queries and keys by one kernel. Knows no attention.

Transformers writes rotary position embedding as a dozen operations on queries and keys, in a function of the model's
file that the attention modules call by its name. A module of a half-precision model on an NVIDIA GPU is given its own
code with another function under that name; the file, its classes and other models stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import torch

from compactor.kernel_trial import usable
from compactor.lazy_rows import HEADS_FIRST, plain, waiting_norm
from compactor.norms import is_half_on_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "apply_rotary_pos_emb"
TRIED = 1, 3, 40  # batch, heads and rows of random input
HEAD_DIM = 128  # of modules that do not tell theirs
ROUNDINGS = 4.0  # units in the last place of 1 by which two functions may differ on it

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fuse_rotary(model: PreTrainedModel) -> int:
    """Let the kernel `rotary` turn queries and keys of a half-precision model on an NVIDIA GPU; return in how many
    modules.

    Modules that other code moves between devices (accelerate's hooks) stay as they are, and so does every module whose
    function does something else.
    """
    count, forms = 0, dict[tuple[type, int], type | None]()
    for module in model.modules():
        kind = type(module)
        weight = next(module.parameters(), None)
        if not calls_rotary(kind) or weight is None or not is_half_on_gpu(weight) or hasattr(module, "_hf_hook"):
            continue
        head_dim = int(getattr(module, "head_dim", HEAD_DIM))
        if (kind, head_dim) not in forms:
            form = fused_form(cast(FunctionType, kind.forward), weight.device, weight.dtype, head_dim)
            forms[kind, head_dim] = None if form is None else type(kind.__name__, (kind,), {"forward": form})
        turning = forms[kind, head_dim]
        if turning is not None:
            module.__class__ = turning  # a bound method would keep the module alive by itself
            count += 1
    return count


def calls_rotary(kind: type) -> bool:
    """Whether the forward function of a class calls the rotary function of its file by name."""
    forward = getattr(kind, "forward", None)
    return isinstance(forward, FunctionType) and NAME in forward.__code__.co_names and NAME in forward.__globals__


@torch.no_grad()
def fused_form(forward: FunctionType, device: torch.device, dtype: torch.dtype, head_dim: int) -> FunctionType | None:
    """Return a forward function of the same code that turns by the kernel; None where the kernel cannot be trusted, or
    does something else than the function that it would replace."""
    original: Rotary = forward.__globals__[NAME]
    if forward.__closure__ or not usable("rotary", device, dtype, head_dim):
        return None
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(*TRIED, head_dim, generator=generator).to(device, dtype)
    angles = 6.0 * torch.rand(TRIED[0], TRIED[2], head_dim, generator=generator)
    given = queries, queries[:, :1], angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    allowed = ROUNDINGS * torch.finfo(dtype).eps
    for found, expected in zip(by_kernel(*given, original=original), original(*given), strict=True):
        if found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
            return None
    names: dict[str, Any] = {**forward.__globals__, NAME: partial(by_kernel, original=original)}
    form = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    form.__kwdefaults__ = forward.__kwdefaults__
    return form


def by_kernel(
    queries: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    *,
    original: Rotary,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn by the kernel what it takes, the rest by the function of the model's file; norms of queries and keys that
    still wait are computed on the way."""
    suits = unsqueeze_dim == 1 and queries.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == queries.shape[-1]
    suits = suits and not cos.shape[-1] % 2 and queries.stride(-1) == keys.stride(-1) == 1
    suits = suits and is_half_on_gpu(queries)  # a model may move
    if not suits or not queries.dtype == keys.dtype == cos.dtype == sin.dtype:
        return original(queries, keys, cos, sin, unsqueeze_dim)
    from compactor_kernels.rotary import rotate

    angles = cos.contiguous(), sin.contiguous()
    norms = waiting_norm(queries, swapped=True), waiting_norm(keys, swapped=True)
    if norms[0] is not None and norms[1] is not None and norms[0].epsilon == norms[1].epsilon:
        queries, keys = (plain(norm.operands[0]).transpose(*HEADS_FIRST) for norm in norms if norm is not None)
        weights = norms[0].weight, norms[1].weight
        return rotate(queries, keys, *angles, norm_weights=weights, epsilon=norms[0].epsilon)
    return rotate(plain(queries), plain(keys), *angles)
