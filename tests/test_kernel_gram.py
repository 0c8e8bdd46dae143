"""Claims about the kernels of Gram matrices, their torch twins, and the sums that are made with them.

With a GPU the kernels are compiled. Without one they run in Triton's interpreter, in a process of its own, because
Triton reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_gram.py` shows the tests
singly.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor import kernel_trial
from compactor.solve import gram as sums
from compactor.solve.gram import GramSum
from compactor_kernels.reference_gram import add_gram_reference, add_product_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
EPS = torch.finfo(torch.float32).eps

if INTERPRETED or COMPILED:
    from compactor_kernels import gram
    from compactor_kernels.gram import Tiles, add_gram, add_product, choose_rows_per_span, choose_tiles, is_interpreted

SMALL = (16, 16, 16, 4, 1)
WIDE = (32, 64, 16, 4, 1)
TALL = (64, 32, 16, 4, 1)


def draw(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def symmetric(num_heads: int, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    start = draw(num_heads, n, n, dtype=dtype, seed=8)
    return start + start.mT


def rounding(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What float32 sums over all rows may be wrong by: each addition by one unit in the last place of what the sum of
    magnitudes is at most."""
    return left.shape[1] * EPS * left.double().abs().mT @ right.double().abs()


def assert_gram(
    rows: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    tiles: tuple[int, ...] | None = None,
    span: int | None = None,
) -> torch.Tensor:
    """Add the Gram matrix to a symmetric start; check it against float64 and return it."""
    start = symmetric(rows.shape[0], rows.shape[2], dtype)
    found = start.clone()
    add_gram(found, rows, tiles=None if tiles is None else Tiles(*tiles), rows_per_span=span)
    expected = start.double() + rows.double().mT @ rows.double()
    slack = rounding(rows, rows) + torch.finfo(dtype).eps * expected.abs()
    assert ((found.double() - expected).abs() <= slack).all()
    assert torch.equal(found, found.mT)
    return found


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestGram:
    @pytest.mark.parametrize("num_columns", [1, 17, 130, 257])
    @pytest.mark.parametrize("num_rows", [1, 63, 300])
    def test_odd_shapes(self, num_columns: int, num_rows: int) -> None:
        assert_gram(draw(2, num_rows, num_columns))

    def test_the_largest_tiles(self) -> None:
        assert_gram(draw(1, 70, 520))

    @pytest.mark.parametrize("tiles", [SMALL, WIDE, TALL])
    @pytest.mark.parametrize("num_columns", [16, 45, 72])
    def test_tiles_and_spans_change_nothing_but_rounding(self, tiles: tuple[int, ...], num_columns: int) -> None:
        assert_gram(draw(2, 75, num_columns), tiles=tiles, span=32)

    @pytest.mark.parametrize("span", [1, 7, 40, 1000])
    def test_every_length_of_span(self, span: int) -> None:
        assert_gram(draw(1, 41, 20), tiles=SMALL, span=span)

    @pytest.mark.parametrize("num_heads", [1, 3, 8])
    def test_several_heads(self, num_heads: int) -> None:
        assert_gram(draw(num_heads, 40, 33), tiles=WIDE)

    def test_a_workspace_that_holds_two_spans_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = draw(2, 100, 40)
        whole = assert_gram(rows, tiles=SMALL, span=20)
        monkeypatch.setattr(gram, "WORKSPACE_BYTES", 2 * (2 * 6 * 16 * 16 * 4))
        torch.testing.assert_close(assert_gram(rows, tiles=SMALL, span=20), whole, rtol=1e-14, atol=1e-13)

    def test_sums_are_float64_from_span_to_span(self) -> None:
        rows = torch.full((1, 4097, 2), 1.0, dtype=torch.float16, device=DEVICE)
        rows[:, 1:] = 2.0**-13  # each square is lost in a float32 sum that has reached 1
        found = torch.zeros(1, 2, 2, dtype=torch.float64, device=DEVICE)
        add_gram(found, rows, tiles=Tiles(*SMALL), rows_per_span=1024)
        exact = 1.0 + 4096 * 2.0**-26
        assert float((found - exact).abs().max()) < 1024 * 2.0**-26 < 0.3 * (exact - 1.0)

    def test_a_float32_total(self) -> None:
        assert_gram(draw(2, 50, 19), dtype=torch.float32, tiles=SMALL, span=16)

    @pytest.mark.parametrize("stored", [24, 23])
    def test_views_of_wider_rows_whose_filling_is_never_used(self, stored: int) -> None:
        wide = torch.full((2, 3, 41, stored), torch.nan, dtype=torch.float16, device=DEVICE)
        wide[:, 1, :, :21] = draw(2, 41, 21)
        assert_gram(wide[:, 1, :, :21], tiles=SMALL, span=16)
        assert_gram(wide[:, 1, ::2, 1:21], tiles=SMALL, span=16)

    def test_heads_that_share_their_rows(self) -> None:
        found = assert_gram(draw(1, 30, 20).expand(3, -1, -1), tiles=SMALL) - symmetric(3, 20)
        torch.testing.assert_close(found[0], found[2])

    def test_equal_calls_give_equal_bits(self) -> None:
        rows = draw(2, 90, 50)
        assert torch.equal(assert_gram(rows, tiles=WIDE, span=32), assert_gram(rows, tiles=WIDE, span=32))

    def test_only_the_lower_half_of_the_total_is_read(self) -> None:
        rows, start = draw(1, 20, 40), symmetric(1, 40)
        found, half = start.clone(), start.tril()
        add_gram(found, rows, tiles=Tiles(*WIDE))
        add_gram(half, rows, tiles=Tiles(*WIDE))
        assert torch.equal(found, half)

    def test_what_is_no_number_stays_in_its_row_and_column(self) -> None:
        rows = draw(1, 40, 40)
        rows[0, 3, 5] = torch.nan
        found = torch.zeros(1, 40, 40, dtype=torch.float64, device=DEVICE)
        add_gram(found, rows, tiles=Tiles(*SMALL), rows_per_span=16)
        lost = ~found[0].isfinite()
        assert lost[5].all() and lost[:, 5].all() and int(lost.sum()) == 2 * 40 - 1

    @pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 5, 5)])
    def test_nothing_to_add(self, shape: tuple[int, ...]) -> None:
        assert_gram(draw(*shape))

    @pytest.mark.parametrize(("num_columns", "num_targets"), [(1, 1), (17, 8), (130, 2), (20, 300)])
    @pytest.mark.parametrize("tiles", [None, (16, 32, 32, 4, 1)])
    def test_products_with_other_columns(
        self, num_columns: int, num_targets: int, tiles: tuple[int, ...] | None
    ) -> None:
        left, right = draw(2, 63, num_columns), draw(2, 63, num_targets, seed=9)
        found = draw(2, num_columns, num_targets, dtype=torch.float64)
        expected = found + left.double().mT @ right.double()
        add_product(found, left, right, tiles=None if tiles is None else Tiles(*tiles), rows_per_span=48)
        assert ((found - expected).abs() <= rounding(left, right) + 1e-15 * expected.abs()).all()

    def test_sums_through_the_kernel_are_those_of_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sums, "kernel_runs", lambda rows: True)
        made = GramSum(2, 20, 3, torch.device(DEVICE))
        expected = torch.zeros_like(made.gram), torch.zeros_like(made.rhs)
        for seed in (1, 2):
            rows, targets = draw(2, 60, 20, seed=seed), draw(2, 60, 3, dtype=torch.float32, seed=seed)
            made.add(rows, targets)
            expected[0].add_(rows.double().mT @ rows.double())
            expected[1].add_(rows.double().mT @ targets.double())
        torch.testing.assert_close(made.gram, expected[0], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(made.rhs, expected[1], rtol=1e-6, atol=1e-5)
        assert torch.equal(made.gram, made.gram.mT)

    def test_targets_may_come_as_halves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sums, "kernel_runs", lambda rows: True)
        made, units = GramSum(2, 20, 5, torch.device(DEVICE)), torch.tensor([0.25, 8.0], device=DEVICE)
        rows, halves = draw(2, 60, 20), draw(2, 60, 16, seed=9)
        halves[..., 10:] = torch.nan  # what aligns the rows is never used
        energy = draw(2, dtype=torch.float64).abs()
        for _ in range(2):
            made.add_halves(rows, halves[..., :10], units, energy)
        targets = (halves[..., :5].double() + halves[..., 5:10].double() / 2048) * units.double().view(-1, 1, 1)
        torch.testing.assert_close(made.gram, 2 * rows.double().mT @ rows.double(), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(made.rhs, 2 * rows.double().mT @ targets, rtol=1e-6, atol=1e-5)
        assert torch.equal(made.energy, 2 * energy)
        made.add_halves(rows[:, :0], halves[:, :0, :10], units, energy)  # no rows, nothing to add
        assert torch.equal(made.energy, 2 * energy)

    @pytest.mark.parametrize(
        ("total", "left", "right", "message"),
        [
            ((2, 5, 5), torch.zeros(9, 5, dtype=torch.float16), None, "rows must be"),
            ((2, 5, 5), torch.zeros(2, 9, 5), None, "rows must be float16"),
            ((2, 5, 5), torch.zeros(2, 5, 9, dtype=torch.float16).mT, None, "last dimension of rows"),
            ((2, 5, 4), torch.zeros(2, 9, 5, dtype=torch.float16), None, "total must be"),
            ((2, 5, 3), torch.zeros(2, 9, 5, dtype=torch.float16), torch.zeros(2, 8, 3).half(), "right must be"),
            ((2, 5, 3), torch.zeros(2, 9, 5, dtype=torch.float16), torch.zeros(2, 9, 3), "right must be float16"),
        ],
    )
    def test_bad_input_is_refused(
        self, total: tuple[int, ...], left: torch.Tensor, right: torch.Tensor | None, message: str
    ) -> None:
        result = torch.zeros(total, dtype=torch.float64, device=DEVICE)
        with pytest.raises(ValueError, match=message):
            if right is None:
                add_gram(result, left.to(DEVICE))
            else:
                add_product(result, left.to(DEVICE), right.to(DEVICE))

    def test_a_bad_total_or_span_is_refused(self) -> None:
        rows = draw(2, 9, 5)
        for total, message in (
            (torch.zeros(2, 5, 5, dtype=torch.float16), "float32 or float64"),
            (torch.zeros(5, 2, 5).transpose(0, 1), "total must be contiguous"),
        ):
            with pytest.raises(ValueError, match=message):
                add_gram(total.to(DEVICE), rows)
        with pytest.raises(ValueError, match="rows_per_span must be at least 1"):
            add_gram(torch.zeros(2, 5, 5, device=DEVICE), rows, rows_per_span=0)

    @pytest.mark.parametrize("num_columns", [1, 64, 200, 700, 4000])
    @pytest.mark.parametrize("shared_bytes", [99 << 10, 163 << 10, 227 << 10])
    def test_tiles_fit_a_block_and_spans_stay_short(self, num_columns: int, shared_bytes: int) -> None:
        for num_targets in (None, 8, 512):
            tiles = choose_tiles(num_columns, num_targets, shared_bytes)
            assert tiles.bytes_in_flight < shared_bytes and min(tiles[:3]) >= 16
        for num_rows in (1, 5000, 264_000):
            length = choose_rows_per_span(num_rows, 6, 64, 264)
            assert length % 64 == 0 and length <= min(gram.MOST_SPAN_ROWS, num_rows + 63)

    def test_six_products_are_cut_so_that_no_slot_stays_empty(self) -> None:
        length = choose_rows_per_span(264_000, 6, 64, 264)
        assert 6 * -(-264_000 // length) == 264

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestGram")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twins_add_products_part_by_part(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compactor_kernels.reference_gram.PART_ELEMENTS", 100)
    rows, others = draw(2, 33, 7).cpu(), draw(2, 33, 4).cpu()
    total, product = symmetric(2, 7, dtype).cpu(), torch.ones(2, 7, 4, dtype=dtype)
    expected = total + rows.to(dtype).mT @ rows.to(dtype), product + rows.to(dtype).mT @ others.to(dtype)
    add_gram_reference(total, rows)
    add_product_reference(product, rows, others)
    torch.testing.assert_close((total, product), expected)
    assert torch.equal(total, total.mT)


def test_right_hand_sides_reach_the_kernel_in_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    strides: list[int] = []

    def product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        strides.append(right.stride(1))
        add_product_reference(total, left, right)

    monkeypatch.setattr(sums, "kernel_runs", lambda rows: True)
    module = SimpleNamespace(ALIGNMENT=8, add_gram=add_gram_reference, add_product=product)
    monkeypatch.setitem(sys.modules, "compactor_kernels.gram", module)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 300, 20, generator=generator).half()
    for num_targets in (1, 5, 8):
        targets = torch.randn(2, 300, num_targets, generator=generator) * torch.logspace(-6, 2, num_targets)
        made = GramSum(2, 20, num_targets, torch.device("cpu"))
        made.add(rows, targets)
        expected = rows.double().mT @ targets.double()
        assert ((made.rhs - expected).norm(dim=1) < 1e-6 * expected.norm(dim=1)).all()
        torch.testing.assert_close(made.gram, rows.double().mT @ rows.double())
    assert strides == [8, 16, 16]


def test_without_a_gpu_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "passes", lambda *_: pytest.fail("tried"))
    assert not sums.kernel_runs(torch.zeros(1, 2, 3, dtype=torch.float16))
