"""Claims about the kernel of RMS norms of a few rows.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_rms_norm.py` shows the tests
singly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = 1e-6

if INTERPRETED or COMPILED:
    from compactor_kernels.rms_norm import MAX_SIZE, is_interpreted, rms_norm

zeros = partial(torch.zeros, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """Inputs of the kernel."""

    rows: torch.Tensor
    weight: torch.Tensor
    addend: torch.Tensor
    epsilon: float = EPSILON

    def kernel(self, **options: Any) -> torch.Tensor:
        return rms_norm(self.rows, self.weight, self.epsilon, **options)


def make_case(
    size: int = 80, leading: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> Case:
    """Random rows, a weight around 1, and what may be added to the rows."""
    generator = torch.Generator().manual_seed(size)
    rows, addend = (scale * torch.randn(*leading, size, generator=generator) for _ in range(2))
    weight = 1.0 + 0.3 * torch.randn(size, generator=generator)
    return Case(*(part.to(DEVICE, dtype) for part in (rows, weight, addend)))


def textbook(rows: torch.Tensor, weight: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """The equation, in float64."""
    rows = rows.double()
    return rows / (rows.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def assert_rounding(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.is_contiguous() and found.shape == expected.shape
    tolerance = max(torch.finfo(dtype).eps, 2e-6)  # the interpreter may cut off instead of rounding
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestRmsNorm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("size", [1, 7, 64, 80, 96, 128, 515, 2560])
    def test_it_is_the_equation(self, size: int, dtype: torch.dtype) -> None:
        for leading in ((1,), (2, 3), (1, 1, 5)):
            case = make_case(size, leading, dtype)
            assert_rounding(case.kernel(), textbook(case.rows, case.weight), dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("size", [1, 80, 515, 2560])
    def test_it_adds_first_and_writes_the_sum(self, size: int, dtype: torch.dtype) -> None:
        case = make_case(size, (2, 1), dtype)
        rows, addend, total = case.rows.clone(), case.addend.clone(), torch.empty_like(case.rows)
        found = case.kernel(addend=case.addend, total=total)
        expected = case.rows.double() + case.addend.double()
        cut = 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0
        half_unit = cut * torch.finfo(dtype).eps / 2
        assert bool(((total.double() - expected).abs() <= half_unit * expected.abs() + 1e-30).all())
        if cut == 1.0:
            assert torch.equal(total, case.rows + case.addend)
        assert_rounding(found, textbook(total, case.weight), dtype)  # the norm is of the sum as it is written
        assert torch.equal(case.rows, rows) and torch.equal(case.addend, addend)

    def test_it_writes_where_it_is_told(self) -> None:
        case, whole = make_case(80, (3,), torch.float16), torch.full((5, 80), torch.nan, device=DEVICE).half()
        out = whole[1:4]
        assert case.kernel(out=out) is out and torch.equal(out, case.kernel())
        assert bool(whole[[0, 4]].isnan().all())

    def test_the_sum_may_take_the_place_of_its_parts(self) -> None:
        case = make_case(515, (2,), torch.float16)
        total = torch.empty_like(case.rows)
        norm = case.kernel(addend=case.addend, total=total)
        inplace = replace(case, rows=case.rows.clone())
        assert torch.equal(inplace.kernel(addend=case.addend, total=inplace.rows), norm)
        assert torch.equal(inplace.rows, total)

    @pytest.mark.parametrize("scale", [1e-4, 1.0, 200.0])
    def test_rows_of_every_scale(self, scale: float) -> None:
        """Squares of float16 rows do not fit that type, and epsilon counts in small ones."""
        case = make_case(128, (4,), torch.float16, scale)
        assert_rounding(case.kernel(), textbook(case.rows, case.weight), torch.float16)

    def test_a_row_of_zeros_is_zeros(self) -> None:
        case = make_case()
        case.rows[1] = 0.0
        found = case.kernel()
        assert not found[1].any() and bool(found[0].any()) and bool(found.isfinite().all())

    def test_rows_do_not_change_each_other_and_equal_calls_give_equal_bits(self) -> None:
        case = make_case(2560, (5,))
        found = case.kernel()
        assert torch.equal(case.kernel(), found)
        for number in range(5):
            assert torch.equal(replace(case, rows=case.rows[number : number + 1]).kernel()[0], found[number])

    def test_the_largest_size(self) -> None:
        case = make_case(MAX_SIZE, (1,), torch.bfloat16)
        assert_rounding(case.kernel(), textbook(case.rows, case.weight), torch.bfloat16)

    def test_no_rows_give_no_rows(self) -> None:
        assert make_case(leading=(0,)).kernel().shape == (0, 80)

    @pytest.mark.parametrize(
        ("fields", "options", "message"),
        [
            ({"rows": zeros(())}, {}, "rows must be"),
            ({"rows": zeros(3, 0)}, {}, "rows must be"),
            ({"rows": zeros(1, 16385)}, {}, "rows must be"),
            ({"rows": zeros(3, 80, dtype=torch.float64)}, {}, "rows must be float32"),
            ({"rows": zeros(3, 160)[:, ::2]}, {}, "rows must be contiguous"),
            ({"weight": zeros(79)}, {}, "weight must be"),
            ({"weight": zeros(80).half()}, {}, "weight must have the type"),
            ({"weight": zeros(160)[::2]}, {}, "weight must be contiguous"),
            ({"weight": torch.zeros(80, device="meta")}, {}, "weight must be on"),
            ({}, {"out": zeros(2, 80)}, "out must be"),
            ({}, {"out": zeros(3, 80).half()}, "out must be"),
            ({}, {"out": zeros(80, 3).T}, "out must be"),
            ({}, {"out": torch.zeros(3, 80, device="meta")}, "out must be"),
            ({}, {"addend": zeros(2, 80), "total": zeros(3, 80)}, "addend must be"),
            ({}, {"addend": zeros(3, 80).half(), "total": zeros(3, 80)}, "addend must be"),
            ({}, {"addend": zeros(3, 160)[:, ::2], "total": zeros(3, 80)}, "addend must be"),
            ({}, {"addend": zeros(3, 80), "total": zeros(1, 80)}, "total must be"),
            ({}, {"addend": zeros(3, 80), "total": zeros(80, 3).T}, "total must be"),
            ({}, {"addend": zeros(3, 80)}, "addend and total"),
            ({}, {"total": zeros(3, 80)}, "addend and total"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(make_case(), **fields).kernel(**options)

    @pytest.mark.skipif(not COMPILED, reason="needs a GPU")
    def test_a_captured_call_follows_its_rows(self) -> None:
        case = make_case(2560, (2,), torch.bfloat16)
        total = torch.empty_like(case.rows)
        case.kernel(addend=case.addend, total=total)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = case.kernel(addend=case.addend, total=total)
        for _ in range(3):
            case.rows.copy_(torch.randn_like(case.rows))
            graph.replay()
            assert torch.equal(total, case.rows + case.addend)
            assert_rounding(found, textbook(total, case.weight), torch.bfloat16)

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestRmsNorm")
