"""Claims about the kernel that turns queries and keys, its torch twin, and the models that are given it.

With a GPU the kernel is compiled. Without one it runs in Triton's interpreter, in a process of its own, because Triton
reads TRITON_INTERPRET when it is imported; `TRITON_INTERPRET=1 pytest tests/test_kernel_rotary.py` shows the tests
singly.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted
from tiny_models import FAMILIES, make_tiny
from transformers import AutoModelForCausalLM

from compactor import kernel_trial, rotary
from compactor.rotary import fuse_rotary
from compactor_kernels.reference_rotary import rotate_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if INTERPRETED or COMPILED:
    from compactor_kernels.rotary import is_interpreted, rotate

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_case(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    rows: int = 5,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    *,
    shared: bool = False,
    device: str = DEVICE,
) -> Given:
    """Queries and keys as a model's projections leave them, rows before heads, and angles of a row each."""
    generator = torch.Generator().manual_seed(5)
    queries, keys = (
        torch.randn(batch, rows, count, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        for count in (heads, kv_heads)
    )
    angles = 6.0 * torch.rand(1 if shared else batch, rows, head_dim, generator=generator)
    return queries, keys, angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def textbook(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Component by component, in float64."""
    x, half = part.double().cpu(), part.shape[-1] // 2
    c, s = (angle.double().cpu().unsqueeze(1) for angle in (cos, sin))
    out = torch.empty_like(x)
    for d in range(half):
        out[..., d] = x[..., d] * c[..., d] - x[..., d + half] * s[..., d]
        out[..., d + half] = x[..., d + half] * c[..., d + half] + x[..., d] * s[..., d + half]
    return out


def make_norms(given: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the norms of queries and of keys."""
    noise = 0.3 * torch.randn(2, given[0].shape[-1], generator=torch.Generator().manual_seed(6))
    queries, keys = (1.0 + noise).to(given[0].device, given[0].dtype)
    return queries, keys


def normed(part: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Vectors over the root of their mean square, scaled, in float64; rounded to the type of ``part``."""
    x = part.double()
    x = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()
    return x.to(part.dtype)


@pytest.mark.parametrize("head_dim", [2, 64, 80])
def test_the_twin_normalises_first(head_dim: int) -> None:
    queries, keys, cos, sin = make_case(head_dim=head_dim, dtype=torch.float64, device="cpu")
    weights = make_norms((queries, keys, cos, sin))
    found = rotate_reference(queries, keys, cos, sin, norm_weights=weights, epsilon=0.01)
    for one, part, weight in zip(found, (queries, keys), weights, strict=True):
        expected = textbook(normed(part, weight, 0.01), cos, sin)
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim", [2, 64, 80])
def test_the_twin_is_the_equation(head_dim: int) -> None:
    queries, keys, cos, sin = make_case(head_dim=head_dim, dtype=torch.float64, device="cpu")
    for found, part in zip(rotate_reference(queries, keys, cos, sin), (queries, keys), strict=True):
        torch.testing.assert_close(found, textbook(part, cos, sin), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    not (INTERPRETED or COMPILED), reason="needs a GPU, or the interpreter, which has a process of its own"
)
class TestRotate:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 96, 128, 256])
    def test_it_turns_as_float64_does(self, head_dim: int, dtype: torch.dtype) -> None:
        for shape in ((1, 1, 1, 1), (2, 4, 2, 5), (1, 7, 1, 70), (3, 2, 2, 33)):
            given = make_case(*shape, head_dim, dtype, shared=shape[0] == 3)
            for found, part in zip(rotate(*given), given[:2], strict=True):
                assert found.is_contiguous() and found.dtype == dtype and found.shape == part.shape
                roundings = 16 if INTERPRETED and dtype == torch.bfloat16 else 4  # there it cuts off instead
                tolerance = roundings * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    found.double().cpu(), textbook(part, *given[2:]), rtol=tolerance, atol=tolerance
                )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_it_is_as_exact_as_separate_operations(self, dtype: torch.dtype) -> None:
        if INTERPRETED and dtype == torch.bfloat16:
            pytest.skip("the interpreter cuts bf16 off instead of rounding it")
        given = make_case(2, 8, 2, 50, 128, dtype)
        for found, twin, part in zip(rotate(*given), rotate_reference(*given), given[:2], strict=True):
            exact = textbook(part, *given[2:])
            mine, theirs = ((one.double().cpu() - exact).norm() for one in (found, twin))
            assert 0.0 < mine <= 1.01 * theirs

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 96, 128, 256])
    def test_it_normalises_first_where_it_is_told(self, head_dim: int, dtype: torch.dtype) -> None:
        for shape in ((1, 1, 1, 1), (2, 3, 1, 5)):
            given = make_case(*shape, head_dim, dtype)
            weights = make_norms(given)
            for epsilon in (1e-6, 0.5):
                found = rotate(*given, norm_weights=weights, epsilon=epsilon)
                for one, part, weight in zip(found, given[:2], weights, strict=True):
                    assert one.is_contiguous() and one.dtype == dtype and one.shape == part.shape
                    exact = textbook(normed(part.double(), weight, epsilon), *given[2:])
                    roundings = 16 if INTERPRETED and dtype == torch.bfloat16 else 4  # there it cuts off instead
                    tolerance = roundings * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))
                    torch.testing.assert_close(one.double().cpu(), exact, rtol=0.0, atol=tolerance)

    def test_norms_of_large_and_of_no_vectors(self) -> None:
        given = make_case(dtype=torch.float16)
        given[0][:, 1] *= 200.0  # squares that float16 does not hold
        given[1][:, 0] = 0.0
        weights = make_norms(given)
        queries, keys = rotate(*given, norm_weights=weights, epsilon=1e-6)
        assert not keys[:, 0].any() and bool(keys.isfinite().all())
        exact = textbook(normed(given[0].double(), weights[0], 1e-6), *given[2:])
        torch.testing.assert_close(queries.double().cpu(), exact, rtol=0.0, atol=0.01)

    def test_equal_calls_give_equal_bits(self) -> None:
        given = make_case(2, 8, 2, 50, 128, torch.bfloat16)
        for options in ({}, {"norm_weights": make_norms(given), "epsilon": 1e-6}):
            assert all(map(torch.equal, rotate(*given, **options), rotate(*given, **options)))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights: (weights[0][:63], weights[1]), "query weight must be"),
            (lambda weights: (weights[0], weights[1][None]), "key weight must be"),
            (lambda weights: (weights[0], weights[1].repeat(2)[::2]), "key weight must be"),
            (lambda weights: (weights[0].half(), weights[1]), "query weight must have the type"),
            (lambda weights: (weights[0], weights[1].to("meta")), "key weight must be on"),
        ],
    )
    def test_bad_norm_weights_are_refused_in_a_sentence(
        self, change: Callable[[tuple[torch.Tensor, torch.Tensor]], Any], message: str
    ) -> None:
        given = make_case()
        with pytest.raises(ValueError, match=message):
            rotate(*given, norm_weights=change(make_norms(given)), epsilon=1e-6)

    def test_no_rows_give_no_rows(self) -> None:
        queries, keys = rotate(*make_case(rows=0))
        assert queries.shape == (2, 4, 0, 64) and keys.shape == (2, 2, 0, 64)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda g: (g[0][0], *g[1:]), "queries must be"),
            (lambda g: (g[0].int(), *g[1:]), "queries must be float32"),
            (lambda g: tuple(part[..., :5] for part in g), "head_dim must be even"),
            (lambda g: (g[0], g[1][:, :, 1:], *g[2:]), "keys must be"),
            (lambda g: (g[0], g[1].half(), *g[2:]), "keys must have the type"),
            (lambda g: (*g[:2], g[2][:, 1:], g[3][:, 1:]), "cos must be"),
            (lambda g: (*g[:2], g[2].mT.contiguous().mT, g[3]), "cos must be contiguous"),
            (lambda g: (*g[:3], g[3].double()), "sin must have the type"),
            (lambda g: (g[0].transpose(2, 3).contiguous().transpose(2, 3), *g[1:]), "last dimension of queries"),
        ],
    )
    def test_bad_input_is_refused_in_a_sentence(self, change: Callable[[Given], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            rotate(*change(make_case()))

    @pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
    def test_a_model_on_a_gpu_is_given_the_kernel_and_answers_alike(self, tmp_path: Path) -> None:
        for family in FAMILIES:
            model = tiny(tmp_path, family, torch.bfloat16).cuda()
            tokens = torch.arange(60, device=DEVICE).view(2, -1)
            with torch.no_grad():
                plain = model(tokens).logits.float()
                assert fuse_rotary(model) == 3
                assert float((model(tokens).logits.float() - plain).norm() / plain.norm()) < 0.03

    def test_the_kernel_runs_as_this_process_says(self) -> None:
        assert is_interpreted() == INTERPRETED


def tiny(folder: Path, family: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_tiny(family, folder / family), dtype=dtype).eval()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take half precision on the CPU for that of a GPU, and the twin for the kernel; counts its calls."""
    calls: list[int] = []
    kernels = pytest.importorskip("compactor_kernels.rotary")

    def turn(*given: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        queries, keys = rotate_reference(*given, **options)
        return queries.contiguous(), keys.contiguous()

    monkeypatch.setattr(kernels, "rotate", turn)
    monkeypatch.setattr(rotary, "usable", lambda *_: True)
    monkeypatch.setattr(rotary, "is_half_on_gpu", lambda weight: weight.dtype in (torch.float16, torch.bfloat16))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_turns_by_the_kernel_and_answers_the_same(family: str, tmp_path: Path, on_cpu: list[int]) -> None:
    model, other = (tiny(tmp_path, family, torch.bfloat16) for _ in range(2))
    tokens = torch.arange(60).view(2, -1)
    with torch.no_grad():
        plain = model(tokens).logits
        assert fuse_rotary(model) == model.config.num_hidden_layers
        on_cpu.clear()
        assert torch.equal(model(tokens).logits, plain)
        assert len(on_cpu) == model.config.num_hidden_layers
        on_cpu.clear()
        assert torch.equal(other(tokens).logits, plain) and not on_cpu  # other models keep their own


def test_a_function_that_does_something_else_is_kept(
    tmp_path: Path, on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tmp_path, "llama", torch.bfloat16)
    monkeypatch.setitem(
        type(model.model.layers[0].self_attn).forward.__globals__, rotary.NAME, lambda q, k, cos, sin: (q + cos, k)
    )
    assert fuse_rotary(model) == 0


def test_weights_go_with_the_last_reference_to_the_model(tmp_path: Path, on_cpu: list[int]) -> None:
    model = tiny(tmp_path, "qwen3", torch.bfloat16)
    assert fuse_rotary(model) == 3
    weight = weakref.ref(model.model.layers[0].self_attn.q_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_nothing_is_tried_where_no_kernel_runs(
    tmp_path: Path, on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "usable", kernel_trial.usable)
    monkeypatch.setattr(kernel_trial, "passes", lambda *_: pytest.fail("the kernel was tried"))
    assert fuse_rotary(tiny(tmp_path, "llama", torch.bfloat16)) == 0


def test_modules_that_accelerate_moves_and_other_precision_are_left_alone(tmp_path: Path, on_cpu: list[int]) -> None:
    model = tiny(tmp_path, "qwen3", torch.bfloat16)
    model.model.layers[1].self_attn._hf_hook = object()
    assert fuse_rotary(model) == 2
    assert fuse_rotary(tiny(tmp_path, "qwen3", torch.float32)) == 0


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernel runs in this process")
def test_kernel_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestRotate")
