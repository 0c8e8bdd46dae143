"""Claims about the refinement: its gradients, what it never makes worse, what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from compactor.solve import refine as refine_module
from compactor.solve.refine import HeadKeyValues, Problem, Refiner, batches, draw_rows, rate
from compactor.solve.rows import Rows, fitted_output, held_out_rows, squared_error
from compactor_kernels.reference import FitRows, refine_gradients_reference
from compactor_kernels.reference_steps import Steps, begin_steps_reference, take_step_reference

KV_HEADS, GROUP, ROWS, DIM, DOCUMENT = 3, 2, 160, 8, 48


def first_rows(problem: Problem) -> list[torch.Tensor]:
    return [part[0] for part in draw_rows(problem.sample_sizes(), steps=1, seed=0)]


def make_rows(seed: int = 0, stops: torch.Tensor | None = None) -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """Rows over a random document and two near keys, with exact attention; also the document's keys and values."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    queries = draw(KV_HEADS, GROUP, ROWS, DIM) * 2.0
    keys, values = draw(KV_HEADS, DOCUMENT, DIM), draw(KV_HEADS, DOCUMENT, DIM)
    near_keys, near_values = draw(KV_HEADS, 2, DIM), draw(KV_HEADS, 2, DIM)
    scaling = DIM**-0.5
    near_scores = scaling * torch.einsum("hgrd,hkd->hgrk", queries, near_keys)
    scores = scaling * torch.einsum("hgrd,hkd->hgrk", queries, keys)
    if stops is not None:
        scores = scores.masked_fill(torch.arange(DOCUMENT) >= stops.unsqueeze(-1), -math.inf)
    near_lse = near_scores.logsumexp(-1)
    lse = torch.logaddexp(near_lse, scores.logsumexp(-1))
    near = torch.einsum("hgrk,hkd->hgrd", near_scores.softmax(-1), near_values)
    document = torch.einsum("hgrk,hkd->hgrd", (scores - lse.unsqueeze(-1)).exp(), values)
    out = document + (near_lse - lse).exp().unsqueeze(-1) * near
    roots = draw(KV_HEADS, GROUP, ROWS).abs() + 0.1
    held_out = held_out_rows(ROWS, queries.device)
    return Rows(queries, scaling, roots, lse, near_lse - lse, near, out, held_out, stops), keys, values


def some_heads(keys: torch.Tensor, values: torch.Tensor, counts: list[int]) -> list[HeadKeyValues]:
    kept = [torch.arange(count) * (DOCUMENT // max(1, count)) for count in counts]
    return [
        HeadKeyValues(keys[h, own], torch.full((len(own),), 0.3), values[h, own], own) for h, own in enumerate(kept)
    ]


def total_error(rows: Rows, heads: list[HeadKeyValues]) -> float:
    parts = [rows.head(h) for h in range(KV_HEADS)]
    return sum(
        squared_error(part, fitted_output(part, head.keys, head.values, head.biases, head.positions))
        for part, head in zip(parts, heads, strict=True)
    )


@pytest.mark.parametrize("with_stops", [False, True])
def test_gradients_are_those_of_autograd_in_float64(with_stops: bool) -> None:
    stops = torch.randint(4, DOCUMENT, (ROWS,), generator=torch.Generator().manual_seed(5)) if with_stops else None
    rows, keys, values = make_rows(stops=stops)
    heads = some_heads(keys, values, [6, 4, 6])
    heads[1] = replace(heads[1], error=0.3 * refine_module.FULL_PACE)
    problem = Problem([rows], heads, [0, 1, 2])
    sample = problem.take(first_rows(problem))
    changes = [
        0.1 * torch.randn(part.shape, generator=torch.Generator().manual_seed(1))
        for part in (problem.keys, problem.biases, problem.values)
    ]
    found = problem.gradients(sample, *problem.moved(*changes))
    variables = [part.double().requires_grad_() for part in changes]
    units = (problem.key_unit.double(), problem.bias_unit.double(), problem.value_unit.double())
    k, b, v = (
        start.double() + change * unit
        for start, change, unit in zip((problem.keys, problem.biases, problem.values), variables, units, strict=True)
    )
    scores = rows.scaling * torch.bmm(sample.queries.double(), k.mT) + b.unsqueeze(1)
    scores = scores - sample.lse.double().unsqueeze(-1)
    if sample.stops is not None:
        scores = scores.masked_fill(problem.positions.unsqueeze(1) >= sample.stops.view(1, -1, 1), -math.inf)
    everything = torch.cat([scores, sample.near_share.double().unsqueeze(-1)], -1).softmax(-1)
    out = torch.bmm(everything[..., :-1], v) + everything[..., -1:] * sample.near.double()
    errors = ((out - sample.out.double()).square().sum(-1) * sample.weights.double()).sum(1)
    (errors / problem.energy.double() * problem.num_rows / sample.lse.shape[1]).sum().backward()
    for got, variable in zip(found, variables, strict=True):
        assert variable.grad is not None
        torch.testing.assert_close(got.double(), variable.grad, rtol=2e-4, atol=2e-5 * float(variable.grad.abs().max()))


def test_refined_heads_reproduce_attention_better_than_their_start() -> None:
    rows, keys, values = make_rows()
    heads = some_heads(keys, values, [6, 4, 8])
    after = Refiner(60).refine([rows], heads)
    assert total_error(rows, after) < 0.5 * total_error(rows, heads)


def test_a_head_that_is_nearly_right_moves_in_small_steps() -> None:
    rows, keys, values = make_rows()
    heads = some_heads(keys, values, [6, 6, 6])
    slow = [
        replace(head, error=error)
        for head, error in zip(heads, (1.0, 0.25 * refine_module.FULL_PACE, 0.0), strict=True)
    ]
    fast, after = Refiner(1).refine([rows], heads), Refiner(1).refine([rows], slow)
    for name in ("keys", "biases", "values"):
        moved = [getattr(a, name) - getattr(b, name) for a, b in zip(after, heads, strict=True)]
        at_full_pace = [getattr(a, name) - getattr(b, name) for a, b in zip(fast, heads, strict=True)]
        torch.testing.assert_close(moved[0], at_full_pace[0])
        torch.testing.assert_close(moved[1], 0.25 * at_full_pace[1], rtol=1e-3, atol=1e-6)
        assert not moved[2].any() and at_full_pace[2].any()


def test_no_steps_change_nothing() -> None:
    rows, keys, values = make_rows()
    heads = some_heads(keys, values, [6, 4, 8])
    assert all(a is b for a, b in zip(Refiner(0).refine([rows], heads), heads, strict=True))


def test_exact_heads_stay_exact() -> None:
    rows, keys, values = make_rows()
    heads = [replace(h, biases=torch.zeros(DOCUMENT)) for h in some_heads(keys, values, [DOCUMENT] * KV_HEADS)]
    after = Refiner(20).refine([rows], heads)
    energy = sum(float((part.out * part.root_weights.unsqueeze(-1)).square().sum()) for part in [rows])
    assert total_error(rows, after) < 1e-3 * energy


def test_heads_of_unlike_length_give_what_each_gives_alone() -> None:
    rows, keys, values = make_rows()
    heads = some_heads(keys, values, [8, 2, 0])
    together = Refiner(12).refine([rows], heads)
    device = torch.device("cpu")
    assert list(batches(heads, device)) == [[0], [1]]
    problem_all, _ = Refiner(12)._refine_batch([rows], heads, [0, 1])
    for index in (0, 1):
        for name in ("keys", "biases", "values"):
            torch.testing.assert_close(
                getattr(together[index], name), getattr(problem_all[index], name), rtol=1e-3, atol=1e-4
            )
    assert together[2] is heads[2]


class TwinPlan(NamedTuple):
    """What the kernels' twin needs to know of rows and heads."""

    rows: FitRows
    lengths: list[int]
    scales: torch.Tensor
    scaling: float


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[TwinPlan]:
    """Take the steps as if by the kernels, their twins in their place; returns the plans that are made."""
    of_gradients = pytest.importorskip("compactor_kernels.refine_gradients")
    of_steps = pytest.importorskip("compactor_kernels.refine_steps")
    plans: list[TwinPlan] = []

    def plan(rows: FitRows, lengths: list[int], scales: torch.Tensor, *, scaling: float) -> TwinPlan:
        plans.append(TwinPlan(rows, lengths, scales, scaling))
        return plans[-1]

    def begin(own: TwinPlan, *start: Any) -> Steps:
        return begin_steps_reference(*start)

    def step(own: TwinPlan, steps: Steps) -> None:
        take_step_reference(own.rows, own.lengths, own.scales, steps, scaling=own.scaling)

    monkeypatch.setattr(refine_module, "is_fused", lambda parts: True)
    monkeypatch.setattr(of_gradients, "plan_gradients", plan)
    monkeypatch.setattr(of_steps, "begin_steps", begin)
    monkeypatch.setattr(of_steps, "take_step", step)
    return plans


def test_fused_gradients_are_those_of_the_torch_path(fused: list[TwinPlan]) -> None:
    rows, keys, values = make_rows()
    problem = Problem([rows], some_heads(keys, values, [8, 1, 5]), [0, 1, 2])
    index = first_rows(problem)
    generator = torch.Generator().manual_seed(1)
    starts = (problem.keys, problem.biases, problem.values)
    moved = problem.moved(*(0.1 * torch.randn(part.shape, generator=generator) for part in starts))
    (plan,) = fused
    assert plan.lengths == [8, 1, 5]
    found = refine_gradients_reference(plan.rows, index[0], *moved, plan.lengths, plan.scales, scaling=plan.scaling)
    for part, expected in zip(found, problem.gradients(problem.take(index), *moved), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("counts", [[6, 4, 8], [8, 0, 2]])
def test_fused_steps_refine_as_those_of_the_torch_path(counts: list[int], request: pytest.FixtureRequest) -> None:
    rows, keys, values = make_rows()
    heads = some_heads(keys, values, counts)
    expected = Refiner(12).refine([rows], heads)
    plans = request.getfixturevalue("fused")
    found = Refiner(12).refine([rows], heads)
    assert [plan.lengths for plan in plans] == [[count for count in counts if count]]  # all heads at once
    for before, there, here in zip(heads, expected, found, strict=True):
        for name in ("keys", "biases", "values"):
            torch.testing.assert_close(getattr(here, name), getattr(there, name), rtol=1e-3, atol=1e-4)
        assert here is before if not len(before.biases) else not torch.equal(here.keys, before.keys)


def test_fused_steps_take_heads_of_all_lengths_unless_padding_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    _, keys, values = make_rows()
    gpu = torch.device("cuda")
    heads = some_heads(keys, values, [2, 0, 40])
    assert list(batches(heads, gpu, fused=True)) == [[0, 2]]
    assert list(batches(heads[1:2], gpu, fused=True)) == []
    monkeypatch.setattr(refine_module, "PADDED", 2 * 40 * DIM - 1)
    monkeypatch.setattr(refine_module, "SMALL", 0)
    assert list(batches(heads, gpu, fused=True)) == [[2], [0]]


def test_kernels_take_half_precision_rows_of_one_part_that_see_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, _ = make_rows()
    half = replace(rows, queries=rows.queries.half())
    stops = replace(half, document_stop=torch.full((ROWS,), DOCUMENT))
    none = replace(half, lse=half.lse[:, :, :0])
    assert not refine_module.is_fused([half])  # on a CPU
    monkeypatch.setattr(refine_module.attention, "is_fast", lambda query: query.dtype != torch.float32)
    monkeypatch.setattr(refine_module.attention, "kernel_usable", lambda name, query: name == "refine_steps")
    assert refine_module.is_fused([half]) and refine_module.is_fused([half, none])
    assert not any(refine_module.is_fused(parts) for parts in ([rows], [stops], [half, half], [half, stops]))


def test_equal_seeds_give_equal_heads_and_other_seeds_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine_module, "CPU_ROWS", 64)
    rows, keys, values = make_rows()
    heads = some_heads(keys, values, [6, 4, 8])
    first, again, other = (Refiner(8, seed).refine([rows], heads) for seed in (1, 1, 2))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].keys, other[0].keys)


def test_every_row_comes_once_before_any_comes_again() -> None:
    ten, seven = (part.flatten().tolist() for part in draw_rows([(10, 4), (7, 3)], steps=5, seed=0))
    assert sorted(ten[:10]) == sorted(ten[10:]) == list(range(10))
    assert sorted(seven[:7]) == sorted(seven[7:14]) == list(range(7)) and len(seven) == 15


def test_a_head_that_does_not_stay_finite_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, keys, values = make_rows()
    heads = some_heads(keys, values, [6, 4, 8])
    broken: Callable[..., tuple[torch.Tensor, ...]] = lambda self, rows, k, b, v: (k * math.nan, b * 0, v * 0)  # noqa: E731
    monkeypatch.setattr(Problem, "gradients", broken)
    assert all(a is b for a, b in zip(Refiner(3).refine([rows], heads), heads, strict=True))


def test_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] < rates[4] and rates[99] < 0.01 * max(rates)
    assert rates[5:] == sorted(rates[5:], reverse=True)
