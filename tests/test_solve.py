"""Claims about the solver: it equals scipy on random and ill-conditioned problems, and survives degenerate ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from test_half_path import product
from torch.utils._python_dispatch import TorchDispatchMode

from compactor import attention, prefill
from compactor.config import CompactSettings
from compactor.errors import NumericalError, SettingsError
from compactor.packed import PackedLayer, pack
from compactor.prefill import context_spans, dense_layer
from compactor.solve import biases as biases_module
from compactor.solve import fit as fit_module
from compactor.solve import gram as gram_module
from compactor.solve.biases import cholesky_factor, cholesky_factors, solve_box_nnls, solve_box_nnls_batched
from compactor.solve.budget import FLOOR_FRACTION, allocate, key_bytes, total_from_bytes
from compactor.solve.fit import (
    FitInputs,
    FitLayer,
    HeadFit,
    KeptKeys,
    LayerKeys,
    context_rows,
    fit_head_values,
    fit_heads,
    fitted_outputs,
    head_batches,
    rows_apart,
    solve_biases,
)
from compactor.solve.gram import GramSum, add_symmetric_product
from compactor.solve.rows import Rows, fitted_attention, held_out_rows, kept_attention
from compactor.solve.select import select_keys
from compactor.solve.values import RIDGES, RidgeStats, fit_values, solve_in_float32, solve_ridge
from compactor.types import LayerCache, Segment


def problem(num_rows: int, num_keys: int, condition: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a non-negative matrix whose columns spread over ``condition``, and a target it can nearly reach."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(num_rows, num_keys, generator=generator, dtype=torch.float64)
    matrix *= torch.logspace(0, -np.log10(condition), num_keys, dtype=torch.float64)
    truth = 3 * torch.rand(num_keys, generator=generator, dtype=torch.float64)
    noise = 0.05 * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return matrix, matrix @ truth + noise


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_box_nnls_equals_scipy_lsq_linear(condition: float, seed: int) -> None:
    matrix, target = problem(200, 40, condition, seed)
    ours = solve_box_nnls(matrix.T @ matrix, matrix.T @ target, lower=0.05, upper=2.0)
    scipys = scipy.optimize.lsq_linear(matrix.numpy(), target.numpy(), bounds=(0.05, 2.0), method="bvls", tol=1e-14)
    assert ours.converged
    objective = float((matrix @ ours.solution - target).square().sum())
    assert objective <= 2 * scipys.cost * (1 + 1e-9)
    if condition == 1.0:
        np.testing.assert_allclose(ours.solution.numpy(), scipys.x, atol=1e-6)
    else:
        np.testing.assert_allclose(matrix.numpy() @ ours.solution.numpy(), matrix.numpy() @ scipys.x, atol=1e-5)


def test_without_an_upper_bound_it_equals_scipy_nnls() -> None:
    matrix, target = problem(120, 30, 10.0, 7)
    target -= 0.8 * matrix[:, :10].sum(-1) * 3  # push some coefficients to zero
    ours = solve_box_nnls(matrix.T @ matrix, matrix.T @ target, lower=0.0, upper=1e9)
    scipys, _ = scipy.optimize.nnls(matrix.numpy(), target.numpy())
    assert (scipys == 0).any()
    np.testing.assert_allclose(ours.solution.numpy(), scipys, atol=1e-7)


def test_duplicate_columns_still_reach_the_best_objective() -> None:
    matrix, target = problem(100, 10, 1.0, 3)
    matrix = torch.cat([matrix, matrix], dim=1)
    ours = solve_box_nnls(matrix.T @ matrix, matrix.T @ target, lower=0.0, upper=5.0)
    scipys = scipy.optimize.lsq_linear(matrix.numpy(), target.numpy(), bounds=(0.0, 5.0), tol=1e-14)
    assert float((matrix @ ours.solution - target).square().sum()) <= 2 * scipys.cost * (1 + 1e-8)


def test_unseen_keys_keep_bias_zero() -> None:
    fit = solve_box_nnls(torch.zeros(4, 4), torch.zeros(4), lower=0.05, upper=100.0)
    assert fit.converged
    assert torch.equal(fit.solution, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("directions", [torch.float32, torch.float64])
def test_problems_of_unlike_size_solved_together_equal_scipy(
    directions: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller ones are padded with zero columns; a GPU's directions are float32, its gradients are not."""
    monkeypatch.setattr(biases_module, "direction_type", lambda device: directions)
    sizes = [(40, 1.0), (25, 1e3), (1, 1.0), (33, 1e6), (40, 10.0)]
    gram, rhs = torch.zeros(5, 40, 40, dtype=torch.float64), torch.zeros(5, 40, dtype=torch.float64)
    problems = [problem(200, num_keys, condition, seed) for seed, (num_keys, condition) in enumerate(sizes)]
    for head, (matrix, target) in enumerate(problems):
        n = matrix.shape[1]
        gram[head, :n, :n], rhs[head, :n] = matrix.T @ matrix, matrix.T @ target
    fits = solve_box_nnls_batched(gram, rhs, lower=0.05, upper=2.0)
    assert fits.converged.tolist() == [True] * 5
    assert (fits.iterations > 1).any() and len(fits.iterations.unique()) > 1
    for head, (matrix, target) in enumerate(problems):
        n = matrix.shape[1]
        scipys = scipy.optimize.lsq_linear(matrix.numpy(), target.numpy(), bounds=(0.05, 2.0), method="bvls", tol=1e-14)
        objective = float((matrix @ fits.solution[head, :n] - target).square().sum())
        assert objective <= 2 * scipys.cost * (1 + 1e-9)
        alone = solve_box_nnls(gram[head, :n, :n], rhs[head, :n], lower=0.05, upper=2.0)
        if directions == torch.float64:
            assert alone.iterations == int(fits.iterations[head])
        torch.testing.assert_close(matrix @ fits.solution[head, :n], matrix @ alone.solution, rtol=0, atol=1e-6)
        assert (fits.solution[head, n:] == 1.0).all()


def test_a_batch_settles_while_one_of_its_problems_has_no_solution() -> None:
    matrix, target = problem(100, 10, 1.0, 3)
    gram, rhs = (matrix.T @ matrix).repeat(3, 1, 1), (matrix.T @ target).repeat(3, 1)
    gram[1] = 1.0  # of rank one
    rhs[2, 4] = torch.inf
    fits = solve_box_nnls_batched(gram, rhs, lower=0.05, upper=2.0)
    assert fits.converged.tolist() == [True, True, False]
    alone = solve_box_nnls(gram[0], rhs[0], lower=0.05, upper=2.0)
    torch.testing.assert_close(fits.solution[0], alone.solution, rtol=0, atol=1e-9)
    assert torch.isfinite(fits.solution[:2]).all()


def test_a_matrix_that_is_no_gram_matrix_is_an_error_alone_and_not_a_number_in_a_batch() -> None:
    indefinite = torch.full((10, 10), -20.0, dtype=torch.float64).fill_diagonal_(1.0)
    with pytest.raises(NumericalError, match=r"^The equations of 10 keys cannot be solved; take --dtype float32"):
        solve_box_nnls(indefinite, torch.ones(10), lower=0.05, upper=2.0)
    gram = torch.stack([torch.eye(10, dtype=torch.float64), indefinite])
    bounds = torch.full((2, 10), 0.05).double(), torch.full((2, 10), 2.0).double()
    search, x = biases_module._JointSearch(gram, *bounds), torch.ones(2, 10, dtype=torch.float64)
    for _ in range(20):  # from the same point, with more jitter each time
        found, moved = search.step(torch.ones_like(x), x, torch.ones_like(x, dtype=torch.bool))
    assert moved.all()
    torch.testing.assert_close(found[0], torch.full((10,), 0.05).double())
    assert found[1].isnan().all()


class Waits(TorchDispatchMode):
    """Counts how often the host asks for a number of the device, or for a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def test_a_batch_makes_the_host_wait_once_in_some_iterations() -> None:
    problems = [problem(200, 40, 1e3, seed) for seed in range(3)]
    gram = torch.stack([matrix.T @ matrix for matrix, _ in problems])
    rhs = torch.stack([matrix.T @ target for matrix, target in problems])
    with Waits() as waits:
        fits = solve_box_nnls_batched(gram, rhs, lower=0.05, upper=2.0)
    most = int(fits.iterations.max())
    assert most > biases_module.CHECK_EVERY
    assert waits.count <= 1 + most // biases_module.CHECK_EVERY


def test_factors_of_a_batch_have_the_jitter_that_each_needs() -> None:
    matrices = torch.stack([torch.eye(5), torch.ones(5, 5), torch.eye(5) - 20.0, 1e-8 * torch.eye(5)]).double()
    factors = cholesky_factors(matrices)
    for head in (0, 1, 3):
        torch.testing.assert_close(factors[head], cholesky_factor(matrices[head]), rtol=0, atol=0)
    assert factors[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_matrix_gets_a_factor_and_one_that_has_none_is_an_error(dtype: torch.dtype) -> None:
    ones = torch.ones(5, 5, dtype=dtype)
    factor = cholesky_factor(ones)
    torch.testing.assert_close(factor @ factor.T, ones, atol=1e-5, rtol=0.0)
    for hopeless in (ones * torch.nan, torch.eye(5, dtype=dtype) - 20 * ones, torch.full_like(ones, torch.inf)):
        with pytest.raises(NumericalError, match=r"^The equations of 5 keys cannot be solved; take --dtype float32"):
            cholesky_factor(hopeless)


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_ridge_equals_scipy_least_squares(condition: float) -> None:
    matrix, _ = problem(150, 25, condition, 5)
    residual = torch.randn(150, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stats = RidgeStats(matrix.T @ matrix, matrix.T @ residual, float(residual.square().sum()))
    ridge = 1e-3
    strength = float(ridge * stats.gram.diagonal().mean())
    stacked = np.vstack([matrix.numpy(), np.sqrt(strength) * np.eye(25)])
    expected = scipy.linalg.lstsq(stacked, np.vstack([residual.numpy(), np.zeros((25, 8))]))[0]
    np.testing.assert_allclose(solve_ridge(stats, ridge).numpy(), expected, rtol=1e-6, atol=1e-8)
    error = float((matrix @ torch.as_tensor(expected) - residual).square().sum())
    assert stats.error(torch.as_tensor(expected)) == pytest.approx(error, rel=1e-9)


def sums_of(rows: torch.Tensor, residual: torch.Tensor) -> GramSum:
    """Return the float64 sums of rows (num_heads, n, num_keys) and residuals (num_heads, n, head_dim)."""
    sums = GramSum(len(rows), rows.shape[-1], residual.shape[-1], torch.device("cpu"))
    sums.gram, sums.rhs, sums.energy = rows.mT @ rows, rows.mT @ residual, residual.square().sum((1, 2))
    return sums


def test_values_stay_when_no_ridge_helps_on_held_out_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(1, 40, 30, generator=generator).double()
    residual = torch.randn(1, 40, 4, generator=generator).double()
    train, other = sums_of(rows, residual), sums_of(rows, -residual)  # what helps the one hurts the other
    fit = fit_values(train, other, torch.tensor([30]), None)
    assert fit.ridge.tolist() == [float("inf")]
    assert not fit.change.any()
    assert torch.equal(fit.error_after, train.energy + other.energy)


def test_each_head_of_a_batch_chooses_its_ridge_and_its_values_as_if_it_were_alone() -> None:
    """Heads of 20, 30 and 12 keys; the held-out rows of the first contradict the others, the last are noisy."""
    generator = torch.Generator().manual_seed(3)
    counts = [20, 30, 12]
    rows = torch.rand(3, 80, 30, generator=generator).double() * torch.tensor([1.0, 1e-6, 1e3]).view(-1, 1, 1)
    for head, count in enumerate(counts):
        rows[head, :, count:] = 0.0
    truth = torch.randn(3, 30, 4, generator=generator).double() / rows.amax((1, 2)).view(-1, 1, 1)
    noise = torch.tensor([0.0, 0.02, 2.0]).view(-1, 1, 1) * torch.randn(3, 80, 4, generator=generator)
    residual = rows @ truth + noise
    parts = (rows[:, :50], residual[:, :50]), (rows[:, 50:], residual[:, 50:])
    train, held_out = (sums_of(*part) for part in parts)
    held_out.rhs[0] *= -1.0
    together = fit_values(train, held_out, torch.tensor(counts), None)
    assert len(set(together.ridge.tolist())) == 3 and together.ridge[0] == torch.inf
    for head, count in enumerate(counts):
        own = [GramSum(1, count, 4, torch.device("cpu")) for _ in range(2)]
        for sums, whole in zip(own, (train, held_out), strict=True):
            sums.gram, sums.rhs = whole.gram[head : head + 1, :count, :count], whole.rhs[head : head + 1, :count]
            sums.energy = whole.energy[head : head + 1]
        alone = fit_values(*own, torch.tensor([count]), None)
        assert alone.ridge.tolist() == [together.ridge[head]]
        torch.testing.assert_close(together.change[head, :count], alone.change[0], rtol=1e-6, atol=0)
        assert not together.change[head, count:].any()
        for name in ("error_before", "error_after"):
            assert float(getattr(together, name)[head]) == pytest.approx(float(getattr(alone, name)), rel=1e-6)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_ridge_systems_factored_in_float32_lose_almost_nothing(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(2, 90, 25, generator=generator).double() * size
    residual = torch.randn(2, 90, 3, generator=generator).double()
    sums = sums_of(rows, residual)
    mean = sums.gram.diagonal(dim1=1, dim2=2).mean(-1)
    ridges = torch.tensor([RIDGES[0], RIDGES[2]]).double()
    found = solve_in_float32(sums.gram, sums.rhs, mean, ridges)
    for head in range(2):
        exact = solve_ridge(RidgeStats(sums.gram[head], sums.rhs[head], 0.0), float(ridges[head]))
        torch.testing.assert_close(found[head], exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("num_heads", [1, 2])
def test_gram_blocks_equal_one_product(num_heads: int) -> None:
    rows = torch.randn(num_heads, 700, 531, generator=torch.Generator().manual_seed(0))
    targets = torch.randn(num_heads, 700, 3, generator=torch.Generator().manual_seed(1))
    sums = GramSum(num_heads, 531, 3, torch.device("cpu"))
    for part, target in zip(rows.split(123, dim=1), targets.split(123, dim=1), strict=True):
        sums.add(part, target)
    torch.testing.assert_close(sums.gram, rows.double().mT @ rows.double(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(sums.rhs, rows.double().mT @ targets.double(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(sums.energy, targets.double().square().sum((1, 2)), atol=0, rtol=1e-6)
    total = torch.zeros(num_heads, 531, 531)
    add_symmetric_product(total, rows)
    assert torch.equal(total, total.mT)


class AppleTensor(torch.Tensor):
    """Stands for a tensor on an Apple GPU, which has no float64: not even on the way to the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        given = [one.dtype if isinstance(one, torch.Tensor) else one for one in args[1:]]
        if func is torch.Tensor.double or (func is torch.Tensor.to and torch.float64 in given):
            raise TypeError("MPS has no float64")
        if func is torch.Tensor.to and torch.device("mps") in given:
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.to and torch.device("cpu") in given:
            with torch._C.DisableTorchFunctionSubclass():
                return result.as_subclass(torch.Tensor)
        return result


@pytest.mark.parametrize("empty_columns", [0, 300])
def test_gram_sums_of_rows_on_an_apple_gpu_are_made_on_the_host(empty_columns: int) -> None:
    rows = torch.randn(1, 90, 531, generator=torch.Generator().manual_seed(0))
    rows[..., :empty_columns] = 0.0
    targets = torch.randn(1, 90, 3, generator=torch.Generator().manual_seed(1))
    apple, plain = (GramSum(1, 531, 3, torch.device("cpu")) for _ in range(2))
    apple.add(rows.as_subclass(AppleTensor), targets.as_subclass(AppleTensor))
    plain.add(rows, targets)
    assert type(apple.gram) is torch.Tensor
    assert torch.equal(apple.gram, plain.gram)
    assert torch.equal(apple.rhs, plain.rhs)
    torch.testing.assert_close(apple.energy, plain.energy, rtol=1e-5, atol=0)


def test_budget_keeps_the_largest_gains_and_the_floor() -> None:
    gains = torch.tensor([[[9.0, 8, 7, 6], [5.0, 1, 1, 1]], [[0.0, 0, 0, 0], [8.5, 8.4, 0, 0]]])
    counts = allocate(gains, 8)
    assert counts.tolist() == [[4, 1], [1, 2]]
    assert allocate(gains, 16).tolist() == [[4, 4], [4, 4]]
    with pytest.raises(SettingsError, match="at least one key a head"):
        allocate(gains, 3)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_a_stable_ranking_of_what_lies_above_the_floor(seed: int) -> None:
    drawn = torch.randint(0, 6, (3, 2, 17), generator=torch.Generator().manual_seed(seed)).float()
    gains = drawn.sort(-1, descending=True).values
    for total in (6, 7, 30, 60, 101, 102):
        floor = max(1, int(FLOOR_FRACTION * total / 6))
        ranked = gains[..., floor:].flatten().sort(descending=True, stable=True).indices[: total - 6 * floor]
        expected = torch.bincount(ranked // (17 - floor), minlength=6) + floor
        assert allocate(gains, total).flatten().tolist() == expected.tolist()


def test_selection_orders_by_score_and_ties_by_position() -> None:
    selection = select_keys(torch.tensor([[[1.0, 3.0, 3.0, 2.0]]]))
    assert selection.order.tolist() == [[[1, 2, 3, 0]]]
    assert selection.gains.tolist() == [[[3.0, 3.0, 2.0, 1.0]]]


def test_max_bytes_buys_what_it_says_and_never_more() -> None:
    per_key = key_bytes(64, 2)
    assert per_key == 2 * 64 * 2 + 8
    shape = {"fixed_bytes": 5000, "num_layers": 3, "num_kv_heads": 2, "num_document": 50, "bytes_per_key": per_key}
    assert total_from_bytes(5000 + 100 * per_key + 17, **shape) == 100
    assert total_from_bytes(10**9, **shape) == 300
    with pytest.raises(SettingsError, match=f"{5000 + 6 * per_key:,}"):
        total_from_bytes(5000 + 5 * per_key, **shape)


# ---------------------------------------------------------------- one head, against float64 oracles


@dataclass(frozen=True)
class Case:
    """Random keys and values of one head, and queries that see all of the document and a causal segment."""

    prefix_keys: torch.Tensor
    prefix_values: torch.Tensor
    document_keys: torch.Tensor
    document_values: torch.Tensor
    local_keys: torch.Tensor
    local_values: torch.Tensor
    queries: torch.Tensor  # (group, q_len, head_dim); their first row follows len(local_keys) - q_len tokens

    @property
    def keys(self) -> LayerKeys:
        return LayerKeys(self.document_keys[None], self.document_values[None], torch.float32)

    def attend(
        self, keys: torch.Tensor, values: torch.Tensor, biases: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention over prefix, given and local keys in float64, written out row by row: the oracle.

        Returns lse, the logarithm of the share of prefix and local keys, their output among themselves, and the output.
        """
        group, q_len, head_dim = self.queries.shape
        prefix, num_given = len(self.prefix_keys), len(keys)
        lse, share = torch.zeros(2, group, q_len, dtype=torch.float64)
        near, out = torch.zeros(2, group, q_len, head_dim, dtype=torch.float64)
        for g in range(group):
            for i in range(q_len):
                seen = len(self.local_keys) - q_len + i + 1
                all_keys = torch.cat([self.prefix_keys, keys, self.local_keys[:seen]]).double()
                all_values = torch.cat([self.prefix_values, values, self.local_values[:seen]]).double()
                scores = all_keys @ self.queries[g, i].double()
                scores[prefix : prefix + num_given] += biases.double()
                probs = scores.softmax(0)
                lse[g, i], out[g, i] = scores.logsumexp(0), probs @ all_values
                scores[prefix : prefix + num_given] = -torch.inf
                share[g, i], near[g, i] = scores.logsumexp(0) - lse[g, i], scores.softmax(0) @ all_values
        return lse, share, near, out

    def rows(self, weight: float = 1.0) -> Rows:
        exact = self.attend(self.document_keys, self.document_values, torch.zeros(len(self.document_keys)))
        lse, share, near, out = (part.float()[None] for part in exact)
        held_out = torch.arange(4, self.queries.shape[1], 5)
        return Rows(self.queries[None], 1.0, torch.full_like(lse, weight), lse, share, near, out, held_out)

    def fit(self, rows: Rows, order: torch.Tensor, count: int, settings: CompactSettings | None = None) -> HeadFit:
        return fit_heads(self.keys, [rows], order[None], [count], settings or CompactSettings())[0]

    def error(self, fit: HeadFit) -> float:
        """True squared error of a fitted head on all rows."""
        made = self.attend(self.document_keys[fit.kept], fit.values, fit.biases)[-1]
        true = self.attend(self.document_keys, self.document_values, torch.zeros(len(self.document_keys)))[-1]
        return float((made - true).square().sum())


def case(num_document: int, q_len: int = 96, group: int = 2, local: int = 4, prefix: int = 2, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 8, generator=generator)

    return Case(
        some(prefix), some(prefix), some(num_document), some(num_document), some(local + q_len), some(local + q_len),
        some(group, q_len) * 0.8,
    )  # fmt: skip


def test_the_fit_reports_the_true_error_and_beats_unfitted_keys() -> None:
    one = case(60)
    rows = one.rows()
    fit = one.fit(rows, torch.arange(60), 20)
    measured = one.error(fit)
    assert measured == pytest.approx(fit.squared_error, rel=1e-4)
    assert float(rows.out.square().sum()) == pytest.approx(fit.energy, rel=1e-5)
    unfitted = replace(fit, values=one.document_values[fit.kept])
    assert one.error(unfitted) == pytest.approx(fit.unfitted_error, rel=1e-4)
    plain = replace(unfitted, biases=torch.zeros(20))
    assert measured < 0.5 * one.error(plain)
    assert float(rows.near_share.exp().mean()) < 0.5


def test_a_row_that_loses_all_it_looked_at_stays_finite() -> None:
    """One key has all the attention, by hundreds of nats, and is not kept."""
    one = case(40)
    one.document_keys[7] = 300.0 * one.queries[0].mean(0) / one.queries[0].mean(0).norm()
    fit = one.fit(one.rows(), torch.cat([torch.arange(8, 40), torch.arange(8)]), 10)
    assert 7 not in fit.kept.tolist()
    assert torch.isfinite(fit.values).all()
    assert 0 < fit.squared_error < float("inf")
    assert one.error(fit) == pytest.approx(fit.squared_error, rel=1e-3)


def test_row_weights_multiply_the_squared_error() -> None:
    one = case(40)
    fits = [one.fit(one.rows(w), torch.arange(40), 12) for w in (1.0, 3.0)]
    assert fits[1].squared_error == pytest.approx(9.0 * fits[0].squared_error, rel=1e-3)
    assert fits[1].energy == pytest.approx(9.0 * fits[0].energy, rel=1e-5)
    torch.testing.assert_close(fits[0].values, fits[1].values, atol=1e-3, rtol=1e-3)


def test_the_values_are_the_best_that_a_ridge_can_find() -> None:
    """The oracle writes the compacted attention out and solves the stacked least squares problem with scipy."""
    one, kept = case(30, q_len=40), torch.arange(0, 30, 3)
    rows, biases = one.rows(), torch.linspace(-1.0, 2.0, 10)
    none = torch.zeros(1)
    chosen = KeptKeys(
        [0], [10], torch.tensor([10]), kept[None], one.document_keys[kept][None], biases[None], none, None
    )
    made = fit_head_values(one.keys, [rows], chosen, 1e-3)
    columns = []
    for j in range(10):  # attention to kept key j: the output when its value is 1 and all others are 0
        unit = torch.zeros(10, 8)
        unit[j] = 1.0
        _, share, near, out = one.attend(one.document_keys[kept], unit, biases)
        columns.append((out - share.exp().unsqueeze(-1) * near)[..., 0].flatten())
    matrix = torch.stack(columns, dim=-1)
    output = one.attend(one.document_keys[kept], one.document_values[kept], biases)[-1]
    residual = (one.attend(one.document_keys, one.document_values, torch.zeros(30))[-1] - output).flatten(0, 1)
    ridge = (1e-3 * matrix.square().sum(0).mean()).sqrt()
    stacked = np.vstack([matrix.numpy(), float(ridge) * np.eye(10)])
    expected = scipy.linalg.lstsq(stacked, np.vstack([residual.numpy(), np.zeros((10, 8))]))[0]
    np.testing.assert_allclose(made.change[0].numpy(), expected, atol=2e-4)


def test_biases_recover_the_mass_of_physical_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document key stands three times; keeping one of each with bias log 3 loses nothing."""
    one = case(15)
    one = replace(one, document_keys=one.document_keys.repeat(3, 1), document_values=one.document_values.repeat(3, 1))
    fit = one.fit(one.rows(), torch.arange(45), 15)
    assert fit.squared_error < 1e-4 * fit.energy
    triple = torch.full((15,), float(np.log(3.0)))
    torch.testing.assert_close(fit.biases, triple, atol=5e-2, rtol=0)  # the prior pulls a little
    monkeypatch.setattr("compactor.solve.fit.BIAS_PRIOR", 1e-8)
    fit = one.fit(one.rows(), torch.arange(45), 15)
    torch.testing.assert_close(fit.biases, triple, atol=1e-3, rtol=0)


def test_a_head_nobody_looks_at_keeps_its_keys_unchanged() -> None:
    one = case(30)
    fit = one.fit(one.rows(0.0), torch.arange(30), 5)
    assert not fit.biases.any()
    assert torch.equal(fit.values, one.document_values[fit.kept])


def test_one_kept_key_and_fewer_rows_than_keys_work() -> None:
    for count, one in ((1, case(40)), (30, case(40, q_len=6, group=1))):
        fit = one.fit(one.rows(), torch.arange(40), count)
        assert len(fit.kept) == count
        assert torch.isfinite(fit.values).all()
        assert torch.isfinite(fit.biases).all()


def test_every_key_kept_is_every_key_unchanged() -> None:
    one = case(20)
    fit = one.fit(one.rows(), torch.arange(20).flip(0), 20)
    assert fit.kept.tolist() == list(range(20))
    assert not fit.biases.any() and torch.equal(fit.values, one.document_values)
    assert fit.squared_error == 0.0 == fit.unfitted_error


def test_rows_cut_into_blocks_give_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(40)
    whole = one.fit(one.rows(), torch.arange(40), 10)
    monkeypatch.setattr("compactor.solve.rows.CPU_GRAM_ROWS", 7)
    cut = one.fit(one.rows(), torch.arange(40), 10)
    assert torch.equal(whole.kept, cut.kept)
    torch.testing.assert_close(whole.biases, cut.biases, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(whole.values, cut.values, atol=1e-2, rtol=1e-2)
    assert cut.squared_error == pytest.approx(whole.squared_error, rel=1e-3)


def test_curves_keep_the_gram_matrix_of_the_kept_keys_in_their_order() -> None:
    one = case(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    rows = one.rows(2.0)
    kept_lse = rows.lse.double().flatten().unsqueeze(-1)
    for count in (12, 40):
        fit = one.fit(rows, order, count, CompactSettings(keep_curves=True))
        assert fit.gram is not None
        keys = one.document_keys[fit.kept].double()
        shares = (one.queries.flatten(0, 1).double() @ keys.T - kept_lse).exp()
        torch.testing.assert_close(fit.gram, 4.0 * shares.T @ shares, atol=1e-4, rtol=1e-3)
    assert one.fit(rows, order, 12).gram is None


def test_biases_are_those_of_scipys_box_beside_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keys are useless, seen only where the document has no mass: they end at the lower bound."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(2, 300, 8, generator=generator).double()
    columns[0, :100, :6], columns[0, 100:, 6:] = 0.0, 0.0
    target = columns[..., :6] @ torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    gram, rhs = columns.mT @ columns, (columns.mT @ target.unsqueeze(-1)).squeeze(-1)
    present = torch.arange(8) < torch.tensor([[8], [5]])
    settings = CompactSettings()
    low, high = math.exp(settings.min_log_bias), math.exp(settings.max_log_bias)

    def expected(head: int, n: int) -> np.ndarray:
        prior = fit_module.BIAS_PRIOR**0.5 * np.diag(columns[head, :, :n].square().sum(0).sqrt().numpy())
        stacked = np.vstack([columns[head, :, :n].numpy(), prior]), np.concatenate([target[head], np.diag(prior)])
        return np.asarray(scipy.optimize.lsq_linear(*stacked, bounds=(low, high), method="bvls", tol=1e-14).x)

    found = solve_biases(gram, rhs, present, settings)
    np.testing.assert_allclose(found[0], expected(0, 8), atol=1e-2)
    np.testing.assert_allclose(found[1, :5], expected(1, 5), atol=1e-2)
    assert found[0, 6:].tolist() == pytest.approx([low, low])
    monkeypatch.setattr(fit_module, "BIAS_TOLERANCE", 1e-9)
    monkeypatch.setattr(fit_module, "BIAS_STEPS", 50)
    np.testing.assert_allclose(solve_biases(gram, rhs, present, settings)[0], expected(0, 8), atol=1e-6)
    np.testing.assert_allclose(solve_biases(gram[1:], rhs[1:], present[:1], settings)[0], expected(1, 8), atol=1e-6)


def test_a_head_without_a_fit_has_the_error_of_its_keys_as_they_are() -> None:
    cases = [case(40, seed=seed) for seed in range(2)]
    keys, rows = layer_of(cases)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    gains = torch.ones(2 * rows.lse.shape[1])
    layer = FitLayer.__new__(FitLayer)
    layer.inputs = FitInputs(0, order, [9, 40], gains, {}, None, torch.float32, CompactSettings(), fits=False)
    heads, _ = layer._unfitted(keys, [rows], order)
    one, kept = cases[0], order[0, :9].sort().values
    assert torch.equal(heads[0].kept, kept) and torch.equal(heads[0].values, keys.values[0, kept])
    out, true = (
        one.attend(one.document_keys[own], one.document_values[own], torch.zeros(len(own)))[-1]
        for own in (kept, torch.arange(40))
    )
    weights = rows.root_weights[0].double().square()
    error, energy = (
        float((part.double().square().sum(-1).view(weights.shape) * weights).sum()) for part in (out - true, true)
    )
    assert heads[0].squared_error == pytest.approx(error, rel=1e-4) and not heads[0].biases.any()
    assert heads[0].energy == pytest.approx(energy)
    assert heads[1].squared_error == heads[1].energy == 0.0  # it keeps every key and takes no part


def test_every_other_row_with_twice_its_weight_is_looked_at_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = case(40)
    rows = one.rows(2.0)
    count = rows.lse.shape[1] * rows.lse.shape[2]
    assert rows_apart([rows], 1) == 1  # half of them would hold out none
    monkeypatch.setattr(fit_module, "HELD_OUT_SPAN", 1)
    assert rows_apart([rows], count // fit_module.EVERY_OTHER + 1) == 1 and rows.every(1) is rows
    assert rows_apart([rows], count // fit_module.EVERY_OTHER) == 2
    assert rows_apart([rows, rows], 1) == 1
    half = rows.every(2)
    assert torch.equal(half.queries, rows.queries[:, :, ::2]) and torch.equal(half.out, rows.out[:, :, ::2])
    torch.testing.assert_close(half.root_weights.square(), 2.0 * rows.root_weights[:, :, ::2].square())
    assert torch.equal(torch.cat([half.fitted, half.held_out]).sort().values, torch.arange(half.lse.shape[2]))


@pytest.mark.parametrize("count", [0, 31, 32, 128, 129, 160, 161, 290, 320, 1000])
def test_the_last_span_of_each_five_is_held_out_without_a_look_at_the_device(count: int) -> None:
    with Waits() as waits:
        held_out = held_out_rows(count, torch.device("cpu"))
        nothing = torch.zeros(1, 1, count)
        rows = Rows(nothing.unsqueeze(-1), 1.0, *[nothing] * 3, *[nothing.unsqueeze(-1)] * 2, held_out)
        fitted = rows.fitted
    assert not waits.count
    assert held_out.tolist() == [i for i in range(count) if i // 32 % 5 == 4]
    assert fitted.tolist() == [i for i in range(count) if i // 32 % 5 != 4]


@pytest.mark.parametrize("heads", [slice(1, 3), torch.tensor([2, 0])])
@pytest.mark.parametrize("chosen", [slice(2, 5), torch.tensor([7, 1, 4])])
def test_outputs_of_a_block_are_gathered_when_they_are_asked_for(
    heads: slice | torch.Tensor, chosen: slice | torch.Tensor
) -> None:
    _, rows = layer_of([case(40, q_len=9, seed=seed) for seed in range(3)])
    block = rows._block(heads, chosen)
    for name in ("queries", "root_weights", "lse", "near_share", "near", "out"):
        expected = getattr(rows, name)[heads][:, :, chosen].flatten(1, 2)
        assert torch.equal(getattr(block, name), expected), name
    assert "near" not in vars(block) and "out" not in vars(block)


# ---------------------------------------------------------------- some heads as one batch


def layer_of(cases: list[Case], stops: torch.Tensor | None = None) -> tuple[LayerKeys, Rows]:
    """Return keys and rows of heads side by side."""
    keys, values = (torch.stack([getattr(one, f"document_{name}") for one in cases]) for name in ("keys", "values"))
    rows = [one.rows(1.0 + 0.5 * i) for i, one in enumerate(cases)]
    names = ("queries", "root_weights", "lse", "near_share", "near", "out")
    joined = {name: torch.cat([getattr(part, name) for part in rows]) for name in names}
    return LayerKeys(keys, values, torch.float32), replace(rows[0], **joined, document_stop=stops)


def one_batch(lengths: dict[int, int], _num_rows: int, _device: torch.device) -> list[list[int]]:
    return [sorted(lengths)]


@pytest.mark.parametrize("kind", ["float32", "half", "later keys hidden"])
def test_heads_fitted_together_are_those_fitted_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head keeps all of its keys; where it is between the others, their rows are gathered."""
    stops = torch.arange(96) % 30 + 12 if kind == "later keys hidden" else None
    keys, rows = layer_of([case(40, seed=seed) for seed in range(4)], stops)
    if kind == "half":
        monkeypatch.setattr(attention, "is_fast", lambda query: query.dtype in (torch.float16, torch.bfloat16))
        for module in (attention, gram_module):
            monkeypatch.setattr(module, "half_product", product)
        rows = replace(rows, queries=rows.queries.bfloat16())
        keys = replace(keys, storage_dtype=torch.bfloat16)
    monkeypatch.setattr("compactor.solve.gram.DROPPED_ENERGY", 0.0)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    for counts, settings in (
        ([9, 40, 25, 3], CompactSettings()),
        ([9, 25, 3, 40], CompactSettings(keep_curves=True, ridge=1e-3)),
    ):
        monkeypatch.setattr(fit_module, "head_batches", head_batches)
        alone = fit_heads(keys, [rows, rows], order, counts, settings)
        out = fitted_outputs(rows, alone, torch.float32)
        monkeypatch.setattr(fit_module, "head_batches", one_batch)
        together = fit_heads(keys, [rows, rows], order, counts, settings)
        torch.testing.assert_close(fitted_outputs(rows, alone, torch.float32), out, atol=1e-4, rtol=1e-4)
        for one, other, count in zip(alone, together, counts, strict=True):
            assert torch.equal(one.kept, other.kept) and len(one.kept) == count
            assert one.ridge == other.ridge
            torch.testing.assert_close(one.biases, other.biases, atol=2e-3, rtol=0)
            torch.testing.assert_close(one.values, other.values, atol=1e-2, rtol=1e-2)
            assert torch.equal(one.keys, other.keys)
            for name in ("squared_error", "unfitted_error", "energy"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3)
            if settings.keep_curves:
                assert one.gram is not None and other.gram is not None
                torch.testing.assert_close(one.gram, other.gram, rtol=1e-4, atol=1e-5)


def test_a_layer_of_heads_waits_for_the_device_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, rows = layer_of([case(40, seed=seed) for seed in range(3)])
    order = torch.arange(40).repeat(3, 1)
    monkeypatch.setattr(fit_module, "head_batches", one_batch)
    with Waits() as waits:
        fit_heads(keys, [rows], order, [9, 12, 7], CompactSettings())
    assert waits.count <= 3  # factors of the candidates and of the values, and the numbers of the fit


def test_a_head_without_a_finite_fit_is_named_also_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, rows = layer_of([case(40, seed=seed) for seed in range(3)])
    rows.out[1, 0, 7] = torch.nan
    named = PackedLayer(random_layer(43), pack([Segment((1,), "repeat")], 43), 43, lambda _n: None).naming
    for batches in (head_batches, one_batch):
        monkeypatch.setattr(fit_module, "head_batches", batches)
        with pytest.raises(NumericalError, match=r"^Layer -1, KV head 1: Numbers of the fit are not finite; take"):
            fit_heads(keys, [rows], torch.arange(40).repeat(3, 1), [9, 12, 7], CompactSettings(), named)


def test_batches_waste_at_most_half_and_hold_no_more_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, lengths = torch.device("cuda"), {0: 100, 1: 1000, 2: 90, 4: 950, 5: 20, 7: 640}
    monkeypatch.setattr(attention, "block_elements", lambda device: 1 << 28)
    assert head_batches(lengths, 1000, gpu) == [[0, 1, 2, 4, 5, 7]]  # little work in all
    many = head_batches(lengths, 100_000, gpu)
    assert many == [[0, 1, 4, 7], [2, 5]]
    for rows in (1000, 100_000, 10_000_000):
        batches = head_batches(lengths, rows, gpu)
        assert sorted(head for batch in batches for head in batch) == sorted(lengths)
        for batch in batches:
            padded = len(batch) * max(lengths[i] for i in batch) ** 2
            assert sum(lengths[i] ** 2 for i in batch) >= 0.5 * padded or padded * rows <= 1 << 36
    monkeypatch.setattr(attention, "block_elements", lambda device: 16 * 1000**2)
    assert head_batches(lengths, 1000, gpu) == [[1, 4], [0, 2, 5, 7]]
    assert head_batches(lengths, 1000, torch.device("cpu")) == [[1], [4], [7], [0], [2], [5]]
    assert head_batches({}, 1000, gpu) == []


# ---------------------------------------------------------------- one layer


def random_layer(num_tokens: int, seed: int = 0) -> LayerCache:
    keys, values = torch.randn(2, 2, num_tokens, 8, generator=torch.Generator().manual_seed(seed))
    return dense_layer(keys, values, first_position=0)


def inputs_of(num_document: int, counts: list[int], **fields: Any) -> FitInputs:
    """Two KV heads of two query heads each, three tokens of prefix."""
    generator = torch.Generator().manual_seed(5)
    order = torch.stack([torch.randperm(num_document, generator=generator) for _ in range(2)])
    gains, weights = torch.tensor([1.0, 0.5, 2.0, 1.0]), {"repeat": 1.0, "self-study": 0.25, "context": 0.5}
    whole: dict[str, Any] = {
        "prefix_length": 3, "order": order, "counts": counts, "head_gains": gains, "source_weights": weights,
        "context_queries": None, "storage_dtype": torch.float32, "settings": CompactSettings(), **fields,
    }  # fmt: skip
    return FitInputs(**whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fitted_layer_returns_attention_over_the_cache_it_assembles(dtype: torch.dtype) -> None:
    full = random_layer(3 + 40)
    for part in (full.keys, full.values):  # in the output the prefix is exact, so here it is one that the file can hold
        prefix = part.view(2, 43, 8)[:, :3]
        prefix.copy_(prefix.to(dtype))
    segments = [Segment(tuple(range(9)), "repeat"), Segment(tuple(range(30)), "self-study"), Segment((1,), "repeat")]
    packed, weights = pack(segments, 43), {"repeat": 1.0, "self-study": 0.25}
    layer = FitLayer(full, packed, 43, lambda _n: None, inputs_of(40, [13, 6], storage_dtype=dtype))
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(4, 40, 8, generator=generator)
    keys, values = torch.randn(2, 2, 40, 8, generator=generator)
    out = layer.attend_packed(queries, keys, values, 0.4)
    fitted = layer.fitted
    assert fitted is not None and fitted.head_lengths == [16, 9] and fitted.keys.dtype == dtype
    errors, energies = torch.zeros(2), torch.zeros(2)
    for query_head in range(4):
        head = query_head // 2
        own = slice(int(fitted.offsets[head]), int(fitted.offsets[head + 1]))
        whole = slice(43 * head, 43 * head + 43)
        for (first, last), source in zip(packed.bounds, packed.sources, strict=True):
            for row in range(first, last):
                answers = []
                for cache, span in ((fitted, own), (full, whole)):
                    all_keys = torch.cat([cache.keys[span].float(), keys[head, first : row + 1]]).double()
                    all_values = torch.cat([cache.values[span].float(), values[head, first : row + 1]]).double()
                    scores = 0.4 * all_keys @ queries[query_head, row].double()
                    scores[: span.stop - span.start] += cache.biases[span].double()
                    answers.append(scores.softmax(0) @ all_values)
                torch.testing.assert_close(out[query_head, row].double(), answers[0], atol=2e-5, rtol=1e-4)
                weight = weights[source] * [1.0, 0.5, 2.0, 1.0][query_head] ** 2
                errors[head] += weight * (answers[0] - answers[1]).square().sum()
                energies[head] += weight * answers[1].square().sum()
    if dtype == torch.float32:  # the reported error is that of values before they are rounded
        torch.testing.assert_close(torch.tensor([h.squared_error for h in layer.heads]), errors, atol=0, rtol=1e-3)
    torch.testing.assert_close(torch.tensor([h.energy for h in layer.heads]), energies, atol=0, rtol=1e-3)
    for head, fit in enumerate(layer.heads):
        own = slice(int(fitted.offsets[head]), int(fitted.offsets[head + 1]))
        assert fitted.positions[own].tolist() == [0, 1, 2, *(fit.kept + 3).tolist()]
        assert torch.equal(
            fitted.keys[own], full.keys[43 * head : 43 * head + 43][fitted.positions[own].long()].to(dtype)
        )


def test_context_rows_see_earlier_spans_as_document_and_their_own_as_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "CONTEXT_SPAN", 4)
    full = random_layer(3 + 14)
    queries = torch.randn(4, 14, 8, generator=torch.Generator().manual_seed(2))
    rows = context_rows(full, inputs_of(14, [5, 5]), queries, 0.4)
    keys, values = full.keys.view(2, 17, 8), full.values.view(2, 17, 8)
    assert rows.lse.shape == (2, 2, 10)  # the four rows of the first span have no document
    assert rows.document_stop is not None
    assert rows.document_stop.tolist() == [4] * 4 + [8] * 4 + [12] * 2
    assert [span for *_, span in context_spans(0, 14, 0)] == [4, 8, 12]
    for query_head in range(4):
        head, member = divmod(query_head, 2)
        for index, position in enumerate(range(4, 14)):
            past = position // 4 * 4
            scores = 0.4 * keys[head, : 3 + position + 1].double() @ queries[query_head, position].double()
            probs, own = scores.softmax(0), values[head, : 3 + position + 1].double()
            near = torch.cat([scores[:3], scores[3 + past :]])
            near_own = torch.cat([own[:3], own[3 + past :]])
            assert float(rows.lse[head, member, index]) == pytest.approx(float(scores.logsumexp(0)), rel=1e-5)
            share = float((near.logsumexp(0) - scores.logsumexp(0)).exp())
            assert float(rows.near_share[head, member, index].exp()) == pytest.approx(share, rel=1e-4)
            torch.testing.assert_close(rows.out[head, member, index].double(), probs @ own, atol=1e-5, rtol=1e-4)
            got = rows.near[head, member, index].double()
            torch.testing.assert_close(got, near.softmax(0) @ near_own, atol=1e-5, rtol=1e-4)
            weight = 0.5**0.5 * [1.0, 0.5, 2.0, 1.0][query_head]
            assert float(rows.root_weights[head, member, index]) == pytest.approx(weight)
    (block,) = rows.head(1).blocks(14)
    shares = kept_attention(block, keys[1, 3:], torch.arange(14))
    stops = rows.document_stop.repeat(2)
    assert not shares[0][torch.arange(14) >= stops.unsqueeze(-1)].any()
    torch.testing.assert_close(shares.sum(-1), 1.0 - block.near_share.exp(), atol=1e-5, rtol=1e-4)
    _, left = fitted_attention(block, keys[1, 3:], torch.zeros(14), torch.arange(14))
    torch.testing.assert_close(left, block.near_share.exp(), atol=1e-5, rtol=1e-4)


def test_a_document_of_one_span_has_no_context_rows() -> None:
    full = random_layer(3 + 14)
    rows = context_rows(full, inputs_of(14, [5, 5]), torch.randn(4, 14, 8), 0.4)
    assert rows.lse.shape == (2, 2, 0)
    keys = LayerKeys(full.keys[None, 3:17], full.values[None, 3:17], torch.float32)
    (fit,) = fit_heads(keys, [rows.head(0)], torch.arange(14)[None], [5], CompactSettings())
    assert not fit.biases.any() and torch.equal(fit.values, full.values[3:8])
