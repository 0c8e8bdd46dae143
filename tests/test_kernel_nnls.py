"""Claims about the kernels of least squares in a box, and about who goes through them.

With a GPU the kernels are compiled. Without one they run in Triton's interpreter, in a process of its own, because
Triton reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_nnls.py` shows the tests
singly.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import scipy.optimize
import torch
from interpreter import assert_passes_interpreted

from compactor.errors import NumericalError
from compactor.solve import biases
from compactor.solve.biases import DOWNHILL_STEPS, NEWTON_STEPS, SUFFICIENT, solve_box_nnls, solve_box_nnls_batched
from compactor_kernels.reference_nnls import BoxPoints, BoxProblems, Search, box_newton_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
ONLY_COMPILED = pytest.mark.skipif(not COMPILED, reason="takes the interpreter long")
SEARCH = Search(NEWTON_STEPS, DOWNHILL_STEPS, SUFFICIENT, 1e-7, 1.0)
LOW, HIGH = 0.05, 2.0

if INTERPRETED or COMPILED:
    from compactor_kernels.nnls import box_newton

Problem = tuple[torch.Tensor, torch.Tensor]  # rows (num_problems, num_rows, n) of unit columns, and their targets


def problem(num_problems: int, size: int) -> Problem:
    """Return problems whose columns are alike, and whose solutions would leave the box at both ends."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.rand(num_problems, 3 * size + 2, size, generator=generator, dtype=torch.float64)
    rows += torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    wanted = 5.0 * torch.rand(num_problems, size, 1, generator=generator, dtype=torch.float64) - 1.5
    noise = torch.randn(num_problems, len(rows[0]), generator=generator, dtype=torch.float64)
    return rows.to(DEVICE), ((rows @ wanted).squeeze(-1) + 0.02 * noise).to(DEVICE)


def inputs(rows: torch.Tensor, targets: torch.Tensor) -> BoxProblems:
    """Return what the kernels are given: both ends of the box are as far from 1 as they are for biases."""
    gram, rhs = rows.mT @ rows, (rows.mT @ targets.unsqueeze(-1)).squeeze(-1)
    low, high = torch.full_like(rhs, LOW), torch.full_like(rhs, HIGH)
    seen = gram.diagonal(dim1=-2, dim2=-1) > 0
    return BoxProblems(gram, rhs, torch.ones_like(rhs), low, high, seen, rhs.abs().amax(-1))


def scipys(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    answer = scipy.optimize.lsq_linear(
        rows.cpu().numpy(), targets.cpu().numpy(), bounds=(LOW, HIGH), method="bvls", tol=1e-14
    )
    return torch.as_tensor(answer.x)


def solved(given: BoxProblems, *, tolerance: float = 1e-9, most: int = 60, **more: Any) -> BoxPoints:
    return box_newton(given, tolerance=tolerance, max_iterations=most, **{"search": SEARCH, "look_every": 1} | more)


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestNnls:
    @pytest.mark.parametrize(
        ("num_problems", "size"),
        [
            (1, 1),
            (1, 13),
            pytest.param(5, 7, marks=ONLY_COMPILED),
            pytest.param(2, 33, marks=ONLY_COMPILED),
            pytest.param(1, 70, marks=ONLY_COMPILED),
            pytest.param(3, 100, marks=ONLY_COMPILED),
            pytest.param(4, 300, marks=ONLY_COMPILED),
            pytest.param(8, 1100, marks=ONLY_COMPILED),
        ],
    )
    def test_solutions_are_those_of_scipy(self, num_problems: int, size: int) -> None:
        rows, targets = problem(num_problems, size)
        tolerance = 1e-12 if size < 30 else 1e-9  # gradients are float64
        found = solved(inputs(rows, targets), tolerance=tolerance)
        assert (found.optimality <= tolerance).all()
        for head in range(num_problems if size <= 300 else 1):
            expected = scipys(rows[head], targets[head])
            torch.testing.assert_close(found.point[head].cpu(), expected, rtol=0, atol=1e-6)
        assert size < 7 or ((found.point == LOW).any() and (found.point == HIGH).any())

    @pytest.mark.parametrize(
        ("num_problems", "size", "most"),
        [(2, 20, 0), (1, 20, 2), (1, 70, 1), pytest.param(3, 130, 2, marks=ONLY_COMPILED)],
    )
    def test_steps_are_those_of_the_twin(self, num_problems: int, size: int, most: int) -> None:
        given = inputs(*problem(num_problems, size))
        found = solved(given, most=most, tolerance=1e-3)
        expected = box_newton_reference(given, tolerance=1e-3, max_iterations=most, search=SEARCH)
        torch.testing.assert_close(found.point, expected.point, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.optimality, expected.optimality, rtol=1e-3, atol=1e-5)
        assert torch.equal(found.iterations, expected.iterations) and (found.iterations == most).all()

    def test_a_problem_that_has_stopped_stays_where_it_is(self) -> None:
        rows, targets = problem(2, 20)
        targets[0] = rows[0] @ rows.new_ones(20)  # solved by the start
        found = solved(inputs(rows, targets), tolerance=1e-12, most=2)
        assert found.iterations[0] == 0 < found.iterations[1] and (found.point[0] == 1.0).all()

    def test_unseen_variables_stay_at_the_start(self) -> None:
        rows, targets = problem(1, 20)
        rows[..., 5:] = 0.0
        found = solved(inputs(rows, targets))
        assert (found.point[0, 5:] == 1.0).all() and (found.optimality <= 1e-9).all()
        torch.testing.assert_close(found.point[0, :5].cpu(), scipys(rows[0, :, :5], targets[0]), rtol=0, atol=1e-6)

    def test_a_singular_problem_has_a_solution(self) -> None:
        rows, targets = problem(1, 6)
        rows[..., 1] = rows[..., 0]
        found = solved(inputs(rows, targets), tolerance=1e-7)
        assert (found.optimality <= 1e-7).all()
        fit = rows[0] @ found.point[0] - targets[0]
        best = rows[0].cpu() @ scipys(rows[0], targets[0]) - targets[0].cpu()
        assert float(fit.square().sum()) <= float(best.square().sum()) * (1 + 1e-9)

    def test_one_that_does_not_factor_goes_downhill_and_ends_as_no_number(self) -> None:
        given = inputs(*problem(1, 12))
        given[0][0] = torch.full((12, 12), -20.0).fill_diagonal_(1.0)
        given[1][0] = -40.0  # no step from the start helps but downhill to the corner
        given[3][0], given[4][0] = -1e9, 1e9
        search = replace(SEARCH, jitter=1e-3, hopeless=0.05)  # 0.01 is tried, 0.1 is too much
        for most in (1, 2):
            found = solved(given, most=most, search=search)
            expected = box_newton_reference(given, tolerance=1e-9, max_iterations=most, search=search)
            torch.testing.assert_close(found.point, expected.point, rtol=1e-6, atol=0, equal_nan=True)
            assert found.iterations.item() == expected.iterations.item() == most
            assert bool(found.point.isnan().all()) == (most == 2)

    def test_what_is_no_number_stops_its_problem_alone(self) -> None:
        rows, targets = problem(3, 12)
        given = inputs(rows, targets)
        alone = solved(BoxProblems(*(one[1:2] for one in given)), most=1)
        given[1][0, 3] = torch.nan
        given[1][2, 3] = given[6][2] = torch.inf
        found = solved(given, most=1)
        assert not (found.optimality[::2] <= 1e-9).any() and found.iterations.tolist() == [0, 1, 0]
        assert torch.equal(found.point[1], alone.point[0])

    def test_looks_change_nothing(self) -> None:
        given = inputs(*problem(1, 12))
        often, never = (solved(given, most=5, tolerance=0.05, look_every=every) for every in (1, None))
        assert (often.iterations < 5).all()
        assert torch.equal(often.point, never.point) and torch.equal(often.iterations, never.iterations)

    @pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
    def test_nothing_to_solve(self, shape: tuple[int, int]) -> None:
        vectors = torch.ones(4, *shape, dtype=torch.float64, device=DEVICE)
        gram = torch.ones(*shape, shape[1], dtype=torch.float64, device=DEVICE)
        reference = torch.ones(shape[0], dtype=torch.float64, device=DEVICE)
        found = solved(BoxProblems(gram, *vectors, vectors[0] > 0, reference))
        assert found.point.shape == shape and not found.iterations.any()

    @pytest.mark.parametrize(
        ("position", "replacement", "message"),
        [
            (0, torch.zeros(2, 3, 4).double(), "gram must be"),
            (0, torch.zeros(2, 3, 3), "gram must be float64"),
            (0, torch.zeros(2, 3, 3).double().mT, "gram must be contiguous"),
            (1, torch.zeros(2, 4).double(), "rhs must be"),
            (2, torch.zeros(2, 3), "start must be float64"),
            (4, torch.zeros(3).double(), "high must be"),
            (5, torch.ones(2, 3), "seen must be bool"),
            (6, torch.ones(3).double(), "reference must be"),
        ],
    )
    def test_bad_input_is_refused(self, position: int, replacement: torch.Tensor, message: str) -> None:
        given = list(inputs(*problem(2, 3)))
        given[position] = replacement.to(DEVICE)
        with pytest.raises(ValueError, match=message):
            solved(BoxProblems(*given))

    def test_too_many_variables_or_steps_are_refused(self) -> None:
        eye = torch.eye(1537, dtype=torch.float64, device=DEVICE)[None]
        row = eye[:, 0]
        with pytest.raises(ValueError, match="at most 1536 variables"):
            solved(BoxProblems(eye, row, row, row, row, row > 0, row[:, 0]))
        with pytest.raises(ValueError, match="1 to 16 steps, not 17"):
            search = Search((0.5, 9), (0.5, 8), 1e-4, 1e-7, 1.0)
            box_newton(inputs(*problem(1, 3)), tolerance=1e-9, max_iterations=3, search=search)

    def test_biases_of_a_batch_are_those_without_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows, targets = problem(2, 20)
        rows[1, :, 12:] = 0.0
        rows[1] *= 1e-6
        gram, rhs = rows.mT @ rows, (rows.mT @ targets.unsqueeze(-1)).squeeze(-1)
        expected = solve_box_nnls_batched(gram.cpu(), rhs.cpu(), lower=LOW, upper=HIGH, tolerance=1e-7)
        monkeypatch.setattr(biases, "usable", lambda *_: True)
        with monkeypatch.context() as patch:
            patch.setattr(biases, "by_torch", lambda *_, **__: pytest.fail("torch searched"))
            found = solve_box_nnls_batched(gram, rhs, lower=LOW, upper=HIGH, tolerance=1e-7)
        assert found.converged.all() and expected.converged.all()
        torch.testing.assert_close(found.solution.cpu(), expected.solution, rtol=0, atol=1e-5)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestNnls")


@pytest.mark.parametrize(("num_problems", "size"), [(1, 1), (5, 7), (2, 33), (2, 100), (1, 300)])
def test_the_twin_equals_scipy(num_problems: int, size: int) -> None:
    rows, targets = (one.cpu() for one in problem(num_problems, size))
    found = box_newton_reference(inputs(rows, targets), tolerance=1e-9, max_iterations=60, search=SEARCH)
    assert (found.optimality <= 1e-9).all()
    for head in range(num_problems):
        torch.testing.assert_close(found.point[head], scipys(rows[head], targets[head]), rtol=0, atol=1e-6)


def test_without_a_gpu_torch_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biases, "by_kernels", lambda *_, **__: pytest.fail("a kernel ran"))
    rows, targets = (one.cpu() for one in problem(2, 5))
    gram, rhs = rows.mT @ rows, (rows.mT @ targets.unsqueeze(-1)).squeeze(-1)
    assert solve_box_nnls_batched(gram, rhs, lower=LOW, upper=HIGH).converged.all()


def test_a_problem_alone_goes_through_torch_and_is_told_to_have_no_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biases, "usable", lambda *_: True)
    monkeypatch.setattr(biases, "by_kernels", lambda *_, **__: pytest.fail("a kernel ran"))
    with pytest.raises(NumericalError):
        solve_box_nnls(torch.full((3, 3), -20.0).fill_diagonal_(1.0), -torch.ones(3), lower=-9.0, upper=9.0)
