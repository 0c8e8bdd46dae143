"""Claims about the kernel of greedy picks: it picks what its torch twin picks in float64, and prefixes explain as much.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_greedy.py` shows the tests
singly.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor import kernel_trial
from compactor.solve import greedy
from compactor_kernels.reference_greedy import Picks, greedy_picks_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
REDUNDANT = 1e-5

if INTERPRETED or COMPILED:
    from compactor_kernels.greedy import Tiles, greedy_picks, is_interpreted

compiled_only = pytest.mark.skipif(not COMPILED, reason="needs a GPU")


def make_problems(
    num_problems: int, num_keys: int, num_targets: int, *, alike: float = 0.3, device: str = DEVICE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gram and targets, float32: columns as attention makes them, that share some of their attention."""
    generator = torch.Generator().manual_seed(100 * num_keys + num_targets)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    columns = draw(num_problems, 3 * num_keys + 20, num_keys).mul(1.5).softmax(-1)
    columns += alike / num_keys * draw(num_problems, 3 * num_keys + 20, 1).abs()
    return gram_of(columns).to(device), draw(num_problems, num_keys, num_targets).float().to(device)


def gram_of(columns: torch.Tensor) -> torch.Tensor:
    gram = columns.mT @ columns
    return ((gram + gram.mT) / 2).float()


def kernel(
    gram: torch.Tensor,
    targets: torch.Tensor,
    num_picks: int,
    *,
    stop: float = 0.0,
    look_every: int = 4,
    tiles: Tiles | None = None,
) -> Picks:
    return greedy_picks(gram, targets, num_picks, stop=stop, redundant=REDUNDANT, look_every=look_every, tiles=tiles)


def exact(
    gram: torch.Tensor, targets: torch.Tensor, num_picks: int, *, stop: float = 0.0, look_every: int = 4
) -> Picks:
    given = gram.double(), targets.double(), num_picks
    return greedy_picks_reference(*given, stop=stop, redundant=REDUNDANT, look_every=look_every)


def assert_same(found: Picks, expected: Picks) -> None:
    assert found.order.dtype == torch.int64 and found.gains.dtype == found.energy.dtype == torch.float32
    assert torch.equal(found.order, expected.order)
    slack = 1e-6 * float(expected.energy.max())
    torch.testing.assert_close(found.gains, expected.gains, rtol=1e-3, atol=slack)
    torch.testing.assert_close(found.energy, expected.energy, rtol=1e-5, atol=0.0)


def assert_permutations(order: torch.Tensor) -> None:
    assert torch.equal(order.sort(dim=1).values, torch.arange(order.shape[1], device=order.device).expand_as(order))


def explained(gram: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Squared norm that least squares on the chosen keys explains, (num_problems,) float64: tr B_S^T G_SS^-1 B_S."""
    gram, targets = gram.double(), targets.double()
    rows = gram.gather(1, chosen.unsqueeze(-1).expand(-1, -1, gram.shape[2]))
    part = rows.gather(2, chosen.unsqueeze(1).expand(-1, chosen.shape[1], -1))
    goal = rows @ targets
    return (goal * torch.linalg.solve(part, goal)).sum((1, 2))


def assert_explains_as_much(gram: torch.Tensor, targets: torch.Tensor, found: Picks, count: int) -> None:
    """Near ties may go either way, but neither the picks nor what they are said to add may be worth less."""
    best = explained(gram, targets, exact(gram, targets, count).order[:, :count])
    ours = explained(gram, targets, found.order[:, :count])
    assert (ours >= 0.999 * best).all()
    torch.testing.assert_close(found.gains[:, :count].double().sum(1), ours, rtol=1e-4, atol=0.0)


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestGreedyPicks:
    @pytest.mark.parametrize(
        ("num_problems", "num_keys", "num_targets"), [(2, 1, 1), (3, 5, 1), (2, 5, 64), (1, 16, 7), (3, 33, 7)]
    )
    def test_all_picks_of_odd_shapes(self, num_problems: int, num_keys: int, num_targets: int) -> None:
        gram, targets = make_problems(num_problems, num_keys, num_targets)
        assert_same(kernel(gram, targets, num_keys), exact(gram, targets, num_keys))

    @pytest.mark.parametrize(
        ("num_keys", "num_targets", "num_picks"), [(33, 1, 1), (33, 64, 9), (96, 64, 21), (150, 129, 10)]
    )
    def test_fewer_picks_and_the_others_by_what_each_would_add(
        self, num_keys: int, num_targets: int, num_picks: int
    ) -> None:
        gram, targets = make_problems(2, num_keys, num_targets)
        found = kernel(gram, targets, num_picks)
        assert_same(found, exact(gram, targets, num_picks))
        assert (found.gains[:, num_picks:].diff() <= 0).all()
        assert_explains_as_much(gram, targets, found, num_picks)

    def test_more_picks_than_keys_are_all_keys(self) -> None:
        gram, targets = make_problems(1, 6, 2)
        assert_same(kernel(gram, targets, 99), exact(gram, targets, 6))

    @pytest.mark.parametrize("look_every", [1, 4])
    def test_problems_end_at_different_looks(self, look_every: int) -> None:
        gram, targets = make_problems(4, 18, 3)
        for index, rank in ((1, 5), (3, 10)):  # almost all of these problems is in their first keys
            small = torch.ones(18, device=DEVICE)
            small[rank:] = 1e-3
            gram[index] *= small * small[:, None]
        gram[2] = 0.0
        whole = exact(gram, targets, 18)
        stop = 1e-5
        ended = kernel(gram, targets, 18, stop=stop, look_every=look_every)
        assert_same(ended, exact(gram, targets, 18, stop=stop, look_every=look_every))
        lengths = []
        for index in range(4):
            small = whole.gains[index, look_every - 1 :: look_every] <= stop * whole.energy[index]
            lengths.append(look_every * (int(small.nonzero()[0]) + 1) if small.any() else 18)
            assert torch.equal(ended.order[index, : lengths[-1]], whole.order[index, : lengths[-1]])
        assert lengths[2] == look_every < lengths[1] < lengths[3] < lengths[0]

    def test_copies_of_a_key_and_keys_that_nobody_sees_come_last_and_add_nothing(self) -> None:
        gram, targets = make_problems(1, 12, 3)
        copied = torch.tensor([12, 12, *range(12), *range(4, 9)], device=DEVICE)  # 12: a key that nobody sees
        padded = torch.nn.functional.pad(gram, (0, 1, 0, 1))
        gram = padded[:, copied][:, :, copied].contiguous()
        targets = torch.nn.functional.pad(targets, (0, 0, 0, 1), value=1.0)[:, copied]
        found = kernel(gram, targets, 19)
        assert_permutations(found.order)
        assert sorted(copied[found.order[0, :12]].tolist()) == list(range(12))  # one of each
        assert (found.gains[0, :12] > 0).all() and not found.gains[0, 12:].any()

    def test_the_first_of_equals_is_picked(self) -> None:
        gram, targets = torch.eye(21, device=DEVICE)[None], torch.ones(1, 21, 2, device=DEVICE)
        found = kernel(gram, targets, 9)
        assert found.order[0].tolist() == list(range(21))
        assert (found.gains == 2).all() and float(found.energy) == 42

    def test_problems_that_nobody_sees_are_no_error(self) -> None:
        found = kernel(torch.zeros(2, 7, 7, device=DEVICE), torch.ones(2, 7, 3, device=DEVICE), 7)
        assert found.order.tolist() == [list(range(7))] * 2
        assert not found.gains.any() and not found.energy.any()

    def test_what_is_no_number_stays_none_and_spoils_no_other_problem(self) -> None:
        gram, targets = make_problems(2, 9, 3)
        targets[0, 4, 1] = torch.nan
        found = kernel(gram, targets, 9)
        assert_permutations(found.order)
        assert found.gains[0].isnan().any() and found.energy[0].isnan()
        assert_same(Picks(*(part[1:] for part in found)), exact(gram[1:], targets[1:], 9))

    @pytest.mark.parametrize("tiles", [(4, 4, 1), (1, 1, 2), (64, 8, 3), (2, 2, 4)])
    def test_tiles_change_nothing(self, tiles: tuple[int, int, int]) -> None:
        gram, targets = make_problems(1, 20, 5)
        assert_same(kernel(gram, targets, 12, tiles=Tiles(*tiles)), exact(gram, targets, 12))

    def test_tiles_in_which_threads_share_a_number_are_refused(self) -> None:
        gram, targets = make_problems(1, 20, 5)
        with pytest.raises(ValueError, match="row_tile 2 is too small for 4 warps"):
            kernel(gram, targets, 12, tiles=Tiles(2, 4, 1))

    def test_targets_of_any_strides_and_inputs_stay_as_they_are(self) -> None:
        gram, targets = make_problems(2, 16, 5)
        strided, before = targets.mT.contiguous().mT, gram.clone()
        assert not strided.is_contiguous()
        assert_same(kernel(gram, strided, 16), exact(gram, targets, 16))
        assert torch.equal(gram, before) and torch.equal(strided, targets)

    @pytest.mark.parametrize(("num_problems", "num_keys"), [(0, 5), (2, 0)])
    def test_no_problems_and_no_keys(self, num_problems: int, num_keys: int) -> None:
        gram = torch.zeros(num_problems, num_keys, num_keys, device=DEVICE)
        found = kernel(gram, torch.zeros(num_problems, num_keys, 2, device=DEVICE), 3)
        assert found.order.shape == found.gains.shape == (num_problems, num_keys)
        assert found.energy.shape == (num_problems,) and not found.energy.any()

    def test_the_search_of_the_product_runs_on_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gram, targets = make_problems(2, 12, 3)
        wide = gram.new_zeros(2, 12, 24)
        wide[..., :12] = gram
        asked: list[str] = []
        monkeypatch.setattr(greedy, "usable", lambda name, *_: not asked.append(name))
        if COMPILED:
            assert_same(greedy.forward_ols(wide[..., :12], targets, 7), exact(gram, targets, 7))
            assert asked == ["greedy"]
        monkeypatch.setattr(greedy, "_kernel_takes", lambda *_: True)
        assert_same(greedy.forward_ols(wide[..., :12], targets, 7), exact(gram, targets, 7))

    @compiled_only
    @pytest.mark.parametrize(("num_problems", "num_keys"), [(140, 512), (3, 1024), (2, 1000), (5, 350)])
    def test_sizes_of_real_documents(self, num_problems: int, num_keys: int) -> None:
        gram, targets = make_problems(num_problems, num_keys, 129)
        found = kernel(gram, targets, 200, look_every=32)
        assert_permutations(found.order)
        for count in (1, 16, 64, 200):
            assert_explains_as_much(gram, targets, found, count)
        for _ in range(3):  # a race would show
            again = kernel(gram, targets, 200, look_every=32)
            assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))

    @compiled_only
    def test_it_can_be_captured_in_a_graph(self) -> None:
        gram, targets = make_problems(3, 64, 9)
        expected = kernel(gram, targets, 30)  # compiles
        stale, graph = torch.zeros_like(gram), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernel(stale, targets, 30)
        stale.copy_(gram)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"gram": torch.zeros(2, 5, 4)}, "gram must be"),
            ({"gram": torch.zeros(5, 5)}, "gram must be"),
            ({"targets": torch.zeros(2, 4, 3)}, "targets must be"),
            ({"targets": torch.zeros(2, 5, 0)}, "at least one target"),
            ({"gram": torch.zeros(2, 5, 5, dtype=torch.float64)}, "gram must be float32"),
            ({"targets": torch.zeros(2, 5, 3, dtype=torch.float16)}, "targets must be float32"),
            ({"gram": torch.zeros(1, 1025, 1025), "targets": torch.zeros(1, 1025, 1)}, "at most 1024 keys"),
            ({"gram": torch.zeros(5, 5, 2).permute(2, 0, 1)}, "gram must be contiguous"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, torch.Tensor], message: str) -> None:
        given = {"gram": torch.zeros(2, 5, 5), "targets": torch.zeros(2, 5, 3), **fields}
        with pytest.raises(ValueError, match=message):
            kernel(given["gram"].to(DEVICE), given["targets"].to(DEVICE), 3)

    @pytest.mark.parametrize(("num_picks", "look_every"), [(0, 4), (3, 0)])
    def test_no_picks_and_no_looks_are_refused(self, num_picks: int, look_every: int) -> None:
        gram, targets = make_problems(1, 5, 2)
        with pytest.raises(ValueError, match="num_picks and look_every must be at least 1"):
            kernel(gram, targets, num_picks, look_every=look_every)

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestGreedyPicks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_gpu_the_search_is_the_twin(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "passes", lambda *_: pytest.fail("tried"))
    gram, targets = (part.to(dtype) for part in make_problems(2, 9, 2, device="cpu"))
    found = greedy.forward_ols(gram, targets, 5)
    expected = exact(gram, targets, 5)
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.gains, expected.gains, rtol=1e-4, atol=1e-7)
