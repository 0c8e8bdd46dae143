"""Claims about modules that multiply few rows by the kernel: answers stay the same, launches become fewer, and what is
not a plain linear module is left alone.

Most run on the CPU with the twins in place of the kernels. Those of `TestFamilies` run the kernels themselves: compiled
on a GPU, without one in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import assert_passes_interpreted
from tiny_models import FAMILIES, make_tiny
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from compactor import kernel_trial, norms, products, rotary
from compactor.fused import fuse
from compactor.lazy_rows import LazyRows, known, lazy_norm, plain
from compactor.norms import fuse_norms
from compactor.products import FewRowsLinear, JoinedLinear, activation_name, fuse_products, gated_form, join
from compactor.rotary import fuse_rotary
from compactor_kernels.reference_gemv import gated_gemv_reference, gemv_reference
from compactor_kernels.reference_rotary import rotate_reference

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
LAYERS, HIDDEN = 3, 64  # of a tiny model
NORMED = [family for family in FAMILIES if family != "gemma3_text"]  # gemma's norm is another equation
KERNELS = {"gemv": "gemv", "gated_gemv": "gemv", "rms_norm": "rms_norm", "rotate": "rotary"}  # function: its module


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Counts(TorchDispatchMode):
    """Counts calls of kernels, and while it is entered sums of rows of a model that PyTorch makes outside them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.aten.add and not self.is_inside and args[0].shape[2:] == (HIDDEN,):
            self.calls["add"] += 1
        return func(*args, **(kwargs or {}))

    def counted(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            is_sum, is_normed = (options.get(key) is not None for key in ("addend", "norm_weights"))
            self.calls[name + (" of a sum" if is_sum else " of norms" if is_normed else "")] += 1
            self.is_inside = True
            try:
                return run(*given, **options)
            finally:
                self.is_inside = False

        return call


def rms_norm_twin(
    rows: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    out: torch.Tensor,
    addend: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    if addend is not None:
        rows = torch.add(rows, addend, out=total)
    return out.copy_(functional.rms_norm(rows.float(), weight.shape, weight.float(), epsilon))


def gemv_twin(rows: torch.Tensor, weights: Any, biases: Any = None, *, settled: bool) -> list[torch.Tensor]:
    assert 1 <= len(rows) <= products.MAX_ROWS and rows.is_contiguous() and type(rows) is torch.Tensor
    return gemv_reference(rows, weights, biases)


def gated_twin(rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, activation: str, settled: bool) -> Any:
    assert 1 <= len(rows) <= products.MAX_ROWS and rows.is_contiguous() and type(rows) is torch.Tensor
    return gated_gemv_reference(rows, gate, up, activation=activation)


TWINS: dict[str, Callable[..., Any]] = {
    "gemv": gemv_twin,
    "gated_gemv": gated_twin,
    "rms_norm": rms_norm_twin,
    "rotate": rotate_reference,
}


def half_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take half precision on the CPU for that of a GPU."""
    for module in (norms, products, rotary):
        monkeypatch.setattr(module, "is_half_on_gpu", lambda weight: weight.dtype in (torch.float16, torch.bfloat16))
        monkeypatch.setattr(module, "usable", lambda *_: True)


def count_kernels(monkeypatch: pytest.MonkeyPatch, *, twins: bool) -> Counts:
    """Count calls of the kernels, or of the twins in their place."""
    counts = Counts()
    for name, module_name in KERNELS.items():
        module = import_module(f"compactor_kernels.{module_name}")
        run = TWINS[name] if twins else getattr(module, name)
        monkeypatch.setattr(module, name, counts.counted(name, run))
    return counts


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Take half precision on the CPU for that of a GPU, and twins for kernels; counts what is called."""
    pytest.importorskip("triton")
    half_on_cpu(monkeypatch)
    return count_kernels(monkeypatch, twins=True)


def tiny(folder: Path, family: str, dtype: torch.dtype = torch.float16, **fields: Any) -> Any:
    """Load a tiny model whose norms have weights of their own."""
    made = make_tiny(family, folder / family, **fields)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator).to(dtype)
    return model


def answer(model: Any, num_new: int, batch: int = 1, counts: Counts | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a prefill of 17 tokens, and of a step of ``num_new`` tokens, whose calls are counted."""
    tokens = (torch.arange(17 + num_new) * 7 % 500).view(1, -1) + torch.arange(batch).view(-1, 1)
    tokens = tokens.to(model.device)
    before = model(tokens[:, :17], use_cache=True)
    given = {"input_ids": tokens[:, 17:], "past_key_values": before.past_key_values}
    if counts is None:
        return before.logits, model(**given).logits
    counts.calls.clear()
    with counts:
        return before.logits, model(**given).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def linears_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


# ---------------------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_few_launches(family: str, tmp_path: Path, on_cpu: Counts) -> None:
    model = tiny(tmp_path, family)
    plain_prefill, plain_step = answer(model, 1)
    fuse_norms(model)
    fuse_rotary(model)
    partly, _ = answer(model, 1)
    assert fuse_products(model) == LAYERS * (7 + 1) + 1
    prefill, step = answer(model, 1, counts=on_cpu)
    assert torch.equal(prefill, partly)  # many rows are multiplied as they were
    assert 0.0 < distance(step, plain_step) < 0.005 and distance(prefill, plain_prefill) < 0.005
    # queries, keys and values together; what leaves attention; what leaves the feed-forward layer; logits
    expected = {"gemv": 3 * LAYERS + 1, "gated_gemv": LAYERS}
    expected["rotate of norms" if family == "qwen3" else "rotate"] = LAYERS
    if family in NORMED:
        expected |= {"rms_norm": 1, "rms_norm of a sum": 2 * LAYERS}
    else:
        expected["add"] = 2 * LAYERS
    assert on_cpu.calls == expected


@pytest.mark.parametrize(("num_new", "batch", "is_few"), [(2, 1, True), (1, 2, True), (3, 1, False), (1, 3, False)])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_two_rows_are_few_and_three_are_many(
    family: str, num_new: int, batch: int, is_few: bool, tmp_path: Path, on_cpu: Counts
) -> None:
    model = tiny(tmp_path, family)
    _, expected = answer(model, num_new, batch)
    fuse(model)
    _, found = answer(model, num_new, batch, on_cpu)
    assert found.shape == expected.shape and distance(found, expected) < 0.005
    assert on_cpu.calls["gated_gemv"] == (LAYERS if is_few else 0)
    assert on_cpu.calls["gemv"] == (3 * LAYERS + 1 if is_few else 0)


def test_with_gradients_models_do_what_they_did(tmp_path: Path, on_cpu: Counts) -> None:
    model = tiny(tmp_path, "qwen3")
    tokens = torch.ones(1, 1, dtype=torch.long)
    with torch.enable_grad():
        model(tokens).logits.float().sum().backward()
        expected = model.model.layers[0].mlp.up_proj.weight.grad.clone()
        model.zero_grad()
        fuse_products(model)
        model(tokens).logits.float().sum().backward()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.grad, expected) and not on_cpu.calls["gemv"]


def test_outputs_of_models_are_plain_tensors(tmp_path: Path, on_cpu: Counts) -> None:
    model = tiny(tmp_path, "llama")
    fuse(model)
    found = model(torch.ones(1, 1, dtype=torch.long), output_hidden_states=True)
    assert type(found.logits) is torch.Tensor
    layers = [state * 1 for state in found.hidden_states]  # those that wait are computed now
    assert all(bool(state.isfinite().all()) and type(state) is torch.Tensor for state in layers)


# ----------------------------------------------------------------------------------------------- what is left alone


def spoil_hook(module: torch.nn.Linear) -> None:
    module._hf_hook = object()  # type: ignore[assignment]


def spoil_forward(module: torch.nn.Linear) -> None:
    module.forward = lambda input: functional.linear(input, module.weight) * 2.0  # type: ignore[method-assign]


def spoil_class(module: torch.nn.Linear) -> None:
    module.__class__ = type("Linear", (torch.nn.Linear,), {})  # adapters and quantised modules are subclasses


def spoil_type(module: torch.nn.Linear) -> None:
    module.float()


def spoil_layout(module: torch.nn.Linear) -> None:
    module.weight.data = module.weight.data.t().contiguous().t()


@pytest.mark.parametrize("spoil", [spoil_hook, spoil_forward, spoil_class, spoil_type, spoil_layout])
def test_what_is_no_plain_linear_module_is_left_alone(
    spoil: Callable[[torch.nn.Linear], None], tmp_path: Path, on_cpu: Counts
) -> None:
    model = tiny(tmp_path, "llama")
    layer, other = model.model.layers[0], model.model.layers[1]
    spoiled = layer.self_attn.k_proj, layer.mlp.up_proj, layer.mlp.down_proj
    for module in spoiled:
        spoil(module)
    kinds = [type(module) for module in spoiled]
    count = fuse_products(model)
    assert count == LAYERS * (7 + 1) + 1 - len(spoiled) - 1  # and the gated layer
    assert [type(module) for module in spoiled] == kinds and not isinstance(spoiled[0], FewRowsLinear)
    assert type(layer.self_attn.q_proj) is type(layer.mlp.gate_proj) is FewRowsLinear  # alone
    assert type(other.self_attn.q_proj) is JoinedLinear and type(other.mlp).__name__ == type(layer.mlp).__name__
    assert type(other.mlp) is not type(layer.mlp) and isinstance(other.mlp, type(layer.mlp))


def test_nothing_changes_on_a_cpu_or_in_single_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuse_products(tiny(tmp_path, "llama")) == 0
    monkeypatch.setattr(products, "is_half_on_gpu", lambda weight: weight.dtype == torch.float16)
    monkeypatch.setattr(kernel_trial, "passes", lambda *_: pytest.fail("the kernel was tried"))
    model = tiny(tmp_path, "llama")
    assert fuse_products(model) == 0  # no kernel runs there
    assert fuse_products(tiny(tmp_path, "llama", torch.float32)) == 0
    assert {type(module) for module in linears_of(model)} == {torch.nn.Linear}


def test_other_models_keep_their_classes(tmp_path: Path, on_cpu: Counts) -> None:
    model, other = tiny(tmp_path, "llama"), tiny(tmp_path, "llama")
    kinds = [type(module) for module in other.modules()]
    fuse(model)
    assert [type(module) for module in other.modules()] == kinds
    answer(other, 1, counts=on_cpu)
    assert not {name for name in on_cpu.calls if name != "add"}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in other.named_parameters()]


def test_an_activation_that_the_kernel_does_not_know_is_kept(tmp_path: Path, on_cpu: Counts) -> None:
    model = tiny(tmp_path, "llama", hidden_act="relu")
    _, expected = answer(model, 1)
    kinds = [type(layer.mlp) for layer in model.model.layers]
    assert fuse_products(model) == LAYERS * 7 + 1
    assert [type(layer.mlp) for layer in model.model.layers] == kinds
    _, found = answer(model, 1, counts=on_cpu)
    assert distance(found, expected) < 0.005 and not on_cpu.calls["gated_gemv"]
    assert on_cpu.calls["gemv"] == 5 * LAYERS + 1


@pytest.mark.parametrize(
    ("activate", "name"),
    [
        (torch.nn.SiLU(), "silu"),
        (functional.silu, "silu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.nn.GELU(), None),
        (torch.nn.Sigmoid(), None),
        (lambda rows: (rows, rows), None),
        ("silu", None),
        (None, None),
    ],
)
def test_activations_are_known_by_their_values(activate: object, name: str | None) -> None:
    assert activation_name(activate) == name


class Gated(torch.nn.Module):
    """A gated feed-forward layer; ``factor`` is something that its names do not tell."""

    def __init__(self, factor: float = 1.0, bias: bool = False, inner: int = 48) -> None:
        super().__init__()
        self.factor, self.act_fn = factor, torch.nn.SiLU()
        make = lambda a, b, bias: torch.nn.Linear(a, b, bias=bias, dtype=torch.float16)  # noqa: E731
        self.gate_proj, self.up_proj, self.down_proj = make(32, 48, bias), make(32, inner, bias), make(48, 32, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return down(act(gate x) * up x)."""
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out * self.factor


def test_a_gated_layer_that_does_something_else_is_kept(on_cpu: Counts) -> None:
    def form(module: torch.nn.Module) -> type | None:
        return gated_form(module, set(linears_of(module)))

    assert form(Gated()) is form(Gated()) is not None
    assert form(Gated(factor=1.5)) is None and form(Gated(bias=True)) is None and form(torch.nn.Module()) is None
    assert form(Gated(inner=1)) is None  # its up broadcasts
    assert gated_form(Gated(), set()) is None
    own = Gated()
    own.forward = own.forward  # type: ignore[method-assign]
    assert form(own) is None


# --------------------------------------------------------------------------------------------------- joined products


def joined(biases: tuple[bool, bool, bool] = (True, True, True)) -> list[torch.nn.Linear]:
    modules = [
        torch.nn.Linear(16, size, bias=biased, dtype=torch.float16)
        for size, biased in zip((32, 8, 8), biases, strict=True)
    ]
    join(modules)
    return modules


def assert_product(found: torch.Tensor, module: torch.nn.Linear, rows: torch.Tensor) -> None:
    bias = None if module.bias is None else module.bias.float()
    expected = functional.linear(rows.float(), module.weight.float(), bias)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_the_same_rows_are_multiplied_once(on_cpu: Counts) -> None:
    modules, rows = joined(), torch.randn(1, 1, 16).half()
    for order in ((0, 1, 2), (2, 0, 1)):
        on_cpu.calls.clear()
        for number in order:
            assert_product(modules[number](rows), modules[number], rows)
        assert on_cpu.calls == {"gemv": 1}


def test_rows_that_changed_or_are_others_are_multiplied_again(on_cpu: Counts) -> None:
    modules, rows = joined(), torch.randn(1, 2, 16).half()
    assert_product(modules[0](rows), modules[0], rows)
    rows.add_(1.0)
    assert_product(modules[1](rows), modules[1], rows)
    equal = rows.clone()
    assert_product(modules[2](equal), modules[2], equal)
    assert on_cpu.calls == {"gemv": 3}
    assert_product(modules[2](equal), modules[2], equal)  # twice the same one
    assert on_cpu.calls == {"gemv": 4}
    view = equal[:, :1]
    equal.mul_(3.0)
    assert_product(modules[0](view), modules[0], view)
    view.zero_()
    assert_product(modules[1](view), modules[1], view)


def test_rows_that_wait_are_computed_once_and_may_change(on_cpu: Counts) -> None:
    modules, weight = joined(), torch.ones(16).half()
    given = torch.randn(1, 1, 16).half()
    rows = lazy_norm(given, weight, 1e-6, on_cpu.counted("norm", rms_norm_twin))
    expected = functional.rms_norm(given.float(), (16,), weight.float(), 1e-6)
    for module in modules:
        assert_product(module(rows), module, expected)
    assert on_cpu.calls == {"gemv": 1, "norm": 1}
    modules[0](rows)
    rows.add_(1.0)
    assert_product(modules[1](rows), modules[1], expected + 1.0)


def test_other_rows_are_multiplied_as_before(on_cpu: Counts) -> None:
    modules = joined()
    for rows in (torch.randn(3, 16).half(), torch.randn(1, 3, 16).half(), torch.zeros(0, 16).half()):
        for module in modules:
            assert torch.equal(module(rows), functional.linear(rows, module.weight, module.bias))
    with pytest.raises(RuntimeError):
        modules[0](torch.randn(1, 15).half())
    with pytest.raises(RuntimeError):
        modules[0](torch.randn(1, 16))
    assert not on_cpu.calls


def test_modules_of_which_some_have_a_bias_are_not_joined(on_cpu: Counts) -> None:
    modules = joined((True, False, True))
    assert not any(isinstance(module, JoinedLinear) for module in modules)
    assert all(isinstance(module, JoinedLinear) for module in joined((False, False, False)))


def test_rows_in_any_layout(on_cpu: Counts) -> None:
    (module, *_), whole = joined(), torch.randn(2, 32).half()
    for rows in (whole[:, ::2], whole[:1, :16], whole[0, :16], torch.randn(16, 2).half().t()):
        found = module(rows)
        assert found.shape == (*rows.shape[:-1], 32)
        assert_product(found, module, rows)


def test_a_copy_of_a_model_multiplies_with_weights_of_its_own(tmp_path: Path, on_cpu: Counts) -> None:
    model = tiny(tmp_path, "qwen2")
    fuse(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(-2.0)
        _, expected = answer(model, 1)
        _, changed = answer(other, 1)
    assert distance(changed, expected) > 0.01
    del model
    gc.collect()
    assert torch.equal(answer(other, 1)[1], changed)


def test_hooks_see_every_call(tmp_path: Path, on_cpu: Counts) -> None:
    model = tiny(tmp_path, "llama")
    fuse(model)
    seen: Counter[str] = Counter()
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "o_proj"):
        hook = lambda module, given, out, name=name: seen.update({name: out.shape[-1]})  # noqa: E731
        getattr(attention, name).register_forward_hook(hook)
    attention.v_proj.register_forward_hook(lambda module, given, out: out * 0.0)
    attention.o_proj.register_forward_hook(lambda module, given, out: seen.update({"largest": float(out.abs().max())}))
    answer(model, 1)
    assert seen == {"q_proj": 2 * HIDDEN, "k_proj": HIDDEN, "o_proj": 2 * HIDDEN, "largest": 0.0}


def test_weights_go_with_the_last_reference_to_the_model(tmp_path: Path, on_cpu: Counts) -> None:
    for family in ("qwen3", "gemma3_text"):
        model = tiny(tmp_path, family)
        fuse(model)
        answer(model, 1)
        layer = model.model.layers[0]
        weights = [
            weakref.ref(module.weight) for module in (layer.self_attn.q_proj, layer.mlp.up_proj, model.model.norm)
        ]
        del layer
        gc.collect()
        gc.disable()
        try:
            del model
            assert all(weight() is None for weight in weights)
        finally:
            gc.enable()


def test_results_that_go_to_the_residual_stream_let_sums_wait(tmp_path: Path, on_cpu: Counts) -> None:
    model = tiny(tmp_path, "llama")
    fuse_products(model)
    layer, rows = model.model.layers[0], torch.randn(1, 1, HIDDEN).half()
    attended = torch.randn(1, 1, layer.self_attn.o_proj.in_features).half()
    ends = layer.self_attn.o_proj(attended), layer.mlp(rows)
    others = layer.self_attn.q_proj(rows), layer.mlp.up_proj(rows), model.lm_head(rows)
    assert all(isinstance(out, LazyRows) for out in ends) and all(type(out) is torch.Tensor for out in others)
    total = rows + ends[0]
    assert isinstance(total, LazyRows) and torch.equal(plain(total), rows + plain(ends[0]))
    assert isinstance(known(rows) + rows, LazyRows)


# -------------------------------------------------------------------------------------------------------- the kernels


@pytest.mark.skipif(not (INTERPRETED or COMPILED), reason="needs Triton and a GPU, or its interpreter")
class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_steps_of_one_and_two_tokens(self, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if INTERPRETED:
            half_on_cpu(monkeypatch)
        layers = 1 if family in NORMED else 2  # of gemma's two kinds
        model = tiny(tmp_path, family, num_layers=layers).to("cuda" if COMPILED else "cpu")
        expected = [answer(model, num_new) for num_new in (1, 2)]
        fuse_norms(model)
        fuse_rotary(model)
        partly = answer(model, 1)[0]
        assert fuse_products(model) == layers * (7 + 1) + 1
        counts = count_kernels(monkeypatch, twins=False)
        for num_new, (prefill, step) in zip((1, 2), expected, strict=True):
            found_prefill, found_step = answer(model, num_new, counts=counts)
            assert distance(found_step, step) < 0.01 and distance(found_prefill, prefill) < 0.01
            assert torch.equal(found_prefill, partly)
            assert counts.calls["gemv"] == 3 * layers + 1 and counts.calls["gated_gemv"] == layers
            assert counts.calls["rms_norm of a sum"] == (2 * layers if family in NORMED else 0)
            assert counts.calls["rotate of norms" if family == "qwen3" else "rotate"] == layers

    @pytest.mark.skipif(not COMPILED, reason="needs a GPU")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_captured_modules_follow_their_rows(self, family: str, tmp_path: Path) -> None:
        model = tiny(tmp_path, family, torch.bfloat16).cuda()
        fuse(model)
        layer, given = model.model.layers[0], torch.randn(3, 1, 1, HIDDEN, device="cuda").bfloat16()

        def run(rows: torch.Tensor) -> list[torch.Tensor]:
            normed = layer.input_layernorm(rows)
            outs = [getattr(layer.self_attn, name)(normed) for name in products.JOINED]
            return [*outs, plain(model.model.norm(rows + layer.mlp(normed)))]

        expected, rows = [run(one) for one in given], given[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(rows)
        for number in (1, 0, 2):
            rows.copy_(given[number])
            graph.replay()
            assert all(map(torch.equal, found, expected[number]))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__, "TestFamilies")
