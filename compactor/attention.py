"""Knows attention: scores, log-sum-exp, softmax, and the function that transformers calls. Knows no files, no fitting.

All mathematics of attention over a document lives here, once. With s = scaling, one query q attends to the kept keys
k_j with bias b_j and to the tail (the tokens after the document):

    p_j = exp(s q.k_j + b_j - lse),   lse = log(sum over document and tail of exp(s q.k_j + b_j)),   out = sum p_j v_j

The document part and the tail are computed apart and merged by log-sum-exp (FlashAttention-2, arXiv 2307.08691,
section 3.1), so that every sequence of a batch shares one document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from compactor import workspace
from compactor.errors import CompactorError
from compactor.kernel_trial import usable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "compactor"
TAG = "compactor_layer"  # attribute of the key tensor through which a cache layer reaches `attention_forward`
GPU_BLOCK_FRACTION = 1 / 80  # of a GPU's memory that one block of float32 scores takes
CPU_BLOCK_ELEMENTS = 1 << 21  # score elements held at once on a CPU: 8 MiB, so that a block stays in the cache
MPS_BLOCK_ELEMENTS = 1 << 24
LARGEST_HALF = 6e4  # float16 ends at 65,504
CUDNN_OPERATIONS = 2e12  # of an attention, from which making cuDNN's plan for its shapes (75 ms) pays in 36 layers
BEFORE_HOPPER = "it is faster on Hopper GPUs and newer ones only"
CUDNN_TRIED, CUDNN_TOLERANCE = 128, 0.02  # rows of its trial, and how far it may be from FlashAttention-2


class AttendingLayer(Protocol):
    """A cache layer that computes its own attention."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        scaling: float,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return attention of ``query`` as (batch, num_heads, q_len, head_dim), float32 or the query's type."""
        ...


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend through the cache layer that tagged ``key``; without a tag, through transformers' own sdpa.

    Signature and shapes are those of transformers' attention interface: query (batch, num_heads, q_len, head_dim),
    key and value (batch, num_kv_heads, kv_len, head_dim); returns (batch, q_len, num_heads, head_dim) and None.
    """
    layer: AttendingLayer | None = getattr(key, TAG, None)
    if layer is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query, key, value, mask=attention_mask, scaling=scale, position_ids=kwargs.get("position_ids"))
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def register(model: PreTrainedModel) -> None:
    """Make ``model`` call `attention_forward`; calls without a compacted cache behave as sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(ATTENTION_NAME)


def tag(key: torch.Tensor, layer: AttendingLayer) -> torch.Tensor:
    """Return a view of ``key`` that carries ``layer`` to `attention_forward`."""
    view = key.view(key.shape)
    setattr(view, TAG, layer)
    return view


def row_blocks(q_len: int, kv_len: int, num_heads: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of query rows such that the scores of one block stay within the device's block size."""
    step = max(1, min(q_len, block_elements(device) // max(1, kv_len * num_heads)))
    for start in range(0, q_len, step):
        yield start, min(start + step, q_len)


def block_elements(device: torch.device) -> int:
    """Return how many score elements are held at once; a bound of the workspace makes them fewer."""
    usual = CPU_BLOCK_ELEMENTS if device.type == "cpu" else MPS_BLOCK_ELEMENTS
    if device.type == "cuda":
        usual = int(torch.cuda.get_device_properties(device).total_memory * GPU_BLOCK_FRACTION) // 4
    return workspace.within(4 * usual, workspace.BLOCK_SHARE) // 4


def causal_scores(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return scores of the last rows of a causal sequence, hidden ones -inf.

    queries: (num_kv_heads, group, q_len, head_dim) float32, the last q_len tokens before the end of ``keys``;
    keys: (num_kv_heads, kv_len, head_dim) float32. Returns float32 (num_kv_heads, group, q_len, kv_len); row i sees
    keys up to kv_len - q_len + i.
    """
    rows = (queries * scaling).flatten(1, 2)  # one product per KV head: its keys are not repeated for the group
    scores = torch.bmm(rows, keys.transpose(-1, -2)).view(*queries.shape[:3], -1)
    hide_future(scores)
    return scores


def weigh_values(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Multiply probabilities (num_kv_heads, group, q_len, kv_len) with values (num_kv_heads, kv_len, head_dim)."""
    return torch.bmm(probs.flatten(1, 2), values).view(*probs.shape[:3], -1)


def hide_future(scores: torch.Tensor) -> None:
    """Set scores (..., q_len, kv_len) of keys after the row's own position to -inf, in place (bottom-right causal)."""
    q_len, kv_len = scores.shape[-2:]
    if q_len > 1:
        last = scores[..., kv_len - q_len :]
        hidden = torch.ones(q_len, q_len, dtype=torch.bool, device=scores.device).triu_(1)
        last.masked_fill_(hidden, -math.inf)


def document_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    biases: torch.Tensor,
    offsets: torch.Tensor,
    *,
    scaling: float,
    max_head_length: int,
    num_documents: int = 1,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    settled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to ragged kept keys shared by a batch; the Triton kernel on CUDA, its torch twin elsewhere.

    query (batch, num_heads, q_len, head_dim); keys, values (num_kept, head_dim); biases (num_kept,) float32; offsets
    (num_kv_heads + 1,) int32. ``num_documents``, ``scales`` and ``settled`` as in the kernel. Returns float32 out
    (query's shape) and lse (batch, num_heads, q_len).
    """
    name = "biased_decode" if scales is None and num_documents == 1 else "biased_decode_int8"
    if kernel_usable(name, query):
        from compactor_kernels.biased_decode import biased_decode

        out, lse = biased_decode(
            query.contiguous(),
            keys,
            values,
            biases,
            offsets,
            scaling=scaling,
            max_head_length=max_head_length,
            num_documents=num_documents,
            scales=scales,
            settled=settled,
        )
    else:
        from compactor_kernels.reference import biased_attention_reference

        out, lse = biased_attention_reference(
            query, keys, values, biases, offsets, scaling=scaling, num_documents=num_documents, scales=scales
        )
    return out, lse


def kernel_usable(name: str, query: torch.Tensor) -> bool:
    """Whether a kernel of `kernel_trial.TRIALS` runs, and runs rightly, for queries like this one."""
    return usable(name, query.device, query.dtype, query.shape[-1])


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    *,
    out_type: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend without a mask: query (num_kv_heads, rows, head_dim), keys and values (num_kv_heads, kv_len, head_dim).

    Returns out in ``out_type`` (query's shape) and float32 lse (num_kv_heads, rows). Half-precision inputs on an NVIDIA
    GPU go through `fused_attention`; elsewhere all is computed in float32.
    """
    if is_fast(query):
        return fused_attention(query, keys, values, scaling, causal=False, out_type=out_type)
    num_kv_heads, num_rows, _ = query.shape
    out = torch.empty(query.shape, dtype=out_type, device=query.device)
    lse = torch.empty(query.shape[:-1], device=query.device)
    keys, values = keys.float(), values.float()
    for start, stop in row_blocks(num_rows, keys.shape[1], num_kv_heads, query.device):
        scores = torch.bmm(query[:, start:stop].float() * scaling, keys.mT)
        lse[:, start:stop] = scores.logsumexp(-1)
        out[:, start:stop] = torch.bmm(scores.sub_(lse[:, start:stop].unsqueeze(-1)).exp_(), values)
    return out, lse


def is_fast(query: torch.Tensor) -> bool:
    """Whether a tensor is of half precision on an NVIDIA GPU whose matrix units and fused attention take it."""
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and fused_available(query.device)


def merges_in_one_pass(query: torch.Tensor) -> bool:
    """Whether a kernel merges the attention parts of rows like these, in the type of the query, row by row."""
    return is_fast(query) and kernel_usable("merge_rows", query)


def exponentials(query: torch.Tensor, keys: torch.Tensor, scaling: float, row_shift: torch.Tensor) -> torch.Tensor:
    """Return exp(s q_i.k_j + row_shift_i), (n, rows, kv_len); with row_shift = -lse this is attention. Shapes as in
    `shifted_scores`; float16 where `is_fast`, else float32."""
    return exponential_of(shifted_scores(query, keys, None, scaling, row_shift), query)


def shifted_scores(
    query: torch.Tensor, keys: torch.Tensor, key_shift: torch.Tensor | None, scaling: float, row_shift: torch.Tensor
) -> torch.Tensor:
    """Return s q_i.k_j + row_shift_i + key_shift_j, (n, rows, kv_len) float32, for query (n, rows, head_dim), keys
    (n, kv_len, head_dim), row_shift (n, rows) and key_shift (n, kv_len) float32.

    Half-precision queries and keys are multiplied as they are where `is_fast`: scores of some models are in the
    thousands, and rounding them again would ruin the exponential. Sums and shifts are float32.
    """
    if is_fast(query):
        result = half_product(query, keys.to(query.dtype).mT)
    else:
        result = torch.bmm(query.float(), keys.float().mT)
    torch.add(row_shift.unsqueeze(-1), result, alpha=scaling, out=result)
    return result if key_shift is None else result.add_(key_shift.unsqueeze(1))


def exponential_of(scores: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return exp(scores), as float16 of at most `LARGEST_HALF` where `is_fast` holds for the query; overwrites."""
    if not is_fast(query):
        return scores.exp_()
    scores.clamp_(max=math.log(LARGEST_HALF))
    return torch.exp(scores, out=torch.empty(scores.shape, dtype=torch.float16, device=scores.device))


@cache
def fused_available(device: torch.device) -> bool:
    """Whether PyTorch's own fused attention and mixed products run on a CUDA device: an NVIDIA GPU, Ampere or newer."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def half_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the batched product of two half-precision tensors on the matrix units, summed and returned in float32."""
    return torch.bmm(left, right, out_dtype=torch.float32)


def fused_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    *,
    causal: bool,
    out_type: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's own fused attention: query, keys and values (num_heads, rows, head_dim) of half precision. Returns out
    (num_heads, rows, head_dim), rounded to the type of the query and then as ``out_type``, and float32 lse (num_heads,
    rows). Large products take cuDNN's kernel where there is one, others FlashAttention-2."""
    num_heads, num_rows, head_dim = query.shape
    operations = 4 * num_heads * num_rows * keys.shape[1] * head_dim
    large = not causal and len(keys) == num_heads and operations >= CUDNN_OPERATIONS
    if large and cudnn_passes(query.device, query.dtype, head_dim):
        try:
            out, lse = _by_cudnn(query, keys, values, scaling)
            return out.to(out_type), lse
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # it has no plan for these shapes
            pass
    out, lse = _by_flash(query, keys, values, scaling, causal)
    return out.to(out_type), lse


def _by_flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = flash(query[None], keys[None], values[None], 0.0, causal, False, scale=scaling)[:2]
    return out[0], lse[0, :, : query.shape[1]]


def _by_cudnn(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = kernel(query[None], keys[None], values[None], None, True, 0.0, False, False, scale=scaling)[:2]
    return out[0], lse[0].reshape(len(query), -1)[:, : query.shape[1]]


@cache
def cudnn_passes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether cuDNN's attention is used on a device; tried once a process."""
    return cudnn_failure(device, dtype, head_dim) is None


def cudnn_failure(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why cuDNN's attention is not used on a CUDA device; None where it runs, is worth it (Hopper and newer) and
    agrees with FlashAttention-2 on small random input."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return BEFORE_HOPPER
    generator = torch.Generator().manual_seed(0)
    shapes = (2, CUDNN_TRIED, head_dim), (2, 3 * CUDNN_TRIED + 8, head_dim), (2, 3 * CUDNN_TRIED + 8, head_dim)
    query, keys, values = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    given = query, keys, values, head_dim**-0.5
    try:
        pairs = zip(_by_cudnn(*given), _by_flash(*given, causal=False), strict=True)
        agrees = all(bool((a.float() - b.float()).norm() <= CUDNN_TOLERANCE * b.float().norm()) for a, b in pairs)
    except (RuntimeError, TypeError) as error:  # built without it, no plan for these shapes, or other arguments
        return " ".join(str(error).split())[:100] or type(error).__name__
    return None if agrees else "it disagrees with FlashAttention-2"


def fused_segments(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    starts: torch.Tensor,
    longest: int,
    *,
    out_type: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2 for segments that lie one after another, each causal and by itself.

    query (num_heads, rows, head_dim), keys and values (num_kv_heads, rows, head_dim) of half precision; starts:
    (segments + 1,) int32, where each begins and the last ends; longest: rows of the longest. Returns out and lse as
    `fused_attention`.
    """
    q, k, v = (part.transpose(0, 1).contiguous() for part in (query, keys, values))
    flash = torch.ops.aten._flash_attention_forward
    out, lse = flash(q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scaling)[:2]
    return out.transpose(0, 1).to(out_type), lse[:, : query.shape[1]]


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the batched product (n, a, b) x (n, b, c) in float32; where ``left`` is float16, on the matrix units."""
    if left.dtype == torch.float16:
        return half_product(left, right.half())
    return torch.bmm(left, right.float())


def tail_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the dense tail of new tokens.

    query (batch, num_heads, q_len, head_dim); key, value (batch, num_kv_heads, tail_len, head_dim); mask bool
    (batch, 1, q_len, tail_len) with True for visible, or None for bottom-right causal. Returns out and lse as
    `document_attention`; a row that sees nothing gives 0 and -inf.
    """
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, tail_len = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, num_kv_heads, -1, q_len, head_dim).float() * scaling
    keys, values = key.float().unsqueeze(2), value.float().unsqueeze(2)
    out, lse = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:-1])
    for start, stop in row_blocks(q_len, tail_len, batch * num_heads, query.device):
        seen = tail_len - q_len + stop if mask is None else tail_len
        scores = torch.matmul(grouped[:, :, :, start:stop], keys[..., :seen, :].transpose(-1, -2))
        if mask is None:
            hide_future(scores)
        else:
            visible = mask if mask.dtype == torch.bool else mask > -1.0
            scores.masked_fill_(~visible[..., start:stop, -tail_len:].unsqueeze(2), -math.inf)
        block_lse = torch.logsumexp(scores, dim=-1)
        weights = scores.sub_(torch.where(block_lse.isinf(), 0.0, block_lse).unsqueeze(-1)).exp_()
        out[:, :, :, start:stop] = torch.matmul(weights, values[..., :seen, :])
        lse[:, :, :, start:stop] = block_lse
    return out.reshape(query.shape), lse.reshape(batch, num_heads, q_len)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two partial attentions by log-sum-exp, the maximum subtracted; rows without keys carry lse -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    shift = torch.where(lse.isinf(), 0.0, lse)
    out = out_a * torch.exp(lse_a - shift).unsqueeze(-1) + out_b * torch.exp(lse_b - shift).unsqueeze(-1)
    return out, lse


def require_consumed(pending: bool, where: str) -> None:
    """Raise when a layer's keys were handed out but `attention_forward` did not see them: a silent wrong answer."""
    if pending:
        raise CompactorError(
            f"The model did not attend through the compacted cache ({where}): its attention implementation was changed "
            "after attach. Call cache.attach(model) again and leave set_attn_implementation alone."
        )
