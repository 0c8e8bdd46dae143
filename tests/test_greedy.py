"""Claims about the greedy order: it equals brute-force orthogonal least squares, and one run serves every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compactor.solve import greedy
from compactor.solve.greedy import Picks, forward_ols, pool_violators


def problem(
    num_keys: int, num_targets: int, seed: int, num_rows: int = 60, alike: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns as attention makes them, non-negative, and targets as combinations of them; float64.

    With ``alike`` all keys share most of their attention.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(num_rows, num_keys, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)
    columns += alike * torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    return columns, torch.randn(num_keys, num_targets, generator=generator, dtype=torch.float64)


def batch(*columns: torch.Tensor) -> torch.Tensor:
    return torch.stack([one.T @ one for one in columns])


def left_over(columns: torch.Tensor, targets: torch.Tensor, chosen: list[int]) -> float:
    """Squared error of the targets after least squares on some columns, by LAPACK."""
    goal = (columns @ targets).numpy()
    if not chosen:
        return float((goal**2).sum())
    part = columns[:, chosen].numpy()
    return float(((goal - part @ np.linalg.lstsq(part, goal, rcond=None)[0]) ** 2).sum())


def brute_force(columns: torch.Tensor, targets: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """Orthogonal least squares by solving anew for every candidate of every step."""
    chosen: list[int] = []
    gains: list[float] = []
    before = left_over(columns, targets, [])
    for _ in range(count):
        errors = {
            j: left_over(columns, targets, [*chosen, j]) for j in range(columns.shape[1]) if j not in chosen
        }  # fmt: skip
        best = min(errors, key=lambda j: errors[j])
        chosen.append(best)
        gains.append(before - errors[best])
        before = errors[best]
    return chosen, gains


def assert_permutations(picks: Picks) -> None:
    num_keys = picks.order.shape[1]
    assert torch.equal(picks.order.sort(dim=1).values, torch.arange(num_keys).expand_as(picks.order))


# ------------------------------------------------------------------------------------------------ the greedy search


@pytest.mark.parametrize("alike", [0.0, 2.0])
@pytest.mark.parametrize("num_targets", [1, 5])
def test_picks_and_gains_equal_brute_force_orthogonal_least_squares(num_targets: int, alike: float) -> None:
    problems = [problem(18, num_targets, seed, alike=alike) for seed in range(3)]
    picks = forward_ols(batch(*(c for c, _ in problems)), torch.stack([t for _, t in problems]), 18)
    assert_permutations(picks)
    for index, (columns, targets) in enumerate(problems):
        order, gains = brute_force(columns, targets, 18)
        assert picks.order[index].tolist() == order
        np.testing.assert_allclose(picks.gains[index].numpy(), gains, rtol=1e-5, atol=1e-6 * sum(gains))
        assert float(picks.energy[index]) == pytest.approx(left_over(columns, targets, []), rel=1e-6)
        assert float(picks.gains[index].sum()) == pytest.approx(float(picks.energy[index]), rel=1e-5)


def test_gains_of_a_prefix_say_what_least_squares_on_it_leaves() -> None:
    columns, targets = problem(40, 3, 7)
    picks = forward_ols(batch(columns), targets[None], 40)
    for count in (1, 5, 13, 30):
        left = left_over(columns, targets, picks.order[0, :count].tolist())
        assert float(picks.energy[0] - picks.gains[0, :count].sum()) == pytest.approx(
            left, rel=1e-3, abs=1e-6 * float(picks.energy[0])
        )


def test_fewer_picks_are_a_prefix_of_more_and_the_others_follow_by_their_own_gain() -> None:
    columns, targets = problem(40, 3, 8)
    more = forward_ols(batch(columns), targets[None], 40)
    fewer = forward_ols(batch(columns), targets[None], 11)
    assert_permutations(fewer)
    assert torch.equal(fewer.order[:, :11], more.order[:, :11])
    assert torch.equal(fewer.gains[:, :11], more.gains[:, :11])
    chosen = fewer.order[0, :11].tolist()
    before = left_over(columns, targets, chosen)
    expected = [before - left_over(columns, targets, [*chosen, j]) for j in fewer.order[0, 11:].tolist()]
    np.testing.assert_allclose(fewer.gains[0, 11:].numpy(), expected, rtol=1e-4, atol=1e-9)
    assert (fewer.gains[0, 11:].diff() <= 0).all()


def test_finished_problems_leave_the_batch_without_changing_any_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of different ranks end at different looks; what is picked before is what picks without an end give."""
    monkeypatch.setattr(greedy, "LOOK_EVERY", 4)
    problems = [problem(30, 2, seed) for seed in range(5)]
    problems[1][0][:, 6:] *= 1e-4  # almost all of the second problem is in six keys
    problems[3][0].zero_()
    problems[4][0][:, 12:] *= 1e-4
    gram, targets = batch(*(c for c, _ in problems)), torch.stack([t for _, t in problems])
    whole, ended = forward_ols(gram, targets, 30), forward_ols(gram, targets, 30, stop=1e-5)
    assert_permutations(whole)
    assert_permutations(ended)
    lengths = []
    for index in range(5):
        small = whole.gains[index, 3::4] <= 1e-5 * whole.energy[index]
        steps = 4 * (int(small.nonzero()[0]) + 1) if small.any() else 30
        lengths.append(min(steps, 30))
        assert torch.equal(ended.order[index, : lengths[-1]], whole.order[index, : lengths[-1]])
        torch.testing.assert_close(ended.gains[index, : lengths[-1]], whole.gains[index, : lengths[-1]])
        alone = forward_ols(gram[index : index + 1], targets[index : index + 1], 30, stop=1e-5)
        assert torch.equal(alone.order[0], ended.order[index])
        rest = ended.gains[index, lengths[-1] :]
        assert (rest.diff() <= 0).all() and (rest >= 0).all()
    assert lengths[3] == 4 < lengths[1] < lengths[4] <= lengths[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_of_a_key_and_keys_that_nobody_sees_come_last_and_add_nothing(dtype: torch.dtype) -> None:
    columns, targets = problem(12, 3, 9)
    columns = torch.cat([torch.zeros(60, 3, dtype=torch.float64), columns, columns[:, 4:9]], dim=1)
    targets = torch.cat([torch.ones(3, 3, dtype=torch.float64), targets, targets[:5]])
    picks = forward_ols(batch(columns).to(dtype), targets[None].to(dtype), 20)
    assert_permutations(picks)
    assert torch.isfinite(picks.gains).all() and (picks.gains >= 0).all()
    useful, useless = picks.order[0, :12].tolist(), picks.order[0, 12:].tolist()
    of = {**{3 + j: j for j in range(12)}, **{15 + j: 4 + j for j in range(5)}}
    assert sorted(of[j] for j in useful) == list(range(12))  # one of each
    assert {0, 1, 2} < set(useless)
    assert not picks.gains[0, 12:].any()


def test_an_empty_batch_and_a_batch_that_nobody_sees_are_no_error() -> None:
    assert forward_ols(torch.zeros(0, 4, 4), torch.zeros(0, 4, 2), 4).order.shape == (0, 4)
    picks = forward_ols(torch.zeros(2, 4, 4), torch.ones(2, 4, 2), 4)
    assert_permutations(picks)
    assert not picks.gains.any() and not picks.energy.any()


def test_more_picks_than_keys_are_all_keys() -> None:
    columns, targets = problem(5, 2, 1)
    picks = forward_ols(batch(columns), targets[None], 99)
    assert torch.equal(picks.order, forward_ols(batch(columns), targets[None], 5).order)


@pytest.mark.parametrize("seed", range(4))
def test_single_precision_picks_the_same_keys_but_for_near_ties(seed: int) -> None:
    columns, targets = problem(64, 9, 20 + seed, num_rows=400)
    exact = forward_ols(batch(columns), targets[None], 64)
    rounded = forward_ols(batch(columns).float(), targets[None].float(), 64)
    assert_permutations(rounded)
    differing = (exact.order[0] != rounded.order[0]).nonzero().flatten().tolist()
    if differing:  # at the first step where they part, both picks must be worth the same
        first = differing[0]
        shared = exact.order[0, :first].tolist()
        before = left_over(columns, targets, shared)
        ours, theirs = (
            before - left_over(columns, targets, [*shared, int(picks.order[0, first])]) for picks in (exact, rounded)
        )
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-7 * float(exact.energy[0]))
    for count in (4, 16, 40):  # and every prefix must explain as much
        ours, theirs = (left_over(columns, targets, picks.order[0, :count].tolist()) for picks in (exact, rounded))
        assert theirs <= ours * 1.02 + 1e-6 * float(exact.energy[0])
    torch.testing.assert_close(exact.gains[0, :32], rounded.gains[0, :32], rtol=2e-2, atol=1e-5)


# ------------------------------------------------------------------------------------------------ pooled gains


def majorant_slopes(row: list[float]) -> list[float]:
    """Slopes of the least concave majorant of the cumulative sum, by the min-max formula of isotonic regression."""
    count, sums = len(row), np.concatenate([[0.0], np.cumsum(row)])

    def mean(first: int, last: int) -> float:
        return float((sums[last + 1] - sums[first]) / (last + 1 - first))

    return [min(max(mean(a, b) for b in range(i, count)) for a in range(i + 1)) for i in range(count)]


@pytest.mark.parametrize("num_keys", [1, 2, 17, 60])
def test_pooled_gains_are_slopes_of_the_least_concave_majorant(num_keys: int) -> None:
    gains = torch.rand(8, num_keys, generator=torch.Generator().manual_seed(num_keys), dtype=torch.float64)
    gains[1] = torch.linspace(0, 1, num_keys)  # one block
    gains[2] = torch.linspace(1, 0, num_keys)  # nothing to pool
    gains[3] = 0.25
    gains[4, num_keys // 2 :] = 0.0
    before = gains.clone()
    pooled = pool_violators(gains)
    for row, mine in zip(gains.tolist(), pooled.numpy(), strict=True):
        np.testing.assert_allclose(mine, majorant_slopes(row), atol=1e-12)
    assert (pooled.diff(dim=1) <= 1e-12).all()
    torch.testing.assert_close(pooled.sum(1), gains.sum(1))
    assert torch.equal(pooled[2], gains[2])
    assert torch.equal(gains, before)
    assert pool_violators(gains.float()).dtype == torch.float32
    assert pool_violators(gains[:0]).shape == (0, num_keys)
