"""Claims about the solver: it equals scipy on random and ill-conditioned problems, and survives degenerate ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from compactor.config import CompactSettings
from compactor.errors import SettingsError
from compactor.solve.biases import solve_box_nnls
from compactor.solve.budget import allocate, key_bytes, total_from_bytes
from compactor.solve.fit import HeadFit, HeadKeys, Rows, choose_biases, fit_head, full_attention, kept_attention
from compactor.solve.gram import GramSum, add_symmetric_product
from compactor.solve.select import select_keys
from compactor.solve.values import RidgeStats, fit_values, solve_ridge


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


def test_values_stay_when_no_ridge_helps_on_held_out_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, residual = torch.rand(40, 30, generator=generator).double(), torch.randn(40, 4, generator=generator).double()
    train = RidgeStats(rows.T @ rows, rows.T @ residual, float(residual.square().sum()))
    other = RidgeStats(train.gram, -train.rhs, train.energy)  # what helps the one hurts the other
    fit = fit_values(train, other, None)
    assert fit.ridge == float("inf")
    assert not fit.change.any()


def test_gram_blocks_equal_one_product() -> None:
    rows = torch.randn(700, 531, generator=torch.Generator().manual_seed(0))
    targets = torch.randn(700, 3, generator=torch.Generator().manual_seed(1))
    sums = GramSum(531, 3, torch.device("cpu"))
    for part, target in zip(rows.split(123), targets.split(123), strict=True):
        sums.add(part, target)
    torch.testing.assert_close(sums.gram, rows.double().T @ rows.double(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(sums.rhs, rows.double().T @ targets.double(), atol=1e-3, rtol=1e-5)
    total = torch.zeros(531, 531)
    add_symmetric_product(total, rows)
    assert torch.equal(total, total.T)


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
    rows = torch.randn(90, 531, generator=torch.Generator().manual_seed(0))
    rows[:, :empty_columns] = 0.0
    targets = torch.randn(90, 3, generator=torch.Generator().manual_seed(1))
    apple, plain = (GramSum(531, 3, torch.device("cpu")) for _ in range(2))
    apple.add(rows.as_subclass(AppleTensor), targets.as_subclass(AppleTensor))
    plain.add(rows, targets)
    assert type(apple.gram) is torch.Tensor
    assert torch.equal(apple.gram, plain.gram)
    assert torch.equal(apple.rhs, plain.rhs)
    assert apple.energy == pytest.approx(plain.energy, rel=1e-5)


def test_budget_keeps_the_largest_gains_and_the_floor() -> None:
    gains = torch.tensor([[[9.0, 8, 7, 6], [5.0, 1, 1, 1]], [[0.0, 0, 0, 0], [8.5, 8.4, 0, 0]]])
    counts = allocate(gains, 8)
    assert counts.tolist() == [[4, 1], [1, 2]]
    assert allocate(gains, 16).tolist() == [[4, 4], [4, 4]]
    with pytest.raises(SettingsError, match="at least one key a head"):
        allocate(gains, 3)


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


def head(num_document: int, prefix: int = 2, head_dim: int = 8, seed: int = 0) -> HeadKeys:
    """Random keys and values of one head."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(prefix + num_document, head_dim, generator=generator)
    values = torch.randn(prefix + num_document, head_dim, generator=generator)
    return HeadKeys(keys[:prefix], values[:prefix], keys[prefix:], values[prefix:], keys[prefix:])


def block(keys: HeadKeys, q_len: int = 96, group: int = 2, local: int = 4, seed: int = 1) -> Rows:
    """Random queries that see the whole document and a causal segment whose first ``local`` tokens they follow."""
    generator = torch.Generator().manual_seed(seed)
    head_dim = keys.prefix_keys.shape[1]
    return Rows(
        torch.randn(group, q_len, head_dim, generator=generator) * 0.8, torch.ones(group, 1), len(keys.document_keys),
        torch.randn(local + q_len, head_dim, generator=generator),
        torch.randn(local + q_len, head_dim, generator=generator), torch.arange(q_len) % 5 == 4,
    )  # fmt: skip


def compacted_output(keys: HeadKeys, fit: HeadFit, rows: Rows) -> torch.Tensor:
    """Attention over prefix, fitted and local keys in float64, written out row by row: the oracle."""
    group, q_len, head_dim = rows.queries.shape
    num_local = rows.local_keys.shape[0]
    out = torch.zeros(group, q_len, head_dim, dtype=torch.float64)
    for g in range(group):
        for i in range(q_len):
            seen = num_local - q_len + i + 1
            all_keys = torch.cat([keys.prefix_keys, keys.stored_keys[fit.kept], rows.local_keys[:seen]]).double()
            all_values = torch.cat([keys.prefix_values, fit.values, rows.local_values[:seen]]).double()
            scores = all_keys @ rows.queries[g, i].double()
            scores[keys.prefix_keys.shape[0] :][: len(fit.kept)] += fit.biases.double()
            out[g, i] = scores.softmax(0) @ all_values
    return out


def test_the_fit_reports_the_true_error_and_beats_unfitted_keys() -> None:
    keys = head(60)
    rows = block(keys)
    _, mass, out = full_attention(keys, rows)
    order = torch.arange(60)
    fit = fit_head(keys, [rows], order, 20, CompactSettings())
    measured = float((compacted_output(keys, fit, rows) - out.double()).square().sum())
    assert measured == pytest.approx(fit.squared_error, rel=1e-4)
    plain = HeadFit(fit.kept, torch.zeros(20), keys.document_values[fit.kept], 0.0, True, 0.0, 0.0, 1.0)
    assert measured < 0.5 * float((compacted_output(keys, plain, rows) - out.double()).square().sum())
    assert float(mass.mean()) > 0.5


def test_biases_recover_the_mass_of_physical_duplicates() -> None:
    """Every document key stands three times; keeping one of each with bias log 3 loses nothing."""
    base = head(15)
    keys = HeadKeys(
        base.prefix_keys, base.prefix_values, base.document_keys.repeat(3, 1), base.document_values.repeat(3, 1),
        base.stored_keys.repeat(3, 1),
    )  # fmt: skip
    fit = fit_head(keys, [block(keys)], torch.arange(45), 15, CompactSettings())
    torch.testing.assert_close(
        fit.biases, torch.full((15,), float(np.log(3.0))), atol=2e-2, rtol=0
    )  # the prior pulls a little towards 0
    assert fit.squared_error < 1e-4 * fit.energy


def test_a_head_nobody_looks_at_keeps_its_keys_unchanged() -> None:
    keys = head(30)
    rows = block(keys)
    away = Rows(rows.queries, rows.root_weights * 0.0, 30, rows.local_keys, rows.local_values, rows.held_out)
    fit = fit_head(keys, [away], torch.arange(30), 5, CompactSettings())
    assert not fit.biases.any()
    assert torch.equal(fit.values, keys.document_values[fit.kept])


def test_one_kept_key_and_fewer_rows_than_keys_work() -> None:
    keys = head(40)
    for count, rows in ((1, block(keys)), (30, block(keys, q_len=6, group=1))):
        fit = fit_head(keys, [rows], torch.arange(40), count, CompactSettings())
        assert len(fit.kept) == count
        assert torch.isfinite(fit.values).all()
        assert torch.isfinite(fit.biases).all()


def test_keys_at_the_lower_bound_give_their_slot_to_the_next() -> None:
    generator = torch.Generator().manual_seed(0)
    useful = torch.rand(300, 6, generator=generator).double()
    useless = torch.rand(300, 3, generator=generator).double()
    useful[:100], useless[100:] = 0.0, 0.0  # the useless are seen only where the document has no mass
    columns = torch.cat([useless, useful], dim=1)  # the ranking wrongly puts the useless first
    target = columns[:, 3:] @ torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    chosen, solution, converged = choose_biases(columns.T @ columns, columns.T @ target, 6, CompactSettings())
    assert converged
    assert sorted(chosen.tolist()) == [3, 4, 5, 6, 7, 8]
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)[chosen - 3]
    torch.testing.assert_close(solution, expected, atol=0.05, rtol=0)


def test_context_rows_see_earlier_spans_as_document_and_their_own_as_local() -> None:
    keys = head(12)
    queries = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
    held_out = torch.zeros(5, dtype=torch.bool)
    rows = Rows(queries, torch.ones(1, 1), 7, keys.document_keys[7:12], keys.document_values[7:12], held_out)
    lse, mass, out = full_attention(keys, rows)
    for i in range(5):
        seen = torch.cat([keys.prefix_keys, keys.document_keys[: 8 + i]]).double()
        scores = seen @ queries[0, i].double()
        assert float(lse[0, i]) == pytest.approx(float(scores.logsumexp(0)), rel=1e-5)
        assert float(mass[0, i]) == pytest.approx(float(scores.softmax(0)[2:9].sum()), rel=1e-4)
        expected = scores.softmax(0) @ torch.cat([keys.prefix_values, keys.document_values[: 8 + i]]).double()
        torch.testing.assert_close(out[0, i].double(), expected, atol=1e-5, rtol=1e-4)
    shares = kept_attention(keys.stored_keys, torch.arange(12), rows, lse)
    assert not shares[..., 7:].any()
    torch.testing.assert_close(shares.sum(-1), mass, atol=1e-5, rtol=1e-4)
