"""Claims about the kernel of the targets of the values, its torch twin, and the fit that uses it.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_targets.py` shows the tests
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

from compactor import attention
from compactor.config import CompactSettings
from compactor.solve import fit as fit_module
from compactor.solve import gram as gram_module
from compactor.solve.fit import HeadFit, LayerKeys, fit_heads
from compactor.solve.rows import Rows, held_out_rows
from compactor_kernels.reference_targets import LARGEST_HALF, SECOND_HALF, ValueTargets, value_targets_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps

if INTERPRETED or COMPILED:
    from compactor_kernels.value_targets import Tiles, choose_tiles, is_interpreted, value_targets

zeros = partial(torch.zeros, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """Inputs of the kernel."""

    product: torch.Tensor
    out: torch.Tensor
    near: torch.Tensor
    near_weights: torch.Tensor
    root_weights: torch.Tensor
    units: torch.Tensor
    heads: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def kernel(self, **options: Any) -> ValueTargets:
        return value_targets(*self.given(), heads=self.heads, rows=self.rows, **options)

    def twin(self) -> ValueTargets:
        return value_targets_reference(*self.given(), heads=self.heads, rows=self.rows)

    def given(self) -> tuple[torch.Tensor, ...]:
        return self.product, self.out, self.near, self.near_weights, self.root_weights, self.units

    def terms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets in float64, one row at a time, and what the terms that they are the sum of add up to at most."""
        heads = range(self.out.shape[0]) if self.heads is None else self.heads.tolist()
        rows = range(self.out.shape[2]) if self.rows is None else self.rows.tolist()
        shape = len(heads), self.out.shape[1] * len(rows), self.out.shape[3]
        targets, sizes = torch.zeros(2, *shape, dtype=torch.float64)
        out, near, product, weights, roots = (
            part.cpu().double() for part in (self.out, self.near, self.product, self.near_weights, self.root_weights)
        )
        for h, head in enumerate(heads):
            for g in range(self.out.shape[1]):
                for i, row in enumerate(rows):
                    at = g * len(rows) + i
                    terms = roots[h, at] * out[head, g, row], roots[h, at] * weights[h, at] * near[head, g, row]
                    targets[h, at] = terms[0] - terms[1] - product[h, at]
                    sizes[h, at] = terms[0].abs() + terms[1].abs() + product[h, at].abs()
        return targets.to(DEVICE), sizes.to(DEVICE)


def make_case(
    num_kv_heads: int = 2,
    group: int = 2,
    num_all: int = 45,
    head_dim: int = 64,
    *,
    heads: list[int] | None = None,
    rows: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    unit: float = 0.25,
    device: str = DEVICE,
) -> Case:
    """Random outputs of which everything, or some heads and rows, are asked for."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    num_heads = num_kv_heads if heads is None else len(heads)
    num_rows = group * (num_all if rows is None else len(rows))
    whole = num_kv_heads, group, num_all, head_dim
    return Case(
        draw(num_heads, num_rows, head_dim).to(dtype),
        draw(*whole).to(dtype),
        draw(*whole).to(dtype),
        draw(num_heads, num_rows).sigmoid(),
        draw(num_heads, num_rows).abs(),
        unit * 4.0 ** torch.arange(num_heads, device=device),
        None if heads is None else torch.tensor(heads, dtype=torch.int64, device=device),
        None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device),
    )


def whole_of(found: ValueTargets, units: torch.Tensor) -> torch.Tensor:
    """Put the halves together again, float64."""
    first, second = found.halves.double().chunk(2, dim=-1)
    return (first + second / SECOND_HALF) * units.double().view(-1, 1, 1)


def assert_exact(case: Case, found: ValueTargets) -> None:
    """22 bits of each target, beside the rounding of the float32 sums that make it; and all of the energy."""
    targets, sizes = case.terms()
    units = case.units.double().view(-1, 1, 1)
    slack = 2.0**-22 * targets.abs() + 2.0**-36 * units + 2.0 * EPS * sizes
    assert ((whole_of(found, case.units) - targets).abs() <= slack).all()
    first = found.halves[..., : targets.shape[-1]].double() * units
    assert ((first - targets).abs() <= 2.0**-10 * targets.abs() + 2.0**-24 * units + slack).all()
    assert found.halves.dtype == torch.float16 and found.energy.dtype == torch.float64
    assert found.halves.shape == (*targets.shape[:2], 2 * targets.shape[2])
    torch.testing.assert_close(found.energy, targets.square().sum((1, 2)), rtol=1e-6, atol=1e-30)


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestValueTargets:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [1, 5, 16, 64, 80, 96, 128, 256])
    def test_every_size_of_value_and_type(self, head_dim: int, dtype: torch.dtype) -> None:
        case = make_case(head_dim=head_dim, dtype=dtype)
        found = case.kernel()
        assert_exact(case, found)
        assert found.halves.stride(1) % 8 == 0 and found.halves.stride(2) == 1

    @pytest.mark.parametrize("group", [1, 3, 7])
    @pytest.mark.parametrize("num_all", [1, 31, 64, 130])
    def test_every_group_and_number_of_rows(self, group: int, num_all: int) -> None:
        case = make_case(3, group, num_all, 32)
        assert_exact(case, case.kernel())

    @pytest.mark.parametrize("heads", [None, [2], [3, 0, 2]])
    @pytest.mark.parametrize("rows", [None, [44], [0, 3, 4, 20, 21, 22, 43]])
    def test_heads_and_rows_are_chosen(self, heads: list[int] | None, rows: list[int] | None) -> None:
        case = make_case(4, heads=heads, rows=rows, head_dim=16)
        assert_exact(case, case.kernel())

    @pytest.mark.parametrize("rows", [None, [1, 6, 5]])
    def test_views_are_read_where_they_lie(self, rows: list[int] | None) -> None:
        case = make_case(2, 3, 10, 24, heads=[1, 0], rows=rows)
        plain = case.kernel()
        wide = torch.full((2, 3, 4, 29, 40), torch.nan, device=DEVICE)
        for i, part in enumerate((case.out, case.near)):
            wide[i, :, 1:3, 5:24:2, :24] = part.transpose(0, 1)
        out, near = wide[0, :, 1:3, 5:24:2, :24].transpose(0, 1), wide[1, :, 1:3].transpose(0, 1)[:, :, 5:24:2, :24]
        product = torch.full((2, case.product.shape[1], 30), torch.nan, device=DEVICE)
        product[..., 3:27] = case.product
        for found, expected in zip(
            replace(case, out=out, near=near, product=product[..., 3:27]).kernel(), plain, strict=True
        ):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
    def test_small_and_large_targets(self, size: float) -> None:
        """Sizes over six orders of magnitude keep their 22 bits."""
        case = make_case(unit=2.0**-6, head_dim=32)
        sizes = size * torch.logspace(-4, 2, 90, device=DEVICE)
        moved = replace(
            case,
            root_weights=case.root_weights * sizes,
            product=case.product * sizes.unsqueeze(-1),
            units=case.units * 2.0 ** round(torch.tensor(size).log2().item()),
        )
        assert_exact(moved, moved.kernel())

    def test_units_need_not_be_powers_of_two(self) -> None:
        case = make_case(unit=0.3)
        found = case.kernel()
        targets, sizes = case.terms()
        slack = 2.0**-22 * targets.abs() + 2.0**-36 + 3.0 * EPS * (sizes + targets.abs())
        assert ((whole_of(found, case.units) - targets).abs() <= slack).all()

    def test_what_is_too_large_is_cut_off_and_what_is_no_number_stays_none(self) -> None:
        case = make_case(head_dim=16, unit=1e-30)
        found = case.kernel()
        targets, _ = case.terms()
        cut = whole_of(found, case.units) / case.units.double().view(-1, 1, 1)
        assert torch.equal(cut, targets.sign() * LARGEST_HALF)
        torch.testing.assert_close(found.energy, targets.square().sum((1, 2)))
        case = make_case(head_dim=16)
        case.out[0, 1, 3, 2], case.near[1, 0, 5, 7], case.product[1, 9, 4] = torch.inf, torch.nan, -torch.inf
        found = case.kernel()
        lost = ~found.halves.isfinite()
        assert lost[0].nonzero().tolist() == [[48, 2], [48, 18]]
        assert lost[1].nonzero().tolist() == [[5, 7], [5, 23], [9, 4], [9, 20]]
        assert bool(found.halves[lost].isnan().all()) and not bool(found.energy.isfinite().any())
        assert bool(replace(make_case(), units=case.units * torch.nan).kernel().halves.isnan().all())

    @pytest.mark.parametrize("tiles", [(1, 32, 1), (16, 32, 4), (128, 64, 8)])
    def test_tiles_change_nothing_but_the_order_of_sums(self, tiles: tuple[int, ...]) -> None:
        case = make_case(head_dim=24, rows=list(range(0, 45, 2)))
        found, plain = case.kernel(tiles=Tiles(*tiles)), case.kernel()
        assert torch.equal(found.halves, plain.halves)
        torch.testing.assert_close(found.energy, plain.energy, rtol=1e-6, atol=0)

    def test_equal_calls_give_equal_bits(self) -> None:
        case = make_case()
        for one, other in zip(case.kernel(), case.kernel(), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("shape", [(2, 2, 0, 16), (0, 2, 9, 16), (2, 0, 9, 16)])
    def test_nothing_to_do(self, shape: tuple[int, int, int, int]) -> None:
        found = make_case(*shape).kernel()
        assert found.halves.shape == (shape[0], shape[1] * shape[2], 32) and not found.energy.any()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"out": zeros(2, 45, 64)}, "out must be"),
            ({"out": zeros(2, 2, 45, 512)}, "head_dim must be"),
            ({"out": zeros(2, 2, 45, 64, dtype=torch.float64)}, "out must be float32"),
            ({"out": zeros(2, 2, 64, 45).mT}, "last dimension of out"),
            ({"near": zeros(2, 2, 44, 64)}, "near must be"),
            ({"near": zeros(2, 2, 45, 64, dtype=torch.int32)}, "near must be float32"),
            ({"product": zeros(2, 89, 64)}, "product must be"),
            ({"product": zeros(2, 90, 128)[..., ::2]}, "last dimension of product"),
            ({"heads": zeros(2, dtype=torch.int32)}, "heads must be one-dimensional int64"),
            ({"heads": zeros(3, dtype=torch.int64)}, "product must be"),
            ({"rows": zeros(45, 1, dtype=torch.int64)}, "rows must be one-dimensional int64"),
            ({"rows": zeros(90, dtype=torch.int64)[::2]}, "rows must be contiguous"),
            ({"near_weights": zeros(2, 45)}, "near_weights must be"),
            ({"root_weights": zeros(2, 90, dtype=torch.float16)}, "root_weights must be"),
            ({"root_weights": zeros(90, 2).T}, "root_weights must be contiguous"),
            ({"units": zeros(2, dtype=torch.float64)}, "units must be"),
            ({"units": zeros(1)}, "units must be"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(make_case(), **fields).kernel()

    @pytest.mark.parametrize("head_dim", [1, 16, 80, 128, 256])
    def test_tiles_are_powers_of_two(self, head_dim: int) -> None:
        tiles = choose_tiles(head_dim)
        assert all(size & (size - 1) == 0 for size in tiles) and tiles.dim_tile >= head_dim and tiles.row_tile >= 16

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED

    @pytest.mark.parametrize("batches", [[[0, 1, 2, 3]], [[0, 2, 3], [1]]])
    def test_a_fit_through_all_kernels_is_that_of_float32(
        self, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Heads as one batch and gathered ones, on every other row; the exact path takes the same keys and rows."""
        keys, rows = layer(4)
        order = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i)) for i in range(4)])
        parts, counts, settings = [rows.every(2), rows], [9, 25, 14, 3], CompactSettings()
        monkeypatch.setattr(fit_module, "BIAS_TOLERANCE", 1e-9)  # where it stops early is a matter of the last digits
        monkeypatch.setattr(fit_module, "BIAS_STEPS", 200)
        monkeypatch.setattr(fit_module, "head_batches", lambda *_: batches)
        monkeypatch.setattr(attention, "is_fast", lambda _query: False)
        exact = fit_heads(keys, parts, order.to(DEVICE), counts, settings)
        calls = take_kernels(monkeypatch)
        found = fit_heads(keys, parts, order.to(DEVICE), counts, settings)
        assert calls == [len(batch) for batch in batches for _ in range(4)]  # fitted and held-out rows of two parts
        assert_close(found, exact)
        monkeypatch.setattr(fit_module, "halves_usable", lambda *_: False)
        plain = fit_heads(keys, parts, order.to(DEVICE), counts, settings)
        for one, other in zip(found, plain, strict=True):  # the same float16 rows: nothing is lost by one unit a head
            assert float((one.values - other.values).norm()) < 1e-5 * float(other.values.norm())
            assert one.squared_error == pytest.approx(other.squared_error, rel=1e-4)
            assert one.unfitted_error == pytest.approx(other.unfitted_error, rel=1e-6)


def layer(num_heads: int) -> tuple[LayerKeys, Rows]:
    """Heads of 60 keys and their exact attention, with outputs of very unlike sizes."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    group, num_rows, head_dim = 2, 330, 16
    queries, keys = draw(num_heads, group, num_rows, head_dim).bfloat16(), draw(num_heads, 60, head_dim).bfloat16()
    sizes = torch.logspace(-3, 2, num_heads, device=DEVICE).view(-1, 1, 1)
    values, near = sizes * draw(num_heads, 60, head_dim), sizes.unsqueeze(1) * draw(*queries.shape)
    scores = queries.float() @ keys.float().unsqueeze(1).mT * 0.4
    near_lse = scores.logsumexp(-1) + 0.5 * draw(num_heads, group, num_rows)
    lse = torch.logaddexp(scores.logsumexp(-1), near_lse)
    out = (scores - lse.unsqueeze(-1)).exp() @ values.unsqueeze(1) + (near_lse - lse).exp().unsqueeze(-1) * near
    roots = 0.5 + torch.rand(num_heads, group, num_rows, generator=generator).to(DEVICE)
    rows = Rows(queries, 0.4, roots, lse, near_lse - lse, near, out, held_out_rows(num_rows, queries.device))
    return LayerKeys(keys.float(), values, torch.bfloat16), rows


def take_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a fit in half precision take its kernels wherever it is; return what the kernel of targets was asked for: the
    heads of each call."""
    calls: list[int] = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.bmm(left.float(), right.float())

    def counted(*given: Any, **options: Any) -> ValueTargets:
        calls.append(len(given[0]))
        return value_targets(*given, **options)

    monkeypatch.setattr(attention, "is_fast", lambda query: query.dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(attention, "half_product", product)
    monkeypatch.setattr(attention, "kernel_usable", lambda *_: True)
    monkeypatch.setattr("compactor_kernels.value_targets.value_targets", counted)
    for module in (fit_module, gram_module):
        monkeypatch.setattr(module, "kernel_runs", lambda _rows: True)
    return calls


def assert_close(found: list[HeadFit], exact: list[HeadFit]) -> None:
    for one, other in zip(found, exact, strict=True):
        assert torch.equal(one.kept, other.kept) and one.ridge == other.ridge
        torch.testing.assert_close(one.biases, other.biases, atol=0.01, rtol=0)
        assert float((one.values - other.values).norm()) < 0.01 * float(other.values.norm())
        for name in ("squared_error", "unfitted_error"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0.01)
        assert one.energy == pytest.approx(other.energy, rel=1e-6)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestValueTargets")


@pytest.mark.parametrize("heads", [None, [1, 0, 1]])
@pytest.mark.parametrize("rows", [None, [3, 0, 8]])
@pytest.mark.parametrize("head_dim", [5, 16])
def test_the_twin_is_what_it_says(head_dim: int, rows: list[int] | None, heads: list[int] | None) -> None:
    case = make_case(2, 3, 9, head_dim, heads=heads, rows=rows, device="cpu")
    if DEVICE == "cpu":
        assert_exact(case, case.twin())
        assert_exact(case, replace(case, out=case.out.double()).twin())
    case.out[1, 2, 0, 1] = torch.inf
    assert bool(case.twin().halves[..., 1].isnan().any())
