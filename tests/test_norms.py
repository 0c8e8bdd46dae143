"""Claims about fused norms: they do what the modules do, and modules that do something else are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_tiny
from transformers import AutoModelForCausalLM

from compactor import norms
from compactor.norms import fuse_norms, fused_form

GPU = torch.cuda.is_available()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take half precision on the CPU for that of a GPU."""
    monkeypatch.setattr(norms, "is_half_on_gpu", lambda weight: weight.dtype in (torch.float16, torch.bfloat16))


def tiny(folder: Path, family: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load a tiny model whose norms have weights of their own."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(make_tiny(family, folder / family), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator).to(dtype)
    return model.eval()


def norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3_text"])
def test_fused_norms_are_the_equation_to_the_rounding(
    family: str, dtype: torch.dtype, tmp_path: Path, on_cpu: None
) -> None:
    model = tiny(tmp_path, family, dtype)
    modules = norms_of(model)
    assert fuse_norms(model) == len(modules) > 0
    for module in modules:
        weight = module.weight
        given = 3.0 * torch.randn(2, 5, len(weight), generator=torch.Generator().manual_seed(1))
        rows = given.to(dtype).double()
        exact = rows / (rows.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * weight.double()
        found = module(given.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_logits_stay_within_rounding(tmp_path: Path, on_cpu: None) -> None:
    model = tiny(tmp_path, "qwen3", torch.bfloat16)
    tokens = torch.arange(40).view(1, -1)
    with torch.no_grad():
        plain = model(tokens).logits.float()
        fuse_norms(model)
        fused = model(tokens).logits.float()
    assert not torch.equal(plain, fused)
    assert float((plain - fused).norm() / plain.norm()) < 0.02


def test_a_norm_of_another_equation_is_left_alone(tmp_path: Path, on_cpu: None) -> None:
    model = tiny(tmp_path, "gemma3_text", torch.bfloat16)  # its scale is 1 + weight
    assert norms_of(model)
    assert fuse_norms(model) == 0
    assert all("forward" not in vars(module) for module in norms_of(model))


def test_modules_that_accelerate_moves_are_left_alone(tmp_path: Path, on_cpu: None) -> None:
    module = norms_of(tiny(tmp_path, "llama", torch.bfloat16))[0]
    assert fused_form(module) is not None
    module._hf_hook = object()
    assert fused_form(module) is None


def test_nothing_changes_on_a_cpu_or_in_single_precision(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert fuse_norms(tiny(tmp_path, "llama", dtype)) == 0


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_all_norms_are_fused_on_a_gpu(tmp_path: Path) -> None:
    model = tiny(tmp_path, "qwen3", torch.bfloat16).cuda()
    assert fuse_norms(model) == len(norms_of(model))
    assert fuse_norms(tiny(tmp_path, "qwen3", torch.float32).cuda()) == 0
