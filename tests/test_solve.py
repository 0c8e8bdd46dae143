"""Claims about the solver: it equals scipy on random and ill-conditioned problems, and survives degenerate ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from compactor import prefill
from compactor.config import CompactSettings
from compactor.errors import NumericalError, SettingsError
from compactor.packed import pack
from compactor.prefill import context_spans, dense_layer
from compactor.solve.biases import cholesky_factor, solve_box_nnls
from compactor.solve.budget import allocate, key_bytes, total_from_bytes
from compactor.solve.fit import (
    FitInputs,
    FitLayer,
    HeadFit,
    HeadKeys,
    Rows,
    choose_biases,
    context_rows,
    fit_head,
    fit_head_values,
    fitted_attention,
    kept_attention,
)
from compactor.solve.gram import GramSum, add_symmetric_product
from compactor.solve.select import select_keys
from compactor.solve.values import RidgeStats, fit_values, solve_ridge
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
    def parts(self) -> HeadKeys:
        return HeadKeys(self.document_values, self.document_keys)

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
        lse, share, near, out = (part.float() for part in exact)
        held_out = torch.arange(self.queries.shape[1]) % 5 == 4
        return Rows(self.queries, 1.0, torch.full_like(lse, weight), lse, share, near, out, held_out)

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
    fit = fit_head(one.parts, [rows], torch.arange(60), 20, CompactSettings())
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
    fit = fit_head(one.parts, [one.rows()], torch.cat([torch.arange(8, 40), torch.arange(8)]), 10, CompactSettings())
    assert 7 not in fit.kept.tolist()
    assert torch.isfinite(fit.values).all()
    assert 0 < fit.squared_error < float("inf")
    assert one.error(fit) == pytest.approx(fit.squared_error, rel=1e-3)


def test_row_weights_multiply_the_squared_error() -> None:
    one = case(40)
    fits = [fit_head(one.parts, [one.rows(w)], torch.arange(40), 12, CompactSettings()) for w in (1.0, 3.0)]
    assert fits[1].squared_error == pytest.approx(9.0 * fits[0].squared_error, rel=1e-3)
    assert fits[1].energy == pytest.approx(9.0 * fits[0].energy, rel=1e-5)
    torch.testing.assert_close(fits[0].values, fits[1].values, atol=1e-3, rtol=1e-3)


def test_the_values_are_the_best_that_a_ridge_can_find() -> None:
    """The oracle writes the compacted attention out and solves the stacked least squares problem with scipy."""
    one, kept = case(30, q_len=40), torch.arange(0, 30, 3)
    rows, biases = one.rows(), torch.linspace(-1.0, 2.0, 10)
    made = fit_head_values(one.parts, [rows], kept, biases, 1e-3)
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
    np.testing.assert_allclose(made.change.numpy(), expected, atol=2e-4)


def test_biases_recover_the_mass_of_physical_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document key stands three times; keeping one of each with bias log 3 loses nothing."""
    one = case(15)
    one = replace(one, document_keys=one.document_keys.repeat(3, 1), document_values=one.document_values.repeat(3, 1))
    fit = fit_head(one.parts, [one.rows()], torch.arange(45), 15, CompactSettings())
    assert fit.squared_error < 1e-4 * fit.energy
    triple = torch.full((15,), float(np.log(3.0)))
    torch.testing.assert_close(fit.biases, triple, atol=5e-2, rtol=0)  # the prior pulls a little
    monkeypatch.setattr("compactor.solve.fit.BIAS_PRIOR", 1e-8)
    fit = fit_head(one.parts, [one.rows()], torch.arange(45), 15, CompactSettings())
    torch.testing.assert_close(fit.biases, triple, atol=1e-3, rtol=0)


def test_a_head_nobody_looks_at_keeps_its_keys_unchanged() -> None:
    one = case(30)
    fit = fit_head(one.parts, [one.rows(0.0)], torch.arange(30), 5, CompactSettings())
    assert not fit.biases.any()
    assert torch.equal(fit.values, one.document_values[fit.kept])


def test_one_kept_key_and_fewer_rows_than_keys_work() -> None:
    for count, one in ((1, case(40)), (30, case(40, q_len=6, group=1))):
        fit = fit_head(one.parts, [one.rows()], torch.arange(40), count, CompactSettings())
        assert len(fit.kept) == count
        assert torch.isfinite(fit.values).all()
        assert torch.isfinite(fit.biases).all()


def test_every_key_kept_is_every_key_unchanged() -> None:
    one = case(20)
    fit = fit_head(one.parts, [one.rows()], torch.arange(20).flip(0), 20, CompactSettings())
    assert fit.kept.tolist() == list(range(20))
    assert not fit.biases.any() and torch.equal(fit.values, one.document_values)
    assert fit.squared_error == 0.0 == fit.unfitted_error


def test_rows_cut_into_blocks_give_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(40)
    whole = fit_head(one.parts, [one.rows()], torch.arange(40), 10, CompactSettings())
    monkeypatch.setattr("compactor.solve.fit.CPU_GRAM_ROWS", 7)
    cut = fit_head(one.parts, [one.rows()], torch.arange(40), 10, CompactSettings())
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
        fit = fit_head(one.parts, [rows], order, count, CompactSettings(keep_curves=True))
        assert fit.gram is not None
        keys = one.document_keys[fit.kept].double()
        shares = (one.queries.flatten(0, 1).double() @ keys.T - kept_lse).exp()
        torch.testing.assert_close(fit.gram, 4.0 * shares.T @ shares, atol=1e-4, rtol=1e-3)
    assert fit_head(one.parts, [rows], order, 12, CompactSettings()).gram is None


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
    fit = fit_head(HeadKeys(full.values[3:17], full.keys[3:17]), [rows.head(0)], torch.arange(14), 5, CompactSettings())
    assert not fit.biases.any() and torch.equal(fit.values, full.values[3:8])
