"""Claims about the kernels that multiply a few rows with weight matrices, and their torch twins.

With a GPU the kernels are compiled. Without one they run in Triton's interpreter, in a process of its own, because
Triton reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_gemv.py` shows the tests
singly.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted

from compactor_kernels.reference_gemv import gated_gemv_reference, gemv_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = ["silu", "gelu_tanh"]
SUM_ERROR = 4e-6  # of a float32 sum, relative to the sum of the sizes of its terms
LIPSCHITZ = 1.13  # of both activations

if INTERPRETED or COMPILED:
    from compactor_kernels.gemv import MAX_PARTS, MAX_ROWS, Tiles, choose_tiles, gated_gemv, gemv, is_interpreted

zeros = partial(torch.zeros, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """Inputs of the kernels; the gated one takes the first two matrices."""

    rows: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor] | None

    def kernel(self, **options: Any) -> list[torch.Tensor]:
        return gemv(self.rows, self.weights, self.biases, **options)

    def gated(self, activation: str = "silu", **options: Any) -> torch.Tensor:
        return gated_gemv(self.rows, *self.weights[:2], activation=activation, **options)


def make_case(
    num_inputs: int = 80,
    sizes: tuple[int, ...] = (129, 5),
    *,
    num_rows: int = 1,
    biased: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> Case:
    """Random rows and matrices whose products are near 1."""
    generator = torch.Generator().manual_seed(num_inputs)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Case(
        draw(num_rows, num_inputs).to(device, dtype),
        [(draw(size, num_inputs) / num_inputs**0.5).to(device, dtype) for size in sizes],
        [draw(size).to(device, dtype) for size in sizes] if biased else None,
    )


def textbook(case: Case) -> list[torch.Tensor]:
    """Component by component, in float64."""
    found = []
    for number, weight in enumerate(case.weights):
        out = torch.zeros(len(case.rows), len(weight), dtype=torch.float64)
        for row, x in enumerate(case.rows.double().tolist()):
            for component, w in enumerate(weight.double().tolist()):
                bias = 0.0 if case.biases is None else float(case.biases[number][component])
                out[row, component] = math.fsum([bias, *(a * b for a, b in zip(w, x, strict=True))])
        found.append(out)
    return found


def terms(case: Case, number: int) -> torch.Tensor:
    """Return the sum of the sizes of a component's terms, (num_rows, size) float64."""
    total = case.rows.double().abs() @ case.weights[number].double().abs().T
    return total if case.biases is None else total + case.biases[number].double().abs()


def assert_within(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, sums: torch.Tensor) -> None:
    """Sums are exact to float32, and what is left is the rounding of the result, which the interpreter may cut off."""
    assert found.dtype == dtype and found.is_contiguous() and found.shape == exact.shape
    rounding = torch.finfo(dtype).eps * exact.abs() + (6e-8 if dtype == torch.float16 else 0.0)  # its least number
    excess = (found.double() - exact).abs() - rounding - sums
    assert float(excess.max()) <= 0.0, float(excess.max())


def assert_exact(case: Case, **options: Any) -> None:
    exact = Case(case.rows.double(), [w.double() for w in case.weights], None)
    biases = None if case.biases is None else [bias.double() for bias in case.biases]
    expected = gemv_reference(exact.rows, exact.weights, biases)
    for number, found in enumerate(case.kernel(**options)):
        assert_within(found, expected[number], case.rows.dtype, SUM_ERROR * terms(case, number))


def assert_gated_exact(case: Case, activation: str, **options: Any) -> None:
    gate, up = (weight.double() for weight in case.weights[:2])
    expected = gated_gemv_reference(case.rows.double(), gate, up, activation=activation)
    score, factor = (product.abs() for product in gemv_reference(case.rows.double(), [gate, up]))
    unbiased = replace(case, biases=None)
    slack = LIPSCHITZ * factor * terms(unbiased, 0) + (score + 1.0) * terms(unbiased, 1)
    assert_within(case.gated(activation, **options), expected, case.rows.dtype, SUM_ERROR * slack)


@pytest.mark.parametrize("biased", [False, True])
def test_the_twin_is_the_equation(biased: bool) -> None:
    case = make_case(7, (5, 1, 3), num_rows=2, biased=biased, dtype=torch.float64, device="cpu")
    found = gemv_reference(case.rows, case.weights, case.biases)
    for one, expected in zip(found, textbook(case), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gated_twin_is_the_equation(activation: str) -> None:
    case = make_case(7, (5, 5), num_rows=2, biased=False, dtype=torch.float64, device="cpu")
    score, factor = textbook(case)
    inner = (2.0 / math.pi) ** 0.5 * (score + 0.044715 * score**3)
    shaped = score / (1.0 + (-score).exp()) if activation == "silu" else 0.5 * score * (1.0 + inner.tanh())
    found = gated_gemv_reference(case.rows, *case.weights, activation=activation)
    torch.testing.assert_close(found, shaped * factor, rtol=1e-12, atol=1e-12)


def test_the_twins_round_once() -> None:
    case = make_case(515, (129, 129), num_rows=2, dtype=torch.bfloat16, device="cpu")
    whole = [weight.float() for weight in case.weights]
    biases = [bias.float() for bias in case.biases or ()]
    for found, exact in zip(
        gemv_reference(case.rows, case.weights, case.biases),
        gemv_reference(case.rows.float(), whole, biases),
        strict=True,
    ):
        assert torch.equal(found, exact.bfloat16())
    exact_gated = gated_gemv_reference(case.rows.float(), *whole, activation="silu")
    assert torch.equal(gated_gemv_reference(case.rows, *case.weights, activation="silu"), exact_gated.bfloat16())


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestGemv:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("num_inputs", [1, 7, 80, 515, 2560])
    def test_every_number_of_inputs_and_type(self, num_inputs: int, dtype: torch.dtype) -> None:
        for num_rows in (1, 2):
            assert_exact(make_case(num_inputs, (29, 5), num_rows=num_rows, dtype=dtype))

    @pytest.mark.parametrize("num_rows", [1, 2])
    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("sizes", [(1,), (5,), (129,), (5, 1), (129, 129), (1, 5, 129), (129, 5, 5), (0, 5, 1)])
    def test_every_number_of_matrices(self, sizes: tuple[int, ...], biased: bool, num_rows: int) -> None:
        case = make_case(sizes=sizes, biased=biased, num_rows=num_rows, dtype=torch.float16)
        assert [tuple(one.shape) for one in case.kernel()] == [(num_rows, size) for size in sizes]
        if all(sizes):
            assert_exact(case)
        else:
            assert_exact(without_first(case))
            assert all(map(torch.equal, case.kernel()[1:], without_first(case).kernel()))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("num_inputs", [1, 7, 80, 515, 2560])
    def test_gates_of_every_number_of_inputs_and_type(
        self, num_inputs: int, dtype: torch.dtype, activation: str
    ) -> None:
        for num_rows, size in ((1, 29), (2, 5), (2, 1)):
            case = make_case(num_inputs, (size, size), num_rows=num_rows, biased=False, dtype=dtype)
            assert_gated_exact(case, activation)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_scores_in_the_thousands_have_their_limits(self, activation: str) -> None:
        case = make_case(1, (2, 2), biased=False)
        case.rows[:] = 1.0
        case.weights[0][:, 0] = torch.tensor([-3000.0, 3000.0])
        case.weights[1][:] = 2.0
        assert case.gated(activation)[0].tolist() == [0.0, 6000.0]

    @pytest.mark.parametrize(
        "tiles", [(1, 1, 16, 1), (1, 4, 64, 4), (1, 2, 2048, 4), (1, 8, 512, 4)], ids=lambda tiles: f"{tiles[1:3]}"
    )
    def test_tiles_change_nothing_but_the_order_of_sums(self, tiles: tuple[int, ...]) -> None:
        case = make_case(515, (29, 5), dtype=torch.float16)
        assert_exact(case, tiles=Tiles(*tiles))
        gated = make_case(515, (13, 13), biased=False, dtype=torch.float16)
        for activation in ACTIVATIONS:
            assert_gated_exact(gated, activation, tiles=Tiles(*tiles))

    def test_equal_calls_give_equal_bits_whatever_goes_with_them(self) -> None:
        case = make_case(515, (129, 129), num_rows=2)
        first, gated = case.kernel(), case.gated()
        for settled in (False, True):
            assert all(map(torch.equal, case.kernel(settled=settled), first))
            assert torch.equal(case.gated(settled=settled), gated)

    def test_matrices_do_not_change_each_other(self) -> None:
        case = make_case(80, (129, 5, 1), dtype=torch.float16)
        tiles = Tiles(1, 4, 128, 4)
        together = case.kernel(tiles=tiles)
        for number, found in enumerate(together):
            (alone,) = gemv(case.rows, [case.weights[number]], [case.biases[number]], tiles=tiles)  # type: ignore[index]
            assert torch.equal(found, alone)

    def test_views_of_a_larger_matrix(self) -> None:
        """Parts of one fused weight begin at addresses that are not aligned."""
        whole = make_case(7, (20,), biased=False, dtype=torch.float16)
        weight = whole.weights[0]
        assert_exact(replace(whole, weights=[weight[1:4], weight[4:5], weight[5:]]))

    def test_no_rows_and_no_components(self) -> None:
        case = make_case(num_rows=0)
        assert [tuple(one.shape) for one in case.kernel()] == [(0, 129), (0, 5)]
        assert make_case(sizes=(5, 5), num_rows=0).gated().shape == (0, 5)
        assert make_case(sizes=(0,)).kernel()[0].shape == (1, 0)
        assert make_case(sizes=(0, 0)).gated().shape == (1, 0)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rows": zeros(80)}, "rows must be"),
            ({"rows": zeros(3, 80)}, "rows must be .* at most 2"),
            ({"rows": zeros(1, 80, dtype=torch.float64)}, "rows must be float32"),
            ({"rows": zeros(1, 160)[:, ::2]}, "rows must be contiguous"),
            ({"rows": zeros(1, 79)}, "weights must be"),
            ({"rows": zeros(1, 0), "weights": [zeros(5, 0)], "biases": None}, "weights must be"),
            ({"weights": []}, "1 to 3 matrices, not 0"),
            ({"weights": [zeros(5, 80)] * 4}, "1 to 3 matrices, not 4"),
            ({"weights": [zeros(129, 80), zeros(80)]}, "weights must be"),
            ({"weights": [zeros(129, 80), zeros(5, 80).half()]}, "weights 1 must have the type"),
            ({"weights": [zeros(80, 129).T, zeros(5, 80)]}, "weights 0 must be contiguous"),
            ({"biases": [zeros(129)]}, "biases must be 2"),
            ({"biases": [zeros(129), zeros(4)]}, "biases must be"),
            ({"biases": [zeros(129), zeros(5).half()]}, "biases 1 must have the type"),
            ({"biases": [zeros(129), zeros(10)[::2]]}, "biases 1 must be contiguous"),
            ({"weights": [zeros(129, 80), torch.zeros(5, 80, device="meta")]}, "weights 1 must be on"),
        ],
    )
    def test_bad_input_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(make_case(), **fields).kernel()

    def test_bad_gates_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"up must be .* like gate"):
            make_case(sizes=(129, 5)).gated()
        with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, not 'relu'"):
            make_case(sizes=(5, 5)).gated("relu")
        with pytest.raises(ValueError, match="rows must be"):
            make_case(sizes=(5, 5), num_rows=3).gated()

    @pytest.mark.parametrize("matrices", [1, 2])
    @pytest.mark.parametrize("num_rows", [1, 2])
    def test_tiles_are_powers_of_two_that_fit(self, num_rows: int, matrices: int) -> None:
        assert MAX_ROWS == 2 and MAX_PARTS == 3
        for num_inputs in (1, 80, 2560, 9728):
            for size in (1, 100, 6144, 151936):
                tiles = choose_tiles(num_rows, num_inputs, size, matrices, 132)
                assert all(part >= 1 and part & (part - 1) == 0 for part in tiles)
                assert tiles.row_tile >= num_rows and tiles.tile_in <= max(2048, num_inputs)
                held = (matrices + matrices * tiles.row_tile) * tiles.tile_out * tiles.tile_in
                assert held <= 32 * tiles.num_warps * 256  # what a program's registers hold

    @pytest.mark.skipif(not COMPILED, reason="needs a GPU")
    def test_a_captured_call_follows_its_rows(self) -> None:
        case = make_case(515, (129, 129), dtype=torch.float16)
        case.kernel(settled=True)
        case.gated(settled=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, gated = case.kernel(settled=True), case.gated(settled=True)
        for _ in range(3):
            case.rows.copy_(torch.randn_like(case.rows))
            graph.replay()
            assert all(map(torch.equal, found, case.kernel()))
            assert torch.equal(gated, case.gated())

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


def without_first(case: Case) -> Case:
    biases = None if case.biases is None else case.biases[1:]
    return replace(case, weights=case.weights[1:], biases=biases)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestGemv")
