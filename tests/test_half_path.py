"""Claims about the half-precision path of NVIDIA GPUs: its arithmetic, emulated on the CPU, stays close to the float32
path, also where scores are in the thousands."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

from compactor import attention
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.job import prepare
from compactor.model import LoadedModel, load_model
from compactor.packed import near_exact, near_fused, pack
from compactor.pipeline import compact
from compactor.solve import fit, gram
from compactor.solve.fit import HeadFit
from compactor.solve.rows import Rows
from compactor.study import prefill_document
from compactor.types import Segment
from compactor_kernels.reference import kept_shares_reference

TEXT = "".join(
    f"Part {i}. The tenant pays {7 * i} euros of rent. Clause {i} says who repairs the roof. " for i in range(14)
)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What the matrix units do: products of half-precision numbers, summed in float32."""
    assert left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)
    return torch.bmm(left.float(), right.float())


def fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fused kernel does: float32 inside, the output rounded to the input's type."""
    scores = product(query, keys.mT) * scaling
    if causal:
        attention.hide_future(scores)
    lse = scores.logsumexp(-1)
    out = torch.bmm((scores - lse.unsqueeze(-1)).exp(), values.float())
    return out.to(query.dtype).float(), lse


def fused_segments(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, starts: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of segments that lie one after another."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (part.repeat_interleave(group, dim=0) for part in (keys, values))
    spans = [slice(int(first), int(last)) for first, last in pairwise(starts)]
    assert max(span.stop - span.start for span in spans) == longest
    parts = [fused(query[:, s], keys[:, s], values[:, s], scaling, causal=True) for s in spans]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the half-precision path on the CPU, its four primitives written out."""
    monkeypatch.setattr(attention, "is_fast", lambda query: query.dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(attention, "half_product", product)
    monkeypatch.setattr(gram, "half_product", product)
    monkeypatch.setattr(attention, "fused_attention", fused)
    monkeypatch.setattr(attention, "fused_segments", fused_segments)


def loaded_in(folder: Path, dtype: str) -> LoadedModel:
    """Load a tiny qwen2."""
    return load_model(str(make_tiny("qwen2", folder / dtype)), device="cpu", dtype=dtype)


def test_exponentials_are_exact_to_the_rounding_of_their_result(emulated: None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = (40.0 * torch.randn(2, 50, 64, generator=generator)).to(torch.bfloat16)
    keys = (40.0 * torch.randn(2, 70, 64, generator=generator)).to(torch.bfloat16)
    exact = query.double() @ keys.double().mT * 0.125
    lse, bias = exact.logsumexp(-1), torch.randn(2, 70, generator=generator)
    assert float(exact.abs().max()) > 2000
    result = attention.exponential_of(attention.shifted_scores(query, keys, bias, 0.125, -lse.float()), query)
    expected = (exact - lse.unsqueeze(-1) + bias.double().unsqueeze(1)).exp()
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.double(), expected, rtol=2e-3, atol=1e-6)


def test_exponentials_never_overflow(emulated: None) -> None:
    ones = torch.ones(1, 1, 8, dtype=torch.bfloat16)
    huge = attention.exponentials(ones, 100 * ones, 1.0, torch.zeros(1, 1))
    assert torch.isfinite(huge).all()


def test_a_compaction_in_half_precision_is_as_good_as_in_float32(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = CompactSettings(keep_ratio=0.3, self_study_tokens=64, reserve=128)
    document = make_document("lease", TEXT)
    exact = compact(document, loaded_in(tmp_path, "float32"), settings).metadata.report
    request.getfixturevalue("emulated")
    half = compact(document, loaded_in(tmp_path, "bfloat16"), settings).metadata.report
    assert half["reconstruction_error"] == pytest.approx(exact["reconstruction_error"], rel=0.25)
    assert half["fidelity"]["kl_mean"] < 2.0 * exact["fidelity"]["kl_mean"] + 0.02


def test_context_scores_of_both_paths_agree(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    settings = CompactSettings(keep_ratio=0.3, self_study_tokens=64, reserve=128, prefill_chunk=200)
    loaded = loaded_in(tmp_path, "bfloat16")
    document = make_document("lease", TEXT)
    plain = prefill_document(prepare(document, loaded, settings))
    request.getfixturevalue("emulated")
    fast = prefill_document(prepare(document, loaded, settings))
    for i in plain.full_layers:
        ratio = (plain.context_scores[i] - fast.context_scores[i]).norm() / plain.context_scores[i].norm()
        assert float(plain.context_scores[i].norm()) > 0
        assert float(ratio) < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_pytorchs_fused_kernel_attends_as_its_emulation() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to("cuda", torch.bfloat16)  # noqa: E731
    packed = pack([Segment(tuple(range(length)), "repeat") for length in (7, 1, 300, 2)], logical_length=100)
    rows = packed.num_rows
    queries, keys, values, prefix = draw(2, 3, rows, 64), draw(2, rows, 64), draw(2, rows, 64), draw(2, 5, 64)
    fast = near_fused(packed, queries, keys, values, (prefix, prefix), 0.125)
    exact = near_exact(packed, queries, keys, values, (prefix, prefix), 0.125)
    torch.testing.assert_close(fast[1], exact[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fast[0], exact[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("prefix_length", [0, 5])
def test_segments_attend_to_prefix_and_themselves_as_in_float32(prefix_length: int, emulated: None) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(torch.bfloat16)  # noqa: E731
    packed = pack([Segment(tuple(range(length)), "repeat") for length in (7, 1, 30, 2)], logical_length=100)
    queries, keys, values = (
        3.0 * draw(2, 3, packed.num_rows, 16),
        draw(2, packed.num_rows, 16),
        draw(2, packed.num_rows, 16),
    )
    prefix = draw(2, prefix_length, 16), draw(2, prefix_length, 16)
    fast = near_fused(packed, queries, keys, values, prefix, 0.25)
    exact = near_exact(packed, queries, keys, values, prefix, 0.25)
    torch.testing.assert_close(fast[1], exact[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-2, atol=1e-2)


def test_a_product_with_float32_columns_loses_nothing(emulated: None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 300, 20, generator=generator).half()
    targets = torch.randn(2, 300, 5, generator=generator) * torch.logspace(-6, 2, 5)
    found = gram.half_times_float(rows, targets)
    expected = rows.double().mT @ targets.double()
    for column in range(5):
        norm = float(expected[..., column].norm())
        assert float((found[..., column].double() - expected[..., column]).norm()) < 2e-6 * norm
    assert not gram.half_times_float(rows, torch.zeros_like(targets)).any()


def test_rows_attend_to_fitted_heads_as_decoding_will(emulated: None) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shape, counts = (2, 3, 40), (9, 5)
    queries, near, near_share = draw(*shape, 16).bfloat16(), draw(*shape, 16), draw(*shape) - 1.0
    lse, nothing = 0.3 * draw(*shape), torch.zeros(*shape, 16)
    rows = Rows(queries, 0.25, torch.ones(shape), lse, near_share, near, nothing, torch.zeros(40, dtype=torch.bool))
    stored = lambda n: draw(n, 16).bfloat16().float()  # noqa: E731
    heads = [
        HeadFit(torch.arange(n), stored(n), draw(n), stored(n), 0.0, 0.0, 0.0, 0.0) for n in counts
    ]  # fmt: skip
    found = fit.fitted_outputs(rows, heads, torch.bfloat16)
    for h, head in enumerate(heads):
        scores = 0.25 * queries[h].double() @ head.keys.double().mT + head.biases.double()
        scores = torch.cat([scores, (near_share + lse)[h].double().unsqueeze(-1)], dim=-1).softmax(-1)
        expected = scores[..., :-1] @ head.values.double() + scores[..., -1:] * near[h].double()
        torch.testing.assert_close(found[h].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_compaction_through_the_kernel_of_shares_is_the_same(
    emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, document = loaded_in(tmp_path, "bfloat16"), make_document("lease", TEXT)
    settings = CompactSettings(keep_ratio=0.3, self_study_tokens=64, reserve=128, refine_steps=3, certify=False)
    monkeypatch.setattr(fit, "BIAS_TOLERANCE", 1e-9)  # where it stops early is a matter of the last digits
    monkeypatch.setattr(fit, "BIAS_STEPS", 200)
    plain = compact(document, loaded, settings)
    calls: list[bool] = []

    def twin(*given: torch.Tensor, **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        calls.append(more["near_share"] is not None)
        assert all(part.is_contiguous() for part in given[1:])
        shares, rest = kept_shares_reference(*given, **more)
        return shares.clamp_max(attention.LARGEST_HALF).half(), rest

    monkeypatch.setattr(attention, "kernel_usable", lambda name, _query: name == "kept_shares")
    monkeypatch.setitem(sys.modules, "compactor_kernels.kept_shares", SimpleNamespace(kept_shares=twin))
    made = compact(document, loaded, settings)
    assert True in calls and False in calls
    for one, other in zip(made.layers, plain.layers, strict=True):
        assert one.offsets.tolist() == other.offsets.tolist()
        for name in ("values", "biases"):
            found, expected = (getattr(layer, name).float() for layer in (one, other))
            largest = 0.1 * float(expected.norm())  # a key that hardly any row sees may differ
            assert float((found - expected).norm()) < largest, name
    errors = [cache.metadata.report["reconstruction_error"] for cache in (made, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
