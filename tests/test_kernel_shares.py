"""Claims about the kernel of attention to kept keys, its torch twin, and the fit that is made with it.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_shares.py` shows the tests
singly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor_kernels.reference import kept_shares_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = torch.finfo(torch.float16).eps

if INTERPRETED or COMPILED:
    from compactor_kernels.kept_shares import KeptShares, Tiles, is_interpreted, kept_shares


@dataclass(frozen=True)
class Case:
    """Inputs of the kernel."""

    queries: torch.Tensor
    keys: torch.Tensor
    biases: torch.Tensor
    row_shift: torch.Tensor
    near_share: torch.Tensor | None
    root_weights: torch.Tensor | None
    scaling: float

    def kernel(self, **options: object) -> KeptShares:
        found = kept_shares(
            self.queries, self.keys, self.biases, self.row_shift, scaling=self.scaling,
            near_share=self.near_share, root_weights=self.root_weights, **options,
        )  # fmt: skip
        assert isinstance(found, KeptShares)
        return found

    def exact(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return kept_shares_reference(
            self.queries.double(), self.keys.double(), self.biases, self.row_shift, scaling=self.scaling,
            near_share=self.near_share, root_weights=self.root_weights,
        )  # fmt: skip


def make_case(
    num_rows: int,
    num_keys: int,
    *,
    num_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    normalise: bool = True,
    weighted: bool = True,
    size: float = 1.0,
    device: str = DEVICE,
) -> Case:
    """Rows whose shift is minus the log-sum-exp over the kept keys and as much again."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    queries = (size * draw(num_heads, num_rows, head_dim)).to(device, dtype)
    keys = (size * draw(num_heads, num_keys, head_dim)).to(device, dtype)
    biases = draw(num_heads, num_keys).to(device)
    scores = head_dim**-0.5 * queries.double() @ keys.double().mT
    shift = -(scores.logsumexp(-1) + 0.7).float() if num_keys else torch.zeros(num_heads, num_rows, device=device)
    near = (draw(num_heads, num_rows) - 1.0).to(device) if normalise else None
    roots = draw(num_heads, num_rows).abs().to(device) if weighted else None
    return Case(queries, keys, biases, shift, near, roots, head_dim**-0.5)


def assert_exact(case: Case, **options: object) -> None:
    found, (shares, rest) = case.kernel(**options), case.exact()
    assert found.shares.dtype == torch.float16
    slack = 2 * HALF if case.queries.dtype != torch.float32 else HALF
    torch.testing.assert_close(found.shares.double(), shares, rtol=slack, atol=1e-6)
    assert (found.rest is None) == (rest is None)
    if found.rest is not None and rest is not None:
        torch.testing.assert_close(found.rest.double(), rest, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestKeptShares:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
    def test_every_size_of_head_and_type(self, head_dim: int, dtype: torch.dtype) -> None:
        assert_exact(make_case(40, 70, head_dim=head_dim, dtype=dtype))

    @pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (1, 200), (131, 1), (257, 129), (64, 64), (17, 8)])
    @pytest.mark.parametrize("normalise", [False, True])
    def test_odd_shapes(self, num_rows: int, num_keys: int, normalise: bool) -> None:
        assert_exact(make_case(num_rows, num_keys, normalise=normalise, num_heads=3))

    @pytest.mark.parametrize("normalise", [False, True])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_with_and_without_normaliser_and_weights(self, normalise: bool, weighted: bool) -> None:
        assert_exact(make_case(50, 90, normalise=normalise, weighted=weighted, dtype=torch.bfloat16))

    def test_scores_in_the_thousands(self) -> None:
        case = make_case(30, 40, size=60.0)
        scores = case.scaling * case.queries.double() @ case.keys.double().mT
        assert float(scores.abs().max()) > 2000
        found, (shares, _) = case.kernel(), case.exact()
        torch.testing.assert_close(found.shares.double(), shares, rtol=0.02, atol=1e-3)

    def test_nothing_overflows(self) -> None:
        case = make_case(5, 7, normalise=False)
        case = replace(case, row_shift=torch.full_like(case.row_shift, 50.0))
        assert case.kernel().shares.isfinite().all() and float(case.kernel().shares.max()) > 5e4

    @pytest.mark.parametrize("weighted", [False, True])
    def test_what_is_no_number_stays_none(self, weighted: bool) -> None:
        case = make_case(20, 30, weighted=weighted)
        case.keys[0, 3] = torch.nan
        assert not case.kernel().shares[0].isfinite().any() and case.kernel().shares[1].isfinite().all()

    def test_rows_that_weigh_nothing_give_nothing_however_large_they_are(self) -> None:
        case = make_case(5, 7, normalise=False)
        case = replace(
            case, row_shift=torch.full_like(case.row_shift, 1e4), root_weights=torch.zeros_like(case.row_shift)
        )
        assert not case.kernel().shares.any()

    def test_keys_of_bias_minus_infinity_get_nothing(self) -> None:
        case = make_case(20, 30)
        case.biases[0, 11:] = -torch.inf
        assert_exact(case)
        assert not case.kernel().shares[0, :, 11:].any()

    def test_rows_that_attend_to_nothing_else_and_rows_that_see_no_key(self) -> None:
        case = make_case(20, 30)
        assert case.near_share is not None
        case.near_share[0] = -torch.inf  # all goes to the keys
        case.biases[1] = -torch.inf  # all goes to the rest
        assert_exact(case)
        found = case.kernel()
        assert found.rest is not None and not found.rest[0].any() and (found.rest[1] == 1).all()

    def test_rows_of_the_result_are_aligned_and_the_filling_is_zero(self) -> None:
        found = make_case(9, 13).kernel().shares
        assert found.shape == (2, 9, 13) and found.stride(1) == 16
        assert not found.as_strided((2, 9, 16), found.stride())[..., 13:].any()

    def test_strided_queries(self) -> None:
        case = make_case(33, 20)
        wide = torch.randn(2, 33, 3, 64, device=DEVICE).to(case.queries.dtype)
        wide[:, :, 1] = case.queries
        assert_exact(replace(case, queries=wide[:, :, 1]))

    @pytest.mark.parametrize("tiles", [(16, 16, 64, 4, 1), (32, 128, 64, 4, 2), (128, 64, 64, 8, 3)])
    def test_tiles_change_nothing(self, tiles: tuple[int, ...]) -> None:
        assert_exact(make_case(100, 150), tiles=Tiles(*tiles))

    @pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 5), (5, 0)])
    def test_no_rows_and_no_keys(self, num_rows: int, num_keys: int) -> None:
        found = make_case(num_rows, num_keys).kernel()
        assert found.shares.shape == (2, num_rows, num_keys)
        assert found.rest is not None and (found.rest == 1).all()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"queries": torch.zeros(2, 4)}, "queries must be"),
            ({"keys": torch.zeros(2, 5, 32)}, "keys must be"),
            ({"keys": torch.zeros(2, 5, 64, dtype=torch.float64)}, "type of the queries"),
            ({"biases": torch.zeros(2, 4)}, "biases must be"),
            ({"row_shift": torch.zeros(2, 5)}, "row_shift must be"),
            ({"near_share": torch.zeros(2, 4, dtype=torch.float64)}, "near_share must be"),
            ({"root_weights": torch.zeros(4, 2).T}, "root_weights must be contiguous"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, torch.Tensor], message: str) -> None:
        case = make_case(4, 5, dtype=torch.float32)
        moved = {name: tensor.to(DEVICE) for name, tensor in fields.items()}
        with pytest.raises(ValueError, match=message):
            replace(case, **moved).kernel()

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestKeptShares")


@pytest.mark.parametrize("weighted", [False, True])
def test_the_twin_is_softmax_with_one_more_key(weighted: bool) -> None:
    case = make_case(12, 9, dtype=torch.float64, weighted=weighted, device="cpu")
    assert case.near_share is not None
    shares, rest = case.exact()
    scores = case.scaling * case.queries @ case.keys.mT + case.biases.unsqueeze(1) + case.row_shift.unsqueeze(-1)
    whole = torch.cat([scores, case.near_share.double().unsqueeze(-1)], -1).softmax(-1)
    roots = 1.0 if case.root_weights is None else case.root_weights.double().unsqueeze(-1)
    torch.testing.assert_close(shares, whole[..., :-1] * roots)
    assert rest is not None
    torch.testing.assert_close(rest, whole[..., -1])
