"""Knows the Triton kernel for the attention of many queries to few kept keys, written out. Knows no fit and no values.

For the rows q_i of a head, its kept keys k_j with biases b_j, a shift t_i, the logarithm n_i of what is attended to
besides (relative to the same normaliser) and a weight r_i:

    s_ij = scaling q_i.k_j + b_j + t_i,   z_i = log(exp(n_i) + sum_j exp(s_ij)),   shares_ij = r_i exp(s_ij - z_i)

and rest_i = exp(n_i - z_i). Without n the normaliser is taken as it is: z_i = 0. With t_i = -lse_i these are the rows
of the least squares problems of biases (without n) and values (with it), ready for their Gram matrices. A program keeps
a block of rows and streams the keys past it, twice where it has to sum first, so that scores never reach memory: what
is written is float16, once. The sums are those of online softmax (Milakov and Gimelshein, arXiv 1805.02867).

Twin: `reference.kept_shares_reference`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compactor_kernels.attention_stats import load_vectors

MAX_HEAD_DIM = 256
ALIGNMENT = tl.constexpr(8)  # columns: rows of the result begin at multiples of 16 bytes, as the matrix units like them

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_HALF = tl.constexpr(60000.0)
LOG2_LARGEST = tl.constexpr(15.872)


@triton.jit
def _key_scores(  # type: ignore[no-untyped-def]
    query_tile, shift, keys, biases, first_key, num_keys, scaling, stride_key,
    HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, KEY_TILE: tl.constexpr, PRODUCT_TYPE: tl.constexpr,
):  # fmt: skip
    """Return s of a tile of keys in base 2, (ROW_TILE, KEY_TILE) fp32; -inf for keys past the end."""
    in_tile = tl.arange(0, KEY_TILE)
    steps = tl.minimum(first_key + in_tile, num_keys - 1)
    key_tile = load_vectors(keys, steps, tl.arange(0, DIM_TILE), stride_key, HEAD_DIM, DIM_TILE).to(PRODUCT_TYPE)
    bias = tl.load(biases + first_key + in_tile, mask=first_key + in_tile < num_keys, other=float("-inf"))
    scores = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")
    return tl.fma(scores, scaling * LOG2_E, shift[:, None]) + (bias * LOG2_E)[None, :]


@triton.jit(do_not_specialize=["num_rows", "num_keys", "groups"])
def _kept_shares(  # type: ignore[no-untyped-def]
    queries,  # (num_heads, num_rows, HEAD_DIM)
    keys,  # (num_heads, num_keys, HEAD_DIM)
    biases,  # (num_heads, num_keys) fp32
    row_shift,  # (num_heads, num_rows) fp32, like the next two and rest
    near_share,  # not read unless NORMALISE
    root_weights,  # not read unless WEIGHTED
    shares,  # (num_heads, num_rows, groups * ALIGNMENT) fp16
    rest,  # not written unless NORMALISE
    scaling,
    stride_query_head,
    stride_query_row,
    num_rows,
    num_keys,
    groups,
    NORMALISE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    PRODUCT_TYPE: tl.constexpr,
):
    """Write the shares of one block of rows; grid (block of rows, head)."""
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * ROW_TILE
    in_block = tl.arange(0, ROW_TILE)
    exists = first_row + in_block < num_rows
    steps = tl.minimum(in_block, num_rows - 1 - first_row)  # rows past the end repeat the last one; they are not stored
    base = queries + head * stride_query_head + first_row.to(tl.int64) * stride_query_row
    query_tile = load_vectors(base, steps, tl.arange(0, DIM_TILE), stride_query_row, HEAD_DIM, DIM_TILE).to(
        PRODUCT_TYPE
    )
    row = head * num_rows + first_row + steps
    shift = tl.load(row_shift + row) * LOG2_E
    keys += head * num_keys * HEAD_DIM
    biases += head * num_keys

    if NORMALISE:
        largest = tl.load(near_share + row) * LOG2_E
        near = largest
        total = tl.where(largest == float("-inf"), 0.0, 1.0)  # of exp2(n) and of what the keys add, over exp2(largest)
        for first_key in range(0, num_keys, KEY_TILE):
            scores = _key_scores(
                query_tile, shift, keys, biases, first_key, num_keys, scaling, HEAD_DIM,
                HEAD_DIM, DIM_TILE, KEY_TILE, PRODUCT_TYPE,
            )  # fmt: skip
            before = largest
            largest = tl.maximum(largest, tl.max(scores, 1))
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            total = total * tl.exp2(before - finite) + tl.sum(tl.exp2(scores - finite[:, None]), 1)
        normaliser = tl.where(largest == float("-inf"), 0.0, largest) + tl.log2(total)
        tl.store(rest + row, tl.exp2(near - normaliser), mask=exists)
        shift -= normaliser

    weight = tl.full((ROW_TILE,), 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(root_weights + row)
    stride_share = groups * ALIGNMENT  # a multiple that the compiler knows of: stores take 16 bytes at once
    out = shares + (head * num_rows + first_row + in_block).to(tl.int64)[:, None] * stride_share
    for first_key in range(0, num_keys, KEY_TILE):
        scores = _key_scores(
            query_tile, shift, keys, biases, first_key, num_keys, scaling, HEAD_DIM,
            HEAD_DIM, DIM_TILE, KEY_TILE, PRODUCT_TYPE,
        )  # fmt: skip
        columns = first_key + tl.arange(0, KEY_TILE)
        # what is no number stays none: the caller says so
        powers = tl.exp2(tl.minimum(scores, LOG2_LARGEST, propagate_nan=tl.PropagateNan.ALL))
        values = tl.minimum(powers * weight[:, None], LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
        # the columns that only align the rows are written too: scores of keys past the end are -inf
        tl.store(
            out + columns[None, :], values.to(tl.float16), mask=exists[:, None] & (columns < stride_share)[None, :]
        )


class Tiles(NamedTuple):
    """How one launch cuts its work."""

    row_tile: int  # rows that a program keeps, a multiple of 16
    key_tile: int  # keys streamed at once
    dim_tile: int  # head_dim rounded up to a power of two, at least 16 for the matrix units
    num_warps: int
    num_stages: int


class KeptShares(NamedTuple):
    """What `kept_shares` returns."""

    shares: torch.Tensor  # (num_heads, num_rows, num_keys) float16, at most 60,000
    rest: torch.Tensor | None  # (num_heads, num_rows) float32; None without ``near_share``


def kept_shares(
    queries: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    row_shift: torch.Tensor,
    *,
    scaling: float,
    near_share: torch.Tensor | None = None,
    root_weights: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> KeptShares:
    """Return the weighted attention of rows to kept keys; equations and sources in the module.

    queries: (num_heads, num_rows, head_dim), float32, float16 or bfloat16, head_dim at most 256, any strides but a
    contiguous last dimension; keys: (num_heads, num_keys, head_dim) of the same type, contiguous; biases: (num_heads,
    num_keys) float32, -inf takes a key out; row_shift, ``near_share`` and ``root_weights``: (num_heads, num_rows)
    float32, the first two natural logarithms. Without ``near_share`` the normaliser is part of the shift; without
    ``root_weights`` rows weigh 1. ``tiles`` overrides the choice of tiles and changes no more than the order of sums.

    Products are in the type of the queries with float32 sums, all else is float32 up to the rounding of the result,
    which is a view of rows that are aligned for the matrix units. With R rows of all heads and N keys of each a call
    takes 2 R N head_dim operations, twice that with ``near_share``, and writes 2 R N bytes. Deterministic. Launches on
    the current stream of the tensors' device without a device sync. Not differentiable.

    Raises ValueError when a shape, type, device or memory layout is not as above.
    """
    _check_inputs(queries, keys, biases, row_shift, near_share, root_weights)
    num_heads, num_rows, head_dim = queries.shape
    num_keys = keys.shape[1]
    groups = triton.cdiv(num_keys, ALIGNMENT.value)
    shares = torch.empty(num_heads, num_rows, groups * ALIGNMENT.value, dtype=torch.float16, device=queries.device)
    rest = None if near_share is None else torch.empty_like(row_shift)
    if num_rows and num_keys:
        tiles = tiles or choose_tiles(head_dim, queries.element_size())
        with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
            _kept_shares[(triton.cdiv(num_rows, tiles.row_tile), num_heads)](
                queries,
                keys,
                biases,
                row_shift,
                row_shift if near_share is None else near_share,
                row_shift if root_weights is None else root_weights,
                shares,
                row_shift if rest is None else rest,
                scaling,
                queries.stride(0),
                queries.stride(1),
                num_rows,
                num_keys,
                groups,
                NORMALISE=near_share is not None,
                WEIGHTED=root_weights is not None,
                HEAD_DIM=head_dim,
                DIM_TILE=tiles.dim_tile,
                ROW_TILE=tiles.row_tile,
                KEY_TILE=tiles.key_tile,
                PRODUCT_TYPE=_product_type(queries.dtype),
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
    elif rest is not None:
        rest.fill_(1.0)
    return KeptShares(shares[..., :num_keys], rest)


def choose_tiles(head_dim: int, element_bytes: int) -> Tiles:
    """Return the tiles for a size of keys and their type."""
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    if element_bytes == 4:  # on the ordinary arithmetic units, whose operands fill the registers
        return Tiles(16, 32, dim_tile, 4, 1)
    if dim_tile == 256:
        return Tiles(64, 64, dim_tile, 4, 2)
    return Tiles(128, 64, dim_tile, 8, 3)


def is_interpreted() -> bool:
    """Return whether the kernel runs in Triton's interpreter: TRITON_INTERPRET was 1 at import."""
    return not isinstance(_kept_shares, triton.JITFunction)


def _product_type(dtype: torch.dtype) -> tl.dtype:
    if dtype == torch.bfloat16 and is_interpreted():
        return tl.float32  # the interpreter multiplies the bit patterns of bf16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _check_inputs(
    queries: torch.Tensor,
    keys: torch.Tensor,
    biases: torch.Tensor,
    row_shift: torch.Tensor,
    near_share: torch.Tensor | None,
    root_weights: torch.Tensor | None,
) -> None:
    if queries.dim() != 3:
        raise ValueError(f"queries must be (num_heads, num_rows, head_dim), not {tuple(queries.shape)}.")
    num_heads, num_rows, head_dim = queries.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, not {head_dim}; use the reference for it.")
    if queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"queries must be float32, float16 or bfloat16, not {queries.dtype}.")
    if keys.dim() != 3 or keys.shape[0] != num_heads or keys.shape[2] != head_dim:
        raise ValueError(f"keys must be ({num_heads}, num_keys, {head_dim}), not {tuple(keys.shape)}.")
    if keys.dtype != queries.dtype:
        raise ValueError(f"keys must have the type of the queries, {queries.dtype}, not {keys.dtype}.")
    if biases.shape != keys.shape[:2] or biases.dtype != torch.float32:
        raise ValueError(f"biases must be {tuple(keys.shape[:2])} float32, not {tuple(biases.shape)} {biases.dtype}.")
    for name, rows in (("row_shift", row_shift), ("near_share", near_share), ("root_weights", root_weights)):
        if rows is not None and (rows.shape != (num_heads, num_rows) or rows.dtype != torch.float32):
            raise ValueError(f"{name} must be {(num_heads, num_rows)} float32, not {tuple(rows.shape)} {rows.dtype}.")
    named = {
        "keys": keys, "biases": biases, "row_shift": row_shift, "near_share": near_share, "root_weights": root_weights
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(f"{name} must be on {queries.device} like the queries, not on {tensor.device}.")
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous() first.")
    if not queries.is_cuda and not is_interpreted():
        raise ValueError(f"The tensors must be on a GPU, not on {queries.device}; use the reference there.")
    if queries.stride(2) != 1 and head_dim > 1:
        raise ValueError("The last dimension of queries must be contiguous; call .contiguous() first.")
