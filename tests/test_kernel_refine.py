"""Claims about the kernels of the refinement and their torch twin.

They run as those of test_kernels.py do: compiled where there is a GPU, else in Triton's interpreter, in a process of
their own; `TRITON_INTERPRET=1 pytest tests/test_kernel_refine.py` shows them singly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor.solve import refine as refine_module
from compactor.solve.refine import HeadKeyValues, Refiner
from compactor.solve.rows import Rows, held_out_rows
from compactor_kernels import reference
from compactor_kernels.reference import FitRows, Gradients, refine_gradients_reference
from compactor_kernels.reference_steps import Moving, Steps, begin_steps_reference, take_step_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MOST_APART = 2.1  # of the largest move: as far the other way
LEAST_LINE = 5  # components of which half tell something

if INTERPRETED or COMPILED:
    from compactor_kernels import refine_gradients as kernels
    from compactor_kernels.refine_gradients import choose_num_slices, choose_tiles, flops, plan_gradients
    from compactor_kernels.refine_steps import KernelSteps, begin_steps, take_step


@dataclass(frozen=True)
class Case:
    """Inputs of a step, and the lengths of the heads on the host."""

    rows: FitRows
    index: torch.Tensor
    keys: torch.Tensor
    biases: torch.Tensor
    values: torch.Tensor
    lengths: tuple[int, ...]
    scales: torch.Tensor
    scaling: float

    def kernel(self) -> Gradients:
        """The gradients that the kernels find: what a step keeps of them that forgets at once, and moves nothing."""
        plan = plan_gradients(self.rows, self.lengths, self.scales, scaling=self.scaling)
        drawn, rates = self.index.unsqueeze(0), torch.zeros(1, device=self.index.device)
        start = self.keys, self.biases, self.values
        steps = begin_steps(plan, *start, torch.ones_like(self.scales), drawn, rates, betas=(0.0, 0.0))
        take_step(plan, steps)
        return Gradients(*steps.first)

    def twin(self) -> Gradients:
        moving = (self.keys, self.biases, self.values)
        return refine_gradients_reference(
            self.rows, self.index, *moving, self.lengths, self.scales, scaling=self.scaling
        )


def make_case(
    lengths: tuple[int, ...],
    *,
    num_rows: int = 90,
    num_drawn: int = 70,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    common: float = 0.0,
    padding: int = 0,
    device: str = DEVICE,
) -> Case:
    """Rows that saw a document of random keys and something near, and other keys that stand for the document.

    ``common`` is in all components of all queries and keys: it adds as much to all scores of a row. Row numbers repeat.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    num_heads, longest, scaling = len(lengths), max(lengths) + padding, head_dim**-0.5
    queries = (common + normal(num_heads, num_rows, head_dim)).to(dtype)
    document = common + normal(num_heads, 50, head_dim)
    keys, values = (normal(num_heads, longest, head_dim) for _ in range(2))
    keys[:, :50] = document[:, :longest] + 0.05 * keys[:, :50]  # the first are like its own
    keys[:, 50:] += common
    scores = scaling * torch.einsum("hid,hjd->hij", queries.float(), document)
    near_scores = scores.logsumexp(-1) - 3.0 + normal(num_heads, num_rows)
    lse = torch.logaddexp(scores.logsumexp(-1), near_scores)
    near, out = (0.3 * normal(num_heads, num_rows, head_dim) for _ in range(2))
    weights = normal(num_heads, num_rows).exp()
    case = Case(
        rows=FitRows(queries, weights, lse, near_scores - lse, near, out),
        index=torch.randint(num_rows, (num_drawn,), generator=generator),
        keys=keys,
        biases=normal(num_heads, longest),
        values=values,
        lengths=lengths,
        scales=normal(3, num_heads).exp(),
        scaling=scaling,
    )
    return moved_to(case, device)


def moved_to(case: Case, device: str) -> Case:
    moved = {name: part.to(device) for name, part in vars(case).items() if isinstance(part, torch.Tensor)}
    return replace(case, rows=FitRows(*(part.to(device) for part in case.rows)), **moved)


def textbook_gradients(case: Case) -> Gradients:
    """Gradients by automatic differentiation of the softmax over near and kept keys, head by head, in float64."""
    rounded = case.keys.to(case.rows.queries.dtype)
    moving = [part.detach().cpu().double() for part in (rounded, case.biases, case.values)]
    found = [torch.zeros_like(part) for part in moving]
    index = case.index.cpu()
    for head, count in enumerate(case.lengths):
        own = FitRows(*(part[head].cpu().double()[index] for part in case.rows))
        keys, biases, values = (part[head, :count].clone().requires_grad_() for part in moving)
        scores = own.queries @ keys.T * case.scaling + biases - own.lse.unsqueeze(1)
        shares = torch.softmax(torch.cat([scores, own.near_share.unsqueeze(1)], 1), 1)
        out = shares[:, :-1] @ values + shares[:, -1:] * own.near
        loss = 0.5 * (own.weights * (out - own.out).square().sum(1)).sum()
        parts = torch.autograd.grad(loss, [keys, biases, values])
        for total, part, scale in zip(found, parts, case.scales[:, head].tolist(), strict=True):
            total[head, :count] = scale * part
    return Gradients(*found)


def assert_close(found: Gradients, exact: Gradients, tolerance: float) -> None:
    """Of each head, the error is at most ``tolerance`` of the gradient, in norm; padding is 0."""
    for name, got, truth in zip(Gradients._fields, found, exact, strict=True):
        assert got.shape == truth.shape
        for head in range(len(truth)):
            error = float((got[head].cpu().double() - truth[head]).norm())
            assert error <= tolerance * float(truth[head].norm()), (name, head, error / float(truth[head].norm()))
        assert not got.cpu()[truth == 0].any()


def tolerance_of(dtype: torch.dtype) -> float:
    """Of products in a type: shares, values and errors are float16 for both half types, dS has the queries' type."""
    return {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 4e-3}[dtype]


@dataclass(frozen=True)
class Descent:
    """A case and what its steps need besides."""

    case: Case
    drawn: torch.Tensor
    rates: torch.Tensor
    units: torch.Tensor
    betas: tuple[float, float] = (0.9, 0.95)

    def arguments(self, case: Case) -> tuple[Any, ...]:
        return case.keys, case.biases, case.values, self.units, self.drawn, self.rates, self.betas

    def by_kernel(self) -> KernelSteps:
        """The state after all steps."""
        case = self.case
        plan = plan_gradients(case.rows, case.lengths, case.scales, scaling=case.scaling)
        steps = begin_steps(plan, *self.arguments(case))
        for _ in self.rates:
            take_step(plan, steps)
        return steps

    def by_twin(self, case: Case) -> Steps:
        """The state after all steps on a case: this one or another of its shapes."""
        steps = begin_steps_reference(*self.arguments(case))
        for _ in self.rates:
            take_step_reference(case.rows, case.lengths, case.scales, steps, scaling=case.scaling)
        return steps

    def textbook(self) -> Moving:
        """Where torch's Adam comes on changes in the units, in float64, with textbook gradients."""
        case = in_double(self.case)
        start = Moving(self.case.keys.double(), case.biases, case.values)
        units = [self.units[i].double().view(-1, *[1] * (part.dim() - 1)) for i, part in enumerate(start)]
        changes = [torch.zeros_like(part, requires_grad=True) for part in start]
        optimizer = torch.optim.Adam(changes, betas=self.betas)

        def moved() -> Moving:
            parts = zip(start, changes, units, strict=True)
            return Moving(*(part + change.detach() * unit for part, change, unit in parts))

        for index, rate in zip(self.drawn, self.rates.tolist(), strict=True):
            here = replace(self.case, index=index, **moved()._asdict())
            for change, gradient in zip(changes, textbook_gradients(here), strict=True):
                change.grad = gradient.to(change.device)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        return moved()


def make_descent(case: Case, steps: int = 4) -> Descent:
    """Steps on other rows each, at rates that fall; a head's scales contain its units."""
    generator = torch.Generator().manual_seed(3)
    num_rows, num_drawn = case.rows.lse.shape[1], len(case.index)
    units = 0.2 + torch.rand(3, len(case.lengths), generator=generator)
    drawn = torch.randint(num_rows, (steps, num_drawn), generator=generator)
    rates = 0.1 / torch.arange(1, steps + 1)
    return Descent(case, drawn.to(case.keys.device), rates.to(case.keys.device), units.to(case.keys.device))


def assert_moved_alike(found: Moving, exact: Moving, start: Case, tolerance: float) -> None:
    """Of how far the keys, biases and values of a head moved, root mean square, 19 of 20 components are off by at most
    ``tolerance``; padding never moves.

    Adam divides a gradient by its own size: a component whose gradient is nearly 0 may as well move the other way. So
    none is further off than that; and of each key and each dimension, half of the components are off by at most half
    of how far a component moves.
    """
    for name, here, there in zip(Moving._fields, found, exact, strict=True):
        before = getattr(start, name)
        for head, count in enumerate(start.lengths):
            assert torch.equal(here[head, count:], before[head, count:])
            if count:
                errors = (here[head, :count].double() - there[head, :count].double()).abs()
                error = float(errors.flatten().kthvalue(max(1, math.ceil(0.95 * errors.numel()))).values)
                moves = (there[head, :count].double() - before[head, :count].double()).abs()
                moved = float(moves.square().mean().sqrt())
                assert moved > 0 and error <= tolerance * moved, (name, head, error / moved)
                assert float(errors.max()) <= MOST_APART * float(moves.max()), (name, head)
                for lines in (errors, errors.T) if errors.dim() == 2 and count >= LEAST_LINE else ():
                    assert float(lines.median(dim=1).values.max()) <= 0.5 * moved, (name, head)


# The twins


def test_twin_of_steps_is_adam_with_textbook_gradients() -> None:
    case = make_case((9, 0, 30), head_dim=20, dtype=torch.float64, padding=2, device="cpu")
    descent = make_descent(case, steps=6)
    found = descent.by_twin(in_double(case))
    assert int(found.number) == 6
    assert_moved_alike(found.moving, descent.textbook(), in_double(case), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=lambda dtype: str(dtype)[6:])
def test_twin_equals_automatic_differentiation(dtype: torch.dtype) -> None:
    case = make_case((9, 1, 30), head_dim=20, dtype=dtype, padding=2, device="cpu")
    found = case.twin()
    assert found.by_key.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found, textbook_gradients(case), 1e-7 if dtype == torch.float64 else 1e-5)


def test_twin_in_blocks_of_rows_is_the_twin_in_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((9, 1, 30), dtype=torch.float64, device="cpu")
    whole = case.twin()
    monkeypatch.setattr(reference, "SCORE_ELEMENTS", 64)
    for part, other in zip(case.twin(), whole, strict=True):
        torch.testing.assert_close(part, other)


def test_twin_takes_lengths_from_the_device() -> None:
    case = make_case((4, 6), device="cpu")
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    found = refine_gradients_reference(
        case.rows, case.index, case.keys, case.biases, case.values, lengths, case.scales, scaling=case.scaling
    )
    assert torch.equal(found.by_key, case.twin().by_key)


@pytest.mark.parametrize("place", [(slice(None), 19), (0, slice(None)), (3, 4)], ids=["dimension", "key", "component"])
@pytest.mark.parametrize("wrong", ["stays", "other way", "far"])
def test_moves_that_are_wrong_in_one_place_are_not_alike(place: tuple[Any, ...], wrong: str) -> None:
    case = make_case((40, 33), head_dim=64, num_drawn=20, device="cpu")
    exact = make_descent(case, steps=2).by_twin(case).moving
    keys = exact.keys.clone()
    moves = {"stays": 0.0, "other way": -1.0, "far": 9.0}[wrong] * (keys[0] - case.keys[0])
    keys[(0, *place)] = (case.keys[0] + moves)[place]
    assert_moved_alike(exact, exact, case, 1e-3)
    if place == (3, 4) and wrong != "far":
        assert_moved_alike(exact._replace(keys=keys), exact, case, 1e-3)
        return
    with pytest.raises(AssertionError, match="'keys', 0"):
        assert_moved_alike(exact._replace(keys=keys), exact, case, 1e-3)


# The kernels


class TestRefineGradients:
    """Collected where the kernels can run: compiled on a GPU, or in the interpreter's own process."""

    __test__ = COMPILED or INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
    def test_gradients_are_those_of_automatic_differentiation(self, head_dim: int, dtype: torch.dtype) -> None:
        case = make_case((37, 1, 131), head_dim=head_dim, dtype=dtype)
        assert_close(case.kernel(), textbook_gradients(case), tolerance_of(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize(("num_rows", "num_drawn"), [(1, 1), (3, 17), (70, 64), (200, 129), (40, 300)])
    def test_any_number_of_rows(self, num_rows: int, num_drawn: int, dtype: torch.dtype) -> None:
        case = make_case((20, 3), num_rows=num_rows, num_drawn=num_drawn, dtype=dtype)
        assert_close(case.kernel(), textbook_gradients(case), tolerance_of(dtype))

    @pytest.mark.parametrize("lengths", [(1,), (1, 1), (16, 64, 65), (63, 0, 129), (2, 200)])
    def test_heads_of_any_lengths(self, lengths: tuple[int, ...]) -> None:
        case = make_case(lengths, dtype=torch.float16, padding=3)
        assert_close(case.kernel(), textbook_gradients(case), tolerance_of(torch.float16))

    def test_a_row_drawn_twice_weighs_twice(self) -> None:
        case = make_case((20, 7))
        once = replace(case, index=torch.tensor([4, 9], device=DEVICE))
        double = [4, 9, 4, 9, 9, 4]
        twice = replace(case, index=torch.tensor(double, device=DEVICE))
        for part, three_times in zip(once.kernel(), twice.kernel(), strict=True):
            torch.testing.assert_close(3 * part, three_times, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_nothing_near(self, dtype: torch.dtype) -> None:
        case = make_case((40, 1), dtype=dtype)
        nothing = torch.full_like(case.rows.near_share, -math.inf)
        alone = replace(case, rows=case.rows._replace(near_share=nothing, near=torch.zeros_like(case.rows.near)))
        found, exact = alone.kernel(), textbook_gradients(alone)
        one_key = float(found.by_key[1].abs().max())  # all is on it, whatever it is: only its value matters
        assert one_key <= 1e-3 * float(case.scales[0, 1]) * float(exact.by_value[1].norm())
        seen = [Gradients(*(part[:1] for part in parts)) for parts in (found, exact)]
        assert_close(*seen, tolerance_of(dtype))
        torch.testing.assert_close(found.by_value[1].cpu().double(), exact.by_value[1], rtol=5e-3, atol=5e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_padding_is_never_read(self, dtype: torch.dtype) -> None:
        case = make_case((30, 5), dtype=dtype, padding=7)
        before = case.kernel()
        for head, count in enumerate(case.lengths):
            for part in (case.keys, case.biases, case.values):
                part[head, count:] = math.nan
        for part, again in zip(before, case.kernel(), strict=True):
            assert torch.equal(part, again)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_scores_in_the_thousands(self, dtype: torch.dtype) -> None:
        case = make_case((40, 33), dtype=dtype, common=16.0)
        scores = case.scaling * torch.einsum("hid,hjd->hij", case.rows.queries.float(), case.keys)
        assert float(scores.min()) > 1000
        assert_close(case.kernel(), textbook_gradients(case), tolerance_of(dtype) + 1e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_huge_and_hopeless_biases(self, dtype: torch.dtype) -> None:
        case = make_case((90, 33), dtype=dtype)
        case.biases[:, ::5] = 7.0
        case.biases[:, 2::5] = -1e4
        found, exact = case.kernel(), textbook_gradients(case)
        assert not found.by_key[:, 2::5].any() and not found.by_value[:, 2::5].any()
        assert_close(found, exact, 2 * tolerance_of(dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    @pytest.mark.parametrize(("values", "weights"), [(1e-5, 1.0), (3e5, 1e-9), (1.0, 1e-12), (1e-3, 1e8)])
    def test_the_units_of_a_model_do_not_matter(self, values: float, weights: float, dtype: torch.dtype) -> None:
        case = make_case((40, 7), dtype=dtype)
        rows = case.rows
        rows = rows._replace(weights=rows.weights * weights, near=rows.near * values, out=rows.out * values)
        other = replace(case, rows=rows, values=case.values * values)
        assert_close(other.kernel(), textbook_gradients(other), tolerance_of(dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_rows_a_hundred_thousand_times_lighter_than_another_keep_their_digits(self, dtype: torch.dtype) -> None:
        case = make_case((40, 7), dtype=dtype)
        weights = case.rows.weights.clone()
        weights[:, 0] = 1e5
        light = replace(case, rows=case.rows._replace(weights=weights), index=case.index[case.index > 0])
        assert_close(light.kernel(), textbook_gradients(light), 2 * tolerance_of(dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_errors_beyond_half_precision_are_cut(self, dtype: torch.dtype) -> None:
        case = make_case((40, 7), dtype=dtype)
        out = case.rows.out * 1e-3
        out[:, 3] = 1e5
        index = torch.arange(20, device=DEVICE)
        wild = replace(case, rows=case.rows._replace(out=out), index=index, values=case.values * 1e6)
        assert all(part.isfinite().all() for part in wild.kernel())

    def test_a_head_that_is_not_finite_stays_so_and_alone(self) -> None:
        case = make_case((20, 7, 9), dtype=torch.float16)
        before = case.kernel()
        case.keys[1, 3, 5] = math.nan
        after = case.kernel()
        for part, other in zip(before, after, strict=True):
            assert torch.equal(part[[0, 2]], other[[0, 2]])
            assert other[1].isnan().any()

    @pytest.mark.parametrize("num_slices", [1, 2, 5, 64])
    def test_slices_do_not_change_the_gradients(self, num_slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
        case = make_case((70, 3), num_drawn=150)
        monkeypatch.setattr(kernels, "choose_num_slices", lambda *_: num_slices)
        assert_close(case.kernel(), textbook_gradients(case), tolerance_of(torch.float32))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_equal_calls_give_equal_bits(self, dtype: torch.dtype) -> None:
        case = make_case((131, 40), num_drawn=200, dtype=dtype)
        first, second = case.kernel(), case.kernel()
        assert all(torch.equal(part, again) for part, again in zip(first, second, strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: {"rows": c.rows._replace(queries=c.rows.queries[0])}, "queries must be"),
            (lambda c: {"rows": c.rows._replace(queries=c.rows.queries.double())}, "not torch.float64"),
            (lambda c: {"rows": c.rows._replace(queries=torch.zeros(2, 90, 257))}, "head_dim must be 1 to 256"),
            (lambda c: {"rows": c.rows._replace(queries=c.rows.queries.mT.contiguous().mT)}, "queries must be contig"),
            (lambda c: {"rows": c.rows._replace(near=c.rows.near[:, 1:])}, "near must be"),
            (lambda c: {"rows": c.rows._replace(out=c.rows.out.half())}, "out must be"),
            (lambda c: {"rows": c.rows._replace(lse=c.rows.lse.to("meta"))}, "like the queries, not on meta"),
            (lambda c: {"rows": c.rows._replace(weights=c.rows.weights.T.contiguous().T)}, "weights must be contig"),
            (lambda c: {"lengths": (5,)}, "lengths must be 2 numbers"),
            (lambda c: {"lengths": (0, 0)}, "one above 0"),
            (lambda c: {"lengths": (5, 6)}, "keys must be"),
            (lambda c: {"scales": c.scales[:2]}, "scales must be"),
            (lambda c: {"keys": c.keys.half()}, "keys must be"),
            (lambda c: {"keys": c.keys[..., 1:]}, "keys must be"),
            (lambda c: {"biases": c.biases[:, :-1]}, "biases must be"),
            (lambda c: {"values": c.values[:1]}, "values must be"),
        ],
    )
    def test_bad_input_is_refused_in_a_sentence(
        self, change: Callable[[Case], dict[str, object]], message: str
    ) -> None:
        case = make_case((5, 4))
        with pytest.raises(ValueError, match=message):
            replace(case, **change(case)).kernel()

    def test_tiles_are_what_the_matrix_units_take_and_fit_the_memory(self) -> None:
        for head_dim in range(1, 257):
            for element_bytes in (2, 4):
                for shared_bytes in (65_536, 101_376, 166_912, 232_448):  # of a block; the last three: 8.6, 8.0, 9.0
                    errors, sums = choose_tiles(head_dim, element_bytes, shared_bytes)
                    for tiles in (errors, sums):
                        for size in (tiles.row_tile, tiles.key_tile, tiles.dim_tile):
                            assert size >= 16 and size & (size - 1) == 0
                        assert head_dim <= tiles.dim_tile <= max(16, 2 * head_dim) and tiles.num_stages >= 1
                        assert 2 * element_bytes * tiles.key_tile * tiles.dim_tile <= shared_bytes
                    assert errors.row_tile % sums.row_tile == 0
                    assert sums.key_tile % kernels.ADDED_KEYS == 0

    @pytest.mark.parametrize("num_row_tiles", [1, 7, 256])
    def test_slices_fill_the_device_and_bound_the_memory(self, num_row_tiles: int) -> None:
        at_once = 2 * 132
        for num_tiles in (1, 3, 24, 100, 263, 265, 400, 5000):
            num_slices = choose_num_slices(num_tiles, num_row_tiles, 132)
            assert 1 <= num_slices <= num_row_tiles
            blocks = num_tiles * num_slices
            assert blocks <= max(num_tiles, 10 * at_once)
            if num_row_tiles == 256 and num_tiles >= 24:
                assert blocks >= 0.75 * at_once * -(-blocks // at_once)  # the last round is not much emptier

    def test_the_operations_of_a_step(self) -> None:
        assert flops(100, (3, 5), 64) == 12 * 100 * 8 * 64

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_refined_heads_are_those_of_the_torch_path(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(refine_module, "CPU_ROWS", 100)
        monkeypatch.setattr(refine_module, "ROWS", 100)
        case = make_case((12, 0, 5), num_rows=60, head_dim=16, dtype=dtype)
        rows, heads = as_rows(case), as_heads(case)
        monkeypatch.setattr(refine_module, "is_fused", lambda parts: False)
        expected = Refiner(6).refine([rows], heads)
        monkeypatch.setattr(refine_module, "is_fused", lambda parts: True)
        found = Refiner(6).refine([rows], heads)
        assert found[1] is heads[1]
        for head in (0, 2):
            for name in ("keys", "biases", "values"):
                start, there, here = (getattr(parts[head], name) for parts in (heads, expected, found))
                moved = float((there - start).norm())
                limit = 0.01 if dtype == torch.float32 else 0.1
                assert moved > 0 and float((here - there).norm()) <= limit * moved

    @pytest.mark.skipif(INTERPRETED, reason="large sizes need a GPU")
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    def test_large_sizes_on_a_gpu(self, head_dim: int, dtype: torch.dtype) -> None:
        case = make_case((1500, 1, 205, 777), num_rows=9000, num_drawn=8192, head_dim=head_dim, dtype=dtype)
        exact = Gradients(*(part.cpu() for part in in_double(case).twin()))
        assert_close(case.kernel(), exact, 1e-5 if dtype == torch.float32 else 2 * tolerance_of(dtype))

    @pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
    def test_refinement_on_a_gpu_takes_the_kernels_and_repeats_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = make_case((300, 20), num_rows=2000, head_dim=128, dtype=torch.bfloat16)
        rows, heads = as_rows(case), as_heads(case)
        assert refine_module.is_fused([rows])
        first, again = (Refiner(20).refine([rows], heads) for _ in range(2))
        monkeypatch.setattr(refine_module, "is_fused", lambda parts: False)
        other = Refiner(20).refine([rows], heads)
        for name in ("keys", "biases", "values"):
            for head in range(2):
                start, there, here = (getattr(parts[head], name) for parts in (heads, other, first))
                assert torch.equal(here, getattr(again[head], name))
                assert float((here - there).norm()) <= 0.2 * float((there - start).norm())


class TestTakeStep:
    """Collected as the class above is."""

    __test__ = COMPILED or INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128, 256])
    def test_steps_are_those_of_adam_with_textbook_gradients(self, head_dim: int, dtype: torch.dtype) -> None:
        case = make_case((19, 1, 0, 9), num_drawn=20, head_dim=head_dim, dtype=dtype, padding=3)
        descent = make_descent(case, steps=3)
        assert_moved_alike(descent.by_kernel().moving, descent.textbook(), case, tolerance_of_steps(dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_steps_are_those_of_the_twin(self, dtype: torch.dtype) -> None:
        case = make_case((7, 0, 70), num_drawn=33, dtype=dtype)
        descent = make_descent(case, steps=5)
        found, expected = descent.by_kernel(), descent.by_twin(case)
        assert int(found.number) == int(expected.number) == 5
        assert_moved_alike(found.moving, expected.moving, case, tolerance_of_steps(dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_the_first_moments_are_the_gradients(self, dtype: torch.dtype) -> None:
        case = make_case((37, 5), dtype=dtype)
        descent = make_descent(case, steps=1)
        found = descent.by_kernel()
        gradients = replace(case, index=descent.drawn[0]).kernel()
        for first, second, gradient in zip(found.first, found.second, gradients, strict=True):
            torch.testing.assert_close(first, 0.1 * gradient, rtol=1e-6, atol=0.0)
            torch.testing.assert_close(second, 0.05 * gradient.square(), rtol=1e-6, atol=1e-38)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    def test_the_next_step_reads_what_this_one_wrote(self, dtype: torch.dtype) -> None:
        case = make_case((37, 5), num_drawn=20, dtype=dtype)
        found = make_descent(case, steps=2).by_kernel()
        plan = plan_gradients(case.rows, case.lengths, case.scales, scaling=case.scaling)
        keys, values = kernels.in_types_of_products(plan, found.moving.keys, found.moving.values)
        assert keys.dtype == found.rounded_keys.dtype and values.dtype == found.scaled_values.dtype
        for head, count in enumerate(case.lengths):
            rounded, expected = found.rounded_keys[head, :count], keys[head, :count]
            cut = INTERPRETED and dtype == torch.bfloat16  # not rounded
            torch.testing.assert_close(rounded, expected, rtol=2**-7 if cut else 0.0, atol=0.0)
            scaled, expected = found.scaled_values[head, :count].float(), values[head, :count].float()
            torch.testing.assert_close(
                scaled, expected, rtol=1e-3 if values.dtype == torch.float16 else 1e-6, atol=1e-7
            )

    def test_what_a_descent_starts_from_stays_as_it_is(self) -> None:
        case = make_case((20, 7), num_drawn=20)
        start = [part.clone() for part in (case.keys, case.biases, case.values)]
        make_descent(case, steps=1).by_kernel()
        assert all(map(torch.equal, start, (case.keys, case.biases, case.values)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_padding_is_never_read(self, dtype: torch.dtype) -> None:
        case = make_case((30, 5), num_drawn=20, dtype=dtype, padding=7)
        before = make_descent(case, steps=2).by_kernel().moving
        for head, count in enumerate(case.lengths):
            for part in (case.keys, case.biases, case.values):
                part[head, count:] = math.nan
        for part, again in zip(before, make_descent(case, steps=2).by_kernel().moving, strict=True):
            for head, count in enumerate(case.lengths):
                assert torch.equal(part[head, :count], again[head, :count])

    def test_a_unit_of_0_moves_nothing(self) -> None:
        case = make_case((20, 7), num_drawn=20)
        case.scales[1, 0] = 0.0
        descent = make_descent(case, steps=2)
        descent.units[1, 0] = 0.0
        found = descent.by_kernel().moving
        assert torch.equal(found.biases[0], case.biases[0])
        assert not torch.equal(found.biases[1], case.biases[1]) and not torch.equal(found.keys[0], case.keys[0])

    def test_a_head_that_is_not_finite_stays_so_and_alone(self) -> None:
        case = make_case((20, 7, 9), num_drawn=20, dtype=torch.float16)
        before = make_descent(case, steps=2).by_kernel().moving
        case.keys[1, 3, 5] = math.nan
        for part, other in zip(before, make_descent(case, steps=2).by_kernel().moving, strict=True):
            assert torch.equal(part[[0, 2]], other[[0, 2]])
            assert other[1].isnan().any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_equal_descents_give_equal_bits(self, dtype: torch.dtype) -> None:
        descent = make_descent(make_case((67, 40), num_drawn=90, dtype=dtype), steps=2)
        first, second = descent.by_kernel(), descent.by_kernel()
        for part, again in zip(first.moving + first.second, second.moving + second.second, strict=True):
            assert torch.equal(part, again)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: {"case": replace(d.case, keys=d.case.keys.half())}, "keys must be"),
            (lambda d: {"case": replace(d.case, biases=d.case.biases[:, :-1])}, "biases must be"),
            (lambda d: {"case": replace(d.case, values=d.case.values.mT.contiguous().mT)}, "values must be contig"),
            (lambda d: {"units": d.units[:2]}, "units must be"),
            (lambda d: {"drawn": d.drawn[0]}, "drawn must be .steps, num_drawn"),
            (lambda d: {"drawn": d.drawn[:, :0]}, "drawn must be .steps, num_drawn"),
            (lambda d: {"drawn": d.drawn.int()}, "drawn must be"),
            (lambda d: {"drawn": d.drawn.T.contiguous().T}, "drawn must be contig"),
            (lambda d: {"rates": d.rates[1:]}, "rates must be"),
            (lambda d: {"rates": d.rates.double()}, "rates must be"),
            (lambda d: {"rates": d.rates.to("meta")}, "like the queries, not on meta"),
            (lambda d: {"betas": (0.9, 1.0)}, "betas must be"),
        ],
    )
    def test_bad_input_is_refused_in_a_sentence(
        self, change: Callable[[Descent], dict[str, Any]], message: str
    ) -> None:
        descent = make_descent(make_case((5, 4)))
        with pytest.raises(ValueError, match=message):
            replace(descent, **change(descent)).by_kernel()

    @pytest.mark.skipif(INTERPRETED, reason="large sizes need a GPU")
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    def test_large_sizes_on_a_gpu(self, head_dim: int, dtype: torch.dtype) -> None:
        case = make_case((1500, 1, 205, 777), num_rows=9000, num_drawn=8192, head_dim=head_dim, dtype=dtype)
        descent = make_descent(case, steps=5)
        assert_moved_alike(descent.by_kernel().moving, descent.by_twin(case).moving, case, tolerance_of_steps(dtype))

    @pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
    def test_replays_of_a_captured_step_are_the_next_steps(self) -> None:
        case = make_case((300, 77), num_rows=2000, num_drawn=1024, dtype=torch.bfloat16)
        descent = make_descent(case, steps=8)
        expected = descent.by_kernel()
        plan = plan_gradients(case.rows, case.lengths, case.scales, scaling=case.scaling)
        steps = begin_steps(plan, *descent.arguments(case))
        take_step(plan, steps)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            take_step(plan, steps)
        for _ in range(7):
            graph.replay()
        assert int(steps.number) == 8
        assert all(torch.equal(part, other) for part, other in zip(steps.moving, expected.moving, strict=True))


def tolerance_of_steps(dtype: torch.dtype) -> float:
    """Gradients a tenth of their head's have errors ten times as large, and move as far."""
    exact = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.06}[dtype]
    return 2 * exact if INTERPRETED else exact  # bf16 is cut there, not rounded


def in_double(case: Case) -> Case:
    """The same problem in float64, its keys rounded as the kernels round them."""
    rounded = case.keys.to(case.rows.queries.dtype).double()
    rows = FitRows(*(part.double() for part in case.rows))
    return replace(case, rows=rows, keys=rounded, biases=case.biases.double(), values=case.values.double())


def as_rows(case: Case) -> Rows:
    """The rows of a case as the fit has them, in groups of two."""
    parts = [part.unflatten(1, (2, -1)) for part in case.rows._replace(weights=case.rows.weights.sqrt())]
    queries, roots, lse, near_share, near, out = parts
    held_out = held_out_rows(lse.shape[2], lse.device)
    return Rows(queries, case.scaling, roots, lse, near_share, near, out, held_out)


def as_heads(case: Case) -> list[HeadKeyValues]:
    return [
        HeadKeyValues(case.keys[h, :n], case.biases[h, :n], case.values[h, :n], torch.arange(n))
        for h, n in enumerate(case.lengths)
    ]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestRefineGradients or TestTakeStep")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes host tensors")
def test_compiled_kernels_refuse_host_tensors() -> None:
    from compactor_kernels.refine_gradients import plan_gradients as compiled

    case = make_case((3,), device="cpu")
    with pytest.raises(ValueError, match="must be on a GPU, not on cpu"):
        compiled(case.rows, case.lengths, case.scales, scaling=case.scaling)
