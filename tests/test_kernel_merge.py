"""Claims about the kernels that merge attention parts in one pass, and about their torch twins.

With a GPU the kernels are compiled. Without one they run in Triton's interpreter, in a process of its own, because
Triton reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_merge.py` shows the
tests singly.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor import attention
from compactor.packed import ExactParts, ExactRows
from compactor.solve.key_scores import KeySums
from compactor_kernels.reference_merge import (
    MeasuredRows,
    MergedRows,
    Part,
    ScoredRows,
    merge_measured_reference,
    merge_rows_reference,
    merge_scored_reference,
)

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if INTERPRETED or COMPILED:
    from compactor_kernels.merge_rows import (
        Tiles,
        choose_tiles,
        is_interpreted,
        merge_measured,
        merge_rows,
        merge_scored,
    )

zeros = partial(torch.zeros, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """Inputs of the kernels: near parts, document, root weights, exact outputs."""

    near: list[Part]
    document: Part
    roots: torch.Tensor
    exact: torch.Tensor

    def merged(self, **options: Any) -> MergedRows:
        return merge_rows(self.near, self.document, **options)

    def scored(self, **options: Any) -> ScoredRows:
        return merge_scored(self.near, self.document, self.roots, **options)

    def measured(self, **options: Any) -> MeasuredRows:
        return merge_measured(self.document, self.near[0], self.exact, self.roots, **options)

    def double(self) -> Case:
        """The same, such that the twins compute in float64."""
        near, document = [in_double(part) for part in self.near], in_double(self.document)
        return replace(self, near=near, document=document, roots=self.roots.double(), exact=self.exact.double())


def in_double(part: Part) -> Part:
    return part[0].double(), part[1].double()


def make_case(
    heads: tuple[int, int] = (2, 2),
    num_rows: int = 40,
    *,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    prefix: bool = True,
    blind: bool = True,
    size: float = 2.0,
    device: str = DEVICE,
) -> Case:
    """Random parts; the first one lies as fused attention of segments leaves it, the others head by head."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    by_row = draw(num_rows, *heads, head_dim).to(device, dtype).permute(1, 2, 0, 3)
    flat = draw(heads[0], heads[1] * num_rows, head_dim).to(device, dtype)  # as dense attention leaves the others
    own = flat.transpose(0, 1).contiguous().transpose(0, 1).view(*heads, num_rows, head_dim)
    document = (draw(*heads, num_rows, head_dim) + 1.0).to(device, dtype)
    lse = [(size * draw(*heads, num_rows)).to(device) for _ in range(3)]
    if blind:  # rows that see nothing of one part, of two, of all
        lse[0][:, :, 3:9] = lse[1][:, :, 5:11] = lse[2][0, :, 8:20] = -math.inf
    near = [(by_row, lse[0]), (own, lse[1])][: 2 if prefix else 1]
    roots = draw(*heads, num_rows).abs().to(device)
    return Case(near, (document, lse[2]), roots, draw(*heads, num_rows, head_dim).to(device))


def assert_close(found: torch.Tensor, exact: torch.Tensor, what: str, rtol: float = 1e-5) -> None:
    """Float32 rounding apart, and that of the type of the result."""
    rtol = max(rtol, torch.finfo(found.dtype).eps)
    atol = 1e-5 * (1.0 + float(exact[exact.isfinite()].abs().max()))
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_exact(case: Case, **options: Any) -> None:
    """All three kernels are as near to the float64 twins as float32 is."""
    near, document, exact = case.near, case.document, case.double()
    whole = merge_rows_reference(exact.near, exact.document)
    merged = case.merged(**options)
    for name, found, wanted in zip(MergedRows._fields, merged, whole, strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert_close(found, wanted, name)
    scored = case.scored(**options)
    assert scored.out.dtype == document[0].dtype and scored.out.permute(2, 0, 1, 3).is_contiguous()
    sums = merge_scored_reference(exact.near, exact.document, exact.roots)
    for name, found, wanted in zip(ScoredRows._fields, scored, sums, strict=True):
        assert_close(found, wanted, name)
    full = [(out.float(), lse) for out, lse in (document, near[0])]
    for step in (1, 3):
        errors = merge_measured_reference(exact.document, exact.near[0], exact.exact, exact.roots, step=step)
        out_type = near[0][0].dtype
        measured = replace(case, document=full[0], near=full[1:]).measured(step=step, out_type=out_type, **options)
        assert measured.out.dtype == out_type and measured.errors.dtype == torch.float64
        for name, found, wanted in zip(MeasuredRows._fields, measured, errors, strict=True):
            assert_close(found, wanted, name)


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestMergeRows:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [1, 24, 64, 80, 96, 128, 256])
    def test_every_size_of_head_and_type(self, head_dim: int, dtype: torch.dtype) -> None:
        assert_exact(make_case(head_dim=head_dim, dtype=dtype))

    @pytest.mark.parametrize("prefix", [False, True])
    @pytest.mark.parametrize("heads", [(1, 1), (3, 1), (1, 7), (2, 4)])
    def test_every_group_with_and_without_a_prefix(self, heads: tuple[int, int], prefix: bool) -> None:
        assert_exact(make_case(heads, prefix=prefix, dtype=torch.float16))

    @pytest.mark.parametrize("num_rows", [21, 31, 32, 33, 64, 129])
    def test_rows_at_the_borders_of_tiles(self, num_rows: int) -> None:
        assert_exact(make_case((1, 2), num_rows, head_dim=128, dtype=torch.bfloat16))

    @pytest.mark.parametrize("tiles", [(16, 128, 1), (64, 64, 4), (1, 256, 2)])
    def test_tiles_change_nothing(self, tiles: tuple[int, int, int]) -> None:
        assert_exact(make_case((1, 2), 37, dtype=torch.bfloat16), tiles=Tiles(*tiles))

    def test_log_sums_in_the_thousands(self) -> None:
        assert_exact(make_case(size=2000.0))

    def test_a_row_that_sees_nothing_gives_nothing(self) -> None:
        case = make_case(dtype=torch.bfloat16)
        merged, scored = case.merged(), case.scored()
        assert (merged.lse[0, :, 8] == -math.inf).all() and (scored.lse[0, :, 8] == -math.inf).all()
        assert not merged.out[0, :, 8].any() and not scored.out[0, :, 8].any() and not merged.near[:, :, 5:9].any()
        assert all(part.isfinite().all() for part in scored[2:])

    def test_what_is_no_number_stays_none(self) -> None:
        case = make_case(dtype=torch.float32)
        case.document[1][0, 0, 0] = math.nan
        case.near[1][1][0, 0, 1] = math.nan
        case.near[0][0][0, 0, 2, 5] = math.nan
        merged = case.merged()
        assert merged.lse[0, 0, :2].isnan().all() and merged.out[0, 0, :2].isnan().all()
        assert merged.out[0, 0, 2].isnan().nonzero().tolist() == [[5]]
        assert not merged.out[0, 0, 20:].isnan().any() and not merged.out[1].isnan().any()
        assert case.scored().contrast.isnan().tolist() == [True, False]
        assert case.measured().errors.isnan().tolist() == [True, False]

    def test_equal_calls_give_equal_bits(self) -> None:
        case = make_case(dtype=torch.float16)
        for one, other in zip(case.scored(), case.scored(), strict=True):
            assert torch.equal(one, other)

    def test_log_sums_and_weights_may_be_views(self) -> None:
        case = make_case(dtype=torch.float16)
        wide = lambda part: torch.nn.functional.pad(part, (0, 5))[..., :-5]  # noqa: E731
        roots = case.roots[:, :1, :1].expand_as(case.roots)
        views = replace(case, near=[(o, wide(lse)) for o, lse in case.near], roots=roots)
        plain = replace(case, roots=roots.contiguous())
        for one, other in zip(views.scored(), plain.scored(), strict=True):
            assert torch.equal(one, other)

    def test_nothing_to_do(self) -> None:
        nothing = zeros(2, 3, 0, 64), zeros(2, 3, 0)
        case = Case([nothing], nothing, nothing[1], nothing[0])
        assert case.merged().near.shape == (2, 3, 0, 64)
        assert case.scored().out.shape == (2, 3, 0, 64) and not case.scored().centre.any()
        assert case.scored().centre.shape == (2, 64)
        assert case.measured().errors.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"near": []}, "one or two near parts"),
            ({"document": (zeros(2, 5, 64), zeros(2, 5))}, "document must be"),
            ({"document": (zeros(2, 1, 5, 512), zeros(2, 1, 5))}, "head_dim must be"),
            ({"document": (zeros(2, 1, 5, 64, dtype=torch.float64), zeros(2, 1, 5))}, "document must be float32"),
            ({"document": (zeros(2, 1, 5, 64).half(), zeros(2, 1, 5))}, "near part 0 must be .*float16"),
            ({"document": (zeros(2, 1, 64, 5).mT, zeros(2, 1, 5))}, "last dimension of document"),
            ({"document": (zeros(2, 1, 5, 64), zeros(2, 5))}, "log-sum-exp of document must be"),
            ({"near": [(zeros(2, 1, 4, 64), zeros(2, 1, 4))]}, "near part 0 must be"),
            ({"near": [(zeros(2, 1, 5, 64), zeros(2, 1, 5).half())]}, "log-sum-exp of near part 0 must be"),
            ({"roots": zeros(2, 1, 1)}, "root_weights must be"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(make_case((2, 1), 5), **fields).scored()

    def test_bad_measures_are_refused(self) -> None:
        case = make_case((2, 1), 5)
        with pytest.raises(ValueError, match="step must be"):
            case.measured(step=0)
        with pytest.raises(ValueError, match="out_type must be"):
            case.measured(out_type=torch.float64)
        with pytest.raises(ValueError, match="exact must be"):
            replace(case, exact=case.exact[:, :, :1]).measured()
        with pytest.raises(ValueError, match="document must be float32, not"):
            make_case((2, 1), 5, dtype=torch.float16).measured()

    @pytest.mark.parametrize("head_dim", [1, 16, 80, 128, 256])
    def test_tiles_hold_a_row_and_fit_the_registers(self, head_dim: int) -> None:
        tiles = choose_tiles(head_dim)
        assert tiles.dim_tile >= head_dim and tiles.row_tile & (tiles.row_tile - 1) == 0
        assert tiles.row_tile * tiles.dim_tile <= 32 * 32 * tiles.num_warps

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sums_of_scores_are_the_same_with_it(self, dtype: torch.dtype) -> None:
        case = make_case(dtype=dtype, blind=False)
        merged = merge_rows_reference(case.near, case.document)
        document, document_lse = case.document[0].float(), case.document[1]
        exact = ExactRows(merged.lse, document, document_lse, merged.near, merged.near_lse, merged.out)
        queries = torch.randn(2, 2 * 40, 64, device=DEVICE)
        keys = torch.randn(2, 50, 64, device=DEVICE)
        found, wanted = (KeySums.empty(2, 50, 64, torch.device(DEVICE)) for _ in range(2))
        wanted.add(queries, keys, 0.1, exact, case.roots)
        out = found.add_parts(queries, keys, 0.1, ExactParts(case.near, case.document), case.roots)
        assert_close(out, merged.out.double(), "out")
        for name, sums in vars(found).items():
            assert_close(sums, getattr(wanted, name).double(), name)


def textbook_merge(parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh parts of small log-sum-exp by their exponentials, in float64; rows that see nothing give 0 and -inf."""
    weights = torch.stack([lse.double().exp() for _, lse in parts])
    total = weights.sum(0)
    out = sum((w.unsqueeze(-1) * out.double() for w, (out, _) in zip(weights, parts, strict=True)), torch.zeros(1))
    return out / torch.where(total > 0, total, 1.0).unsqueeze(-1), total.log()


def test_the_twins_are_the_textbook() -> None:
    case = make_case((2, 2), 25, head_dim=5, device="cpu").double()
    near, whole = textbook_merge(case.near), textbook_merge([*case.near, case.document])
    merged = merge_rows_reference(case.near, case.document)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(merged, (*near, *whole), strict=True):
        close(found, wanted)
    scored = merge_scored_reference(case.near, case.document, case.roots)
    shares = case.document[1].exp() / torch.where(whole[1] > -math.inf, whole[1].exp(), 1.0)
    for h in range(2):
        wanted = [0.0, 0.0, torch.zeros(5, dtype=torch.float64), 0.0]
        for g in range(2):
            for r in range(25):
                weight, mass, own = float(case.roots[h, g, r]) ** 2, float(shares[h, g, r]), case.document[0][h, g, r]
                away = float((own - whole[0][h, g, r]).square().sum())
                for i, term in enumerate(
                    (weight * mass * away, weight * mass, weight * mass**2 * own, weight * mass**2)
                ):
                    wanted[i] = wanted[i] + term
        for found, expected in zip(scored[2:], wanted, strict=True):
            close(found[h], torch.as_tensor(expected, dtype=torch.float64))


def test_the_measuring_twin_is_the_textbook() -> None:
    case = make_case((2, 2), 25, head_dim=5, device="cpu").double()
    out, _ = textbook_merge([case.document, case.near[0]])
    found = merge_measured_reference(case.document, case.near[0], case.exact, case.roots, step=3)
    squares = ((out - case.exact) * case.roots.unsqueeze(-1)).square().sum(-1)
    torch.testing.assert_close(found.out, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.errors, squares.sum((1, 2)))
    thinned = sum((squares[:, :, row] for row in range(0, 25, 3)), torch.zeros(1)).sum(1)
    torch.testing.assert_close(found.thinned_errors, 3.0 * thinned)


def test_the_twin_is_what_attention_did_before() -> None:
    case = make_case(device="cpu")
    near = attention.merge(*case.near[0], *case.near[1])
    wanted = (*near, *attention.merge(*near, *case.document))
    for found, expected in zip(merge_rows_reference(case.near, case.document), wanted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestMergeRows")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes host tensors")
def test_compiled_kernel_refuses_host_tensors() -> None:
    from compactor_kernels.merge_rows import merge_rows as compiled

    case = make_case(device="cpu")
    with pytest.raises(ValueError, match="must be on a GPU, not on cpu"):
        compiled(case.near, case.document)
