"""Claims about the half-precision path of NVIDIA GPUs: its arithmetic, emulated on the CPU, stays close to the float32
path, also where scores are in the thousands. The kernel that merges parts runs in Triton's interpreter, in a process of
its own; in this one its twins take its place."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted
from test_chunk_grams import plain_layer
from tiny_models import make_tiny

from compactor import attention
from compactor.config import CompactSettings
from compactor.document import make_document
from compactor.job import prepare
from compactor.model import LoadedModel, load_model
from compactor.packed import PackedLayer, exact_rows, near_exact, near_fused, pack
from compactor.pipeline import compact
from compactor.solve import fit, gram
from compactor.solve.fit import HeadFit
from compactor.solve.key_scores import KeySums, ScoreLayer
from compactor.solve.rows import Rows, squared_errors
from compactor.study import prefill_document
from compactor.types import Segment
from compactor_kernels.reference import kept_shares_reference
from compactor_kernels.reference_gram import add_gram_reference, add_product_reference
from compactor_kernels.reference_merge import (
    merge_measured_reference,
    merge_rows_reference,
    merge_scored_reference,
)
from compactor_kernels.reference_targets import ValueTargets, value_targets_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

TEXT = "".join(
    f"Part {i}. The tenant pays {7 * i} euros of rent. Clause {i} says who repairs the roof. " for i in range(14)
)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What the matrix units do: products of half-precision numbers, summed in float32."""
    assert left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)
    return torch.bmm(left.float(), right.float())


def fused(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    *,
    causal: bool,
    out_type: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fused kernel does: float32 inside, the output rounded to the input's type."""
    scores = product(query, keys.mT) * scaling
    if causal:
        attention.hide_future(scores)
    lse = scores.logsumexp(-1)
    out = torch.bmm((scores - lse.unsqueeze(-1)).exp(), values.float())
    return out.to(query.dtype).to(out_type), lse


def fused_segments(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    starts: torch.Tensor,
    longest: int,
    *,
    out_type: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of segments that lie one after another; rows of all heads lie together."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (part.repeat_interleave(group, dim=0) for part in (keys, values))
    spans = [slice(int(first), int(last)) for first, last in pairwise(starts)]
    assert max(span.stop - span.start for span in spans) == longest
    parts = [fused(query[:, s], keys[:, s], values[:, s], scaling, causal=True, out_type=out_type) for s in spans]
    out = torch.cat([out.transpose(0, 1) for out, _ in parts]).transpose(0, 1)
    return out, torch.cat([lse for _, lse in parts], dim=1)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the half-precision path on the CPU, its four primitives written out."""
    monkeypatch.setattr(attention, "is_fast", lambda query: query.dtype in (torch.float16, torch.bfloat16))
    monkeypatch.setattr(attention, "half_product", product)
    monkeypatch.setattr(gram, "half_product", product)
    monkeypatch.setattr(attention, "fused_attention", fused)
    monkeypatch.setattr(attention, "fused_segments", fused_segments)


@pytest.fixture
def merging(emulated: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Merge parts in one pass besides, by the interpreted kernel or its twins; the list says which were called."""
    calls: list[str] = []
    if INTERPRETED:
        from compactor_kernels import merge_rows as kernels

        ways = [kernels.merge_rows, kernels.merge_scored, kernels.merge_measured]
    else:

        def scored(near: Any, document: Any, root_weights: torch.Tensor) -> Any:
            found = merge_scored_reference(near, document, root_weights)
            return found._replace(out=found.out.to(document[0].dtype))

        def measured(*given: Any, step: int, out_type: torch.dtype) -> Any:
            found = merge_measured_reference(*given, step=step)
            return found._replace(out=found.out.to(out_type))

        ways = [merge_rows_reference, scored, measured]

    def noted(name: str, way: Any) -> Any:
        def run(*given: Any, **more: Any) -> Any:
            calls.append(name)
            return way(*given, **more)

        return run

    names = ("merge_rows", "merge_scored", "merge_measured")
    module = SimpleNamespace(**{name: noted(name, way) for name, way in zip(names, ways, strict=True)})
    monkeypatch.setattr(attention, "kernel_usable", lambda name, _query: name == "merge_rows")
    monkeypatch.setitem(sys.modules, "compactor_kernels.merge_rows", module)
    return calls


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
    rows = Rows(queries, 0.25, torch.ones(shape), lse, near_share, near, nothing, torch.arange(0))
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


@pytest.mark.parametrize("with_targets", [False, True])
def test_a_compaction_through_the_kernels_of_least_squares_is_the_same(
    with_targets: bool, emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    def targets(*given: torch.Tensor, **chosen: Any) -> ValueTargets:
        taken.append(given[0].shape[1])
        made = value_targets_reference(*given, **chosen)
        assert 1.0 < float(made.halves.abs().amax(1).amax()) < 1e4  # far from both ends of float16
        return made

    taken: list[int] = []
    usable = {"kept_shares", "value_targets"} if with_targets else {"kept_shares"}
    monkeypatch.setattr(attention, "kernel_usable", lambda name, _query: name in usable)
    monkeypatch.setitem(sys.modules, "compactor_kernels.kept_shares", SimpleNamespace(kept_shares=twin))
    if with_targets:
        products = SimpleNamespace(ALIGNMENT=8, add_gram=add_gram_reference, add_product=add_product_reference)
        monkeypatch.setitem(sys.modules, "compactor_kernels.gram", products)
        monkeypatch.setitem(sys.modules, "compactor_kernels.value_targets", SimpleNamespace(value_targets=targets))
        for module in (fit, gram):
            monkeypatch.setattr(module, "kernel_runs", lambda rows: rows.dtype == torch.float16)
    made = compact(document, loaded, settings)
    assert True in calls and False in calls and bool(taken) == with_targets
    for one, other in zip(made.layers, plain.layers, strict=True):
        assert one.offsets.tolist() == other.offsets.tolist()
        for name in ("values", "biases"):
            found, expected = (getattr(layer, name).float() for layer in (one, other))
            largest = 0.1 * float(expected.norm())  # a key that hardly any row sees may differ
            assert float((found - expected).norm()) < largest, name
    errors = [cache.metadata.report["reconstruction_error"] for cache in (made, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


# ------------------------------------------------------------------------------------------- merged in one pass

SEGMENTS = [Segment(tuple(range(length)), "repeat") for length in (7, 1, 30, 2)]
GAINS = torch.tensor([0.5, 1.0, 2.0, 1.5])


def half_rows(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda heads: torch.randn(heads, num_rows, 8, generator=generator).bfloat16()  # noqa: E731
    return 2.0 * draw(4), draw(2), draw(2)


def half_layer(prefix: int, layer_type: type[PackedLayer] = PackedLayer, **more: Any) -> PackedLayer:
    """Seventeen document keys after a prefix, in half precision."""
    plain = plain_layer(17, prefix, SEGMENTS)
    full = replace(plain.full, keys=plain.full.keys.bfloat16(), values=plain.full.values.bfloat16())
    return layer_type(full, plain.packed, plain.logical_length, plain.advance, **more)


def inputs_of(prefix: int) -> fit.FitInputs:
    nothing = torch.empty(0)
    return fit.FitInputs(
        prefix, nothing, [], GAINS, {"repeat": 2.0}, None, torch.bfloat16, CompactSettings(keep_ratio=0.5)
    )


def near_in(found: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    assert float((found.float() - exact).norm()) < share * float(exact.norm())


@pytest.mark.parametrize("prefix", [0, 3])
class TestMerging:
    def test_rows_of_the_fit_are_those_of_float32(self, prefix: int, merging: list[str]) -> None:
        layer = half_layer(prefix)
        queries, keys, values = half_rows(layer.packed.num_rows)
        rows = fit.segment_rows(layer, inputs_of(prefix), queries, keys, values, 0.4)
        assert merging == ["merge_rows"]
        exact = exact_rows(layer, queries.float(), keys.float(), values.float(), 0.4, prefix)
        torch.testing.assert_close(rows.lse, exact.lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows.near_share, exact.near_lse - exact.lse, rtol=1e-4, atol=1e-4)
        for name in ("near", "out"):
            assert getattr(rows, name).dtype == torch.float32
            near_in(getattr(rows, name), getattr(exact, name), 0.005)

    def test_scores_are_those_of_float32(self, prefix: int, merging: list[str]) -> None:
        sums = [KeySums.empty(2, 17, 8, torch.device("cpu")) for _ in range(2)]
        given = half_rows(40)
        outs = []
        for own, dtype in zip(sums, (torch.bfloat16, torch.float32), strict=True):
            made = lambda _dim, _device, own=own: own  # noqa: E731
            weights = {"repeat": 2.0}
            named = {"prefix_length": prefix, "head_gains": GAINS, "source_weights": weights, "sums": made}
            layer = half_layer(prefix, ScoreLayer, **named)
            outs.append(layer.attend_packed(*(part.to(dtype) for part in given), 0.4))
        assert merging == ["merge_scored"] and outs[0].dtype == torch.bfloat16
        near_in(outs[0], outs[1], 0.01)
        for name in vars(sums[0]):
            near_in(getattr(sums[0], name), getattr(sums[1], name), 0.01)

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_errors_of_fitted_heads_are_those_of_their_outputs(
        self, prefix: int, step: int, merging: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = half_layer(prefix)
        rows = fit.segment_rows(layer, inputs_of(prefix), *half_rows(layer.packed.num_rows), 0.4)
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().float()  # noqa: E731
        heads = [HeadFit(torch.arange(n), draw(n, 8), draw(n), draw(n, 8), 0.0, 0.0, 0.0, 0.0) for n in (5, 9)]
        outputs, errors, thinned = fit.measured_outputs(rows, heads, torch.bfloat16, step)
        assert merging[1:] == ["merge_measured"] and outputs.dtype == torch.bfloat16
        assert outputs.view(4, -1, 8).shape[1] == layer.packed.num_rows  # no copy is needed to hand them on
        monkeypatch.setattr(attention, "kernel_usable", lambda _name, _query: False)
        plain, plain_errors, plain_thinned = fit.measured_outputs(rows, heads, torch.bfloat16, step)
        assert plain.dtype == torch.float32 and errors.dtype == thinned.dtype == torch.float64
        torch.testing.assert_close(outputs, plain.bfloat16(), rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(errors, plain_errors, rtol=1e-5, atol=0)
        torch.testing.assert_close(thinned, plain_thinned, rtol=1e-5, atol=0)
        torch.testing.assert_close(errors, squared_errors(rows, plain), rtol=1e-5, atol=0)


def test_a_compaction_that_merges_in_one_pass_is_the_same(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    loaded, document = loaded_in(tmp_path, "bfloat16"), make_document("lease", TEXT[:400])
    settings = CompactSettings(keep_ratio=0.3, queries=("repeat",), reserve=64, refine_steps=2, certify=False)
    request.getfixturevalue("emulated")
    plain = compact(document, loaded, settings)
    calls = request.getfixturevalue("merging")
    made = compact(document, loaded, settings)
    assert set(calls) == {"merge_rows", "merge_scored", "merge_measured"}
    for one, other in zip(made.layers, plain.layers, strict=True):
        lengths = [layer.offsets.diff().float() for layer in (one, other)]
        assert float((lengths[0] - lengths[1]).abs().max()) <= 1  # scores may tie
    errors = [cache.metadata.report["reconstruction_error"] for cache in (made, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel runs in this process or on a GPU")
def test_merging_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestMerging or merges_in_one_pass")
