"""Claims about the kernels that factor and solve positive definite systems, and about who goes through them.

With a GPU the kernels are compiled. Without one they run in Triton's interpreter, in a process of its own, because
Triton reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_cholesky.py` shows the
tests singly.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor.errors import NumericalError
from compactor.solve import biases
from compactor.solve.biases import LARGE_ALONE, blocks_usable, solve_factored, solving_factors
from compactor.solve.values import RidgeStats, solve_in_float32, solve_ridge
from compactor_kernels.reference_cholesky import MAX_SIZE, BlockFactors, cholesky_solve_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
ONLY_COMPILED = pytest.mark.skipif(not COMPILED, reason="takes the interpreter long")
EPS = torch.finfo(torch.float32).eps

if INTERPRETED or COMPILED:
    from compactor_kernels.cholesky import (
        Tiles,
        cholesky_factors_batched,
        cholesky_solve_batched,
        cholesky_solve_factored,
        is_interpreted,
    )


def draw(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def systems_of(num_systems: int, size: int, condition: float = 1.0) -> torch.Tensor:
    """Return Gram matrices of unit scale whose columns differ by up to ``condition``."""
    rows = draw(num_systems, 2 * size + 1, size).double() * torch.logspace(0, -1, size, base=condition, device=DEVICE)
    return ((rows.mT @ rows) / (2 * size + 1)).float()


def assert_solves(systems: torch.Tensor, rhs: torch.Tensor, found: torch.Tensor) -> None:
    """Check the residual: solving by a float32 factor leaves a few roundings of what the products are made of (Higham,
    "Accuracy and Stability of Numerical Algorithms", theorem 10.4)."""
    assert found.dtype == torch.float32 and found.shape == rhs.shape
    residual = (systems.double() @ found.double() - rhs.double()).norm(dim=1)
    size = systems.double().flatten(1).norm(dim=1).unsqueeze(-1) * found.double().norm(dim=1)
    assert (residual <= 8 * EPS * size + 1e-30).all()


@pytest.fixture(scope="module")
def factors() -> BlockFactors:
    """Those of ``systems_of(1, 70)``, unknown above the tiles of the diagonal; made in tiles of 32 rows."""
    half = systems_of(1, 70)
    half[:, :64, 64:] = torch.nan
    return cholesky_factors_batched(half, tiles=Tiles(row_tile=32))


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestCholesky:
    @pytest.mark.parametrize(("num_systems", "size", "num_rhs"), [(1, 1, 1), (2, 7, 3), (1, 64, 17), (1, 130, 18)])
    def test_solutions_are_those_of_float64(self, num_systems: int, size: int, num_rhs: int) -> None:
        systems, rhs = systems_of(num_systems, size), draw(num_systems, size, num_rhs, seed=8)
        found, failed = cholesky_solve_batched(systems, rhs)
        assert_solves(systems, rhs, found)
        expected, _ = cholesky_solve_reference(systems, rhs)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert not failed.any()

    @ONLY_COMPILED
    @pytest.mark.parametrize(
        ("num_systems", "size", "num_rhs"),
        [(5, 33, 1), (3, 100, 1), (8, 164, 1), (5, 300, 40), (8, 700, 128), (3, 1000, 130), (2, MAX_SIZE, 1)],
    )
    def test_large_ones(self, num_systems: int, size: int, num_rhs: int) -> None:
        systems, rhs = systems_of(num_systems, size), draw(num_systems, size, num_rhs, seed=8)
        found, failed = cholesky_solve_batched(systems, rhs)
        assert_solves(systems, rhs, found)
        assert not failed.any()

    def test_the_tile_of_a_factor_is_the_inverse_of_its_halves(self, factors: BlockFactors) -> None:
        exact = torch.linalg.cholesky(systems_of(1, 70)[0].double())
        tile = factors.diagonal[0, :64].double()
        for half in (slice(0, 32), slice(32, 64)):
            expected = torch.linalg.inv(exact[half, half])
            torch.testing.assert_close(tile[half, half], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tile[32:, :32], exact[32:64, :32], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factors.lower[0, 64:70, :64].double(), exact[64:, :64], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("condition", [pytest.param(1e2, marks=ONLY_COMPILED), 1e5])
    def test_nearly_singular_systems_are_solved_as_well_as_by_torch(self, condition: float) -> None:
        systems, rhs = systems_of(1, 70, condition), draw(1, 70, 2, seed=8)
        added = torch.full((1,), 1e-7, device=DEVICE)
        found, failed = cholesky_solve_batched(systems, rhs, added=added)
        shifted = systems + 1e-7 * torch.eye(70, device=DEVICE)
        assert not failed.any()
        torchs = torch.cholesky_solve(rhs, torch.linalg.cholesky(shifted)).double()
        residuals = [(shifted.double() @ one.double() - rhs.double()).norm() for one in (found, torchs)]
        assert residuals[0] <= 4 * residuals[1]

    @pytest.mark.parametrize("num_rhs", [1, 2, 16, 33])
    def test_one_factorisation_serves_every_number_of_right_hand_sides(
        self, num_rhs: int, factors: BlockFactors
    ) -> None:
        rhs = draw(1, 70, num_rhs, seed=8)
        assert_solves(systems_of(1, 70), rhs, cholesky_solve_factored(factors, rhs))

    def test_systems_that_have_no_factor_are_told_and_touch_no_other(self) -> None:
        systems, rhs = systems_of(5, 40), draw(5, 40, 2, seed=8)
        for system, at in enumerate((0, 32, 39)):
            systems[system, at, at] = -0.1
        systems[3, 35, 2] = systems[3, 2, 35] = torch.nan
        found, failed = cholesky_solve_batched(systems, rhs)
        assert failed.tolist() == [True] * 4 + [False] and found[:4].isnan().all()
        assert cholesky_solve_reference(systems[:3], rhs[:3])[1].all()
        assert_solves(systems[4:], rhs[4:], found[4:])

    @ONLY_COMPILED
    def test_a_last_pivot_that_is_not_positive_is_told(self) -> None:
        systems = systems_of(3, 300)
        systems[1, 299, 299] = -0.1
        assert cholesky_factors_batched(systems).failed.tolist() == [False, True, False]

    def test_zeros_need_something_added(self) -> None:
        systems, rhs = systems_of(1, 40), draw(1, 40, 1, seed=8)
        systems[:, 20:], systems[:, :, 20:], rhs[:, 20:] = 0.0, 0.0, 0.0  # padding
        assert cholesky_factors_batched(systems).failed.tolist() == [True]
        found, failed = cholesky_solve_batched(systems, rhs, added=torch.tensor([1e-3], device=DEVICE))
        assert not failed.any() and not found[:, 20:].any()
        assert_solves(systems + 1e-3 * torch.eye(40, device=DEVICE), rhs, found)

    @ONLY_COMPILED
    @pytest.mark.parametrize("row_tile", [16, 32])
    def test_tiles_change_nothing_but_rounding(self, row_tile: int) -> None:
        systems, rhs = systems_of(2, 300), draw(2, 300, 35, seed=8)
        found, _ = cholesky_solve_batched(systems, rhs, tiles=Tiles(row_tile=row_tile, rhs_tile=32))
        assert_solves(systems, rhs, found)

    @ONLY_COMPILED
    def test_equal_calls_give_equal_bits(self) -> None:
        systems, rhs = systems_of(3, 700), draw(3, 700, 3, seed=8)
        assert torch.equal(cholesky_solve_batched(systems, rhs)[0], cholesky_solve_batched(systems, rhs)[0])

    @pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (1, 5, 0)])
    def test_nothing_to_solve(self, shape: tuple[int, int, int]) -> None:
        num_systems, size, _ = shape
        systems = torch.eye(size, device=DEVICE).repeat(num_systems, 1, 1)
        found, failed = cholesky_solve_batched(systems, draw(*shape))
        assert found.shape == shape and failed.tolist() == [False] * num_systems

    @pytest.mark.parametrize(
        ("systems", "added", "message"),
        [
            (torch.zeros(3, 3), None, "systems must be"),
            (torch.zeros(1, 3, 4), None, "systems must be"),
            (torch.zeros(1, 3, 3).double(), None, "systems must be float32"),
            (torch.zeros(1, 3, 3).mT, None, "systems must be contiguous"),
            (torch.zeros(1, MAX_SIZE + 1, MAX_SIZE + 1), None, "at most 1536 rows"),
            (torch.eye(3)[None], torch.zeros(2), "added must be"),
            (torch.eye(3)[None], torch.zeros(1).double(), "added must be float32"),
        ],
    )
    def test_bad_input_is_refused(self, systems: torch.Tensor, added: torch.Tensor | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            cholesky_factors_batched(systems.to(DEVICE), added=None if added is None else added.to(DEVICE))

    def test_bad_right_hand_sides_are_refused(self) -> None:
        factors = cholesky_factors_batched(torch.eye(3, device=DEVICE)[None])
        for rhs, message in (
            (torch.zeros(1, 4, 1, device=DEVICE), "rhs must be"),
            (torch.zeros(1, 3, device=DEVICE), "rhs must be"),
            (torch.zeros(1, 3, 2, device=DEVICE).double(), "rhs must be float32"),
            (torch.zeros(1, 2, 3, device=DEVICE).mT, "rhs must be contiguous"),
        ):
            with pytest.raises(ValueError, match=message):
                cholesky_solve_factored(factors, rhs)

    def test_one_system_has_no_factor_with_any_jitter_the_other_with_the_least(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(biases, "usable", lambda *_: True)
        monkeypatch.setattr(biases, "HOPELESS", 1e-8)
        eye = torch.eye(5, device=DEVICE)
        systems, rhs = torch.stack([1e-8 * eye, eye - 20.0]), draw(2, 5, 2)
        factors = solving_factors(systems)
        assert isinstance(factors, BlockFactors)
        found = solve_factored(factors, rhs)
        torch.testing.assert_close(found[0].double(), 1e8 * rhs[0].double(), rtol=1e-6, atol=0)
        assert found[1].isnan().all()

    def test_ridge_systems_of_any_size_lose_almost_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(biases, "usable", lambda *_: True)
        sizes = torch.tensor([1e-12, 1e12], dtype=torch.float64, device=DEVICE)
        rows = draw(2, 90, 25).abs().double() * sizes.view(-1, 1, 1)
        gram, rhs = rows.mT @ rows, rows.mT @ draw(2, 90, 3, seed=9).double()
        ridges = torch.tensor([1e-3, 1e-1], dtype=torch.float64, device=DEVICE)
        found = solve_in_float32(gram, rhs, gram.diagonal(dim1=1, dim2=2).mean(-1), ridges)
        monkeypatch.undo()
        for head in range(2):
            exact = solve_ridge(RidgeStats(gram[head].cpu(), rhs[head].cpu(), 0.0), float(ridges[head]))
            torch.testing.assert_close(found[head].cpu(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestCholesky")


@pytest.mark.parametrize("size", [1, 7, 33])
def test_the_twin_solves_what_has_a_factor(size: int) -> None:
    systems, rhs = systems_of(2, size).cpu(), draw(2, size, 3, seed=8).cpu()
    systems[1] -= 9.0 * torch.eye(size)
    added = torch.tensor([0.5, 0.25])
    found, failed = cholesky_solve_reference(systems, rhs, added)
    expected = torch.linalg.solve(systems[0].double() + 0.5 * torch.eye(size).double(), rhs[0].double())
    torch.testing.assert_close(found[0], expected)
    assert failed.tolist() == [False, True] and found[1].isnan().all()


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((2, MAX_SIZE), True),
        ((2, MAX_SIZE + 1), False),
        ((1, LARGE_ALONE), True),
        ((1, LARGE_ALONE + 1), False),
        ((3, 0), False),
    ],
)
def test_kernels_take_batches_and_small_systems(
    shape: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(biases, "usable", lambda *_: True)
    systems = torch.empty(1, 1, 1).expand(shape[0], shape[1], shape[1])
    assert blocks_usable(systems, "cholesky") == taken


def test_without_a_gpu_torch_factors() -> None:
    systems = torch.eye(3).repeat(2, 1, 1)
    assert not blocks_usable(systems, "cholesky") and isinstance(solving_factors(systems), torch.Tensor)
    with pytest.raises(NumericalError):
        biases.cholesky_factor(torch.full((3, 3), torch.nan))
